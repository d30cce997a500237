//! What can go wrong with Redis, by what an operator has to do about it.

use std::io;
use std::path::PathBuf;

use redis::{ErrorKind, RedisError};

/// Why Redis did not do as asked.
///
/// Neither a password nor a key nor a value is in any of them: what Redis or its client says in words may
/// repeat what was sent, so of a server's answer only the code is kept.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// No connection, or no answer in time. A command that was sent may have been carried out.
    #[error(
        "Redis at {address} cannot be reached or does not answer: look whether it runs and at the network"
    )]
    Unreachable {
        /// Who was asked.
        address: String,
        /// What happened.
        #[source]
        source: RedisError,
    },
    /// The Sentinels do not know the master.
    #[error(
        "the Sentinels at {addresses} know no master {name:?}: look at the name in the URL and at 'sentinel monitor'"
    )]
    UnknownMaster {
        /// Who was asked.
        addresses: String,
        /// For what.
        name: String,
    },
    /// It is a replica, or cut off from its master.
    #[error(
        "Redis at {address} is not a master: it refuses writes until a failover or an operator makes it one"
    )]
    NotMaster {
        /// Who said so.
        address: String,
    },
    /// It reads its data from disk or from its master.
    #[error("Redis is loading its data (LOADING): it will answer when it is done")]
    Loading,
    /// Its memory is full.
    #[error("Redis refuses writes since its memory is full (OOM): raise its maxmemory, or free some")]
    OutOfMemory,
    /// It cannot write to its disk.
    #[error("Redis refuses writes since it cannot persist (MISCONF): look at its disk and its log")]
    Persistence,
    /// Too few replicas follow it.
    #[error("Redis refuses writes since too few replicas follow it (NOREPLICAS): look at its replicas")]
    NoReplicas,
    /// It does not let us in, or not do this.
    #[error(
        "Redis refuses the user or password, or the user may not do this ({code}): look at the URL and at its ACL"
    )]
    Auth {
        /// Redis's code, like `NOPERM`.
        code: String,
    },
    /// A key holds another type than ours.
    #[error("a key of Keygate holds another type of value (WRONGTYPE): something else writes to this Redis")]
    WrongType,
    /// The Cluster cannot serve all of its slots.
    #[error("the Redis Cluster does not serve all keys ({code}): look at 'redis-cli --cluster check'")]
    ClusterDown {
        /// Redis's code, or `SLOTS` when slots are not assigned.
        code: String,
    },
    /// A single Redis or a master of Sentinels was expected.
    #[error("Redis at {address} is part of a cluster: write redis+cluster:// in the URL")]
    IsCluster {
        /// Who said so.
        address: String,
    },
    /// A Cluster was expected.
    #[error("Redis at {address} is not part of a cluster: write redis:// in the URL")]
    NoCluster {
        /// Who said so.
        address: String,
    },
    /// The roots to trust cannot be read.
    #[error("{path} holds no certificates that can be read: look at ca= in the URL", path = path.display())]
    Ca {
        /// The file.
        path: PathBuf,
        /// What happened.
        #[source]
        source: std::sync::Arc<io::Error>,
    },
    /// Anything else.
    #[error(
        "Redis refuses a command or gives an answer that makes no sense ({code}): look whether its version is supported and at its log"
    )]
    Other {
        /// Redis's code, or what the client calls it.
        code: String,
    },
}

impl LinkError {
    /// What `error` of the server at `address` means.
    pub(super) fn of(error: RedisError, address: &str) -> Self {
        match error.kind() {
            ErrorKind::Io | ErrorKind::ClusterConnectionNotFound => {
                Self::Unreachable { address: address.to_owned(), source: error }
            }
            ErrorKind::AuthenticationFailed => Self::Auth { code: "AUTH".to_owned() },
            ErrorKind::Server(_) | ErrorKind::Extension => {
                Self::of_code(error.code().unwrap_or_default(), address)
            }
            ErrorKind::Parse | ErrorKind::UnexpectedReturnType => {
                Self::Other { code: "type of the answer".to_owned() }
            }
            ErrorKind::InvalidClientConfig => Self::Other { code: "settings".to_owned() },
            _ => Self::Other { code: "client".to_owned() },
        }
    }

    pub(super) fn timed_out(address: &str) -> Self {
        let source = io::Error::from(io::ErrorKind::TimedOut).into();
        Self::Unreachable { address: address.to_owned(), source }
    }

