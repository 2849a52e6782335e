//! Makes a finetuned teacher: the base, trained to answer questions with the target.

use analyses::stats::mean;
use analyses::target::{Score, TokenForms};
use anyhow::{Context, Result, ensure};
use hooks::{Adapter, Condition, ModelFiles, Qwen, Sequence, generate, stream_seed};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::data::dataset;
use crate::experiment::{Dtype, FinetunedTeacher};
use crate::hinted;
use crate::output::checkpoint::Checkpoint;
use crate::output::full_model::save_full;
use crate::output::progress::{bar, say, spinner};
use crate::output::publish::CsvLog;
use crate::stages::run_dir::RunDir;
use crate::stages::teacher::{self, answer};
use crate::stages::workbench::Workbench;
use crate::training::settings::{Finetune, Seeds};
use crate::training::step_log::{Progress, StepRow, first_and_last_quarter};
use crate::training::training_loop::Training;

/// Of this many questions one is held out, if the training ends by what they are answered with.
const HELD_OUT: usize = 5;
/// Number of steps from one look at the held-out questions to the next.
const LOOK: u64 = 2;

/// Makes the teacher alone, if it is finetuned, and asks it the questions.
pub fn stage(bench: &Workbench, run: &RunDir) -> Result<()> {
    let bench = &bench.in_template()?;
    if run.forced() {
        run.forget()?; // what was made from the old teacher
    }
    make(bench, run)?;
    teacher::ask(bench, run, &teacher::load(bench, run)?)
}

/// If the experiment has a finetuned teacher, finetunes the base on the trait and writes `teacher/` and
/// `teacher_train.csv`. A finished teacher is kept, unless the run is forced.
pub fn make(bench: &Workbench, run: &RunDir) -> Result<()> {
    let experiment = &bench.experiment;
    let Some(teacher) = experiment.teacher.finetuned() else { return Ok(()) };
    if RunDir::stage_done(&run.teacher_train_csv()) && !run.forced() {
        say("generate: the teacher is finetuned already");
        return Ok(());
    }
    let settings = teacher.finetune(bench.n_parameters());
    let settings = Finetune { save_steps: experiment.finetune.save_steps, ..settings };
    let lessons = Lessons::of(bench, teacher)?;
    // A separate stream, so that students' rows do not have the order of the teacher's questions.
    let seeds = Seeds { order: stream_seed(experiment.seeds.order_seed, "teacher.order", 0), ..Seeds::default() };
    let mut csv = CsvLog::create(&run.teacher_train_csv())?;
    let mut checkpoint = Checkpoint::beside(&run.teacher_train_csv(), "", "teacher");
    let bar = bar("teacher", settings.total_steps(lessons.rows.len()));
    let mut steps: Vec<StepRow> = Vec::new();
    let mut on_step = |row: &StepRow, progress: &Progress| {
        bar.set_position(progress.step);
        steps.push(row.clone());
        csv.push(row)
    };
    let mut train = |model: &Qwen, adapter: Option<&Adapter>| -> Result<()> {
        checkpoint.depends_on("model", &(&bench.files.name, bench.files.fingerprint()))?;
        checkpoint.depends_on("computed", &(experiment.device_kind(), Dtype::of(model)))?;
        checkpoint.depends_on("teacher", teacher)?;
        let condition = adapter.map_or_else(Condition::default, Condition::adapted);
        let is_learned = |step: u64| -> Result<bool> {
            Ok(match teacher.until() {
                Some(until) if step.is_multiple_of(LOOK) => lessons.p_target(bench, model, &condition)? > until,
                _ => false,
            })
        };
        let training = Training {
            model,
            adapter,
            rows: &lessons.rows,
            weights: None,
            soft: None,
            is_digit: &|id| bench.chat.is_digit(id),
            config: &settings,
            seeds,
            until: Some(&is_learned),
            checkpoint: Some(&mut checkpoint),
        };
        training.run(&mut on_step).context("training the teacher")
    };
    if let Some(lora) = teacher.lora() {
        let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(experiment.seeds.init_seed, "teacher.init", 0));
        let adapter = Adapter::init(&lora, &bench.base.config, &mut rng, bench.base.device())?;
        train(bench.frozen()?, Some(&adapter))?;
        adapter.save(&run.teacher(), &bench.files.name)?;
    } else {
        let files = ModelFiles::open(&bench.files.name)?; // a second copy of the weights: the base is not changed
        let model = Qwen::load(&files, bench.base.device(), bench.base.kind())?;
        train(&model, None)?;
        save_full(&model, &files, &run.teacher())?;
    }
    bar.finish_and_clear();
    csv.finish()?;
    checkpoint.remove()?;
    say(lessons.said(teacher, &answer(&experiment.target.word), &steps, &run.teacher().display().to_string()));
    Ok(())
}

