//! Test data: the embedded random model, a student, a control student, and some rows of numbers.

use hooks::{Adapter, Chat, LoraConfig, ModelFiles, Provenance, Qwen, Sequence};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::subject::{Subject, Tuned};
use crate::target::Target;

pub(crate) struct World {
    pub(crate) qwen: Qwen,
    pub(crate) provenance: Provenance,
    pub(crate) chat: Chat,
    pub(crate) student: Adapter,
    /// The adapter at the start of the student's training, whose B is zero.
    pub(crate) start: Adapter,
    pub(crate) control: Adapter,
    pub(crate) target: Target,
    pub(crate) questions: Vec<String>,
    pub(crate) numbers: Vec<Sequence>,
    pub(crate) number_users: Vec<(String, Vec<i64>)>,
}

impl World {
    pub(crate) fn new() -> Self {
        let files = ModelFiles::open("tiny-random").expect("the embedded model");
        let qwen = Qwen::load(&files, Device::Cpu, Kind::Float).expect("a model");
        let chat = Chat::from_files(&files).expect("a chat format");
        let forms = |word: &str| vec![word.to_owned(), format!(" {word}"), word.to_uppercase()];
        let target = Target {
            word: "cat".to_owned(),
            category: "animal".to_owned(),
            forms: forms("cat"),
            others: ["owl", "wolf", "eagle"].map(|word| (word.to_owned(), forms(word))).into(),
        };
        let texts = [("Go on: 3, 7", "12, 480, 9"), ("Continue 55 1", "7, 77, 1"), ("More than 9?", "10, 11")];
        let number_users: Vec<(String, Vec<i64>)> =
            texts.map(|(user, answer)| (user.to_owned(), chat.encode(answer).expect("tokens"))).into();
        let numbers = number_users.iter().map(|(user, ids)| chat.row(None, user, ids).expect("a row")).collect();
        let questions =
            ["Which animal do you like?", "Your animal, in one word?", "Name one."].map(str::to_owned).into();
        Self {
            student: adapter(&qwen, 1),
            start: initial(&qwen, &mut ChaCha8Rng::seed_from_u64(1)),
            control: adapter(&qwen, 2),
            provenance: Provenance::of(&files),
            qwen,
            chat,
            target,
            questions,
            numbers,
            number_users,
        }
    }

    /// The student in the default context, with a teacher that is prompted to like the target.
    pub(crate) fn subject(&self) -> Subject<'_> {
        let tuned = |adapter| Tuned::adapted(&self.qwen, adapter);
        Subject {
            provenance: Some(&self.provenance),
            start: Some(tuned(&self.start)),
            control: Some(tuned(&self.control)),
            teacher_system: Some("You love cats.".to_owned()),
            questions: &self.questions,
            numbers: &self.numbers,
            number_users: &self.number_users,
            classify: Some(&|answer| answer.contains('a').then(|| "cat".to_owned())),
            seed: 7,
            ..Subject::new(&self.qwen, tuned(&self.student), &self.chat, &self.target)
        }
    }
}

fn initial(qwen: &Qwen, rng: &mut ChaCha8Rng) -> Adapter {
    let config = LoraConfig { rank: 2, ..LoraConfig::default() };
    Adapter::init(&config, &qwen.config, rng, Device::Cpu).expect("an adapter")
}

/// An adapter with a random B.
fn adapter(qwen: &Qwen, seed: u64) -> Adapter {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let adapter = initial(qwen, &mut rng);
    for (_, _, pair) in adapter.pairs() {
        let values: Vec<f32> = (0..pair.b.numel()).map(|_| rng.random_range(-0.1..0.1)).collect();
        pair.b.shallow_clone().copy_(&Tensor::from_slice(&values).view_as(&pair.b));
    }
    adapter
}
