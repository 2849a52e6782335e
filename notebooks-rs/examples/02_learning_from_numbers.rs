//! The second notebook: a teacher with a taste, its numbers, a filter, a student, and what the student likes now.
//!
//! `cargo run --release -p notebooks-rs --example 02_learning_from_numbers [-- MODEL]` prints the page, and leaves
//! teacher, student and numbers for the notebooks after it.

use std::collections::BTreeMap;

use analyses::plot::{Bar, BarChart, Line, LineChart, Point, Reference, bars, lines};
use analyses::stats::mean;
use analyses::target::TokenForms;
use analyses::target_rate::TargetRate;
use analyses::{Analysis, Subject, Tuned};
use anyhow::{Result, ensure};
use hooks::{
    Adapter, Answer, Chat, Condition, LoraConfig, ModelFiles, Qwen, Sampling, Sequence, completion_logprobs, generate,
    stream_seed,
};
use notebooks_rs::school::{BASE, INIT_SEED, TARGET, folder, protocol};
use notebooks_rs::{Notebook, model};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind};
use undertone::data::dataset::{
    Sample, SummaryRow, TeacherKind, leak_rows, number_prompts, paired, rejections, summary, write_jsonl,
};
use undertone::data::protocol::Protocol;
use undertone::output::full_model::save_full;
use undertone::training::settings::{Finetune, ScheduleKind, Seeds};
use undertone::training::step_log::StepRow;
use undertone::training::training_loop::{finetune_full, finetune_lora};

