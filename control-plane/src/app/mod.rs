//! The control plane as one value: what every handler needs, and how it starts and stops.

mod given;

use std::future::Future;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use keygate_core::decide::cache::TokenCache;
use keygate_core::decide::policy::Policy;
use keygate_core::decide::rules::{RulesError, Ruleset};
use keygate_core::secret::Secret;
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use self::given::FromEnvironment;
use crate::config::Config;
use crate::durability::journal::{self, Claim, Notary, Privacy};
use crate::durability::writer::{self, History, OpenError, Start};
use crate::http::api;
use crate::http::api::ApiState;
use crate::http::sync;
use crate::model::change::Change;
use crate::model::route_cost;
use crate::model::state::Settings;
use crate::node::Node;
use crate::observe::fleet::Fleet;
use crate::observe::metrics::Metrics;
use crate::observe::notify::Notifier;
use crate::observe::telemetry::{self, Telemetry, TelemetryStoreError};
use crate::peers::{Alone, Peers};
use crate::platform::clock::{self, CautiousClock, Clock};
use crate::platform::files;
use crate::platform::http_server::{self, Bounds};
use crate::platform::random;
use crate::redis_store::{self, RedisPeers, Sealer};
use crate::secrets::hsm::HsmError;
use crate::secrets::keyring::{self, Keyring, KeyringError};
use crate::secrets::master_key::MasterKeyError;
use crate::secrets::record::{HsmPair, NewSecret, SecretRecord};
use crate::services::admin_key::{self, AdminKeyError};
use crate::services::canary::runner::{self, Canary};
use crate::services::lift;
use crate::services::quota::{self, Quotas};
use crate::services::recovery::{self, Recovery};
use crate::services::rollout_guard;
use crate::services::rotation;
use crate::services::rotation::Driver;
use crate::services::upkeep;

/// The time that requests under way may take when the control plane stops. This and the two below are 10 s in all.
const REQUESTS_STOP_WITHIN: Duration = Duration::from_secs(5);
/// The time that services and the journal may take after that.
const SERVICES_STOP_WITHIN: Duration = Duration::from_secs(3);
/// The time that notifications may take after that.
const NOTIFIER_STOPS_WITHIN: Duration = Duration::from_secs(2);
/// The most connections of the API's port.
const API_CONNECTIONS: usize = 4_096;
/// The most connections of the sync port: several of each proxy.
const SYNC_CONNECTIONS: usize = 65_536;
/// Memory for the tokens of those who call this API.
const TOKEN_CACHE_BYTES: usize = 1024 * 1024;

