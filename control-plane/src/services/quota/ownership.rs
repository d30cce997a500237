//! Decides which control plane keeps the ledger, and has this one keep it, pass questions on, or stop.
//!
//! The owner stands in the journal. Where there are several control planes, the owner also holds a lease in Redis, and the
//! others call its sync port every second. Another one takes over when it has not reached the owner for [`TAKEOVER_AFTER`]
//! and gets the lease; or at once, when the owner handed the ledger over as it ended. An owner that cannot renew the lease
//! continues while every other control plane reaches it, since then none of them takes over; else it grants nothing after
//! [`OWNS_FOR`], which is less. So without Redis the ledger stays where it is, and no other one begins.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::disk::DiskError;
use super::handover;
use super::service::{LedgerService, Origin};
use super::{Quotas, Role};
use crate::durability::writer::{CommitError, Committed};
use crate::model::View;
use crate::model::author::Author;
use crate::model::commands::limits as commands;
use crate::model::state::{Keeper, State};
use crate::peers::Intake;

const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Interval of renewals of the lease, and of calls of the owner.
const CALL_EVERY: Duration = Duration::from_secs(1);
/// Time for which the lease is taken.
pub const LEASE: Duration = Duration::from_secs(8);
/// Time after the last renewal, or the last call of another control plane, for which the owner grants units.
const OWNS_FOR: Duration = Duration::from_secs(6);
/// Time after the owner was last reached at which another control plane may take over.
const TAKEOVER_AFTER: Duration = Duration::from_secs(8);
/// Interval at which the owner writes the ledger to Redis, for the one that takes over from it.
const HAND_OVER_EVERY: Duration = Duration::from_secs(5);
/// Name of the lease.
const WORK: &str = "limits";
/// The actor in the journal of changes that no operator asked for.
const ACTOR: &str = "system";

/// The next step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// It is not known who keeps the ledger.
    Wait,
    /// This one says that it does.
    Claim,
    /// This one keeps it.
    Keep { since: u64, before: Option<u64>, first: bool },
    /// Another one does.
    PassOn(u64),
}

/// Contact with the others, as far as it decides who keeps the ledger.
#[derive(Debug)]
struct Contact {
    /// An operator had this one take over, and Redis could not be asked since.
    forced: bool,
    /// Last renewal of the lease.
    renewed: Option<Instant>,
    /// The owner and when it was last reached; from when this control plane knew of it.
    owner: Option<(u64, Instant)>,
    next_call: Instant,
    next_hand_over: Instant,
}

/// Looks who keeps the ledger until it is to stop; then hands it over.
pub async fn run(quotas: Arc<Quotas>) {
    if !quotas.node.config.enforces_limits {
        return;
    }
    let mut stopping = quotas.node.stopping.clone();
    let mut last_problem = None;
    let now = Instant::now();
    let mut contact =
        Contact { forced: false, renewed: None, owner: None, next_call: now, next_hand_over: now };
    loop {
        let problem = look(&quotas, &mut contact).await.err().map(|problem| problem.to_string());
        if problem != last_problem {
            if let Some(problem) = &problem {
                tracing::error!(problem, "limits are not kept here");
            }
            last_problem = problem;
        }
        if let Some(service) = quotas.here() {
            service.on_tick();
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY) => {}
            _ = stopping.wait_for(|stop| *stop) => break,
        }
    }
    let peers = quotas.node.peers.as_ref();
    if let Some(service) = quotas.here().filter(|_| !peers.is_alone()) {
        service.end();
        let own = quotas.node.state().version.source;
        if handover::write(peers, &service, true).await {
            peers.release(WORK, own).await;
        }
    }
}

/// Has this control plane keep the ledger from now on, unless it does already: for when the one before is gone and has not
/// been succeeded.
///
/// # Errors
/// When it cannot be journalled.
pub async fn take_over(quotas: &Quotas, author: &Author) -> Result<Committed, CommitError> {
    let own = quotas.node.state().version.source;
    let is_here = quotas.here().is_some();
    let command = move |view: &View<'_>| commands::take_over_ledger(view, own, is_here);
    let ((), committed) = quotas.node.writer.commit(author, command).await?;
    quotas.claimed.store(!is_here, Ordering::Release);
    Ok(committed)
}

