//! Our numbers on tiny Qwen2s and Qwen3s are those of transformers and PEFT (`golden/qwen2`, `golden/qwen3`,
//! `golden/variants`), and our hook points see what TransformerLens sees at its own (`golden/transformer_lens`).
//!
//! Each comparison has two halves. In f64 we agree with the golden f32 file up to its own rounding: the formulas are
//! the same, on every machine. In f32 we are as near to our f64 as rounding allows; `compare::Truth` says how near that
//! is.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use hooks::gradient::at_points;
use hooks::{
    Adapter, Batch, Cache, Condition, Doses, HookPoint, Hooks, ModelFiles, Pass, Qwen, Sequence, Targets,
    cross_entropy_sum,
};

use crate::compare::{
    BACKWARD, EXACT, F32_LEAVES, FORWARD, Tolerance, Truth, assert_all_close, assert_close, difference, folder, tensors,
};

mod bf16;

const CASES: [&str; 4] = ["qwen2", "qwen3", "variants/qwen2_untied", "variants/qwen3_tied"];

/// The completion that the golden losses are taken over: the last tokens of each row.
const N_COMPLETION: usize = 5;

struct Case {
    name: &'static str,
    model: Qwen,
    adapter: Adapter,
    batch: Batch,
    golden: BTreeMap<String, Tensor>,
    /// If set, every activation of a pass gets a random rounding error of f32 (`rounding`).
    rounded_by: Option<RefCell<ChaCha8Rng>>,
}

/// How many times the rounding of a computation is drawn, to see how far it goes.
const DRAWS: u64 = 8;

/// Half a unit in the last place of an f32 just above a power of two: the largest relative error of one rounding.
const HALF_ULP: f64 = 1.0 / (1 << 24) as f64;

impl Case {
    fn load(name: &'static str) -> Self {
        Self::load_as(name, Kind::Float)
    }

