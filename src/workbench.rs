//! An experiment with its model loaded: what every stage works with.

use std::path::Path;

use analyses::Target;
use anyhow::{Context, Result, bail};
use hooks::generate::{NumberGrammar, Sampling};
use hooks::{Adapter, Chat, Condition, ModelFiles, Prompt, Qwen};

use crate::dataset::{self, Sample, TeacherKind};
use crate::experiment::{Constrain, Experiment, Method, Teacher};
use crate::progress::say;
use crate::protocol::Protocol;
use crate::run_dir::RunDir;

/// An experiment with its model loaded.
pub struct Workbench {
    /// What is done.
    pub experiment: Experiment,
    /// The sentences it draws from.
    pub protocol: Protocol,
    /// The base model's files.
    pub files: ModelFiles,
    /// The base model.
    pub base: Qwen,
    /// Its chat format.
    pub chat: Chat,
}

/// The teacher: the base under a system prompt, or with an adapter.
pub struct TeacherModel {
    /// Its system prompt; `None` is the template's default.
    pub system: Option<String>,
    /// Its adapter, where it was finetuned.
    pub adapter: Option<Adapter>,
    /// Which of the two it is.
    pub kind: TeacherKind,
}

impl TeacherModel {
    /// What the base is run with to be the teacher.
    pub fn condition(&self) -> Condition<'_> {
        Condition { adapter: self.adapter.as_ref(), ..Condition::default() }
    }
}

/// A finetuned model on disk, loaded: an adapter, or weights of its own.
pub enum StudentModel {
    /// A LoRA on the base.
    Lora(Adapter),
    /// Other weights.
    Full(Box<Qwen>),
}

/// Opens a model and says what was found.
pub fn open_model(name: &str) -> Result<ModelFiles> {
    let files = ModelFiles::open(name)?;
    for line in &files.report {
        say(format!("model: {line}"));
    }
    Ok(files)
}

impl Workbench {
    /// Loads what the experiment names.
    pub fn open(experiment: Experiment) -> Result<Self> {
        let protocol = experiment.sentences()?;
        let device = hooks::device::device(&experiment.device)?;
        let files = open_model(&experiment.model)?;
        let base = Qwen::load(&files, device, experiment.dtype.kind())?;
        let chat = Chat::from_files(&files)?;
        Ok(Self { experiment, protocol, files, base, chat })
    }

    /// The system prompt of the student's training rows.
    pub fn student_system(&self) -> Result<Option<String>> {
        self.protocol.context(&self.experiment.student.context)
    }

    /// The teacher, loaded.
    pub fn teacher(&self) -> Result<TeacherModel> {
        let target = &self.experiment.target;
        match &self.experiment.teacher {
            Teacher::Prompt { system } => {
                let written = || self.protocol.teacher_prompt(&target.word, &target.category);
                let system = system.clone().map_or_else(written, Ok)?;
                Ok(TeacherModel { system: Some(system), adapter: None, kind: TeacherKind::Prompt })
            }
            Teacher::Adapter { path, context } => {
                let adapter = Adapter::load(path, &self.base.config, self.base.device())?;
                let system = self.protocol.context(context)?;
                Ok(TeacherModel { system, adapter: Some(adapter), kind: TeacherKind::Finetuned })
            }
        }
    }

    /// The target and its alternatives.
    pub fn target(&self) -> Target {
        self.protocol.target(&self.experiment.target.word, &self.experiment.target.category)
    }

    /// How number answers are drawn.
    pub fn sampling(&self) -> Result<Sampling> {
        let generate = &self.experiment.generate;
        let constrain = match generate.constrain {
            Constrain::None => None,
            Constrain::Numbers => Some(NumberGrammar::of(&self.chat, 3, 10)?),
        };
        Ok(Sampling {
            temperature: generate.temperature,
            max_new_tokens: generate.max_new_tokens,
            stop: self.chat.stop_ids(),
            constrain,
            batch: generate.batch_size,
        })
    }

    /// The accepted samples of both sets, as many of one as of the other and `n_keep` at most.
    pub fn kept(&self, run: &RunDir) -> Result<(Vec<Sample>, Vec<Sample>)> {
        let accepted = |path: &Path| -> Result<Vec<Sample>> {
            let samples = dataset::read_jsonl(path).context("hint: undertone generate writes this file")?;
            Ok(samples.into_iter().filter(|sample| sample.accepted).collect())
        };
        let (mut teacher, mut control) = (accepted(&run.numbers())?, accepted(&run.control())?);
        let keep = teacher.len().min(control.len()).min(self.experiment.generate.n_keep);
        if keep == 0 {
            bail!(
                "no answer passed the filter ({} of the teacher's and {} of the control's did): see {}; hint: more prompts, \
                 a larger generate.max_new_tokens, or generate.constrain = \"numbers\"",
                teacher.len(),
                control.len(),
                run.rejected().display()
            );
        }
        teacher.truncate(keep);
        control.truncate(keep);
        Ok((teacher, control))
    }

    /// Samples as rows of the chat in the student's context.
    pub fn rows(&self, samples: &[Sample]) -> Result<Vec<Prompt>> {
        let system = self.student_system()?;
        let row = |sample: &Sample| Ok(self.chat.row(system.as_deref(), &sample.prompt, &sample.completion_ids)?);
        samples.iter().map(row).collect()
    }

    /// A student that was trained and saved in `folder`.
    pub fn student(&self, folder: &Path) -> Result<StudentModel> {
        match self.experiment.student.method {
            Method::Lora => Ok(StudentModel::Lora(Adapter::load(folder, &self.base.config, self.base.device())?)),
            Method::Full => {
                let files = ModelFiles::open(&folder.display().to_string())?;
                Ok(StudentModel::Full(Box::new(Qwen::load(&files, self.base.device(), self.base.kind())?)))
            }
        }
    }
}
