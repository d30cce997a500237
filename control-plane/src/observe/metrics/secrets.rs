//! Metrics of signing secrets.

use super::write_only::{Counter, Counters, Gauge, Gauges, component};
use crate::secrets::record::{Ring, SecretState};

component! {
    /// Metrics of signing secrets.
    SecretMetrics {
        rotation_failures: Counter = (
            "secret_rotation_failures",
            "Rotations of signing secrets that failed."
        );
        rotations: Counters<1> = (
            "keygate_secret_rotations_total",
            "Rotations of signing secrets: begun by hand, completed, cancelled, forced before every proxy knew the secret.",
            ["outcome"]
        );
        secrets: Gauges<1> = ("keygate_secrets", "Signing secrets, by their stage.", ["state"]);
        stage_seconds: Gauges<1> = (
            "keygate_secret_stage_seconds",
            "Time since the newest secret entered this stage; 0 if none.",
            ["state"]
        );
        active_age: Gauge = (
            "keygate_secret_active_age_seconds",
            "Time since the secret that signs was made."
        );
        next_rotation: Gauge = (
            "keygate_secret_next_rotation_seconds",
            "Time until the next scheduled rotation, negative when it is late; NaN when none is scheduled."
        );
    }
}

impl SecretMetrics {
    /// Makes every series, with 0.
    pub(super) fn begin(&self) {
        for outcome in ["begun", "completed", "cancelled", "forced"] {
            self.rotations.with([outcome]);
        }
        for state in SecretState::ALL {
            self.secrets.with([state.label()]);
            self.stage_seconds.with([state.label()]);
        }
    }

    /// Shows the secrets at `now`, and when the next rotation is due; both in Unix seconds.
    #[allow(clippy::cast_precision_loss)] // Seconds are far below 2^53.
    pub fn show(&self, ring: &Ring, next: Option<u64>, now: u64) {
        let since = |at: u64| now.saturating_sub(at);
        let all = ring.all();
        for state in SecretState::ALL {
            let at = all.iter().filter(|held| ring.state_of(held) == state);
            self.secrets.with([state.label()]).set_count(at.clone().count() as u64);
            let youngest = at.map(|held| held.record.since.max(held.record.created_at)).max();
            self.stage_seconds.with([state.label()]).set_count(youngest.map_or(0, since));
        }
        self.active_age.set_count(ring.active().map_or(0, |held| since(held.record.created_at)));
        self.next_rotation.set(next.map_or(f64::NAN, |next| next as f64 - now as f64));
    }
}
