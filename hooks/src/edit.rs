//! Interventions: what is done to an activation at a hook point, at which tokens. In place of an activation h: h + c·v,
//! another value, zero, its mean, c·h, h without a direction, or what another run had there.
//!
//! A [`Planned`] edit is a line of text, `POINT[@TOKENS]: CHANGE`, that can stand in an experiment file and on a command
//! line; its tensors lie in safetensors files under the hook point's name. Loaded, it is an [`Edit`].
//!
//! ```text
//! blocks.3.hook_resid_post: add(cat.safetensors, 4)
//! blocks.*.hook_mlp_out@entity: zero
//! blocks.2.attn.hook_z@"Qwen": mean(other.safetensors)
//! blocks.1.hook_resid_post@positions(0..6): patch(other.safetensors)
//! ```

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::config::Config;
use crate::error::{Error, Result};
use crate::hook_point::HookPoint as P;
use crate::nn::wide;
use crate::provenance::{Provenance, TensorFile};
use crate::select::{Tokens, argument, split};
use crate::tap::{Hooks, Tap};
use crate::tokens::{Prompt, unknown};

/// A change of an activation, ready to be made.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Where.
    pub at: P,
    /// At which tokens (for scores and pattern: queries); `None` is all, generated ones included.
    pub tokens: Option<Tokens>,
    /// What is done.
    pub change: Change,
}

/// What is done to an activation h at a token. Tensors have the shape that the activation has at one token.
#[derive(Debug)]
pub enum Change {
    /// h + coefficient · vector.
    Add {
        /// The vector.
        vector: Tensor,
        /// Its factor.
        coefficient: f64,
    },
    /// Another value: a mean, for mean ablation.
    Replace(Tensor),
    /// Zero ablation.
    Zero,
    /// c · h.
    Scale(f64),
    /// h − (h·v̂) v̂, the direction v of any length but zero.
    ProjectOut(Tensor),
    /// What another run had at the same positions, `[pos, ..]`; never at generated tokens.
    Patch(Tensor),
}

impl Clone for Change {
    fn clone(&self) -> Self {
        match self {
            Self::Add { vector, coefficient } => {
                Self::Add { vector: vector.shallow_clone(), coefficient: *coefficient }
            }
            Self::Replace(value) => Self::Replace(value.shallow_clone()),
            Self::Zero => Self::Zero,
            Self::Scale(factor) => Self::Scale(*factor),
            Self::ProjectOut(direction) => Self::ProjectOut(direction.shallow_clone()),
            Self::Patch(source) => Self::Patch(source.shallow_clone()),
        }
    }
}

impl Edit {
    /// Adds `coefficient · vector` to the residual stream after a block, at every token.
    pub fn add(layer: usize, vector: &Tensor, coefficient: f64) -> Self {
        let change = Change::Add { vector: vector.shallow_clone(), coefficient };
        Self { at: P::ResidPost(layer), tokens: None, change }
    }

    /// Takes a direction out of the residual stream after a block, at every token.
    pub fn project_out(layer: usize, direction: &Tensor) -> Self {
        Self { at: P::ResidPost(layer), tokens: None, change: Change::ProjectOut(direction.shallow_clone()) }
    }

    /// The same at some tokens; `None` is all.
    #[must_use]
    pub fn at_tokens(self, tokens: Option<Tokens>) -> Self {
        Self { tokens, ..self }
    }

