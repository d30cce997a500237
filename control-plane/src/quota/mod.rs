//! Limits over the fleet: who keeps the ledger that divides them among proxies, and how a proxy's question gets there.
//!
//! A fleet has one ledger at a time ([`Keeping`]), at one control plane. Which one that is stands in the journal and so is
//! known to all of them; the others pass questions on. The first one to begin keeps it for good: nobody takes over by
//! itself, since from outside a control plane that is dead looks like one that is cut off and goes on to hand out. When
//! it is gone for good an operator has another keep it, which begins in doubt: what is out may be used, and nothing more
//! is handed out until all of that has ended. Proxies go on with their shares meanwhile.

mod book;
mod forward;
mod keeper;
mod keeping;

use std::sync::{Arc, PoisonError, RwLock};

use keygate_core::quota::Account;

pub use self::book::BookError;
use self::forward::Forwarder;
pub use self::forward::pass_on;
pub use self::keeper::{run, take_over};
pub use self::keeping::{Basis, Keeping, QuotaError};

/// Who keeps the ledger, as seen from here.
#[derive(Debug, Clone, Default)]
pub enum Role {
    /// It is not known yet, or nobody does.
    #[default]
    Unknown,
    /// This control plane does.
    Here(Arc<Keeping>),
    /// Another one does, with this line of history.
    Elsewhere(u64),
}

/// A control plane's part in the limits of the fleet.
#[derive(Debug, Default)]
pub struct Quotas {
    role: RwLock<Role>,
    forwarder: Forwarder,
}

impl Quotas {
    /// Who keeps the ledger.
    pub fn role(&self) -> Role {
        self.role.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The ledger, if it is kept here.
    pub fn here(&self) -> Option<Arc<Keeping>> {
        match self.role() {
            Role::Here(keeping) => Some(keeping),
            Role::Unknown | Role::Elsewhere(_) => None,
        }
    }

    /// The accounts of which the greatest part of their limit is in use, with that and the limit; none if the ledger is
    /// elsewhere.
    pub fn busiest(&self, count: usize) -> Vec<(Account, u32, u32)> {
        self.here().map(|keeping| keeping.busiest(count)).unwrap_or_default()
    }

    /// Whether the ledger is here and hands out nothing for now.
    pub fn is_in_doubt(&self) -> bool {
        self.here().is_some_and(|keeping| keeping.is_in_doubt())
    }

    /// From now on it is so. A ledger that is kept here no more hands out nothing more.
    fn play(&self, role: Role) {
        let before = std::mem::replace(&mut *self.role.write().unwrap_or_else(PoisonError::into_inner), role);
        if let Role::Here(keeping) = before {
            keeping.end();
        }
    }
}
