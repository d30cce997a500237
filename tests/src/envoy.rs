//! The Envoy under test.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use serde_json::Value;

use crate::clock::Clock;
use crate::http::{self, Connection, Request, Response};
use crate::ports::Port;
use crate::process::{self, Process};
use crate::wait::{wait_for, wait_until};
use crate::{SOON, binaries};

/// What an Envoy is connected with.
#[derive(Debug, Clone)]
pub struct Neighbours {
    /// The port of the control plane's API.
    pub api_port: u16,
    /// The port of the control plane for filters.
    pub sync_port: u16,
    /// The port of the upstream.
    pub upstream_port: u16,
    /// The port of the V1 upstream.
    pub upstream_v1_port: u16,
    /// What the filter presents to the control plane.
    pub fleet_token: String,
}

/// The filter that an Envoy has.
#[derive(Debug, Clone)]
enum Filter {
    /// In WebAssembly.
    Wasm(PathBuf),
    /// As a dynamic module.
    Module(PathBuf),
}

impl Filter {
    /// The one that `KEYGATE_E2E_FILTER` names. Otherwise a dynamic module in the program `e2e-module`, as which
    /// `scripts/test` has nextest run the tests once more, and WebAssembly elsewhere.
    fn usual() -> Self {
        match std::env::var("KEYGATE_E2E_FILTER").as_deref() {
            Ok("module") => Self::Module(binaries::module()),
            Ok("wasm") => Self::Wasm(binaries::filter()),
            Ok(other) => panic!("KEYGATE_E2E_FILTER is {other:?}; it may be wasm or module"),
            Err(_) if std::env::var("NEXTEST_BINARY_ID").is_ok_and(|id| id == "keygate-e2e::e2e-module") => {
                Self::Module(binaries::module())
            }
            Err(_) => Self::Wasm(binaries::filter()),
        }
    }

    /// Puts it into Envoy's configuration.
    fn put_into(&self, template: &str) -> String {
        match self {
            Self::Wasm(file) => template.replace("@FILTER_WASM@", &file.display().to_string()),
            Self::Module(file) => {
                let begin = template.find("                  - name: keygate\n").expect("the filter's entry");
                let length = template[begin..].find("\n                  - name: ").expect("the next one");
                let end = begin + length + 1;
                let entry = fs::read_to_string(binaries::root().join("envoy/module.yaml.in"));
                let entry = entry.expect("the module's entry");
                let entry = entry.replace("@FILTER_MODULE@", &file.display().to_string());
                [&template[..begin], &entry, &template[end..]].concat()
            }
        }
    }
}

/// One Envoy with the filter, with a directory and ports of its own, running or not.
#[derive(Debug)]
pub struct Envoy {
    directory: PathBuf,
    node: String,
    workers: usize,
    filter: Filter,
    source: Option<Ipv4Addr>,
    moved_clock: Option<Clock>,
    listeners_of_a_file: bool,
    connection_limit: Option<usize>,
    variables: Vec<(String, String)>,
    port: Port,
    admin_port: Port,
    process: Option<Process>,
}

impl Envoy {
    /// One that does not run yet. `node` is its identity in the fleet.
    pub fn new(directory: &Path, node: &str, workers: usize) -> Self {
        let directory = directory.join(node);
        fs::create_dir_all(&directory).expect("a directory for Envoy");
        Self {
            directory,
            node: node.to_owned(),
            workers,
            filter: Filter::usual(),
            source: None,
            moved_clock: None,
            listeners_of_a_file: false,
            connection_limit: None,
            variables: Vec::new(),
            port: Port::reserve(),
            admin_port: Port::reserve(),
            process: None,
        }
    }

    /// With the filter that a test can make trap.
    pub fn use_trap_filter(&mut self) {
        self.filter = match self.filter {
            Filter::Wasm(_) => Filter::Wasm(binaries::trap_filter()),
            Filter::Module(_) => Filter::Module(binaries::trap_module()),
        };
    }

