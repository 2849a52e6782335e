//! What happens inside the chat: a number for each token, the residual stream after each block, and the direction added
//! after each block.

use analyses::lens;
use anyhow::{Result, ensure};
use hooks::tch::{Device, Kind, Tensor, no_grad};
use hooks::{Adapter, Cache, Condition, Gate, HookPoint, Sequence, standard_normal};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::Models;
use crate::look::setting::Setting;
use crate::output::vectors::Vectors;

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

/// The most tokens of a chat of which each is looked at.
const MOST_TOKENS: usize = 1024;

/// Number of tokens whose gates share a pass.
const GATES_AT_ONCE: usize = 16;

impl Models {
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

    /// A prompt of which each token is looked at: all of their predictions are held at once.
    fn short_prompt(&self, setting: &Setting) -> Result<Sequence> {
        let prompt = self.prompt(setting)?;
        let n = prompt.ids.len();
        ensure!(n <= MOST_TOKENS, "the chat has {n} tokens, expected {MOST_TOKENS} at most to look at each");
        Ok(prompt)
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
