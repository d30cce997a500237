//! The Envoy filter. It decides nothing: it carries requests to [`keygate_core::decide`], state from
//! the control plane to [`keygate_core::sync`], and the answers back.
//!
//! It runs in WebAssembly (`wasm`), with a VM for each worker and one for the main thread, or as a dynamic module
//! of Envoy's (`module`), with a [`plugin::Plugin`] for each just so. All else is the same for both: `request` is
//! what a worker does with a request, `leader` is what one of the plugins does for all, `host` is the only
//! module that touches the proxy.

// A panic traps, and a trap is 503 for every request of that worker until the VM is made anew.
#![deny(clippy::disallowed_methods)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::indexing_slicing,
        clippy::string_slice,
        clippy::arithmetic_side_effects
    )
)]

#[cfg(all(not(target_family = "wasm"), panic = "abort"))]
compile_error!("the module catches panics: build it with profile `module` (scripts/build module)");

mod config;
mod es256;
mod host;
mod leader;
mod metrics;
#[cfg(not(target_family = "wasm"))]
mod module;
mod plugin;
mod readiness;
mod reporter;
mod request;
mod response;
mod till;
#[cfg(feature = "trap")]
mod trap;
#[cfg(target_family = "wasm")]
mod wasm;

/// The filter's version, as proxies report it.
#[cfg(target_family = "wasm")]
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The same, of the dynamic module.
#[cfg(not(target_family = "wasm"))]
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "+module");
