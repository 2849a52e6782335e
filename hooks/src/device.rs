//! The device to run on. One binary serves CPU and GPU: the CUDA part of libtorch is loaded at run time, if it is
//! installed.

use std::collections::BTreeSet;
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

/// Loads `libtorch_cuda.so` once, before a device is used. The library registers itself with libtorch on loading.
fn load_cuda() -> Result<()> {
    static LOADED: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    let loaded = LOADED.get_or_init(|| {
        prefer_other_attention();
        let beside = std::env::var("LIBTORCH").map(|folder| format!("{folder}/lib/libtorch_cuda.so"));
        let names = ["libtorch_cuda.so".to_owned()].into_iter().chain(beside);
        let tried: Vec<String> = names.map_while(|name| dlopen(&name).err()).collect();
        let all_failed = tried.len() == 1 + usize::from(std::env::var("LIBTORCH").is_ok());
        if all_failed {
            return Err(tried.join("; "));
        }
        mixed(&std::fs::read_to_string("/proc/self/maps").unwrap_or_default()).map_or(Ok(()), Err)
    });
    loaded.clone().map_err(|reason| Error::CudaUnavailable { reason })
}

/// Asks libtorch to take cuDNN's attention last. It plans anew for each shape of the keys, which grow at every answered
/// token; on H100 and H200 its gradients can be NaN (pytorch#196678). A value that the user has set stays.
#[expect(unsafe_code, reason = "the environment is the only switch that libtorch's binding has")]
fn prefer_other_attention() {
    const LAST: &str = "TORCH_CUDNN_SDPA_DEPRIORITIZED";
    if std::env::var_os(LAST).is_none() {
        // SAFETY: a program opens its device first, before it starts threads.
        unsafe { std::env::set_var(LAST, "1") }
    }
}

/// The problem if this process has mapped the two halves of libtorch from different installations, else `None`. `maps`:
/// the lines of `/proc/self/maps`.
fn mixed(maps: &str) -> Option<String> {
    let folders = |name: &str| -> BTreeSet<&str> {
        let paths = maps.lines().filter_map(|line| Some(&line[line.find('/')?..]));
        paths.filter_map(|path| path.strip_suffix(name)).collect()
    };
    let (cpu, cuda) = (folders("/libtorch_cpu.so"), folders("/libtorch_cuda.so"));
    let all: BTreeSet<&str> = cpu.union(&cuda).copied().collect();
    (all.len() > 1).then(|| {
        let all: Vec<&str> = all.into_iter().collect();
        format!("parts of several libtorch installations are loaded, from {}; expected one", all.join(" and "))
    })
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

/// The address of a function in the libraries that the process has loaded, if one of them has it.
#[expect(unsafe_code, reason = "the loader's own interface")]
pub(crate) fn symbol(name: &CStr) -> Option<*mut c_void> {
    unsafe extern "C" {
        fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
    }
    // SAFETY: `name` is a C string that outlives the call; no handle means all libraries in their order.
    let found = unsafe { dlsym(std::ptr::null_mut(), name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

/// Makes the process keep memory that it frees. A training step allocates thousands of tensors of megabytes; if their
/// memory goes back to the system, clearing its pages again takes a CPU as long as the computation (a quarter of a step
/// of the 0.5B). Call this first in a program. Without the GNU C library it has no effect.
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
    // SAFETY: mallopt accepts any two numbers and refuses settings that it does not know.
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

    #[test]
    fn halves_of_two_libtorches_are_refused() {
        let line = |path: &str| format!("7f1c2a000000-7f1c2b000000 r-xp 00001000 08:01 131 {path}\n");
        let one = line("/a/lib/libtorch_cpu.so") + &line("/a/lib/libtorch_cpu.so") + &line("/usr/lib/libc.so.6");
        assert_eq!(mixed(&one), None);
        assert_eq!(mixed(&(one.clone() + &line("/a/lib/libtorch_cuda.so"))), None);
        let message = mixed(&(one + &line("/b/lib/libtorch_cuda.so"))).unwrap();
        assert!(message.contains("from /a/lib and /b/lib; expected one"), "{message}");
    }
}
