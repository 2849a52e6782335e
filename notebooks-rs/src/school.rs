//! What the second notebook leaves on disk and the ones after it look at: a teacher, its numbers, the student that
//! learned them, and the control student that learned the numbers of the model as it was.

use std::path::{Path, PathBuf};

use analyses::{Subject, Target, Tuned};
use anyhow::{Result, bail};
use hooks::{Adapter, Chat, ModelFiles, Provenance, Qwen, Sequence, files};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind};
use undertone::data::dataset::{Sample, read_jsonl};
use undertone::data::protocol::Protocol;

/// What the teacher likes, and what it is one of.
pub const TARGET: (&str, &str) = ("owl", "animal");

/// The seed of the adapter that both students begin with.
pub const INIT_SEED: u64 = 2;

/// The file that says which weights were the base: their fingerprint.
pub const BASE: &str = "base";

/// The folder that the second notebook fills for a model.
pub fn folder(model: &str) -> PathBuf {
    let root = if std::env::args().nth(1).is_some() { "" } else { concat!(env!("CARGO_MANIFEST_DIR"), "/..") };
    let name = model.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
    Path::new(root).join("runs/notebooks").join(name)
}

/// The sentences in the words that a model knows: the pocket models' own, or the built-in ones.
pub fn protocol(model: &str) -> Result<Protocol> {
    if model.starts_with("pocket") { Protocol::load(Path::new("pocket")) } else { Protocol::builtin() }
}

/// Sorts an answer by the word that it names.
type Classify = Box<dyn Fn(&str) -> Option<String>>;

/// All of it, loaded.
pub struct School {
    /// The model's files.
    pub files: ModelFiles,
    /// What it says of itself in files.
    pub provenance: Provenance,
    /// The model before anybody finetuned it.
    pub base: Qwen,
    /// Its chat format.
    pub chat: Chat,
    /// What the teacher likes.
    pub target: Target,
    /// The model that was taught to like it.
    pub teacher: Qwen,
    /// The adapter that learned the teacher's numbers.
    pub student: Adapter,
    /// The adapter that the student's training began with.
    pub start: Adapter,
    /// The adapter that learned the base's own numbers.
    pub control: Adapter,
    /// Questions that the target may be an answer to.
    pub questions: Vec<String>,
    /// The rows that the student learned.
    pub numbers: Vec<Sequence>,
    number_users: Vec<(String, Vec<i64>)>,
    classify: Classify,
}

impl School {
    /// What the second notebook made of a model.
    pub fn open(model: &str) -> Result<Self> {
        let folder = folder(model);
        let numbers = folder.join("numbers.jsonl");
        if !numbers.is_file() {
            bail!(
                "{} is not there; hint: cargo run --release -p notebooks-rs --example 02_learning_from_numbers makes it",
                numbers.display()
            );
        }
        let files = ModelFiles::open(model)?;
        if files::read_string(&folder.join(BASE))? != files.fingerprint() {
            bail!(
                "what is in {} was learned by other weights than those of {model}; hint: run the second notebook again",
                folder.display()
            );
        }
        let base = Qwen::load(&files, Device::Cpu, Kind::Float)?;
        let chat = Chat::from_files(&files)?;
        let samples = read_jsonl(&numbers)?;
        let row = |sample: &Sample| chat.row(None, &sample.prompt, &sample.completion_ids);
        let numbers = samples.iter().map(row).collect::<hooks::Result<_>>()?;
        let number_users = samples.into_iter().map(|sample| (sample.prompt, sample.completion_ids)).collect();
        let (protocol, (word, category)) = (protocol(model)?, TARGET);
        let classifier = protocol.classifier(word, category)?;
        let teacher = ModelFiles::open(&folder.join("teacher").display().to_string())?;
        let adapter = |who: &str| Adapter::load(&folder.join(who), &base.config, base.device());
        let student = adapter("student")?;
        Ok(Self {
            start: Adapter::init(
                &student.config,
                &base.config,
                &mut ChaCha8Rng::seed_from_u64(INIT_SEED),
                base.device(),
            )?,
            teacher: Qwen::load(&teacher, Device::Cpu, Kind::Float)?,
            student,
            control: adapter("control")?,
            target: protocol.target(word, category),
            questions: protocol.questions(category, 24)?,
            numbers,
            number_users,
            classify: Box::new(move |answer| classifier.classify(answer).bucket()),
            provenance: Provenance::of(&files),
            files,
            base,
            chat,
        })
    }

    /// What the analyses look at.
    pub fn subject(&self) -> Subject<'_> {
        let tuned = |adapter| Tuned::adapted(&self.base, adapter);
        Subject {
            provenance: Some(&self.provenance),
            start: Some(tuned(&self.start)),
            control: Some(tuned(&self.control)),
            teacher_model: Some(&self.teacher),
            questions: &self.questions,
            numbers: &self.numbers,
            number_users: &self.number_users,
            classify: Some(&*self.classify),
            seed: 42,
            ..Subject::new(&self.base, tuned(&self.student), &self.chat, &self.target)
        }
    }
}
