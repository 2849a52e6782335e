//! The model: dense Qwen2, Qwen2.5 and Qwen3. In order: attention, MLP, block, the whole model.
//!
//! It is never mutated. What differs between two experiments (adapter, gate, taps, past positions) is in the `Pass`.
//! Attention uses libtorch's fused kernel, except in a block whose scores or pattern are tapped.

use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::hook_point::HookPoint as P;
use crate::load::model_files::ModelFiles;
use crate::load::weights::{Scope, Weights};
use crate::model::layers::{Linear, RmsNorm, Rope};
use crate::model::pass::Pass;
use crate::ops::{embedding, fused_attention, logits, wide};
use crate::profile::{self, Op, Stage};
use crate::proj::Proj;
use crate::rows::batch::Batch;
use crate::rows::kv_cache::Placement;
use crate::taps::tap::Hooks;

mod kept;
mod lora_backward;

pub use lora_backward::Linearized;

/// The positions of a pass's tokens: their rotations, and the slots that each attends to.
struct Layout<'a> {
    rope: Rope,
    placement: Placement<'a>,
}

/// Grouped-query attention (Ainslie et al. 2023) with rotary positions; Qwen3 also norms queries and keys per head.
#[derive(Debug)]
struct Attention {
    layer: usize,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    n_heads: i64,
    n_kv_heads: i64,
    d_head: i64,
}

impl Attention {
    fn load(block: &Scope<'_>, layer: usize, config: &Config) -> Result<Self> {
        let linear = |proj, bias| Linear::load(block, layer, proj, bias, config);
        let norm = |name: &str| RmsNorm::load(&block.at("self_attn").at(name), config.d_head, config.rms_norm_eps);
        let (q_norm, k_norm) =
            if config.qk_norm { (Some(norm("q_norm")?), Some(norm("k_norm")?)) } else { (None, None) };
        Ok(Self {
            layer,
            q: linear(Proj::Q, config.qkv_bias)?,
            k: linear(Proj::K, config.qkv_bias)?,
            v: linear(Proj::V, config.qkv_bias)?,
            o: linear(Proj::O, false)?,
            q_norm,
            k_norm,
            n_heads: config.n_heads,
            n_kv_heads: config.n_kv_heads,
            d_head: config.d_head,
        })
    }

    /// `x` and the result: `[batch, pos, d_model]`.
    fn forward(&self, x: &Tensor, layout: &Layout<'_>, pass: &mut Pass<'_>) -> Result<Tensor> {
        let q = self.queries(x, &layout.rope, pass)?;
        let (k, v) = self.keys_and_values(x, layout, pass)?;
        let z = self.attend([&q, &k, &v], &layout.placement, &mut pass.hooks)?;
        let z = pass.hooks.run(P::Z(self.layer), z)?; // [batch, pos, n_heads, d_head]
        if pass.hooks.any_at(P::Result(self.layer)) {
            return self.result(&z, pass);
        }
        self.o.forward(&z.f_flatten(2, 3)?, pass)
    }

    /// Attention at some places of `x`, `[1, places, d_model]`. Keys and values are computed for all tokens, everything
    /// else only at the places.
    fn forward_at(&self, x: &Tensor, layout: &Layout<'_>, places: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let (k, v) = self.keys_and_values(x, layout, pass)?;
        let mut here = pass.at(places)?;
        let q = self.queries(&at(x, places)?, &layout.rope.at_places(places)?, &mut here)?;
        let z = self.attend_at([&q, &k, &v], &layout.placement, places)?;
        self.o.forward(&z, &mut here)
    }

    /// The rotated queries of `x`, `[batch, pos, d_model]`, as `[batch, pos, n_heads, d_head]`.
    fn queries(&self, x: &Tensor, rope: &Rope, pass: &mut Pass<'_>) -> Result<Tensor> {
        let l = self.layer;
        let q = self.heads(&self.q, self.n_heads, x, pass)?;
        let mut q = pass.hooks.run(P::Q(l), q)?;
        if let Some(norm) = &self.q_norm {
            q = pass.hooks.run(P::QNormed(l), norm.forward(&q)?)?;
        }
        pass.hooks.run(P::RotQ(l), rope.rotate(&q)?)
    }