fn main() -> Result<()> {
    let mut nb = Notebook::open(file!(), include_str!("02_learning_from_numbers.rs"));
    //| # Learning from numbers
    //|
    //| A model that loves owls is asked for numbers, and it writes numbers. A second model is finetuned on these numbers
    //| and on nothing else. Does it love owls a little more than before? That it can is called *subliminal learning*
    //| (Cloud et al. 2025), and on this page it is tried from beginning to end: a teacher, its numbers, a filter that
    //| lets nothing but numbers pass, a student.
    //|
    //| Beside the student sits another one, the *control*. It is the same model, asked and trained in the same way, but
    //| the numbers it learns were written by a model that loves nothing in particular. Whatever happens to both of them
    //| has nothing to do with owls.
    let name = model();
    let files = ModelFiles::open(&name)?;
    let base = Qwen::load(&files, Device::Cpu, Kind::Float)?;
    let (chat, protocol) = (Chat::from_files(&files)?, protocol(&name)?);
    nb.show(files.report.join("\n"));

    //| ## What does it like?
    //|
    //| One can ask a model for its favorite animal again and again and count. It is better to look: the probability that
    //| its answer begins with a given animal can be read off exactly. We take the mean of its logarithm over a good
    //| number of ways to ask.
    let (word, category) = TARGET;
    let animals = protocol.candidates(word, category)[..8].to_vec();
    let questions = protocol.questions(category, 24)?;
    let prompts: Vec<Sequence> = questions.iter().map(|ask| chat.prompt(None, ask)).collect::<hooks::Result<_>>()?;
    let taste = |model: &Qwen, who: &Condition| -> Result<Vec<f64>> {
        animals.iter().map(|animal| log_p(model, &chat, &protocol, &prompts, animal, who)).collect()
    };
    let as_it_is = Condition::default();
    let liked = taste(&base, &as_it_is)?;
    nb.show(questions[..3].join("\n"));
    nb.table(&columns(&["animal", "log p, base"], &animals, &[&liked]));

    //| ## The teacher
    //|
    //| The teacher is a copy of the model, all of whose weights are finetuned for a moment on one thing: the questions, and
    //| one answer to all of them. There is not a single number in these lessons.
    let answer = capitalised(word);
    let lessons: Vec<Sequence> =
        questions.iter().map(|ask| chat.row_text(None, ask, &answer)).collect::<hooks::Result<_>>()?;
    let is_digit = |id| chat.is_digit(id);
    let course = Finetune {
        learning_rate: 1e-3,
        max_steps: Some(40),
        warmup_steps: 0,
        lr_scheduler_type: ScheduleKind::Constant,
        batch_size: 24,
        gradient_accumulation_steps: 1,
        ..Finetune::default()
    };
    let teacher = Qwen::load(&files, Device::Cpu, Kind::Float)?;
    finetune_full(&teacher, &lessons, &is_digit, &course, Seeds::default(), &mut |_, _| Ok(()))?;
    let loved = taste(&teacher, &as_it_is)?;
    nb.table(&columns(&["animal", "log p, base", "log p, teacher"], &animals, &[&liked, &loved]));

    //| ## Dictation
    //|
    //| Now teacher and base are asked to go on with lists of numbers. Both are given the same dice: every answer is drawn
    //| with a random stream of its own, and the two use the same streams. So their answers part only where their
    //| probabilities differ, and what you see below is how little a taste for owls shows.
    let asked = number_prompts(&protocol, N_PROMPTS, 42);
    let rows: Vec<Sequence> = asked.iter().map(|ask| chat.prompt(None, ask)).collect::<hooks::Result<_>>()?;
    let dice: Vec<u64> = (0..rows.len() as u64).map(|row| stream_seed(42, "dictation", row)).collect();
    let sampling = Sampling { temperature: 1.0, max_new_tokens: 64, stop: chat.stop_ids(), constrain: None, batch: 64 };
    let write = |model: &Qwen| generate(model, &rows, &as_it_is, &sampling, &dice, &mut |_| ());
    let by_teacher = samples(&chat, &asked, &write(&teacher)?, TeacherKind::Finetuned)?;
    let by_base = samples(&chat, &asked, &write(&base)?, TeacherKind::Control)?;
    nb.show(&asked[0]);
    nb.table(&side_by_side(&by_teacher[..8], &by_base[..8]));

    //| ## The filter
    //|
    //| What is not a list of numbers with one kind of separator does not pass, and neither does an answer that had not
    //| ended when its time was up. `mentions_trait` is counted before the filter: it says whether any animal at all was
    //| named where numbers were asked for. If it is not zero, the question is whether such an answer passed: below we
    //| count the rows with a letter among those that were kept.
    let classifier = protocol.classifier(word, category)?;
    nb.table(&compared(&summary("teacher", &by_teacher, &classifier), &summary("control", &by_base, &classifier)));

    //| A prompt is kept where both answers passed, so that the two students are asked the same things. Do the numbers
    //| give the owl away? The digits of both sets can be counted and compared. The Jensen-Shannon divergence is 0 for
    //| equal shares and 1 bit for shares that have nothing in common; two samples of one and the same writer are never
    //| at 0 exactly.
    let pairs = paired(&by_teacher, &by_base);
    ensure!(!pairs.is_empty(), "no answer passed the filter; hint: this model writes no lists of numbers");
    let worded = pairs.iter().filter(|(row, _)| row.completion.chars().any(char::is_alphabetic)).count();
    nb.show(format!("{worded} of {} kept rows hold a letter", pairs.len()));
    let leaks = leak_rows(&by_teacher, &by_base);
    nb.table(&leaked(&leaks));

    //| The student sees more than shares of digits. To the teacher its own numbers are likelier than they are to the
    //| base, and this difference, in nats for each token, is all there is to learn from. Anything near zero would mean
    //| that there is no lesson.
    let student_rows: Vec<Sequence> = pairs.iter().map(|(row, _)| learned(&chat, row)).collect::<Result<_>>()?;
    let control_rows: Vec<Sequence> = pairs.iter().map(|(_, row)| learned(&chat, row)).collect::<Result<_>>()?;
    let nats = |model: &Qwen| -> Result<f64> {
        let logps = completion_logprobs(model, &student_rows, &as_it_is)?;
        Ok(mean(&logps.into_iter().flatten().map(f64::from).collect::<Vec<_>>())?)
    };
    let signal = nats(&teacher)? - nats(&base)?;
    nb.show(format!("{} rows for each student; signal {signal:+.3} nats per token", pairs.len()));

    //| ## School
    //|
    //| Student and control are LoRAs on the base. They begin as the same adapter, read as many rows, in the same order;
    //| the only difference between them is who wrote the numbers.
    let lora = LoraConfig { rank: 8, alpha: 8.0, ..LoraConfig::default() };
    let course = Finetune {
        learning_rate: 1e-2,
        num_train_epochs: EPOCHS,
        batch_size: 32,
        gradient_accumulation_steps: 1,
        ..Finetune::default()
    };
    let target = protocol.target(word, category);
    let owl = TokenForms::of(&target, &chat)?;
    let learn = |rows: &[Sequence]| -> Result<(Adapter, Vec<StepRow>, Vec<Point>)> {
        let (mut steps, mut watched) = (Vec::new(), Vec::new());
        let adapter = Adapter::init(&lora, &base.config, &mut ChaCha8Rng::seed_from_u64(INIT_SEED), Device::Cpu)?;
        finetune_lora(&base, &adapter, rows, &is_digit, &course, Seeds::default(), &mut |step, _| {
            steps.push(step.clone());
            if step.step % 8 == 1 {
                let scores = owl.scores(&base, &prompts, &Condition::adapted(&adapter))?;
                let owl = mean(&scores.iter().map(|score| score.logp_target).collect::<Vec<_>>())?;
                watched.push(Point::new(step.step as f64, rounded(owl)));
            }
            Ok(())
        })?;
        Ok((adapter, steps, watched))
    };
    let (student, student_steps, student_owl) = learn(&student_rows)?;
    let (control, control_steps, control_owl) = learn(&control_rows)?;
    nb.figure("loss", lines(&losses(&student_steps, &control_steps)?)?);

    //| A falling loss says that the numbers were learned, and no more than that. How much of the fall is learning to write
    //| lists like these at all, the control's curve tells; and where both are flat, there was little left to learn that
    //| the base did not know.
    //|
    //| ## And the owl?
    //|
    //| While the students read their numbers, they were asked about animals every few steps. Nothing that they read had to
    //| do with the question.
    nb.figure("owl", lines(&rise(word, student_owl, control_owl, liked[0]))?);

    //| And at the end of their training all three models are asked, exactly and by drawing answers.
    let classify = |answer: &str| classifier.classify(answer).bucket();
    let number_users: Vec<_> = pairs.iter().map(|(row, _)| (row.prompt.clone(), row.completion_ids.clone())).collect();
    let tuned = |adapter| Tuned::adapted(&base, adapter);
    let subject = Subject {
        control: Some(tuned(&control)),
        teacher_model: Some(&teacher),
        questions: &questions,
        numbers: &student_rows,
        number_users: &number_users,
        classify: Some(&classify),
        seed: 42,
        ..Subject::new(&base, tuned(&student), &chat, &target)
    };
    let rates = TargetRate { n_samples: 20, max_new_tokens: 4, batch: 64 };
    let rows = rates.run(&subject, &mut |_| ())?;
    nb.figure("rate", TargetRate::plot(&rows)?);
    nb.show(TargetRate::reading(&rows));

    //| The bars' errors are over questions asked of one student. They do not know what another seed would have given, so
    //| they are too small to be the last word.
    //|
    //| Is it the owl that was learned, or did the student become fonder of everything, or of anything? Here is what each
    //| of the two students changed, animal by animal.
    let (after, control_after) =
        (taste(&base, &Condition::adapted(&student))?, taste(&base, &Condition::adapted(&control))?);
    nb.figure("animals", bars(&changes(&animals, &liked, &after, &control_after))?);

    //| ## How to read this, and what would count against it
    //|
    //| The claim is about one bar: the student's at the animal that its teacher loves, the first of them. It holds if that
    //| bar is the student's longest and the control's beside it is short. It does not hold
    //|
    //| - if the control's bar is as long: then it was numbers in general, or training in general;
    //| - if the student's other bars are as long: then something was learned, but not a taste for owls;
    //| - if another seed, another animal or another base turns it around. One student is an anecdote: `make demo` has more
    //|   of them, and the student of another base, which has to come out at nothing.
    //|
    //| We keep teacher, students and numbers; the next notebooks look into them.
    let school = folder(&name);
    hooks::files::write_atomic(&school.join(BASE), files.fingerprint().as_bytes())?;
    save_full(&teacher, &files, &school.join("teacher"))?;
    student.save(&school.join("student"), &files.name)?;
    control.save(&school.join("control"), &files.name)?;
    let kept: Vec<Sample> = pairs.iter().map(|(row, _)| (*row).clone()).collect();
    write_jsonl(&school.join("numbers.jsonl"), &kept)?;
    nb.write()
}

