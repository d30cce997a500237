//! Names of `KEYGATE_*` variables: which are read, which were meant, and which are foreign.

use super::settings::{RENAMED, SETTINGS, variable};

/// Secrets that are given by variables.
const SECRETS: [&str; 7] = [
    "KEYGATE_FLEET_TOKEN",
    "KEYGATE_HSM_PIN",
    "KEYGATE_MASTER_KEY",
    "KEYGATE_NOTIFY_PAGERDUTY_KEY",
    "KEYGATE_NOTIFY_SLACK_URL",
    "KEYGATE_NOTIFY_WEBHOOK_SECRET",
    "KEYGATE_PREVIOUS_MASTER_KEY",
];
/// Variables of commands, of the filter, and of the scripts of this repository.
const OTHERS: [&str; 29] = [
    "KEYGATE_ADMIN_KEY",
    "KEYGATE_API_PORT",
    "KEYGATE_BIN",
    "KEYGATE_CACHE",
    "KEYGATE_CONFIG",
    "KEYGATE_DEMO_PORT",
    "KEYGATE_DEMO_V1_PORT",
    "KEYGATE_E2E_FILTER",
    "KEYGATE_EMPTY_WASM",
    "KEYGATE_ENVOY",
    "KEYGATE_ENVOY_ADMIN_PORT",
    "KEYGATE_ENVOY_PORT",
    "KEYGATE_FILTER",
    "KEYGATE_KEY",
    "KEYGATE_LOG",
    "KEYGATE_MODULE",
    "KEYGATE_PROXY_CLUSTER",
    "KEYGATE_PROXY_ID",
    "KEYGATE_REQUESTS",
    "KEYGATE_ROUNDS",
    "KEYGATE_SECRET",
    "KEYGATE_SEED",
    "KEYGATE_SYNC_PORT",
    "KEYGATE_TEST_TIER",
    "KEYGATE_TRAP_MODULE",
    "KEYGATE_TRAP_WASM",
    "KEYGATE_URL",
    "KEYGATE_WASM",
    "KEYGATE_WORKERS",
];
/// So many letters that are wrong, missing, too many or swapped make a name a misspelt one; of a short name, one less.
const MAX_DISTANCE: usize = 2;
/// A name that is shorter than this behind `KEYGATE_` is short.
const SHORT: usize = 8;

/// A variable whose name begins with `KEYGATE_`.
#[derive(Debug, PartialEq, Eq)]
pub enum Variable {
    /// It is read by something of Keygate, or Kubernetes injects it.
    Known,
    /// This one was meant.
    Misspelt(String),
    /// Nothing reads it.
    Unknown,
}

/// Says what a variable is.
pub fn judge(name: &str) -> Variable {
    let settings = SETTINGS.iter().map(|setting| setting.variable());
    let read: Vec<String> = settings.chain(SECRETS.map(ToOwned::to_owned)).collect();
    let is_former = RENAMED.iter().any(|(former, _)| variable(former) == name);
    let is_read = read.iter().any(|known| known == name);
    if is_read || is_former || OTHERS.contains(&name) || is_of_kubernetes(name) {
        return Variable::Known;
    }
    let nearest = read.into_iter().map(|known| (strsim::damerau_levenshtein(&known, name), known)).min();
    let is_short = name.trim_start_matches("KEYGATE_").len() < SHORT;
    match nearest {
        Some((distance, known)) if distance <= MAX_DISTANCE - usize::from(is_short) => {
            Variable::Misspelt(known)
        }
        _ => Variable::Unknown,
    }
}

/// Whether Kubernetes injects it, for a Service whose name begins with `keygate`: `…_SERVICE_HOST`, `…_SERVICE_PORT`,
/// `…_PORT`, `…_PORT_8000_TCP` and its parts.
fn is_of_kubernetes(name: &str) -> bool {
    let of_port = name.split_once("_PORT").is_some_and(|(_, rest)| {
        let mut parts = rest.split('_').skip(1);
        let number = parts.next();
        let protocol = parts.next();
        rest.is_empty()
            || number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()))
                && protocol.is_some_and(|protocol| ["TCP", "UDP", "SCTP"].contains(&protocol))
    });
    name.ends_with("_SERVICE_HOST") || name.contains("_SERVICE_PORT") || of_port
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_variable_is_known_or_misspelt_or_foreign() {
        for known in [
            "KEYGATE_FLEET_MAX_STALENESS",
            "KEYGATE_FLEET_HARD_AGE", // Its former name, which is refused with the new one.
            "KEYGATE_ADMIN_KEY",
            "KEYGATE_SERVICE_HOST",
            "KEYGATE_SYNC_SERVICE_PORT_SYNC",
            "KEYGATE_PORT",
            "KEYGATE_PORT_8000_TCP",
            "KEYGATE_SYNC_PORT_8001_TCP_ADDR",
        ] {
            assert_eq!(judge(known), Variable::Known, "{known}");
        }
        for (misspelt, meant) in [
            ("KEYGATE_FLEET_MAXSTALENESS", "KEYGATE_FLEET_MAX_STALENESS"),
            ("KEYGATE_LISTNE", "KEYGATE_LISTEN"),
            ("KEYGATE_DATADIR", "KEYGATE_DATA_DIR"),
            ("KEYGATE_FLEET_TOKNE", "KEYGATE_FLEET_TOKEN"),
        ] {
            assert_eq!(judge(misspelt), Variable::Misspelt(meant.into()), "{misspelt}");
        }
        for unknown in ["KEYGATE_DASHBOARD_COLOUR", "KEYGATE_DIR", "KEYGATE_ROOT"] {
            assert_eq!(judge(unknown), Variable::Unknown, "{unknown}");
        }
    }
}
