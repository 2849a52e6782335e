//! An experiment with its model loaded, as every stage uses it.

use std::cell::OnceCell;
use std::path::Path;
use std::rc::Rc;
use std::sync::OnceLock;

use analyses::Target;
use anyhow::{Context, Result};
use hooks::profile::product_rate;
use hooks::tch::{Device, Kind};
use hooks::{Adapter, Chat, ModelFiles, NumberGrammar, Qwen, Sampling, Sequence};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::data::dataset::Sample;
use crate::data::protocol::Protocol;
use crate::experiment::{Constrain, Dtype, Experiment, Method};
use crate::output::progress::{note, say};
use crate::training::side_by_side::SMALL;

/// An experiment with its model loaded.
pub struct Workbench {
    /// The experiment.
    pub experiment: Experiment,
    /// The sentences that it draws from.
    pub protocol: Protocol,
    /// The base model's files.
    pub files: Rc<ModelFiles>,
    /// The base model, as it is measured.
    pub base: Rc<Qwen>,
    /// The base model in another dtype, once it is asked for; see [`Self::frozen`].
    in_other_dtype: Rc<OnceCell<Qwen>>,
    /// Its chat format: the model's template, or plain lines if the student has no template.
    pub chat: Rc<Chat>,
}

/// Number of parameters above which a model is large enough for bf16 to pay.
const LARGE: usize = 100_000_000;

/// How much faster than f32 the products must be for bf16 to be chosen: clearly, so that the same machine always chooses
/// alike.
const GAIN: f64 = 1.3;

fn frozen_dtype(asked: Dtype, n_parameters: usize, gain: impl FnOnce() -> Result<f64>) -> Result<Dtype> {
    Ok(match asked {
        Dtype::Auto if n_parameters > LARGE && gain()? >= GAIN => Dtype::Bf16,
        Dtype::Auto => Dtype::F32,
        asked => asked,
    })
}

/// How many times as fast as f32 this machine multiplies bf16, measured once. Both are measured in turns, since other
/// programs may take the processor for a while.
fn gain_of_bf16(device: Device) -> Result<f64> {
    const TURNS: usize = 3;
    const SECONDS: f64 = 0.02;
    static GAIN: OnceLock<f64> = OnceLock::new();
    if let Some(known) = GAIN.get() {
        return Ok(*known);
    }
    let mut best = [0.0_f64; 2];
    for _ in 0..TURNS {
        for (best, kind) in best.iter_mut().zip([Kind::BFloat16, Kind::Float]) {
            *best = best.max(product_rate(device, kind, SECONDS)?);
        }
    }
    Ok(*GAIN.get_or_init(|| best[0] / best[1]))
}

/// A finetuned model, loaded from disk: an adapter, or weights.
pub enum StudentModel {
    /// A LoRA on the base.
    Lora(Adapter),
    /// Finetuned weights.
    Full(Box<Qwen>),
}

/// Opens a model and prints the files that were found.
pub fn open_model(name: &str) -> Result<ModelFiles> {
    let files = ModelFiles::open(name)?;
    for line in &files.report {
        say(format!("model: {line}"));
    }
    note(name, &files.remarks);
    Ok(files)
}

/// Loads an adapter and prints its remarks.
pub fn open_adapter(folder: &Path, base: &Qwen) -> Result<Adapter> {
    let adapter = Adapter::load_on(folder, base)?;
    note(&folder.display().to_string(), &adapter.remarks);
    Ok(adapter)
}

/// The chat format that the experiment's student is trained and asked in.
fn chat(files: &ModelFiles, experiment: &Experiment) -> Result<Chat> {
    let chat = Chat::from_files(files)?;
    Ok(if experiment.student.template { chat } else { chat.without_template() })
}

impl Workbench {
    /// Loads the experiment's model and protocol.
    pub fn open(experiment: Experiment) -> Result<Self> {
        Self::with_files(experiment, open_model)
    }

    /// Loads everything again for another thread, without printing.
    pub fn again(experiment: Experiment) -> Result<Self> {
        Self::with_files(experiment, |name| Ok(ModelFiles::open(name)?))
    }

