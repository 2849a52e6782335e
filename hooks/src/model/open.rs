//! Loads a model and its chat by name.

use tch::{Device, Kind};

use crate::chat::chat::Chat;
use crate::error::Result;
use crate::load::model_files::ModelFiles;
use crate::model::qwen::Qwen;

/// Loads a model in f32 on the CPU, and its chat. `name` is a folder, a `.gguf`, a hub id such as `Qwen/Qwen3-0.6B`, or
/// an embedded model: `pocket` or `tiny-random`. [`ModelFiles`] and [`Qwen::load`] take another device or precision.
///
/// ```
/// let (model, chat) = hooks::open("tiny-random")?;
/// let prompt = chat.prompt(None, "Name an animal.")?;
/// let logprobs = hooks::next_token_logprobs(&model, &[prompt], &hooks::Condition::default())?;
/// assert_eq!(logprobs.size(), [1, model.config.d_vocab]);
/// # Ok::<(), hooks::Error>(())
/// ```
pub fn open(name: &str) -> Result<(Qwen, Chat)> {
    let files = ModelFiles::open(name)?;
    Ok((Qwen::load(&files, Device::Cpu, Kind::Float)?, Chat::from_files(&files)?))
}
