//! Real Redis: one server, a master with replicas and Sentinels, or a Cluster.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

use crate::SOON;
use crate::binaries;
use crate::ports::Port;
use crate::process::{Process, tail};
use crate::wait::wait_until;

/// How long a server may be silent before Sentinels or a Cluster call it dead, in milliseconds. Short, for
/// tests that wait for it; long enough for a busy machine.
const DEAD_AFTER_MS: u32 = 1000;

/// The name that [`Sentinels`] give their master.
const MASTER_NAME: &str = "mymaster";

/// One Redis server with a port and a directory of its own, running or not. By itself it keeps nothing on
/// disk.
#[derive(Debug)]
pub struct Redis {
    /// Before its directory, which is removed when it has ended.
    process: Option<Process>,
    directory: TempDir,
    port: Port,
    settings: String,
    password: Option<String>,
    tls: bool,
    source: Option<Ipv4Addr>,
}

impl Redis {
    /// Starts one and waits until it answers.
    #[track_caller]
    pub fn start() -> Self {
        let mut redis = Self::new();
        redis.run();
        redis
    }

    /// One that does not run yet.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        // What is set later wins.
        let settings = format!(
            "bind 127.0.0.1\ndaemonize no\nlogfile \"\"\nsave \"\"\nappendonly no\nrepl-diskless-sync-delay 0\ndir {}\n",
            directory.path().display()
        );
        Self {
            directory,
            port: Port::reserve(),
            settings,
            password: None,
            tls: false,
            source: None,
            process: None,
        }
    }

    /// With settings, as in `redis.conf`.
    #[must_use]
    pub fn with_config(mut self, settings: &[(&str, &str)]) -> Self {
        for (name, value) in settings {
            writeln!(self.settings, "{name} {value}").expect("a text takes all");
        }
        self
    }

    /// With everything on disk before it is answered.
    #[must_use]
    pub fn with_append_only(self) -> Self {
        self.with_config(&[("appendonly", "yes"), ("appendfsync", "always")])
    }

    /// With a password for the default user.
    #[must_use]
    pub fn with_password(mut self, password: &str) -> Self {
        self.password = Some(password.to_owned());
        self.with_config(&[("requirepass", password), ("masterauth", password)])
    }

    /// With one more user; `rules` as in `ACL SETUSER`, like `~* &* +@all`.
    #[must_use]
    pub fn with_acl(self, user: &str, password: &str, rules: &str) -> Self {
        self.with_config(&[("user", &format!("{user} on >{password} {rules}"))])
    }

    /// With TLS alone, by a certificate for `127.0.0.1` and `localhost` from [`Self::ca`].
    #[must_use]
    pub fn with_tls(mut self) -> Self {
        make_certificates(self.directory.path());
        self.tls = true;
        let file = |name: &str| self.directory.path().join(name).display().to_string();
        let (ca, certificate, key) = (file("ca.pem"), file("server.pem"), file("server.key"));
        self.with_config(&[
            ("tls-ca-cert-file", &ca),
            ("tls-cert-file", &certificate),
            ("tls-key-file", &key),
            ("tls-auth-clients", "no"),
            ("tls-replication", "yes"),
        ])
    }

    /// Connects to other servers from an address of its own, and so do Sentinels that watch it.
    #[must_use]
    pub fn with_source(mut self, address: Ipv4Addr) -> Self {
        self.source = Some(address);
        self.with_config(&[
            ("bind-source-addr", &address.to_string()),
            ("replica-announce-ip", "127.0.0.1"), // It does not listen at the other.
            ("protected-mode", "no"),             // Which knows this machine by 127.0.0.1 alone.
        ])
    }

    /// A replica of another.
    #[must_use]
    pub fn replica_of(self, master: &Self) -> Self {
        self.with_config(&[("replicaof", &format!("127.0.0.1 {}", master.port()))])
    }

    /// Starts it, again on the same port with the same directory, and waits until it answers, and if it is
    /// a replica, until it follows its master.
    #[track_caller]
    pub fn run(&mut self) {
        self.launch();
        self.wait_ready();
    }

    /// Starts it.
    #[track_caller]
    pub fn launch(&mut self) {
        assert!(self.process.is_none(), "Redis runs already");
        let port = if self.tls { "port 0\ntls-port" } else { "port" };
        let file = self.directory.path().join("redis.conf");
        std::fs::write(&file, format!("{port} {}\n{}", self.port(), self.settings)).expect("its file");
        let started = Process::start("redis-server", &binaries::redis_server(), &self.log(), |command| {
            command.arg(file);
        });
        self.process = Some(started);
    }

    /// Waits until it answers, and if it is a replica, until it follows its master.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        wait_until(SOON, "Redis to be ready", || {
            self.process.as_mut().expect("it runs").assert_runs();
            let answers = |arguments: &[&str]| text(&self.output(arguments));
            answers(&["PING"]) == "PONG"
                && !answers(&["INFO", "replication"]).contains("master_link_status:down")
        });
    }

    /// Stops it the polite way.
    #[track_caller]
    pub fn stop(&mut self) {
        self.process.take().expect("it runs").stop();
    }

    /// Kills it as a crash would.
    #[track_caller]
    pub fn kill(&mut self) {
        self.process.take().expect("it runs").kill();
    }

    /// Stops its time: it keeps its connections, accepts new ones and answers nothing.
    #[track_caller]
    pub fn pause(&self) {
        self.process.as_ref().expect("it runs").pause();
    }

    /// Lets it go on after [`Self::pause`].
    #[track_caller]
    pub fn resume(&self) {
        self.process.as_ref().expect("it runs").resume();
    }

    /// What `redis-cli` prints for a command, as the default user.
    #[track_caller]
    pub fn cli(&self, arguments: &[&str]) -> String {
        let output = self.output(arguments);
        assert!(
            output.status.success(),
            "redis-cli {arguments:?}: {}{}; the log of Redis ends\n{}",
            text(&output),
            String::from_utf8_lossy(&output.stderr),
            tail(&self.log())
        );
        text(&output)
    }

    fn output(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(binaries::redis_cli());
        command.args(["-h", "127.0.0.1", "-p", &self.port().to_string()]);
        if self.tls {
            command.arg("--tls").arg("--cacert").arg(self.ca());
        }
        if let Some(password) = &self.password {
            command.env("REDISCLI_AUTH", password);
        }
        command.args(arguments).stdin(Stdio::null()).output().expect("redis-cli runs")
    }

    /// The value of a line of `INFO`, like `role`; `None` also while it does not answer, as when its role changes.
    pub fn info(&self, name: &str) -> Option<String> {
        let output = self.output(&["INFO"]);
        let all = if output.status.success() { text(&output) } else { return None };
        all.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
    }

    /// Its URL with the default user's password.
    pub fn url(&self) -> String {
        match &self.password {
            Some(password) => self.url_as(&format!(":{password}")),
            None => self.url_as(""),
        }
    }

    /// Its URL with another login: `user:password`, or nothing.
    pub fn url_as(&self, login: &str) -> String {
        let at = if login.is_empty() { "" } else { "@" };
        if self.tls {
            format!("rediss://{login}{at}127.0.0.1:{}?ca={}", self.port(), self.ca().display())
        } else {
            format!("redis://{login}{at}127.0.0.1:{}", self.port())
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Where its data is.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The root of its certificate, if it is with TLS.
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Its log.
    pub fn log(&self) -> PathBuf {
        self.directory.path().join("redis.log")
    }

    /// Whether it was started and not stopped since.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }
}

impl Default for Redis {
    fn default() -> Self {
        Self::new()
    }
}

/// Sentinels that watch one master and its replicas.
#[derive(Debug)]
pub struct Sentinels {
    all: Vec<Sentinel>,
    password: Option<String>,
}

#[derive(Debug)]
struct Sentinel {
    port: Port,
    /// Before its directory, which is removed when it has ended.
    process: Option<Process>,
    _directory: TempDir,
}

impl Sentinels {
    /// Starts `count` that watch `master`, whose replicas must follow it by now, and waits until all know
    /// each other and the replicas. `quorum` of them must agree that it is dead.
    #[track_caller]
    pub fn start(master: &Redis, count: usize, quorum: usize) -> Self {
        let start = |_| {
            let (port, directory) = (Port::reserve(), tempfile::tempdir().expect("a directory"));
            let file = directory.path().join("sentinel.conf");
            let mut settings = format!(
                "port {}\nbind 127.0.0.1\ndir {}\n\
                 sentinel monitor {MASTER_NAME} 127.0.0.1 {} {quorum}\n\
                 sentinel down-after-milliseconds {MASTER_NAME} {DEAD_AFTER_MS}\n\
                 sentinel failover-timeout {MASTER_NAME} {}\n",
                port.number(),
                directory.path().display(),
                master.port(),
                4 * DEAD_AFTER_MS
            );
            if let Some(password) = &master.password {
                writeln!(settings, "sentinel auth-pass {MASTER_NAME} {password}").expect("a text takes all");
            }
            if let Some(source) = master.source {
                writeln!(settings, "bind-source-addr {source}\nsentinel announce-ip 127.0.0.1")
                    .expect("a text takes all");
            }
            std::fs::write(&file, settings).expect("its file");
            let log = directory.path().join("sentinel.log");
            let process = Process::start("redis-sentinel", &binaries::redis_sentinel(), &log, |command| {
                command.arg(file);
            });
            Sentinel { port, process: Some(process), _directory: directory }
        };
        let replicas: usize = master.info("connected_slaves").and_then(|n| n.parse().ok()).unwrap_or(0);
        let sentinels = Self { all: (0..count).map(start).collect(), password: master.password.clone() };
        for sentinel in &sentinels.all {
            wait_until(SOON, "a Sentinel to know the others and the replicas", || {
                sentinel.member("num-other-sentinels") == Some((count - 1).to_string())
                    && sentinel.member("num-slaves") == Some(replicas.to_string())
                    && sentinel.member("flags").as_deref() == Some("master")
            });
        }
        sentinels
    }

    /// The URL of the master that they know.
    pub fn url(&self) -> String {
        let login = self.password.as_ref().map(|password| format!(":{password}@")).unwrap_or_default();
        let hosts: Vec<String> =
            self.all.iter().map(|sentinel| format!("127.0.0.1:{}", sentinel.port.number())).collect();
        format!("redis+sentinel://{login}{}/{MASTER_NAME}", hosts.join(","))
    }

    /// The port of the master, as the first that runs says.
    #[track_caller]
    pub fn master_port(&self) -> u16 {
        let port = self.running().find_map(|sentinel| sentinel.member("port"));
        port.and_then(|port| port.parse().ok()).expect("a Sentinel that runs")
    }

    /// Waits until all that run say that the master is at `port` and well.
    #[track_caller]
    pub fn wait_for_master(&self, port: u16) {
        wait_until(SOON, "the Sentinels to agree on the new master", || {
            self.running().all(|sentinel| {
                sentinel.member("port") == Some(port.to_string())
                    && sentinel.member("flags").as_deref() == Some("master")
            })
        });
    }

    /// Has them make a replica the master, as an operator does while the old one is well. Ends when it has
    /// begun.
    #[track_caller]
    pub fn fail_over(&self) {
        let sentinel = self.running().next().expect("a Sentinel that runs");
        assert_eq!(sentinel.cli(&["SENTINEL", "FAILOVER", MASTER_NAME]), "OK");
    }

    /// Kills one of them.
    #[track_caller]
    pub fn kill(&mut self, index: usize) {
        self.all[index].process.take().expect("it runs").kill();
    }

    fn running(&self) -> impl Iterator<Item = &Sentinel> {
        self.all.iter().filter(|sentinel| sentinel.process.is_some())
    }
}

impl Sentinel {
    fn cli(&self, arguments: &[&str]) -> String {
        let mut command = Command::new(binaries::redis_cli());
        command.args(["-h", "127.0.0.1", "-p", &self.port.number().to_string()]).args(arguments);
        text(&command.stdin(Stdio::null()).output().expect("redis-cli runs"))
    }

    /// What it knows of the master by a name.
    fn member(&self, name: &str) -> Option<String> {
        let answer = self.cli(&["SENTINEL", "MASTER", MASTER_NAME]);
        let mut lines = answer.lines();
        while let (Some(found), Some(value)) = (lines.next(), lines.next()) {
            if found == name {
                return Some(value.to_owned());
            }
        }
        None
    }
}

/// A Cluster of masters without replicas.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Redis>,
    /// Where the nodes speak with each other: usually 10,000 above their port, which is nobody's to reserve.
    _bus: Vec<Port>,
}

