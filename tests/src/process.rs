//! Processes that never outlive their test.

use std::fs::File;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::wait::try_wait_for;
use crate::wait::wait_for;

/// A running process. Asked to stop, then killed, when dropped.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with what `prepare` adds, its output appended to `log`.
    pub fn start(name: &'static str, program: &Path, log: &Path, prepare: impl FnOnce(&mut Command)) -> Self {
        // `setpriv` asks the kernel to kill what it then becomes when this process dies, even by
        // SIGKILL.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program);
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("KEYGATE_") {
                command.env_remove(variable);
            }
        }
        prepare(&mut command);
        let output = File::options().create(true).append(true).open(log).expect("a log file");
        command
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("a second handle of the log"))
            .stderr(output);
        let child = spawn(command).unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        Self { name, child, log: log.to_owned() }
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("the child is ours")
    }

    /// Panics when it has ended.
    #[track_caller]
    pub fn assert_runs(&mut self) {
        if let Some(status) = self.ended() {
            panic!("{} has ended by itself: {status}; its log ends\n{}", self.name, self.log_tail());
        }
    }

    /// Asks it to stop and waits. Panics when it has to be killed, or ended by itself before.
    #[track_caller]
    pub fn stop(mut self) -> ExitStatus {
        self.assert_runs();
        let status = self.end();
        assert_ne!(status.signal(), Some(9), "{} does not stop when asked to", self.name);
        status
    }

    /// Kills it at once, as a crash would.
    pub fn kill(mut self) {
        self.child.kill().expect("the child is ours");
        self.child.wait().expect("the child is ours");
    }

    /// Aborts it, as a bug would.
    #[track_caller]
    pub fn abort(self) -> ExitStatus {
        self.signal(Signal::ABORT);
        self.wait(Duration::from_secs(10))
    }

    /// Stops its time: it keeps its connections, accepts new ones and answers nothing.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on after [`Self::pause`].
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Waits for it to end by itself.
    #[track_caller]
    pub fn wait(mut self, within: Duration) -> ExitStatus {
        let name = self.name;
        wait_for(within, &format!("the end of {name}"), || self.ended())
    }

    /// The end of its output.
    pub fn log_tail(&self) -> String {
        tail(&self.log)
    }

    /// The child is not waited for yet, so its id is still its own.
    fn signal(&self, signal: Signal) {
        if let Some(id) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(id, signal);
        }
    }

    fn end(&mut self) -> ExitStatus {
        if self.ended().is_none() {
            self.signal(Signal::TERM);
            // A paused one hears nothing.
            self.resume();
        }
        try_wait_for(Duration::from_secs(10), || self.ended()).unwrap_or_else(|| {
            let _ = self.child.kill();
            self.child.wait().expect("the child is ours")
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
    }
}

/// How much of a log is shown.
const TAIL_LINES: usize = 20;

/// The last lines of a file.
pub fn tail(path: &Path) -> String {
    let text = std::fs::read(path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n")
}

type Job = (Command, Sender<io::Result<Child>>);

/// The kernel takes the end of the *thread* that made a process for the end of its parent, and tests
/// make threads that end: so one thread that never ends makes them all.
fn spawn(command: Command) -> io::Result<Child> {
    static SPAWNER: LazyLock<Sender<Job>> = LazyLock::new(|| {
        let (jobs, todo): (Sender<Job>, Receiver<Job>) = channel();
        std::thread::spawn(move || {
            for (mut command, answer) in todo {
                let _ = answer.send(command.spawn());
            }
        });
        jobs
    });
    let (answer, spawned) = channel();
    SPAWNER.send((command, answer)).expect("the thread lives as long as the process");
    spawned.recv().expect("the thread answers")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_outlives_the_thread_that_started_it_and_not_its_handle() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let mut process = std::thread::spawn(move || {
            Process::start("sleep", Path::new("/bin/sleep"), &log, |command| {
                command.arg("1000");
            })
        })
        .join()
        .expect("it starts");
        // `setpriv` has become `sleep`, with the kernel's promise in its pocket.
        let program = format!("/proc/{}/exe", process.id());
        wait_for(Duration::from_secs(5), "the program", || {
            std::fs::read_link(&program).ok().filter(|path| !path.ends_with("setpriv"))
        });
        process.assert_runs();
        drop(process);
        assert!(!Path::new(&program).exists());
    }
}
