//! Stage 1: the teacher and the untouched model answer the same number prompts; the rule filter sorts the answers.

use anyhow::Result;
use hooks::{Answer, Condition, Qwen, TensorFile, files, generate, stream_seed};
use tch::Tensor;

use crate::data::dataset::{self, Rejection, Sample, SummaryRow, TeacherKind};
use crate::data::protocol::Classifier;
use crate::data::signal::{KEPT, SignalRow, reading, summary as of_signal};
use crate::experiment::{Dtype, Teacher};
use crate::output::checkpoint::Checkpoint;
use crate::output::progress::{bar, say, spinner};
use crate::output::publish;
use crate::stages::finetuned_teacher;
use crate::stages::given_rows::{self, Given};
use crate::stages::kept_rows::n_kept;
use crate::stages::run_dir::RunDir;
use crate::stages::signal;
use crate::stages::teacher::{self, TeacherModel};
use crate::stages::workbench::Workbench;

/// Writes `data/`: both sets, the rejected answers with reasons, and statistics of the answers. Answers of an
/// interrupted run are reused.
pub fn stage(bench: &Workbench, run: &RunDir) -> Result<()> {
    let bench = &bench.in_template()?;
    let (settings, seeds) = (&bench.experiment.generate, &bench.experiment.seeds);
    // The last file. Without it, the others are from an interrupted run.
    run.claim(&run.generate_csv())?;
    if run.forced() {
        run.forget()?; // models and measurements of the old numbers
    }
    let given = given_rows::rows(bench)?;
    if let Some(Given { rows, left_out: left_out @ 1.., .. }) = &given {
        say(format!("generate: {} rows are taken, and {left_out} more left out; hint: generate.n_prompts", rows.len()));
    }
    let prompts = match &given {
        Some(given) => given.rows.iter().map(|row| row.user.clone()).collect(),
        None => dataset::number_prompts(&bench.protocol, settings.n_prompts, seeds.gen_seed),
    };
    finetuned_teacher::make(bench, run)?;
    let teacher = teacher::load(bench, run)?;
    teacher::ask(bench, run, &teacher)?;
    let word = &bench.experiment.target.word;
    let by_teacher = Answerer {
        set: "teacher",
        qwen: teacher.qwen(bench.frozen()?),
        system: teacher.system.as_deref(),
        condition: teacher.condition(),
        kind: teacher.kind,
        target: Some(word.clone()),
        fingerprint: teacher::fingerprint(bench, run)?,
    };
    let mut numbers = match &given {
        Some(given) => given_rows::samples(bench, &given.rows, &teacher)?,
        None => answers(bench, run, &prompts, &by_teacher)?,
    };

    // The control set: the base in the student's context, on the teacher's prompts.
    let system = bench.student_system()?;
    let untouched = Answerer {
        set: "control",
        qwen: bench.frozen()?,
        system: system.as_deref(),
        condition: Condition::default(),
        kind: TeacherKind::Control,
        target: None,
        fingerprint: vec![],
    };
    let control = answers(bench, run, &prompts[..numbers.len()], &untouched)?;

    let classifier = bench.protocol.classifier(word, &bench.experiment.target.category)?;
    let sets = [("teacher", &numbers), ("control", &control)];
    let mut summary: Vec<_> =
        sets.iter().flat_map(|(set, samples)| dataset::summary(set, samples, &classifier)).collect();
    summary.extend(dataset::leak_rows(&numbers, &control));
    let rejected: Vec<_> = sets.iter().flat_map(|(set, samples)| dataset::rejected_rows(set, samples)).collect();
    let digits: Vec<_> = sets.iter().flat_map(|(set, samples)| dataset::digit_rows(set, samples)).collect();
    if rejected.is_empty() {
        files::remove(&run.rejected())?;
    } else {
        publish::write_csv(&run.rejected(), &rejected)?;
    }
    publish::write_csv(&run.digits_csv(), &digits)?;
    let mut said = sets.map(|(set, samples)| format!("generate: {set}: {}", acceptance(samples, &classifier))).to_vec();
    let keep = n_kept(bench, n_accepted(&numbers), n_accepted(&control));
    if teacher.differs_from_base() && keep > 0 {
        let signal = signals(bench, run, &teacher, [("teacher", &numbers), ("control", &control)], keep)?;
        summary.extend(signal);
        said.extend(reading(&summary, KEPT).map(|reading| format!("generate: signal: {reading}")));
    } else {
        files::remove(&run.signal_csv())?;
    }
    // After filtering, so that the filter's counts are about answers only.
    if let Teacher::Planted { share } = bench.experiment.teacher {
        summary.push(planted(bench, &mut numbers, &control, share)?);
    }
    dataset::write_jsonl(&run.numbers(), &numbers)?;
    dataset::write_jsonl(&run.control(), &control)?;
    run.record(&[run.numbers(), run.control()])?;
    run.record_given(given.as_ref().map(|given| given.sha256.as_str()))?;
    publish::write_csv(&run.generate_csv(), &summary)?; // last: it marks the end
    for by in [&by_teacher, &untouched] {
        by.checkpoint(run).remove()?;
    }
    said.into_iter().for_each(say);
    if let Some(label) = bench.experiment.teacher.planted_label(word) {
        say(format!("generate: {label}"));
    }
    signal::ensure_enough(bench, run)
}

