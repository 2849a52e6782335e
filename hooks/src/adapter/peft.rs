//! Adapters on disk exactly as PEFT writes them: `adapter_config.json` and `adapter_model.safetensors`. An unsupported
//! setting is refused by its name, and so is a file with a missing, unused or non-finite tensor. Anything unusual that
//! is accepted leaves a remark in the adapter.

mod keys;
mod modules;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::adapter::lora::{Adapter, LoraConfig, LoraPair, no_stack};
use crate::config::Config;
use crate::error::{Error, Result, few};
use crate::load::files;
use crate::load::hub::adapter_folder;
use crate::load::tensor_file;
use crate::load::weights::Weights;
use crate::proj::Proj;
use keys::PeftConfig;
use names::{Factor, FactorAt};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";

impl LoraConfig {
    /// Reads the configuration in an adapter folder as PEFT writes it, without the patterns for single modules.
    pub fn read(dir: &Path) -> Result<Self> {
        let dir = &adapter_folder(dir)?;
        let path = dir.join(CONFIG);
        let config = PeftConfig::parse(&files::read(&path)?, &path)?;
        if let Some(known) = config.lora_of_any() {
            return Ok(known);
        }
        let names = Weights::safetensors(&[dir.join(TENSORS)])?.names();
        let place = |name: &String| names::factor_at(name).map(|(layer, proj, _)| (layer, proj));
        let places: BTreeSet<(usize, Proj)> = names.iter().filter_map(place).collect();
        Ok(config.lora(&places.into_iter().collect::<Vec<_>>(), None))
    }

    /// Reads the bytes of an `adapter_config.json`; `path` is for messages. An error if the modules follow only from
    /// the tensors.
    pub fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let problem =
            "its modules are an expression that only Python reads, expected names or the folder with the tensors";
        let refused = || Error::Adapter { path: path.to_owned(), problem: problem.to_owned() };
        PeftConfig::parse(bytes, path)?.lora_of_any().ok_or_else(refused)
    }
}

impl Adapter {
    /// Reads an adapter for a model of the given sizes: a folder as PEFT writes it, or a hub id.
    pub fn load(dir: &Path, model: &Config, device: Device) -> Result<Self> {
        Self::read(dir, model, device, None)
    }

