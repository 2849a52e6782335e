//! The places where an activation can be seen or replaced, in TransformerLens' spelling and shapes.

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, Result};

/// A place in the forward pass where an activation can be seen or replaced. The number is the block's, from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HookPoint {
    /// Token embeddings, `[batch, pos, d_model]`.
    Embed,
    /// The residual stream before the block, `[batch, pos, d_model]`.
    ResidPre(usize),
    /// Root mean square that the block's first norm divides by, `[batch, pos, 1]`.
    Ln1Scale(usize),
    /// The block's first norm before its weight, `[batch, pos, d_model]`.
    Ln1Normalized(usize),
    /// Queries as projected, before norm and rotation, `[batch, pos, n_heads, d_head]`.
    Q(usize),
    /// Keys as projected, `[batch, pos, n_kv_heads, d_head]`.
    K(usize),
    /// Values, `[batch, pos, n_kv_heads, d_head]`.
    V(usize),
    /// Queries after their norm and before rotation (Qwen3), shaped as `Q`.
    QNormed(usize),
    /// Keys after their norm and before rotation (Qwen3), shaped as `K`.
    KNormed(usize),
    /// Queries after rotation, shaped as `Q`.
    RotQ(usize),
    /// Keys after rotation, shaped as `K`.
    RotK(usize),
    /// Attention scores after scaling and masking, `[batch, n_heads, query, key]`.
    AttnScores(usize),
    /// Attention probabilities, `[batch, n_heads, query, key]`.
    Pattern(usize),
    /// Values mixed by the pattern, `[batch, pos, n_heads, d_head]`.
    Z(usize),
    /// Each head's own contribution to the attention output, `[batch, pos, n_heads, d_model]`; large.
    Result(usize),
    /// What attention adds to the residual stream, `[batch, pos, d_model]`.
    AttnOut(usize),
    /// The residual stream between attention and MLP, `[batch, pos, d_model]`.
    ResidMid(usize),
    /// Root mean square that the block's second norm divides by, `[batch, pos, 1]`.
    Ln2Scale(usize),
    /// The block's second norm before its weight, `[batch, pos, d_model]`.
    Ln2Normalized(usize),
    /// The MLP's gate before its activation, `[batch, pos, d_mlp]`.
    MlpPre(usize),
    /// The MLP's linear branch, `[batch, pos, d_mlp]`.
    MlpPreLinear(usize),
    /// The gated product, `[batch, pos, d_mlp]`.
    MlpPost(usize),
    /// What the MLP adds to the residual stream, `[batch, pos, d_model]`.
    MlpOut(usize),
    /// The residual stream after the block, `[batch, pos, d_model]`.
    ResidPost(usize),
    /// Root mean square that the final norm divides by, `[batch, pos, 1]`.
    LnFinalScale,
    /// The final norm before its weight, `[batch, pos, d_model]`.
    LnFinalNormalized,
    /// The model's output, `[batch, pos, d_vocab]`.
    Logits,
}

use HookPoint as P;

/// The points outside of blocks, with their names.
const GLOBAL: [(&str, HookPoint); 4] = [
    ("hook_embed", P::Embed),
    ("ln_final.hook_scale", P::LnFinalScale),
    ("ln_final.hook_normalized", P::LnFinalNormalized),
    ("logits", P::Logits),
];

type OfLayer = fn(usize) -> HookPoint;

/// The points of a block in the order of the computation, with their names after `blocks.{layer}.`.
const PER_LAYER: [(&str, OfLayer); 23] = [
    ("hook_resid_pre", P::ResidPre),
    ("ln1.hook_scale", P::Ln1Scale),
    ("ln1.hook_normalized", P::Ln1Normalized),
    ("attn.hook_q", P::Q),
    ("attn.hook_k", P::K),
    ("attn.hook_v", P::V),
    ("attn.hook_q_normed", P::QNormed),
    ("attn.hook_k_normed", P::KNormed),
    ("attn.hook_rot_q", P::RotQ),
    ("attn.hook_rot_k", P::RotK),
    ("attn.hook_attn_scores", P::AttnScores),
    ("attn.hook_pattern", P::Pattern),
    ("attn.hook_z", P::Z),
    ("attn.hook_result", P::Result),
    ("hook_attn_out", P::AttnOut),
    ("hook_resid_mid", P::ResidMid),
    ("ln2.hook_scale", P::Ln2Scale),
    ("ln2.hook_normalized", P::Ln2Normalized),
    ("mlp.hook_pre", P::MlpPre),
    ("mlp.hook_pre_linear", P::MlpPreLinear),
    ("mlp.hook_post", P::MlpPost),
    ("hook_mlp_out", P::MlpOut),
    ("hook_resid_post", P::ResidPost),
];

impl HookPoint {
    /// Every hook point of a model with `n_layers` blocks, the opt-in `hook_result` and Qwen3's norms included.
    pub fn all(n_layers: usize) -> Vec<Self> {
        let blocks = (0..n_layers).flat_map(|layer| PER_LAYER.iter().map(move |(_, point)| point(layer)));
        [P::Embed].into_iter().chain(blocks).chain([P::LnFinalScale, P::LnFinalNormalized, P::Logits]).collect()
    }