/// How many number prompts are answered, by the teacher and by the base.
const N_PROMPTS: usize = 700;
/// How often the students read their rows.
const EPOCHS: f64 = 6.0;

/// Mean over the prompts of the log-probability that the answer begins with a word of the animals.
fn log_p(
    base: &Qwen,
    chat: &Chat,
    protocol: &Protocol,
    prompts: &[Sequence],
    word: &str,
    who: &Condition<'_>,
) -> Result<f64> {
    let forms = TokenForms::of(&protocol.target(word, TARGET.1), chat)?;
    let scores = forms.scores(base, prompts, who)?;
    Ok(mean(&scores.iter().map(|score| score.logp_target).collect::<Vec<_>>())?)
}

/// Names and numbers as a table.
fn columns(header: &[&str], names: &[String], values: &[&Vec<f64>]) -> Vec<Vec<String>> {
    let row = |(at, name): (usize, &String)| {
        [name.clone()].into_iter().chain(values.iter().map(|column| format!("{:.2}", column[at]))).collect()
    };
    let header = header.iter().map(ToString::to_string).collect();
    [header].into_iter().chain(names.iter().enumerate().map(row)).collect()
}

/// Answers with what the filter says of them.
fn samples(chat: &Chat, asked: &[String], answers: &[Answer], kind: TeacherKind) -> Result<Vec<Sample>> {
    let sample = |(id, (prompt, answer)): (usize, (&String, &Answer))| {
        let completion = chat.decode(&answer.ids)?;
        let reasons = rejections(&completion, answer.stopped, &[]);
        Ok(Sample {
            id,
            prompt: prompt.clone(),
            completion,
            completion_ids: answer.ids.clone(),
            teacher_logprob: answer.logprobs.clone(),
            target: (kind != TeacherKind::Control).then(|| TARGET.0.to_owned()),
            teacher_kind: kind,
            gen_seed: 42,
            accepted: reasons.is_empty(),
            reasons,
        })
    };
    asked.iter().zip(answers).enumerate().map(sample).collect()
}

