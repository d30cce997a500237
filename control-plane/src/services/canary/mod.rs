//! Runs canary tests through the proxies.

mod caller;
pub mod runner;

pub use self::caller::Caller;
