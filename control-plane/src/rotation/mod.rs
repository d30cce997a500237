//! Rotation of signing secrets by itself: the schedule, and the driver that makes the steps of
//! [`commands::rotation`](crate::model::commands::rotation) when they are due.

pub mod driver;
pub mod schedule;

pub use self::driver::{Driver, Progress};
pub use self::schedule::Schedule;
