//! Makes the steps of rotations when they are due: waits until every live proxy knows a new secret, ends what is over,
//! begins what is scheduled. Of several control planes the one does it that holds the lease of scheduled work.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use keygate_core::token::crypto::Algorithm;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::durability::writer::{CommitError, Committed};
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::Change;
use crate::model::commands::rotation::{self, Order, RotationError, SETTLE};
use crate::model::state::State;
use crate::node::Node;
use crate::observe::notify::Kind;
use crate::secrets::hsm::HsmError;
use crate::secrets::record::ring::Held;
use crate::secrets::record::{HsmPair, SecretError, SecretState};

/// How often it is looked at whatever nobody tells of: time that passes, other control planes.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// After a step failed, as for want of the HSM, it is tried again after this.
const RETRY_AFTER: Duration = Duration::from_secs(10);
const ACTOR: &str = "system";

/// How a rotation fares.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// The secret that is waited for, if one is.
    pub kid: Option<String>,
    /// Since when.
    since: Option<Instant>,
    /// Who does not know it yet: proxies by their ids, and other control planes.
    pub missing: Vec<String>,
    /// Whether it takes longer than it may.
    pub stalled: bool,
    /// How long it may take, if that was said for this one.
    propagation_timeout: Option<(String, Duration)>,
    /// Why the last step did not succeed, until one does.
    pub failure: Option<String>,
}

/// What is known of the rotation under way, for all who ask.
#[derive(Debug, Default)]
pub struct Driver(Mutex<Progress>);

impl Driver {
    /// How it fares.
    pub fn progress(&self) -> Progress {
        self.lock().clone()
    }

    /// How long proxies may take to know this one secret.
    pub fn allow(&self, kid: &str, timeout: Duration) {
        self.lock().propagation_timeout = Some((kid.into(), timeout));
    }

    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes who is waited for; whether that has just begun to take too long.
    fn waits(&self, kid: &str, missing: Vec<String>, usual: Duration) -> bool {
        let mut progress = self.lock();
        if progress.kid.as_deref() != Some(kid) {
            (progress.kid, progress.since) = (Some(kid.into()), Some(Instant::now()));
            progress.stalled = false;
        }
        let timeout = match &progress.propagation_timeout {
            Some((of, timeout)) if of == kid => *timeout,
            _ => usual,
        };
        let is_late = progress.since.is_some_and(|since| since.elapsed() >= timeout);
        let stalls = is_late && !progress.stalled && !missing.is_empty();
        progress.stalled |= stalls;
        progress.missing = missing;
        stalls
    }

    /// Whether it was known for long enough that somebody may have joined meanwhile.
    fn is_settled(&self) -> bool {
        self.lock().since.is_some_and(|since| since.elapsed() >= SETTLE)
    }

    fn rests(&self) {
        let mut progress = self.lock();
        if progress.kid.is_some() {
            let failure = progress.failure.take();
            *progress = Progress { failure, ..Progress::default() };
        }
    }

    fn failed(&self, failure: Option<String>) {
        self.lock().failure = failure;
    }
}

/// Counts and tells that a rotation, or a step of one, failed.
pub fn note_failure(node: &Node, what: &str, error: &str) {
    node.metrics.secrets.rotation_failures.inc();
    tracing::error!(error, "rotation of secrets: {what}");
    let details = vec![("because", error.to_owned()), ("look", "keygate secrets status".into())];
    node.notifier.tell(Kind::RotationFailed, format!("rotation of signing secrets: {what}"), details);
}

/// Makes the steps until the control plane stops.
pub async fn run(node: Arc<Node>, driver: Arc<Driver>) {
    let mut stopping = node.stopping.clone();
    let (mut states, mut fleet) = (node.states.clone(), node.fleet.changes());
    let mut ticks = interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut not_before, mut hsm_not_before) = (Instant::now(), Instant::now());
    let mut destroyed = BTreeSet::new();
    loop {
        // The fleet is heard of all the time; only who waits for it looks each time.
        let waits = driver.lock().kid.is_some();
        tokio::select! {
            () = stopped(&mut stopping) => return,
            changed = states.changed() => if changed.is_err() { return },
            _ = fleet.changed(), if waits => {}
            _ = ticks.tick() => {}
        }
        if Instant::now() < not_before {
            continue;
        }
        if Instant::now() >= hsm_not_before && !destroy_in_hsm(&node, &mut destroyed).await {
            hsm_not_before = Instant::now() + RETRY_AFTER;
        }
        match step(&node, &driver).await {
            Ok(()) => {
                driver.failed(None);
                if !driver.progress().stalled {
                    node.notifier.resolve(Kind::RotationFailed, "rotation of signing secrets has resumed");
                }
            }
            Err(error) => {
                note_failure(&node, "a step failed; it is tried again", &error.to_string());
                driver.failed(Some(error.to_string()));
                not_before = Instant::now() + RETRY_AFTER;
            }
        }
    }
}

