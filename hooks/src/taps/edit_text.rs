//! Edits as text: `POINT[@TOKENS]: CHANGE`, a line in an experiment file or on a command line. Its tensors are in
//! safetensors files under the hook point's name, or in control vectors. Loading gives one [`Edit`] per hook point.
//!
//! ```text
//! blocks.3.hook_resid_post: add(cat.safetensors, 4)
//! blocks.*.hook_mlp_out@entity: zero
//! blocks.2.attn.hook_z@"Qwen": mean(other.safetensors)
//! blocks.1.hook_resid_post@positions(0..6): patch(other.safetensors)
//! ```

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_with::{DeserializeFromStr, SerializeDisplay};
use tch::Tensor;

use crate::chat::select::{Tokens, argument, split};
use crate::chat::tokens::{Sequence, unknown};
use crate::config::Config;
use crate::error::{Error, Result, malformed};
use crate::hook_point::HookPoint as P;
use crate::load::provenance::{Provenance, VectorFile};
use crate::taps::edit::{Change, Edit};

/// An edit as a line of text, before its tensors are read.
#[derive(Clone, Debug, PartialEq, SerializeDisplay, DeserializeFromStr)]
pub struct EditText {
    points: String,
    tokens: Option<Tokens>,
    change: PlannedChange,
}

/// A change with the paths of its tensors.
#[derive(Clone, Debug, PartialEq)]
enum PlannedChange {
    Add { file: PathBuf, coefficient: f64 },
    Replace(PathBuf),
    Mean(PathBuf),
    ProjectOut(PathBuf),
    Patch(PathBuf),
    Zero,
    Scale(f64),
}

const CHANGES: [&str; 7] =
    ["add(FILE, 4)", "replace(FILE)", "mean(FILE)", "zero", "scale(0.5)", "project_out(FILE)", "patch(FILE)"];

impl EditText {
    /// The syntax of an edit, for help texts.
    pub const SYNTAX: &'static str = "POINT[@TOKENS]: CHANGE, where CHANGE is add(FILE, 4), replace(FILE), mean(FILE), zero, \
                                      scale(0.5), project_out(FILE) or patch(FILE)";

    /// Whether it acts at some tokens only. A row of which only ids are known cannot have such an edit.
    pub fn names_tokens(&self) -> bool {
        self.tokens.is_some()
    }

    /// Refuses an edit that selects no token of this prompt.
    pub fn check(&self, prompt: &Sequence) -> Result<()> {
        let Some(tokens) = &self.tokens else { return Ok(()) };
        tokens.among(prompt, &format!("the edit {self}")).map(drop)
    }

    /// The file with its tensors, if it has any.
    pub fn file(&self) -> Option<&Path> {
        match &self.change {
            PlannedChange::Add { file, .. }
            | PlannedChange::Replace(file)
            | PlannedChange::Mean(file)
            | PlannedChange::ProjectOut(file)
            | PlannedChange::Patch(file) => Some(file),
            PlannedChange::Zero | PlannedChange::Scale(_) => None,
        }
    }

    /// Refuses hook points that the model does not have. The file is not opened.
    pub fn check_places(&self, model: &Config) -> Result<()> {
        let check = |at: P| Edit { at, tokens: None, change: Change::Zero }.check(model);
        P::select(&self.points, model.n_layers)?.into_iter().try_for_each(check)
    }

