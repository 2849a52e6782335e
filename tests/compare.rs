//! Golden files, and a comparison that shows what differs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

/// How far from a golden tensor one of ours may be: a share of the golden tensor's largest magnitude.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tolerance(pub(crate) f64);

/// For activations, logits and losses with f32 on one side: a few units of its last place (6e-8) per layer. Measured,
/// ours in f64 and the golden f32: at most 8.5e-7; ours in f32 by any kernel (`scripts/kernel_paths.py`): at most
/// 1.9e-6.
pub(crate) const FORWARD: Tolerance = Tolerance(1e-5);

/// For gradients with f32 on one side: twice as many operations, and sums over all positions. Measured, ours in f64 and
/// the golden f32: at most 4.2e-6, at a gated query's A, where the sum is over few positions.
pub(crate) const BACKWARD: Tolerance = Tolerance(1e-5);

/// For results that are f64 on both sides, with a last place at 1e-16. Measured: at most 4e-15, nine orders below f32's
/// differences.
pub(crate) const EXACT: Tolerance = Tolerance(1e-12);

/// For gradients computed in f64 that f32 tensors receive: rounded to f32 (6e-8) as often as they are added up, which is once
/// per head for the output projection. Measured: at most 1e-7.
pub(crate) const F32_LEAVES: Tolerance = Tolerance(3e-7);

/// The folder of a golden case.
pub(crate) fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// The tensors of a golden file, read by tch and not by the reader under test.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Tensor> {
    Tensor::read_safetensors(path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).into_iter().collect()
}

/// Tensors computed in f64, and how far rounding moves each. That bounds how near an f32 computation can come on any
/// kernel: rounding moves some activations more than others on every machine.
pub(crate) struct Truth {
    /// Each tensor with its name and the most that rounding every activation of the computation once moves it.
    tensors: Vec<(String, Tensor, f64)>,
    /// The number of terms of the longest sum in an activation.
    longest_sum: i64,
}

impl Truth {
    /// `roundings` are these tensors again, each time with every activation of the computation rounded once, at random.
    pub(crate) fn new(
        tensors: Vec<(String, Tensor)>,
        roundings: impl Iterator<Item = Vec<(String, Tensor)>>,
        longest_sum: i64,
    ) -> Self {
        let mut tensors: Vec<_> = tensors.into_iter().map(|(name, tensor)| (name, tensor, 0.0)).collect();
        for rounded in roundings {
            assert_eq!(rounded.len(), tensors.len());
            for ((name, tensor, most), (other, rounded)) in tensors.iter_mut().zip(rounded) {
                assert_eq!(*name, other);
                *most = farthest(&flat(&rounded), &flat(tensor)).1.max(*most);
            }
        }
        Self { tensors, longest_sum }
    }

    /// Panics unless the golden tensors differ from the truth by at most `tolerance`, and ours by at most a bound: one
    /// and a half times the golden tensor's difference, plus a floor. The floor is what rounding every activation once
    /// does, times √n for the n terms of the longest sum, plus one rounding of the tensor itself. (An activation is
    /// rounded as often as its sum has terms, and n roundings of random sign add up to √n times one.) The bound is cut
    /// to `tolerance`, but not below the floor.
    #[track_caller]
    pub(crate) fn assert_near(
        &self,
        what: &str,
        ours: &[(String, Tensor)],
        golden: &BTreeMap<String, Tensor>,
        tolerance: Tolerance,
    ) {
        let truth: Vec<_> = self.tensors.iter().map(|(name, truth, _)| (name.clone(), truth.shallow_clone())).collect();
        assert_all_close(&format!("{what}, in f64"), &truth, golden, tolerance);
        assert_eq!(ours.len(), self.tensors.len(), "{what}");
        for ((name, ours), (same, truth, once)) in ours.iter().zip(&self.tensors) {
            assert_eq!(name, same, "{what}");
            let (ours, truth, golden) = (flat(ours), flat(truth), flat(&golden[name]));
            let largest = truth.iter().filter(|value| value.is_finite()).fold(0.0, |most, value| value.abs().max(most));
            let ((at, off), (_, theirs)) = (farthest(&ours, &truth), farthest(&golden, &truth));
            let floor = (self.longest_sum as f64).sqrt() * once + 6e-8 * largest;
            let allowed = (1.5 * theirs + floor).min(floor.max(tolerance.0 * largest));
            assert!(
                off <= allowed,
                "{what} {name}: at {at} of {} ours is {:e}, in f64 {:e}: off by {off:.3e}, allowed {allowed:.3e} (the golden f32 tensor is \
                 off by {theirs:.3e}, one rounding of every activation does {once:.3e}, the largest is {largest:.3e})",
                truth.len(),
                ours[at],
                truth[at]
            );
        }
    }
}

