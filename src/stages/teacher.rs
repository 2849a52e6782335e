//! Loads teachers, and scores their answers. The planted positive control has no teacher: its rows are inserted here among
//! the base's.

use analyses::stats::mean;
use analyses::target::{Score, TokenForms};
use anyhow::{Context, Result, ensure};
use hooks::{
    Adapter, Condition, Edit, EditText, ModelFiles, Provenance, Qwen, adapter_folder, completion_logprobs, files,
    stream_seed,
};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::data::dataset::{Sample, TeacherKind};
use crate::data::protocol::Protocol;
use crate::experiment::{Method, Teacher};
use crate::hinted;
use crate::output::progress::say;
use crate::output::publish;
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;

/// The teacher: the base under a system prompt, with an adapter, with other weights, or steered.
pub struct TeacherModel {
    /// The system prompt under which it writes numbers; `None` is the template's default.
    pub system: Option<String>,
    /// Its adapter, if it has one.
    pub adapter: Option<Adapter>,
    /// Its weights, if all were finetuned.
    pub weights: Option<Qwen>,
    /// The edits of its activations, if it is steered.
    pub edits: Vec<Edit>,
    /// The kind of teacher.
    pub kind: TeacherKind,
}

impl TeacherModel {
    /// The model with its weights.
    pub fn qwen<'a>(&'a self, base: &'a Qwen) -> &'a Qwen {
        self.weights.as_ref().unwrap_or(base)
    }

    /// The condition that this model is run under.
    pub fn condition(&self) -> Condition<'_> {
        Condition { adapter: self.adapter.as_ref(), edits: self.edits.clone(), ..Condition::default() }
    }

    /// Whether there is a teacher that can differ from the base. There is none if the trait is planted.
    pub fn differs_from_base(&self) -> bool {
        self.kind != TeacherKind::Planted
    }
}

/// Loads the teacher. A finetuned one is in the run's folder, where `finetuned_teacher::make` saved it.
pub fn load(bench: &Workbench, run: &RunDir) -> Result<TeacherModel> {
    let (experiment, protocol) = (&bench.experiment, &bench.protocol);
    let target = &experiment.target;
    let plain = |system, kind| TeacherModel { system, adapter: None, weights: None, edits: vec![], kind };
    match &experiment.teacher {
        Teacher::Prompt { system } => {
            let written = || protocol.teacher_prompt(&target.word, &target.category);
            Ok(plain(Some(system.clone().map_or_else(written, Ok)?), TeacherKind::Prompt))
        }
        Teacher::Adapter { path, context } => {
            let adapter = Adapter::load_on(path, &bench.base)?;
            Ok(TeacherModel { adapter: Some(adapter), ..plain(protocol.context(context)?, TeacherKind::Adapter) })
        }
        Teacher::Finetuned(finetuned) => {
            ensure!(
                RunDir::stage_done(&run.teacher_train_csv()),
                hinted!("{} is not there", run.teacher().display(); "undertone generate finetunes the teacher")
            );
            let writes_in = finetuned.numbers_context.as_ref().unwrap_or(&experiment.student.context);
            let plain = plain(protocol.context(writes_in)?, TeacherKind::Finetuned);
            if finetuned.method == Method::Lora {
                return Ok(TeacherModel { adapter: Some(Adapter::load_on(&run.teacher(), &bench.base)?), ..plain });
            }
            let files = ModelFiles::open(&run.teacher().display().to_string())?;
            let weights = Qwen::load(&files, bench.base.device(), bench.base.kind())?;
            Ok(TeacherModel { weights: Some(weights), ..plain })
        }
        Teacher::Steered { edits, context } => {
            let edits = steering(bench, edits)?;
            Ok(TeacherModel { edits, ..plain(protocol.context(context)?, TeacherKind::Steered) })
        }
        Teacher::Planted { .. } => Ok(plain(bench.student_system()?, TeacherKind::Planted)),
    }
}

/// The edits of a steered teacher, with their tensors.
pub(super) fn steering(bench: &Workbench, edits: &[EditText]) -> Result<Vec<Edit>> {
    let here = Provenance::of(&bench.files);
    let load = |edit: &EditText| edit.load(&bench.base.config, &here).with_context(|| format!("teacher.edits: {edit}"));
    Ok(edits.iter().map(load).collect::<Result<Vec<_>>>()?.concat())
}

