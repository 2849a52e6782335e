//! The places where an activation can be seen or replaced, in TransformerLens' spelling and shapes.
//!
//! One table generates everything: the enum and its documentation, the names, and the page `hooks/HOOKS.md`.

use std::fmt;
use std::str::FromStr;

use crate::config::Config;
use crate::error::{Error, Result};

/// An entry of the table: a point's name (after `blocks.{layer}.` if it is in a block), and its names in other
/// libraries.
struct Entry {
    name: &'static str,
    shape: &'static str,
    #[cfg_attr(not(test), expect(dead_code, reason = "for the page alone"))]
    elsewhere: [&'static str; 4], // description; name in transformers, in nnterp, in a control vector
}

/// The table, with a line per point: `Variant "name" "shape" "what it is" "in transformers" "in nnterp" "control
/// vector";`.
macro_rules! hook_points {
    (
        before { $($before:ident $b_name:literal $b_shape:literal $b_what:literal $($b_else:literal)*;)* }
        in each block { $($block:ident $name:literal $shape:literal $what:literal $($else:literal)*;)* }
        after { $($after:ident $a_name:literal $a_shape:literal $a_what:literal $($a_else:literal)*;)* }
    ) => {
        /// A place in the forward pass where an activation can be seen or replaced. The number is the block's, from 0.
        ///
        /// ```
        /// use hooks::HookPoint;
        ///
        /// let point: HookPoint = "blocks.14.hook_resid_post".parse()?;
        /// assert_eq!((point, point.layer()), (HookPoint::ResidPost(14), Some(14)));
        /// assert_eq!(HookPoint::select("blocks.*.attn.hook_z", 24)?.len(), 24);
        /// # Ok::<(), hooks::Error>(())
        /// ```
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum HookPoint {
            $(#[doc = concat!($b_what, ", `", $b_shape, "`.")] $before,)*
            $(#[doc = concat!($what, ", `", $shape, "`.")] $block(usize),)*
            $(#[doc = concat!($a_what, ", `", $a_shape, "`.")] $after,)*
        }

        const BEFORE: &[HookPoint] = &[$(HookPoint::$before),*];
        const IN_EACH_BLOCK: &[fn(usize) -> HookPoint] = &[$(HookPoint::$block),*];
        const AFTER: &[HookPoint] = &[$(HookPoint::$after),*];

        impl HookPoint {
            /// The point's block, if it is in one, and its entry in the table.
            fn entry(self) -> (Option<usize>, &'static Entry) {
                match self {
                    $(Self::$before => (None, &Entry { name: $b_name, shape: $b_shape, elsewhere: [$b_what, $($b_else),*] }),)*
                    $(Self::$block(layer) => (Some(layer), &Entry { name: $name, shape: $shape, elsewhere: [$what, $($else),*] }),)*
                    $(Self::$after => (None, &Entry { name: $a_name, shape: $a_shape, elsewhere: [$a_what, $($a_else),*] }),)*
                }
            }
        }
    };
}

hook_points! {
    before {
        Embed "hook_embed" "[batch, pos, d_model]"
            "Token embeddings" "`model.embed_tokens` output" "`token_embeddings`" "–";
    }
    in each block {
        ResidPre "hook_resid_pre" "[batch, pos, d_model]"
            "The residual stream before the block" "`model.layers.{l}` input" "`layers_input[l]`" "–";
        Ln1Scale "ln1.hook_scale" "[batch, pos, 1]"
            "Root mean square that the block's first norm divides by" "–" "–" "–";
        Ln1Normalized "ln1.hook_normalized" "[batch, pos, d_model]"
            "The block's first norm before its weight" "–" "–" "–";
        Q "attn.hook_q" "[batch, pos, n_heads, d_head]"
            "Queries as projected, before norm and rotation" "`model.layers.{l}.self_attn.q_proj` output" "–" "–";
        K "attn.hook_k" "[batch, pos, n_kv_heads, d_head]"
            "Keys as projected, before norm and rotation" "`model.layers.{l}.self_attn.k_proj` output" "–" "–";
        V "attn.hook_v" "[batch, pos, n_kv_heads, d_head]"
            "Values" "`model.layers.{l}.self_attn.v_proj` output" "–" "–";
        QNormed "attn.hook_q_normed" "[batch, pos, n_heads, d_head]"
            "Queries after their norm and before rotation (Qwen3)" "`model.layers.{l}.self_attn.q_norm` output" "–" "–";
        KNormed "attn.hook_k_normed" "[batch, pos, n_kv_heads, d_head]"
            "Keys after their norm and before rotation (Qwen3)" "`model.layers.{l}.self_attn.k_norm` output" "–" "–";
        RotQ "attn.hook_rot_q" "[batch, pos, n_heads, d_head]"
            "Queries after rotation" "–" "–" "–";
        RotK "attn.hook_rot_k" "[batch, pos, n_kv_heads, d_head]"
            "Keys after rotation" "–" "–" "–";
        AttnScores "attn.hook_attn_scores" "[batch, n_heads, query, key]"
            "Attention scores after scaling and masking (−∞ where masked)" "–" "–" "–";
        Pattern "attn.hook_pattern" "[batch, n_heads, query, key]"
            "Attention probabilities" "`attentions[l]`" "`attention_probabilities[l]`" "–";
        Z "attn.hook_z" "[batch, pos, n_heads, d_head]"
            "Values mixed by the pattern" "`model.layers.{l}.self_attn.o_proj` input" "–" "–";
        Result "attn.hook_result" "[batch, pos, n_heads, d_model]"
            "Each head's own part of what attention adds; large" "–" "–" "–";
        AttnOut "hook_attn_out" "[batch, pos, d_model]"
            "What attention adds to the residual stream" "`model.layers.{l}.self_attn` output" "`attentions_output[l]`" "–";
        ResidMid "hook_resid_mid" "[batch, pos, d_model]"
            "The residual stream between attention and MLP" "`model.layers.{l}.post_attention_layernorm` input" "–" "–";
        Ln2Scale "ln2.hook_scale" "[batch, pos, 1]"
            "Root mean square that the block's second norm divides by" "–" "–" "–";
        Ln2Normalized "ln2.hook_normalized" "[batch, pos, d_model]"
            "The block's second norm before its weight" "–" "–" "–";
        MlpPre "mlp.hook_pre" "[batch, pos, d_mlp]"
            "The MLP's gate before its activation" "`model.layers.{l}.mlp.gate_proj` output" "–" "–";
        MlpPreLinear "mlp.hook_pre_linear" "[batch, pos, d_mlp]"
            "The MLP's linear branch" "`model.layers.{l}.mlp.up_proj` output" "–" "–";
        MlpPost "mlp.hook_post" "[batch, pos, d_mlp]"
            "The gated product" "`model.layers.{l}.mlp.down_proj` input" "–" "–";
        MlpOut "hook_mlp_out" "[batch, pos, d_model]"
            "What the MLP adds to the residual stream" "`model.layers.{l}.mlp` output" "`mlps_output[l]`" "–";
        ResidPost "hook_resid_post" "[batch, pos, d_model]"
            "The residual stream after the block" "`model.layers.{l}` output" "`layers_output[l]`" "`direction.l`, l ≥ 1";
    }
    after {
        LnFinalScale "ln_final.hook_scale" "[batch, pos, 1]"
            "Root mean square that the final norm divides by" "–" "–" "–";
        LnFinalNormalized "ln_final.hook_normalized" "[batch, pos, d_model]"
            "The final norm before its weight" "–" "–" "–";
        Logits "logits" "[batch, pos, d_vocab]"
            "The model's output" "`lm_head` output" "`logits`" "–";
    }
}

impl HookPoint {
    /// Every hook point of a model with `n_layers` blocks, including the opt-in `hook_result` and Qwen3's norms.
    pub fn all(n_layers: usize) -> Vec<Self> {
        let blocks = (0..n_layers).flat_map(Self::of_block);
        BEFORE.iter().copied().chain(blocks).chain(AFTER.iter().copied()).collect()
    }

    /// The points of one block, in the order of the computation.
    fn of_block(layer: usize) -> impl Iterator<Item = Self> {
        IN_EACH_BLOCK.iter().map(move |point| point(layer))
    }

    /// The points that a name means in a model with `n_layers` blocks; `*` in place of the layer means every block.
    pub fn select(pattern: &str, n_layers: usize) -> Result<Vec<Self>> {
        if let Some(suffix) = pattern.strip_prefix("blocks.*.") {
            return (0..n_layers).map(|layer| format!("blocks.{layer}.{suffix}").parse()).collect();
        }
        let point: Self = pattern.parse()?;
        match point.layer() {
            Some(layer) if layer >= n_layers => Err(Error::invalid(
                format!("the layer of hook point {pattern}"),
                format!("0 to {}", n_layers.saturating_sub(1)),
                layer,
            )),
            _ => Ok(vec![point]),
        }
    }

    /// The shape of the activation at one token; `None` for scores and pattern, which have a row for every query.
    pub fn token_shape(self, model: &Config) -> Option<Vec<i64>> {
        let of_token = self.entry().1.shape.strip_prefix("[batch, pos, ")?.trim_end_matches(']');
        let width = |name: &str| match name {
            "d_model" => Some(model.d_model),
            "n_heads" => Some(model.n_heads),
            "n_kv_heads" => Some(model.n_kv_heads),
            "d_head" => Some(model.d_head),
            "d_mlp" => Some(model.d_mlp),
            "d_vocab" => Some(model.d_vocab),
            number => number.parse().ok(),
        };
        of_token.split(", ").map(width).collect()
    }

    /// The block that the point is in, if it is in one.
    pub fn layer(self) -> Option<usize> {
        self.entry().0
    }

    /// The shape of the activation, such as `[batch, pos, d_model]`.
    pub fn shape(self) -> &'static str {
        self.entry().1.shape
    }
}

impl fmt::Display for HookPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry() {
            (Some(layer), entry) => write!(f, "blocks.{layer}.{}", entry.name),
            (None, entry) => f.write_str(entry.name),
        }
    }
}

impl FromStr for HookPoint {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let layer = name.strip_prefix("blocks.").and_then(|rest| rest.split('.').next()?.parse().ok());
        let known = || BEFORE.iter().copied().chain(Self::of_block(layer.unwrap_or(0))).chain(AFTER.iter().copied());
        known().find(|point| point.to_string() == name).ok_or_else(|| {
            let nearest = known().map(|point| point.to_string()).min_by_key(|known| strsim::levenshtein(known, name));
            Error::UnknownHookPoint { name: name.to_owned(), nearest: nearest.unwrap_or_default() }
        })
    }
}

#[cfg(test)]
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

    /// A row of the page's table.
    fn line(point: &HookPoint) -> String {
        let (layer, entry) = point.entry();
        let block = if layer.is_some() { "blocks.{l}." } else { "" };
        format!("| `{block}{}` | `{}` | {} |\n", entry.name, entry.shape, entry.elsewhere.join(" | "))
    }

    #[test]
    fn the_page_has_the_table_above() {
        const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/HOOKS.md");
        let page = std::fs::read_to_string(PAGE).unwrap();
        let (before, rest) = page.split_once("|---|---|---|---|---|---|\n").unwrap();
        let after = rest.find("\n\n").map_or("", |end| &rest[end + 1..]);
        let table: String = HookPoint::all(1).iter().map(line).collect();
        let expected = format!("{before}|---|---|---|---|---|---|\n{table}{after}");
        if std::env::var_os("UNDERTONE_WRITE").is_some() {
            std::fs::write(PAGE, &expected).unwrap();
        }
        let hint = "run UNDERTONE_WRITE=1 cargo test --release -p undertone-hooks the_page";
        assert!(
            std::fs::read_to_string(PAGE).unwrap() == expected,
            "hooks/HOOKS.md is not the table of hook_point.rs; {hint}"
        );
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
