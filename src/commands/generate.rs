//! Stage 1: the teacher and the untouched model answer the same number prompts; the rule filter sorts the answers.

use anyhow::{Context, Result};
use hooks::generate::{generate, stream_seed};
use hooks::{Condition, Prompt};

use crate::dataset::{self, Rejection, Sample, TeacherKind};
use crate::progress::{bar, say};
use crate::publish;
use crate::run_dir::RunDir;
use crate::workbench::Workbench;

/// Writes `data/`: both sets, what was rejected and why, and what the answers are like.
pub fn stage(bench: &Workbench, run: &RunDir) -> Result<()> {
    let (settings, seeds) = (&bench.experiment.generate, &bench.experiment.seeds);
    // The last file: where it is not, the others are what a broken-off run left.
    run.claim(&run.generate_csv())?;
    let prompts = dataset::number_prompts(&bench.protocol, settings.n_prompts, seeds.gen_seed);
    let teacher = bench.teacher()?;
    let word = Some(bench.experiment.target.word.clone());
    let numbers = answers(
        bench,
        &prompts,
        "teacher",
        teacher.system.as_deref(),
        &teacher.condition(),
        teacher.kind,
        word.as_ref(),
    )?;

    // The control set: the base in the student's context, on the prompts that the teacher was asked.
    let system = bench.student_system()?;
    let asked = &prompts[..numbers.len()];
    let control =
        answers(bench, asked, "control", system.as_deref(), &Condition::default(), TeacherKind::Control, None)?;

    let classifier = bench.protocol.classifier(&bench.experiment.target.word, &bench.experiment.target.category)?;
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
    dataset::write_jsonl(&run.numbers(), &numbers)?;
    dataset::write_jsonl(&run.control(), &control)?;
    publish::write_csv(&run.generate_csv(), &summary)?;
    run.record(&[run.numbers(), run.control()])?;
    for (set, samples) in sets {
        say(format!("generate: {set}: {}", acceptance(samples)));
    }
    Ok(())
}

/// The answers to the prompts, in order, until enough were accepted or the prompts are used up.
fn answers(
    bench: &Workbench,
    prompts: &[String],
    set: &str,
    system: Option<&str>,
    condition: &Condition<'_>,
    kind: TeacherKind,
    target: Option<&String>,
) -> Result<Vec<Sample>> {
    let (settings, gen_seed) = (&bench.experiment.generate, bench.experiment.seeds.gen_seed);
    let sampling = bench.sampling()?;
    let bar = bar(&format!("numbers of the {set}"), prompts.len() as u64);
    let mut samples: Vec<Sample> = Vec::new();
    // A few batches at a time, so that similar lengths can go together and enough is noticed soon.
    for chunk in prompts.chunks(4 * settings.batch_size) {
        let first = samples.len();
        let rows = chunk.iter().map(|user| bench.chat.prompt(system, user)).collect::<hooks::Result<Vec<Prompt>>>()?;
        let streams: Vec<u64> = (0..chunk.len()).map(|at| stream_seed(gen_seed, set, (first + at) as u64)).collect();
        let answers = generate(&bench.base, &rows, condition, &sampling, &streams, &mut |done| {
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
                target: target.cloned(),
                teacher_kind: kind,
                gen_seed,
                accepted: reasons.is_empty(),
                reasons,
            });
        }
        // The control set answers every prompt that the teacher was asked; the teacher stops when it has enough.
        if kind != TeacherKind::Control && samples.iter().filter(|sample| sample.accepted).count() >= settings.n_keep {
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