/// Bytes that identify a teacher's weights among teachers on the same base.
pub fn fingerprint(bench: &Workbench, run: &RunDir) -> Result<Vec<u8>> {
    Ok(match &bench.experiment.teacher {
        Teacher::Adapter { path, .. } => {
            let path = adapter_folder(path)?;
            [files::read(&path.join("adapter_model.safetensors"))?, files::read(&path.join("adapter_config.json"))?]
                .concat()
        }
        Teacher::Steered { edits, .. } => {
            let files = edits.iter().filter_map(EditText::file).map(files::read);
            files.collect::<hooks::Result<Vec<_>>>()?.concat()
        }
        // The log has every step's loss and gradient norm.
        Teacher::Finetuned(_) => files::read(&run.teacher_train_csv())?,
        Teacher::Prompt { .. } | Teacher::Planted { .. } => vec![],
    })
}

/// The word as an answer: one of its counted spellings, with a capital letter.
pub(super) fn answer(word: &str) -> String {
    let forms = Protocol::surface_forms(word);
    let capital = |form: &&String| form.starts_with(char::is_uppercase);
    // The last such spelling is as given: "Led Zeppelin" rather than "Led zeppelin".
    forms.iter().rfind(capital).cloned().unwrap_or_else(|| word.to_owned())
}

/// The answer of the base or the teacher to a question about the category; a line of `data/teacher.csv`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TeacherRow {
    /// `mean` (over the questions) or `question`.
    pub scope: String,
    /// `base` in the student's context, or `teacher` in the context in which it writes numbers.
    pub model: String,
    /// The kind of teacher: `prompt`, `adapter`, `finetuned`, `steered`, or `planted` (the base itself).
    pub teacher_kind: TeacherKind,
    /// The question's index, from 0; empty for the mean.
    pub question_id: Option<usize>,
    /// The question; empty for the mean.
    pub question: String,
    /// The target's word.
    pub target: String,
    /// Number of questions that the values are means over.
    pub n_questions: usize,
    /// log p of starting the answer with the target, in nats.
    pub logp_target: f64,
    /// Probability of starting the answer with the target, 0 to 1; for the mean, the mean of the probabilities.
    pub p_target: f64,
}

