//! The models of a run, and what they say to a chat: the category's members and the first tokens of base, student,
//! control student and the page's setting, a number for each token of the chat, and sampled answers.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;

use analyses::lens;
use analyses::target::{MemberLogps, TokenForms};
use anyhow::{Context, Result, ensure};
use hooks::tch::{Device, Kind, Tensor, no_grad};
use hooks::{
    Adapter, Cache, Condition, Gate, HookPoint, Proj, Sampling, Selection, Sequence, TokenClass, TokenInfo, generate,
    standard_normal, stream_seed,
};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
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

/// A number for each token of a chat.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantity {
    /// The change of the margin with the adapter acting at this token alone, against the base.
    Only,
    /// What is left of the change of the margin with the adapter acting everywhere except at this token.
    Except,
    /// The norm of the gradient of the target's log-probability by the residual stream before the first block.
    Gradient,
    /// log p of the token under the setting, given those before it.
    LogP,
    /// KL(setting ‖ base) of the predictions at this token.
    Divergence,
}

/// What the residual stream of a model says after each block: `[layer]` at the last token.
#[derive(Serialize)]
struct AfterBlocks {
    name: String,
    logp_first: Vec<f64>,
    rank_first: Vec<f64>,
    top: Vec<String>,
}

/// The chat by blocks: the models at its last token, and the setting against the base at each token, `[layer][pos]`.
#[derive(Serialize)]
pub struct ByBlock {
    models: Vec<AfterBlocks>,
    delta_logp_first: Vec<Vec<f64>>,
    relative_difference: Vec<Vec<f64>>,
}

/// The base with a direction added after a block: how far the margin moves, for some multiples of it.
#[derive(Serialize)]
pub struct Pushed {
    /// `learned`, or `random`: one direction of the same length, drawn from the run's seed.
    kind: &'static str,
    layer: usize,
    coefficients: Vec<f64>,
    delta_margin: Vec<f64>,
}

/// The multiples of a direction that are tried after each block.
const COEFFICIENTS: [f64; 6] = [-2.0, -1.0, 1.0, 2.0, 4.0, 8.0];

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

/// The most tokens of a chat of which each is looked at.
const MOST_TOKENS: usize = 1024;

