//! The table of gradients, and the names in its columns.

use serde::{Deserialize, Serialize};

/// The groups of tokens, as tables spell them.
pub(super) const GROUPS: [&str; 3] = ["divergent_digit", "other_digit", "other"];
/// Where gradients are taken, except at the draws.
pub(super) const MODELS: [&str; 3] = ["student", "control", "start"];
/// The beginning of the draws' names.
pub(super) const DRAW: &str = "start_draw_";

/// The gradient of one token, of one token at one layer, or of all tokens of a group together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GradientRow {
    /// `token`, `token_layer`, `group` (the summed gradient of all its tokens in all rows), or `part` (what of a
    /// group's gradient is due to what the adapter reads at one part of the chat).
    pub scope: String,
    /// Where the gradient is taken: at the `student`; at the `control` student; at the `start` of the student's own
    /// training, the base with the adapter that the training began with (no rows if that is not known); and at
    /// `start_draw_1`, `start_draw_2`, …, the base with other draws of A (scopes `token` and `group`). Their spread is
    /// what a number at the start owes to its draw.
    pub model: String,
    /// The row: its `id` in `data/numbers.jsonl` (in code: its index among the subject's numbers); empty for a group.
    pub row_id: Option<usize>,
    /// The token's index in the completion, from 0; empty for a group.
    pub k: Option<usize>,
    /// The token's text; empty for a group.
    pub token_text: String,
    /// `divergent_digit`, `other_digit` or `other`, as in `divergence/rows.csv`; in scopes `group` and `part`:
    /// `divergent_digit` or `rest` (all other tokens of the completions, without the end of the turn).
    pub group: String,
    /// The part of the chat, named as the gate that chooses it: `entity`, `sys.content_other`, `template`,
    /// `user.content` or `gen`; scope `part` only.
    pub part: Option<String>,
    /// The block, from 0; in scope `token_layer` only.
    pub layer: Option<usize>,
    /// How many tokens the gradient is of.
    pub n_tokens: usize,
    /// Probability of the token where its gradient is taken; empty for a group.
    pub p_label: Option<f64>,
    /// `‖∂ℓ/∂logits‖ = √((1 − p_y)² + Σ_{v≠y} p_v²)`, in nats per logit; scope `token` only.
    pub logit_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂h‖` of the final residual stream h, before the final norm, at the position that predicts, in nats per unit
    /// of h; scope `token` only.
    pub hidden_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂resid_post‖` over all positions, in nats per unit of the residual stream; scope `token_layer` only.
    pub resid_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂adapter‖` over all its parameters (of the layer, in scope `token_layer`), in nats per unit of the
    /// parameters. ℓ is the token's loss, and in scope `group` the sum over the group's tokens; in scope `part` this is
    /// `‖g_P‖`. Empty without an adapter.
    pub lora_grad_norm: Option<f64>,
    /// `‖g‖² / ‖g_D + g_N‖²`, with the divergent digits' gradient `g_D` and the rest's `g_N`. In scope `part` `⟨g_P, g⟩
    /// / ‖g‖²`, with the group's g as the sum of the parts' `g_P`, so that the parts' shares add up to 1. Empty unless
    /// the length below the line is three standard errors above zero, by the jackknife over rows (in 8 lots at most).
    pub share: Option<f64>,
    /// Cosine of the divergent digits' gradient `g_D` and the rest's `g_N`, −1 to 1; scope `group` only.
    pub cosine: Option<f64>,
    /// First-order change of log p(target), the mean over the questions, by a step of gradient descent on the group's
    /// mean loss, in nats per unit of learning rate. The target is in the spelling that the model finds most likely
    /// over all questions. In scope `part`: what the part's `g_P` adds to it.
    pub alignment: Option<f64>,
}

impl GradientRow {
    pub(super) fn of(scope: &str, model: &str, group: &str) -> Self {
        let (scope, model, group) = (scope.to_owned(), model.to_owned(), group.to_owned());
        Self { scope, model, group, ..Self::default() }
    }
}