    /// Loads one edit per hook point, with the tensors of that name in the file. A file of another model, width or chat
    /// template is refused.
    pub fn load(&self, model: &Config, here: &Provenance) -> Result<Vec<Edit>> {
        let file = self.file().map(|file| VectorFile::read(file, here)).transpose()?;
        let points = P::select(&self.points, model.n_layers)?;
        // A tensor without a hook point's name is for the edit's only hook point.
        let bare = file.as_ref().filter(|_| points.len() == 1).and_then(VectorFile::bare);
        let tensor = |at: P| match (&bare, &file) {
            (Some(vector), _) => Ok(vector.shallow_clone()),
            (None, Some(file)) => file.get(&at.to_string()),
            (None, None) => Ok(Tensor::new()),
        };
        let mean = |at: P| file.as_ref().map_or_else(|| Ok(Tensor::new()), |file| file.mean(&at.to_string()));
        let edit = |at: P| -> Result<Edit> {
            let change = match &self.change {
                PlannedChange::Add { coefficient, .. } => {
                    Change::Add { vector: tensor(at)?, coefficient: *coefficient }
                }
                PlannedChange::Replace(_) => Change::Replace(tensor(at)?),
                PlannedChange::Mean(_) => Change::Replace(mean(at)?),
                PlannedChange::ProjectOut(_) => Change::ProjectOut(tensor(at)?),
                PlannedChange::Patch(path) => Change::Patch(of_one_row(&tensor(at)?, at, path)?),
                PlannedChange::Zero => Change::Zero,
                PlannedChange::Scale(factor) => Change::Scale(*factor),
            };
            let edit = Edit { at, tokens: self.tokens.clone(), change };
            edit.check(model)?;
            Ok(edit)
        };
        points.into_iter().map(edit).collect()
    }
}

/// The activations of one row, `[pos, ..]`, from `[1, pos, ..]`. Several rows are refused.
fn of_one_row(captured: &Tensor, at: P, path: &Path) -> Result<Tensor> {
    match captured.size()[..] {
        [1, _, ..] => Ok(captured.f_squeeze_dim(0)?),
        ref found => Err(malformed(
            path,
            format!("{at} has shape {found:?}, expected one row, [1, pos, ..], as undertone activations writes it"),
        )),
    }
}

impl fmt::Display for EditText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.points)?;
        if let Some(tokens) = &self.tokens {
            write!(f, "@{tokens}")?;
        }
        match &self.change {
            PlannedChange::Add { file, coefficient } => write!(f, ": add({}, {coefficient})", file.display()),
            PlannedChange::Replace(file) => write!(f, ": replace({})", file.display()),
            PlannedChange::Mean(file) => write!(f, ": mean({})", file.display()),
            PlannedChange::ProjectOut(file) => write!(f, ": project_out({})", file.display()),
            PlannedChange::Patch(file) => write!(f, ": patch({})", file.display()),
            PlannedChange::Zero => f.write_str(": zero"),
            PlannedChange::Scale(factor) => write!(f, ": scale({factor})"),
        }
    }
}

impl FromStr for EditText {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = |expected: &str| Error::invalid("an edit", expected.to_owned(), format!("{text:?}"));
        let [place, change] = split(text, &[':'])?[..] else { return Err(invalid(Self::SYNTAX)) };
        let (points, tokens) = match split(place, &['@'])?[..] {
            [points] => (points.trim(), None),
            [points, tokens] => (points.trim(), Some(tokens.parse()?)),
            _ => return Err(invalid("@ once, between hook point and tokens")),
        };
        // The point's name is checked now; whether the model has the block is checked on loading.
        points.replacen("blocks.*.", "blocks.0.", 1).parse::<P>()?;
        let change = change.trim();
        let number = |text: &str| {
            let number = text.trim().parse().ok().filter(|number: &f64| number.is_finite());
            number.ok_or_else(|| invalid("a finite number"))
        };
        let path = |inside: &str| match inside.trim() {
            "" => Err(invalid("the name of a safetensors file")),
            inside => Ok(PathBuf::from(inside)),
        };
        let change = if change == "zero" {
            PlannedChange::Zero
        } else if let Some(inside) = argument(change, "scale") {
            PlannedChange::Scale(number(inside)?)
        } else if let Some(inside) = argument(change, "add") {
            let (file, coefficient) = inside.rsplit_once(',').unwrap_or((inside, "1"));
            PlannedChange::Add { file: path(file)?, coefficient: number(coefficient)? }
        } else if let Some(inside) = argument(change, "replace") {
            PlannedChange::Replace(path(inside)?)
        } else if let Some(inside) = argument(change, "mean") {
            PlannedChange::Mean(path(inside)?)
        } else if let Some(inside) = argument(change, "project_out") {
            PlannedChange::ProjectOut(path(inside)?)
        } else if let Some(inside) = argument(change, "patch") {
            PlannedChange::Patch(path(inside)?)
        } else {
            return Err(unknown("change of an edit", change, &CHANGES));
        };
        Ok(Self { points: points.to_owned(), tokens, change })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tch::{Device, Kind};

