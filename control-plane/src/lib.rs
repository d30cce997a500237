//! Keygate's control plane: issues keys, owns every rule, and pushes state to every proxy.
//!
//! A request to change something goes from [`http::api`] to the one [`durability::writer`], which has it in the [`durability::journal`]
//! before it publishes a new [`model::state`]; [`http::sync`] carries that to the proxies, [`observe::fleet`] knows how far it has
//! got. Reading goes by the published state and the [`durability::store`]. What a key may is decided by `keygate-core`.

pub mod app;
pub mod config;
pub mod durability;
pub mod http;
pub mod model;
pub mod node;
pub mod observe;
pub mod peers;
pub mod platform;
pub mod redis_store;
pub mod secrets;
pub mod services;
