//! Keeps CPUs awake. In a virtual machine it takes longer to wake a CPU up than to answer a request, and how long is up
//! to the host: so without this, what is measured at less than full speed is mostly that.

use std::path::Path;

use keygate_e2e::process::Process;

use super::cpu::{self, Cpus};

/// As what the benchmark starts it.
pub const COMMAND: &str = "stay-awake";

/// Runs on each CPU when nobody else does: the kernel takes the CPU away from a thread of `SCHED_IDLE` at once for any
/// other (sched(7)).
#[derive(Debug)]
pub struct Awake {
    _processes: Vec<Process>,
}

impl Awake {
    pub fn start(cpus: Cpus, directory: &Path) -> Self {
        let this = std::env::current_exe().expect("a program knows its path");
        let on = |cpu: usize| {
            let log = directory.join(format!("awake-{cpu}.log"));
            let process = Process::start("awake", Path::new("chrt"), &log, |command| {
                command.args(["--idle", "0"]).arg(&this).arg(COMMAND);
            });
            cpu::pin(process.id(), cpu);
            process
        };
        let mut processes = vec![on(cpus.measured)];
        if !cpus.is_one() {
            processes.push(on(cpus.rest));
        }
        Self { _processes: processes }
    }
}

/// Does nothing, without a pause.
pub fn run() -> ! {
    loop {
        std::hint::spin_loop();
    }
}
