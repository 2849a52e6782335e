//! The arithmetic that the mathematics needs, in FLOPs (a multiplication and an addition are two): what a scenario cannot be done
//! with less than. What rows begin with alike is counted once, padding never. Norms, rotations, softmaxes and the
//! optimizer are not counted: they are bound by memory, and some percent together.

use std::collections::BTreeMap;

use hooks::{Config, LoraConfig, Proj};

/// FLOPs, by the two rates at which a machine does them: the blocks' matrices are small, the unembedding is large.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Flops {
    /// In the blocks.
    pub(crate) body: f64,
    /// In the unembedding.
    pub(crate) head: f64,
}

/// Weights of the seven projections of a block.
fn block_weights(model: &Config) -> i64 {
    Proj::ALL.iter().map(|proj| weights(*proj, model)).sum()
}

fn weights(proj: Proj, model: &Config) -> i64 {
    let (d_in, d_out) = proj.widths(model);
    d_in * d_out
}

/// Tokens of some rows run as a trie: for each token that must be run, how many tokens it sees, itself included.
pub(crate) fn trie<'a>(rows: impl IntoIterator<Item = &'a [i64]>) -> Vec<usize> {
    let (mut children, mut seen): (BTreeMap<(usize, i64), usize>, Vec<usize>) = (BTreeMap::new(), vec![]);
    for row in rows {
        let mut node = 0; // the root; the others count from 1
        for (before, id) in row.iter().enumerate() {
            let next = seen.len() + 1;
            node = *children.entry((node, *id)).or_insert(next);
            if node == next {
                seen.push(before + 1);
            }
        }
    }
    seen
}

/// A forward pass: 2 per weight and token, and in attention 4 per head, its width and each token seen (scores, and their
/// product with the values). `n_unembedded` tokens are unembedded.
pub(crate) fn forward(model: &Config, seen: &[usize], n_unembedded: usize) -> Flops {
    let linear = 2 * block_weights(model) * seen.len() as i64;
    let attention = 4 * model.n_heads * model.d_head * seen.iter().sum::<usize>() as i64;
    Flops { body: (model.n_layers as i64 * (linear + attention)) as f64, head: head(model, n_unembedded) }
}

fn head(model: &Config, n: usize) -> f64 {
    (2 * model.d_vocab * model.d_model * n as i64) as f64
}

/// A step of a LoRA: the forward pass, and the gradients of activations and adapter. Nothing is needed of the gradient below
/// the first adapted projection's input.
pub(crate) fn lora_step(model: &Config, lora: &LoraConfig, seen: &[usize], n_targets: usize) -> Flops {
    let forward = forward(model, seen, n_targets);
    let tokens = seen.len() as i64;
    let is_adapted = |layer: usize, proj: Proj| {
        lora.layers.as_ref().is_none_or(|layers| layers.contains(&layer)) && lora.target_modules.contains(&proj)
    };
    let mut more = 0;
    let mut first: Option<(usize, u8)> = None; // the place of the first adapted projection
    for layer in 0..model.n_layers {
        for proj in Proj::ALL {
            // Whether its input depends on the adapter, so that a gradient must go through it.
            let goes_on = first.is_some_and(|first| first < (layer, stage(proj)));
            if goes_on {
                more += 2 * weights(proj, model) * tokens; // dX = dY W
            }
            if is_adapted(layer, proj) {
                let (d_in, d_out) = proj.widths(model);
                // A x, dA = dzᵀ x; B z, dz = dy B, dB = dyᵀ z; and where the gradient goes on, dx = dz A
                more += 2 * lora.rank * tokens * (2 * d_in + 3 * d_out + if goes_on { d_in } else { 0 });
                first = first.or(Some((layer, stage(proj))));
            }
        }
        if first.is_some_and(|first| first <= (layer, stage(Proj::Q))) {
            more += 8 * model.n_heads * model.d_head * seen.iter().sum::<usize>() as i64; // 4 forward, 8 backward
        }
    }
    Flops { body: forward.body + more as f64, head: 2.0 * forward.head }
}

/// What depends on what in a block: a projection of a later stage reads what one of an earlier stage wrote.
fn stage(proj: Proj) -> u8 {
    match proj {
        Proj::Q | Proj::K | Proj::V => 0,
        Proj::O => 1,
        Proj::Gate | Proj::Up => 2,
        Proj::Down => 3,
    }
}