    /// With the filter as a dynamic module.
    pub fn use_module(&mut self) {
        self.filter = Filter::Module(binaries::module());
    }

    /// Connects to the control plane from an address of its own, for filters alone.
    pub fn use_source(&mut self, address: Ipv4Addr) {
        self.source = Some(address);
    }

    /// From the next start on it goes by this clock.
    pub fn use_moved_clock(&mut self, clock: &Clock) {
        self.moved_clock = Some(clock.clone());
    }

    /// From the next start on it has this in its environment.
    pub fn use_variable(&mut self, name: &str, value: &str) {
        self.variables.push((name.to_owned(), value.to_owned()));
    }

    /// From the next start on its listener accepts so many connections.
    pub fn use_connection_limit(&mut self, connections: usize) {
        self.connection_limit = Some(connections);
    }

    /// From the next start on it has its listeners from a file, and watches that.
    pub fn use_listeners_of_a_file(&mut self) {
        self.listeners_of_a_file = true;
    }

    /// Gives it other listeners than it has: the filter of the new ones polls for so long.
    pub fn change_listeners(&self, poll_wait_ms: u64) {
        let file = self.listeners_file();
        let text = fs::read_to_string(&file).expect("the listeners");
        let (before, rest) = text.split_once("\"keygate_sync\"").expect("the filter's configuration");
        let (_, after) = rest.split_once('}').expect("its end");
        let text = format!("{before}\"keygate_sync\", \"poll_wait_ms\": {poll_wait_ms}}}{after}");
        let new = self.directory.join("listeners.new");
        fs::write(&new, text).expect("the listeners");
        fs::rename(new, file).expect("the listeners");
    }

    /// Starts it; it then listens, and is ready or not.
    #[track_caller]
    pub fn start(&mut self, neighbours: &Neighbours) {
        self.launch(neighbours);
        wait_until(SOON, "Envoy to listen", || {
            self.process.as_mut().expect("it runs").assert_runs();
            Connection::open(self.port()).is_ok()
        });
    }

    /// Starts it, and waits for nothing.
    #[track_caller]
    pub fn launch(&mut self, neighbours: &Neighbours) {
        assert!(self.process.is_none(), "Envoy runs already");
        let config = self.config_file();
        let mut text = self.config(neighbours);
        if self.listeners_of_a_file {
            text = self.with_listeners_of_a_file(&text);
        }
        fs::write(&config, text).expect("Envoy's configuration");
        let started = Process::start("envoy", &binaries::envoy(), &self.log(), |command| {
            command
                .arg("--config-path")
                .arg(&config)
                .args(["--concurrency", &self.workers.to_string()])
                .args(["--service-node", &self.node, "--service-cluster", "e2e"])
                .args(["--disable-hot-restart", "--file-flush-interval-msec", "50"])
                .args(["--log-level", "warning", "--component-log-level", "wasm:info,dynamic_modules:info"])
                .env("KEYGATE_FLEET_TOKEN", &neighbours.fleet_token)
                .envs(self.variables.iter().cloned());
            if self.listeners_of_a_file {
                // Old ones end soon.
                command.args(["--drain-time-s", "1", "--drain-strategy", "immediate"]);
            }
            if let Some(clock) = &self.moved_clock {
                clock.give_to(command);
            }
        });
        self.process = Some(started);
    }

