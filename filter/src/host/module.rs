//! The proxy as a dynamic module sees it: by function calls, in Envoy's own memory.
//!
//! Whoever calls into the filter says first for which configuration and which request ([`enter`]), as the functions here
//! are the same as those for WebAssembly, where the proxy knows by itself.

mod abi;
mod here;
mod store;

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keygate_core::decide::header_map::HeaderMap;
use keygate_core::shm::{Conflict, SharedData};

pub use abi::{
    Buffer, Config, Header, Scheduler, Stream, Waker, bytes, concurrency, continue_decoding, worker_index,
};
use abi::{HeaderKind, Level, Metric};
use here::here;
pub use here::{Envoy, MAIN, enter, is_entered};

use super::{Answer, Entry, headers_to, status, without_port};

/// The number of a call to another service.
pub type CallId = u64;

/// What the plugins of a process share.
pub struct Shared;

impl SharedData for Shared {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        here(|envoy, _| envoy.store().get(key))?
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        here(|envoy, _| envoy.store().set(key, value, cas)).unwrap_or(Err(Conflict))
    }
}

/// The wall clock, Unix milliseconds.
pub fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(0)
}

/// The monotonic clock of the process, nanoseconds: the same for all its threads, and never 0.
pub fn monotonic_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let since = START.get_or_init(Instant::now).elapsed();
    // The end of time makes every state too old, so a clock that fails is answered with 503.
    u64::try_from(since.as_nanos()).map_or(u64::MAX, |ns| ns.saturating_add(1_000_000_000))
}

/// All headers of the request, in order, as they came.
pub fn request_headers() -> Option<HeaderMap> {
    of_stream(|stream| {
        abi::with_headers(stream, HeaderKind::Request, |headers| {
            HeaderMap::copied(headers.iter().map(|header| (header.name(), header.value())))
        })
    })??
}

/// Adds a header to the request, which has none of that name; whether that worked. Envoy gives modules no way to set an
/// empty one, so there is none then.
pub fn add_request_header(name: &str, value: &str) -> bool {
    value.is_empty()
        || of_stream(|stream| abi::add_header(stream, HeaderKind::Request, name, value)).unwrap_or(false)
}

/// Takes all headers of that name out of the request; whether that worked.
pub fn remove_request_header(name: &str) -> bool {
    of_stream(|stream| abi::remove_header(stream, HeaderKind::Request, name)).unwrap_or(false)
}

/// To be called once the request's headers were changed: a route may be matched by what was added.
pub fn request_headers_changed() {
    of_stream(abi::clear_route_cache);
}

/// The status of the response.
pub fn response_status() -> Option<u16> {
    of_stream(|stream| status(abi::header(stream, HeaderKind::Response, ":status")?.bytes()))?
}

/// Sets headers of the response, in place of what the upstream said of the same.
pub fn add_response_headers(headers: &[(&str, &str)]) {
    of_stream(|stream| {
        let is_ours = |there: &Header| headers.iter().any(|(name, _)| there.name() == name.as_bytes());
        let any = abi::with_headers(stream, HeaderKind::Response, |there| there.iter().any(is_ours));
        let put = if any == Some(false) { abi::add_header } else { abi::set_header };
        for (name, value) in headers {
            let _best_effort = put(stream, HeaderKind::Response, name, value);
        }
    });
}

/// The client's address, without its port.
pub fn client_address() -> Option<String> {
    let address = of_stream(abi::source_address)??;
    let address = std::str::from_utf8(address.bytes()).ok()?;
    Some(without_port(address).to_owned())
}

/// Answers the request here.
pub fn respond(status: u16, headers: Vec<(&str, &str)>, body: &[u8]) {
    of_stream(|stream| abi::send_response(stream, status, &headers, body));
}

/// Sets filter state of the request, which access logs can print.
pub fn set_filter_state(entry: Entry, value: &str) {
    let _best_effort = of_stream(|stream| abi::set_filter_state(stream, entry.name(), value));
}

/// Its id among the proxies, if it has one. Envoy does not tell modules, so it is taken from the environment variable
/// `KEYGATE_PROXY_ID`, or from Envoy's command line.
pub fn node_id() -> Option<String> {
    variable("KEYGATE_PROXY_ID").or_else(|| argument("--service-node"))
}

/// The cluster of proxies that it is one of: `KEYGATE_PROXY_CLUSTER`, or Envoy's command line.
pub fn node_cluster() -> Option<String> {
    variable("KEYGATE_PROXY_CLUSTER").or_else(|| argument("--service-cluster"))
}

