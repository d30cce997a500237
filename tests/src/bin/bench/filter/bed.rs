//! What the benchmark runs: one Envoy with a listener for each of what is compared, on a CPU of its own; control plane,
//! upstream and the service of ext_authz on the other.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use keygate_e2e::control_plane::ControlPlane;
use keygate_e2e::durability::Dice;
use keygate_e2e::ports::Port;
use keygate_e2e::process::{Process, tail};
use keygate_e2e::wait::pass;
use keygate_e2e::{Api, Connection, Request, SOON, binaries, http, wait_for, wait_until};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::config::{self, Places};
use super::cpu::{self, Cpus, Taken};
use super::server::{self, V1, V2};
use super::tokens::{self, Grant, Hs256, INTEGRATION, INTEGRATION_SCOPES, KEYS, LEAN, UNLIMITED};
use super::variant::Listener;

/// To load a million revocations, or to take them over, on a slow machine.
const LONG: Duration = Duration::from_secs(300);
/// How many owners are drawn, of which the rollout takes about half.
const OWNERS: usize = 512;

/// All of it. Everything in it ends with it.
pub struct Bed {
    // In the order in which they stop.
    envoy: Process,
    ext_authz: Process,
    upstream: Process,
    control_plane: ControlPlane,
    ports: Vec<(Listener, Port)>,
    admin_port: Port,
    /// Those of the services.
    _ports: [Port; 3],
    directory: TempDir,
    pub cpus: Cpus,
}

/// What Envoy runs under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Under {
    /// Nothing.
    Nothing,
    /// Callgrind, which counts nothing until it is told to.
    Callgrind,
}

impl Under {
    /// What the names of callgrind's dumps begin with.
    pub const OUT: &str = "callgrind.out";

    fn program(self) -> PathBuf {
        match self {
            Self::Nothing => binaries::envoy(),
            Self::Callgrind => "valgrind".into(),
        }
    }

    /// What comes before Envoy's own arguments.
    fn prepare(self, command: &mut Command, directory: &Path) {
        if self == Self::Callgrind {
            let out = directory.join(Self::OUT);
            command
                // What V8 compiles it also writes anew.
                .args(["--tool=callgrind", "--smc-check=all-non-file", "--instr-atstart=no"])
                .arg(format!("--callgrind-out-file={}", out.display()))
                .arg(binaries::envoy());
        }
    }
}

/// What signs, and is signed, before there is an Envoy.
pub struct Prepared {
    pub signer: Hs256,
    pub eddsa: Vec<String>,
    pub owners: Vec<String>,
}

impl Bed {
    /// Starts it.
    pub fn start(cpus: Cpus, dice: &mut Dice, under: Under) -> (Self, Prepared) {
        let directory = tempfile::Builder::new().prefix("keygate-e2e.").tempdir().expect("a directory");
        let mut control_plane = ControlPlane::new(directory.path());
        control_plane.use_variable("KEYGATE_LIMITS_ENFORCE", "true");
        std::fs::write(control_plane.config_file(), configuration()).expect("the configuration");
        control_plane.start();
        let api = control_plane.api();
        println!("  a million revocations");
        crate::revocation::load(&api);
        configure(&api);

        println!("  secrets of three kinds, and {KEYS} keys of EdDSA");
        let owners = tokens::owners(dice, OWNERS);
        let secret = random_secret();
        let kid = rotate(&api, &json!({ "reason": "bench", "secret": secret }));
        let signer = Hs256::like(&api, kid, secret);
        let eddsa_kid = rotate(&api, &json!({ "reason": "bench", "algorithm": "EdDSA" }));
        let grants = Grant::draw_many(dice, &owners, KEYS);
        let eddsa = tokens::issue(&api, grants);
        let es256_kid = rotate(&api, &json!({ "reason": "bench", "algorithm": "ES256" }));

        let services = [Port::reserve(), Port::reserve(), Port::reserve()];
        let [upstream_port, upstream_v1_port, ext_authz_port] =
            [0, 1, 2].map(|n: usize| services[n].number());
        let serve = |name: &'static str, bodies: &[(u16, &[u8])]| answering(name, directory.path(), bodies);
        let upstream = serve("upstream", &[(upstream_port, V2), (upstream_v1_port, V1)]);
        let ext_authz = serve("ext_authz", &[(ext_authz_port, b"")]);

        println!("  Envoy");
        let admin_port = Port::reserve();
        let ports: Vec<_> = Listener::ALL.iter().map(|listener| (*listener, Port::reserve())).collect();
        let places = Places {
            admin_port: admin_port.number(),
            api_port: control_plane.api_port(),
            sync_port: control_plane.sync_port(),
            upstream_port,
            upstream_v1_port,
            ext_authz_port,
            filter: &binaries::filter(),
            empty_filter: &binaries::empty_filter(),
            module: &binaries::module(),
            es256: &public_key(&api, &es256_kid),
            eddsa: &public_key(&api, &eddsa_kid),
            hs256: &json!({ "kty": "oct", "alg": "HS256", "kid": signer.kid, "k": signer.secret }),
            issuer: &signer.issuer,
            cached_tokens: KEYS,
        };
        let fleet_token = std::fs::read_to_string(control_plane.fleet_token_file()).expect("the fleet token");
        let envoy = envoy(directory.path(), &ports, &places, fleet_token.trim(), under);
        let mut bed = Self {
            envoy,
            ext_authz,
            upstream,
            control_plane,
            ports,
            admin_port,
            _ports: services,
            directory,
            cpus,
        };
        bed.pin();
        bed.wait_ready();
        let owners = bed.owners_of_v2(&signer, owners);
        (bed, Prepared { signer, eddsa, owners })
    }