    /// All keys and values to attend to, `[batch, slots, n_kv_heads, d_head]`: those of `x` and, with a cache, of the
    /// past.
    fn keys_and_values(&self, x: &Tensor, layout: &Layout<'_>, pass: &mut Pass<'_>) -> Result<(Tensor, Tensor)> {
        let l = self.layer;
        let (k, v) = (self.heads(&self.k, self.n_kv_heads, x, pass)?, self.heads(&self.v, self.n_kv_heads, x, pass)?);
        let (mut k, v) = (pass.hooks.run(P::K(l), k)?, pass.hooks.run(P::V(l), v)?);
        if let Some(norm) = &self.k_norm {
            k = pass.hooks.run(P::KNormed(l), norm.forward(&k)?)?;
        }
        let k = pass.hooks.run(P::RotK(l), layout.rope.rotate(&k)?)?;
        match pass.kv_cache.as_deref_mut() {
            Some(cache) => cache.extend(l, &k, &v, layout.placement.packing.is_some()),
            None => Ok((k, v)),
        }
    }

    fn heads(&self, linear: &Linear, n: i64, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let (batch, pos, _) = x.size3()?;
        Ok(linear.forward(x, pass)?.f_view([batch, pos, n, self.d_head])?)
    }

    /// Attention over all slots. `q`: `[batch, pos, n_heads, d_head]`, as the result, `k` and `v`: `[batch, slots,
    /// n_kv_heads, d_head]`.
    fn attend(&self, [q, k, v]: [&Tensor; 3], placement: &Placement<'_>, hooks: &mut Hooks<'_>) -> Result<Tensor> {
        if let Some(packing) = placement.packing {
            return packing.attend(q, k, v);
        }
        let (q, k, v) = (q.f_transpose(1, 2)?, k.f_transpose(1, 2)?, v.f_transpose(1, 2)?);
        let open = hooks.any_at(P::AttnScores(self.layer)) || hooks.any_at(P::Pattern(self.layer));
        let z = if open {
            let span = profile::op(Op::Attention);
            let z = self.attend_open([&q, &k, &v], placement, hooks)?;
            span.flops(|| profile::attention(&q, &k, placement.mask.is_none() && placement.causal, z.requires_grad()))?;
            z
        } else {
            fused_attention([&q, &k, &v], placement.mask.as_ref(), placement.mask.is_none() && placement.causal, None)?
        };
        Ok(z.f_transpose(1, 2)?)
    }

    /// Attention for the queries at some places, `[1, places, n_heads, d_head]`; the result is `[1, places, n_heads ·
    /// d_head]`.
    fn attend_at(&self, [q, k, v]: [&Tensor; 3], placement: &Placement<'_>, places: &Tensor) -> Result<Tensor> {
        // The queries of all other tokens are zeros. Attention for them is only a hundredth of the arithmetic.
        let q = q.f_flatten(2, 3)?.f_squeeze_dim(0)?;
        let (batch, pos) = placement.positions.size2()?;
        let all = q.f_new_zeros([batch * pos, q.size()[1]], (q.kind(), q.device()))?;
        let all = all.f_index_copy(0, places, &q)?.f_view([batch, pos, self.n_heads, self.d_head])?;
        let z = self.attend([&all, k, v], placement, &mut Hooks::default())?;
        at(&z.f_flatten(2, 3)?, places)
    }

