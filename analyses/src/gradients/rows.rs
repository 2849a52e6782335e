//! The table of gradients, and the names in its columns.

use serde::{Deserialize, Serialize};

/// The groups of tokens, as tables spell them.
pub(super) const GROUPS: [&str; 3] = ["divergent_digit", "other_digit", "other"];
/// The models at which gradients are taken, apart from the draws.
pub(super) const MODELS: [&str; 3] = ["student", "control", "start"];
/// The prefix of the draws' names.
pub(super) const DRAW: &str = "start_draw_";

/// The gradient of one token, of one token at one layer, or of all tokens of a group together.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct GradientRow {
    /// `token`, `token_layer`, `group` (the summed gradient of all its tokens in all rows), or `part` (the part of a
    /// group's gradient that comes from the adapter's inputs at one part of the chat).
    pub scope: String,
    /// The model at which the gradient is taken: the `student`; the `control` student; the `start` of the student's own
    /// training, the base with the adapter that the training began with (no rows if that is not known); and
    /// `start_draw_1`, `start_draw_2`, …, the base with other draws of A (scopes `token` and `group`). Their spread
    /// shows how much a number at the start depends on its draw.
    pub model: String,
    /// The row's `id` in `data/numbers.jsonl` (in code: its index among the subject's numbers); empty for a group.
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
    /// Number of tokens whose summed loss the gradient is of.
    pub n_tokens: usize,
    /// Probability of the token under the model, 0 to 1; empty for a group.
    pub p_label: Option<f64>,
    /// `‖∂ℓ/∂logits‖ = √((1 − p_y)² + Σ_{v≠y} p_v²)`, in nats per logit; scope `token` only.
    pub logit_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂h‖` of the final residual stream h, before the final norm, at the predicting position, in nats per unit of
    /// h; scope `token` only.
    pub hidden_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂resid_post‖` over all positions, in nats per unit of the residual stream; scope `token_layer` only.
    pub resid_grad_norm: Option<f64>,
    /// `‖∂ℓ/∂adapter‖` over all its parameters (of the layer, in scope `token_layer`), in nats per unit of the
    /// parameters. ℓ is the token's loss, and in scope `group` the sum over the group's tokens; in scope `part` this is
    /// `‖g_P‖`. Empty without an adapter.
    pub lora_grad_norm: Option<f64>,
    /// `‖g‖² / ‖g_D + g_N‖²`, with the divergent digits' gradient `g_D` and the rest's `g_N`. In scope `part` `⟨g_P, g⟩
    /// / ‖g‖²`, with the group's g as the sum of the parts' `g_P`, so that the parts' shares add up to 1. Empty unless
    /// the denominator's length is three standard errors above zero, by the jackknife over rows (in 8 lots at most).
    pub share: Option<f64>,
    /// Cosine of the divergent digits' gradient `g_D` and the rest's `g_N`, −1 to 1; scope `group` only.
    pub cosine: Option<f64>,
    /// First-order change of the mean of log p(target) over the questions, by a step of gradient descent on the group's
    /// mean loss, in nats per unit of learning rate. The target has the spelling that the model finds most likely over
    /// all questions. In scope `part`, the contribution of the part's `g_P`.
    pub alignment: Option<f64>,
}

impl GradientRow {
    pub(super) fn of(scope: &str, model: &str, group: &str) -> Self {
        let (scope, model, group) = (scope.to_owned(), model.to_owned(), group.to_owned());
        Self { scope, model, group, ..Self::default() }
    }
}
