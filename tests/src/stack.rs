//! A whole Keygate for one test: control plane, Envoy with the filter, upstream.

use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use tempfile::TempDir;

use crate::SOON;
use crate::api::Api;
use crate::control_plane::ControlPlane;
use crate::envoy::{Envoy, Neighbours};
use crate::http::{Request, Response};
use crate::line::{self, Line};
use crate::upstream::Upstream;
use crate::wait::wait_until;

/// How it is set up.
#[derive(Debug, Clone)]
pub struct Builder {
    workers: usize,
    config: Option<String>,
    control_plane: bool,
    envoy: bool,
    trap_filter: bool,
    module: bool,
    limits: bool,
    redis: Option<String>,
}

impl Builder {
    /// Envoy's worker threads; 2 unless told, which are enough to differ. More where workers race for one value.
    pub fn workers(mut self, workers: usize) -> Self {
        self.workers = workers;
        self
    }

    /// The text of `keygate.toml`; there is none unless told.
    pub fn config(mut self, toml: &str) -> Self {
        self.config = Some(toml.to_owned());
        self
    }

    /// The Redis that the control plane shares; none unless told.
    pub fn redis(mut self, url: &str) -> Self {
        self.redis = Some(url.to_owned());
        self
    }

    /// Does not start the control plane.
    pub fn without_control_plane(mut self) -> Self {
        self.control_plane = false;
        self
    }

    /// Does not start Envoy.
    pub fn without_envoy(mut self) -> Self {
        self.envoy = false;
        self
    }

    /// Enforces limits; other tests send more than a key may.
    pub fn limits(mut self) -> Self {
        self.limits = true;
        self
    }

    /// Uses the filter that a test can make trap.
    pub fn trap_filter(mut self) -> Self {
        self.trap_filter = true;
        self
    }

    /// Uses the filter as a dynamic module.
    pub fn module(mut self) -> Self {
        self.module = true;
        self
    }

    /// Starts it, and waits until all of it is ready that can be.
    #[track_caller]
    pub fn start(self) -> Stack {
        let directory = tempfile::Builder::new().prefix("keygate-e2e.").tempdir().expect("a directory");
        let mut stack = Stack {
            envoy: Envoy::new(directory.path(), "envoy-1", self.workers),
            control_plane: ControlPlane::new(directory.path()),
            upstream: Upstream::start("v2"),
            upstream_v1: Upstream::start("v1"),
            directory,
        };
        if self.limits {
            stack.control_plane.use_variable("KEYGATE_LIMITS_ENFORCE", "true");
        }
        if self.module {
            stack.envoy.use_module();
        }
        if self.trap_filter {
            stack.envoy.use_trap_filter();
        }
        if let Some(url) = self.redis {
            stack.control_plane.use_redis(&url);
        }
        if let Some(toml) = self.config {
            fs::write(stack.control_plane.config_file(), toml).expect("the configuration");
        }
        if self.control_plane {
            stack.control_plane.start();
        }
        if self.envoy {
            stack.start_envoy();
            if self.control_plane {
                stack.envoy.wait_ready();
            }
        }
        stack
    }
}

/// The whole. Everything in it ends with it.
#[derive(Debug)]
pub struct Stack {
    // In the order in which they stop.
    /// The proxy.
    pub envoy: Envoy,
    /// The control plane.
    pub control_plane: ControlPlane,
    /// The upstream.
    pub upstream: Upstream,
    /// What was there before; nothing goes there unless a rollout says so.
    pub upstream_v1: Upstream,
    directory: TempDir,
}

impl Stack {
    /// Sets one up.
    pub fn builder() -> Builder {
        Builder {
            workers: 2,
            config: None,
            control_plane: true,
            envoy: true,
            trap_filter: false,
            module: false,
            limits: false,
            redis: None,
        }
    }

    /// Starts one as usual.
    #[track_caller]
    pub fn start() -> Self {
        Self::builder().start()
    }

    /// Starts Envoy.
    #[track_caller]
    pub fn start_envoy(&mut self) {
        let neighbours = self.neighbours();
        self.envoy.start(&neighbours);
    }