async fn look(quotas: &Quotas, contact: &mut Contact) -> Result<(), anyhow::Error> {
    let state = quotas.node.state();
    match step(quotas, &state) {
        Step::Wait => quotas.play(Role::Unknown),
        Step::PassOn(source) => {
            if !matches!(quotas.role(), Role::Elsewhere(other) if other == source) {
                tracing::info!(
                    owner = format!("{source:x}"),
                    "another control plane keeps the ledger of limits"
                );
                quotas.play(Role::Elsewhere(source));
            }
            succeed(quotas, &state, source, contact).await?;
        }
        Step::Keep { since, before, first } => {
            if owns(quotas, &state, contact).await {
                keep(quotas, Origin::Disk { since, before, first })?;
            }
        }
        Step::Claim => {
            let before = state.limits_keeper;
            if let Some(since) = claim(quotas, before).await? {
                // Until now it was this one's, if there was any.
                let first = before.is_none();
                keep(quotas, Origin::Disk { since, before: first.then(|| alone(&state)), first })?;
            }
        }
    }
    Ok(())
}

/// Journals that this control plane keeps the ledger, if it is still as it was; the stamp of that.
async fn claim(quotas: &Quotas, before: Option<Keeper>) -> Result<Option<u64>, anyhow::Error> {
    let own = quotas.node.state().version.source;
    let command = move |view: &View<'_>| commands::claim_ledger(view, own, before);
    quotas.node.writer.commit(&Author::part(ACTOR), command).await?;
    Ok(quotas.node.state().limits_keeper.filter(|keeper| keeper.source == own).map(|keeper| keeper.since))
}

/// Whether this owner may grant units: alone, or with the lease, or reached by all others.
async fn owns(quotas: &Quotas, state: &State, contact: &mut Contact) -> bool {
    let peers = quotas.node.peers.as_ref();
    if peers.is_alone() || !state.has_peers() {
        return true;
    }
    let now = Instant::now();
    let claimed = quotas.claimed.swap(false, Ordering::AcqRel);
    if now >= contact.next_call || claimed {
        contact.next_call = now + CALL_EVERY;
        contact.forced |= claimed;
        if contact.forced {
            peers.release_any(WORK).await;
        }
        match peers.lease(WORK, state.version.source, LEASE).await {
            Some(true) => (contact.renewed, contact.forced) = (Some(now), false),
            // Another one has it: it takes over, and will say so.
            Some(false) => {
                contact.renewed = None;
                quotas.play(Role::Unknown);
                return false;
            }
            None => {}
        }
    }
    let is_recent = |at: Instant| now.saturating_duration_since(at) < OWNS_FOR;
    let callers = quotas.callers();
    let live = peers.live(state);
    let reached = !live.is_empty()
        && live.iter().all(|peer| callers.get(&peer.source).is_some_and(|called| is_recent(*called)));
    let owns = contact.forced || contact.renewed.is_some_and(is_recent) || reached;
    if let Some(service) = quotas.here() {
        service.suspend(!owns);
        if owns && now >= contact.next_hand_over {
            contact.next_hand_over = now + HAND_OVER_EVERY;
            handover::write(peers, &service, false).await;
        }
        return true;
    }
    owns
}

