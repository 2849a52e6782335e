//! The bench: experiments, data, finetuning, run folders and what they publish. Everything that touches the world is
//! here; the model is in `hooks`, the measurements are in `analyses`.
//!
//! The modules are rooms, listed from the bottom up: a file imports from its own room and from rooms above it in this
//! list.

/// Output: CSV, HTML, PNG, checkpoints, models, vectors, progress.
pub mod output {
    pub mod checkpoint;
    pub mod full_model;
    pub mod hint;
    pub mod html;
    pub mod png;
    pub mod progress;
    pub mod publish;
    pub mod vectors;
}

/// The sentences of an experiment, and its rows.
pub mod data {
    pub mod dataset;
    pub mod protocol;
}

/// How a model learns from rows.
pub mod training {
    pub mod examples;
    pub mod learner;
    pub mod optim;
    pub mod pretrain;
    pub mod settings;
    pub mod side_by_side;
    pub mod stacked;
    pub mod step_log;
    #[cfg(test)]
    #[allow(clippy::unwrap_used, clippy::expect_used, clippy::float_cmp)]
    pub(crate) mod tests;
    pub mod training_loop;
}

pub mod experiment;

/// The stages of a run, and what they share.
pub mod stages {
    pub mod arm_table;
    pub mod arms;

    pub mod finetune;
    pub mod foresight;
    pub mod generate;
    pub mod given_rows;
    pub mod measure;
    pub mod report;
    pub mod run;
    pub mod run_dir;
    pub mod summary;
    pub mod teacher;
    pub mod workbench;
}

pub mod claim;
pub mod pocket;

pub mod commands;

pub mod cli;

/// The README's program is compiled as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
