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

impl Entry {
    /// Its name in log formats: the one that it has from WebAssembly, so that a format does for both.
    const fn name(self) -> &'static str {
        match self {
            Self::KeyId => "wasm.keygate.key_id",
            Self::Outcome => "wasm.keygate.outcome",
            Self::Shadowed => "wasm.keygate.shadowed",
        }
    }
}

/// What the proxy answered to a call.
pub struct Answer {
    /// The HTTP status; 0 when it had none.
    pub status: u16,
    /// The body.
    pub body: Vec<u8>,
}

/// A header `:status`, read.
fn status(value: &[u8]) -> Option<u16> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// An address as the proxy writes it, without its port.
fn without_port(address: &str) -> &str {
    address.rsplit_once(':').map_or(address, |(host, _port)| host)
}

/// The headers of a JSON document that is posted to a cluster.
fn headers_to<'h>(cluster: &'h str, path: &'h str, bearer: Option<&'h str>) -> Vec<(&'h str, &'h str)> {
    let mut headers = vec![
        (":method", "POST"),
        (":path", path),
        (":authority", cluster),
        ("content-type", "application/json"),
    ];
    headers.extend(bearer.map(|bearer| ("authorization", bearer)));
    headers
}