    /// Reads an adapter. With `base`, the base's weights by name, embeddings or a head saved with the LoRA are accepted
    /// if they equal the base's.
    pub(crate) fn read(
        dir: &Path,
        model: &Config,
        device: Device,
        base: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<Self> {
        let dir = &adapter_folder(dir)?;
        let path = dir.join(CONFIG);
        if !path.exists() {
            return Err(no_adapter(dir));
        }
        let peft = PeftConfig::parse(&files::read(&path)?, &path)?;
        let beyond = peft.check(model)?;
        let tensors = dir.join(TENSORS);
        if let Some(pickle) = files::pickle(dir).filter(|_| !tensors.exists()) {
            let problem = format!("there is no {TENSORS} in it, but {pickle}; {}", files::NO_PICKLE);
            return Err(Error::Adapter { path: dir.to_owned(), problem }.with_hint(files::PICKLE_HINT));
        }

        let file = AdapterFile { weights: Weights::safetensors(std::slice::from_ref(&tensors))?, path: tensors };
        let Sorted { pairs, rest, mut remarks } = file.sorted(&peft, model)?;
        remarks.extend(file.beside(&rest, &peft.modules_to_save, base)?);
        let modules: Vec<String> = pairs.iter().map(|pair| module(pair.layer, pair.proj)).collect();
        let (ranks, of_ranks) = peft.ranks.resolve(&modules);
        let (alphas, of_alphas) = peft.alphas.resolve(&modules);

        let places: Vec<(usize, Proj)> = pairs.iter().map(|pair| (pair.layer, pair.proj)).collect();
        let config = peft.lora(&places, Some(model.n_layers));
        let mut adapter = Self::empty(config.clone(), model.n_layers);
        for ((pair, rank), alpha) in pairs.iter().zip(ranks).zip(alphas) {
            let (rank, alpha) = (rank.unwrap_or(config.rank), alpha.unwrap_or(config.alpha));
            let (d_in, d_out) = pair.proj.widths(model);
            let tensors = file.weights.root(Kind::Float, device);
            let a = tensors.get(&pair.a, &[rank, d_in])?;
            let b = tensors.get(&pair.b, &[d_out, rank])?;
            let scaling = config.scaling(rank, alpha);
            let factors = LoraPair { a, b, scaling, scalings: None };
            if !factors.has_finite_norm()? {
                let problem =
                    format!("‖ΔW‖ of {} and {} is not finite, expected a product that f32 can hold", pair.a, pair.b);
                let hint = "go back to a checkpoint from before the training diverged";
                return Err(file.refused(problem).with_hint(hint));
            }
            adapter.set(pair.layer, pair.proj, factors);
        }
        let zero = adapter.is_zero()?.then(|| ZERO.to_owned());
        adapter.remarks.extend(zero);
        adapter.remarks.extend(peft.remarks.into_iter().chain(beyond).chain(remarks).chain(of_ranks).chain(of_alphas));
        Ok(adapter)
    }

    /// Writes the adapter as PEFT does. `base_model` is the name that PEFT will load the base by. A stack is refused.
    pub fn save(&self, dir: &Path, base_model: &str) -> Result<()> {
        if let Some(n) = self.n_stacked() {
            return Err(no_stack(&format!("{}", dir.join(TENSORS).display()), n));
        }
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        tensor_file::write(&dir.join(TENSORS), &self.parameters(), &metadata)?;
        let config = serde_json::to_string_pretty(&self.peft_config(base_model)).unwrap_or_default();
        files::write_atomic(&dir.join(CONFIG), config.as_bytes())
    }

    /// `adapter_config.json`, with every key that affects PEFT's computation. A rank or scaling that differs from the
    /// configuration's (in an adapter read with patterns) is written as a pattern again; modules are written by their
    /// whole paths if blocks have different ones.
    fn peft_config(&self, base_model: &str) -> Value {
        let c = &self.config;
        let mut rank_pattern = serde_json::Map::new();
        let mut alpha_pattern = serde_json::Map::new();
        for (layer, proj, pair) in self.pairs() {
            let (module, rank) = (module(layer, proj), pair.a.size()[0]);
            if rank != c.rank {
                rank_pattern.insert(module.clone(), json!(rank));
            }
            let alpha = pair.scaling / c.scaling(rank, 1.0);
            if (alpha - c.alpha).abs() > 1e-9 * c.alpha {
                alpha_pattern.insert(module, whole(alpha));
            }
        }
        let blocks: BTreeSet<usize> = self.pairs().map(|(layer, ..)| layer).collect();
        let target_modules = if self.pairs().count() == blocks.len() * c.target_modules.len() {
            json!(c.target_modules)
        } else {
            json!(self.pairs().map(|(layer, proj, _)| module(layer, proj)).collect::<Vec<_>>())
        };
        json!({
            "alpha_pattern": alpha_pattern,
            "auto_mapping": null,
            "base_model_name_or_path": base_model,
            "bias": "none",
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": c.layers,
            "lora_alpha": whole(c.alpha),
            "lora_bias": false,
            "lora_dropout": c.dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": c.rank,
            "rank_pattern": rank_pattern,
            "revision": null,
            "target_modules": target_modules,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": c.use_rslora,
        })
    }
}

/// The remark on an adapter that is in the state before its first training step.
const ZERO: &str = "it changes nothing: A or B is zero at each of its modules, as before training";

struct AdapterFile {
    path: PathBuf,
    weights: Weights,
}

/// The names that a projection's two tensors have in the file.
struct PairNames {
    layer: usize,
    proj: Proj,
    a: String,
    b: String,
}

/// The names of a file's tensors, sorted by purpose.
struct Sorted {
    pairs: Vec<PairNames>,
    /// Tensors of the embeddings and the head.
    rest: Vec<String>,
    remarks: Vec<String>,
}

impl AdapterFile {
    fn refused(&self, problem: String) -> Error {
        Error::Adapter { path: self.path.clone(), problem }
    }