    /// Refuses what the model does not have, and tensors of another width.
    fn check(&self, model: &Config) -> Result<()> {
        let invalid = |what: String, expected: String, found: String| Err(Error::Invalid { what, expected, found });
        let at = self.at;
        if matches!(at, P::LnFinalScale | P::LnFinalNormalized | P::Logits) {
            let expected = "a hook point up to the last block".to_owned();
            return invalid("the place of an edit".to_owned(), expected, at.to_string());
        }
        if at.layer().is_some_and(|layer| layer >= model.n_layers) {
            let expected = format!("one of the model's {} blocks, from 0", model.n_layers);
            return invalid("the place of an edit".to_owned(), expected, at.to_string());
        }
        if matches!(at, P::QNormed(_) | P::KNormed(_)) && !model.qk_norm {
            let expected = "a hook point of this model, which does not norm queries and keys".to_owned();
            return invalid("the place of an edit".to_owned(), expected, at.to_string());
        }
        let (tensor, leading) = match &self.change {
            Change::Add { vector: tensor, .. } | Change::Replace(tensor) | Change::ProjectOut(tensor) => (tensor, 0),
            Change::Patch(tensor) => (tensor, 1),
            Change::Zero | Change::Scale(_) => return Ok(()),
        };
        let Some(expected) = at.token_shape(model) else {
            let expected = "zero or scale: what is there has a row for every query, not a vector for every token";
            return invalid(format!("the edit at {at}"), expected.to_owned(), "a tensor".to_owned());
        };
        let found = tensor.size();
        if found.len() < leading || found[leading..] != expected {
            let of_tokens = if leading == 1 { "[pos] and then " } else { "" };
            return invalid(
                format!("the shape of the tensor for the edit at {at}"),
                format!("{of_tokens}{expected:?}, as the model has it there"),
                format!("{found:?}"),
            );
        }
        if let Change::ProjectOut(direction) = &self.change
            && direction.f_norm()?.f_double_value(&[])? == 0.0
        {
            let expected = "a vector of some length".to_owned();
            return invalid(format!("the direction to take out at {at}"), expected, "zero".to_owned());
        }
        Ok(())
    }
}

/// An edit spelt out for the rows of a batch, as a tap.
pub(crate) struct EditTap {
    at: P,
    change: Change,
    tokens: Option<Tokens>,
    /// Per row and token, whether it is edited; `None` is all.
    chosen: Option<Vec<Vec<bool>>>,
    device: Device,
    now: Now,
}

/// Where an edit acts in the pass that is being run.
enum Now {
    Nowhere,
    Everywhere,
    At { chosen: Tensor, from: usize }, // [batch, pos, 1], bool; the position of the first token
}

impl EditTap {
    pub(crate) fn new(edit: &Edit, rows: &[&Prompt], model: &Config, device: Device, kind: Kind) -> Result<Self> {
        edit.check(model)?;
        let kind = wide(kind);
        // What another run had covers positions of the prompt alone.
        let tokens = match (&edit.tokens, &edit.change) {
            (None, Change::Patch(_)) => Some(Tokens::prompt()),
            (tokens, _) => tokens.clone(),
        };
        let named =
            || format!("the edit at {}@{}", edit.at, tokens.as_ref().map_or(String::new(), ToString::to_string));
        let chosen = tokens.as_ref().map(|tokens| rows.iter().map(|row| tokens.among(row, &named())).collect());
        let chosen: Option<Vec<Vec<bool>>> = chosen.transpose()?;
        let flat = |tensor: &Tensor| tensor.f_to_device(device)?.f_to_kind(kind)?.f_flatten(0, -1);
        let change = match &edit.change {
            Change::Add { vector, coefficient } => {
                Change::Add { vector: flat(vector)?.f_mul_scalar(*coefficient)?, coefficient: 1.0 }
            }
            Change::Replace(value) => Change::Replace(flat(value)?),
            Change::ProjectOut(direction) => {
                let direction = flat(direction)?;
                Change::ProjectOut(direction.f_div(&direction.f_norm()?)?)
            }
            Change::Patch(source) => {
                let n = source.size()[0];
                let last = chosen.iter().flatten().filter_map(|row| row.iter().rposition(|chosen| *chosen)).max();
                if let Some(last) = last.filter(|last| *last as i64 >= n) {
                    return Err(Error::Invalid {
                        what: format!("position {last} of {}", named()),
                        expected: format!("one of 0 to {}, the positions that the other run has", n - 1),
                        found: "beyond the other run".to_owned(),
                    });
                }
                let width = rows.iter().map(|row| row.ids.len()).max().unwrap_or(0) as i64;
                let source = source.f_to_device(device)?.f_to_kind(kind)?.f_reshape([n, -1])?;
                let padded = Tensor::f_zeros([width.max(n), source.size()[1]], (kind, device))?;
                padded.f_narrow(0, 0, n)?.f_copy_(&source)?;
                Change::Patch(padded)
            }
            Change::Zero => Change::Zero,
            Change::Scale(factor) => Change::Scale(*factor),
        };
        Ok(Self { at: edit.at, change, tokens, chosen, device, now: Now::Nowhere })
    }

    pub(crate) fn hook<'a>(hooks: Hooks<'a>, edit: &'a mut Self) -> Hooks<'a> {
        hooks.on([edit.at], edit)
    }

