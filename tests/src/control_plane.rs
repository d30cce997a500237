//! The control plane under test.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

use crate::api::Api;
use crate::binaries;
use crate::clock::Clock;
use crate::http::{self, Request};
use crate::ports::Port;
use crate::process::Process;
use crate::wait::wait_until;
use crate::{SOON, process, trace};

/// One `keygate serve` with a directory and ports of its own, running or not.
#[derive(Debug)]
pub struct ControlPlane {
    directory: PathBuf,
    api_port: Port,
    sync_port: Port,
    redis: Option<String>,
    clock: Option<String>,
    moved_clock: Option<Clock>,
    new_admin_key: bool,
    environment: Vec<(String, String)>,
    extra: Vec<String>,
    process: Option<Process>,
}

impl ControlPlane {
    /// One that does not run yet.
    pub fn new(directory: &Path) -> Self {
        Self {
            directory: directory.to_owned(),
            api_port: Port::reserve(),
            sync_port: Port::reserve(),
            redis: None,
            clock: None,
            moved_clock: None,
            new_admin_key: false,
            environment: vec![("KEYGATE_LIMITS_ENFORCE".to_owned(), "false".to_owned())],
            extra: Vec::new(),
            process: None,
        }
    }

    /// Another one of the same fleet, in a directory of its own: with the same master key and fleet token. `first`
    /// must have been started once.
    #[track_caller]
    pub fn beside(first: &Self, directory: &Path) -> Self {
        let another = Self::new(directory);
        fs::create_dir_all(another.data()).expect("a directory");
        for (from, to) in [
            (first.fleet_token_file(), another.fleet_token_file()),
            (first.data().join("master.key"), another.data().join("master.key")),
        ] {
            fs::copy(&from, &to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
        }
        another
    }

    /// From the next start on it shares the Redis at this URL.
    pub fn use_redis(&mut self, url: &str) {
        self.redis = Some(url.to_owned());
    }

    /// From the next start on its clock goes wrong by so much, as `faketime` writes it: `+1y`. Time passes as ever.
    pub fn use_clock(&mut self, offset: &str) {
        self.clock = Some(offset.to_owned());
    }

    /// From the next start on it has this variable.
    pub fn use_variable(&mut self, name: &str, value: &str) {
        self.environment.retain(|(other, _)| other != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// From the next start on it has this argument, too.
    pub fn use_argument(&mut self, argument: &str) {
        self.extra.push(argument.to_owned());
    }

    /// From the next start on it does not have this variable.
    pub fn drop_variable(&mut self, name: &str) {
        self.environment.retain(|(other, _)| other != name);
    }

    /// From the next start on it goes by this clock.
    pub fn use_moved_clock(&mut self, clock: &Clock) {
        self.moved_clock = Some(clock.clone());
    }

    /// At the next start it issues another first admin key, for operators who have none that counts.
    pub fn want_new_admin_key(&mut self) {
        self.new_admin_key = true;
    }

    /// Starts it and waits until it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        self.launch();
        self.wait_ready();
    }

    /// Starts it.
    #[track_caller]
    pub fn launch(&mut self) {
        self.launch_program(&binaries::keygate(), |_| {});
    }

    /// Starts it under `strace`, told so. With `-D` among that the process is the control plane's own.
    #[track_caller]
    pub fn launch_traced<'a>(&mut self, options: impl IntoIterator<Item = &'a str>, to: &Path) {
        self.launch_program(Path::new("strace"), |command| {
            command.args(options).arg("-o").arg(to).arg(binaries::keygate());
        });
    }

    /// Starts it with a bound of its open files, and waits until it is ready.
    #[track_caller]
    pub fn start_with_files(&mut self, files: usize) {
        self.launch_program(Path::new("prlimit"), |command| {
            command.arg(format!("--nofile={files}:{files}")).arg(binaries::keygate());
        });
        self.wait_ready();
    }

    fn launch_program(&mut self, program: &Path, first: impl FnOnce(&mut Command)) {
        assert!(self.process.is_none(), "the control plane runs already");
        let started = Process::start("keygate", program, &self.log(), |command| {
            first(command);
            self.arguments(command);
            if let Some(offset) = &self.clock {
                // Debian's place, whatever the machine's architecture; the loader knows it.
                command.env("LD_PRELOAD", "/usr/$LIB/faketime/libfaketimeMT.so.1");
                command.env("FAKETIME", offset).env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            }
            if let Some(clock) = &self.moved_clock {
                clock.give_to(command);
            }
        });
        self.new_admin_key = false;
        self.process = Some(started);
    }

    /// Adds the arguments it is started with.
    pub fn arguments(&self, command: &mut Command) {
        command
            .arg("serve")
            .arg("--data-dir")
            .arg(self.data())
            .arg("--listen")
            .arg(format!("127.0.0.1:{}", self.api_port()))
            .arg("--sync-listen")
            .arg(format!("127.0.0.1:{}", self.sync_port()))
            .arg("--admin-key-file")
            .arg(self.admin_key_file())
            .arg("--fleet-token-file")
            .arg(self.fleet_token_file())
            .arg("--policy")
            .arg(binaries::root().join("envoy/demo-policy.json"));
        if let Some(url) = &self.redis {
            command.env("KEYGATE_REDIS_URL", url); // Not an argument: it may hold a password.
        }
        command.args(&self.extra);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        if self.new_admin_key {
            command.arg("--new-admin-key");
        }
        if self.config_file().exists() {
            command.arg("--config").arg(self.config_file());
        }
    }

    /// Waits until it is ready.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        wait_until(SOON, "the control plane to be ready", || self.is_ready());
    }

