//! What transformers and PEFT compute on a tiny Qwen2 and a tiny Qwen3, we compute: `golden/qwen2` and `golden/qwen3`.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Device, Kind, Tensor};

use hooks::listen::Cache;
use hooks::loss::{Targets, cross_entropy_sum};
use hooks::{Adapter, Batch, Doses, HookPoint, Hooks, ModelFiles, Pass, Qwen};

use crate::compare::{BACKWARD, FORWARD, assert_close, difference, folder, tensors};

const CASES: [&str; 2] = ["qwen2", "qwen3"];

/// The completion that the golden losses are taken over: the last tokens of each row.
const N_COMPLETION: usize = 5;

struct Case {
    name: &'static str,
    model: Qwen,
    adapter: Adapter,
    batch: Batch,
    golden: BTreeMap<String, Tensor>,
}

impl Case {
    fn load(name: &'static str) -> Self {
        let golden = tensors(&folder(name).join("expected.safetensors"));
        let model = load_model(name);
        let adapter = Adapter::load(&folder(name).join("adapter"), &model.config, Device::Cpu).unwrap();
        let rows = rows(&golden);
        let batch = Batch::from_ids(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), Device::Cpu).unwrap();
        assert_eq!(batch.ids, golden["ids"], "the golden rows are padded as ours are");
        Self { name, model, adapter, batch, golden }
    }

    fn all() -> impl Iterator<Item = Self> {
        CASES.into_iter().map(Self::load)
    }

    fn logits(&self, mut pass: Pass<'_>) -> Tensor {
        self.model.forward(&self.batch, &mut pass).unwrap()
    }

    /// One where the golden gate lets the adapter act, `[batch, pos, 1]`.
    fn gate(&self) -> Tensor {
        let gate = Tensor::zeros([2, self.batch.width() as i64, 1], (Kind::Float, Device::Cpu));
        for at in Vec::<i64>::try_from(&self.golden["gate"]).unwrap() {
            let _ = gate.narrow(1, at, 1).fill_(1.0);
        }
        gate
    }

    /// The base, the student and the gated student, under their names in the golden file.
    fn conditions(&self) -> [(&'static str, Pass<'_>); 3] {
        let adapter = Some(&self.adapter);
        [
            ("base", Pass::default()),
            ("adapter", Pass { adapter, ..Pass::default() }),
            ("gated", Pass { adapter, gate: Some(Doses::of_tokens(self.gate())), ..Pass::default() }),
        ]
    }

    /// `x` with zeros at the padding, as the golden files have it.
    fn at_real_positions(&self, x: &Tensor) -> Tensor {
        x * self.batch.valid().unwrap().unsqueeze(-1)
    }

    /// What the golden mean loss is taken over.
    fn targets(&self) -> Targets {
        let rows = rows(&self.golden);
        let mask = |row: &Vec<i64>| (0..row.len()).map(|at| at + N_COMPLETION >= row.len()).collect();
        let masks: Vec<Vec<bool>> = rows.iter().map(mask).collect();
        let rows: Vec<&[i64]> = rows.iter().map(Vec::as_slice).collect();
        let masks: Vec<&[bool]> = masks.iter().map(Vec::as_slice).collect();
        Targets::of(&rows, &masks, self.batch.width(), Device::Cpu).unwrap()
    }

    /// The gradients of the mean completion loss for all LoRA tensors and block outputs, under their golden names.
    fn gradients(&self, pass: Pass<'_>) -> (f64, Vec<(String, Tensor)>) {
        let parameters = self.adapter.parameters();
        for (_, parameter) in &parameters {
            let _ = parameter.set_requires_grad(true);
        }
        let mut cache = Cache::default();
        let points = (0..self.model.config.n_layers).map(HookPoint::ResidPost);
        let resid = self
            .model
            .resid_final(&self.batch, &mut Pass { hooks: Hooks::default().on(points, &mut cache), ..pass })
            .unwrap();
        let targets = self.targets();
        let loss = cross_entropy_sum(&self.model, &resid, &targets).unwrap() / targets.n as f64;
        let blocks = cache.iter().map(|(point, x)| (point.to_string(), x.shallow_clone()));
        let (names, inputs): (Vec<String>, Vec<Tensor>) = parameters.into_iter().chain(blocks).unzip();
        let gradients = Tensor::run_backward(&[&loss], &inputs, false, false);
        (loss.double_value(&[]), names.into_iter().zip(gradients).collect())
    }
}

fn load_model(case: &str) -> Qwen {
    let files = ModelFiles::open(folder(case).to_str().unwrap()).unwrap();
    Qwen::load(&files, Device::Cpu, Kind::Float).unwrap()
}

/// The golden rows without padding.
fn rows(golden: &BTreeMap<String, Tensor>) -> Vec<Vec<i64>> {
    let lengths = Vec::<i64>::try_from(&golden["lengths"]).unwrap();
    let row = |(row, length): (usize, i64)| Vec::try_from(golden["ids"].get(row as i64).narrow(0, 0, length)).unwrap();
    lengths.into_iter().enumerate().map(row).collect()
}

#[test]
fn logits_of_base_student_and_gated_student() {
    for case in Case::all() {
        for (condition, pass) in case.conditions() {
            let name = format!("{condition}.logits");
            let logits = case.at_real_positions(&case.logits(pass));
            assert_close(&format!("{} {name}", case.name), &logits, &case.golden[&name], FORWARD);
        }
        let distinct = difference("student", &case.golden["adapter.logits"], &case.golden["base.logits"], FORWARD);
        assert!(distinct.is_some(), "the golden adapter acts");
    }
}