    fn pin(&self) {
        cpu::pin(self.envoy.id(), self.cpus.measured);
        cpu::prefer(Some(self.envoy.id()));
        for other in [self.ext_authz.id(), self.upstream.id(), self.control_plane.id()] {
            cpu::pin(other, self.cpus.rest);
        }
    }

    fn wait_ready(&mut self) {
        let ports = [Listener::Keygate, Listener::Module].map(|listener| self.port(listener));
        wait_until(LONG, "Envoy to be ready", || {
            self.envoy.assert_runs();
            let is_ready =
                |port| http::try_call(port, &Request::get("/.keygate/ready")).map(|answer| answer.status);
            ports.into_iter().all(|port| is_ready(port).is_ok_and(|status| status == 200))
        });
        let held = self.api().get("/api/admin/revocations/stats").expect(200).json();
        let bits = held["bloom_bits"].as_u64();
        wait_until(LONG, "the workers' gates", || {
            let of = |name: &str| Some(self.stat(&format!("{name}.keygate_gate_bytes")) * 8);
            of("wasmcustom") >= bits && of("keygate") >= bits
        });
        for port in [self.port(Listener::WasmEmpty), self.port(Listener::Bare)] {
            wait_until(SOON, "the upstream", || {
                http::try_call(port, &Request::get("/")).is_ok_and(|answer| answer.body == V2)
            });
        }
    }

    /// Those of the owners whose keys go to V2.
    fn owners_of_v2(&self, signer: &Hs256, owners: Vec<String>) -> Vec<String> {
        let mut connection = Connection::open(self.port(Listener::Keygate)).expect("Envoy listens");
        let tokens: Vec<String> =
            Grant::of_each(&owners).map(|grant| signer.token("key_of-one-owner", &grant)).collect();
        let mut goes_to_v2 = |token: &String| {
            let answer = connection.send(&Request::get("/api/chat").bearer(token)).expect(200);
            assert!(answer.body == V1 || answer.body == V2, "an upstream's answer");
            answer.body == V2
        };
        let count = owners.len();
        let of_v2: Vec<String> = owners
            .into_iter()
            .zip(&tokens)
            .filter_map(|(owner, token)| goes_to_v2(token).then_some(owner))
            .collect();
        assert!(
            (count / 4..=count * 3 / 4).contains(&of_v2.len()),
            "the rollout is not at half: {} of {count} owners go to V2",
            of_v2.len()
        );
        of_v2
    }

    /// The port of a listener.
    pub fn port(&self, listener: Listener) -> u16 {
        self.ports.iter().find(|(other, _)| *other == listener).expect("it has a port").1.number()
    }

    /// The control plane's API.
    pub fn api(&self) -> Api {
        self.control_plane.api()
    }

    /// Envoy's process.
    pub fn envoy_id(&self) -> u32 {
        self.envoy.id()
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// The CPU time of all that takes part in the requests to a listener, but for client and upstream.
    pub fn taken(&self, listener: Listener) -> Taken {
        match listener {
            Listener::Keygate | Listener::Module => Taken::now(&[self.envoy.id(), self.control_plane.id()]),
            Listener::ExtAuthz => Taken::now(&[self.envoy.id(), self.ext_authz.id()]),
            _ => Taken::now(&[self.envoy.id()]),
        }
    }

    /// That of Envoy alone.
    pub fn taken_by_envoy(&self) -> Taken {
        Taken::now(&[self.envoy.id()])
    }

    /// What Envoy and the control plane take of a CPU while there are no requests.
    pub fn background(&self) -> (f64, f64) {
        const WATCHED: Duration = Duration::from_secs(2);
        let now = || [Taken::now(&[self.envoy.id()]), Taken::now(&[self.control_plane.id()])];
        let before = now();
        pass(WATCHED);
        let [envoy, control_plane] = now();
        let share = |taken: u64| taken as f64 / WATCHED.as_nanos() as f64;
        (share(envoy.since(&before[0])), share(control_plane.since(&before[1])))
    }

    /// A counter or gauge of Envoy.
    pub fn stat(&self, name: &str) -> u64 {
        let text =
            http::call(self.admin_port.number(), &Request::get(format!("/stats?filter={name}"))).text();
        text.lines().filter_map(|line| line.split_once(": ")?.1.parse::<u64>().ok()).sum()
    }

    /// How often Keygate looked for a token among those that it remembers: found, and not.
    pub fn looks(&self) -> (u64, u64) {
        (self.stat("keygate_token_cache_hits_total"), self.stat("keygate_token_cache_misses_total"))
    }

    /// Panics when a VM of Keygate's has died.
    pub fn assert_no_vm_died(&self) {
        assert_eq!(self.stat("vm_reload"), 0, "a VM was started again");
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the control plane's log ends\n{}", self.control_plane.log_tail());
            eprintln!("--- Envoy's log ends\n{}", tail(&self.directory.path().join("envoy.log")));
        }
    }
}

