//! A filter that does nothing: what a proxy-wasm filter costs a request before it does anything. The benchmark
//! `filter` compares with it; `scripts/build empty-filter` builds it.
#![cfg(target_family = "wasm")]

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::ContextType;

// The macro defines the module's exported start function.
#[allow(unsafe_code)]
mod start {
    use super::Root;

    proxy_wasm::main! {{
        proxy_wasm::set_root_context(|_| Box::new(Root));
    }}
}

struct Root;

impl Context for Root {}

impl RootContext for Root {
    fn create_http_context(&self, _id: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Http))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// One request, to which nothing happens.
struct Http;

impl Context for Http {}

impl HttpContext for Http {}
