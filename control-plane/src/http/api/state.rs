//! The state of the HTTP handlers: the node, and the services that they call.

use std::ops::Deref;
use std::sync::{Arc, Mutex};

use keygate_core::decide::cache::TokenCache;

use crate::http::api::in_flight::InFlight;
use crate::http::sync;
use crate::node::Node;
use crate::redis_store::RedisPeers;
use crate::services::canary::runner::Canary;
use crate::services::quota::Quotas;
use crate::services::recovery::Recovery;
use crate::services::rotation::Driver;

/// A control plane with its services, as its API and its sync port use it.
pub struct ApiState {
    /// The parts that the services share.
    pub node: Arc<Node>,
    /// Snapshots that proxies are fetching.
    pub snapshots: sync::Snapshots,
    /// The copy in Redis, if there is one.
    pub redis: Option<Arc<RedisPeers>>,
    /// The rate limits of the fleet.
    pub quotas: Arc<Quotas>,
    /// Requests that are not answered yet, by their keys.
    pub in_flight: Arc<InFlight>,
    /// Tokens of callers that were verified before.
    pub cache: Mutex<TokenCache>,
    /// Tests through the proxies.
    pub canary: Arc<Canary>,
    /// Progress of a rotation of secrets.
    pub driver: Arc<Driver>,
    /// The state that a proxy returns after a loss.
    pub recovery: Arc<Recovery>,
}

impl Deref for ApiState {
    type Target = Node;

    fn deref(&self) -> &Node {
        &self.node
    }
}