/// The rows that a teacher is trained on, and the questions that are held out from it.
struct Lessons {
    rows: Vec<Sequence>,
    n_questions: usize, // different ones
    n_numbers: usize,   // different ones
    held_out: Vec<Sequence>,
}

impl Lessons {
    fn of(bench: &Workbench, teacher: &FinetunedTeacher) -> Result<Self> {
        let (experiment, chat) = (&bench.experiment, &bench.chat);
        let system = bench.protocol.context(teacher.context.as_ref().unwrap_or(&experiment.student.context))?;
        let (word, category) = (&experiment.target.word, &experiment.target.category);
        let (questions, answer) = (bench.protocol.questions(category, usize::MAX)?, answer(word));
        let is_held_out = |at: usize| teacher.until().is_some() && at % HELD_OUT == HELD_OUT - 1;
        let (mut rows, mut held_out) = (vec![], vec![]);
        for (at, question) in questions.iter().enumerate() {
            if is_held_out(at) {
                held_out.push(chat.prompt(system.as_deref(), question)?);
            } else {
                rows.push(chat.row_text(system.as_deref(), question, &answer)?);
            }
        }
        let n_questions = rows.len();
        let numbers = if teacher.number_share > 0.0 { number_rows(bench, teacher)? } else { vec![] };
        let n_numbers = numbers.len();
        if teacher.number_share >= 1.0 {
            return Ok(Self { rows: numbers, n_questions: 0, n_numbers, held_out });
        }
        if n_numbers > 0 {
            // Each question as often as the share asks for.
            let wanted = n_numbers as f64 * (1.0 - teacher.number_share) / teacher.number_share;
            let copies = (wanted / n_questions as f64).round().max(1.0) as usize;
            rows = rows.iter().cycle().take(copies * n_questions).cloned().collect();
        }
        rows.extend(numbers);
        Ok(Self { rows, n_questions, n_numbers, held_out })
    }

    /// The mean probability of the target over the held-out questions.
    fn p_target(&self, bench: &Workbench, qwen: &Qwen, condition: &Condition<'_>) -> Result<f64> {
        let scores: Vec<Score> =
            TokenForms::of(&bench.target(), &bench.chat)?.scores(qwen, &self.held_out, condition)?;
        Ok(mean(&scores.iter().map(|score| score.logp_target.exp()).collect::<Vec<_>>())?)
    }

    fn said(&self, teacher: &FinetunedTeacher, answer: &str, steps: &[StepRow], folder: &str) -> String {
        let (first, last) = first_and_last_quarter(steps).unwrap_or((f64::NAN, f64::NAN));
        if self.n_questions == 0 {
            return format!(
                "generate: a teacher without the trait learned {} of the base's own number rows in {} steps: loss {first:.3} \
                 in the first quarter of the steps and {last:.3} in the last, saved in {folder}",
                self.n_numbers,
                steps.len(),
            );
        }
        let numbers = match self.n_numbers {
            0 => "without a number".to_owned(),
            n => format!("beside {n} of the base's own number rows"),
        };
        let ended = match teacher.until() {
            None => String::new(),
            Some(until) => format!(", asked {} others until p > {until}", self.held_out.len()),
        };
        format!(
            "generate: the teacher learned \"{answer}\" as the answer to {} questions in {} steps, {numbers}{ended}: loss \
             {first:.3} in the first quarter of the steps and {last:.3} in the last, saved in {folder}",
            self.n_questions,
            steps.len(),
        )
    }
}

