//! Keygate's control plane: issues keys, owns every rule, and pushes state to every proxy.
//!
//! A request to change something goes from [`api`] to the one [`writer`], which has it in the [`journal`]
//! before it publishes a new [`state`]; [`sync`] carries that to the proxies, [`fleet`] knows how far it has
//! got. Reading goes by the published state and the [`store`]. What a key may is decided by `keygate-core`.

pub mod api;
pub mod app;
pub mod approval;
pub mod backup;
pub mod canary;
pub mod change;
pub mod clock;
pub mod config;
pub mod expiry;
pub mod files;
pub mod fleet;
pub mod hlc;
pub mod hsm;
pub mod http_client;
pub mod issuing;
pub mod journal;
pub mod key;
pub mod keyring;
pub mod limits;
pub mod lockdown;
pub mod master_key;
pub mod metrics;
pub mod model;
pub mod node;
pub mod notify;
pub mod peers;
pub mod problem;
pub mod quota;
pub mod random;
pub mod redis_store;
pub mod registrations;
pub mod roles;
pub mod rollout;
pub mod root_key;
pub mod rotation;
pub mod route_cost;
pub mod seal;
pub mod secret;
pub mod state;
pub mod store;
pub mod sync;
pub mod telemetry;
pub mod trace;
pub mod upkeep;
pub mod writer;