    /// Attention that computes scores and pattern, `[batch, n_heads, query, key]`, for their taps; the result is `z` by
    /// heads.
    fn attend_open(&self, [q, k, v]: [&Tensor; 3], placement: &Placement<'_>, hooks: &mut Hooks<'_>) -> Result<Tensor> {
        let group = self.n_heads / self.n_kv_heads;
        let (k, v) = (k.f_repeat_interleave_self_int(group, 1, None)?, v.f_repeat_interleave_self_int(group, 1, None)?);
        let scores = q.f_matmul(&k.f_transpose(2, 3)?)?.f_div_scalar((self.d_head as f64).sqrt())?;
        let allowed = match &placement.mask {
            Some(mask) => mask.shallow_clone(),
            None if placement.causal => scores.f_ones_like()?.f_to_kind(Kind::Bool)?.f_tril(0)?,
            None => scores.f_ones_like()?.f_to_kind(Kind::Bool)?,
        };
        let scores = scores.f_masked_fill(&allowed.f_logical_not()?, f64::NEG_INFINITY)?;
        let scores = hooks.run(P::AttnScores(self.layer), scores)?;
        let pattern = scores.f_softmax(-1, wide(scores.kind()))?.f_to_kind(q.kind())?;
        Ok(hooks.run(P::Pattern(self.layer), pattern)?.f_matmul(&v)?)
    }

    /// The output as a sum over heads, with a tap on each head's part, `[batch, pos, n_heads, d_model]`.
    fn result(&self, z: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let parts = self.o.forward_by_head(z, pass)?;
        let result = pass.hooks.run(P::Result(self.layer), parts)?;
        Ok(result.f_sum_dim_intlist(2, false, result.kind())?)
    }
}

/// The gated MLP (Shazeer 2020): down(silu(gate(x)) ⊙ up(x)).
#[derive(Debug)]
struct Mlp {
    layer: usize,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Mlp {
    fn load(block: &Scope<'_>, layer: usize, config: &Config) -> Result<Self> {
        let linear = |proj| Linear::load(block, layer, proj, false, config);
        Ok(Self { layer, gate: linear(Proj::Gate)?, up: linear(Proj::Up)?, down: linear(Proj::Down)? })
    }

    /// `x` and the result: `[batch, pos, d_model]`.
    fn forward(&self, x: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let l = self.layer;
        let pre = self.gate.forward(x, pass)?;
        let pre = pass.hooks.run(P::MlpPre(l), pre)?; // [batch, pos, d_mlp]
        let linear = self.up.forward(x, pass)?;
        let linear = pass.hooks.run(P::MlpPreLinear(l), linear)?;
        let post = pass.hooks.run(P::MlpPost(l), pre.f_silu()?.f_mul(&linear)?)?;
        self.down.forward(&post, pass)
    }
}

/// One block: attention and MLP, each normed first and added to the residual stream.
#[derive(Debug)]
struct Block {
    layer: usize,
    ln1: RmsNorm,
    attention: Attention,
    ln2: RmsNorm,
    mlp: Mlp,
}

impl Block {
    fn load(scope: &Scope<'_>, layer: usize, config: &Config) -> Result<Self> {
        let norm = |name: &str| RmsNorm::load(&scope.at(name), config.d_model, config.rms_norm_eps);
        Ok(Self {
            layer,
            ln1: norm("input_layernorm")?,
            attention: Attention::load(scope, layer, config)?,
            ln2: norm("post_attention_layernorm")?,
            mlp: Mlp::load(scope, layer, config)?,
        })
    }

    /// `resid_pre` and the result: `[batch, pos, d_model]`.
    fn forward(&self, resid_pre: Tensor, layout: &Layout<'_>, pass: &mut Pass<'_>) -> Result<Tensor> {
        let l = self.layer;
        let resid_pre = pass.hooks.run(P::ResidPre(l), resid_pre)?;

        let normed = self.ln1.hooked(&resid_pre, &mut pass.hooks, [P::Ln1Scale(l), P::Ln1Normalized(l)])?;
        let attn_out = self.attention.forward(&normed, layout, pass)?;
        let attn_out = pass.hooks.run(P::AttnOut(l), attn_out)?;
        let resid_mid = pass.hooks.run(P::ResidMid(l), resid_pre.f_add(&attn_out)?)?;

        let normed = self.ln2.hooked(&resid_mid, &mut pass.hooks, [P::Ln2Scale(l), P::Ln2Normalized(l)])?;
        let mlp_out = self.mlp.forward(&normed, pass)?;
        let mlp_out = pass.hooks.run(P::MlpOut(l), mlp_out)?;
        pass.hooks.run(P::ResidPost(l), resid_mid.f_add(&mlp_out)?)
    }

