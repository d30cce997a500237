//! The proxy, as far as the filter needs it: the same functions for whichever side of the border it runs on. The only
//! module that calls the host.

#[cfg(not(target_family = "wasm"))]
mod module;
#[cfg(target_family = "wasm")]
mod raw;
#[cfg(target_family = "wasm")]
mod wasm;

#[cfg(not(target_family = "wasm"))]
pub use module::*;
#[cfg(target_family = "wasm")]
pub use wasm::*;

/// What the filter says of a request to access logs, as filter state.
#[derive(Debug, Clone, Copy)]
pub enum Entry {
    /// `wasm.keygate.key_id`: whose key.
    KeyId,
    /// `wasm.keygate.outcome`: what became of it, and why.
    Outcome,
    /// `wasm.keygate.shadowed`: whether it passes although it was refused.
    Shadowed,
}

/// What the proxy answered to a call.
pub struct Answer {
    /// The HTTP status; 0 when it had none.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}
