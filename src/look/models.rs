//! The models of a run, and what they say to a chat: the category's members and the first tokens of base, student,
//! control student and the page's setting, and sampled answers.

mod inside;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use analyses::target::{MemberLogps, TokenForms};
use anyhow::{Context, Result, ensure};
use hooks::{Adapter, Condition, Proj, Sampling, Selection, Sequence, TokenClass, TokenInfo, generate, stream_seed};

pub use inside::Quantity;
use serde::{Deserialize, Serialize};

use super::first_words::{first_words, likeliest};
use super::setting::{Named, Setting, Steer};
use crate::experiment::{CONTROL_STUDENT, Dtype, Experiment, Method, STUDENT};
use crate::hinted;
use crate::output::vectors::Vectors;
use crate::stages::run_dir::RunDir;
use crate::stages::workbench::Workbench;

/// The models of a run, loaded when they are first asked for.
pub struct Models {
    bench: Workbench,
    run: RunDir,
    students: Vec<Shown>,
    adapters: BTreeMap<String, Rc<Adapter>>,
    words: Vec<String>,
    forms: TokenForms,
    beside: Option<(Chatted, Vec<Said>)>,
}

/// A student that can be shown.
struct Shown {
    name: String,
    adapter: PathBuf,
    /// The word that its teacher liked.
    target: String,
}

/// What the models beside the setting depend on: the student, the system prompt and the user's text.
type Chatted = (String, Option<String>, String);

/// What the page needs to know of a run, once.
#[derive(Serialize)]
pub struct Described {
    run: String,
    model: String,
    target: String,
    category: String,
    students: Vec<Listed>,
    n_layers: usize,
    modules: Vec<&'static str>,
    /// Names that mean several classes of prompt tokens, the widest first, each with its classes.
    unions: Vec<(&'static str, Vec<TokenClass>)>,
    contexts: BTreeMap<String, Option<String>>,
    default_system: Option<String>,
    questions: Vec<String>,
    has_direction: bool,
}

/// A student as the page lists it.
#[derive(Serialize)]
struct Listed {
    name: String,
    target: String,
}

/// A gate as the page's controls show it.
#[derive(Serialize)]
struct ShownGate {
    dose: f64,
    layers: Vec<usize>,
    modules: Vec<&'static str>,
    /// Whether it selects generated tokens; `None` if it does so by id.
    generated: Option<bool>,
    /// Whether it acts at all tokens in the blocks and projections that it does not name.
    acts_elsewhere: bool,
}

/// A chat under a setting, before any model is asked.
#[derive(Serialize)]
pub struct Rendered {
    tokens: Vec<ChatToken>,
    gate: ShownGate,
    decode_policy: &'static str,
    words: Vec<String>,
    command: String,
    experiment: String,
}

/// What base, student, control student and the setting say to it.
#[derive(Serialize)]
pub struct Compared {
    models: Vec<Said>,
    first_tokens: Vec<FirstToken>,
}

/// A token of the chat, with the factor on the adapter's output at it, and whether the gate selects it, at any dose.
#[derive(Serialize)]
struct ChatToken {
    position: usize,
    id: i64,
    text: String,
    class: TokenClass,
    dose: f64,
    selected: bool,
}

/// What a model says first.
#[derive(Clone, Debug, Serialize)]
pub struct Said {
    name: String,
    /// log p of starting the answer with each word, in nats; the target first.
    logps: Vec<f64>,
    /// The target's log p less the log of the others' mean probability, in nats.
    margin: f64,
    #[serde(skip)]
    next: Vec<f32>,
}

/// A first token, with its probability under each model.
#[derive(Serialize)]
struct FirstToken {
    id: i64,
    text: String,
    p: Vec<f32>,
}

/// How answers are sampled.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Draw {
    n: usize,
    temperature: f64,
    seed: u64,
    max_new_tokens: usize,
}