    /// Whether it says that it is ready; panics when it has ended.
    #[track_caller]
    pub fn is_ready(&mut self) -> bool {
        self.process.as_mut().expect("it runs").assert_runs();
        http::try_call(self.api_port(), &Request::get("/readyz")).is_ok_and(|answer| answer.status == 200)
    }

    /// Whether it answers that it is ready; also when it has ended.
    pub fn answers(&self) -> bool {
        http::try_call(self.api_port(), &Request::get("/readyz")).is_ok_and(|answer| answer.status == 200)
    }

    /// Its process.
    #[track_caller]
    pub fn id(&self) -> u32 {
        self.process.as_ref().expect("it runs").id()
    }

    /// How it ended, if it has.
    #[track_caller]
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut().expect("it was started").ended()
    }

    /// Stops it the polite way.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.process.take().expect("it runs").stop()
    }

    /// Kills it as a crash would.
    #[track_caller]
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Has it killed as one of its threads enters a system call for the `nth` time from now on, unless what is returned
    /// is stopped before.
    #[track_caller]
    pub fn kill_at(&self, call: &str, nth: usize) -> Process {
        let id = self.process.as_ref().expect("it runs").id();
        trace::kill_at(id, call, nth, &self.directory.join("strace.log"))
    }

    /// Has it die as a bug would have it die, so that the kernel would write its memory to disk.
    #[track_caller]
    pub fn abort(&mut self) -> ExitStatus {
        self.process.take().expect("it runs").abort()
    }

    /// Loses the data directory but for the keys and tokens that operators keep elsewhere, too. It must not run.
    #[track_caller]
    pub fn lose_data(&self) {
        assert!(!self.is_running(), "it runs");
        for entry in fs::read_dir(self.data()).expect("the data directory") {
            let entry = entry.expect("an entry");
            let (path, name) = (entry.path(), entry.file_name());
            if path.is_dir() {
                fs::remove_dir_all(&path).expect("gone");
            } else if !["master.key", "fleet.token", "admin.key"].iter().any(|kept| name == *kept) {
                fs::remove_file(&path).expect("gone");
            }
        }
    }

    /// Waits for it to end by itself.
    #[track_caller]
    pub fn wait_end(&mut self) -> ExitStatus {
        self.process.take().expect("it runs").wait(SOON)
    }

    /// Stops its time: it keeps its connections, accepts new ones and answers nothing.
    pub fn pause(&self) {
        self.process.as_ref().expect("it runs").pause();
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.process.as_ref().expect("it runs").resume();
    }

    /// Whether it was started and not stopped since.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Its API with the bootstrap admin's key.
    #[track_caller]
    pub fn api(&self) -> Api {
        Api::new(self.api_port(), &self.admin_key())
    }

    /// The bootstrap admin's key.
    #[track_caller]
    pub fn admin_key(&self) -> String {
        std::fs::read_to_string(self.admin_key_file()).expect("the admin key").trim().to_owned()
    }

    /// Where the bootstrap admin's key is.
    pub fn admin_key_file(&self) -> PathBuf {
        self.directory.join("admin.key")
    }

    /// Where the proxies' token is.
    pub fn fleet_token_file(&self) -> PathBuf {
        self.directory.join("fleet.token")
    }

    /// Its configuration file; used when there is one.
    pub fn config_file(&self) -> PathBuf {
        self.directory.join("keygate.toml")
    }

    /// Its data.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.directory.join("keygate.log")
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        process::tail(&self.log())
    }

    /// The port of its API.
    pub fn api_port(&self) -> u16 {
        self.api_port.number()
    }

    /// The port for filters.
    pub fn sync_port(&self) -> u16 {
        self.sync_port.number()
    }
}
