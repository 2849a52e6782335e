//! The bench: experiments, data, finetuning, run folders and what they publish. Everything that touches the world is
//! here; the model is in `hooks`, the measurements are in `analyses`.

pub mod arms;
pub mod checkpoint;
pub mod claim;
pub mod cli;
pub mod closing;
pub mod commands;
pub mod dataset;
pub mod experiment;
pub mod finetune;
pub mod foresight;
pub mod full_model;
pub mod given_numbers;
pub mod optim;
pub mod png;
pub mod pocket;
pub mod progress;
pub mod protocol;
pub mod publish;
pub mod report;
pub mod run_dir;
pub mod side_by_side;
pub mod teacher;
pub mod vectors;
pub mod workbench;