    /// Starts Envoy, and waits for nothing.
    #[track_caller]
    pub fn launch_envoy(&mut self) {
        let neighbours = self.neighbours();
        self.envoy.launch(&neighbours);
    }

    /// Another Envoy of the same fleet, running and ready.
    #[track_caller]
    pub fn another_envoy(&self, node: &str, workers: usize) -> Envoy {
        let mut envoy = Envoy::new(self.directory(), node, workers);
        envoy.start(&self.neighbours());
        envoy.wait_ready();
        envoy
    }

    /// Two more Envoys of the same fleet, `envoy-2` and `envoy-3`, once the control plane knows all three.
    #[track_caller]
    pub fn two_more_envoys(&self, workers: usize) -> [Envoy; 2] {
        let others = ["envoy-2", "envoy-3"].map(|node| self.another_envoy(node, workers));
        let api = self.api();
        wait_until(SOON, "three proxies in the fleet", || api.fleet().len() == 3);
        others
    }

    /// Another Envoy of the same fleet, running and ready, whose line to the control plane can be cut.
    #[track_caller]
    pub fn another_envoy_on_a_line(&self, node: &str, workers: usize) -> (Envoy, Line) {
        let line = Line::to(self.control_plane.sync_port());
        (self.another_envoy_through(&line, node, workers), line)
    }

    /// Another Envoy of the same fleet, running and ready, with this line to the control plane.
    #[track_caller]
    pub fn another_envoy_through(&self, line: &Line, node: &str, workers: usize) -> Envoy {
        let mut envoy = Envoy::new(self.directory(), node, workers);
        envoy.use_source(line::SOURCE);
        envoy.start(&Neighbours { sync_port: line.port(), ..self.neighbours() });
        envoy.wait_ready();
        envoy
    }

    /// The same, of another control plane.
    #[track_caller]
    pub fn another_envoy_of(&self, other: &ControlPlane, node: &str, workers: usize) -> Envoy {
        let mut envoy = Envoy::new(self.directory(), node, workers);
        envoy.start(&Neighbours {
            api_port: other.api_port(),
            sync_port: other.sync_port(),
            ..self.neighbours()
        });
        envoy.wait_ready();
        envoy
    }

    /// What an Envoy of this fleet is connected with.
    pub fn neighbours(&self) -> Neighbours {
        Neighbours {
            api_port: self.control_plane.api_port(),
            sync_port: self.control_plane.sync_port(),
            upstream_port: self.upstream.port(),
            upstream_v1_port: self.upstream_v1.port(),
            fleet_token: self.fleet_token(),
        }
    }

    /// The proxies' token: the control plane's, or one for it when it has not been there yet.
    pub fn fleet_token(&self) -> String {
        let path = self.control_plane.fleet_token_file();
        if !path.exists() {
            let token: String =
                (0..4_u64).map(|part| format!("{:016x}", RandomState::new().hash_one(part))).collect();
            let mut file =
                fs::File::options().write(true).create_new(true).mode(0o600).open(&path).expect("a file");
            file.write_all(token.as_bytes()).expect("the token");
        }
        fs::read_to_string(path).expect("the token").trim().to_owned()
    }

    /// The control plane's API with the bootstrap admin's key.
    #[track_caller]
    pub fn api(&self) -> Api {
        self.control_plane.api()
    }

    /// A client's `GET` through Envoy with a key.
    #[track_caller]
    pub fn get(&self, path: &str, token: &str) -> Response {
        self.envoy.call(&Request::get(path).bearer(token))
    }

    /// A client's request through Envoy.
    #[track_caller]
    pub fn call(&self, request: &Request) -> Response {
        self.envoy.call(request)
    }

    /// The directory that holds all of it.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the control plane's log ends\n{}", self.control_plane.log_tail());
            eprintln!("--- Envoy's log ends\n{}", self.envoy.log_tail());
            eprintln!("--- the access log ends\n{}", crate::process::tail(&self.envoy.access_log_file()));
        }
    }
}
