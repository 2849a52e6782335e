//! Chooses the kernels of libtorch's MKL. MKL asks `mkl_serv_intel_cpu_true` whether the processor is Intel's, and uses
//! kernels of 2013 on all others. These are slower on an AMD with AVX2, and less than half as fast in bf16 on one with
//! `AVX512_BF16` (benchmarks/README.md has the rates). A program that is linked with this crate answers the question by
//! the processor's features. Results of the kernels differ in their last digits.

/// The environment variable that overrides the choice: `1` for Intel's kernels, `0` for the others.
pub const SWITCH: &str = "UNDERTONE_MKL_INTEL";

/// Whether MKL is to take the kernels that it has for Intel's processors.
pub fn takes_intels() -> bool {
    match std::env::var(SWITCH).as_deref() {
        Ok("0") => false,
        Ok("1") => true,
        _ => has_avx2() || is_intel(),
    }
}

/// The kernels in words, for a profile and for the notes of a run.
pub fn described() -> &'static str {
    if cfg!(not(target_arch = "x86_64")) {
        "MKL has no part in it"
    } else if std::env::var_os("MKL_CBWR").is_some() {
        "MKL's kernels by MKL_CBWR"
    } else if takes_intels() {
        "MKL's kernels for Intel's processors"
    } else {
        "MKL's kernels for other processors"
    }
}

#[cfg(target_arch = "x86_64")]
fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_avx2() -> bool {
    false
}

fn is_intel() -> bool {
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("GenuineIntel"))
}

/// Replaces MKL's function: a program's symbols have precedence over those of its libraries. MKL calls it once.
#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the name is MKL's, which libtorch exports")]
#[unsafe(no_mangle)]
extern "C" fn mkl_serv_intel_cpu_true() -> std::ffi::c_int {
    #[cfg(test)]
    tests::ASKED.store(true, std::sync::atomic::Ordering::Relaxed);
    takes_intels().into()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use tch::{Device, Kind, Tensor};

    use super::*;

    pub(super) static ASKED: AtomicBool = AtomicBool::new(false);

    #[test]
    fn mkl_asks_this_program() {
        let a = Tensor::ones([64, 64], (Kind::Float, Device::Cpu));
        assert!((a.matmul(&a).sum(Kind::Double).double_value(&[]) - 64.0_f64.powi(3)).abs() < 1e-6);
        assert_eq!(ASKED.load(Ordering::Relaxed), cfg!(target_arch = "x86_64") || !described().contains("MKL's"));
    }
}
