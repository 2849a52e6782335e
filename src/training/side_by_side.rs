//! Runs jobs on several threads. A step of a small model cannot use more than one core, so small models are trained at
//! the same time, one per thread. Each thread has its own model.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::{available_parallelism, scope};

use anyhow::{Result, ensure};
use hooks::profile::{self, Stage};

/// Largest number of parameters of a small model.
pub const SMALL: usize = 1_000_000;

/// Number of threads for `n_jobs` jobs with models of this many parameters.
pub fn workers(n_parameters: usize, n_jobs: usize) -> usize {
    let cores = available_parallelism().map_or(1, usize::from);
    if n_parameters <= SMALL { cores.min(n_jobs).max(1) } else { 1 }
}

/// Runs the jobs on some threads and returns their results in order. After a failure no further job is begun, and the
/// first failed job's error is returned.
pub fn side_by_side<J: Sync, T: Send>(
    jobs: &[J],
    workers: usize,
    work: impl Fn(usize, &J) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let (next, results) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let (profiling, profiles) = (profile::is_on(), Mutex::new(Vec::new()));
    let worker = || {
        tch::set_num_threads(1);
        if profiling {
            profile::start();
        }
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(at) else { break };
            let result = work(at, job);
            if result.is_err() {
                next.store(jobs.len(), Ordering::Relaxed);
            }
            results.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((at, result));
        }
        profiles.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(profile::finish());
    };
    let waiting = profile::stage(Stage::Other);
    scope(|scope| {
        for _ in 0..workers.max(1) {
            scope.spawn(worker);
        }
    });
    profile::join(profiles.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner));
    drop(waiting);
    let mut results = results.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    results.sort_by_key(|(at, _)| *at);
    let done: Vec<T> = results.into_iter().map(|(_, result)| result).collect::<Result<_>>()?;
    ensure!(done.len() == jobs.len(), "{} of {} jobs were not done", jobs.len() - done.len(), jobs.len());
    Ok(done)
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn results_are_in_the_jobs_order_whoever_is_first() {
        let jobs: Vec<u64> = (0..20).collect();
        let slow_first = |_: usize, job: &u64| {
            std::thread::sleep(std::time::Duration::from_millis(if *job == 0 { 30 } else { 0 }));
            Ok(job * job)
        };
        assert_eq!(side_by_side(&jobs, 3, slow_first).unwrap(), jobs.iter().map(|job| job * job).collect::<Vec<_>>());
    }

    #[test]
    fn a_failure_is_told_and_nothing_is_begun_after_it() {
        let begun = AtomicUsize::new(0);
        let jobs = [0; 100];
        let error = side_by_side(&jobs, 2, |at, _| {
            begun.fetch_add(1, Ordering::Relaxed);
            if at == 3 {
                bail!("job {at} failed");
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
            Ok(())
        });
        assert_eq!(error.unwrap_err().to_string(), "job 3 failed");
        assert!(begun.load(Ordering::Relaxed) < 50, "{begun:?} of 100 were begun");
    }

    #[test]
    fn a_profile_holds_what_the_workers_did() {
        profile::start();
        let job = |_: usize, _: &i32| {
            drop(profile::stage(Stage::Loss));
            Ok(())
        };
        side_by_side(&[0; 7], 2, job).unwrap();
        let calls = |profile: &profile::Profile| {
            profile.by_stage().iter().map(|(stage, cost)| (*stage, cost.calls)).collect::<Vec<_>>()
        };
        assert_eq!(calls(&profile::finish()), [(Stage::Loss, 7), (Stage::Other, 1)]);
        side_by_side(&[0; 7], 2, job).unwrap();
        assert_eq!(calls(&profile::finish()), []);
    }

    #[test]
    fn a_large_model_has_the_machine_to_itself() {
        assert_eq!(workers(SMALL + 1, 10), 1);
        assert_eq!(workers(SMALL, 1), 1);
    }
}
