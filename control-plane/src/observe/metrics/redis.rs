//! Metrics of Redis and of what came from other control planes by it.

use super::write_only::{Counter, Counters, Gauge, Gauges, Histograms, MILLISECONDS, component};

component! {
    /// Metrics of Redis.
    RedisMetrics {
        configured: Gauge = ("keygate_redis_configured", "1: a Redis is configured.");
        connection: Gauge = (
            "redis_connection_status",
            "1: Redis answers; 0: it does not, or none is configured. The journal keeps every change."
        );
        seconds: Histograms<1> = (
            "redis_operation_duration_seconds",
            "Duration of operations on Redis, with the handling of the answer.",
            ["operation"],
            MILLISECONDS
        );
        errors: Counters<1> = ("keygate_redis_errors_total", "Errors of Redis, by kind.", ["kind"]);
        edits: Counters<2> = (
            "keygate_redis_edits_total",
            "Edits of Redis keys by operators, put in force (taken) or refused.",
            ["key", "outcome"]
        );
        setting_problems: Gauges<1> = (
            "keygate_redis_setting_problem",
            "1 for a setting of Redis that an operator should change.",
            ["setting"]
        );
        merged: Counter = (
            "keygate_merged_changes_total",
            "Changes of other control planes that were merged."
        );
    }
}