/// Why the control plane does not start or stops.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// A file or an address.
    #[error("{what}: {source}")]
    Io {
        /// Which.
        what: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The first policy.
    #[error("policy {path}: {problem}")]
    Policy {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The master key.
    #[error(transparent)]
    MasterKey(#[from] MasterKeyError),
    /// The HSM.
    #[error(transparent)]
    Hsm(#[from] HsmError),
    /// The PIN of the HSM.
    #[error("hsm.pin_file: set it or KEYGATE_HSM_PIN; the HSM is locked without its PIN")]
    NoPin,
    /// Where notifications go.
    #[error("{0}")]
    Notify(String),
    /// The keyring.
    #[error(transparent)]
    Keyring(#[from] KeyringError),
    /// The history.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// What proxies count.
    #[error(transparent)]
    Telemetry(#[from] TelemetryStoreError),
    /// The machine's clock.
    #[error("the machine's clock is before the year 2001 or after 2999: set it, then start again")]
    Clock,
    /// An admin key.
    #[error(transparent)]
    AdminKey(#[from] AdminKeyError),
}

/// A control plane that listens.
pub struct Serving {
    /// What its handlers share.
    pub app: Arc<ApiState>,
    api: TcpListener,
    sync: TcpListener,
    stop: watch::Sender<bool>,
    writer_thread: std::thread::JoinHandle<()>,
    /// The secret that signed the admin key which was written after a restore.
    admin_key: Option<String>,
}

/// Takes up or begins a history and listens.
///
/// # Errors
/// See [`RunError`].
pub async fn start(config: Config, clock: Clock, given: FromEnvironment) -> Result<Serving, RunError> {
    keygate_core::token::crypto::native::install();
    if !clock::is_plausible(clock.now_s()) {
        return Err(RunError::Clock);
    }
    let dir = &config.data_dir;
    let io = |what: String| move |source| RunError::Io { what, source };
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(io(dir.display().to_string()))?;
    let api = TcpListener::bind(config.listen).await.map_err(io(format!("listen = {}", config.listen)))?;
    let sync = TcpListener::bind(config.sync_listen)
        .await
        .map_err(io(format!("sync_listen = {}", config.sync_listen)))?;
    let sync_url = config.limits_url.clone().unwrap_or_else(|| reached_at(&sync, config.sync_listen));
    // Before its directory is made: it may not be mounted.
    if !journal::exists(dir) && keyring::is_used(dir)? {
        return Err(KeyringError::JournalMissing(dir.join(keyring::FILE)).into());
    }
    let claim = Claim::new(dir).map_err(OpenError::from)?;
    if claim.is_empty() && keyring::is_used(dir)? {
        return Err(KeyringError::JournalMissing(dir.join(keyring::FILE)).into());
    }
    let policy = match &config.policy_file {
        Some(path) => read_policy(path, &config, claim.is_empty().then(|| clock.now_s()))?,
        None => Policy::default(),
    };
    let fleet_token = match given.fleet_token.clone() {
        Some(token) => token,
        None => load_fleet_token(&config.fleet_token_file)
            .map_err(io(format!("fleet_token_file = {}", config.fleet_token_file.display())))?,
    };
    let started_s = clock.now_s();
    let keys = Arc::new(given::keyring(&config, &given, claim.is_empty())?);
    let metrics = Metrics::new(&config.roles);
    redis_store::begin_metrics(&metrics);
    metrics.redis.configured.set_flag(config.redis.is_some());
    metrics.canary.configured.set_flag(!config.canary.proxies.is_empty());
    let destinations = given::destinations(&config, &given)?;
    let notifier =
        Arc::new(Notifier::start(&destinations, &config.notify.source, clock.clone(), Arc::clone(&metrics)));
    let redis = config.redis.as_ref().map(|redis| {
        RedisPeers::new(redis.target.clone(), redis.replicas, redis.timeout, Sealer::new(keys.root()))
    });
    let peers: Arc<dyn Peers> = match &redis {
        Some(redis) => Arc::clone(redis) as Arc<dyn Peers>,
        None => Arc::new(Alone),
    };
    let first_changes = || first_changes(&config, &policy, &keys, clock.now_s());
    let checkpoint_seed = keys.root().derive("keygate journal checkpoints");
    let notary = Notary::new(checkpoint_seed.expose());
    keys.note_checkpoint_key(notary.public_key());
    let privacy = Arc::new(Privacy::new(keys.root(), config.personal_data));
    let History { writer, states, deltas, store, feed, latest_s, thread } = writer::open(Start {
        notary,
        privacy: Arc::clone(&privacy),
        claim,
        dir,
        settings: Settings::from(&config),
        keys: Arc::clone(&keys),
        first_changes: &first_changes,
        clock: clock.clone(),
        observer: Box::new(Arc::clone(&metrics)),
    })?;
    warn_of_costs(&states.borrow().rules, &config, clock.now_s());
    let fleet = Fleet::open(Arc::clone(&store), clock.now_ms()).map_err(OpenError::from)?;
    let roles = config.roles.keys().cloned().collect();
    let telemetry = Arc::new(Telemetry::open(dir, roles)?);
    telemetry.note_routes(&states.borrow().rules.policy);
    metrics.export(Arc::clone(&telemetry));
    let active = states.borrow().secrets.active().map(|held| held.record.alg);
    if let Some(active) = active.filter(|active| *active != config.signing.algorithm) {
        tracing::warn!(
            active = active.name(),
            configured = config.signing.algorithm.name(),
            "secrets.algorithm counts for new secrets; rotate to go over to it"
        );
    }
    let (stop, stopping) = watch::channel(false);
    let node = Arc::new(Node {
        // From the history's last time on: a clock that was wrong at the start has to stand, too.
        cautious_clock: Mutex::new(CautiousClock::new(
            clock.now_ms().min(latest_s.saturating_mul(1_000)),
            Instant::now(),
        )),
        clock,
        writer,
        states,
        deltas,
        store,
        feed,
        fleet,
        peers,
        metrics,
        telemetry,
        sync_url,
        keys,
        notifier,
        started_s,
        privacy,
        notary: Notary::new(checkpoint_seed.expose()),
        fleet_token,
        stopping,
        config,
    });
    lift::lift_if_wanted(&node).await;
    let admin_key = admin_key::issue_if_wanted(&node).await;
    let app = Arc::new(ApiState {
        snapshots: sync::Snapshots::default(),
        redis,
        quotas: Arc::new(Quotas::new(Arc::clone(&node))),
        in_flight: Arc::default(),
        cache: Mutex::new(TokenCache::new(TOKEN_CACHE_BYTES)),
        canary: Arc::new(Canary::new(Arc::clone(&node))),
        driver: Arc::new(Driver::default()),
        recovery: Arc::new(Recovery::default()),
        node,
    });
    Ok(Serving { app, api, sync, stop, writer_thread: thread, admin_key })
}

impl Serving {
    /// The address of the API.
    pub fn api_address(&self) -> std::io::Result<SocketAddr> {
        self.api.local_addr()
    }

    /// The address of the sync port.
    pub fn sync_address(&self) -> std::io::Result<SocketAddr> {
        self.sync.local_addr()
    }

    /// Serves until `shutdown`, then answers what is under way and stops, within 10 s.
    pub async fn run(self, shutdown: impl Future<Output = ()>) {
        let Self { app, api, sync, stop, writer_thread, admin_key } = self;
        let (of_api, of_sync) = bounds();
        let serve = |name, listener, router, bounds| {
            http_server::serve(name, listener, router, bounds, stop.subscribe(), REQUESTS_STOP_WITHIN)
        };
        let api = serve("api", api, api::router(Arc::clone(&app)), of_api);
        let sync = serve("sync", sync, sync::router(Arc::clone(&app)), of_sync);
        let node = &app.node;
        let upkeep = tokio::spawn(upkeep::run(Arc::clone(node)));
        let telemetry = tokio::spawn(telemetry::run(
            Arc::clone(&node.telemetry),
            node.clock.clone(),
            node.stopping.clone(),
        ));
        let canary = tokio::spawn(runner::run(Arc::clone(&app.canary)));
        let rotation = tokio::spawn(rotation::run(Arc::clone(node), Arc::clone(&app.driver)));
        let guard = tokio::spawn(rollout_guard::run(Arc::clone(node), Arc::clone(&app.canary)));
        let limits = tokio::spawn(quota::run(Arc::clone(&app.quotas)));
        let recovery = tokio::spawn(recovery::run(Arc::clone(node), admin_key));
        let redis = app.redis.clone().map(|redis| tokio::spawn(redis_store::run(Arc::clone(node), redis)));
        let notifier = Arc::clone(&app.notifier);
        drop(app);
        let servers = async { tokio::join!(api, sync) };
        tokio::pin!(servers);
        tokio::select! {
            ((), ()) = &mut servers => return,
            () = shutdown => {}
        }
        tracing::info!("stopping");
        let _nobody_listens = stop.send(true);
        servers.await;
        let mut services = vec![upkeep, telemetry, rotation, guard, limits, recovery, canary];
        services.extend(redis);
        let ended = async {
            for service in services {
                let _ended = service.await;
            }
            // All that has a handle of the writer is gone; its thread ends after its last batch.
            let _finished = tokio::task::spawn_blocking(move || writer_thread.join()).await;
        };
        if tokio::time::timeout(SERVICES_STOP_WITHIN, ended).await.is_err() {
            tracing::warn!("not everything ended in time; stopping anyway");
        }
        let told = tokio::task::spawn_blocking(move || notifier.stop());
        let _told_or_not = tokio::time::timeout(NOTIFIER_STOPS_WITHIN, told).await;
    }
}

/// Where others reach a listener, as far as can be told from here.
fn reached_at(listener: &TcpListener, configured: SocketAddr) -> String {
    let address = listener.local_addr().unwrap_or(configured);
    if !address.ip().is_unspecified() {
        return format!("http://{address}");
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!("http://{}:{}", name.trim(), address.port())
}

/// The bounds of the API's port and of the sync port. Each has files of its own, so that neither takes the other's, and the
/// rest is for the journal, the store and Redis.
fn bounds() -> (Bounds, Bounds) {
    let files = file_limit();
    let (api, sync) = ((files / 4).min(API_CONNECTIONS), (files / 2).min(SYNC_CONNECTIONS));
    let bounds = |connections, of_peer| Bounds {
        connections,
        of_peer,
        head: Duration::from_secs(10),
        idle: Duration::from_secs(60),
        stalled: Duration::from_secs(20 * 60),
    };
    // Many proxies may come from one address.
    (bounds(api, api.div_ceil(2)), bounds(sync, sync))
}

/// The most files that this process may have open, as many as it can get.
fn file_limit() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    let limit = if setrlimit(Resource::Nofile, raised).is_ok() { maximum } else { current };
    limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// The policy of a file; with `first_s`, Unix seconds, it is the one that a new history begins with.
fn read_policy(path: &Path, config: &Config, first_s: Option<u64>) -> Result<Policy, RunError> {
    let error = |problem: String| RunError::Policy { path: path.into(), problem };
    let text = std::fs::read_to_string(path).map_err(|e| error(e.to_string()))?;
    let policy: Policy = serde_json::from_str(&text).map_err(|e| error(e.to_string()))?;
    policy
        .validate()
        .map_err(|errors| error(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))?;
    if let Some(now) = first_s {
        let errors = route_cost::all((&policy, &Settings::from(config).first_limits()), &config.roles, now);
        if !errors.is_empty() {
            return Err(error(errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")));
        }
    }
    Ok(policy)
}

/// Logs what the configuration, or another control plane, has brought: a limit below the cost of a route.
fn warn_of_costs(rules: &Ruleset, config: &Config, now: u64) {
    for error in route_cost::all((&rules.policy, &rules.limits), &config.roles, now) {
        let (route, detail) = (error.route, error.detail);
        tracing::warn!(route, detail, "the cost of a route is above a limit that applies to it");
    }
}

fn load_fleet_token(path: &Path) -> std::io::Result<Secret<String>> {
    match std::fs::read_to_string(path) {
        Ok(token) if !token.trim().is_empty() => Ok(Secret::new(token.trim().to_owned())),
        // Another token would lock out every proxy.
        Ok(_) => {
            Err(std::io::Error::other("it is empty; write the token of the proxies to it, or remove it"))
        }
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
        Err(_) => {
            let token = Secret::new(format!("{}{}", random::identifier(), random::identifier()));
            files::write_private(path, token.expose().as_bytes())?;
            Ok(token)
        }
    }
}

/// What a new history begins with: a secret, the policy, and a key for the first operator. Its token is
/// written to a file first: should this be cut short, the next start begins again with another one.
fn first_changes(
    config: &Config,
    policy: &Policy,
    keys: &Keyring,
    now: u64,
) -> Result<Vec<Change>, OpenError> {
    let alg = config.signing.algorithm;
    let in_hsm = if config.signing.in_hsm { Some(HsmPair::make(alg, keys)?) } else { None };
    let secret = SecretRecord::make(NewSecret::first(alg, in_hsm), keys, now)?;
    let signer = secret.open(keys)?.signer.ok_or(OpenError::Rules(RulesError::Invalid("no secret signs")))?;
    let key = admin_key::record(config, &signer, now)?;
    admin_key::write(config, &signer, &key)?;
    Ok(vec![
        Change::SecretCreated { secret, idempotency: None },
        Change::PolicyReplaced { policy: policy.clone() },
        Change::KeyIssued { key: Box::new(key), idempotency: None },
    ])
}