impl Cluster {
    /// Starts `count` of them, at least three, and waits until they serve all slots.
    #[track_caller]
    pub fn start(count: usize) -> Self {
        Self::start_with(count, |node| node)
    }

    /// The same with nodes as `prepare` makes them.
    #[track_caller]
    pub fn start_with(count: usize, prepare: impl Fn(Redis) -> Redis) -> Self {
        let bus: Vec<Port> = (0..count).map(|_| Port::reserve()).collect();
        let mut nodes: Vec<Redis> = bus
            .iter()
            .map(|bus| {
                prepare(Redis::new()).with_config(&[
                    ("cluster-enabled", "yes"),
                    ("cluster-port", &bus.number().to_string()),
                    ("cluster-node-timeout", &DEAD_AFTER_MS.to_string()),
                ])
            })
            .collect();
        for node in &mut nodes {
            node.run();
        }
        let addresses: Vec<String> = nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        let mut arguments = vec!["--cluster", "create"];
        arguments.extend(addresses.iter().map(String::as_str));
        arguments.push("--cluster-yes");
        nodes[0].cli(&arguments);
        let cluster = Self { nodes, _bus: bus };
        cluster.wait_ready();
        cluster
    }

    /// Waits until all nodes say that all slots are served.
    #[track_caller]
    pub fn wait_ready(&self) {
        let known = format!("cluster_known_nodes:{}", self.nodes.len());
        wait_until(SOON * 2, "the Cluster to serve all slots", || {
            self.nodes.iter().all(|node| {
                let info = node.cli(&["CLUSTER", "INFO"]);
                ["cluster_state:ok", "cluster_slots_ok:16384", &known]
                    .iter()
                    .all(|wanted| info.lines().any(|line| line.trim() == *wanted))
            })
        });
    }

