//! The table `[seeds]`: the seeds of the random streams.

use serde::{Deserialize, Serialize};

use crate::training::settings;

/// The seeds of the random streams, which are independent of each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Seeds {
    /// The seed of number prompts and the teacher's answers.
    pub gen_seed: u64,
    /// The seed of the adapter's A.
    pub init_seed: u64,
    /// The seed of the order of rows in training.
    pub order_seed: u64,
    /// The seed of the adapter's dropout.
    pub dropout_seed: u64,
    /// The seed of sampled answers and random vectors in measurements.
    pub eval_seed: u64,
}

impl Seeds {
    /// The seeds of a training.
    pub fn finetune(&self) -> settings::Seeds {
        settings::Seeds { init: self.init_seed, order: self.order_seed, dropout: self.dropout_seed }
    }
}
