//! Metrics of keys.

use super::V2;
use super::write_only::{Counter, Counters, Gauges, component};
use crate::model::key::RevocationReason;
use crate::model::roles::Roles;

component! {
    /// Metrics of keys.
    KeyMetrics {
        created: Counters<2> = ("api_key_created_total", "Keys issued.", ["role", "version"]);
        refreshed: Counters<2> = ("api_key_refreshed_total", "Renewals asked for.", ["role", "success"]);
        revoked: Counters<2> = ("api_key_revoked_total", "Keys revoked.", ["role", "reason"]);
        active: Gauges<1> = (
            "active_api_keys",
            "Keys neither revoked nor expired, to the minute.",
            ["role"]
        );
        break_glass: Counter = (
            "keygate_break_glass_total",
            "Mass revocations without the second approval that they needed."
        );
    }
}

impl KeyMetrics {
    /// Makes the series of every role, with 0.
    pub(super) fn begin(&self, roles: &Roles) {
        for role in roles.keys() {
            self.created.with([role, V2]);
            self.active.with([role]);
            for success in ["true", "false"] {
                self.refreshed.with([role, success]);
            }
            for reason in RevocationReason::ALL {
                self.revoked.with([role, reason.label()]);
            }
        }
    }
}
