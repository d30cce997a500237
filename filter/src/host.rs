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

/// What the proxy answered to a call.
pub struct Answer {
    /// The HTTP status; 0 when it had none.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}
