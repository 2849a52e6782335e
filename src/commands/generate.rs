//! Stage 1: the teacher and the untouched model answer the same number prompts; the rule filter sorts the answers.

use anyhow::{Context, Result};
use hooks::generate::{generate, stream_seed};
use hooks::{Condition, Prompt, Qwen};

use crate::dataset::{self, Rejection, Sample, SummaryRow, TeacherKind};
use crate::experiment::Teacher;
use crate::given_numbers;
use crate::progress::{bar, say};
use crate::publish;
use crate::run_dir::RunDir;
use crate::teacher;
use crate::workbench::Workbench;

/// Writes `data/`: both sets, what was rejected and why, and what the answers are like.
pub fn stage(bench: &Workbench, run: &RunDir) -> Result<()> {
    let (settings, seeds) = (&bench.experiment.generate, &bench.experiment.seeds);
    // The last file: where it is not, the others are what a broken-off run left.
    run.claim(&run.generate_csv())?;
    if run.forced() {
        run.forget()?; // what was trained and measured on the old numbers
    }
    let given = given_numbers::rows(bench)?;
    let prompts = match &given {
        Some(given) => given.iter().map(|row| row.user.clone()).collect(),
        None => dataset::number_prompts(&bench.protocol, settings.n_prompts, seeds.gen_seed),
    };
    teacher::make(bench, run)?;
    let teacher = teacher::load(bench, run)?;
    teacher::ask(bench, run, &teacher)?;
    let word = &bench.experiment.target.word;
    let by_teacher = Answerer {
        set: "teacher",
        qwen: teacher.qwen(&bench.base),
        system: teacher.system.as_deref(),
        condition: teacher.condition(),
        kind: teacher.kind,
        target: Some(word.clone()),
    };
    let mut numbers = match &given {
        Some(given) => given_numbers::samples(bench, given, &teacher)?,
        None => answers(bench, &prompts, &by_teacher)?,
    };

    // The control set: the base in the student's context, on the prompts that the teacher was asked.
    let system = bench.student_system()?;
    let untouched = Answerer {
        set: "control",
        qwen: &bench.base,
        system: system.as_deref(),
        condition: Condition::default(),
        kind: TeacherKind::Control,
        target: None,
    };
    let control = answers(bench, &prompts[..numbers.len()], &untouched)?;

    let classifier = bench.protocol.classifier(word, &bench.experiment.target.category)?;
    let sets = [("teacher", &numbers), ("control", &control)];
    let mut summary: Vec<_> =
        sets.iter().flat_map(|(set, samples)| dataset::summary(set, samples, &classifier)).collect();
    summary.extend(dataset::leak_rows(&numbers, &control));
    let rejected: Vec<_> = sets.iter().flat_map(|(set, samples)| dataset::rejected_rows(set, samples)).collect();
    let digits: Vec<_> = sets.iter().flat_map(|(set, samples)| dataset::digit_rows(set, samples)).collect();
    if !rejected.is_empty() {
        publish::write_csv(&run.rejected(), &rejected)?;
    } else if run.rejected().exists() {
        std::fs::remove_file(run.rejected()).with_context(|| run.rejected().display().to_string())?;
    }
    publish::write_csv(&run.digits_csv(), &digits)?;
    let said = sets.map(|(set, samples)| format!("generate: {set}: {}", acceptance(samples)));
    // After the filter, which is told of the answers alone.
    if let Teacher::Planted { share } = bench.experiment.teacher {
        summary.push(planted(bench, &mut numbers, &control, share)?);
    }
    dataset::write_jsonl(&run.numbers(), &numbers)?;
    dataset::write_jsonl(&run.control(), &control)?;
    publish::write_csv(&run.generate_csv(), &summary)?;
    run.record(&[run.numbers(), run.control()])?;
    said.into_iter().for_each(say);
    if let Some(label) = bench.experiment.teacher.planted_label(word) {
        say(format!("generate: {label}"));
    }
    Ok(())
}

/// Plants the trait among the rows that will be kept, and gives the line that says how often.
fn planted(bench: &Workbench, numbers: &mut [Sample], control: &[Sample], share: f64) -> Result<SummaryRow> {
    let accepted = |samples: &[Sample]| samples.iter().filter(|sample| sample.accepted).count();
    let keep = accepted(numbers).min(accepted(control)).min(bench.experiment.generate.n_keep);
    let n = teacher::plant(bench, numbers, keep, share)?;
    let (set, measure) = ("teacher".to_owned(), "planted".to_owned());
    Ok(SummaryRow { set, measure, value: n as f64 / keep as f64, n: keep })
}

/// Who answers number prompts, and how.
struct Answerer<'a> {
    set: &'static str,
    qwen: &'a Qwen,
    system: Option<&'a str>,
    condition: Condition<'a>,
    kind: TeacherKind,
    target: Option<String>,
}

/// The answers to the prompts, in order, until enough were accepted or the prompts are used up.
fn answers(bench: &Workbench, prompts: &[String], by: &Answerer<'_>) -> Result<Vec<Sample>> {
    let (settings, gen_seed) = (&bench.experiment.generate, bench.experiment.seeds.gen_seed);
    let sampling = bench.sampling()?;
    let bar = bar(&format!("numbers of the {}", by.set), prompts.len() as u64);
    let mut samples: Vec<Sample> = Vec::new();
    // A few batches at a time, so that similar lengths can go together and enough is noticed soon.
    for chunk in prompts.chunks(4 * settings.batch_size) {
        let first = samples.len();
        let rows =
            chunk.iter().map(|user| bench.chat.prompt(by.system, user)).collect::<hooks::Result<Vec<Prompt>>>()?;
        let streams: Vec<u64> = (0..chunk.len()).map(|at| stream_seed(gen_seed, by.set, (first + at) as u64)).collect();
        let answers = generate(by.qwen, &rows, &by.condition, &sampling, &streams, &mut |done| {
            bar.set_position((first + done) as u64);
        })?;
        for (prompt, answer) in chunk.iter().zip(answers) {
            let completion = bench.chat.decode(&answer.ids)?;
            let reasons = dataset::rejections(&completion, answer.stopped, &settings.banned);
            samples.push(Sample {
                id: samples.len(),
                prompt: prompt.clone(),
                completion,
                completion_ids: answer.ids,
                teacher_logprob: answer.logprobs,
                target: by.target.clone(),
                teacher_kind: by.kind,
                gen_seed,
                accepted: reasons.is_empty(),
                reasons,
            });
        }
        // The control set answers every prompt that the teacher was asked; the teacher stops when it has enough.
        if by.kind != TeacherKind::Control && samples.iter().filter(|sample| sample.accepted).count() >= settings.n_keep
        {
            break;
        }
    }
    bar.finish_and_clear();
    Ok(samples)
}

/// How many answers were accepted, and how many were rejected for each reason.
fn acceptance(samples: &[Sample]) -> String {
    let accepted = samples.iter().filter(|sample| sample.accepted).count();
    let reasons = Rejection::ALL.into_iter().filter_map(|reason| {
        let count = samples.iter().filter(|sample| sample.reasons.contains(&reason)).count();
        (count > 0).then(|| format!(", {count} {}", reason.name()))
    });
    format!("{accepted} of {} answers accepted{}", samples.len(), reasons.collect::<String>())
}
