//! The data that each worker of a proxy has for itself: its copy of the state, its clock, its list of waiting requests.

pub mod replica;
pub mod waiting;
pub mod wall_clock;
