//! The filter in WebAssembly: what proxy-wasm calls, with a VM for each worker and one for the main thread.

use std::cell::RefCell;
use std::rc::Rc;

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};

use crate::host;
use crate::plugin::Plugin;
use crate::request::{self, Outcome, Then};
use crate::response::{self, Awaited};

/// One VM's state, for its root context and the requests of its worker.
type Shared = Rc<RefCell<Plugin>>;

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
    plugin: Option<Shared>,
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
                self.plugin = Some(Rc::new(RefCell::new(plugin)));
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
    plugin: Option<Shared>,
    awaited: Option<Awaited>,
}

impl Context for Http {}

impl HttpContext for Http {
    fn on_http_request_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        let outcome = match self.plugin.as_ref().map(|plugin| plugin.try_borrow_mut()) {
            // A request that is paused would hang for ever when its VM traps, so none waits.
            Some(Ok(mut plugin)) => plugin.on_request(false, || false),
            // Not configured, or called from within itself: nothing passes that was not decided on.
            _ => None,
        };
        match request::carry_out(outcome.unwrap_or_else(Outcome::unavailable)) {
            Then::Continue(awaited) => {
                self.awaited = awaited;
                Action::Continue
            }
            // The only pause: the answer is given.
            Then::Answered => Action::Pause,
        }
    }

    fn on_http_response_headers(&mut self, _headers: usize, _end_of_stream: bool) -> Action {
        let answered = self.awaited.take().and_then(response::on_response);
        if let Some((counted, trouble)) = answered
            && let Some(Ok(mut plugin)) = self.plugin.as_ref().map(|plugin| plugin.try_borrow_mut())
        {
            plugin.tally.answered(&counted, trouble);
        }
        Action::Continue
    }
}