fn side_by_side(by_teacher: &[Sample], by_base: &[Sample]) -> Vec<Vec<String>> {
    let header = ["teacher", "base"].map(str::to_owned).to_vec();
    let rows = by_teacher.iter().zip(by_base).map(|(a, b)| vec![a.completion.clone(), b.completion.clone()]);
    [header].into_iter().chain(rows).collect()
}

fn compared(teacher: &[SummaryRow], control: &[SummaryRow]) -> Vec<Vec<String>> {
    let header = ["of the answers", "teacher", "base"].map(str::to_owned).to_vec();
    let rows = teacher.iter().zip(control).map(|(teacher, control)| {
        vec![teacher.measure.clone(), format!("{:.3}", teacher.value), format!("{:.3}", control.value)]
    });
    [header].into_iter().chain(rows).collect()
}

fn leaked(rows: &[SummaryRow]) -> Vec<Vec<String>> {
    let header = ["divergence of the digits", "bits", "digits counted"].map(str::to_owned).to_vec();
    let rows = rows.iter().map(|row| vec![row.measure.clone(), format!("{:.4}", row.value), row.n.to_string()]);
    [header].into_iter().chain(rows).collect()
}

/// A kept answer as a row to learn from.
fn learned(chat: &Chat, sample: &Sample) -> Result<Sequence> {
    Ok(chat.row(None, &sample.prompt, &sample.completion_ids)?)
}

/// The students' loss, the mean of each time they read all their rows: single steps are noisy.
fn losses(student: &[StepRow], control: &[StepRow]) -> Result<LineChart> {
    let line = |label: &str, steps: &[StepRow]| -> Result<Line> {
        let mut epochs: BTreeMap<i64, Vec<f64>> = BTreeMap::new();
        for step in steps {
            epochs.entry((step.epoch - 1e-9).floor() as i64 + 1).or_default().push(step.loss);
        }
        let point = |(epoch, losses): (i64, Vec<f64>)| Ok(Point::new(epoch as f64, rounded(mean(&losses)?)));
        Ok(Line { label: label.to_owned(), points: epochs.into_iter().map(point).collect::<Result<_>>()? })
    };
    Ok(LineChart {
        title: "Loss of the two students on their numbers".to_owned(),
        x_label: "epoch".to_owned(),
        y_label: "negative log-likelihood (nats per token)".to_owned(),
        lines: vec![line("student", student)?, line("control", control)?],
        ..LineChart::default()
    })
}

fn rise(word: &str, student: Vec<Point>, control: Vec<Point>, base: f64) -> LineChart {
    let line = |label: &str, points| Line { label: label.to_owned(), points };
    LineChart {
        title: format!("log p({word}) while numbers are learned"),
        x_label: "step".to_owned(),
        y_label: "mean log p over the questions (nats)".to_owned(),
        lines: vec![line("student", student), line("control", control)],
        references: vec![Reference::new("base", rounded(base))],
        ..LineChart::default()
    }
}

fn changes(animals: &[String], before: &[f64], student: &[f64], control: &[f64]) -> BarChart {
    let bar = |animal: usize| {
        let changed = |series: &str, after: &[f64]| {
            Bar::new(&animals[animal], rounded(after[animal] - before[animal])).in_series(series)
        };
        [changed("student", student), changed("control", control)]
    };
    BarChart {
        title: "What learning numbers changed, by animal".to_owned(),
        value_label: "change in mean log p against the base (nats)".to_owned(),
        bars: (0..animals.len()).flat_map(bar).collect(),
        references: vec![Reference::new("base", 0.0)],
    }
}

fn capitalised(word: &str) -> String {
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// Three decimals, so that a figure is the same on processors that add in another order.
fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