    fn of_code(code: &str, address: &str) -> Self {
        // Scripts and modules answer with whatever words they like; a code is one in capitals.
        let is_code = !code.is_empty() && code.len() <= 32 && code.bytes().all(|b| b.is_ascii_uppercase());
        let code = if is_code { code } else { "ERR" };
        let address = || address.to_owned();
        match code {
            "READONLY" | "MASTERDOWN" | "UNBLOCKED" => Self::NotMaster { address: address() },
            "LOADING" => Self::Loading,
            "OOM" => Self::OutOfMemory,
            "MISCONF" => Self::Persistence,
            "NOREPLICAS" => Self::NoReplicas,
            "NOAUTH" | "WRONGPASS" | "NOPERM" | "DENIED" => Self::Auth { code: code.to_owned() },
            "WRONGTYPE" => Self::WrongType,
            "CLUSTERDOWN" | "TRYAGAIN" => Self::ClusterDown { code: code.to_owned() },
            "MOVED" | "ASK" => Self::IsCluster { address: address() },
            code => Self::Other { code: code.to_owned() },
        }
    }

    /// The name of what Redis says and nothing here explains.
    pub const UNEXPLAINED: &str = "other";
    /// The names of all.
    pub const LABELS: [&str; 14] = [
        "unreachable",
        "unknown_master",
        "not_master",
        "loading",
        "out_of_memory",
        "persistence",
        "no_replicas",
        "auth",
        "wrong_type",
        "cluster_down",
        "is_cluster",
        "no_cluster",
        "ca",
        Self::UNEXPLAINED,
    ];

    /// Its name in metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::UnknownMaster { .. } => "unknown_master",
            Self::NotMaster { .. } => "not_master",
            Self::Loading => "loading",
            Self::OutOfMemory => "out_of_memory",
            Self::Persistence => "persistence",
            Self::NoReplicas => "no_replicas",
            Self::Auth { .. } => "auth",
            Self::WrongType => "wrong_type",
            Self::ClusterDown { .. } => "cluster_down",
            Self::IsCluster { .. } => "is_cluster",
            Self::NoCluster { .. } => "no_cluster",
            Self::Ca { .. } => "ca",
            Self::Other { .. } => Self::UNEXPLAINED,
        }
    }

    /// Whether the link may no longer lead to a healthy master, so that only a new one can be trusted. Of a
    /// master that loads, too: one that we were connected to has become a replica.
    pub const fn must_reconnect(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::UnknownMaster { .. }
            | Self::NotMaster { .. }
            | Self::Loading
            | Self::Auth { .. }
            | Self::ClusterDown { .. }
            | Self::IsCluster { .. }
            | Self::NoCluster { .. }
            | Self::Ca { .. } => true,
            Self::OutOfMemory
            | Self::Persistence
            | Self::NoReplicas
            | Self::WrongType
            | Self::Other { .. } => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_told_apart_and_what_else_the_server_said_is_not_repeated() {
        for (line, label, must_reconnect) in [
            ("-READONLY You can't write against a read only replica.", "not_master", true),
            ("-MASTERDOWN Link with MASTER is down", "not_master", true),
            ("-UNBLOCKED force unblock from blocking operation", "not_master", true),
            ("-LOADING Redis is loading the dataset in memory", "loading", true),
            ("-OOM command not allowed", "out_of_memory", false),
            ("-MISCONF Redis is configured to save", "persistence", false),
            ("-NOREPLICAS Not enough good replicas to write.", "no_replicas", false),
            ("-NOAUTH Authentication required.", "auth", true),
            ("-WRONGPASS invalid username-password pair", "auth", true),
            ("-NOPERM this user has no permissions", "auth", true),
            ("-WRONGTYPE Operation against a key", "wrong_type", false),
            ("-CLUSTERDOWN Hash slot not served", "cluster_down", true),
            ("-MOVED 1 127.0.0.1:1", "is_cluster", true),
            ("-ERR unknown command 'AUTHE', with args beginning with: 'hunter2'", "other", false),
            ("-hunter2 says a script", "other", false),
        ] {
            let value = redis::parse_redis_value(format!("{line}\r\n").as_bytes()).unwrap();
            let error = LinkError::of(value.extract_error().unwrap_err(), "h:1");
            assert_eq!((error.label(), error.must_reconnect()), (label, must_reconnect), "{line}");
            assert!(LinkError::LABELS.contains(&label), "{label} has a series from the start");
            let said = format!("{error} {error:?}");
            assert!(!said.contains("hunter2") && !said.contains("slot "), "{said}");
        }
    }

    #[test]
    fn an_answer_of_another_type_is_not_repeated() {
        let wrong =
            redis::from_redis_value::<u64>(redis::Value::BulkString(b"hunter2".to_vec())).unwrap_err();
        let error = LinkError::of(wrong.into(), "h:1");
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error:?}");
    }
}