    fn load_as(name: &'static str, kind: Kind) -> Self {
        let golden = tensors(&folder(name).join("expected.safetensors"));
        let model = load_model(name, kind);
        let adapter = Adapter::load(&folder(name).join("adapter"), &model.config, Device::Cpu).unwrap();
        let rows = rows(&golden);
        let batch = Batch::from_ids(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), Device::Cpu).unwrap();
        assert_eq!(batch.ids, golden["ids"], "the golden rows are padded as ours are");
        Self { name, model, adapter, batch, golden, rounded_by: None }
    }

    /// The tensors of `of` in f64, and how far rounding each activation to f32 once moves them.
    fn truth(name: &'static str, of: impl Fn(&Self) -> Vec<(String, Tensor)>) -> Truth {
        let mut exact = Self::load_as(name, Kind::Double);
        let tensors = of(&exact);
        let draw = |seed| {
            exact.rounded_by = Some(RefCell::new(ChaCha8Rng::seed_from_u64(seed)));
            of(&exact)
        };
        let roundings: Vec<_> = (0..DRAWS).map(draw).collect();
        Truth::new(tensors, roundings.into_iter(), exact.model.config.d_mlp)
    }

    /// A tap that rounds at random, and its points: all of them, or none without `rounded_by`.
    fn rounding(&self) -> (Vec<HookPoint>, impl FnMut(HookPoint, Tensor) -> hooks::Result<Tensor>) {
        let points = if self.rounded_by.is_some() { self.points() } else { Vec::new() };
        let round = |_, x: Tensor| {
            let Some(rng) = &self.rounded_by else { return Ok(x) };
            let mut rng = rng.borrow_mut();
            let errors: Vec<f64> = (0..x.numel()).map(|_| 1.0 + rng.random_range(-HALF_ULP..HALF_ULP)).collect();
            Ok(x.f_mul(&Tensor::f_from_slice(&errors)?.f_view_as(&x)?)?)
        };
        (points, round)
    }

    fn all() -> impl Iterator<Item = Self> {
        CASES.into_iter().map(Self::load)
    }

    fn logits(&self, mut pass: Pass<'_>) -> Tensor {
        if self.rounded_by.is_none() {
            return self.model.forward(&self.batch, &mut pass).unwrap();
        }
        let (points, mut round) = self.rounding();
        let hooks = Hooks::default().on(points, &mut round);
        self.model.forward(&self.batch, &mut Pass { hooks, ..pass }).unwrap()
    }

    /// The logits of each condition, under their golden names.
    fn all_logits(&self) -> Vec<(String, Tensor)> {
        let one = |(condition, pass)| (format!("{condition}.logits"), self.at_real_positions(&self.logits(pass)));
        self.conditions().into_iter().map(one).collect()
    }

    /// The completion losses of each condition, `[2, N_COMPLETION]`, under their golden names.
    fn all_losses(&self) -> Vec<(String, Tensor)> {
        let one = |(condition, pass)| {
            let logits = self.logits(pass);
            let logprobs = logits.log_softmax(-1, logits.kind()).view([-1, self.model.config.d_vocab]);
            let targets = self.targets();
            let rows = targets.places.index_select(0, &targets.rows);
            let labels: Vec<i64> =
                self::rows(&self.golden).iter().flat_map(|row| row[row.len() - N_COMPLETION..].to_vec()).collect();
            let labels = Tensor::from_slice(&labels).unsqueeze(1);
            let losses = -logprobs.index_select(0, &rows).gather(1, &labels, false);
            (format!("{condition}.losses"), losses.view([2, N_COMPLETION as i64]))
        };
        self.conditions().into_iter().map(one).collect()
    }

    /// The gradients of each condition's mean completion loss, under their golden names.
    fn all_gradients(&self) -> Vec<(String, Tensor)> {
        let of = |(condition, pass)| {
            let (_, gradients) = self.gradients(pass);
            gradients.into_iter().map(move |(name, gradient)| (format!("{condition}.grad.{name}"), gradient))
        };
        self.conditions().into_iter().flat_map(of).collect()
    }

    /// The golden tensors to compare with: all whose names contain `part`.
    fn golden_of(&self, part: &str) -> BTreeMap<String, Tensor> {
        let wanted = self.golden.iter().filter(|(name, _)| name.contains(part));
        wanted.map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
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
            ("gated", Pass { adapter, doses: Some(Doses::of_tokens(self.gate())), ..Pass::default() }),
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
        Targets::of(&self.batch, &rows, &masks).unwrap()
    }

    /// The LoRA's tensors, which ask for gradients from now on.
    fn trainable(&self) -> Vec<(String, Tensor)> {
        let parameters = self.adapter.parameters();
        parameters.into_iter().map(|(name, tensor)| (name, tensor.set_requires_grad(true))).collect()
    }

    /// The mean completion loss, and its gradients for the LoRA where it acts and for all block outputs, under their golden names.
    fn gradients(&self, pass: Pass<'_>) -> (f64, Vec<(String, Tensor)>) {
        let parameters = if pass.adapter.is_some() { self.trainable() } else { Vec::new() };
        let (mut leaf, mut cache) = (leaf, Cache::default());
        let points = (0..self.model.config.n_layers).map(HookPoint::ResidPost);
        let (everywhere, mut round) = self.rounding();
        // The pass ends with the last block, so no later point fires.
        let everywhere = everywhere.into_iter().filter(|point| point.layer().is_some() || *point == HookPoint::Embed);
        let hooks = Hooks::default();
        let hooks = hooks.on([HookPoint::Embed], &mut leaf).on(everywhere, &mut round).on(points, &mut cache);
        let targets = self.targets();
        let resid = self.model.resid_at(&self.batch, &targets.places, &mut Pass { hooks, ..pass }).unwrap();
        let loss = cross_entropy_sum(&self.model, &resid, &targets).unwrap() / targets.n as f64;
        let blocks = cache.iter().map(|(point, x)| (point.to_string(), x.shallow_clone()));
        let (names, inputs): (Vec<String>, Vec<Tensor>) = parameters.into_iter().chain(blocks).unzip();
        let gradients = Tensor::run_backward(&[&loss], &inputs, false, false);
        (loss.double_value(&[]), names.into_iter().zip(gradients).collect())
    }

    /// The sum of the first row's completion losses in the student, a scalar.
    fn loss_of_first_row(&self) -> Tensor {
        let row = &rows(&self.golden)[0];
        let batch = Batch::from_ids(&[row], Device::Cpu).unwrap();
        let pass = &mut Pass { adapter: Some(&self.adapter), ..Pass::default() };
        let mask: Vec<bool> = (0..row.len()).map(|at| at + N_COMPLETION >= row.len()).collect();
        let targets = Targets::of(&batch, &[row], &[&mask]).unwrap();
        let resid = self.model.resid_at(&batch, &targets.places, pass).unwrap();
        cross_entropy_sum(&self.model, &resid, &targets).unwrap()
    }

    /// The hook points that the model has.
    fn points(&self) -> Vec<HookPoint> {
        let mut points = HookPoint::all(self.model.config.n_layers);
        let of_qwen3 = |point: &HookPoint| matches!(point, HookPoint::QNormed(_) | HookPoint::KNormed(_));
        points.retain(|point| self.model.config.qk_norm || !of_qwen3(point));
        points
    }

    /// The first row alone through the student: each activation in the order of the computation, and the gradients of its completion
    /// losses' mean at each and for each LoRA tensor.
    fn opened(&self) -> (Vec<(String, Tensor)>, BTreeMap<String, Tensor>) {
        let row = &rows(&self.golden)[0];
        let batch = Batch::from_ids(&[row], Device::Cpu).unwrap();
        let (mut leaf, mut cache) = (leaf, Cache::default());
        let (everywhere, mut round) = self.rounding();
        let hooks = Hooks::default();
        let hooks = hooks.on([HookPoint::Embed], &mut leaf).on(everywhere, &mut round).on(self.points(), &mut cache);
        let parameters = self.trainable();
        let logits =
            self.model.forward(&batch, &mut Pass { adapter: Some(&self.adapter), hooks, ..Pass::default() }).unwrap();
        let loss = mean_loss(&logits, row);
        let seen = || by_name(self.points(), |point| cache.get(point).unwrap().shallow_clone());
        let (names, inputs): (Vec<String>, Vec<Tensor>) = seen().into_iter().chain(parameters).unzip();
        let gradients = Tensor::run_backward(&[&loss], &inputs, false, false);
        (seen(), names.into_iter().zip(gradients).collect())
    }
}