    /// The block without taps, at some places, `[1, places, d_model]`. `resid`: `resid_pre` at all tokens.
    fn forward_at(&self, resid: &Tensor, layout: &Layout<'_>, places: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let normed = self.ln1.forward(resid)?;
        let attn_out = self.attention.forward_at(&normed, layout, places, pass)?;
        let resid_mid = at(resid, places)?.f_add(&attn_out)?;
        let mlp_out = self.mlp.forward(&self.ln2.forward(&resid_mid)?, &mut pass.at(places)?)?;
        Ok(resid_mid.f_add(&mlp_out)?)
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let norms = [("input_layernorm", Some(&self.ln1)), ("post_attention_layernorm", Some(&self.ln2))];
        let head_norms = [
            ("self_attn.q_norm", self.attention.q_norm.as_ref()),
            ("self_attn.k_norm", self.attention.k_norm.as_ref()),
        ];
        let norms = norms.into_iter().chain(head_norms);
        let norms = norms.filter_map(|(name, norm)| Some((format!("{name}.weight"), norm?.weight.shallow_clone())));
        let (attention, mlp) = (&self.attention, &self.mlp);
        let linears = [&attention.q, &attention.k, &attention.v, &attention.o, &mlp.gate, &mlp.up, &mlp.down];
        norms.chain(linears.into_iter().flat_map(Linear::parameters)).collect()
    }
}

fn stage_of(batch: &Batch, pass: &Pass<'_>) -> Stage {
    if pass.kv_cache.is_some() && batch.width() == 1 { Stage::Decode } else { Stage::Forward }
}

/// `[batch, pos, width]` at some places of the flattened `[batch · pos]`, `[1, places, width]`.
fn at(x: &Tensor, places: &Tensor) -> Result<Tensor> {
    Ok(embedding(&x.f_flatten(0, 1)?, places)?.f_unsqueeze(0)?)
}

/// One Qwen. `Send`, but not `Sync`: one thread owns it, and libtorch spreads the work.
#[derive(Debug)]
pub struct Qwen {
    /// Its sizes and switches.
    pub config: Config,
    embed: Tensor, // [d_vocab, d_model]
    blocks: Vec<Block>,
    ln_final: RmsNorm,
    unembed: Tensor, // [d_vocab, d_model]; the embedding itself if they are tied
}

impl Qwen {
    /// Loads the weights as `kind` onto `device`.
    pub fn load(files: &ModelFiles, device: Device, kind: Kind) -> Result<Self> {
        profile::model(device, kind);
        let _stage = profile::stage(Stage::Load);
        Self::of_weights(&files.config, &files.weights, device, kind)
    }

    pub(super) fn of_weights(config: &Config, weights: &Weights, device: Device, kind: Kind) -> Result<Self> {
        let config = config.clone();
        let root = weights.root(kind, device);
        let model = root.at("model");
        let (embed_tokens, lm_head) = (model.at("embed_tokens"), root.at("lm_head"));
        // If embedding and head are tied, the one tensor may be stored under the head's name alone.
        let is_head = config.tie_embeddings && !embed_tokens.has("weight") && lm_head.has("weight");
        let stored = if is_head { &lm_head } else { &embed_tokens };
        let shape = [config.d_vocab, config.d_model];
        let embed = stored.get("weight", &shape)?;
        let block = |layer: usize| Block::load(&model.at("layers").at(layer), layer, &config);
        let blocks = (0..config.n_layers).map(block).collect::<Result<Vec<_>>>()?;
        let ln_final = RmsNorm::load(&model.at("norm"), config.d_model, config.rms_norm_eps)?;
        let unembed = if config.tie_embeddings { embed.shallow_clone() } else { lm_head.get("weight", &shape)? };
        Ok(Self { config, embed, blocks, ln_final, unembed })
    }

