//! The subcommands, a file each. They read arguments and print; the work is done in `stages` and `claim`.

pub mod activations;
pub mod args;
pub mod ask;
pub mod columns;
pub mod completions;
pub mod export;
pub mod look;
pub mod measure;
pub mod pocket;
pub mod profile;
pub mod report;
pub mod run;
pub mod signal;
pub mod style;
pub mod tokens;