/// A sampled answer.
#[derive(Serialize)]
pub struct Drawn {
    text: String,
    stopped: bool,
}

/// The most answers, and tokens of an answer, that a request may ask for.
const MOST: usize = 256;

/// Number of answers that are drawn at once, so that the page shows the first ones early.
const AT_ONCE: usize = 4;

/// A projection's name as gates spell it.
fn short(proj: Proj) -> &'static str {
    proj.name().trim_end_matches("_proj")
}

fn unions() -> Result<Vec<(&'static str, Vec<TokenClass>)>> {
    let mut found = vec![];
    for name in Selection::choices().into_iter().filter(|name| name.parse::<TokenClass>().is_err()) {
        let classes: Vec<TokenClass> = name.parse::<Selection>()?.classes().iter().copied().collect();
        if !classes.contains(&TokenClass::Gen) {
            found.push((name, classes));
        }
    }
    found.sort_by_key(|(_, classes)| std::cmp::Reverse(classes.len()));
    Ok(found)
}

impl Models {
    /// Loads a run's base. Students with adapters can be shown: the student, the control student, and the arms'.
    pub fn open(run: RunDir) -> Result<Self> {
        let bench = Workbench::again(run.experiment(&[])?)?;
        let template = bench.experiment.student.template;
        ensure!(
            template,
            "{} has student.template = false, and only chats of a template are shown",
            run.config().display()
        );
        let mut students = vec![];
        let target = bench.experiment.target.word.clone();
        if bench.experiment.student.method == Method::Lora {
            for (name, adapter) in [(STUDENT, run.adapter()), (CONTROL_STUDENT, run.control_adapter())] {
                students.push(Shown { name: name.to_owned(), adapter, target: target.clone() });
            }
        }
        for cell in bench.experiment.cells()? {
            let Experiment { student, target, .. } = &cell.experiment;
            if student.method == Method::Lora && student.template && bench.has_model_of(&cell.experiment) {
                let (adapter, target) = (run.arm(&cell.slug).join("adapter"), target.word.clone());
                students.push(Shown { name: cell.slug, adapter, target });
            }
        }
        let are_all_full = students.is_empty();
        students.retain(|student| student.adapter.exists());
        ensure!(
            !are_all_full,
            "{} has only students of full finetuning, and those have no adapter",
            run.root().display()
        );
        ensure!(
            !students.is_empty(),
            hinted!("{} has no trained student yet", run.root().display(); "undertone run goes on with it")
        );
        let target = bench.target();
        let forms = TokenForms::of(&target, &bench.chat)?;
        let words = std::iter::once(&target.word).chain(target.others.iter().map(|(word, _)| word)).cloned().collect();
        Ok(Self { bench, run, students, adapters: BTreeMap::new(), words, forms, beside: None })
    }

    /// What the page shows before it asks anything.
    pub fn described(&self) -> Result<Described> {
        let Workbench { experiment, protocol, base, chat, .. } = &self.bench;
        Ok(Described {
            run: self.run.root().display().to_string(),
            model: experiment.model.clone(),
            target: experiment.target.word.clone(),
            category: experiment.target.category.clone(),
            students: self
                .students
                .iter()
                .map(|of| Listed { name: of.name.clone(), target: of.target.clone() })
                .collect(),
            n_layers: base.config.n_layers,
            modules: Proj::ALL.map(short).to_vec(),
            unions: unions()?,
            contexts: protocol.contexts.clone(),
            default_system: chat.default_system().map(str::to_owned),
            questions: self.bench.questions()?,
            has_direction: self.vectors().exists(),
        })
    }