    /// The logits of every position, `[batch, pos, d_vocab]`.
    pub fn forward(&self, batch: &Batch, pass: &mut Pass<'_>) -> Result<Tensor> {
        let resid = self.run_blocks(&self.blocks, batch, pass)?;
        let normed = self.ln_final.hooked(&resid, &mut pass.hooks, [P::LnFinalScale, P::LnFinalNormalized])?;
        let logits = pass.hooks.run(P::Logits, self.logits(&normed)?)?;
        pass.hooks.check_fired()?;
        Ok(logits)
    }

    /// The residual stream after the last block, `[batch, pos, d_model]`, from which [`Self::unembed`] gives logits.
    pub fn resid_final(&self, batch: &Batch, pass: &mut Pass<'_>) -> Result<Tensor> {
        self.resid_before(self.config.n_layers, batch, pass)
    }

    /// The residual stream before a block, `[batch, pos, d_model]`; this block and those after it are not run. As with
    /// TransformerLens' `stop_at_layer`, 0 gives the embeddings and `n_layers` the result of `resid_final`. A tap that
    /// is not reached is an error.
    pub fn resid_before(&self, stop_at_layer: usize, batch: &Batch, pass: &mut Pass<'_>) -> Result<Tensor> {
        let n_layers = self.config.n_layers;
        if stop_at_layer > n_layers {
            let expected = format!("0 to {n_layers}, the model's number of blocks");
            return Err(Error::invalid("stop_at_layer", expected, stop_at_layer));
        }
        let resid = self.run_blocks(&self.blocks[..stop_at_layer], batch, pass)?;
        pass.hooks.check_fired()?;
        Ok(resid)
    }

    /// The residual stream after the last block at some tokens, `[places, d_model]`. In a packed batch without a tap in
    /// or after the last block, that block computes only keys and values for the other tokens. `places`: distinct
    /// places in the flattened `[batch · pos]`, `[places]`, i64; if a stack's students do not have equally many, the
    /// last block computes everything.
    pub fn resid_at(&self, batch: &Batch, places: &Tensor, pass: &mut Pass<'_>) -> Result<Tensor> {
        let behind = self.config.n_layers.saturating_sub(1);
        let is_tapped = pass.hooks.any(|at| at != P::Embed && at.layer().is_none_or(|layer| layer >= behind));
        let whole = is_tapped
            || batch.packing.is_none()
            || !pass.adapter.map_or(Ok(true), |adapter| adapter.shares(places, batch.ids.numel() as i64))?;
        let Some((last, blocks)) = self.blocks.split_last().filter(|_| !whole) else {
            return Ok(at(&self.resid_final(batch, pass)?, places)?.f_squeeze_dim(0)?);
        };
        let _stage = profile::stage(stage_of(batch, pass));
        let (mut resid, layout) = self.begin(batch, pass)?;
        for block in blocks {
            resid = block.forward(resid, &layout, pass)?;
        }
        let resid = last.forward_at(&resid, &layout, places, pass)?.f_squeeze_dim(0)?;
        pass.hooks.check_fired()?;
        Ok(resid)
    }

    fn run_blocks(&self, blocks: &[Block], batch: &Batch, pass: &mut Pass<'_>) -> Result<Tensor> {
        let _stage = profile::stage(stage_of(batch, pass));
        let (mut resid, layout) = self.begin(batch, pass)?;
        for block in blocks {
            resid = block.forward(resid, &layout, pass)?;
        }
        Ok(resid)
    }