/// Answers: the prompts as a trie, then each answer's tokens one by one. Every token that is drawn is unembedded once, the
/// last of an answer is not run. `answers`: a prompt's tokens and how many were drawn for it.
pub(crate) fn answers(model: &Config, answers: &[(&[i64], usize)]) -> (Flops, Flops) {
    let prompts = forward(model, &trie(answers.iter().map(|(prompt, _)| *prompt)), 0);
    let drawn: usize = answers.iter().map(|(_, drawn)| drawn).sum();
    let seen: Vec<usize> = answers.iter().flat_map(|(prompt, drawn)| (1..*drawn).map(|at| prompt.len() + at)).collect();
    (prompts, forward(model, &seen, drawn))
}

#[cfg(test)]
#[allow(clippy::float_cmp, reason = "whole numbers below 2^53")]
mod tests {
    use hooks::Family;

    use super::*;

    /// Two blocks of q 4×4, k and v 4×2, o 4×4, and three of 4×8: 144 weights each.
    fn model() -> Config {
        Config {
            family: Family::Qwen2,
            d_model: 4,
            n_layers: 2,
            n_heads: 2,
            n_kv_heads: 1,
            d_head: 2,
            d_mlp: 8,
            d_vocab: 16,
            n_ctx: 64,
            rope_theta: 1e4,
            rms_norm_eps: 1e-6,
            tie_embeddings: true,
            qkv_bias: true,
            qk_norm: false,
        }
    }

    #[test]
    fn what_rows_begin_with_is_counted_once() {
        let rows: [&[i64]; 3] = [&[1, 2, 3], &[1, 2, 4, 5], &[2, 2]];
        assert_eq!(trie(rows), [1, 2, 3, 3, 4, 1, 2]);
    }

    #[test]
    fn a_forward_pass_by_hand() {
        // three tokens that see 1, 2 and 3: 2 blocks × (2 × 144 × 3 + 4 × 2 × 2 × 6) = 2 × (864 + 96); two unembedded: 2 × 16 × 4 × 2
        assert_eq!(forward(&model(), &[1, 2, 3], 2), Flops { body: 1920.0, head: 256.0 });
    }

    #[test]
    fn a_lora_step_by_hand() {
        // dX: 2 × 144 × 3 in each of two blocks, without q, k, v of the first: 1728 − 2 × 32 × 3 = 1536
        // attention: 2 × 8 × 2 × 2 × 6 = 384
        // pairs of rank 2: widths in and out sum to 8 + 6 + 6 + 8 + 12 + 12 + 12 = 64 a block, so 2 × 6 × 2 × 64 × 3 = 4608, without
        // dz A of q, k, v of the first: 2 × 2 × 12 × 3 = 144
        let lora = LoraConfig { rank: 2, ..LoraConfig::default() };
        let expected = Flops { body: 1920.0 + 1536.0 + 384.0 + 4608.0 - 144.0, head: 512.0 };
        assert_eq!(lora_step(&model(), &lora, &[1, 2, 3], 2), expected);
    }

    #[test]
    fn a_lora_in_the_last_place_needs_no_gradient_but_its_own() {
        // down alone, in the last block, rank 1: 2 × (2 × 8 + 3 × 4) × 3 = 168, and no dX
        let lora =
            LoraConfig { rank: 1, target_modules: vec![Proj::Down], layers: Some(vec![1]), ..LoraConfig::default() };
        assert_eq!(lora_step(&model(), &lora, &[1, 2, 3], 2).body, 1920.0 + 168.0);
    }

    #[test]
    fn answers_by_hand() {
        // prompts of 3 and 3 tokens that share 2; 3 and 1 tokens drawn, of which 2 and 0 are run, seeing 4 and 5
        let (prompts, drawn) = answers(&model(), &[(&[1, 2, 3], 3), (&[1, 2, 4], 1)]);
        assert_eq!(prompts, Flops { body: 2.0 * (288.0 * 4.0 + 16.0 * 9.0), head: 0.0 });
        assert_eq!(drawn, Flops { body: 2.0 * (288.0 * 2.0 + 16.0 * 9.0), head: 4.0 * 128.0 });
    }
}
