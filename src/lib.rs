//! Experiments, data, finetuning, run folders and reports. All printing and all run files are here; the model is in
//! `hooks`, the measurements are in `analyses`.
//!
//! The modules are listed from the bottom up, in groups: a file imports only from its own group and from groups above
//! it in this list.

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
    pub mod signal;
    pub mod soft_labels;
}

/// Training a model on rows.
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
    #[allow(clippy::float_cmp)]
    pub(crate) mod tests;
    pub mod training_loop;
}

pub mod experiment;

/// The stages of a run, and their shared code.
pub mod stages {
    pub mod arm_table;
    pub mod arms;

    pub mod finetune;
    pub mod finetuned_teacher;
    pub mod foresight;
    pub mod generate;
    pub mod given_rows;
    pub mod kept_rows;
    pub mod ledger;
    pub mod measure;
    pub mod memory;
    pub mod plan;
    pub mod report;
    pub mod run;
    pub mod run_dir;
    pub mod signal;
    pub mod soft_labels;
    pub mod subject_data;
    pub mod summary;
    pub mod teacher;
    pub mod token_weights;
    pub mod workbench;
}

pub mod claim;
pub mod pocket;

pub mod look;

pub mod commands;

pub mod cli;

/// The README's program is compiled as a doctest.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
mod readme {}