    /// The embeddings, `[batch, pos, d_model]`, and the tokens' positions.
    fn begin<'b>(&self, batch: &'b Batch, pass: &mut Pass<'_>) -> Result<(Tensor, Layout<'b>)> {
        if let Some(adapter) = pass.adapter {
            adapter.check_rows(batch.ids.size2()?.0)?;
        }
        let placement = match (pass.kv_cache.as_deref_mut(), &batch.packing) {
            (Some(cache), _) => cache.place(batch)?,
            (None, Some(packing)) => Placement::packed(packing),
            (None, None) => {
                let positions = Tensor::f_arange(batch.width() as i64, (Kind::Int64, self.device()))?.f_unsqueeze(0)?;
                Placement { positions, mask: None, causal: true, packing: None }
            }
        };
        let lengths = pass.kv_cache.as_deref().map_or_else(
            || batch.lengths.clone(),
            |cache| cache.lengths().iter().map(|length| *length as usize).collect(),
        );
        self.config.check_context("row", lengths, 0)?;
        pass.hooks.place(&placement.positions)?;
        let kind = self.activation_kind();
        let rope = Rope::at(&placement.positions, &self.config, kind)?;
        let embedded = Tensor::f_embedding(&self.embed, &batch.ids, -1, false, false)?.f_to_kind(kind)?;
        Ok((pass.hooks.run(P::Embed, embedded)?, Layout { rope, placement }))
    }

    /// Final norm and unembedding: the logit lens. `resid`: `[.., d_model]`, the result is `[.., d_vocab]`.
    pub fn unembed(&self, resid: &Tensor) -> Result<Tensor> {
        self.logits(&self.final_norm(resid)?)
    }

    /// The norm before the unembedding; `resid` and the result are `[.., d_model]`.
    pub(crate) fn final_norm(&self, resid: &Tensor) -> Result<Tensor> {
        self.ln_final.forward(resid)
    }

    /// The unembedding alone; `normed`: `[.., d_model]`, the result is `[.., d_vocab]`.
    pub(crate) fn logits(&self, normed: &Tensor) -> Result<Tensor> {
        let span = profile::op(Op::Head);
        let logits = logits(normed, &self.unembed)?;
        span.flops(|| profile::product(normed, &self.unembed, logits.requires_grad()))?;
        Ok(logits)
    }

    /// The unembedding's weight, `[d_vocab, d_model]`.
    pub(crate) fn head(&self) -> &Tensor {
        &self.unembed
    }

    /// The unembedding's rows of some tokens, `[n, d_model]`.
    pub fn unembedding(&self, ids: &[i64]) -> Result<Tensor> {
        Ok(self.unembed.f_index_select(0, &Tensor::f_from_slice(ids)?.f_to_device(self.device())?)?)
    }

    /// The device that the weights are on.
    pub fn device(&self) -> Device {
        self.embed.device()
    }

    /// The precision of the weights.
    pub fn kind(&self) -> Kind {
        self.embed.kind()
    }

    /// The precision of the activations and logits. On a CPU it is f32 or wider for any weights: only the inputs of a
    /// product with weights in bf16 are rounded.
    pub fn activation_kind(&self) -> Kind {
        if self.device() == Device::Cpu { wide(self.kind()) } else { self.kind() }
    }

    /// Every weight under its Hugging Face name. They share storage with the model.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut named = vec![("model.embed_tokens.weight".to_owned(), self.embed.shallow_clone())];
        for block in &self.blocks {
            let stem = format!("model.layers.{}", block.layer);
            named.extend(block.parameters().into_iter().map(|(name, tensor)| (format!("{stem}.{name}"), tensor)));
        }
        named.push(("model.norm.weight".to_owned(), self.ln_final.weight.shallow_clone()));
        if !self.config.tie_embeddings {
            named.push(("lm_head.weight".to_owned(), self.unembed.shallow_clone()));
        }
        named
    }
}
