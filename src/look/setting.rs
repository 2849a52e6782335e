//! What the page is set to, as a value: a chat, and what the model is run with. The page's address holds it, and so do
//! the command and the lines of an experiment that give the same numbers.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use hooks::Gate;
use serde::{Deserialize, Serialize};

use crate::experiment::Dtype;

/// A chat, and the adapter, gate and direction that the model is asked with.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// The name of the student whose adapter acts.
    pub student: String,
    /// The system prompt; `None` is the default of the model's template, an empty text an empty block.
    #[serde(default)]
    pub system: Option<String>,
    /// The user's text.
    pub user: String,
    /// Where and how strongly the adapter acts.
    #[serde(default)]
    pub gate: Gate,
    /// A multiple of the run's learned direction that is added after a block, at every token.
    #[serde(default)]
    pub steer: Option<Steer>,
}

/// A direction that is added after a block.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Steer {
    /// The block.
    pub layer: usize,
    /// The factor on the direction.
    pub coefficient: f64,
}

/// The files and words that a setting's command names.
pub struct Named<'a> {
    /// The model as the experiment names it.
    pub model: &'a str,
    /// The dtype that it is loaded in.
    pub dtype: Dtype,
    /// The device as the experiment names it.
    pub device: &'a str,
    /// The folder of the student's adapter.
    pub adapter: &'a Path,
    /// The file of the run's directions.
    pub vectors: PathBuf,
    /// The target, then the other members of its category.
    pub words: &'a [String],
}

impl Setting {
    /// The command that prints this setting's numbers, for a POSIX shell.
    pub fn command(&self, named: &Named<'_>) -> Result<String> {
        let Named { model, dtype, device, adapter, vectors, words } = named;
        let mut line = vec!["undertone".to_owned(), "ask".to_owned()];
        let mut push = |option: &str, value: &str| -> Result<()> {
            let quoted = shlex::try_quote(value).with_context(|| format!("{option} {value:?}"))?;
            // A value that begins with a dash would be taken for an option.
            if value.starts_with('-') {
                line.push(format!("{option}={quoted}"));
            } else {
                line.extend([option.to_owned(), quoted.into_owned()]);
            }
            Ok(())
        };
        push("--model", model)?;
        if *dtype == Dtype::Bf16 {
            push("--dtype", "bf16")?;
        }
        if *device != "cpu" {
            push("--device", device)?;
        }
        push("--adapter", &adapter.display().to_string())?;
        if let Some(system) = &self.system {
            push("--system", system)?;
        }
        push("--user", &self.user)?;
        if !self.gate.is_everywhere() {
            push("--gate", &self.gate.to_string())?;
        }
        if let Some(Steer { layer, coefficient }) = self.steer {
            push("--steer", &format!("{}:{coefficient}@{layer}", vectors.display()))?;
        }
        push("--words", &words.join(","))?;
        Ok(line.join(" "))
    }