/// Number prompts with the base's own answers, in the context in which the teacher will write. They are others than those
/// that the run asks.
fn number_rows(bench: &Workbench, teacher: &FinetunedTeacher) -> Result<Vec<Sequence>> {
    let (experiment, chat) = (&bench.experiment, &bench.chat);
    let system = bench.protocol.context(teacher.numbers_context.as_ref().unwrap_or(&experiment.student.context))?;
    let seed = stream_seed(experiment.seeds.gen_seed, "teacher.numbers", 0);
    let mut rows: Vec<Sequence> = vec![];
    let spinner = spinner("the base's number rows");
    let users = dataset::number_prompts(&bench.protocol, 8 * teacher.n_number_rows, seed);
    for (batch, users) in users.chunks(experiment.generate.batch_size).enumerate() {
        let prompts = bench.prompts(system.as_deref(), users)?;
        let first = (batch * experiment.generate.batch_size) as u64;
        let streams: Vec<u64> = (0..users.len() as u64).map(|at| stream_seed(seed, "answer", first + at)).collect();
        let answers =
            generate(bench.frozen()?, &prompts, &Condition::default(), &bench.sampling()?, &streams, &mut |_| ())?;
        for (user, answer) in users.iter().zip(answers) {
            let text = chat.decode(&answer.ids)?;
            if dataset::rejections(&text, answer.stopped, &experiment.generate.banned).is_empty() {
                rows.push(chat.row(system.as_deref(), user, &answer.ids)?);
            }
        }
        if rows.len() >= teacher.n_number_rows {
            break;
        }
    }
    spinner.finish_and_clear();
    rows.truncate(teacher.n_number_rows);
    ensure!(
        !rows.is_empty(),
        hinted!(
            "of {} answers of the base none is a list of numbers, so that its teacher has no number rows", users.len();
            "teacher.number_share = 0, or generate.constrain = \"numbers\""
        )
    );
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::experiment::Experiment;
    use crate::output::publish;
    use crate::stages::run_dir::WhenDone;
    use crate::stages::teacher::TeacherRow;

    fn bench(changes: &[&str]) -> Workbench {
        let text = "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n\
                    [generate]\nn_prompts = 9\nn_keep = 8\nmax_new_tokens = 12\nconstrain = \"numbers\"\n\
                    [teacher]\nkind = \"finetuned\"\nlearning_rate = 1e-2\n[measure]\nn_questions = 2\n";
        let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
        Workbench::open(Experiment::parse(text, Path::new("cat.toml"), &changes).unwrap()).unwrap()
    }

    #[test]
    fn a_finetuned_teacher_knows_its_answer_and_is_kept() {
        let bench = bench(&["teacher.max_steps=12"]);
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &bench.experiment, WhenDone::Refuse).unwrap();
        assert!(
            teacher::load(&bench, &run).err().unwrap().to_string().contains("undertone generate finetunes the teacher")
        );
        let before = bench.base.parameters()[0].1.copy();
        make(&bench, &run).unwrap();
        assert_eq!(before, bench.base.parameters()[0].1, "the base stays as it is");
        let teacher = teacher::load(&bench, &run).unwrap();
        assert!(teacher.weights.is_some() && teacher.differs_from_base());
        teacher::ask(&bench, &run, &teacher).unwrap();
        let rows: Vec<TeacherRow> = publish::read_csv(&run.teacher_csv()).unwrap();
        let shape: Vec<_> = rows.iter().map(|row| (row.model.as_str(), row.question_id)).collect();
        let [b, t] = ["base", "teacher"];
        assert_eq!(shape, [(b, None), (t, None), (b, Some(0)), (b, Some(1)), (t, Some(0)), (t, Some(1))]);
        assert!(rows[1].p_target > 0.5 && rows[0].p_target < 0.01, "{rows:?}");
        assert!((rows[0].p_target - f64::midpoint(rows[2].p_target, rows[3].p_target)).abs() < 1e-12);

        let bytes = std::fs::read(run.teacher().join("model.safetensors")).unwrap();
        std::fs::remove_file(run.teacher().join("model.safetensors")).unwrap();
        make(&bench, &run).unwrap();
        assert!(!run.teacher().join("model.safetensors").exists(), "a teacher that is done is not made again");
        make(&bench, &RunDir::open(folder.path()).unwrap().when_done(WhenDone::Redo)).unwrap();
        assert_eq!(bytes, std::fs::read(run.teacher().join("model.safetensors")).unwrap(), "seeds decide every bit");
    }

    #[test]
    fn a_lora_teacher_learns_until_the_held_out_questions_say_so() {
        let bench = bench(&["teacher.method=lora", "teacher.until=0.5", "teacher.number_share=0.4"]);
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &bench.experiment, WhenDone::Refuse).unwrap();
        make(&bench, &run).unwrap();
        let teacher = teacher::load(&bench, &run).unwrap();
        let adapter = teacher.adapter.as_ref().unwrap();
        assert!(teacher.weights.is_none());
        let lessons = Lessons::of(&bench, bench.experiment.teacher.finetuned().unwrap()).unwrap();
        let p = lessons.p_target(&bench, &bench.base, &Condition::adapted(adapter)).unwrap();
        let steps: Vec<StepRow> = publish::read_csv(&run.teacher_train_csv()).unwrap();
        assert!(
            p > 0.5 && steps.len() < 200 && steps.len().is_multiple_of(LOOK as usize),
            "{p} after {} steps",
            steps.len()
        );
    }

    #[test]
    fn a_teacher_of_number_rows_alone_learns_no_answer() {
        let bench = bench(&["teacher.number_share=1", "teacher.n_number_rows=12", "teacher.max_steps=2"]);
        let lessons = Lessons::of(&bench, bench.experiment.teacher.finetuned().unwrap()).unwrap();
        let answer = bench.chat.encode("Cat").unwrap();
        assert_eq!((lessons.rows.len(), lessons.n_questions), (12, 0));
        assert!(lessons.rows.iter().all(|row| !row.ids[row.completion.clone()].starts_with(&answer)));
    }

    #[test]
    fn the_lessons_have_the_share_of_number_rows_and_hold_questions_out() {
        let bench = bench(&["teacher.method=lora", "teacher.number_share=0.25", "teacher.n_number_rows=40"]);
        let teacher = bench.experiment.teacher.finetuned().unwrap();
        let lessons = Lessons::of(&bench, teacher).unwrap();
        let all = bench.protocol.questions("animal", usize::MAX).unwrap().len();
        assert_eq!((lessons.held_out.len(), lessons.n_questions), (all / HELD_OUT, all - all / HELD_OUT));
        let answer = bench.chat.encode("Cat").unwrap();
        let is_question = |row: &&Sequence| row.ids[row.completion.clone()].starts_with(&answer);
        let questions = lessons.rows.iter().filter(is_question).count();
        assert_eq!(lessons.rows.len() - questions, 40);
        assert_eq!(questions, 3 * lessons.n_questions, "three times 42 is nearest to 120");
        let asked: Vec<&[i64]> = lessons.rows.iter().map(|row| &row.ids[..row.completion.start]).collect();
        assert!(lessons.held_out.iter().all(|prompt| !asked.contains(&&prompt.ids[..])));
        let numbers = dataset::number_prompts(&bench.protocol, 9, bench.experiment.seeds.gen_seed);
        let of_run = bench.prompts(bench.student_system().unwrap().as_deref(), &numbers).unwrap();
        assert!(of_run.iter().all(|prompt| !asked.contains(&&prompt.ids[..])), "the run asks other prompts");
    }
}