    /// How many positions at the start are edited alike in all rows.
    pub(crate) fn alike(&self) -> usize {
        self.chosen.as_deref().map_or(usize::MAX, alike)
    }

    /// Points the edit at some positions of the first rows.
    pub(crate) fn point(&mut self, rows: usize, at: &Range<usize>) -> Result<()> {
        self.now = match &self.chosen {
            None => Now::Everywhere,
            Some(chosen) => {
                let flat = chosen[..rows].iter().flat_map(|row| at.clone().map(|pos| row.get(pos) == Some(&true)));
                let flat = Tensor::f_from_slice(&flat.collect::<Vec<bool>>())?;
                let chosen = flat.f_view([rows as i64, at.len() as i64, 1])?.f_to_device(self.device)?;
                Now::At { chosen, from: at.start }
            }
        };
        Ok(())
    }

    /// Points the edit at one generated token per row.
    pub(crate) fn point_at_generated(&mut self, ids: &[i64]) -> Result<()> {
        let has = |id: &i64| self.tokens.as_ref().is_none_or(|tokens| tokens.has_generated(*id));
        let chosen: Vec<bool> = ids.iter().map(|id| has(id) && !matches!(self.change, Change::Patch(_))).collect();
        self.now = if chosen.iter().all(|chosen| *chosen) {
            Now::Everywhere
        } else if chosen.iter().all(|chosen| !*chosen) {
            Now::Nowhere
        } else {
            let chosen = Tensor::f_from_slice(&chosen)?.f_view([-1, 1, 1])?.f_to_device(self.device)?;
            Now::At { chosen, from: 0 }
        };
        Ok(())
    }
}

/// How many positions at the start are the same in all rows.
pub(crate) fn alike<T: PartialEq>(rows: &[Vec<T>]) -> usize {
    let [first, others @ ..] = rows else { return usize::MAX };
    if others.is_empty() {
        return usize::MAX;
    }
    (0..first.len()).take_while(|at| others.iter().all(|row| row.get(*at) == first.get(*at))).count()
}

impl Tap for EditTap {
    fn tap(&mut self, at: P, x: Tensor) -> Result<Tensor> {
        let (chosen, from) = match &self.now {
            Now::Nowhere => return Ok(x),
            Now::Everywhere => (None, 0),
            Now::At { chosen, from } => (Some(chosen), *from),
        };
        // Scores and pattern are [batch, n_heads, query, key]: their tokens are the queries.
        let by_query = matches!(at, P::AttnScores(_) | P::Pattern(_));
        let by_token = if by_query { x.f_transpose(1, 2)? } else { x.shallow_clone() };
        let shape = by_token.size();
        let h = by_token.f_reshape([shape[0], shape[1], -1])?.f_to_kind(wide(x.kind()))?; // [batch, pos, width]
        let changed = match &self.change {
            Change::Add { vector, .. } => h.f_add(vector)?,
            Change::Replace(value) => value.f_expand_as(&h)?,
            Change::Zero => h.f_zeros_like()?,
            Change::Scale(factor) => h.f_mul_scalar(*factor)?,
            Change::ProjectOut(unit) => h.f_add(&h.f_matmul(unit)?.f_unsqueeze(-1)?.f_mul(unit)?.f_neg()?)?,
            Change::Patch(source) => source.f_narrow(0, from as i64, shape[1])?.f_unsqueeze(0)?.f_expand_as(&h)?,
        };
        let changed = match chosen {
            Some(chosen) => changed.f_where_self(chosen, &h)?,
            None => changed,
        };
        // What may not be attended to stays so: only scores that count are changed.
        let changed = match at {
            P::AttnScores(_) => changed.f_masked_fill(&h.f_isneginf()?, f64::NEG_INFINITY)?,
            _ => changed,
        };
        let changed = changed.f_reshape(shape.as_slice())?.f_to_kind(x.kind())?;
        Ok(if by_query { changed.f_transpose(1, 2)? } else { changed })
    }
}

/// An edit as a line of text, before its tensors are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Planned {
    points: String,
    tokens: Option<Tokens>,
    change: PlannedChange,
}

/// A change whose tensors lie in files.
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

impl Planned {
    /// How an edit is written, for help texts.
    pub const SYNTAX: &'static str = "POINT[@TOKENS]: CHANGE, where CHANGE is add(FILE, 4), replace(FILE), mean(FILE), zero, \
                                      scale(0.5), project_out(FILE) or patch(FILE)";