fn load_model(case: &str, kind: Kind) -> Qwen {
    let files = ModelFiles::open(folder(case).to_str().unwrap()).unwrap();
    Qwen::load(&files, Device::Cpu, kind).unwrap()
}

/// What there is at some hook points, under their names.
fn by_name(points: Vec<HookPoint>, of: impl Fn(HookPoint) -> Tensor) -> Vec<(String, Tensor)> {
    points.into_iter().map(|point| (point.to_string(), of(point))).collect()
}

/// The mean of a row's completion losses, from its logits `[1, pos, d_vocab]`.
fn mean_loss(logits: &Tensor, row: &[i64]) -> Tensor {
    let start = row.len() - N_COMPLETION;
    let logprobs = logits.get(0).narrow(0, start as i64 - 1, N_COMPLETION as i64).log_softmax(-1, logits.kind());
    -logprobs.gather(1, &Tensor::from_slice(&row[start..]).unsqueeze(1), false).mean(logits.kind())
}

/// A tap that lets the graph begin where it is set, since no weight asks for gradients.
#[expect(clippy::needless_pass_by_value, reason = "a tap is handed its activation")]
fn leaf(_: HookPoint, x: Tensor) -> hooks::Result<Tensor> {
    Ok(x.f_detach()?.f_set_requires_grad(true)?)
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
        let truth = Case::truth(case.name, Case::all_logits);
        truth.assert_near(case.name, &case.all_logits(), &case.golden_of(".logits"), FORWARD);
        let distinct = difference("student", &case.golden["adapter.logits"], &case.golden["base.logits"], FORWARD);
        assert!(distinct.is_some(), "the golden adapter acts");
    }
}

#[test]
fn every_hook_point() {
    for case in Case::all() {
        let golden = tensors(&folder(case.name).join("activations.safetensors"));
        let names: BTreeSet<String> = case.points().iter().map(ToString::to_string).collect();
        assert_eq!(names, golden.keys().cloned().collect(), "every hook point has its golden tensor");
        let truth = Case::truth(case.name, |case| case.opened().0);
        truth.assert_near(case.name, &case.opened().0, &golden, FORWARD);
    }
}

#[test]
fn the_gradient_at_every_hook_point() {
    for case in Case::all() {
        let golden = tensors(&folder(case.name).join("gradients.safetensors"));
        let names: BTreeSet<String> = case.points().iter().map(ToString::to_string).collect();
        assert_eq!(names, golden.keys().cloned().collect(), "every hook point has its golden gradient");
        let row = &rows(&case.golden)[0];
        let prompt = Sequence::of_ids(row.clone());
        let student = Condition::adapted(&case.adapter);
        let at =
            at_points(&case.model, &prompt, &student, &case.points(), |logits| Ok(mean_loss(logits, row))).unwrap();
        let gradients = by_name(case.points(), |point| at.gradients[&point].shallow_clone());
        let truth = Case::truth(case.name, |case| {
            let (_, gradients) = case.opened();
            by_name(case.points(), |point| gradients[&point.to_string()].shallow_clone())
        });
        truth.assert_near(&format!("{}, gradients", case.name), &gradients, &golden, BACKWARD);
    }
}