/// Whether the plugin that is entered may lead: only the main thread's, so that what a leader does holds up no worker,
/// and calls are made on that thread.
pub fn may_lead() -> bool {
    here(|_, plugin| plugin == MAIN).unwrap_or(false)
}

/// A variable of the environment, if there is anything in it.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The value of an argument of this process.
fn argument(name: &str) -> Option<String> {
    let mut arguments = std::env::args_os().filter_map(|argument| argument.into_string().ok());
    while let Some(argument) = arguments.next() {
        let value = if argument == name {
            arguments.next()
        } else {
            argument.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')).map(str::to_owned)
        };
        if let Some(value) = value.filter(|value| !value.is_empty()) {
            return Some(value);
        }
    }
    None
}

/// The filter's configuration.
pub fn configuration() -> Vec<u8> {
    here(|envoy, _| envoy.configuration().to_vec()).unwrap_or_default()
}

/// How often the plugin that is entered shall tick, from now on.
pub fn set_tick_period(period: Duration) {
    here(|envoy, plugin| envoy.set_tick_period(plugin, period, monotonic_ns()));
}

/// Posts a JSON document to a cluster. `None` when the proxy has no such cluster, or nobody to ask in it.
pub fn post(
    cluster: &str,
    path: &str,
    token: Option<&str>,
    body: &[u8],
    timeout: Duration,
) -> Option<CallId> {
    if here::stream().is_some() {
        return None; // A worker's thread: Envoy takes calls on the main thread alone.
    }
    let bearer = token.map(|token| format!("Bearer {token}"));
    let headers = headers_to(cluster, path, bearer.as_deref());
    here(|envoy, plugin| {
        let call = abi::call(envoy.config(), cluster, &headers, body, timeout)?;
        envoy.asked(call, plugin);
        Some(call)
    })?
}

/// What an answer consists of, from within its callback.
pub fn call_answer(headers: &[Header], chunks: &[Buffer]) -> Answer {
    let found = headers.iter().find(|header| header.name() == b":status");
    let body = chunks.iter().map(Buffer::bytes).collect::<Vec<_>>().concat();
    Answer { status: found.and_then(|header| status(header.value())).unwrap_or(0), body }
}

/// Verifies an ES256 signature (r and s) by a public point.
pub fn verify_es256(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
    use ring::signature::{ECDSA_P256_SHA256_FIXED, UnparsedPublicKey};
    UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature).is_ok()
}

/// A counter of the proxy's.
#[derive(Debug, Clone, Copy)]
pub struct Counter(Option<usize>);

impl Counter {
    /// Defines it; counting where that failed does nothing.
    pub fn define(name: &str) -> Self {
        Self(define(Metric::Counter, name))
    }

    /// One more.
    pub fn increment(self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(self, number: u64) {
        if number > 0 {
            change(Metric::Counter, self.0, number);
        }
    }
}

/// A gauge of the proxy's, one for all plugins.
#[derive(Debug, Clone, Copy)]
pub struct Gauge(Option<usize>);

impl Gauge {
    /// Defines it; setting where that failed does nothing.
    pub fn define(name: &str) -> Self {
        Self(define(Metric::Gauge, name))
    }

    /// Sets it.
    pub fn set(self, value: u64) {
        change(Metric::Gauge, self.0, value);
    }
}

/// A histogram of the proxy's.
#[derive(Debug, Clone, Copy)]
pub struct Histogram(Option<usize>);

impl Histogram {
    /// Defines it; observing where that failed does nothing.
    pub fn define(name: &str) -> Self {
        Self(define(Metric::Histogram, name))
    }

    /// Adds an observation.
    pub fn observe(self, value: u64) {
        change(Metric::Histogram, self.0, value);
    }
}

fn define(metric: Metric, name: &str) -> Option<usize> {
    here(|envoy, _| envoy.metric(name, || abi::define_metric(envoy.config(), metric, name)))?
}

fn change(metric: Metric, id: Option<usize>, value: u64) {
    if let Some(id) = id {
        here(|envoy, _| abi::change_metric(envoy.config(), metric, id, value));
    }
}

/// The memory that this plugin has from the proxy: it has none of its own.
pub fn memory_bytes() -> u64 {
    0
}

/// Writes a line to the proxy's log.
pub fn info(message: &str) {
    abi::log(Level::Info, message);
}

/// Writes a warning to the proxy's log.
pub fn warn(message: &str) {
    abi::log(Level::Warn, message);
}

/// Writes an error to the proxy's log.
pub fn error(message: &str) {
    abi::log(Level::Error, message);
}

fn of_stream<R>(f: impl FnOnce(Stream) -> R) -> Option<R> {
    here::stream().map(f)
}