/// Panics, with the first values side by side, where `ours` is not `golden`.
#[track_caller]
pub(crate) fn assert_close(name: &str, ours: &Tensor, golden: &Tensor, tolerance: Tolerance) {
    if let Some(difference) = difference(name, ours, golden, tolerance) {
        panic!("{difference}");
    }
}

/// Compares tensors by name. Ours and the golden ones must have the same names. The panic names every tensor that
/// differs and shows the first ones: in the order of the computation, these are nearest to the cause.
#[track_caller]
pub(crate) fn assert_all_close(
    what: &str,
    ours: &[(String, Tensor)],
    golden: &BTreeMap<String, Tensor>,
    tolerance: Tolerance,
) {
    let names: BTreeSet<&String> = ours.iter().map(|(name, _)| name).collect();
    assert!(names.iter().copied().eq(golden.keys()), "{what}: ours are {names:?}, the golden ones {:?}", golden.keys());
    let compare = |(name, ours): &(String, Tensor)| difference(name, ours, &golden[name], tolerance);
    let wrong: Vec<String> = ours.iter().filter_map(compare).collect();
    let shown =
        wrong.iter().enumerate().map(|(n, text)| if n < 3 { text } else { text.lines().next().unwrap_or(text) });
    let shown = shown.collect::<Vec<_>>().join("\n");
    assert!(wrong.is_empty(), "{what}: {} of {} tensors differ:\n{shown}", wrong.len(), golden.len());
}

/// Describes how `ours` differs from `golden`, if it does; minus infinity must be at the same places.
pub(crate) fn difference(name: &str, ours: &Tensor, golden: &Tensor, Tolerance(share): Tolerance) -> Option<String> {
    if ours.size() != golden.size() {
        return Some(format!("{name}: ours has shape {:?}, the golden one {:?}", ours.size(), golden.size()));
    }
    let (ours, golden) = (flat(ours), flat(golden));
    let largest = golden.iter().filter(|value| value.is_finite()).fold(0.0, |largest, value| value.abs().max(largest));
    let allowed = share * largest;
    let (worst, most) = farthest(&ours, &golden);
    if most <= allowed {
        return None;
    }
    let mut lines =
        vec![format!("{name}: largest difference {most:.3e} at {worst} of {}, allowed {allowed:.3e}", golden.len())];
    lines.push(format!("{:>10} {:>14} {:>14}", "index", "ours", "golden"));
    let shown = (0..golden.len().min(8)).chain((worst >= 8).then_some(worst));
    lines.extend(shown.map(|at| format!("{at:>10} {:>14.6e} {:>14.6e}", ours[at], golden[at])));
    Some(lines.join("\n"))
}

/// The place where two tensors are farthest apart, and their distance; NaN if one has a NaN.
fn farthest(ours: &[f64], golden: &[f64]) -> (usize, f64) {
    assert_eq!(ours.len(), golden.len());
    let apart = (0..golden.len()).map(|at| (at, apart(ours[at], golden[at])));
    apart.fold((0, 0.0), |worst, here| if here.1 > worst.1 || here.1.is_nan() { here } else { worst })
}

fn apart(ours: f64, golden: f64) -> f64 {
    let both_masked = ours.is_infinite() && ours.total_cmp(&golden).is_eq();
    if both_masked { 0.0 } else { (ours - golden).abs() }
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).contiguous().view([-1])).unwrap()
}

#[test]
fn a_difference_is_seen_and_shown() {
    let golden = Tensor::from_slice(&[1.0_f32, -2.0, f32::NEG_INFINITY]);
    let close = |values: [f32; 3]| difference("x", &Tensor::from_slice(&values), &golden, Tolerance(1e-3));
    assert_eq!(close([1.0, -2.0, f32::NEG_INFINITY]), None);
    assert_eq!(close([1.001, -2.0, f32::NEG_INFINITY]), None, "within 1e-3 of the largest magnitude");
    let shown = close([1.01, -2.0, f32::NEG_INFINITY]).unwrap();
    assert!(shown.contains("largest difference 1.000e-2 at 0 of 3") && shown.contains("1.010000e0"), "{shown}");
    assert!(close([1.0, -2.0, -1e30]).is_some(), "a mask that does not mask");
    assert!(close([1.0, f32::NAN, f32::NEG_INFINITY]).is_some());
    assert!(difference("x", &Tensor::from_slice(&[1.0_f32]), &golden, Tolerance(1e-3)).unwrap().contains("shape [1]"));
}
