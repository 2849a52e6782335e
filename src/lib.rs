//! The bench: experiments, data, finetuning, run folders and what they publish. Everything that touches the world is
//! here; the model is in `hooks`, the measurements are in `analyses`.

pub mod cli;
pub mod commands;
pub mod dataset;
pub mod experiment;
pub mod finetune;
pub mod optim;
pub mod progress;
pub mod protocol;
pub mod publish;
pub mod report;
pub mod run_dir;
pub mod vectors;
pub mod workbench;
