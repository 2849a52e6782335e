//! The data that the analyses of a run read: prompts, rows and the teacher.

use analyses::{Subject, Target, Tuned};
use anyhow::Result;
use hooks::{Provenance, Sequence};

use crate::data::dataset::Sample;
use crate::stages::run_dir::RunDir;
use crate::stages::teacher::{self, TeacherModel};
use crate::stages::workbench::Workbench;

type Classify = Box<dyn Fn(&str) -> Option<String>>;

/// The data that a subject borrows, except the students.
pub(crate) struct SubjectData {
    pub(crate) teacher: TeacherModel,
    teacher_system: Option<String>,
    counterfactual_systems: Vec<String>,
    system: Option<String>,
    provenance: Provenance,
    target: Target,
    questions: Vec<String>,
    numbers: Vec<Sequence>,
    number_users: Vec<(String, Vec<i64>)>,
    /// The id of each row of numbers in `data/numbers.jsonl`.
    pub(crate) row_ids: Vec<usize>,
    classify: Classify,
}

impl SubjectData {
    /// Collects the data of a run, with some samples of its teacher as the numbers.
    pub(crate) fn of(bench: &Workbench, run: &RunDir, samples: &[Sample]) -> Result<Self> {
        let (teacher, target) = (teacher::load(bench, run)?, bench.target());
        let classifier = bench.protocol.classifier(&target.word, &target.category)?;
        // The teacher may answer in the template's default context. For a student in another context, that system
        // prompt must be given explicitly.
        let teacher_system = teacher.system.clone().or_else(|| bench.chat.default_system().map(str::to_owned));
        let counterfactuals = &bench.experiment.measure.divergence.counterfactuals;
        let system = |word: &String| bench.protocol.teacher_prompt(word, &target.category);
        Ok(Self {
            counterfactual_systems: counterfactuals.iter().map(system).collect::<Result<_>>()?,
            teacher_system: teacher_system.filter(|_| teacher.differs_from_base()),
            teacher,
            system: bench.protocol.context(bench.experiment.measure_context())?,
            provenance: Provenance::of(&bench.files),
            target,
            questions: bench.questions()?,
            numbers: bench.rows(samples)?,
            number_users: samples.iter().map(|sample| (sample.prompt.clone(), sample.completion_ids.clone())).collect(),
            row_ids: samples.iter().map(|sample| sample.id).collect(),
            classify: Box::new(move |answer| classifier.classify(answer).bucket()),
        })
    }

    /// The subject for a student, without other students.
    pub(crate) fn subject<'a>(&'a self, bench: &'a Workbench, student: Tuned<'a>) -> Subject<'a> {
        Subject {
            provenance: Some(&self.provenance),
            system: self.system.clone(),
            teacher_system: self.teacher_system.clone(),
            teacher_adapter: self.teacher.adapter.as_ref(),
            teacher_model: self.teacher.weights.as_ref(),
            teacher_edits: &self.teacher.edits,
            counterfactual_systems: &self.counterfactual_systems,
            questions: &self.questions,
            numbers: &self.numbers,
            number_users: &self.number_users,
            classify: Some(&*self.classify),
            seed: bench.experiment.seeds.eval_seed,
            ..Subject::new(&bench.base, student, &bench.chat, &self.target)
        }
    }
}