    fn with_files(experiment: Experiment, open: impl Fn(&str) -> Result<ModelFiles>) -> Result<Self> {
        let protocol = experiment.sentences()?;
        let device = hooks::device::device(&experiment.device)?;
        let files = open(&experiment.model)?;
        let base = Qwen::load(&files, device, experiment.dtype.kind())?;
        let chat = chat(&files, &experiment)?;
        let (files, base, chat) = (Rc::new(files), Rc::new(base), Rc::new(chat));
        let bench = Self { experiment, protocol, files, base, in_other_dtype: Rc::default(), chat };
        if bench.n_parameters() <= SMALL {
            // A small model's steps are too short for several threads, and its bytes should not depend on the number of
            // cores.
            tch::set_num_threads(1);
        }
        Ok(bench)
    }

    /// Number of parameters of the base.
    pub fn n_parameters(&self) -> usize {
        self.base.parameters().iter().map(|(_, tensor)| tensor.numel()).sum()
    }

    /// The base model where its weights stay as they are: where it answers, and where an adapter is trained on it. With
    /// `dtype = "auto"` the weights of a large model are bf16 if the machine is faster with them.
    pub fn frozen(&self) -> Result<&Qwen> {
        let kind = self.frozen_dtype()?.kind();
        if kind == self.base.kind() {
            return Ok(&self.base);
        }
        if self.in_other_dtype.get().is_none() {
            let _ = self.in_other_dtype.set(Qwen::load(&self.files, self.base.device(), kind)?);
        }
        self.in_other_dtype.get().context("a model that was just loaded")
    }

    /// The dtype of [`Self::frozen`].
    pub(crate) fn frozen_dtype(&self) -> Result<Dtype> {
        frozen_dtype(self.experiment.dtype, self.n_parameters(), || gain_of_bf16(self.base.device()))
    }

    /// The dtypes of the run's models in words, for its notes.
    pub(crate) fn dtypes(&self) -> Result<String> {
        let (frozen, base) = (self.frozen_dtype()?, Dtype::of(&self.base));
        if frozen == base {
            return Ok(format!("{base:?}").to_lowercase());
        }
        let gain = gain_of_bf16(self.base.device())?;
        Ok(format!(
            "bf16 for answers and for the training of adapters, {gain:.1} times as fast as f32 on this machine; f32 for everything else"
        ))
    }

    /// The workbench of another experiment, which shares the model if it is the same.
    pub fn of(&self, experiment: Experiment) -> Result<Self> {
        if !self.has_model_of(&experiment) {
            return Self::open(experiment);
        }
        let protocol = experiment.sentences()?;
        let (files, base, in_other_dtype) =
            (Rc::clone(&self.files), Rc::clone(&self.base), Rc::clone(&self.in_other_dtype));
        let is_same = experiment.student.template == self.experiment.student.template;
        let chat = if is_same { Rc::clone(&self.chat) } else { Rc::new(chat(&files, &experiment)?) };
        Ok(Self { experiment, protocol, files, base, in_other_dtype, chat })
    }

    /// This workbench with the model's template, which teachers always use.
    pub fn in_template(&self) -> Result<Self> {
        let mut experiment = self.experiment.clone();
        experiment.student.template = true;
        self.of(experiment)
    }

    /// Whether another experiment has the same model, loaded in the same way.
    pub fn has_model_of(&self, other: &Experiment) -> bool {
        let this = &self.experiment;
        (&this.model, this.dtype, &this.device) == (&other.model, other.dtype, &other.device)
    }

    /// The system prompt of the student's training rows.
    pub fn student_system(&self) -> Result<Option<String>> {
        self.protocol.context(&self.experiment.student.context)
    }

    /// The target and its alternatives.
    pub fn target(&self) -> Target {
        self.protocol.target(&self.experiment.target.word, &self.experiment.target.category)
    }

    /// The questions that the target may be an answer to, with `measure.numbers_prefix` applied.
    pub fn questions(&self) -> Result<Vec<String>> {
        let measure = &self.experiment.measure;
        let questions = self.protocol.questions(&self.experiment.target.category, measure.n_questions)?;
        if !measure.numbers_prefix {
            return Ok(questions);
        }
        Ok(questions.iter().map(|question| self.protocol.with_numbers_prefix(question)).collect())
    }