    /// The lines of an experiment that measure this gate, or this direction on base and students, over its questions;
    /// empty if both are set, since an experiment measures them apart.
    pub fn experiment(&self, named: &Named<'_>) -> Result<String> {
        let mut lines = String::new();
        if !self.gate.is_everywhere() && self.steer.is_some() {
            return Ok(lines);
        }
        if !self.gate.is_everywhere() {
            let gates = toml::Value::from(vec![Gate::EVERYWHERE.to_string(), self.gate.to_string()]);
            writeln!(lines, "[measure.token_ablation]\ngates = {gates}")?;
        }
        if let Some(Steer { layer, coefficient }) = self.steer {
            let edit = format!("blocks.{layer}.hook_resid_post: add({}, {coefficient})", named.vectors.display());
            let edits = toml::Value::from(vec![edit]);
            writeln!(lines, "[measure.interventions.edits]\n\"direction after block {layer}\" = {edits}")?;
        }
        Ok(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(words: &[String]) -> Named<'_> {
        let vectors = PathBuf::from("runs/demo/direction/vectors.safetensors");
        let adapter = Path::new("runs/it's/adapter");
        Named { model: "pocket", dtype: Dtype::F32, device: "cpu", adapter, vectors, words }
    }

    #[test]
    fn a_command_has_what_differs_from_the_plain_student_in_quotes() {
        let words = ["cat".to_owned(), "sea lion".to_owned()];
        let (student, user) = ("student".to_owned(), "It's $HOME?".to_owned());
        let plain = Setting { student, system: None, user, gate: Gate::EVERYWHERE, steer: None };
        let line = plain.command(&named(&words)).unwrap();
        let split = shlex::split(&line).unwrap();
        let expected = ["undertone", "ask", "--model", "pocket", "--adapter", "runs/it's/adapter", "--user"];
        assert_eq!(split[..7], expected);
        assert_eq!(split[7..], ["It's $HOME?", "--words", "cat,sea lion"]);
        assert_eq!(plain.experiment(&named(&words)).unwrap(), "");

        let gate: Gate = "only:\"Qwen\"*layers(0..2)*0.5".parse().unwrap();
        let steer = Some(Steer { layer: 1, coefficient: -2.5 });
        let set = Setting { system: Some(String::new()), gate, steer, ..plain };
        let split = shlex::split(&set.command(&named(&words)).unwrap()).unwrap();
        let tail = ["--system", "", "--user", "It's $HOME?", "--gate", "only:\"Qwen\"*layers(0..2)*0.5", "--steer"];
        assert_eq!(split[6..13], tail);
        assert_eq!(split[13], "runs/demo/direction/vectors.safetensors:-2.5@1");
        assert_eq!(set.experiment(&named(&words)).unwrap(), "", "an experiment measures the two apart");
        let gated = Setting { steer: None, ..set.clone() };
        let lines: toml::Table = gated.experiment(&named(&words)).unwrap().parse().unwrap();
        assert_eq!(lines["measure"]["token_ablation"]["gates"][1].as_str(), Some("only:\"Qwen\"*layers(0..2)*0.5"));
        let steered = Setting { gate: Gate::EVERYWHERE, ..set.clone() };
        let lines: toml::Table = steered.experiment(&named(&words)).unwrap().parse().unwrap();
        let edit = &lines["measure"]["interventions"]["edits"]["direction after block 1"][0];
        let expected = "blocks.1.hook_resid_post: add(runs/demo/direction/vectors.safetensors, -2.5)";
        assert_eq!(edit.as_str(), Some(expected));
    }

    #[test]
    fn a_command_names_dtype_and_device_and_takes_a_dash_for_text() {
        let words = ["cat".to_owned()];
        let (student, user) = ("student".to_owned(), "-5 degrees?".to_owned());
        let set = Setting { student, system: None, user, gate: Gate::EVERYWHERE, steer: None };
        let named = Named { dtype: Dtype::Bf16, device: "cuda", ..named(&words) };
        let split = shlex::split(&set.command(&named).unwrap()).unwrap();
        assert_eq!(split[4..8], ["--dtype", "bf16", "--device", "cuda"]);
        assert!(split.contains(&"--user=-5 degrees?".to_owned()), "{split:?}");
    }

    #[test]
    fn a_setting_is_read_back_and_a_misspelt_key_refused() {
        let text = r#"{"student":"student","user":"Hi","gate":"except:entity","steer":{"layer":1,"coefficient":2.0}}"#;
        let set: Setting = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::from_str::<Setting>(&serde_json::to_string(&set).unwrap()).unwrap(), set);
        assert_eq!((set.system, set.gate.to_string().as_str()), (None, "except:entity"));
        let wrong = serde_json::from_str::<Setting>(r#"{"student":"student","user":"Hi","gates":"nowhere"}"#);
        assert!(wrong.unwrap_err().to_string().contains("gates"));
        let wrong = serde_json::from_str::<Setting>(r#"{"student":"student","user":"Hi","gate":"only:Qwen"}"#);
        assert!(wrong.unwrap_err().to_string().contains("unknown token class"));
    }
}
