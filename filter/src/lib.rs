//! The Envoy filter. It decides nothing: it carries requests to [`keygate_core::decision`], state from
//! the control plane to [`keygate_core::sync`], and the answers back.
//!
//! One VM per worker and one of the main thread run this. `request` is what a worker does with a request,
//! `leader` is what one of the VMs does for all, `host` is the only module that touches the proxy.

// A panic traps, and a trap is 503 for every request of that worker until the VM is made anew.
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::unreachable,
    clippy::indexing_slicing,
    clippy::string_slice,
    clippy::arithmetic_side_effects,
    clippy::disallowed_methods
)]

mod es256;
mod host;
mod leader;
mod metrics;
mod plugin;
mod reporter;
mod request;
mod till;
#[cfg(feature = "trap")]
mod trap;

use keygate_core::telemetry::Trouble;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};

use crate::plugin::Plugin;

/// The filter's version, as proxies report it.
const VERSION: &str = env!("CARGO_PKG_VERSION");

// The macro defines the module's exported start function.
#[allow(unsafe_code)]
mod start {
    use super::Root;

    proxy_wasm::main! {{
        proxy_wasm::set_root_context(|_| Box::new(Root::default()));
    }}
}

/// The plugin's root context: ticks, calls, configuration.
#[derive(Default)]
struct Root {
    plugin: Option<plugin::Shared>,
}

/// The VM ends in peace, as when its configuration is replaced. Not by `on_done`, which the proxy would call for every
/// request too.
impl Drop for Root {
    fn drop(&mut self) {
        if let Some(plugin) = &self.plugin
            && let Ok(mut plugin) = plugin.try_borrow_mut()
        {
            plugin.on_end();
        }
    }
}

impl Context for Root {
    fn on_http_call_response(&mut self, token: u32, headers: usize, body_bytes: usize, _trailers: usize) {
        if let Some(plugin) = &self.plugin
            && let Ok(mut plugin) = plugin.try_borrow_mut()
        {
            // Without headers the call failed, and asking for any would trap.
            let answer = (headers > 0).then(|| host::call_answer(body_bytes));
            plugin.on_answer(token, answer);
        }
    }
}

impl RootContext for Root {
    fn on_configure(&mut self, _bytes: usize) -> bool {
        match Plugin::start() {
            Ok(plugin) => {
                self.plugin = Some(plugin.shared());
                true
            }
            Err(problem) => {
                // Envoy keeps the configuration it had, or does not start with this one.
                host::error(&format!("configuration refused: {problem}"));
                false
            }
        }
    }

    fn on_tick(&mut self) {
        if let Some(plugin) = &self.plugin
            && let Ok(mut plugin) = plugin.try_borrow_mut()
        {
            plugin.on_tick();
        }
    }

    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Http { plugin: self.plugin.clone(), awaited: None }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// One request.
struct Http {
    plugin: Option<plugin::Shared>,
    awaited: Option<request::Awaited>,
}

impl Context for Http {}

impl HttpContext for Http {
    fn on_http_request_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        let outcome = match self.plugin.as_ref().map(|plugin| plugin.try_borrow_mut()) {
            Some(Ok(mut plugin)) => plugin.on_request(),
            // Not configured, or called from within itself: nothing passes that was not decided on.
            _ => request::Outcome::unavailable(),
        };
        let (action, awaited) = request::carry_out(outcome);
        self.awaited = awaited;
        action
    }

    fn on_http_response_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        let Some(awaited) = self.awaited.take() else { return Action::Continue };
        if let Some(left) = awaited.left {
            host::add_response_headers(&request::limit_headers(left));
        }
        // Only while a rollout is under way: what it costs is not for everybody to pay.
        if let Some(counted) = awaited.counted
            && let Some(trouble) = host::response_status().and_then(Trouble::of)
            && let Some(Ok(mut plugin)) = self.plugin.as_ref().map(|plugin| plugin.try_borrow_mut())
        {
            plugin.tally.answered(&counted, trouble);
        }
        Action::Continue
    }
}
