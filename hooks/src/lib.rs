//! One Qwen you can listen to: load it, run it, tap it, adapt it, gate the adapter token by token.
//!
//! The model is never mutated. Base, student, student with the adapter only at "Qwen", steered base: these differ only
//! in a small value handed to one forward pass.

pub mod batch;
pub mod chat;
pub mod condition;
pub mod config;
pub mod control_vector;
pub mod device;
pub mod dose;
pub mod edit;
pub mod error;
pub mod files;
pub mod gate;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::float_cmp)]
mod gate_laws;
pub mod generate;
pub mod gguf;
pub mod gradient;
pub mod hook_point;
mod hub;
pub mod init;
pub mod kv_cache;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod laws;
pub mod listen;
pub mod lora;
pub mod loss;
pub mod model_files;
mod nn;
mod ops;
pub mod packing;
pub mod pass;
mod peft;
pub mod planned;
mod pocket;
pub mod profile;
pub mod proj;
pub mod provenance;
pub mod qwen;
pub mod score;
pub mod select;
pub mod spectrum;
mod stack;
pub mod tap;
mod template;
pub mod tensor_file;
mod tiny_random;
pub mod tokenizer_file;
pub mod tokens;
pub mod weights;

pub use batch::Batch;
pub use chat::{Chat, TokenRow};
pub use condition::Condition;
pub use config::{Config, Family};
pub use dose::{Dose, Doses};
pub use edit::{Change, Edit};
pub use error::{Error, Result};
pub use gate::Gate;
pub use hook_point::HookPoint;
pub use hub::adapter_folder;
pub use kv_cache::KvCache;
pub use lora::{Adapter, LoraConfig, LoraPair};
pub use model_files::ModelFiles;
pub use pass::Pass;
pub use planned::Planned;
pub use proj::Proj;
pub use provenance::Provenance;
pub use qwen::Qwen;
pub use select::Tokens;
pub use tap::{Hooks, Tap};
pub use tokens::{LossMask, Prompt, Selection, TokenClass};
pub use weights::Weights;