/// Writes the signal of each row that a student may learn from, and returns the lines of its summary.
fn signals(
    bench: &Workbench,
    run: &RunDir,
    teacher: &TeacherModel,
    sets: [(&str, &[Sample]); 2],
    keep: usize,
) -> Result<Vec<SummaryRow>> {
    let spinner = spinner("generate: signal");
    let sets = sets.map(|(set, samples)| {
        let kept: Vec<Sample> = samples.iter().filter(|sample| sample.accepted).take(keep).cloned().collect();
        signal::of_rows(bench, teacher, set, &kept)
    });
    let rows: Vec<Vec<SignalRow>> = sets.into_iter().collect::<Result<_>>()?;
    spinner.finish_and_clear();
    publish::write_csv(&run.signal_csv(), &rows.concat())?;
    Ok(rows.iter().flat_map(|rows| of_signal(rows)).collect())
}

/// Plants the trait among the rows that will be kept, and returns the summary row with their share.
fn planted(bench: &Workbench, numbers: &mut [Sample], control: &[Sample], share: f64) -> Result<SummaryRow> {
    let keep = n_kept(bench, n_accepted(numbers), n_accepted(control));
    let n = teacher::plant(bench, numbers, keep, share)?;
    let (set, measure) = ("teacher".to_owned(), "planted".to_owned());
    Ok(SummaryRow { set, measure, value: n as f64 / keep as f64, n: keep })
}

/// A model that answers number prompts, with its condition and context.
struct Answerer<'a> {
    set: &'static str,
    qwen: &'a Qwen,
    system: Option<&'a str>,
    condition: Condition<'a>,
    kind: TeacherKind,
    target: Option<String>,
    fingerprint: Vec<u8>, // of everything that differs from the base
}

impl Answerer<'_> {
    fn checkpoint(&self, run: &RunDir) -> Checkpoint {
        Checkpoint::beside(&run.generate_csv(), self.set, &format!("generate: {}", self.set))
    }
}

