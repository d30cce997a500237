//! What Keygate decides, and nothing else.
//!
//! Everything that can be wrong about a key lives here: reading a token strictly, verifying it,
//! looking it up among the revoked, matching it with a route, and the bytes that carry all that from
//! the control plane to a proxy. The crate has no clock, no randomness, no I/O and no host: time is an
//! argument, effects are returned as data. So the same code answers in Envoy, in the control plane's
//! `/api/auth/validate`, in a dry run and in a test, and the four cannot disagree.
//!
//! Start with [`decide::decide()`].

// A panic in the filter is a trap, and a trap is an outage of that worker.
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::arithmetic_side_effects,
        clippy::disallowed_methods
    )
)]
#![deny(missing_docs, rustdoc::broken_intra_doc_links)]

pub mod bytes;
pub mod decide;
pub mod quota;
pub mod revocation;
pub mod secret;
pub mod shm;
pub mod sync;
pub mod telemetry;
pub mod token;
pub mod version;
pub mod worker;