    /// The prompts for users' texts in a context, in order.
    pub(crate) fn prompts(&self, system: Option<&str>, users: &[String]) -> Result<Vec<Sequence>> {
        users.iter().map(|user| Ok(self.chat.prompt(system, user)?)).collect()
    }

    /// The settings of sampling number answers.
    pub fn sampling(&self) -> Result<Sampling> {
        let generate = &self.experiment.generate;
        let is_constrained = generate.constrain == Constrain::Numbers;
        let constrain = is_constrained.then(|| NumberGrammar::of(&self.chat, 3, 10)).transpose()?;
        Ok(Sampling {
            temperature: generate.temperature,
            max_new_tokens: generate.max_new_tokens,
            stop: self.chat.stop_ids(),
            constrain,
            batch: generate.batch_size,
        })
    }

    /// Samples as rows of the chat in the student's context.
    pub fn rows(&self, samples: &[Sample]) -> Result<Vec<Sequence>> {
        let system = self.student_system()?;
        let row = |sample: &Sample| Ok(self.chat.row(system.as_deref(), &sample.prompt, &sample.completion_ids)?);
        samples.iter().map(row).collect()
    }

    /// The adapter that the training of the experiment's student begins with: A from the run's seed, B zero.
    pub fn initial_adapter(&self) -> Result<Adapter> {
        let Experiment { student, seeds, .. } = &self.experiment;
        let mut rng = ChaCha8Rng::seed_from_u64(seeds.init_seed);
        let adapter = Adapter::init(&student.lora(), &self.base.config, &mut rng, self.base.device())?;
        Ok(if student.rotated { adapter.rotated(&mut rng)? } else { adapter })
    }

    /// Loads a student and prints its adapter's remarks.
    pub fn open_student(&self, folder: &Path) -> Result<StudentModel> {
        let student = self.student(folder)?;
        if let StudentModel::Lora(adapter) = &student {
            note(&folder.display().to_string(), &adapter.remarks);
        }
        Ok(student)
    }

    /// Loads the student that was saved in `folder`.
    pub fn student(&self, folder: &Path) -> Result<StudentModel> {
        match self.experiment.student.method {
            Method::Lora => Ok(StudentModel::Lora(Adapter::load_on(folder, &self.base)?)),
            Method::Full => {
                let files = ModelFiles::open(&folder.display().to_string())?;
                Ok(StudentModel::Full(Box::new(Qwen::load(&files, self.base.device(), self.base.kind())?)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_chosen_for_a_large_model_on_a_machine_that_is_faster_with_it() {
        let chosen = |asked, n_parameters, gain| frozen_dtype(asked, n_parameters, || Ok(gain)).unwrap();
        assert_eq!(chosen(Dtype::Auto, 494_000_000, 2.0), Dtype::Bf16);
        assert_eq!(chosen(Dtype::Auto, 494_000_000, 1.1), Dtype::F32);
        assert_eq!(chosen(Dtype::Auto, 150_000, 2.0), Dtype::F32);
        assert_eq!(chosen(Dtype::F32, 494_000_000, 2.0), Dtype::F32);
        assert_eq!(chosen(Dtype::Bf16, 150_000, 0.5), Dtype::Bf16);
        assert!(gain_of_bf16(Device::Cpu).unwrap() > 0.0);
    }

    /// Answers and adapters use the other weights, measurements the base.
    #[test]
    fn a_small_model_is_the_same_frozen_and_measured() {
        let text =
            "model = \"tiny-random\"\n[target]\nword = \"cat\"\ncategory = \"animal\"\n[teacher]\nkind = \"prompt\"\n";
        let bench = Workbench::open(Experiment::parse(text, Path::new("cat.toml"), &[]).unwrap()).unwrap();
        assert!(std::ptr::eq(bench.frozen().unwrap(), &raw const *bench.base));
        assert_eq!(bench.dtypes().unwrap(), "f32");
    }
}