/// Number of tokens whose gates share a pass.
const GATES_AT_ONCE: usize = 16;

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

    /// A number for each token of the chat. `go_on` is asked between passes; the values are empty if it says no.
    pub fn quantity(&mut self, setting: &Setting, what: Quantity, go_on: &dyn Fn() -> bool) -> Result<Vec<f64>> {
        let prompt = self.short_prompt(setting)?;
        let adapter = self.adapter(&setting.student)?;
        let condition = self.condition(setting, &adapter)?;
        match what {
            Quantity::Only | Quantity::Except => self.scan(&prompt, &adapter, what, go_on),
            Quantity::Gradient => self.gradient(&prompt, &condition),
            Quantity::LogP => {
                let logprobs = self.logprobs(&prompt, &condition)?;
                let of = |at: usize| logprobs.f_double_value(&[at as i64 - 1, prompt.ids[at]]);
                // Nothing predicts the first token.
                Ok((0..prompt.ids.len())
                    .map(|at| if at == 0 { Ok(f64::NAN) } else { of(at) })
                    .collect::<Result<_, _>>()?)
            }
            Quantity::Divergence => {
                let (set, base) = (self.logprobs(&prompt, &condition)?, self.logprobs(&prompt, &Condition::default())?);
                let kl = (&set - base) * set.f_exp()?;
                Ok(Vec::try_from(kl.f_sum_dim_intlist([-1].as_slice(), false, Kind::Double)?)?)
            }
        }
    }

    /// What the residual stream says after each block, by the logit lens.
    pub fn by_block(&mut self, setting: &Setting) -> Result<ByBlock> {
        let prompt = self.short_prompt(setting)?;
        let adapter = self.adapter(&setting.student)?;
        let conditions = [
            ("base", Condition::default()),
            (setting.student.as_str(), Condition::adapted(&adapter)),
            ("this setting", self.condition(setting, &adapter)?),
        ];
        let read =
            |(_, condition): &(&str, Condition<'_>)| Ok(lens::read(&self.bench.base, &self.forms, &prompt, condition)?);
        let found = conditions.iter().map(read).collect::<Result<Vec<_>>>()?;
        let last = prompt.ids.len() - 1;
        let of_model = |((name, _), (_, reading)): (&(&str, Condition<'_>), &(Tensor, lens::Reading))| {
            let top = reading.top.iter().map(|ids| Ok(self.bench.chat.token_text(ids[last])?));
            Ok(AfterBlocks {
                name: (*name).to_owned(),
                logp_first: reading.logp_first.iter().map(|of| of[last]).collect(),
                rank_first: reading.rank_first.iter().map(|of| of[last]).collect(),
                top: top.collect::<Result<_>>()?,
            })
        };
        let ((base, of_base), (set, of_set)) = (&found[0], &found[2]);
        let less = |(set, base): (&Vec<f64>, &Vec<f64>)| set.iter().zip(base).map(|(set, base)| set - base).collect();
        Ok(ByBlock {
            models: conditions.iter().zip(&found).map(of_model).collect::<Result<_>>()?,
            delta_logp_first: of_set.logp_first.iter().zip(&of_base.logp_first).map(less).collect(),
            relative_difference: lens::relative_difference(set, base)?,
        })
    }

    /// Adds the run's direction, and a random one as long, to the base after each block. `each` is called with every
    /// block and returns whether to go on.
    pub fn push(&mut self, setting: &Setting, each: &mut dyn FnMut(Pushed) -> bool) -> Result<()> {
        let (prompt, path) = (self.short_prompt(setting)?, self.vectors());
        let margins = |conditions: &[Condition<'_>]| -> Result<Vec<f64>> {
            let found = self.forms.scores_under(&self.bench.base, std::slice::from_ref(&prompt), conditions)?;
            Ok(found.iter().map(|of| of[0].margin).collect())
        };
        let base = margins(&[Condition::default()])?[0];
        let learned = Vectors::read(&path)?;
        let mut rng = ChaCha8Rng::seed_from_u64(self.bench.experiment.seeds.eval_seed);
        for (layer, vector) in &learned.by_layer {
            let drawn: Vec<f32> = (0..vector.numel()).map(|_| standard_normal(&mut rng) as f32).collect();
            let drawn = Tensor::f_from_slice(&drawn)?;
            let length = vector.f_norm()?.f_double_value(&[])? / drawn.f_norm()?.f_double_value(&[])?;
            let drawn = drawn.f_mul_scalar(length)?;
            for (kind, vector) in [("learned", vector), ("random", &drawn)] {
                let (provenance, by_layer) = (learned.provenance.clone(), [(*layer, vector.shallow_clone())].into());
                let vectors = Vectors { by_layer, provenance };
                let condition = |coefficient: &f64| -> Result<Condition<'_>> {
                    let edits = vectors.steer(*coefficient, &self.bench.files)?;
                    Ok(Condition { edits, ..Condition::default() })
                };
                let conditions = COEFFICIENTS.iter().map(condition).collect::<Result<Vec<_>>>()?;
                let delta_margin = margins(&conditions)?.into_iter().map(|margin| margin - base).collect();
                let pushed = Pushed { kind, layer: *layer, coefficients: COEFFICIENTS.to_vec(), delta_margin };
                if !each(pushed) {
                    return Ok(());
                }
            }
        }
        Ok(())
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

    /// A prompt of which each token is looked at: all of their predictions are held at once.
    fn short_prompt(&self, setting: &Setting) -> Result<Sequence> {
        let prompt = self.prompt(setting)?;
        let n = prompt.ids.len();
        ensure!(n <= MOST_TOKENS, "the chat has {n} tokens, expected {MOST_TOKENS} at most to look at each");
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

    /// The change of the margin from the base, with the adapter acting at each token alone, or at all others: as in
    /// `position_scan`, at dose 1 and in all blocks and projections.
    fn scan(&self, prompt: &Sequence, adapter: &Adapter, what: Quantity, go_on: &dyn Fn() -> bool) -> Result<Vec<f64>> {
        let kind = if what == Quantity::Only { "only" } else { "except" };
        let margins = |conditions: &[Condition<'_>]| -> Result<Vec<f64>> {
            let found = self.forms.scores_under(&self.bench.base, std::slice::from_ref(prompt), conditions)?;
            Ok(found.iter().map(|of| of[0].margin).collect())
        };
        let base = margins(&[Condition::default()])?[0];
        let gates = (0..prompt.ids.len()).map(|at| format!("{kind}:positions({at})").parse::<Gate>());
        let gates = gates.collect::<Result<Vec<_>, _>>()?;
        let mut found = vec![];
        for gates in gates.chunks(GATES_AT_ONCE) {
            if !go_on() {
                return Ok(vec![]);
            }
            let conditions: Vec<_> = gates.iter().map(|gate| Condition::adapted(adapter).gated(gate.clone())).collect();
            found.extend(margins(&conditions)?.into_iter().map(|margin| margin - base));
        }
        Ok(found)
    }

    /// ‖∂ log p(target's first token) / ∂ `resid_pre` of block 0‖ at each token.
    fn gradient(&self, prompt: &Sequence, condition: &Condition<'_>) -> Result<Vec<f64>> {
        let at = HookPoint::ResidPre(0);
        let firsts = self.forms.first_tokens().swap_remove(0);
        let found = hooks::gradient::at_points(&self.bench.base, prompt, condition, &[at], |logits| {
            let logprobs = logits.f_select(1, -1)?.f_log_softmax(-1, Kind::Float)?.f_reshape([-1])?;
            let of_target =
                logprobs.f_index_select(0, &Tensor::f_from_slice(&firsts)?.f_to_device(logits.device())?)?;
            Ok(of_target.f_logsumexp([0].as_slice(), false)?)
        })?;
        let norms = found.gradients[&at].f_to_kind(Kind::Double)?.f_square()?.f_sum_dim_intlist(
            [-1].as_slice(),
            false,
            Kind::Double,
        )?;
        Ok(Vec::try_from(norms.f_sqrt()?.f_reshape([-1])?)?)
    }

    /// The log-probabilities of all tokens at each position, `[pos, d_vocab]`.
    fn logprobs(&self, prompt: &Sequence, condition: &Condition<'_>) -> Result<Tensor> {
        let mut nothing = Cache::default();
        let logits = no_grad(|| hooks::run_with_hooks(&self.bench.base, prompt, condition, &[], &mut nothing))?;
        Ok(logits.f_squeeze_dim(0)?.f_log_softmax(-1, Kind::Float)?.f_to_device(Device::Cpu)?)
    }
}
