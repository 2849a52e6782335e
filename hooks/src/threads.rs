//! Work shared among libtorch's own threads. Threads of another pool would compete with these for the cores, because they
//! spin for a moment after each operation.

use std::ffi::{c_uint, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::device::symbol;

/// Calls `work` once with each piece, on libtorch's threads if they are GNU OpenMP's, else one after another.
pub(crate) fn each<P: Send>(pieces: Vec<P>, work: impl Fn(P) + Sync) {
    let pieces: Vec<Mutex<Option<P>>> = pieces.into_iter().map(|piece| Mutex::new(Some(piece))).collect();
    let next = AtomicUsize::new(0);
    in_parallel(&|| {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Some(piece) = piece.lock().unwrap_or_else(PoisonError::into_inner).take() {
                work(piece);
            }
        }
    });
}

type Job<'a> = &'a (dyn Fn() + Sync);

/// `GOMP_parallel`: calls a function with `data` on each of some threads, and returns when all have ended.
type Parallel = unsafe extern "C" fn(extern "C" fn(*mut c_void), *mut c_void, threads: c_uint, flags: c_uint);

/// Runs the job on each of libtorch's threads.
#[expect(unsafe_code, reason = "OpenMP's interface has pointers")]
fn in_parallel(job: Job<'_>) {
    static FOUND: OnceLock<Option<Parallel>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        // SAFETY: the symbol is GNU OpenMP's, which never changed this interface.
        symbol(c"GOMP_parallel").map(|found| unsafe { std::mem::transmute::<*mut c_void, Parallel>(found) })
    });
    let Some(parallel) = found else { return job() };
    let threads = c_uint::try_from(tch::get_num_threads()).unwrap_or(1);
    let data = std::ptr::from_ref(&job).cast_mut().cast::<c_void>();
    // SAFETY: `data` is the job, which is shared and outlives the call.
    unsafe { parallel(run, data, threads, 0) }
}

/// A panic in the job ends the process here, since it cannot pass through C.
#[expect(unsafe_code, reason = "OpenMP's interface has pointers")]
extern "C" fn run(data: *mut c_void) {
    // SAFETY: `in_parallel` passes a job.
    let job = unsafe { &*data.cast::<Job<'_>>() };
    job();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_piece_is_done_once() {
        let mut numbers = vec![0; 1000];
        for n in [0, 1, 7] {
            each(numbers.chunks_mut(7).take(n * 20).collect(), |piece| piece.iter_mut().for_each(|x| *x += 1));
        }
        assert_eq!(numbers.iter().filter(|x| **x == 2).count(), 140);
        assert_eq!(numbers.iter().sum::<i32>(), 20 * 7 + 140 * 7);
        assert!(symbol(c"GOMP_parallel").is_some() || !cfg!(target_os = "linux"), "libtorch's threads");
    }
}