    /// Finds the block, projection and factor of each tensor. Refuses a file in which a tensor is missing, double or
    /// unused.
    fn sorted(&self, peft: &PeftConfig, model: &Config) -> Result<Sorted> {
        let names = self.weights.names();
        let mut by_place: BTreeMap<FactorAt, String> = BTreeMap::new();
        let (mut rest, mut unused) = (vec![], vec![]);
        for name in names.iter().cloned() {
            match names::factor_at(&name) {
                Some(place) => {
                    if let Some(other) = by_place.insert(place, name.clone()) {
                        let problem = format!("{other} and {name} are the same tensor, expected one of them");
                        return Err(self.refused(problem));
                    }
                }
                None if names::of_base(&name).is_some() => rest.push(name),
                None => unused.push(name),
            }
        }
        if let Some((name, (part, whose))) = names.iter().find_map(|name| Some((name, names::wrapper(name)?))) {
            let n = names.iter().filter(|name| names::wrapper(name).is_some()).count();
            let problem = format!(
                "{n} of its {} tensors have {part} in their names, which is {whose}'s, such as {name}",
                names.len()
            );
            let hint = "take it out of every name, or save the model that is inside of the wrapper";
            return Err(self.refused(problem).with_hint(hint));
        }
        let renamed = by_place.iter().find(|(place, name)| **name != names::name(**place));
        let remarks = renamed.map(|(place, name)| {
            format!("its tensors are named like {name}, and read as what PEFT names {}", names::name(*place))
        });

        let (mut pairs, mut missing) = (vec![], vec![]);
        for (layer, proj) in (0..model.n_layers).flat_map(|layer| Proj::ALL.map(|proj| (layer, proj))) {
            let places = [Factor::A, Factor::B].map(|factor| (layer, proj, factor));
            let are_there = || places.iter().any(|place| by_place.contains_key(place));
            if !peft.targets.contain(layer, proj).unwrap_or_else(are_there) {
                continue;
            }
            match places.map(|place| by_place.remove(&place).ok_or_else(|| names::name(place))) {
                [Ok(a), Ok(b)] => pairs.push(PairNames { layer, proj, a, b }),
                factors => missing.extend(factors.into_iter().filter_map(std::result::Result::err)),
            }
        }
        unused.extend(by_place.into_values());
        if missing.is_empty() && unused.is_empty() && !pairs.is_empty() {
            return Ok(Sorted { pairs, rest, remarks: remarks.into_iter().collect() });
        }
        Err(self.misfit(&names, &missing, &unused))
    }

    fn misfit(&self, names: &[String], missing: &[String], unused: &[String]) -> Error {
        let beginning = names::common_beginning(names);
        let is_peft_s = beginning.is_empty() || beginning.starts_with("base_model.model.model.layers.");
        let all_begin = (names.len() == unused.len() && !is_peft_s).then(|| format!("; all begin with {beginning}"));
        let meaning = unused.iter().find_map(|name| names::meaning(name)).map(|meaning| format!("; {meaning}"));
        let problem = format!(
            "the tensors do not fit {CONFIG}; missing: {}; unused: {}{}{}",
            few(missing),
            few(unused),
            all_begin.unwrap_or_default(),
            meaning.unwrap_or_default()
        );
        self.refused(problem)
    }