/// Calls the owner, and takes over from one that is gone.
async fn succeed(
    quotas: &Quotas,
    state: &State,
    owner: u64,
    contact: &mut Contact,
) -> Result<(), anyhow::Error> {
    let now = Instant::now();
    let peers = quotas.node.peers.as_ref();
    if peers.is_alone() {
        return Ok(());
    }
    let reached = match contact.owner {
        Some((source, reached)) if source == owner => reached,
        _ => {
            contact.owner = Some((owner, now));
            now
        }
    };
    if now < contact.next_call {
        return Ok(());
    }
    contact.next_call = now + CALL_EVERY;
    if super::forward::call_owner(quotas, owner).await {
        contact.owner = Some((owner, Instant::now()));
        return Ok(());
    }
    if !peers.is_caught_up() {
        return Ok(());
    }
    let handed_over = handover::read(peers)
        .await
        .filter(|handed_over| state.limits_keeper.is_some_and(|keeper| keeper.since == handed_over.since));
    let whole = handed_over.as_ref().is_some_and(|handed_over| handed_over.whole);
    let is_gone = Instant::now().saturating_duration_since(reached) >= TAKEOVER_AFTER;
    if !whole && !is_gone || peers.lease(WORK, state.version.source, LEASE).await != Some(true) {
        return Ok(());
    }
    tracing::warn!(
        owner = format!("{owner:x}"),
        whole,
        "the control plane that keeps the ledger of limits is gone; this one takes over"
    );
    if let Some(since) = claim(quotas, state.limits_keeper).await? {
        contact.renewed = Some(Instant::now());
        match handed_over {
            Some(handed_over) => {
                keep(
                    quotas,
                    Origin::Handover { since, saved: &handed_over.saved, whole: handed_over.whole },
                )?;
            }
            None => keep(quotas, Origin::Disk { since, before: None, first: false })?,
        }
    }
    Ok(())
}

fn step(quotas: &Quotas, state: &State) -> Step {
    let keeper = state.limits_keeper;
    let peers = quotas.node.peers.as_ref();
    if peers.is_alone() {
        return match keeper {
            None => Step::Keep { since: alone(state), before: None, first: true },
            Some(keeper) => of(state.version.source, state.is_own(keeper.source), keeper, false),
        };
    }
    match (keeper, peers.intake()) {
        (Some(keeper), _) => of(state.version.source, state.is_own(keeper.source), keeper, true),
        // One that is alone need not wait for a Redis that is away.
        (None, Intake::Unreachable) if !state.has_peers() => Step::Claim,
        (None, Intake::Done) if peers.holds_lease() => Step::Claim,
        (None, _) => Step::Wait,
    }
}

/// The next step where the journal names an owner. `is_own`: it is this control plane, maybe by an older name.
fn of(source: u64, is_own: bool, keeper: Keeper, is_heard: bool) -> Step {
    if !is_own {
        return Step::PassOn(keeper.source);
    }
    // This journal was set back and began another line of history, by which others know it now.
    if keeper.source != source && is_heard {
        return Step::Claim;
    }
    Step::Keep { since: keeper.since, before: None, first: false }
}

/// Stamp by which a control plane without others keeps the ledger; another one for a copy that was set back.
fn alone(state: &State) -> u64 {
    if state.lines.is_empty() { 0 } else { state.version.source }
}

fn keep(quotas: &Quotas, origin: Origin<'_>) -> Result<(), DiskError> {
    let (Origin::Disk { since, .. } | Origin::Handover { since, .. }) = origin;
    if quotas.here().is_some_and(|service| service.since() == since) {
        return Ok(());
    }
    // First of all no other ledger is open: the file is one for all.
    quotas.play(Role::Unknown);
    let service = LedgerService::open(
        &quotas.node.config.data_dir,
        quotas.node.config.hot_restart,
        quotas.node.clock.now_ms(),
        origin,
    )?;
    quotas.play(Role::Here(Arc::new(service)));
    Ok(())
}

impl Quotas {
    /// Another control plane called this one as the owner; whether it is.
    pub fn called_by(&self, source: u64) -> bool {
        let mut callers = self.callers.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        callers.insert(source, Instant::now());
        self.here().is_some()
    }

    fn callers(&self) -> BTreeMap<u64, Instant> {
        self.callers.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_owner_keeps_the_ledger_and_all_others_pass_on() {
        let keeper = Keeper { source: 7, since: 70 };
        let keeps = Step::Keep { since: 70, before: None, first: false };
        for is_heard in [false, true] {
            assert_eq!(of(7, true, keeper, is_heard), keeps);
            assert_eq!(of(8, false, keeper, is_heard), Step::PassOn(7));
        }
        // A journal that was set back says its new name, where others can hear it.
        assert_eq!(of(9, true, keeper, true), Step::Claim);
        assert_eq!(of(9, true, keeper, false), keeps);
    }

    #[test]
    fn an_owner_stops_before_another_one_may_begin() {
        assert!(OWNS_FOR + CALL_EVERY < TAKEOVER_AFTER && OWNS_FOR + CALL_EVERY < LEASE);
    }
}
