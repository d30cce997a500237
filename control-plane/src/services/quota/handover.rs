//! The ledger in Redis, for the control plane that takes over: whole when its owner ends in order, and as of a few seconds
//! ago otherwise.

use keygate_core::quota::Saved;
use serde::{Deserialize, Serialize};

use super::service::{LedgerService, moved, now_ns, unix_ms};
use crate::peers::Peers;

const KEY: &str = "keygate:limits:ledger";
/// Longer than a window would serve nothing; a ledger that is older helps little.
const TTL_S: u64 = 3_600;
/// A larger ledger is not written: proxies tell what they have, and spends of those that are gone are not known then.
const MAX_BYTES: usize = 4 * 1024 * 1024;

/// A ledger that was handed over.
#[derive(Debug)]
pub struct HandedOver {
    /// The stamp of the change by which its owner kept it.
    pub since: u64,
    /// Nothing was granted since then.
    pub whole: bool,
    /// The ledger, by this control plane's clock.
    pub saved: Saved,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: u32,
    since: u64,
    whole: bool,
    /// The monotonic clock, and Unix milliseconds.
    clocks: (u64, u64),
    saved: Saved,
}

/// Leaves the ledger for the next owner; whether it is there.
pub async fn write(peers: &dyn Peers, service: &LedgerService, whole: bool) -> bool {
    let clocks = (now_ns(), unix_ms());
    let document = Document { format: 1, since: service.since(), whole, clocks, saved: service.saved() };
    let Ok(bytes) = serde_json::to_vec(&document) else { return false };
    bytes.len() <= MAX_BYTES && peers.put(KEY, &bytes, TTL_S).await
}

/// The ledger that the last owner left.
pub async fn read(peers: &dyn Peers) -> Option<HandedOver> {
    let bytes = peers.get(KEY).await?;
    let document: Document = match serde_json::from_slice(&bytes) {
        Ok(document) => document,
        Err(error) => {
            tracing::error!(%error, key = KEY, "the ledger of limits in Redis cannot be read; proxies tell what they have");
            return None;
        }
    };
    let Document { format: 1, since, whole, clocks, saved } = document else { return None };
    Some(HandedOver { since, whole, saved: moved(saved, clocks, (now_ns(), unix_ms())) })
}