/// There is a V1, a role whose keys have many scopes, and one without a limit.
fn configuration() -> String {
    let mut configuration = "[rollout]\nv1_cluster = \"upstream_v1\"\n".to_owned();
    for role in [INTEGRATION, UNLIMITED] {
        let scopes = [&["chat:read"], INTEGRATION_SCOPES.as_slice()].concat();
        configuration += &format!("[roles.{role}]\nttl = \"30d\"\nscopes = {}\n", json!(scopes));
    }
    configuration
}

/// Limits that nobody reaches, and a rollout at half.
fn configure(api: &Api) {
    let limit = json!({ "requests": 1_000_000_000, "window": "1h" });
    let limits = json!({ "roles": { "basic": limit, "contributor": limit, INTEGRATION: limit } });
    api.send(Request::new("PUT", "/api/admin/rate_limits").json(&limits)).expect(200);
    let mut policy = api.get("/api/admin/policy").expect(200).json();
    let lean =
        json!({ "name": "lean", "path": LEAN, "access": "key", "scopes": ["chat:read"], "forward": [] });
    policy["routes"].as_array_mut().expect("routes").push(lean);
    api.send(Request::new("PUT", "/api/admin/policy").json(&policy)).expect(200);
    // The guard would take forged keys for a V2 that does worse than V1, and roll back.
    let rollout = json!({ "strategy": "percentage", "percentage": 50, "guard": false });
    api.send(Request::new("PUT", "/api/admin/feature_flags").json(&rollout)).expect(200);
}

/// Rotates, and waits until the new secret signs.
fn rotate(api: &Api, order: &Value) -> String {
    let answer = api.post("/api/admin/secrets/rotate", order).expect(202).json();
    let kid = answer["version_id"].as_str().expect("an id").to_owned();
    wait_for(SOON, "the new secret to sign", || {
        let status = api.get("/api/admin/secrets/status").expect(200).json();
        (status["active"]["version_id"] == kid).then_some(())
    });
    kid
}

fn random_secret() -> String {
    use base64::Engine as _;
    use std::io::Read as _;
    let mut bytes = [0; 32];
    let urandom = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    urandom.expect("random bytes");
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

fn public_key(api: &Api, kid: &str) -> Value {
    let jwks = api.call(&Request::get("/.well-known/jwks.json")).expect(200).json();
    let key = jwks["keys"].as_array().into_iter().flatten().find(|key| key["kid"] == kid);
    key.unwrap_or_else(|| panic!("{kid} is not published")).clone()
}

fn answering(name: &'static str, directory: &Path, bodies: &[(u16, &[u8])]) -> Process {
    let this = std::env::current_exe().expect("a program knows its path");
    Process::start(name, &this, &directory.join(format!("{name}.log")), |command| {
        command.arg(server::COMMAND);
        for (port, body) in bodies {
            command.arg(format!("{port}={}", String::from_utf8_lossy(body)));
        }
    })
}

fn envoy(
    directory: &Path,
    ports: &[(Listener, Port)],
    places: &Places<'_>,
    fleet_token: &str,
    under: Under,
) -> Process {
    let template = binaries::root().join("envoy/local.yaml.in");
    let template = std::fs::read_to_string(template).expect("Envoy's template");
    let ports: Vec<_> = ports.iter().map(|(listener, port)| (*listener, port.number())).collect();
    let file = directory.join("envoy.yaml");
    std::fs::write(&file, config::envoy(&template, &ports, places)).expect("Envoy's configuration");
    Process::start("envoy", &under.program(), &directory.join("envoy.log"), |command| {
        under.prepare(command, directory);
        command
            .arg("--config-path")
            .arg(&file)
            .args(["--concurrency", "1", "--service-node", "bench", "--service-cluster", "bench"])
            .args(["--disable-hot-restart", "--log-level", "warning", "--component-log-level", "wasm:info"])
            .env("KEYGATE_FLEET_TOKEN", fleet_token)
            // The module alone reads it: there are two proxies in this Envoy.
            .env("KEYGATE_PROXY_ID", "bench-module");
    })
}
