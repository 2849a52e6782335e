//! Saves the state of an unfinished stage, in the folder of the stage's last file. A killed stage continues from there
//! and ends with the same bytes as an uninterrupted one. The checkpoint is removed when the stage is done.
//!
//! A checkpoint records its inputs. If they differ, the stage prints that and starts over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hooks::files;
use hooks::tensor_file::{self, TensorFile};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tch::Tensor;

use crate::output::hint::Hinted;
use crate::output::progress::say;

/// The ending of every checkpoint's name.
pub const ENDING: &str = "checkpoint.safetensors";

/// If no interval is given, checkpoints take at most 1 / `SHARE` of the time and are at least `APART` apart.
const SHARE: u32 = 50;
const APART: Duration = Duration::from_secs(10);

/// The path of a checkpoint, the inputs of its stage, and the time of the last write.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    who: String,
    made_from: BTreeMap<String, String>,
    last: Instant,
    cost: Duration,
    /// The step of the checkpoint on disk.
    pub step: Option<u64>,
}

impl Checkpoint {
    /// The checkpoint of a stage whose last file is `finished`, or of its part `part`. `who` names it in messages.
    pub fn beside(finished: &Path, part: &str, who: &str) -> Self {
        let ending = if part.is_empty() { ENDING.to_owned() } else { format!("{part}.{ENDING}") };
        let version = [Some(env!("CARGO_PKG_VERSION")), option_env!("UNDERTONE_COMMIT")];
        let version = version.into_iter().flatten().collect::<Vec<_>>().join(" ");
        Self {
            path: finished.with_extension(ending),
            who: who.to_owned(),
            made_from: BTreeMap::from([("undertone".to_owned(), version)]),
            last: Instant::now(),
            cost: Duration::ZERO,
            step: None,
        }
    }

    /// Adds an input that the result depends on. Of a long one only the hash is kept.
    pub fn depends_on(&mut self, what: &str, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string(value)?;
        let text = if text.len() > 1000 { format!("SHA-256 {:x}", Sha256::digest(text)) } else { text };
        self.made_from.insert(what.to_owned(), text);
        Ok(())
    }

    /// The file of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the checkpoint; `None` if there is none or it was made from other inputs.
    pub fn load(&mut self) -> Result<Option<TensorFile>> {
        if !self.path.exists() {
            return Ok(None);
        }
        let damaged =
            |error: anyhow::Error| Hinted::because(error, "remove this checkpoint, and its stage starts over");
        let file = TensorFile::open(&self.path).map_err(|error| damaged(error.into()))?;
        let metadata = file.metadata();
        let keys = self.made_from.keys().chain(metadata.keys().filter(|key| key.starts_with("made_from.")));
        let differs = keys
            .map(|key| key.strip_prefix("made_from.").unwrap_or(key))
            .find(|key| self.made_from.get(*key) != metadata.get(&format!("made_from.{key}")));
        if let Some(key) = differs {
            let path = self.path.display();
            say(format!("{}: {path} was made from something else ({key} differs), so it starts over", self.who));
            return Ok(None);
        }
        let step = metadata.get("step").and_then(|step| step.parse::<u64>().ok());
        self.step = Some(step.with_context(|| self.path.display().to_string()).map_err(damaged)?);
        Ok(Some(file))
    }

    /// Prints that the stage continues from the checkpoint.
    pub fn say_resumed(&self, unit: &str, total: u64) {
        if let Some(step) = self.step {
            say(format!("{}: resumed at {unit} {step} of {total}", self.who));
        }
    }

    /// Whether a checkpoint is due after a step.
    pub fn is_due(&self, step: u64, save_steps: Option<u64>) -> bool {
        match save_steps {
            Some(steps) => step.is_multiple_of(steps),
            None => self.last.elapsed() >= APART.max(self.cost * SHARE),
        }
    }

    /// Writes a checkpoint in place of the last one, which stays until this one is whole.
    pub fn save(&mut self, step: u64, tensors: &[(String, Tensor)], notes: &[(&str, String)]) -> Result<()> {
        let begin = Instant::now();
        let mut metadata: BTreeMap<String, String> =
            self.made_from.iter().map(|(key, value)| (format!("made_from.{key}"), value.clone())).collect();
        metadata.insert("step".to_owned(), step.to_string());
        metadata.extend(notes.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
        tensor_file::write(&self.path, tensors, &metadata)?;
        (self.step, self.cost, self.last) = (Some(step), begin.elapsed(), Instant::now());
        Ok(())
    }

    /// Removes the checkpoint, when the stage is done.
    pub fn remove(&self) -> Result<()> {
        Ok(files::remove(&self.path)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checkpoint(folder: &Path, seed: u64) -> Checkpoint {
        let mut checkpoint = Checkpoint::beside(&folder.join("train.csv"), "", "student");
        checkpoint.depends_on("seeds", &seed).unwrap();
        checkpoint.depends_on("rows", &vec![seed; 2000]).unwrap();
        checkpoint
    }

    #[test]
    fn what_is_kept_comes_back_to_what_it_was_made_from_only() {
        let folder = tempfile::tempdir().unwrap();
        let mut kept = checkpoint(folder.path(), 1);
        assert!(kept.load().unwrap().is_none());
        let tensors = [("x".to_owned(), Tensor::from_slice(&[0.1_f32, 0.2]))];
        kept.save(7, &tensors, &[("log", "a,b\n1,2\n".to_owned())]).unwrap();
        assert!(kept.path().ends_with("train.checkpoint.safetensors"));

        let mut again = checkpoint(folder.path(), 1);
        let file = again.load().unwrap().unwrap();
        assert_eq!((again.step, file.metadata()["log"].as_str()), (Some(7), "a,b\n1,2\n"));
        assert!(file.tensor("x").unwrap().equal(&tensors[0].1));

        let mut other = checkpoint(folder.path(), 2);
        assert!(other.load().unwrap().is_none() && other.step.is_none());
        let mut fewer = Checkpoint::beside(&folder.path().join("train.csv"), "", "student");
        fewer.depends_on("seeds", &1).unwrap();
        assert!(fewer.load().unwrap().is_none(), "it depends on rows, which are not named here");

        std::fs::write(kept.path(), b"cut").unwrap();
        let message = format!("{:#}", again.load().err().unwrap());
        assert!(message.contains("train.checkpoint.safetensors") && message.contains("hint: remove"), "{message}");
        again.remove().unwrap();
        assert!(again.load().unwrap().is_none());
    }

    #[test]
    fn checkpoints_are_due_by_steps_or_by_what_they_cost() {
        let folder = tempfile::tempdir().unwrap();
        let mut kept = checkpoint(folder.path(), 1);
        assert_eq!([1, 2, 3, 4].map(|step| kept.is_due(step, Some(2))), [false, true, false, true]);
        assert!(!kept.is_due(2, None), "none is due at the beginning");
        kept.last = Instant::now().checked_sub(Duration::from_secs(20)).unwrap();
        assert!(kept.is_due(1, None));
        kept.cost = Duration::from_secs(1);
        assert!(!kept.is_due(1, None), "a second in twenty is too much");
    }
}