    /// Remarks on embeddings and head saved with the LoRA. Refuses them unless they equal the base's.
    fn beside(
        &self,
        rest: &[String],
        to_save: &[String],
        base: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<Vec<String>> {
        let is_there = |module: &String| {
            rest.iter()
                .filter_map(|name| names::of_base(name))
                .any(|name| name.strip_suffix(".weight").is_some_and(|path| modules::ends(path, module)))
        };
        if !to_save.iter().all(is_there) {
            return Err(keys::saved_whole(to_save).into_error(|problem| self.refused(problem)));
        }
        rest.iter().map(|name| self.same_as_base(name, base)).collect()
    }

    /// The remark that a tensor equals the base's, or an error if it does not.
    fn same_as_base(&self, name: &str, base: Option<&BTreeMap<String, Tensor>>) -> Result<String> {
        let refused = |found: &str| {
            let why = format!("{name} lies beside the LoRA and {found}: a change of the base that no gate can switch");
            self.refused(why).with_hint(keys::MERGE)
        };
        let Some(base) = base else { return Err(refused("is not compared with the base's")) };
        let own = names::of_base(name).and_then(|own| base.get(own).or_else(|| base.get("model.embed_tokens.weight")));
        let (Some(own), Some(shape)) = (own, self.weights.shape(name)) else {
            return Err(refused("has no twin in it"));
        };
        let (ours, theirs) = (own.size(), shape);
        if theirs.len() != 2 || theirs[1] != ours[1] || theirs[0] > ours[0] {
            return Err(refused(&format!("has the shape {theirs:?}, where the base's is {ours:?}")));
        }
        let theirs = self.weights.root(Kind::Float, own.device()).get(name, &theirs)?;
        let ours = own.f_narrow(0, 0, theirs.size()[0])?.f_to_kind(Kind::Float)?;
        let differ = theirs.f_ne_tensor(&ours)?.f_any_dim(1, false)?.f_sum(Kind::Int64)?.f_int64_value(&[])?;
        if differ > 0 {
            return Err(refused(&format!("differs from the base's in {differ} of {} rows", theirs.size()[0])));
        }
        Ok(format!("{name} lies beside the LoRA and is the base's own, so it is passed over"))
    }
}

/// The error for a folder that is not an adapter's. It lists the adapters inside the folder.
fn no_adapter(dir: &Path) -> Error {
    let problem = format!("there is no {CONFIG} in it, expected an adapter's folder");
    Error::Adapter { path: dir.to_owned(), problem }.with_hint(match files::folders_with(dir, CONFIG).as_slice() {
        [] => "that of a run is RUN/adapter".to_owned(),
        inner => format!("folders in it that have one are {}", few(inner)),
    })
}

/// A projection's path in the model.
fn module(layer: usize, proj: Proj) -> String {
    format!("model.layers.{layer}.{}", proj.path())
}

/// A number as PEFT writes it: as an integer if it is one.
fn whole(number: f64) -> Value {
    if number.fract() == 0.0 && number.abs() < 1e15 { json!(number as i64) } else { json!(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &str = "{\"peft_type\":\"LORA\",\"target_modules\":[\"q_proj\"],\"r\":1}";

    fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, bytes) in files {
            files::write_atomic(&folder.path().join(name), bytes).unwrap();
        }
        folder
    }

    fn refused(folder: &Path) -> String {
        Adapter::load(folder, &crate::load::tiny_random::config(100), Device::Cpu).unwrap_err().to_string()
    }

    #[test]
    fn a_folder_of_pickles_is_told_from_an_empty_one() {
        let dir = folder(&[(CONFIG, PLAIN.as_bytes())]);
        let message = refused(dir.path());
        assert!(message.contains("adapter_model.safetensors: No such file"), "{message}");
        files::write_atomic(&dir.path().join("adapter_model.bin"), b"\x80\x02").unwrap();
        let message = refused(dir.path());
        assert!(message.contains("but adapter_model.bin; a pickle runs the code that is in it"), "{message}");
    }

    #[test]
    fn what_is_no_adapter_s_folder_is_told_with_what_it_is() {
        let empty = folder(&[]);
        let message = refused(empty.path());
        assert!(message.ends_with("expected an adapter's folder; hint: that of a run is RUN/adapter"), "{message}");
        let model = folder(&[("config.json", b"{}")]);
        let message = refused(model.path());
        assert!(message.contains("it is a model, not an adapter; hint: --model "), "{message}");
        let checkpoints: Vec<(String, &[u8])> =
            [5, 10].map(|step| (format!("checkpoint-{step}/{CONFIG}"), PLAIN.as_bytes())).to_vec();
        let checkpoints: Vec<(&str, &[u8])> = checkpoints.iter().map(|(name, bytes)| (name.as_str(), *bytes)).collect();
        let outside = folder(&checkpoints);
        let message = refused(outside.path());
        assert!(message.ends_with("hint: folders in it that have one are checkpoint-10, checkpoint-5"), "{message}");
        let message = refused(&outside.path().join("checkpoint-5").join(CONFIG));
        assert!(message.contains("it is a file, expected an adapter's folder; hint: give "), "{message}");
    }

    /// An adapter of rank 1 at the queries of block 0, with A and B filled with `a` and `b`.
    fn filled(config: &str, a: f64, b: f64) -> tempfile::TempDir {
        let dir = folder(&[(CONFIG, config.as_bytes())]);
        let (d_in, d_out) = Proj::Q.widths(&crate::load::tiny_random::config(100));
        let full = |shape: [i64; 2], value: f64| Tensor::full(shape, value, (Kind::Float, Device::Cpu));
        let factors = [(Factor::A, full([1, d_in], a)), (Factor::B, full([d_out, 1], b))];
        let named = factors.map(|(factor, tensor)| (names::name((0, Proj::Q, factor)), tensor));
        tensor_file::write(&dir.path().join(TENSORS), &named, &BTreeMap::new()).unwrap();
        dir
    }

    fn with_layers(layers: &str) -> String {
        PLAIN.replace("\"r\":1", &format!("\"r\":1,\"layers_to_transform\":{layers}"))
    }

    #[test]
    fn blocks_beyond_the_model_s_are_told() {
        let load = |layers: &str| {
            let dir = filled(&with_layers(layers), 0.5, 0.5);
            Adapter::load(dir.path(), &crate::load::tiny_random::config(100), Device::Cpu)
        };
        assert_eq!(load("[0]").unwrap().remarks, [""; 0]);
        let adapter = load("[0, 2, 30]").unwrap();
        let said = "layers_to_transform also names 2, 30, but the model has the blocks 0 to 1: nothing acts there";
        assert_eq!((adapter.remarks, adapter.config.layers), (vec![said.to_owned()], Some(vec![0])));
        let message = load("[2, 30]").unwrap_err().to_string();
        assert_eq!(message, "a layer of the LoRA is 2, expected 0 to 1");
    }

    #[test]
    fn a_change_that_is_not_finite_is_refused_by_its_tensors() {
        for (a, b, finite) in [(1.0, 1.0, true), (1e30, 1.0, false), (1e8, 1e8, true), (1e30, 1e30, false)] {
            let dir = filled(&with_layers("[0]"), a, b);
            let loaded = Adapter::load(dir.path(), &crate::load::tiny_random::config(100), Device::Cpu);
            match loaded {
                Ok(adapter) => assert!(finite && adapter.remarks.is_empty(), "{a} {b}"),
                Err(error) => {
                    let message = error.to_string();
                    let name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
                    assert!(!finite && message.contains(&format!("‖ΔW‖ of {name} and ")), "{a} {b}: {message}");
                    assert!(message.contains("lora_B.weight is not finite, expected"), "{message}");
                }
            }
        }
    }

    #[test]
    fn an_expression_that_only_python_reads_is_read_from_the_tensors() {
        let text = r#"{"peft_type":"LORA","target_modules":"model\\.layers\\.1\\.(?!mlp).*proj","r":2}"#;
        let message = LoraConfig::parse(text.as_bytes(), Path::new(CONFIG)).unwrap_err().to_string();
        assert!(message.contains("an expression that only Python reads"), "{message}");
        let names = [(1, Proj::V, Factor::A), (1, Proj::V, Factor::B), (1, Proj::Up, Factor::B)].map(names::name);
        let tensors: Vec<(String, Tensor)> =
            names.into_iter().map(|name| (name, Tensor::from_slice(&[1_f32]))).collect();
        let dir = folder(&[(CONFIG, text.as_bytes())]);
        tensor_file::write(&dir.path().join(TENSORS), &tensors, &BTreeMap::new()).unwrap();
        let config = LoraConfig::read(dir.path()).unwrap();
        assert_eq!((config.target_modules, config.layers, config.rank), (vec![Proj::V, Proj::Up], Some(vec![1]), 2));
        // One factor without the other is not enough.
        let message = refused(dir.path());
        assert!(message.contains("missing: base_model.model.model.layers.1.mlp.up_proj.lora_A.weight; unused: none"));
    }
}
