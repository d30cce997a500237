//! The other control planes, as services see them: their reports, the leases of work that one of them does, and the few
//! values that one leaves for another.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::future::ready;
use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::config::Durability;
use crate::model::state::State;

/// Period of a lease that only announces a piece of work: longer than others need to hear of it.
const CLAIM: Duration = Duration::from_secs(5);

/// Progress of taking in the changes that other control planes had when this process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Intake {
    /// Not looked at yet.
    #[default]
    Unknown,
    /// The others' logs could not be read; the state here is all that is known.
    Unreachable,
    /// Under way: a secret may be here without the revocation of a key that it signed.
    Begun,
    /// Complete.
    Done,
}

/// Another control plane that may have live proxies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LivePeer {
    /// Its line of history.
    pub source: u64,
    /// The signing secrets that all of its live proxies know; `None` before its first report.
    pub known_secrets: Option<BTreeSet<String>>,
    /// If it ended in good order: the ids of the proxies that it left.
    pub left: Option<BTreeSet<String>>,
}

/// The place where control planes meet. Methods that ask it return `None` when it cannot be reached.
pub trait Peers: Debug + Send + Sync {
    /// Whether no such place is configured.
    fn is_alone(&self) -> bool;

    /// Whether the place answers.
    fn is_connected(&self) -> bool;

    /// Whether this control plane holds the lease of scheduled work.
    fn holds_lease(&self) -> bool;

    /// Progress of taking in the others' changes.
    fn intake(&self) -> Intake;

    /// Waits a moment until the state may be handed to proxies; whether it may.
    fn wait_caught_up(&self) -> BoxFuture<'_, bool>;

    /// The last change of another control plane up to which this one lacks nothing; `None` for an unknown one.
    fn covered(&self, source: u64) -> Option<u64>;

    /// The others that were heard of within the hard age, or all known ones before the first look.
    fn live(&self, state: &State) -> Vec<LivePeer>;

    /// Address of another control plane's sync port.
    fn sync_url(&self, source: u64) -> Option<String>;

    /// Waits a moment for the copy of change `seq` of the journal; the durability it has then.
    fn durability(&self, seq: u64) -> BoxFuture<'_, Durability>;

    /// Takes or renews the lease of a piece of work; whether this control plane has it.
    fn lease<'a>(&'a self, work: &'a str, source: u64, period: Duration) -> BoxFuture<'a, Option<bool>>;

    /// Returns the lease of a piece of work, if this control plane has it.
    fn release<'a>(&'a self, work: &'a str, source: u64) -> BoxFuture<'a, ()>;

    /// Takes the lease of a piece of work from any control plane that has it.
    fn release_any<'a>(&'a self, work: &'a str) -> BoxFuture<'a, ()>;

    /// Leaves a value for `ttl_s` seconds; whether it is there.
    fn put<'a>(&'a self, key: &'a str, value: &'a [u8], ttl_s: u64) -> BoxFuture<'a, bool>;

    /// A value that was left.
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Option<Vec<u8>>>;

    /// Whether this control plane does the scheduled work that only one of several does: it has the lease, or no others.
    fn leads(&self, state: &State) -> bool {
        self.holds_lease() || self.live(state).is_empty()
    }

    /// Whether nothing that another control plane knows is unknown here.
    fn is_caught_up(&self) -> bool {
        self.intake() == Intake::Done
    }

    /// Announces a piece of work for a moment; whether this control plane may begin it.
    fn claim<'a>(&'a self, work: &'a str, source: u64) -> BoxFuture<'a, Option<bool>> {
        self.lease(work, source, CLAIM)
    }
}

/// A control plane without a place to meet others.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl Peers for Alone {
    fn is_alone(&self) -> bool {
        true
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn holds_lease(&self) -> bool {
        true
    }

    fn intake(&self) -> Intake {
        Intake::Done
    }

    fn wait_caught_up(&self) -> BoxFuture<'_, bool> {
        Box::pin(ready(true))
    }

    fn covered(&self, _: u64) -> Option<u64> {
        None
    }

    fn live(&self, _: &State) -> Vec<LivePeer> {
        Vec::new()
    }

    fn sync_url(&self, _: u64) -> Option<String> {
        None
    }

    fn durability(&self, _: u64) -> BoxFuture<'_, Durability> {
        Box::pin(ready(Durability::Local))
    }

    fn lease<'a>(&'a self, _: &'a str, _: u64, _: Duration) -> BoxFuture<'a, Option<bool>> {
        Box::pin(ready(Some(true)))
    }

    fn release<'a>(&'a self, _: &'a str, _: u64) -> BoxFuture<'a, ()> {
        Box::pin(ready(()))
    }

    fn release_any<'a>(&'a self, _: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(ready(()))
    }

    fn put<'a>(&'a self, _: &'a str, _: &'a [u8], _: u64) -> BoxFuture<'a, bool> {
        Box::pin(ready(false))
    }

    fn get<'a>(&'a self, _: &'a str) -> BoxFuture<'a, Option<Vec<u8>>> {
        Box::pin(ready(None))
    }
}