    /// The chat's tokens under a setting, with the command that prints its numbers. Takes no time of the models.
    pub fn rendered(&mut self, setting: &Setting) -> Result<Rendered> {
        let prompt = self.prompt(setting)?;
        let adapter = self.adapter(&setting.student)?;
        setting.gate.check(&adapter)?;
        let whole = setting.gate.clone().with_dose(1.0);
        let (doses, selected) = (setting.gate.doses(&prompt)?, whole.doses(&prompt)?);
        let named = self.named(setting)?;
        let token = |((token, dose), selected): ((TokenInfo, f64), f64)| ChatToken {
            position: token.position,
            id: token.id,
            text: token.text,
            class: token.class,
            dose,
            selected: selected != 0.0,
        };
        Ok(Rendered {
            tokens: self.bench.chat.table(&prompt)?.into_iter().zip(doses).zip(selected).map(token).collect(),
            gate: ShownGate {
                dose: setting.gate.dose(),
                layers: setting.gate.layers(self.bench.base.config.n_layers),
                modules: setting.gate.modules().into_iter().map(short).collect(),
                generated: whole.decode_dose().map(|dose| dose != 0.0),
                acts_elsewhere: setting.gate.acts_elsewhere(),
            },
            decode_policy: setting.gate.decode_policy(),
            words: self.words.clone(),
            command: setting.command(&named)?,
            experiment: setting.experiment(&named)?,
        })
    }

    /// What the models say to the chat.
    pub fn compared(&mut self, setting: &Setting) -> Result<Compared> {
        let prompt = self.prompt(setting)?;
        let adapter = self.adapter(&setting.student)?;
        let condition = self.condition(setting, &adapter)?;
        let beside = self.beside(setting, &prompt)?;
        let models = [beside, self.said(&prompt, vec![("this setting".to_owned(), condition)])?].concat();
        Ok(Compared { first_tokens: self.first_tokens(&models)?, models })
    }

    /// Draws answers, a few at a time; `each` is called with every one and returns whether to go on.
    pub fn draw(&mut self, setting: &Setting, draw: &Draw, each: &mut dyn FnMut(Drawn) -> bool) -> Result<()> {
        let Draw { n, temperature, seed, max_new_tokens } = *draw;
        let bounded = |count: usize| (1..=MOST).contains(&count);
        ensure!(bounded(n) && bounded(max_new_tokens), "expected 1 to {MOST} answers of 1 to {MOST} tokens");
        ensure!(temperature.is_finite() && temperature >= 0.0, "temperature: expected 0 or a number above");
        let prompt = self.prompt(setting)?;
        self.bench.base.config.check_context("prompt", [prompt.ids.len()], max_new_tokens)?;
        let adapter = self.adapter(&setting.student)?;
        let condition = self.condition(setting, &adapter)?;
        let chat = &self.bench.chat;
        let sampling = Sampling { temperature, max_new_tokens, stop: chat.stop_ids(), constrain: None, batch: AT_ONCE };
        for first in (0..n).step_by(AT_ONCE) {
            // The random streams of `undertone ask`.
            let streams: Vec<u64> =
                (first..n.min(first + AT_ONCE)).map(|at| stream_seed(seed, "ask", at as u64)).collect();
            let prompts = vec![prompt.clone(); streams.len()];
            for answer in generate(&self.bench.base, &prompts, &condition, &sampling, &streams, &mut |_| ())? {
                if !each(Drawn { text: chat.decode(&answer.ids)?, stopped: answer.stopped }) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn prompt(&self, setting: &Setting) -> Result<Sequence> {
        let prompt = self.bench.chat.prompt(setting.system.as_deref(), &setting.user)?;
        self.bench.base.config.check_context("prompt", [prompt.ids.len()], 1)?;
        Ok(prompt)
    }

    fn folder(&self, student: &str) -> Result<&PathBuf> {
        let known = self.students.iter().find(|known| known.name == student).map(|known| &known.adapter);
        known.with_context(|| format!("the run has no student {student:?} with an adapter"))
    }

    fn adapter(&mut self, student: &str) -> Result<Rc<Adapter>> {
        if let Some(known) = self.adapters.get(student) {
            return Ok(Rc::clone(known));
        }
        let loaded = Rc::new(Adapter::load_on(self.folder(student)?, &self.bench.base)?);
        self.adapters.insert(student.to_owned(), Rc::clone(&loaded));
        Ok(loaded)
    }

    fn vectors(&self) -> PathBuf {
        self.run.vectors().join("vectors.safetensors")
    }

    fn named(&self, setting: &Setting) -> Result<Named<'_>> {
        let adapter = self.folder(&setting.student)?;
        let Experiment { model, device, .. } = &self.bench.experiment;
        let dtype = Dtype::of(&self.bench.base);
        Ok(Named { model, dtype, device, adapter, vectors: self.vectors(), words: &self.words })
    }

    fn condition<'a>(&self, setting: &Setting, adapter: &'a Adapter) -> Result<Condition<'a>> {
        let edits = match setting.steer {
            Some(Steer { layer, coefficient }) => {
                ensure!(coefficient.is_finite(), "the coefficient is {coefficient}, expected a number");
                Vectors::read_at(&self.vectors(), layer)?.steer(coefficient, &self.bench.files)?
            }
            None => vec![],
        };
        Ok(Condition { adapter: Some(adapter), gate: setting.gate.clone(), edits })
    }