    use super::*;
    use crate::load::control_vector;
    use crate::load::model_files::ModelFiles;
    use crate::load::tensor_file;

    #[test]
    fn the_text_is_read_back() {
        for text in [
            "blocks.3.hook_resid_post: add(cat.safetensors, 4)",
            "blocks.*.hook_mlp_out@entity: zero",
            "blocks.2.attn.hook_z@\"Qwen: @\"#2: mean(some folder/other.safetensors)",
            "hook_embed@positions(0..6)+user.content: patch(other.safetensors)",
            "blocks.0.attn.hook_pattern@not(gen): scale(-0.5)",
            "blocks.1.hook_resid_mid: project_out(a,b.safetensors)",
            "blocks.1.hook_attn_out: replace(a.safetensors)",
        ] {
            let planned: EditText = text.parse().unwrap();
            assert_eq!(planned.to_string(), text);
            assert_eq!(serde_json::from_str::<EditText>(&serde_json::to_string(&planned).unwrap()).unwrap(), planned);
        }
        assert_eq!(
            "hook_embed:add(v.safetensors)".parse::<EditText>().unwrap().to_string(),
            "hook_embed: add(v.safetensors, 1)"
        );
    }

    #[test]
    fn a_misspelt_edit_is_told_what_there_is() {
        let refused = |text: &str| text.parse::<EditText>().unwrap_err().to_string();
        for (text, part) in [
            ("blocks.0.hook_mlp_uot: zero", "the nearest name is blocks.0.hook_mlp_out"),
            ("blocks.*.hook_mlp_uot: zero", "the nearest name is blocks.0.hook_mlp_out"),
            ("blocks.0.hook_mlp_out@entty: zero", "the nearest is entity"),
            ("blocks.0.hook_mlp_out: zer", "the nearest is zero"),
            ("blocks.0.hook_mlp_out: scale(a)", "a finite number"),
            ("blocks.0.hook_mlp_out: scale(inf)", "a finite number"),
            ("blocks.0.hook_mlp_out: add()", "the name of a safetensors file"),
            ("blocks.0.hook_mlp_out", "POINT[@TOKENS]: CHANGE"),
            ("blocks.0.hook_mlp_out@a@b: zero", "@ once"),
        ] {
            assert!(refused(text).contains(part), "{text}: {}", refused(text));
        }
    }

