//! Operating system, network, time and randomness: nothing else reads a clock or makes a random number.

pub mod clock;
pub mod files;
pub mod hlc;
pub mod http_client;
pub mod http_server;
pub mod random;
pub mod trace;