    fn config(&self, neighbours: &Neighbours) -> String {
        let template = binaries::root().join("envoy/local.yaml.in");
        let mut template = fs::read_to_string(template).expect("Envoy's template");
        if let Some(limit) = self.connection_limit {
            let shipped = "connection_limit: 10000";
            assert_eq!(template.matches(shipped).count(), 1, "the limit of connections");
            template = template.replace(shipped, &format!("connection_limit: {limit}"));
        }
        [
            ("@ENVOY_ADDRESS@", "127.0.0.1".to_owned()),
            ("@ENVOY_PORT@", self.port().to_string()),
            ("@ENVOY_ADMIN_PORT@", self.admin_port().to_string()),
            ("@API_PORT@", neighbours.api_port.to_string()),
            ("@SYNC_PORT@", neighbours.sync_port.to_string()),
            ("@UPSTREAM_PORT@", neighbours.upstream_port.to_string()),
            ("@UPSTREAM_V1_PORT@", neighbours.upstream_v1_port.to_string()),
            ("@ACCESS_LOG@", self.access_log_file().display().to_string()),
        ]
        .iter()
        .fold(self.with_source(self.filter.put_into(&template)), |text, (place, value)| {
            text.replace(place, value)
        })
    }

    /// Puts the listeners into their file, and its name in their place.
    fn with_listeners_of_a_file(&self, text: &str) -> String {
        let (head, rest) = text.split_once("  listeners:\n    - ").expect("the listeners");
        let (listener, clusters) = rest.split_once("\n  clusters:\n").expect("the clusters");
        let kind = r#""@type": type.googleapis.com/envoy.config.listener.v3.Listener"#;
        let listeners = format!("resources:\n    - {kind}\n      {listener}\n");
        fs::write(self.listeners_file(), listeners).expect("the listeners");
        let source = format!("{{ path_config_source: {{ path: {} }} }}", self.listeners_file().display());
        format!("{head}  clusters:\n{clusters}\ndynamic_resources: {{ lds_config: {source} }}\n")
    }

    fn listeners_file(&self) -> PathBuf {
        self.directory.join("listeners.yaml")
    }

    /// Its configuration.
    pub fn config_file(&self) -> PathBuf {
        self.directory.join("keygate-envoy.yaml")
    }

    /// Whether its filter is a dynamic module.
    pub fn has_module(&self) -> bool {
        matches!(self.filter, Filter::Module(_))
    }

    fn with_source(&self, template: String) -> String {
        let Some(source) = self.source else { return template };
        let bind = "      upstream_bind_config:\n";
        assert_eq!(template.matches(bind).count(), 1, "the filter's cluster alone has such");
        let source = format!("{bind}        source_address: {{ address: {source}, port_value: 0 }}\n");
        template.replace(bind, &source)
    }

    /// Waits until it says that it enforces a state.
    #[track_caller]
    pub fn wait_ready(&mut self) {
        wait_until(SOON, "Envoy to be ready", || {
            self.process.as_mut().expect("it runs").assert_runs();
            self.ready_status() == Some(200)
        });
    }

    /// The status of its readiness.
    pub fn ready_status(&self) -> Option<u16> {
        http::try_call(self.port(), &Request::get("/.keygate/ready")).ok().map(|answer| answer.status)
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

    /// Whether it was started and not stopped since.
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// A connection for clients' requests.
    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::open(self.port()).expect("Envoy listens")
    }

    /// One request over a connection of its own.
    #[track_caller]
    pub fn call(&self, request: &Request) -> Response {
        http::call(self.port(), request)
    }

    /// Connections that together reach every worker. To be called while no other is open, or its worker
    /// is taken for covered.
    #[track_caller]
    pub fn connect_to_all_workers(&self) -> Vec<Connection> {
        let mut connections = Vec::new();
        wait_until(SOON, "a connection on every worker", || {
            let active = self.active_by_worker();
            match active.iter().sum::<u64>() {
                // Envoy gives a new connection to the worker that has fewest (`exact_balance`).
                0 if connections.is_empty() => {
                    connections = (0..self.workers).map(|_| self.connect()).collect()
                }
                // One that ended before Envoy accepted it, as that which found it listening, was in the way: once more.
                all if all == self.workers as u64 && active.contains(&0) => connections.clear(),
                _ => {}
            }
            !connections.is_empty() && active == vec![1; self.workers]
        });
        connections
    }