    /// Writes tensors to a file, with the model's metadata, in which `other` replaces values.
    fn file(tensors: &[(&str, Tensor)], other: &[(&str, &str)]) -> (tempfile::TempDir, String) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let named: Vec<_> = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.shallow_clone())).collect();
        let mut metadata = Provenance::of(&ModelFiles::open("tiny-random").unwrap()).metadata();
        metadata.extend(other.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())));
        tensor_file::write(&path, &named, &metadata).unwrap();
        (folder, path.display().to_string())
    }

    fn load(text: &str) -> Result<Vec<Edit>> {
        let files = ModelFiles::open("tiny-random").unwrap();
        text.parse::<EditText>().unwrap().load(&files.config, &Provenance::of(&files))
    }

    #[test]
    fn tensors_are_read_under_the_hook_points_names_and_means_leave_padding_out() {
        let d_model = ModelFiles::open("tiny-random").unwrap().config.d_model;
        let row = |value: f64| Tensor::full([d_model], value, (Kind::Float, Device::Cpu));
        let captured = Tensor::stack(&[row(1.0), row(3.0), row(5.0), row(99.0)], 0).view([2, 2, d_model]);
        let (_folder, path) = file(&[("blocks.1.hook_resid_post", captured)], &[("lengths", "2,1")]);
        let edits = load(&format!("blocks.1.hook_resid_post: mean({path})")).unwrap();
        let Change::Replace(mean) = &edits[0].change else { panic!("{edits:?}") };
        assert_eq!(*mean, row(3.0), "of 1, 3 and 5, not of the padding");

        let error = load(&format!("blocks.*.hook_resid_post: mean({path})")).unwrap_err().to_string();
        assert!(error.contains("has no tensor blocks.0.hook_resid_post; it has blocks.1.hook_resid_post"), "{error}");
        let error = load(&format!("blocks.1.hook_resid_post: patch({path})")).unwrap_err().to_string();
        assert!(error.contains("expected one row, [1, pos, ..]"), "{error}");
        let error = load(&format!("blocks.1.hook_resid_post: replace({path})")).unwrap_err().to_string();
        assert!(error.contains(&format!("is [2, 2, {d_model}], expected [{d_model}]")), "{error}");
        let (_folder, path) = file(&[("blocks.1.hook_resid_post", row(1.0))], &[("lengths", "2,1")]);
        let error = load(&format!("blocks.1.hook_resid_post: mean({path})")).unwrap_err().to_string();
        assert!(error.contains("expected rows and tokens"), "{error}");
        let (_folder, path) = file(&[("blocks.1.hook_resid_post", row(1.0).view([1, 1, -1]))], &[("lengths", "2")]);
        let error = load(&format!("blocks.1.hook_resid_post: mean({path})")).unwrap_err().to_string();
        assert!(error.contains("its lengths are [2]"), "{error}");
    }

    #[test]
    fn control_vectors_and_bare_vectors_are_read_where_their_place_is_known() {
        let files = ModelFiles::open("tiny-random").unwrap();
        let vector = Tensor::arange(files.config.d_model, (Kind::Float, Device::Cpu));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cat.gguf");
        let write = |hint: &str, layer: usize| {
            let vectors = BTreeMap::from([(layer, vector.shallow_clone())]);
            control_vector::write(&path, hint, &vectors, &BTreeMap::new()).unwrap();
        };
        let added = |text: &str| {
            let edits = load(text).map_err(|error| error.to_string())?;
            let [Edit { change: Change::Add { vector: found, coefficient }, .. }] = &edits[..] else {
                panic!("{edits:?}")
            };
            assert!(*found == vector && coefficient.to_string() == "2");
            Ok::<_, String>(edits[0].at)
        };
        write("qwen2", 1);
        let path = path.display();
        assert_eq!(added(&format!("blocks.1.hook_resid_post: add({path}, 2)")), Ok(P::ResidPost(1)));
        let other = added(&format!("blocks.0.hook_resid_post: add({path}, 2)")).unwrap_err();
        assert!(
            other.contains("it has no tensor blocks.0.hook_resid_post; it has blocks.1.hook_resid_post"),
            "{other}"
        );
        write("llama", 1);
        let other = added(&format!("blocks.1.hook_resid_post: add({path}, 2)")).unwrap_err();
        assert!(
            other.contains("read from another model (architecture llama), not from tiny-random (qwen2)"),
            "{other}"
        );

        let (_folder, path) = file(&[("anything", vector.shallow_clone())], &[]);
        assert_eq!(added(&format!("blocks.0.hook_mlp_out: add({path}, 2)")), Ok(P::MlpOut(0)));
        let everywhere = added(&format!("blocks.*.hook_resid_post: add({path}, 2)")).unwrap_err();
        assert!(everywhere.contains("it has no tensor blocks.0.hook_resid_post; it has anything"), "{everywhere}");
    }

    #[test]
    fn tensors_of_another_model_width_or_template_are_refused() {
        let files = ModelFiles::open("tiny-random").unwrap();
        let vector = Tensor::ones([files.config.d_model], (Kind::Float, Device::Cpu));
        let of = |other: &[(&str, &str)]| {
            let (_folder, path) = file(&[("blocks.0.hook_resid_post", vector.shallow_clone())], other);
            load(&format!("blocks.0.hook_resid_post: add({path}, 2)")).map_err(|error| error.to_string())
        };
        assert_eq!(of(&[]).unwrap().len(), 1);
        for (key, value) in [("model_fingerprint", "f00"), ("d_model", "7"), ("chat_template", "c0ffee")] {
            let error = of(&[("model", "some/other"), (key, value)]).unwrap_err();
            assert!(error.contains(&format!("read from some/other ({key} {value}), not from tiny-random")), "{error}");
        }
        let nameless: BTreeMap<String, String> = BTreeMap::new();
        assert!(Provenance::of(&files).check("v", &nameless).is_ok(), "what a file does not say cannot be compared");
    }
}
