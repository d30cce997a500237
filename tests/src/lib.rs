//! The harness of the end-to-end tests: a whole Keygate with a real Envoy for one test alone.
//!
//! Start with [`Stack`]. Every test owns its ports, its directory and its processes, so tests run side
//! by side; when a test ends, by whatever way, its processes end with it.

pub mod api;
pub mod binaries;
pub mod burst;
pub mod clock;
pub mod control_plane;
pub mod durability;
pub mod envoy;
pub mod fake_sync;
pub mod figures;
pub mod forge;
pub mod http;
pub mod line;
pub mod load;
pub mod metrics;
pub mod middleman;
pub mod overload;
pub mod ports;
pub mod process;
pub mod prometheus;
pub mod receiver;
pub mod redis;
pub mod stack;
pub mod tier;
pub mod trace;
pub mod upstream;
pub mod wait;

pub use api::{Api, Key};
pub use envoy::Envoy;
pub use figures::Times;
pub use http::{Connection, Request, Response};
pub use line::Line;
pub use load::Load;
pub use middleman::Middleman;
pub use prometheus::Prometheus;
pub use receiver::{Posted, Receiver};
pub use redis::{Cluster, Redis, Sentinels};
pub use stack::Stack;
pub use wait::{wait_for, wait_until};

use std::time::Duration;

/// For what happens at once on an idle machine; long enough for a busy one.
pub const SOON: Duration = Duration::from_secs(20);