    /// The points that a name means in a model with `n_layers` blocks; `*` in place of the layer means every block.
    pub fn select(pattern: &str, n_layers: usize) -> Result<Vec<Self>> {
        if let Some(suffix) = pattern.strip_prefix("blocks.*.") {
            return (0..n_layers).map(|layer| format!("blocks.{layer}.{suffix}").parse()).collect();
        }
        let point: Self = pattern.parse()?;
        match point.layer() {
            Some(layer) if layer >= n_layers => Err(Error::Invalid {
                what: format!("the layer of hook point {pattern}"),
                expected: format!("0 to {}", n_layers.saturating_sub(1)),
                found: layer.to_string(),
            }),
            _ => Ok(vec![point]),
        }
    }

    /// The block that the point is in, if it is in one.
    pub fn layer(self) -> Option<usize> {
        let name = self.to_string();
        name.strip_prefix("blocks.")?.split('.').next()?.parse().ok()
    }
}

impl fmt::Display for HookPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (layer, of_layer): (usize, OfLayer) = match *self {
            P::ResidPre(l) => (l, P::ResidPre),
            P::Ln1Scale(l) => (l, P::Ln1Scale),
            P::Ln1Normalized(l) => (l, P::Ln1Normalized),
            P::Q(l) => (l, P::Q),
            P::K(l) => (l, P::K),
            P::V(l) => (l, P::V),
            P::QNormed(l) => (l, P::QNormed),
            P::KNormed(l) => (l, P::KNormed),
            P::RotQ(l) => (l, P::RotQ),
            P::RotK(l) => (l, P::RotK),
            P::AttnScores(l) => (l, P::AttnScores),
            P::Pattern(l) => (l, P::Pattern),
            P::Z(l) => (l, P::Z),
            P::Result(l) => (l, P::Result),
            P::AttnOut(l) => (l, P::AttnOut),
            P::ResidMid(l) => (l, P::ResidMid),
            P::Ln2Scale(l) => (l, P::Ln2Scale),
            P::Ln2Normalized(l) => (l, P::Ln2Normalized),
            P::MlpPre(l) => (l, P::MlpPre),
            P::MlpPreLinear(l) => (l, P::MlpPreLinear),
            P::MlpPost(l) => (l, P::MlpPost),
            P::MlpOut(l) => (l, P::MlpOut),
            P::ResidPost(l) => (l, P::ResidPost),
            global => {
                let name = GLOBAL.iter().find(|(_, point)| *point == global).map_or("", |(name, _)| name);
                return f.write_str(name);
            }
        };
        let name = PER_LAYER.iter().find(|(_, point)| point(layer) == of_layer(layer)).map_or("", |(name, _)| name);
        write!(f, "blocks.{layer}.{name}")
    }
}

impl FromStr for HookPoint {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        if let Some((_, point)) = GLOBAL.iter().find(|(known, _)| *known == name) {
            return Ok(*point);
        }
        let parsed = name.strip_prefix("blocks.").and_then(|rest| rest.split_once('.')).and_then(|(layer, suffix)| {
            let layer = layer.parse().ok()?;
            PER_LAYER.iter().find(|(known, _)| *known == suffix).map(|(_, point)| point(layer))
        });
        parsed.ok_or_else(|| Error::UnknownHookPoint { name: name.to_owned(), nearest: nearest(name) })
    }
}

/// The existing name with the fewest edits from `name`; a layer number in `name` is kept.
fn nearest(name: &str) -> String {
    let layer = name.split('.').find_map(|part| part.parse::<usize>().ok()).unwrap_or(0);
    let per_layer = PER_LAYER.iter().map(|(_, point)| point(layer).to_string());
    let global = GLOBAL.iter().map(|(known, _)| (*known).to_owned());
    let names = per_layer.chain(global);
    names.min_by_key(|known| edit_distance(known, name)).unwrap_or_default()
}

/// Levenshtein's distance between two names, in characters.
pub fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let changed = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_back_as_its_point() {
        let all = HookPoint::all(3);
        assert_eq!(all.len(), 4 + 3 * 23);
        let names: std::collections::BTreeSet<String> = all.iter().map(ToString::to_string).collect();
        assert_eq!(names.len(), all.len(), "names are distinct");
        for point in all {
            assert_eq!(point.to_string().parse::<HookPoint>().unwrap(), point);
        }
        assert_eq!(HookPoint::ResidPost(14).to_string(), "blocks.14.hook_resid_post");
        assert_eq!(HookPoint::ResidPost(14).layer(), Some(14));
        assert_eq!(HookPoint::Embed.layer(), None);
    }

    #[test]
    fn a_misspelt_name_gets_the_nearest_one() {
        let message = "blocks.7.hook_resid_pots".parse::<HookPoint>().unwrap_err().to_string();
        assert_eq!(message, "no hook point blocks.7.hook_resid_pots; the nearest name is blocks.7.hook_resid_post");
    }

    #[test]
    fn a_star_means_every_block() {
        assert_eq!(HookPoint::select("blocks.*.attn.hook_z", 2).unwrap(), [HookPoint::Z(0), HookPoint::Z(1)]);
        assert!(HookPoint::select("blocks.2.attn.hook_z", 2).is_err());
    }
}
