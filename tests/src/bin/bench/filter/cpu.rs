//! CPUs and what processes take of them.

use std::collections::BTreeMap;
use std::fs;

use rustix::process::{Pid, setpriority_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where what is measured runs, and where all the rest does.
#[derive(Debug, Clone, Copy)]
pub struct Cpus {
    pub measured: usize,
    pub rest: usize,
}

impl Cpus {
    /// The first two that this process may use; one for both where there is no second.
    pub fn find() -> Self {
        let allowed = sched_getaffinity(None).expect("the CPUs of this thread");
        let mut numbers = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu));
        let measured = numbers.next().expect("it runs on one");
        Self { measured, rest: numbers.next().unwrap_or(measured) }
    }

    pub fn is_one(self) -> bool {
        self.measured == self.rest
    }
}

/// Keeps a process on one CPU: each of its threads, and those that they start.
#[track_caller]
pub fn pin(process: u32, cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    let mut pinned = Vec::new();
    loop {
        // A thread may start another between two looks.
        let new: Vec<u32> = threads(process).into_iter().filter(|thread| !pinned.contains(thread)).collect();
        if new.is_empty() {
            assert!(!pinned.is_empty(), "process {process} has ended");
            return;
        }
        for thread in new {
            // One that has ended meanwhile needs no place.
            let _ = sched_setaffinity(id(thread), &set);
            pinned.push(thread);
        }
    }
}

/// Has the kernel run all threads of a process, or else this one, before others on the same CPU, where that is allowed: so
/// that it waits for nobody who has no part in what is measured.
pub fn prefer(process: Option<u32>) {
    const FIRST: i32 = -20;
    let threads = process.map_or(vec![None], |process| threads(process).into_iter().map(id).collect());
    for thread in threads {
        let _ = setpriority_process(thread, FIRST);
    }
}

/// Keeps this thread on one CPU, and those that it starts from now on.
pub fn pin_this_thread(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)
        .unwrap_or_else(|error| panic!("this thread cannot go to CPU {cpu}: {error}"));
}

fn id(number: u32) -> Option<Pid> {
    i32::try_from(number).ok().and_then(Pid::from_raw)
}

fn threads(process: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// The time on a CPU of each thread of some processes at one moment. The kernel counts it in nanoseconds there; in
/// `stat` it would be hundredths of a second.
#[derive(Debug, Clone, Default)]
pub struct Taken(BTreeMap<u32, u64>);

impl Taken {
    /// Until now.
    #[track_caller]
    pub fn now(processes: &[u32]) -> Self {
        let of = |process: &u32| {
            let threads = threads(*process);
            assert!(!threads.is_empty(), "process {process} has ended");
            let process = *process;
            threads.into_iter().filter_map(move |thread| {
                let text = fs::read_to_string(format!("/proc/{process}/task/{thread}/schedstat")).ok()?;
                Some((thread, on_cpu_ns(&text).unwrap_or_else(|| panic!("not a schedstat: {text:?}"))))
            })
        };
        Self(processes.iter().flat_map(of).collect())
    }

    /// Nanoseconds since an earlier moment. What a thread took that ended meanwhile is not in it.
    pub fn since(&self, before: &Self) -> u64 {
        let of = |(thread, now): (&u32, &u64)| now.saturating_sub(before.0.get(thread).copied().unwrap_or(0));
        self.0.iter().map(of).sum()
    }
}

/// The first of the three numbers of `/proc/PID/task/TID/schedstat` (Documentation/scheduler/sched-stats.rst of Linux):
/// nanoseconds on a CPU.
fn on_cpu_ns(schedstat: &str) -> Option<u64> {
    let numbers: Vec<u64> = schedstat.split_whitespace().map(str::parse).collect::<Result<_, _>>().ok()?;
    (numbers.len() == 3).then(|| numbers[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_is_the_time_on_a_cpu() {
        assert_eq!(on_cpu_ns("84311731 29082006 204\n"), Some(84_311_731));
        for wrong in ["", "84311731 29082006", "a b c", "1 2 3 4", "-1 2 3"] {
            assert_eq!(on_cpu_ns(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn threads_that_begin_count_and_those_that_end_do_not_count_backwards() {
        let before = Taken(BTreeMap::from([(1, 1_000), (2, 50_000)]));
        let after = Taken(BTreeMap::from([(1, 1_500), (3, 40)]));
        assert_eq!(after.since(&before), 540);
    }

    #[test]
    fn what_this_process_computes_is_seen() {
        let me = [std::process::id()];
        let before = Taken::now(&me);
        let begun = std::time::Instant::now();
        while begun.elapsed() < std::time::Duration::from_millis(50) {}
        assert!(Taken::now(&me).since(&before) > 1_000_000);
    }
}
