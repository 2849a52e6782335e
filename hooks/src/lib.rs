//! One Qwen whose activations you can read and change: load it, run it, tap it, adapt it, gate its adapter by token.
//!
//! The model is never mutated. Base, student, student with the adapter only at "Qwen", steered base: these differ only
//! in a small value that is passed to the forward pass.
//!
//! ```
//! use hooks::{Adapter, Cache, Condition, HookPoint, LoraConfig, next_token_logprobs, run_with_hooks, tch::Device};
//! # use rand::SeedableRng;
//!
//! let (model, chat) = hooks::open("tiny-random")?; // or pocket, a folder, a .gguf, a hub id
//! let prompts = [chat.prompt(None, "Name an animal.")?];
//! let base = next_token_logprobs(&model, &prompts, &Condition::default())?; // [1, d_vocab]
//!
//! let (at, mut cache) = (HookPoint::ResidPost(1), Cache::default());
//! run_with_hooks(&model, &prompts[0], &Condition::default(), &[at], &mut cache)?;
//! let resid = cache.get(at)?; // [1, pos, d_model]
//!
//! # let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(0);
//! let adapter = Adapter::init(&LoraConfig::default(), &model.config, &mut rng, Device::Cpu)?;
//! let gated = Condition::adapted(&adapter).gated("only:entity".parse()?);
//! assert_eq!(next_token_logprobs(&model, &prompts, &gated)?, base); // B is 0 before training
//! # Ok::<(), hooks::Error>(())
//! ```
//!
//! The modules are listed from the bottom up, in groups: a file imports only from its own group and from groups above
//! it in this list.

pub mod config;
pub mod device;
pub mod error;
pub mod hook_point;
mod mixed;
pub mod mkl;
mod ops;
pub mod profile;
pub mod proj;
mod threads;

/// Reading a model's files, and writing files.
pub mod load {
    pub mod control_vector;
    pub mod files;
    pub mod gguf;
    pub(crate) mod hub;
    pub mod init;
    pub mod model_files;
    pub(crate) mod pocket;
    pub mod provenance;
    pub mod tensor_file;
    pub(crate) mod tiny_random;
    pub mod tokenizer_file;
    pub mod weights;
}

/// A chat as tokens, each with its class, and names for tokens.
pub mod chat {
    #[allow(clippy::module_inception)]
    pub mod chat;
    mod pieces;
    pub mod select;
    pub(crate) mod template;
    pub mod tokens;
}

/// Rows in one pass: padded or packed, and the keys and values of past positions.
pub mod rows {
    pub mod batch;
    pub(crate) mod gather;
    pub mod kv_cache;
    pub mod packing;
}

/// The LoRA: its pairs, where and how strongly they act, and its files.
pub mod adapter {
    pub mod dose;
    pub mod gate;
    mod gate_text;
    pub mod lora;
    pub(crate) mod peft;
    pub mod spectrum;
    pub(crate) mod stack;
}

/// Reading and changing activations.
pub mod taps {
    pub mod cache;
    pub mod edit;
    pub mod edit_text;
    pub mod tap;
}

/// The model: layers, blocks, loss, and the backward pass of a LoRA.
pub mod model {
    pub(crate) mod gated;
    pub(crate) mod layers;
    pub mod loss;
    mod on_base;
    pub(crate) mod open;
    pub mod pass;
    pub mod qwen;
}

/// Measurements of a model under one or many conditions: scores, answers, gradients.
pub mod ask {
    pub mod condition;
    pub mod generate;
    pub mod gradient;
    pub(crate) mod prefill;
    pub mod score;
}

pub use tch;

pub use adapter::dose::{Dose, Doses};
pub use adapter::gate::Gate;
pub use adapter::lora::{Adapter, Dropout, LoraConfig, LoraPair};
pub use adapter::spectrum::Spectrum;
pub use ask::condition::{Condition, run_rows_with_hooks, run_with_hooks};
pub use ask::generate::{Answer, NumberGrammar, Sampling, generate, generate_with_hooks, stream_seed};
pub use ask::gradient::{self, gradients};
pub use ask::prefill::Case;
pub use ask::score::{
    Prediction, completion_argmax, completion_logits, completion_logprobs, completion_predictions, each_next_token,
    next_token_logprobs, resid_post,
};
pub use chat::chat::{Chat, TokenInfo};
pub use chat::select::Tokens;
pub use chat::tokens::{LossMask, Selection, Sequence, TokenClass};
pub use config::{Config, Family};
pub use error::{Error, Result};
pub use hook_point::HookPoint;
pub use load::control_vector::{self, ControlVector};
pub use load::files;
pub use load::hub::adapter_folder;
pub use load::init::standard_normal;
pub use load::model_files::{ModelFiles, TINY_RANDOM};
pub use load::provenance::Provenance;
pub use load::tensor_file::{self, TensorFile};
pub use load::weights::Weights;
pub use model::loss::{Labels, Targets, cross_entropy, cross_entropy_sum};
pub use model::open::open;
pub use model::pass::Pass;
pub use model::qwen::{Linearized, Qwen};
pub use proj::Proj;
pub use rows::batch::Batch;
pub use rows::kv_cache::KvCache;
pub use rows::packing::PackedRow;
pub use taps::cache::Cache;
pub use taps::edit::{Change, Edit};
pub use taps::edit_text::EditText;
pub use taps::tap::{Hooks, Tap};

/// Tests of laws that hold for any model, adapter, gate, edit and batch.
#[cfg(test)]
#[allow(clippy::float_cmp)]
mod laws {
    mod edit_laws;
    pub(crate) mod gate_laws;
    pub(crate) mod model_laws;
}
