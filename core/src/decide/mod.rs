//! The decision on a request, and the documents that it goes by: policy, rules, rollout, limits, cut-offs.
//!
//! Start with [`decide()`].

pub mod cache;
pub mod client;
pub mod cutoff;
mod decision;
mod ended;
pub mod forward;
pub mod header_map;
pub mod limits;
pub mod policy;
mod reason;
pub mod refusal;
pub mod rollout;
pub mod rules;

pub use self::decision::{Decision, Judge, Request, State, Trace, Verdict, decide, decide_on_route};
pub use self::ended::ended;
pub use self::reason::{Reason, Validation};
