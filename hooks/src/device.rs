//! Which device to run on. One binary serves both worlds: CUDA's half of libtorch is loaded at run time, if it is
//! there.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::OnceLock;

use tch::{Cuda, Device};

use crate::error::{Error, Result};

/// The device that a name means: `cpu`, `cuda` or `cuda:N`.
pub fn device(name: &str) -> Result<Device> {
    let index = match name {
        "cpu" => return Ok(Device::Cpu),
        "cuda" => Some(0),
        other => other.strip_prefix("cuda:").and_then(|index| index.parse::<usize>().ok()),
    };
    let Some(index) = index else {
        let (found, choices) = (name.to_owned(), "cpu, cuda, cuda:N".to_owned());
        return Err(Error::UnknownName { what: "device", found, choices });
    };
    load_cuda()?;
    if !Cuda::is_available() {
        return Err(Error::CudaUnavailable {
            reason: "libtorch_cuda.so was loaded, but it finds no usable GPU or driver".to_owned(),
        });
    }
    let count = Cuda::device_count();
    if (index as i64) < count {
        Ok(Device::Cuda(index))
    } else {
        Err(Error::CudaUnavailable { reason: format!("{name} was asked for, but the machine has {count} GPUs") })
    }
}

/// Loads `libtorch_cuda.so` once, before any device is asked for: registering itself is all it has to do.
fn load_cuda() -> Result<()> {
    static LOADED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        let beside = std::env::var("LIBTORCH").map(|folder| format!("{folder}/lib/libtorch_cuda.so"));
        let names = ["libtorch_cuda.so".to_owned()].into_iter().chain(beside);
        let tried: Vec<String> = names.map_while(|name| dlopen(&name).err()).collect();
        let all_failed = tried.len() == 1 + usize::from(std::env::var("LIBTORCH").is_ok());
        if all_failed { Err(tried.join("; ")) } else { Ok(()) }
    });
    loaded.clone().map_err(|reason| Error::CudaUnavailable { reason })
}

#[expect(unsafe_code, reason = "the loader's own interface; the library is never unloaded")]
fn dlopen(name: &str) -> std::result::Result<(), String> {
    const RTLD_NOW: c_int = 0x2;
    const RTLD_GLOBAL: c_int = 0x100;
    unsafe extern "C" {
        #[link_name = "dlopen"]
        fn c_dlopen(name: *const c_char, flags: c_int) -> *mut c_void;
        fn dlerror() -> *const c_char;
    }
    let path = CString::new(name).map_err(|_| format!("{name:?} is no file name"))?;
    // SAFETY: `path` is a C string that outlives the call, and dlerror's text is copied before any other call.
    unsafe {
        if !c_dlopen(path.as_ptr(), RTLD_NOW | RTLD_GLOBAL).is_null() {
            return Ok(());
        }
        let error = dlerror();
        Err(if error.is_null() { name.to_owned() } else { CStr::from_ptr(error).to_string_lossy().into_owned() })
    }
}

/// Makes the process keep memory that it frees. A training step allocates thousands of tensors of megabytes; if the
/// system takes them back, a CPU spends as long on clearing their pages as on computing them (a quarter of a step of
/// the 0.5B). Call it first in a program. It has no effect without the GNU C library.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const M_TRIM_THRESHOLD: c_int = -1;
        const M_TOP_PAD: c_int = -2;
        const M_MMAP_MAX: c_int = -4;
        mallopt(M_MMAP_MAX, 0);
        mallopt(M_TRIM_THRESHOLD, -1); // never; the largest number would be 2 GiB, less than a step frees
        mallopt(M_TOP_PAD, 64 << 20);
    }
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the allocator's own interface")]
fn mallopt(setting: c_int, value: c_int) {
    unsafe extern "C" {
        #[link_name = "mallopt"]
        fn c_mallopt(setting: c_int, value: c_int) -> c_int;
    }
    // SAFETY: any two numbers may be given; what the allocator does not know it refuses.
    let _ = unsafe { c_mallopt(setting, value) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_by_another_name_is_refused() {
        assert_eq!(device("cpu").unwrap(), Device::Cpu);
        assert!(device("gpu").unwrap_err().to_string().contains("expected one of: cpu, cuda, cuda:N"));
    }
}
