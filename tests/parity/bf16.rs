//! A model in bf16 is nearer to itself in f32 than transformers and PEFT are (`golden/bf16`), with autograd and without:
//! they round every activation to bf16, we only the inputs of products.

use hooks::PackedRow;
use undertone::output::full_model::save_full;

use super::*;

/// How large our error may be, as a share of transformers'. Measured: .33 to .62.
const WORST: f64 = 0.8;

/// A golden case in bf16, and in f32 with the same weights, rounded to bf16.
fn rounded_and_exact(name: &'static str) -> (Case, Case) {
    let rounded = Case::load_as(name, Kind::BFloat16);
    let dir = tempfile::tempdir().unwrap();
    let files = ModelFiles::open(folder(name).to_str().unwrap()).unwrap();
    save_full(&rounded.model, &files, dir.path()).unwrap();
    let files = ModelFiles::open(dir.path().to_str().unwrap()).unwrap();
    let model = Qwen::load(&files, Device::Cpu, Kind::Float).unwrap();
    (rounded, Case { model, ..Case::load(name) })
}

/// A row's losses from its logits, `[1, pos, d_vocab]`.
fn losses_of(logits: &Tensor, row: &[i64]) -> Tensor {
    let start = row.len() - N_COMPLETION;
    let logits = logits.get(0).narrow(0, start as i64 - 1, N_COMPLETION as i64);
    -logits.log_softmax(-1, Kind::Double).gather(1, &Tensor::from_slice(&row[start..]).unsqueeze(1), false)
}

/// A row's activations, losses, and the LoRA's gradients of their mean, by autograd.
fn recorded(case: &mut Case, row: &[i64]) -> Vec<(String, Tensor)> {
    let ids = ("ids".to_owned(), Tensor::from_slice(row).unsqueeze(0));
    case.golden = BTreeMap::from([ids, ("lengths".to_owned(), Tensor::from_slice(&[row.len() as i64]))]);
    let (mut seen, gradients) = case.opened();
    let losses = losses_of(&seen.last().unwrap().1, row);
    seen.push(("losses".to_owned(), losses));
    seen.extend(gradients.into_iter().map(|(name, gradient)| (format!("grad.{name}"), gradient)));
    seen
}

/// The same without autograd, as training has it: the backward pass by hand.
fn unrecorded(case: &mut Case, row: &[i64]) -> Vec<(String, Tensor)> {
    let batch = Batch::from_ids(&[row], Device::Cpu).unwrap();
    let mut cache = Cache::default();
    let hooks = Hooks::default().on(case.points(), &mut cache);
    let mut pass = Pass { adapter: Some(&case.adapter), hooks, ..Pass::default() };
    let _ = tch::no_grad(|| case.model.forward(&batch, &mut pass)).unwrap();
    let mut found = by_name(case.points(), |point| cache.get(point).unwrap().shallow_clone());

    let batch = Batch::packed(&[&[PackedRow::of(row)]], true, Device::Cpu).unwrap();
    let mask: Vec<bool> = (0..row.len()).map(|at| at + N_COMPLETION >= row.len()).collect();
    let targets = Targets::of(&batch, &[row], &[&mask]).unwrap();
    let weights = Tensor::full([targets.n as i64], 1.0 / targets.n as f64, (Kind::Double, Device::Cpu));
    let (losses, gradients) = case.model.lora_gradients(&batch, &targets, &weights, &case.adapter, None).unwrap();
    found.push(("losses".to_owned(), losses));
    let names = case.adapter.parameters().into_iter().map(|(name, _)| format!("grad.{name}"));
    found.extend(names.zip(gradients));
    found
}

/// Measures a row.
type Of = fn(&mut Case, &[i64]) -> Vec<(String, Tensor)>;

/// The root mean square of the differences over that of the values in f32, over all rows, for each name.
fn errors(rows: &[Vec<i64>], [rounded, exact]: [&mut Case; 2], of: Of) -> BTreeMap<String, f64> {
    let square = |x: Tensor| x.square().sum(Kind::Double).double_value(&[]);
    let mut squares: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    for row in rows {
        for ((name, x), (_, exact)) in of(rounded, row).into_iter().zip(of(exact, row)) {
            let sums = squares.entry(name).or_default();
            let exact = exact.to_kind(Kind::Double);
            *sums = (sums.0 + square(x.to_kind(Kind::Double) - &exact), sums.1 + square(exact));
        }
    }
    squares.into_iter().map(|(name, (wrong, whole))| (name, (wrong / whole).sqrt())).collect()
}

/// The name without its block.
fn kind_of(name: &str) -> String {
    let part = |part: &str| if part.chars().all(|c| c.is_ascii_digit()) { "*".to_owned() } else { part.to_owned() };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// The root mean square of the errors of each kind, over blocks and models.
fn by_kind(errors: &[(String, f64)]) -> BTreeMap<String, f64> {
    let mut squares: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for (name, error) in errors {
        squares.entry(kind_of(name)).or_default().push(error * error);
    }
    let mean = |squares: Vec<f64>| (squares.iter().sum::<f64>() / squares.len() as f64).sqrt();
    squares.into_iter().map(|(kind, squares)| (kind, mean(squares))).collect()
}

#[derive(serde::Deserialize)]
struct Theirs {
    ids: Vec<Vec<i64>>,
    errors: BTreeMap<String, f64>,
}

#[test]
fn in_bf16_the_errors_are_smaller_than_those_of_transformers() {
    let text = std::fs::read_to_string(folder("bf16").join("errors.json")).unwrap();
    let golden: BTreeMap<String, Theirs> = serde_json::from_str(&text).unwrap();
    let (mut theirs, mut by_autograd, mut by_hand) = (vec![], vec![], vec![]);
    for name in CASES {
        let (mut rounded, mut exact) = rounded_and_exact(name);
        let Theirs { ids, errors: expected } = &golden[name];
        for (into, of) in [(&mut by_autograd, recorded as Of), (&mut by_hand, unrecorded)] {
            let found = errors(ids, [&mut rounded, &mut exact], of);
            into.extend(expected.keys().map(|what| (what.clone(), found[what])));
        }
        theirs.extend(expected.clone());
    }
    let theirs = by_kind(&theirs);
    for (way, found) in [("autograd", by_kind(&by_autograd)), ("by hand", by_kind(&by_hand))] {
        for (kind, theirs) in &theirs {
            let ours = found[kind];
            assert!(ours <= WORST * theirs, "{way}, {kind}: {ours:.2e}, transformers {theirs:.2e}");
        }
    }
}