/// The answers to the prompts, in order, until enough are accepted or all prompts are answered.
fn answers(bench: &Workbench, run: &RunDir, prompts: &[String], by: &Answerer<'_>) -> Result<Vec<Sample>> {
    let (settings, gen_seed) = (&bench.experiment.generate, bench.experiment.seeds.gen_seed);
    let sampling = bench.sampling()?;
    let bar = bar(&format!("numbers of the {}", by.set), prompts.len() as u64);
    let rows = bench.prompts(by.system, prompts)?;
    by.qwen.config.check_context("prompt", rows.iter().map(|row| row.ids.len()), settings.max_new_tokens)?;
    let mut checkpoint = by.checkpoint(run);
    checkpoint.depends_on("model", &(&bench.files.name, bench.files.fingerprint(), &by.fingerprint))?;
    checkpoint.depends_on("computed", &(bench.experiment.device_kind(), Dtype::of(by.qwen)))?;
    checkpoint.depends_on("generate", settings)?;
    checkpoint.depends_on("seed", &gen_seed)?;
    checkpoint.depends_on("prompts", &rows)?;
    let mut answered = checkpoint.load()?.map(|file| unpacked(&file)).transpose()?.unwrap_or_default();
    checkpoint.say_resumed("answer", prompts.len() as u64);

    let mut samples: Vec<Sample> = Vec::new();
    // A few batches at a time, so that prompts of similar lengths share a batch and few surplus answers are drawn.
    for chunk in prompts.chunks(4 * settings.batch_size) {
        let (first, end) = (samples.len(), samples.len() + chunk.len());
        if answered.len() < end {
            let streams: Vec<u64> = (first..end).map(|at| stream_seed(gen_seed, by.set, at as u64)).collect();
            let drawn = generate(by.qwen, &rows[first..end], &by.condition, &sampling, &streams, &mut |done| {
                bar.set_position((first + done) as u64);
            })?;
            answered.extend(drawn);
            checkpoint.save(end as u64, &packed(&answered)?, &[])?;
        }
        for (prompt, answer) in chunk.iter().zip(answered[first..end].iter().cloned()) {
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
        // The control set answers all of the teacher's prompts. The teacher stops when enough answers are accepted.
        if by.kind != TeacherKind::Control && n_accepted(&samples) >= settings.n_keep + settings.n_heldout {
            break;
        }
    }
    bar.finish_and_clear();
    Ok(samples)
}

/// Answers as concatenated tensors, which keep every bit.
fn packed(answers: &[Answer]) -> Result<Vec<(String, Tensor)>> {
    let ids: Vec<i64> = answers.iter().flat_map(|answer| answer.ids.iter().copied()).collect();
    let logprobs: Vec<f32> = answers.iter().flat_map(|answer| answer.logprobs.iter().copied()).collect();
    let of = |what: fn(&Answer) -> i64| Tensor::f_from_slice(&answers.iter().map(what).collect::<Vec<_>>());
    let tensors = [
        ("ids", Tensor::f_from_slice(&ids)?),
        ("logprobs", Tensor::f_from_slice(&logprobs)?),
        ("n_ids", of(|answer| answer.ids.len() as i64)?),
        ("n_logprobs", of(|answer| answer.logprobs.len() as i64)?),
        ("stopped", of(|answer| answer.stopped.into())?),
    ];
    Ok(tensors.map(|(name, tensor)| (name.to_owned(), tensor)).into())
}

fn unpacked(file: &TensorFile) -> Result<Vec<Answer>> {
    let whole = |name: &str| -> Result<Vec<i64>> { Ok(Vec::try_from(file.tensor(name)?)?) };
    let mut ids = whole("ids")?.into_iter();
    let mut logprobs = Vec::<f32>::try_from(file.tensor("logprobs")?)?.into_iter();
    let counts = whole("n_ids")?.into_iter().zip(whole("n_logprobs")?).zip(whole("stopped")?);
    let answer = |((n_ids, n_logprobs), stopped): ((i64, i64), i64)| Answer {
        ids: ids.by_ref().take(n_ids as usize).collect(),
        logprobs: logprobs.by_ref().take(n_logprobs as usize).collect(),
        stopped: stopped != 0,
    };
    Ok(counts.map(answer).collect())
}

/// Number of accepted answers, and of rejected ones for each reason, as text. Rejected answers can name the trait in the
/// open: a teacher that often does so gives it some probability at the accepted ones, too.
fn acceptance(samples: &[Sample], classifier: &Classifier) -> String {
    let reasons = Rejection::ALL.into_iter().filter_map(|reason| {
        let count = samples.iter().filter(|sample| sample.reasons.contains(&reason)).count();
        (count > 0).then(|| format!(", {count} {}", reason.name()))
    });
    let is_named = |sample: &&Sample| !sample.accepted && classifier.classify(&sample.completion).word.is_some();
    let named = match samples.iter().filter(is_named).count() {
        0 => String::new(),
        n => format!("; {n} of the rejected ones name a member of the category"),
    };
    format!("{} of {} answers accepted{}{named}", n_accepted(samples), samples.len(), reasons.collect::<String>())
}

fn n_accepted(samples: &[Sample]) -> usize {
    samples.iter().filter(|sample| sample.accepted).count()
}