    /// The base, the student and the control student, which change with the chat alone.
    fn beside(&mut self, setting: &Setting, prompt: &Sequence) -> Result<Vec<Said>> {
        let of = (setting.student.clone(), setting.system.clone(), setting.user.clone());
        if let Some((known, said)) = &self.beside
            && *known == of
        {
            return Ok(said.clone());
        }
        let student = self.adapter(&setting.student)?;
        let has_control = setting.student != CONTROL_STUDENT && self.folder(CONTROL_STUDENT).is_ok();
        let control = has_control.then(|| self.adapter(CONTROL_STUDENT)).transpose()?;
        let mut conditions =
            vec![("base".to_owned(), Condition::default()), (setting.student.clone(), Condition::adapted(&student))];
        conditions.extend(control.as_ref().map(|control| (CONTROL_STUDENT.to_owned(), Condition::adapted(control))));
        let said = self.said(prompt, conditions)?;
        self.beside = Some((of, said.clone()));
        Ok(said)
    }

    fn said(&self, prompt: &Sequence, conditions: Vec<(String, Condition<'_>)>) -> Result<Vec<Said>> {
        let (names, conditions): (Vec<String>, Vec<Condition<'_>>) = conditions.into_iter().unzip();
        let found = first_words(&self.bench.base, &self.forms, prompt, &conditions)?;
        let said = |(name, (members, next)): (String, (MemberLogps, Vec<f32>))| {
            let margin = members.score().margin;
            Said { name, logps: members.logps, margin, next }
        };
        Ok(names.into_iter().zip(found).map(said).collect())
    }

    /// The most likely first tokens of the base, the student and the setting, by the setting's probability.
    fn first_tokens(&self, models: &[Said]) -> Result<Vec<FirstToken>> {
        // The control student that stands beside another one has no tokens of its own here.
        let beside = |at: usize, said: &Said| at > 1 && said.name == CONTROL_STUDENT;
        let shown = models.iter().enumerate().filter(|(at, said)| !beside(*at, said)).map(|(_, said)| said);
        let mut ids: Vec<usize> = shown.flat_map(|said| likeliest(&said.next, 10)).collect();
        ids.sort_unstable();
        ids.dedup();
        if let Some(set) = models.last() {
            ids.sort_by(|left, right| set.next[*right].total_cmp(&set.next[*left]));
        }
        let token = |id: usize| -> Result<FirstToken> {
            let text = self.bench.chat.token_text(id as i64)?;
            Ok(FirstToken { id: id as i64, text, p: models.iter().map(|said| said.next[id]).collect() })
        };
        ids.into_iter().map(token).collect()
    }
}
