//! Metrics of notifications.

use super::write_only::{Counters, component};

component! {
    /// Metrics of notifications.
    NotificationMetrics {
        sent: Counters<2> = (
            "keygate_notifications_total",
            "Notifications by destination: sent, failed after every try, or dropped since too many waited.",
            ["destination", "outcome"]
        );
    }
}
