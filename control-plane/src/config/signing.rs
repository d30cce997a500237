//! Settings of signing secrets.

use keygate_core::token::crypto::Algorithm;

use super::raw::RawConfig;
use super::value::{algorithm, flag, overlap, propagation_timeout, retire, schedule};
use crate::model::SigningKeyPolicy;

pub(super) fn read(raw: &mut RawConfig) -> SigningKeyPolicy {
    let algorithm = raw.get("secrets.algorithm", algorithm);
    let in_hsm = raw.get("hsm.signing", flag);
    if in_hsm && algorithm != Algorithm::ES256 {
        raw.errors.push(format!("hsm.signing: the HSM signs with ES256 only, not {}", algorithm.name()));
    }
    SigningKeyPolicy {
        algorithm,
        overlap: raw.get("secrets.overlap", overlap),
        retire: raw.take("secrets.retire", retire),
        schedule: raw.get("secrets.schedule", schedule),
        propagation_timeout: raw.get("secrets.propagation_timeout", propagation_timeout),
        in_hsm,
    }
}