#[test]
fn every_shape_is_what_the_table_says() {
    for case in Case::all() {
        let config = &case.model.config;
        let row = rows(&case.golden)[0].len() as i64;
        let width = |symbol: &str| match symbol {
            "batch" | "1" => 1,
            "pos" | "query" | "key" => row,
            "d_model" => config.d_model,
            "d_mlp" => config.d_mlp,
            "d_vocab" => config.d_vocab,
            "d_head" => config.d_head,
            "n_heads" => config.n_heads,
            "n_kv_heads" => config.n_kv_heads,
            other => panic!("{other} is no size of a model"),
        };
        let (seen, _) = case.opened();
        for ((name, x), point) in seen.iter().zip(case.points()) {
            let symbols = point.shape().trim_matches(['[', ']']).split(", ");
            assert_eq!(x.size(), symbols.map(width).collect::<Vec<_>>(), "{} {name}", case.name);
        }
    }
}

/// In f64, transformers and we differ by f64's rounding. So the difference in f32 is rounding too, and no tolerance
/// hides a mistake.
#[test]
fn in_f64_nothing_is_left() {
    for name in CASES {
        let case = Case::load_as(name, Kind::Double);
        let golden = tensors(&folder(name).join("exact.safetensors"));
        let (seen, gradients) = case.opened();
        let (last, logits) = &seen[seen.len() - 1];
        assert_close(&format!("{name} {last}"), logits, &golden["logits"], EXACT);
        assert_close(&format!("{name} loss"), &case.loss_of_first_row(), &golden["losses"].sum(Kind::Double), EXACT);
        let names = golden.keys().filter_map(|name| name.strip_prefix("grad."));
        assert_eq!(names.clone().count(), case.adapter.parameters().len() + case.model.config.n_layers);
        for point in names {
            // The LoRA's tensors stay f32, and so do their gradients.
            let tolerance = if point.contains("lora_") { F32_LEAVES } else { EXACT };
            let golden = &golden[&format!("grad.{point}")];
            assert_close(&format!("{name} gradient at {point}"), &gradients[point], golden, tolerance);
        }
    }
}

#[test]
fn what_transformer_lens_sees_at_its_hook_points_we_see_at_ours() {
    for name in ["qwen2", "qwen3"] {
        let case = Case::load(name);
        let mut golden = tensors(&folder("transformer_lens").join(format!("{name}.safetensors")));
        let ids = Vec::<i64>::try_from(golden.remove("ids").unwrap().get(0)).unwrap();
        // Its unembedding's input is the final norm's output, which has no name of ours, and its output the logits.
        assert!(golden.remove("unembed.hook_in").is_some());
        assert_eq!(golden.remove("unembed.hook_out").as_ref(), golden.get("logits"));
        for (point, tensor) in &mut golden {
            if point.ends_with("_normed") {
                *tensor = tensor.transpose(1, 2); // there, and there alone, it puts heads before positions
            }
        }
        let mut cache = Cache::default();
        let hooks = Hooks::default().on(case.points(), &mut cache);
        let batch = Batch::from_ids(&[&ids], Device::Cpu).unwrap();
        let _ = case.model.forward(&batch, &mut Pass { hooks, ..Pass::default() }).unwrap();
        let seen = by_name(case.points(), |point| cache.get(point).unwrap().shallow_clone());
        assert_all_close(name, &seen, &golden, FORWARD);
    }
}

#[test]
fn losses_of_the_completion_tokens() {
    for case in Case::all() {
        let truth = Case::truth(case.name, Case::all_losses);
        truth.assert_near(case.name, &case.all_losses(), &case.golden_of(".losses"), FORWARD);
    }
}

#[test]
fn gradients_of_the_lora_and_of_the_residual_stream() {
    for case in Case::all() {
        for (condition, pass) in case.conditions() {
            let (loss, _) = case.gradients(pass);
            let golden_loss = case.golden[&format!("{condition}.losses")].mean(Kind::Double).double_value(&[]);
            let Tolerance(share) = FORWARD;
            assert!(
                (loss - golden_loss).abs() <= share * golden_loss,
                "{} {condition} loss {loss}, golden {golden_loss}",
                case.name
            );
        }
        let golden = case.golden_of(".grad.");
        let blocks = golden.keys().filter(|name| name.ends_with("hook_resid_post")).count();
        assert_eq!(blocks, 3 * case.model.config.n_layers);
        let truth = Case::truth(case.name, Case::all_gradients);
        truth.assert_near(case.name, &case.all_gradients(), &golden, BACKWARD);
    }
}

#[test]
fn a_gate_of_ones_is_the_student_and_one_of_zeros_the_base_bit_by_bit() {
    for case in Case::all() {
        let ones = Tensor::ones([2, case.batch.width() as i64, 1], (Kind::Float, Device::Cpu));
        let gated = |gate: Tensor| {
            case.logits(Pass { adapter: Some(&case.adapter), doses: Some(Doses::of_tokens(gate)), ..Pass::default() })
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
