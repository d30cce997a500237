//! End-to-end tests with a real Envoy. One program, so that it links once.

mod agreement;
mod algorithms;
mod api;
mod audit;
mod cli;
mod config;
mod disk;
mod durability;
mod emergency;
mod fleet;
mod flood;
mod fsync;
mod hostile;
mod outage;
mod recovery;
mod redis_edits;
mod redis_link;
mod redis_loss;
mod requests;
mod revocation;
mod secrets;
mod split;
mod startup;
mod trap;
mod upkeep;
mod wasm_imports;