    /// Its nodes.
    pub fn nodes(&mut self) -> &mut [Redis] {
        &mut self.nodes
    }

    /// One of its nodes.
    pub fn node(&self, index: usize) -> &Redis {
        &self.nodes[index]
    }

    /// What `redis-cli -c` prints for a command, whichever node holds the key.
    #[track_caller]
    pub fn cli(&self, arguments: &[&str]) -> String {
        self.nodes[0].cli(&[&["-c"], arguments].concat())
    }

    /// Its URL, with all nodes.
    pub fn url(&self) -> String {
        let login =
            self.nodes[0].password.as_ref().map(|password| format!(":{password}@")).unwrap_or_default();
        let hosts: Vec<String> = self.nodes.iter().map(|node| format!("127.0.0.1:{}", node.port())).collect();
        format!("redis+cluster://{login}{}", hosts.join(","))
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

/// How long certificates are made for, in days: tests are shorter.
const CERTIFICATE_DAYS: &str = "2";

/// Makes a root and a server's certificate by it, which must not be one and the same: verifiers refuse a
/// root as a server.
#[track_caller]
fn make_certificates(directory: &Path) {
    let make = |arguments: &str| {
        let output = Command::new(binaries::openssl())
            .current_dir(directory)
            .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days".split(' '))
            .arg(CERTIFICATE_DAYS)
            .args(arguments.split(' '))
            .output()
            .expect("openssl runs");
        assert!(output.status.success(), "openssl: {}", String::from_utf8_lossy(&output.stderr));
    };
    make("-subj /CN=keygate-e2e-root -keyout ca.key -out ca.pem");
    make(
        "-subj /CN=redis -CA ca.pem -CAkey ca.key -keyout server.key -out server.pem \
         -addext basicConstraints=critical,CA:FALSE -addext subjectAltName=IP:127.0.0.1,DNS:localhost",
    );
}
