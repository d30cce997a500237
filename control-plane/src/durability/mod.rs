//! Durability: the journal and what is derived from it, and the one writer of both.

pub mod backup;
pub mod journal;
pub mod store;
pub mod writer;
