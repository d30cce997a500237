//! The policy of signing secrets.

use std::time::Duration;

use keygate_core::token::crypto::Algorithm;

use crate::model::schedule::Schedule;
use crate::secrets::record::Retire;

/// The policy of signing secrets: how they are made, rotated and ended.
#[derive(Debug, Clone)]
pub struct SigningKeyPolicy {
    /// Algorithm of new secrets.
    pub algorithm: Algorithm,
    /// Time for which a secret that no longer signs still verifies, with [`Retire::AfterOverlap`].
    pub overlap: Duration,
    /// The end of secrets, if it is not the usual one of their algorithm.
    pub retire: Option<Retire>,
    /// Schedule of automatic rotations; `None`: there are none.
    pub schedule: Option<Schedule>,
    /// Time within which proxies must know a new secret; after that, an alert is sent.
    pub propagation_timeout: Duration,
    /// Whether the HSM makes and keeps new secrets.
    pub in_hsm: bool,
}

impl SigningKeyPolicy {
    /// The end of secrets of an algorithm.
    pub fn retire(&self, alg: Algorithm) -> Retire {
        self.retire.unwrap_or_else(|| Retire::usual(alg))
    }

    /// End of verification of a secret that stops signing at `now`, Unix seconds; `None`: with its last key.
    pub fn end(&self, retire: Retire, now: u64) -> Option<u64> {
        match retire {
            Retire::AfterOverlap => Some(now.saturating_add(self.overlap.as_secs())),
            Retire::WithLastKey => None,
        }
    }
}
