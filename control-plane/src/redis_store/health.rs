//! How a Redis is set up and fares: read from `INFO`, which needs no more than the right to ask.

use std::collections::HashMap;

use serde::Serialize;

/// One Redis.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Health {
    /// Its version.
    pub version: String,
    /// `master` or `slave`, in its own words.
    pub role: String,
    /// What it drops when its memory is full.
    pub maxmemory_policy: String,
    /// Whether it keeps an append-only file.
    pub appendonly: bool,
    /// Replicas that are connected.
    pub replicas: u64,
    /// Whether it still reads its data.
    pub loading: bool,
    /// Whether its last save or rewrite failed.
    pub persistence_failed: bool,
    /// Tells this start of its process from others.
    #[serde(skip)]
    pub run_id: String,
    /// The history of its data.
    #[serde(skip)]
    pub replication_id: String,
    /// Keys that it has dropped for want of memory.
    pub evicted_keys: u64,
}

impl Health {
    /// Reads the answer to `INFO`.
    pub fn read(info: &str) -> Self {
        let members: HashMap<&str, &str> =
            info.lines().filter_map(|line| line.trim_end().split_once(':')).collect();
        let text = |name: &str| members.get(name).copied().unwrap_or_default().to_owned();
        let number = |name: &str| members.get(name).and_then(|text| text.parse().ok()).unwrap_or(0);
        let is_bad = |name: &str| members.get(name).is_some_and(|text| *text == "err");
        Self {
            version: text("redis_version"),
            role: text("role"),
            maxmemory_policy: text("maxmemory_policy"),
            appendonly: number("aof_enabled") == 1,
            replicas: number("connected_slaves"),
            loading: number("loading") == 1,
            persistence_failed: is_bad("rdb_last_bgsave_status") || is_bad("aof_last_write_status"),
            run_id: text("run_id"),
            replication_id: text("master_replid"),
            evicted_keys: number("evicted_keys"),
        }
    }

    /// Whether it may drop keys that it took.
    pub fn may_evict(&self) -> bool {
        !self.maxmemory_policy.is_empty() && self.maxmemory_policy != "noeviction"
    }

    /// What an operator should change, each with its short name for metrics. `replicas` should be connected.
    pub fn problems(&self, replicas: u64) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if self.may_evict() {
            problems.push((
                "maxmemory_policy",
                format!(
                    "maxmemory-policy is {}: Redis may drop revocations; CONFIG SET maxmemory-policy noeviction",
                    self.maxmemory_policy
                ),
            ));
        }
        if !self.appendonly {
            problems.push((
                "appendonly",
                "there is no append-only file: Redis forgets when it restarts; CONFIG SET appendonly yes"
                    .into(),
            ));
        }
        if self.replicas < replicas {
            problems.push((
                "replicas",
                format!("{} of {replicas} replicas are connected; changes are not replicated", self.replicas),
            ));
        }
        if self.persistence_failed {
            problems.push(("persistence", "Redis could not write its file: look at its disk and log".into()));
        }
        problems
    }
}

/// The names of all problems, for metrics.
pub const PROBLEMS: [&str; 4] = ["maxmemory_policy", "appendonly", "replicas", "persistence"];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn info_is_read_and_judged() {
        let info = "# Server\r\nredis_version:7.0.15\r\nrun_id:abc\r\n# Memory\r\nmaxmemory_policy:allkeys-lru\r\n\
            # Persistence\r\nloading:0\r\nrdb_last_bgsave_status:err\r\naof_enabled:0\r\naof_last_write_status:ok\r\n\
            # Replication\r\nrole:master\r\nconnected_slaves:1\r\nmaster_replid:def\r\n# Stats\r\nevicted_keys:7\r\n";
        let health = Health::read(info);
        assert_eq!((health.role.as_str(), health.replicas, health.evicted_keys), ("master", 1, 7));
        let names =
            |replicas| health.problems(replicas).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
        assert_eq!(names(1), ["maxmemory_policy", "appendonly", "persistence"]);
        assert_eq!(names(2), PROBLEMS.iter().copied().filter(|n| names(2).contains(n)).collect::<Vec<_>>());
        let good = Health {
            maxmemory_policy: "noeviction".into(),
            appendonly: true,
            persistence_failed: false,
            ..health
        };
        assert_eq!(good.problems(1), []);
        assert_eq!(Health::read("").problems(0).len(), 1, "what is not said is not judged, but for the file");
    }
}
