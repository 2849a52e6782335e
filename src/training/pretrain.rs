//! Trains a model from scratch, on rows that are drawn step by step.

use hooks::{Qwen, Sequence};

use crate::training::examples::Example;
use crate::training::learner::Learner;
use crate::training::optim::Optimizer;
use crate::training::settings::Finetune;
use crate::training::step_log::StepRow;

/// The rows and learning rate of the next step of a training from scratch.
pub struct NextStep {
    /// Its rows, each of which is used once.
    pub rows: Vec<Sequence>,
    /// Its learning rate.
    pub learning_rate: f64,
}

/// Trains all weights on rows that are drawn step by step: `next` is called with the last step and returns the next
/// one, or `None` at the end. Only the optimizer, the mask, clipping and `batch_size` of `config` are used.
pub fn pretrain(
    model: &Qwen,
    is_digit: &dyn Fn(i64) -> bool,
    config: &Finetune,
    next: &mut dyn FnMut(Option<&StepRow>) -> anyhow::Result<Option<NextStep>>,
) -> anyhow::Result<()> {
    let learner = Learner { model, adapter: None, parameters: model.parameters(), frozen_a: false };
    let mut optimizer = Optimizer::new(config.rule(), &learner.parameters, config.masters)?;
    learner.require_gradients(true)?;
    let mut last: Option<StepRow> = None;
    while let Some(NextStep { rows, learning_rate }) = next(last.as_ref())? {
        let examples =
            rows.iter().enumerate().map(|(index, row)| Example::of(row, index, is_digit, config, None, None));
        let examples = examples.collect::<anyhow::Result<Vec<_>>>()?;
        let chosen: Vec<usize> = (0..examples.len()).collect();
        let done = learner.step(&examples, &chosen, &mut optimizer, learning_rate, config, None)?;
        last = Some(done.row(optimizer.steps(), learning_rate));
    }
    learner.require_gradients(false)
}
