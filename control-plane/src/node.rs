//! The parts of a control plane that its services and its API share: configuration, time, the history and the outputs.
//! Services own what is theirs alone, and nothing here knows them.

use std::sync::{Arc, Mutex};

use keygate_core::secret::Secret;
use tokio::sync::watch;

use crate::config::Config;
use crate::durability::journal::{Notary, Privacy};
use crate::durability::store::Store;
use crate::durability::writer::{Feed, Writer};
use crate::model::state::{Deltas, State};
use crate::observe::fleet::Fleet;
use crate::observe::metrics::Metrics;
use crate::observe::notify::Notifier;
use crate::observe::telemetry::Telemetry;
use crate::peers::Peers;
use crate::platform::clock::{CautiousClock, Clock};
use crate::secrets::keyring::Keyring;

/// A control plane without its services.
pub struct Node {
    /// The configuration.
    pub config: Config,
    /// Time.
    pub clock: Clock,
    /// The time by which expired keys are forgotten.
    pub cautious_clock: Mutex<CautiousClock>,
    /// Takes changes.
    pub writer: Writer,
    /// The state, as it changes.
    pub states: watch::Receiver<Arc<State>>,
    /// The latest changes.
    pub deltas: Arc<Deltas>,
    /// Records of keys and revocations.
    pub store: Arc<Store>,
    /// The latest entries of the journal.
    pub feed: Arc<Feed>,
    /// The proxies.
    pub fleet: Arc<Fleet>,
    /// The other control planes.
    pub peers: Arc<dyn Peers>,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Address at which other control planes reach the sync port.
    pub sync_url: String,
    /// Counts that proxies report.
    pub telemetry: Arc<Telemetry>,
    /// Signs the rest of old segments of the journal, as its checkpoints are signed.
    pub notary: Notary,
    /// Opens secrets.
    pub keys: Arc<Keyring>,
    /// Sends notifications.
    pub notifier: Arc<Notifier>,
    /// Start of this process, Unix seconds.
    pub started_s: u64,
    /// Hashes owners as the journal has them.
    pub privacy: Arc<Privacy>,
    /// The token that proxies present.
    pub fleet_token: Secret<String>,
    /// Turns true when the control plane is to stop.
    pub stopping: watch::Receiver<bool>,
}

impl Node {
    /// The state now.
    pub fn state(&self) -> Arc<State> {
        Arc::clone(&self.states.borrow())
    }

    /// Whether this control plane does the scheduled work that only one of several does.
    pub fn leads(&self) -> bool {
        self.peers.leads(&self.state())
    }
}