#[test]
fn every_hook_point() {
    for case in Case::all() {
        let golden = tensors(&folder(case.name).join("activations.safetensors"));
        let points: BTreeSet<HookPoint> = HookPoint::all(case.model.config.n_layers)
            .into_iter()
            .filter(|point| {
                case.model.config.qk_norm || !matches!(point, HookPoint::QNormed(_) | HookPoint::KNormed(_))
            })
            .collect();
        let names: BTreeSet<String> = points.iter().map(ToString::to_string).collect();
        assert_eq!(names, golden.keys().cloned().collect(), "every hook point has its golden tensor");

        let row = &rows(&case.golden)[0];
        let batch = Batch::from_ids(&[row], Device::Cpu).unwrap();
        let mut cache = Cache::default();
        let hooks = Hooks::default().on(points, &mut cache);
        let _ =
            case.model.forward(&batch, &mut Pass { adapter: Some(&case.adapter), hooks, ..Pass::default() }).unwrap();
        let wrong: Vec<String> = cache
            .iter()
            .filter_map(|(point, ours)| {
                difference(&format!("{} {point}", case.name), ours, &golden[&point.to_string()], FORWARD)
            })
            .collect();
        assert!(wrong.is_empty(), "{} of {} hook points differ:\n{}", wrong.len(), golden.len(), wrong.join("\n"));
    }
}

#[test]
fn losses_of_the_completion_tokens() {
    for case in Case::all() {
        for (condition, pass) in case.conditions() {
            let logprobs = case.logits(pass).log_softmax(-1, Kind::Float).view([-1, case.model.config.d_vocab]);
            let targets = case.targets();
            let losses = -logprobs.index_select(0, &targets.rows).gather(1, &targets.labels.unsqueeze(1), false);
            let name = format!("{condition}.losses");
            assert_close(
                &format!("{} {name}", case.name),
                &losses.view([2, N_COMPLETION as i64]),
                &case.golden[&name],
                FORWARD,
            );
        }
    }
}

#[test]
fn gradients_of_the_lora_and_of_the_residual_stream() {
    for case in Case::all() {
        for (condition, pass) in case.conditions().into_iter().skip(1) {
            let (loss, gradients) = case.gradients(pass);
            let golden_loss = case.golden[&format!("{condition}.losses")].mean(Kind::Double).double_value(&[]);
            assert!(
                (loss - golden_loss).abs() <= FORWARD.0 * golden_loss,
                "{} {condition} loss {loss}, golden {golden_loss}",
                case.name
            );
            let mut compared = 0;
            for (name, ours) in gradients {
                let name = format!("{condition}.grad.{name}");
                if condition == "gated" && name.contains("hook_resid_post") {
                    continue; // not in the golden files
                }
                let golden = case.golden.get(&name).unwrap_or_else(|| panic!("{name} is not in the golden file"));
                assert_close(&format!("{} {name}", case.name), &ours, golden, BACKWARD);
                compared += 1;
            }
            let golden = case.golden.keys().filter(|name| name.starts_with(&format!("{condition}.grad."))).count();
            assert_eq!(compared, golden, "every golden gradient was compared");
        }
    }
}

#[test]
fn a_gate_of_ones_is_the_student_and_one_of_zeros_the_base_bit_by_bit() {
    for case in Case::all() {
        let ones = Tensor::ones([2, case.batch.width() as i64, 1], (Kind::Float, Device::Cpu));
        let gated = |gate: Tensor| {
            case.logits(Pass { adapter: Some(&case.adapter), gate: Some(Doses::of_tokens(gate)), ..Pass::default() })
        };
        assert_eq!(gated(ones.zeros_like()), case.logits(Pass::default()));
        assert_eq!(gated(ones), case.logits(Pass { adapter: Some(&case.adapter), ..Pass::default() }));
    }
}

#[test]
fn no_gate_reaches_back_in_time() {
    let case = Case::load("qwen2");
    let first = Vec::<i64>::try_from(&case.golden["gate"]).unwrap()[0];
    let [(_, base), _, (_, gated)] = case.conditions();
    let (base, gated) = (case.logits(base), case.logits(gated));
    assert_eq!(base.narrow(1, 0, first), gated.narrow(1, 0, first), "before the first gated position");
    assert_ne!(base.select(1, first), gated.select(1, first), "at the first gated position");
}

#[test]
fn a_row_alone_is_the_row_in_its_batch() {
    for case in Case::all() {
        let row = &rows(&case.golden)[1];
        let batch = Batch::from_ids(&[row], Device::Cpu).unwrap();
        let alone = case.model.forward(&batch, &mut Pass { adapter: Some(&case.adapter), ..Pass::default() }).unwrap();
        let golden = case.golden["adapter.logits"].narrow(0, 1, 1).narrow(1, 0, row.len() as i64);
        assert_close(case.name, &alone, &golden, FORWARD);
    }
}

#[test]
fn looking_changes_no_bit() {
    for case in Case::all() {
        let mut cache = Cache::default();
        let points = [
            HookPoint::Embed,
            HookPoint::Q(1),
            HookPoint::MlpPost(0),
            HookPoint::ResidPost(1),
            HookPoint::LnFinalScale,
        ];
        let hooks = Hooks::default().on(points, &mut cache);
        let looked = case.logits(Pass { adapter: Some(&case.adapter), hooks, ..Pass::default() });
        assert_eq!(looked, case.logits(Pass { adapter: Some(&case.adapter), ..Pass::default() }));
        assert_eq!(cache.iter().count(), points.len());
    }
}