    fn active_by_worker(&self) -> Vec<u64> {
        let stats = self.stats();
        (0..self.workers)
            .map(|worker| {
                let name = format!("listener.127.0.0.1_{}.worker_{worker}.downstream_cx_active", self.port());
                stats.iter().find(|(have, _)| *have == name).map_or(0, |(_, value)| *value)
            })
            .collect()
    }

    /// All counters and gauges.
    #[track_caller]
    pub fn stats(&self) -> Vec<(String, u64)> {
        let text = self.admin("/stats").expect(200).text();
        text.lines()
            .filter_map(|line| {
                let (name, value) = line.split_once(": ")?;
                Some((name.to_owned(), value.parse().ok()?))
            })
            .collect()
    }

    /// One of its counters, of all workers together; 0 when there is none.
    #[track_caller]
    pub fn stat(&self, name: &str) -> u64 {
        self.stats().into_iter().filter(|(have, _)| have.ends_with(name)).map(|(_, value)| value).sum()
    }

    /// Panics when any VM of the filter has died, on whatever thread.
    #[track_caller]
    pub fn assert_no_vm_died(&self) {
        let reloads: Vec<_> = self
            .stats()
            .into_iter()
            .filter(|(name, value)| name.starts_with("wasm.keygate.vm_reload") && *value > 0)
            .collect();
        assert!(reloads.is_empty(), "a VM of the filter was started again: {reloads:?}");
        // A VM that serves no requests is never started again, so no counter tells.
        let log = self.log_text();
        let died =
            log.lines().find(|line| line.contains(" failed: Uncaught ") || line.contains("panicked at"));
        assert_eq!(died, None, "a VM of the filter died");
    }

    /// A call to its admin.
    #[track_caller]
    pub fn admin(&self, path: &str) -> Response {
        http::call(self.admin_port(), &Request::get(path))
    }

    /// Waits for the access log's line of the request with that user agent.
    #[track_caller]
    pub fn logged(&self, user_agent: &str) -> Value {
        wait_for(SOON, "a line in the access log", || {
            let text = fs::read_to_string(self.access_log_file()).unwrap_or_default();
            text.lines()
                .filter_map(|line| serde_json::from_str::<Value>(line).ok())
                .find(|line| line["user_agent"] == user_agent)
        })
    }

    /// Memory that it has in RAM, in bytes.
    #[track_caller]
    pub fn resident_bytes(&self) -> u64 {
        let id = self.process.as_ref().expect("it runs").id();
        let status = fs::read_to_string(format!("/proc/{id}/status")).expect("the process is ours");
        let kib = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok());
        kib.map_or(0, |kib: u64| kib * 1024)
    }

    /// The CPU time that its process has taken, seconds.
    #[track_caller]
    pub fn cpu_seconds(&self) -> f64 {
        let pid = self.process.as_ref().expect("it runs").id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("its figures");
        // After the name, which ends with the last parenthesis: utime is the 12th, stime the 13th.
        let after = stat.rsplit_once(") ").map_or("", |(_, after)| after);
        let ticks: Vec<f64> =
            after.split(' ').skip(11).take(2).filter_map(|tick| tick.parse().ok()).collect();
        ticks.iter().sum::<f64>() / 100.0
    }

    /// Its own log, whole.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&fs::read(self.log()).unwrap_or_default()).into_owned()
    }

    /// The end of its log.
    pub fn log_tail(&self) -> String {
        process::tail(&self.log())
    }

    fn log(&self) -> PathBuf {
        self.directory.join("envoy.log")
    }

    /// Its access log.
    pub fn access_log_file(&self) -> PathBuf {
        self.directory.join("access.log")
    }

    /// Its identity in the fleet.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// How many workers it has.
    pub fn workers(&self) -> usize {
        self.workers
    }

    /// The port for clients.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The port of its admin.
    pub fn admin_port(&self) -> u16 {
        self.admin_port.number()
    }
}