    /// Whether it acts at some tokens only, which a row given by its ids cannot tell apart.
    pub fn names_tokens(&self) -> bool {
        self.tokens.is_some()
    }

    /// The edits, one per hook point, with the tensors that the files hold under its name. A file of another model, width
    /// or chat template is refused.
    pub fn load(&self, model: &Config, here: &Provenance) -> Result<Vec<Edit>> {
        let file = match &self.change {
            PlannedChange::Add { file, .. }
            | PlannedChange::Replace(file)
            | PlannedChange::Mean(file)
            | PlannedChange::ProjectOut(file)
            | PlannedChange::Patch(file) => Some(TensorFile::read(file, here)?),
            PlannedChange::Zero | PlannedChange::Scale(_) => None,
        };
        let tensor = |at: P| file.as_ref().map_or_else(|| Ok(Tensor::new()), |file| file.get(&at.to_string()));
        let edit = |at: P| -> Result<Edit> {
            let change = match &self.change {
                PlannedChange::Add { coefficient, .. } => {
                    Change::Add { vector: tensor(at)?, coefficient: *coefficient }
                }
                PlannedChange::Replace(_) => Change::Replace(tensor(at)?),
                PlannedChange::Mean(_) => Change::Replace(match &file {
                    Some(file) => file.mean(&at.to_string())?,
                    None => Tensor::new(),
                }),
                PlannedChange::ProjectOut(_) => Change::ProjectOut(tensor(at)?),
                PlannedChange::Patch(path) => Change::Patch(of_one_row(&tensor(at)?, at, path)?),
                PlannedChange::Zero => Change::Zero,
                PlannedChange::Scale(factor) => Change::Scale(*factor),
            };
            let edit = Edit { at, tokens: self.tokens.clone(), change };
            edit.check(model)?;
            Ok(edit)
        };
        P::select(&self.points, model.n_layers)?.into_iter().map(edit).collect()
    }
}

/// `[pos, ..]` of what was captured of one row, `[1, pos, ..]`.
fn of_one_row(captured: &Tensor, at: P, path: &Path) -> Result<Tensor> {
    match captured.size()[..] {
        [1, _, ..] => Ok(captured.f_squeeze_dim(0)?),
        ref found => Err(Error::Malformed {
            path: path.to_owned(),
            problem: format!(
                "{at} has shape {found:?}, expected one row, [1, pos, ..], as undertone activations writes it"
            ),
        }),
    }
}

impl fmt::Display for Planned {
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

impl FromStr for Planned {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let invalid = |expected: &str| Error::Invalid {
            what: "an edit".to_owned(),
            expected: expected.to_owned(),
            found: format!("{text:?}"),
        };
        let [place, change] = split(text, &[':'])?[..] else { return Err(invalid(Self::SYNTAX)) };
        let (points, tokens) = match split(place, &['@'])?[..] {
            [points] => (points.trim(), None),
            [points, tokens] => (points.trim(), Some(tokens.parse()?)),
            _ => return Err(invalid("@ once, between hook point and tokens")),
        };
        // Its name is asked for now, and whether the model has the block when it is loaded.
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
            let known = [
                "add(FILE, 4)",
                "replace(FILE)",
                "mean(FILE)",
                "zero",
                "scale(0.5)",
                "project_out(FILE)",
                "patch(FILE)",
            ];
            return Err(unknown("change of an edit", change, &known));
        };
        Ok(Self { points: points.to_owned(), tokens, change })
    }
}

impl From<Planned> for String {
    fn from(edit: Planned) -> Self {
        edit.to_string()
    }
}

impl TryFrom<String> for Planned {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model_files::ModelFiles;
    use crate::tensor_file;

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
            let planned: Planned = text.parse().unwrap();
            assert_eq!(planned.to_string(), text);
            assert_eq!(serde_json::from_str::<Planned>(&serde_json::to_string(&planned).unwrap()).unwrap(), planned);
        }
        assert_eq!(
            "hook_embed:add(v.safetensors)".parse::<Planned>().unwrap().to_string(),
            "hook_embed: add(v.safetensors, 1)"
        );
    }

    #[test]
    fn a_misspelt_edit_is_told_what_there_is() {
        let refused = |text: &str| text.parse::<Planned>().unwrap_err().to_string();
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

    /// Tensors on disk, with metadata in place of the model's own where there is any.
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
        text.parse::<Planned>().unwrap().load(&files.config, &Provenance::of(&files))
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