/// Has the HSM destroy the private halves of secrets that sign no more; whether that is done for all. `done` has those of
/// which it is known.
async fn destroy_in_hsm(node: &Arc<Node>, done: &mut BTreeSet<String>) -> bool {
    let Some(hsm) = node.keys.hsm() else { return true };
    let state = node.state();
    let over = state.secrets.all().into_iter().filter(|held| {
        held.record.in_hsm && held.record.state > SecretState::Active && !done.contains(&held.record.kid)
    });
    let over: Vec<String> = over.map(|held| held.record.kid.clone()).collect();
    for kid in over {
        let (hsm, label) = (Arc::clone(hsm), kid.clone());
        match tokio::task::spawn_blocking(move || hsm.destroy(&label)).await {
            Ok(Ok(was_there)) => {
                if was_there {
                    tracing::info!(kid, "the HSM destroyed a secret that signs no more");
                }
                done.insert(kid);
            }
            Ok(Err(error)) => {
                tracing::warn!(kid, %error, "the HSM does not destroy a secret that signs no more; tried again");
                return false;
            }
            Err(_) => return false,
        }
    }
    true
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
enum StepError {
    #[error(transparent)]
    Rotation(#[from] RotationError),
    #[error(transparent)]
    Commit(#[from] CommitError),
}

async fn step(node: &Arc<Node>, driver: &Driver) -> Result<(), StepError> {
    let state = node.state();
    let secrets = &state.secrets;
    let waits_for = rotation::under_way(secrets);
    match waits_for {
        None => driver.rests(),
        Some(held) => {
            let (kid, missing) = (held.record.kid.clone(), missing(node, &state, held));
            let is_known = missing.is_empty();
            if driver.waits(&kid, missing.clone(), node.config.signing.propagation_timeout) {
                let missing = missing.join(", ");
                note_failure(
                    node,
                    "proxies take too long to know the new secret; the old one goes on, until they do or somebody decides",
                    &missing,
                );
            }
            if is_known && node.leads() {
                let is_active = held.record.state == SecretState::Active;
                if is_active || driver.is_settled() {
                    return go_on(node, kid, is_active).await;
                }
            }
        }
    }
    if !node.leads() {
        return Ok(());
    }
    let now = cautious_now(node);
    if rotation::is_untidy(secrets, now) {
        submit(node, move |view| rotation::tidy(view, now)).await?;
    }
    if waits_for.is_none() {
        if secrets.active().is_none() {
            // One control plane cancelled what another had sign.
            begin(node, "no secret was active", true).await?;
        } else if next_at(node, &state).is_some_and(|next| now >= next) {
            begin(node, "scheduled", false).await?;
        }
    }
    Ok(())
}

/// The time, Unix seconds, unless the clock has jumped ahead: what is ended by it does not come back.
fn cautious_now(node: &Node) -> u64 {
    let mut clock = node.cautious_clock.lock().unwrap_or_else(PoisonError::into_inner);
    clock.at(node.clock.now_ms(), std::time::Instant::now()) / 1_000
}

/// Who may serve keys and does not know a secret yet.
pub fn missing(node: &Node, state: &State, held: &Held) -> Vec<String> {
    let version = keygate_core::version::Version { source: state.version.source, seq: held.seq };
    let mut missing = node.fleet.lacking(version, state);
    if !held.verifies() {
        missing.push("this control plane, which cannot open it".into());
    }
    let live = node.peers.live(state);
    if !node.peers.is_connected() && !live.is_empty() {
        missing.push("Redis, without which other control planes are unknown".into());
    }
    // Proxies of one that ended may be here by now.
    let here = node.fleet.live(state);
    let lacks = live
        .iter()
        .filter(|peer| peer.left.as_ref().is_none_or(|left| !left.is_subset(&here)))
        .filter(|peer| !peer.known_secrets.as_ref().is_some_and(|known| known.contains(&held.record.kid)));
    missing.extend(lacks.map(|peer| format!("control plane {:x}", peer.source)));
    missing
}

/// The secrets that every live proxy of this control plane knows.
pub fn known_everywhere(node: &Node) -> BTreeSet<String> {
    let state = node.state();
    let knows = |held: &&Held| {
        let version = keygate_core::version::Version { source: state.version.source, seq: held.seq };
        held.verifies() && node.fleet.lacking(version, &state).is_empty()
    };
    let all = state.secrets.all().into_iter().filter(|held| held.record.state < SecretState::Expired);
    all.filter(knows).map(|held| held.record.kid.clone()).collect()
}

async fn submit<T: Send + 'static>(
    node: &Node,
    plan: impl FnOnce(&View<'_>) -> Result<(Vec<Change>, T), RotationError> + Send + 'static,
) -> Result<(T, Committed), StepError> {
    Ok(node.writer.submit(&Author::part(ACTOR), plan).await??)
}

/// Has the new secret sign: makes it active, or says that the active one is known.
async fn go_on(node: &Node, kid: String, is_active: bool) -> Result<(), StepError> {
    let (policy, id) = (node.config.signing.clone(), kid.clone());
    let plan = move |view: &View<'_>| match is_active {
        true => rotation::announce(view, &id, None),
        false => rotation::activate(view, &policy, &id, None),
    };
    match submit(node, plan).await {
        // It was cancelled or forced meanwhile.
        Err(StepError::Rotation(RotationError::None)) => Ok(()),
        Err(error) => Err(error),
        Ok(_) => {
            node.metrics.secrets.rotations.with(["completed"]).inc();
            tracing::info!(kid, "the new secret signs: every live proxy knows it");
            Ok(())
        }
    }
}

/// When the next rotation is due by the schedule, Unix seconds: the first time after a rotation was begun last,
/// whatever became of it.
pub fn next_at(node: &Node, state: &State) -> Option<u64> {
    let schedule = node.config.signing.schedule.as_ref()?;
    let begun = state.secrets.all().into_iter().map(|held| held.record.created_at).max()?;
    schedule.next_after(begun)
}

/// Begins a rotation by itself.
async fn begin(node: &Arc<Node>, why: &str, immediate: bool) -> Result<(), StepError> {
    let alg = node.config.signing.algorithm;
    let in_hsm = make_in_hsm(node, alg).await?;
    let pair = in_hsm.as_ref().map(|pair| pair.kid.clone());
    let order = Order { alg, immediate, why: why.into(), imported: None, in_hsm };
    let begun = submit(node, move |view| rotation::begin(view, order, None)).await;
    if let (Err(_), Some(kid)) = (&begun, pair) {
        discard_in_hsm(node, kid).await;
    }
    match begun {
        Err(StepError::Rotation(RotationError::InProgress(_) | RotationError::JustBegun(_))) => Ok(()),
        Err(error) => Err(error),
        Ok((begun, _)) => {
            tracing::info!(kid = begun.kid, why, "a rotation of secrets was begun");
            Ok(())
        }
    }
}

/// Has the HSM make a key pair, if it is to keep new secrets; not on the writer's thread, for which all changes wait.
///
/// # Errors
/// When it does not.
pub async fn make_in_hsm(node: &Arc<Node>, alg: Algorithm) -> Result<Option<HsmPair>, RotationError> {
    if !node.config.signing.in_hsm {
        return Ok(None);
    }
    let here = Arc::clone(node);
    let made = tokio::task::spawn_blocking(move || HsmPair::make(alg, &here.keys)).await;
    Ok(Some(made.unwrap_or(Err(SecretError::Hsm(HsmError::Stopped)))?))
}

/// Has the HSM destroy a key pair of which nothing came.
pub async fn discard_in_hsm(node: &Arc<Node>, kid: String) {
    let here = Arc::clone(node);
    let _done_or_not = tokio::task::spawn_blocking(move || HsmPair::discard(&kid, &here.keys)).await;
}

async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _sender_gone = stopping.wait_for(|stop| *stop).await;
}