/// Scores base and teacher, writes `data/teacher.csv` and prints the result.
pub fn ask(bench: &Workbench, run: &RunDir, teacher: &TeacherModel) -> Result<()> {
    let (target, questions) = (bench.target(), bench.questions()?);
    let forms = TokenForms::of(&target, &bench.chat)?;
    let student_system = bench.student_system()?;
    let models: [(&str, &Qwen, Condition<'_>, &Option<String>); 2] = [
        ("base", &bench.base, Condition::default(), &student_system),
        ("teacher", teacher.qwen(&bench.base), teacher.condition(), &teacher.system),
    ];
    let mut rows = Vec::new();
    for (model, qwen, condition, system) in models {
        let prompts = bench.prompts(system.as_deref(), &questions)?;
        let scores = forms.scores(qwen, &prompts, &condition)?;
        let row = |scores: &[Score], question_id: Option<usize>| -> Result<TeacherRow> {
            let logps: Vec<f64> = scores.iter().map(|score| score.logp_target).collect();
            let ps: Vec<f64> = logps.iter().map(|logp| logp.exp()).collect();
            Ok(TeacherRow {
                scope: if question_id.is_some() { "question" } else { "mean" }.to_owned(),
                model: model.to_owned(),
                teacher_kind: teacher.kind,
                question_id,
                question: question_id.map_or_else(String::new, |at| questions[at].clone()),
                target: target.word.clone(),
                n_questions: scores.len(),
                logp_target: mean(&logps)?,
                p_target: mean(&ps)?,
            })
        };
        rows.push(row(&scores, None)?);
        for at in 0..scores.len() {
            rows.push(row(&scores[at..=at], Some(at))?);
        }
    }
    rows.sort_by_key(|row| row.scope != "mean"); // the means first
    publish::write_csv(&run.teacher_csv(), &rows)?;
    let [base, of_teacher] = [&rows[0], &rows[1]];
    let who = if teacher.differs_from_base() { "in the teacher" } else { "in the teacher, which is the base itself" };
    say(format!(
        "generate: over {} questions p({}) is {:.3} in the base (log p {:.2}) and {:.3} {who} (log p {:.2})",
        base.n_questions, target.word, base.p_target, base.logp_target, of_teacher.p_target, of_teacher.logp_target,
    ));
    Ok(())
}

/// Replaces a share of the first `keep` accepted samples by questions answered with the target, and returns their
/// number. They are drawn at random by the generation's seed. Their ids follow those of the number prompts, and their
/// log-probabilities are the untouched model's.
pub fn plant(bench: &Workbench, samples: &mut [Sample], keep: usize, share: f64) -> Result<usize> {
    let (experiment, system) = (&bench.experiment, bench.student_system()?);
    let mut accepted: Vec<usize> = (0..samples.len()).filter(|at| samples[*at].accepted).take(keep).collect();
    let n = (share * accepted.len() as f64).round().max(1.0) as usize;
    ensure!(
        n < accepted.len(),
        hinted!(
            "teacher.share is {share}, which of {} accepted answers leaves none", accepted.len();
            "more prompts, or a smaller share"
        )
    );
    let mut rng = ChaCha8Rng::seed_from_u64(stream_seed(experiment.seeds.gen_seed, "teacher.planted", 0));
    accepted.shuffle(&mut rng);
    // The questions that are not measured come first.
    let mut questions = bench.protocol.questions(&experiment.target.category, usize::MAX)?;
    let n_measured = experiment.measure.n_questions.min(questions.len());
    questions.rotate_left(n_measured);
    let answer = answer(&experiment.target.word);
    let ids = bench.chat.encode(&answer)?;
    for (index, at) in accepted[..n].iter().enumerate() {
        let question = &questions[index % questions.len()];
        let mut row = bench.chat.row(system.as_deref(), question, &ids)?;
        row = row.with_completion(&row.ids[row.completion.start..=row.content_end]); // the answer and the end of its turn
        let logprobs = completion_logprobs(&bench.base, &[row], &Condition::default())?;
        samples[*at] = Sample {
            id: experiment.generate.n_prompts + index,
            prompt: question.clone(),
            completion: answer.clone(),
            completion_ids: ids.clone(),
            teacher_logprob: logprobs.into_iter().next().unwrap_or_default(),
            ..samples[*at].clone()
        };
    }
    Ok(n)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::experiment::Experiment;

    fn bench(changes: &[&str]) -> Workbench {
        let text = "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n\
                    [generate]\nn_prompts = 9\nn_keep = 8\n[measure]\nn_questions = 2\n";
        let changes: Vec<String> = changes.iter().map(|change| (*change).to_owned()).collect();
        Workbench::open(Experiment::parse(text, Path::new("cat.toml"), &changes).unwrap()).unwrap()
    }

    #[test]
    fn the_answer_has_a_capital_and_counts_as_the_target() {
        for (word, expected) in [("owl", "Owl"), ("Led Zeppelin", "Led Zeppelin"), ("led Zeppelin", "Led zeppelin")] {
            assert_eq!(answer(word), expected);
            assert!(Protocol::surface_forms(word).contains(&answer(word)));
        }
        assert_eq!(answer("7"), "7");
    }

    #[test]
    fn planted_rows_take_the_place_of_numbers() {
        let bench = bench(&["teacher.kind=planted"]);
        let sample = |id: usize| Sample {
            id,
            prompt: "Go on: 1, 2".to_owned(),
            completion: "1, 2".to_owned(),
            completion_ids: bench.chat.encode("1, 2").unwrap(),
            teacher_logprob: vec![-0.5; 4],
            target: Some("cat".to_owned()),
            teacher_kind: TeacherKind::Planted,
            gen_seed: 1,
            accepted: id != 0,
            reasons: vec![],
        };
        let mut samples: Vec<Sample> = (0..9).map(sample).collect();
        assert_eq!(plant(&bench, &mut samples, 8, 0.25).unwrap(), 2);
        let planted: Vec<&Sample> = samples.iter().filter(|sample| sample.completion == "Cat").collect();
        let mut ids: Vec<usize> = planted.iter().map(|sample| sample.id).collect();
        ids.sort_unstable();
        assert_eq!(ids, [9, 10]);
        assert!(planted.iter().all(|sample| {
            sample.teacher_logprob.len() == sample.completion_ids.len() + 1
                && sample.teacher_logprob.iter().all(|logp| *logp < 0.0)
                && sample.accepted
                && sample.prompt.contains("animal")
        }));
        assert_eq!(samples.iter().filter(|sample| sample.completion == "1, 2").count(), 7);
        let questions = bench.protocol.questions("animal", usize::MAX).unwrap();
        assert!(planted.iter().all(|sample| !questions[..2].contains(&sample.prompt)), "two questions are measured");
        assert_eq!(samples[0], sample(0), "a rejected answer is not replaced");
        let mut again: Vec<Sample> = (0..9).map(sample).collect();
        plant(&bench, &mut again, 8, 0.25).unwrap();
        assert_eq!(again, samples);
        let mut one = [sample(1)];
        assert!(plant(&bench, &mut one, 8, 0.25).unwrap_err().to_string().contains("leaves none"));
    }
}
