//! Limits over the fleet: the control plane that keeps the ledger, and the way of a proxy's question to it.
//!
//! A fleet has one ledger at a time ([`LedgerService`]), at one control plane. The journal says at which; the others pass
//! questions on. When that one ends or is lost, another takes over by itself: [`ownership`].

mod disk;
mod forward;
mod handover;
mod ownership;
mod service;

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;

use keygate_core::quota::Account;

pub use self::disk::DiskError;
use self::forward::Forwarder;
pub use self::forward::{ForwardError, Forwarded, OWNER, pass_on};
pub use self::ownership::{run, take_over};
pub use self::service::{LedgerService, QuotaError};
use crate::node::Node;
use crate::observe::metrics::Doubts;

/// The control plane that keeps the ledger, as seen from here.
#[derive(Debug, Clone, Default)]
pub enum Role {
    /// It is not known yet, or none does.
    #[default]
    Unknown,
    /// This control plane does.
    Here(Arc<LedgerService>),
    /// Another one does, with this line of history.
    Elsewhere(u64),
}

/// A control plane's part in the limits of the fleet.
pub struct Quotas {
    node: Arc<Node>,
    role: RwLock<Role>,
    forwarder: Forwarder,
    /// Other control planes that called this one as the owner, and when.
    callers: Mutex<BTreeMap<u64, Instant>>,
    /// An operator had this one take over.
    claimed: AtomicBool,
}

impl Quotas {
    /// The part of a control plane that has just started.
    pub fn new(node: Arc<Node>) -> Self {
        Self {
            node,
            role: RwLock::default(),
            forwarder: Forwarder::default(),
            callers: Mutex::default(),
            claimed: AtomicBool::default(),
        }
    }

    /// The control plane that keeps the ledger.
    pub fn role(&self) -> Role {
        self.role.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The ledger, if it is kept here.
    pub fn here(&self) -> Option<Arc<LedgerService>> {
        match self.role() {
            Role::Here(service) => Some(service),
            Role::Unknown | Role::Elsewhere(_) => None,
        }
    }

    /// The accounts of which the greatest part of their limit is in use, with that and the limit; none if the ledger is
    /// elsewhere.
    pub fn busiest(&self, count: usize) -> Vec<(Account, u32, u32)> {
        self.here().map(|service| service.busiest(count)).unwrap_or_default()
    }

    /// Proxies that the ledger does not hear, and whether limits grow; `None` if it is elsewhere.
    pub fn doubts(&self) -> Option<Doubts> {
        self.here().map(|service| service.doubts())
    }

    /// From now on it is so. A ledger that is kept here no more grants nothing more.
    fn play(&self, role: Role) {
        let before = std::mem::replace(&mut *self.role.write().unwrap_or_else(PoisonError::into_inner), role);
        if let Role::Here(service) = before {
            service.end();
        }
    }
}
