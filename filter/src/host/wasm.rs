//! The proxy on the other side of WebAssembly's border, by proxy-wasm's ABI 0.2.1.
//!
//! Every value is taken as bytes: the SDK's text getters panic on a byte above 0x7f, which any client
//! can send.

use std::time::Duration;

use keygate_core::decide::header_map::HeaderMap;
use keygate_core::shm::{Conflict, SharedData};
use keygate_core::token::crypto::{ecdsa_der, p256_spki};
use proxy_wasm::hostcalls;
use proxy_wasm::types::{BufferType, LogLevel, MapType, MetricType};

use super::{Answer, Entry, headers_to, raw, status, without_port};

/// The number of a call to another service.
pub type CallId = u32;

/// Envoy's shared data.
pub struct Shared;

impl SharedData for Shared {
    fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
        match hostcalls::get_shared_data(key) {
            Ok((Some(value), Some(cas))) => Some((value, cas)),
            _ => None,
        }
    }

    fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), Conflict> {
        hostcalls::set_shared_data(key, Some(value), cas).map_err(|_| Conflict)
    }
}

/// The wall clock, Unix milliseconds.
pub fn unix_ms() -> u64 {
    hostcalls::get_current_time()
        .ok()
        .and_then(|now| now.duration_since(std::time::UNIX_EPOCH).ok())
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or(0)
}

/// The monotonic clock of the process, nanoseconds: the same for all its VMs.
pub fn monotonic_ns() -> u64 {
    // The end of time makes every state too old, so a clock that fails is answered with 503.
    raw::monotonic_ns().unwrap_or(u64::MAX)
}

/// All headers of the request, in order, as they came.
pub fn request_headers() -> Option<HeaderMap> {
    raw::request_headers().and_then(HeaderMap::new)
}

/// Adds a header to the request; whether that worked.
pub fn add_request_header(name: &str, value: &str) -> bool {
    hostcalls::add_map_value_bytes(MapType::HttpRequestHeaders, name, value.as_bytes()).is_ok()
}

/// Takes all headers of that name out of the request; whether that worked.
pub fn remove_request_header(name: &str) -> bool {
    hostcalls::set_map_value_bytes(MapType::HttpRequestHeaders, name, None).is_ok()
}

/// To be called once the request's headers were changed. The proxy matches the route again by itself.
pub fn request_headers_changed() {}

/// The status of the response.
pub fn response_status() -> Option<u16> {
    status(&hostcalls::get_map_value_bytes(MapType::HttpResponseHeaders, ":status").ok()??)
}

/// Sets headers of the response, in place of what the upstream said of the same.
pub fn add_response_headers(headers: &[(&str, &str)]) {
    for (name, value) in headers {
        let _best_effort =
            hostcalls::set_map_value_bytes(MapType::HttpResponseHeaders, name, Some(value.as_bytes()));
    }
}

/// The client's address, without its port.
pub fn client_address() -> Option<String> {
    property(&["source", "address"]).map(|address| without_port(&address).to_owned())
}

/// Answers the request here.
pub fn respond(status: u16, headers: Vec<(&str, &str)>, body: &[u8]) {
    if hostcalls::send_http_response(u32::from(status), headers, Some(body)).is_err() {
        error("the proxy did not take a local reply");
    }
}

/// Sets filter state of the request, which access logs can print. The proxy puts `wasm.` before the name.
pub fn set_filter_state(entry: Entry, value: &str) {
    let name = entry.name();
    let name = name.strip_prefix("wasm.").unwrap_or(name);
    let _best_effort = hostcalls::set_property(vec![name], Some(value.as_bytes()));
}

/// Its id among the proxies (`--service-node`), if it has one.
pub fn node_id() -> Option<String> {
    property(&["xds", "node", "id"]).filter(|id| !id.is_empty())
}

/// The cluster of proxies that it is one of (`--service-cluster`).
pub fn node_cluster() -> Option<String> {
    property(&["xds", "node", "cluster"])
}

/// Whether the VM may lead: any may, as none is made anew by itself.
pub fn may_lead() -> bool {
    true
}

/// A property of the proxy as text; what is no text is nothing.
fn property(path: &[&str]) -> Option<String> {
    let bytes = hostcalls::get_property(path.to_vec()).ok()??;
    String::from_utf8(bytes).ok()
}

/// The plugin's configuration.
pub fn configuration() -> Vec<u8> {
    hostcalls::get_buffer(BufferType::PluginConfiguration, 0, usize::MAX).ok().flatten().unwrap_or_default()
}

/// How often `on_tick` is called.
pub fn set_tick_period(period: Duration) {
    let _best_effort = hostcalls::set_tick_period(period);
}

/// Posts a JSON document to a cluster. `None` when the proxy has no such cluster.
pub fn post(
    cluster: &str,
    path: &str,
    token: Option<&str>,
    body: &[u8],
    timeout: Duration,
) -> Option<CallId> {
    let bearer = token.map(|token| format!("Bearer {token}"));
    let headers = headers_to(cluster, path, bearer.as_deref());
    hostcalls::dispatch_http_call(cluster, headers, Some(body), Vec::new(), timeout).ok()
}

/// The answer to a call, from within its callback, if it had headers.
pub fn call_answer(body_bytes: usize) -> Answer {
    let status = hostcalls::get_map_value_bytes(MapType::HttpCallResponseHeaders, ":status")
        .ok()
        .flatten()
        .and_then(|value| self::status(&value))
        .unwrap_or(0);
    let body = hostcalls::get_buffer(BufferType::HttpCallResponseBody, 0, body_bytes)
        .ok()
        .flatten()
        .unwrap_or_default();
    Answer { status, body }
}

/// Verifies an ES256 signature (r and s) by a public point: BoringSSL behind Envoy's foreign function
/// `verify_signature`, twenty times as fast as the same in WebAssembly.
///
/// Its arguments and result are the protobuf messages `VerifySignatureArguments` (hash_function = 1,
/// public_key = 2, signature = 3, text = 4) and `VerifySignatureResult` (result = 1), written and read
/// here by hand: five fields are no reason for a protobuf library in every proxy.
pub fn verify_es256(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
    let (Some(key), Some(signature)) = (p256_spki(point), ecdsa_der(signature)) else { return false };
    let mut arguments = Vec::new();
    for (field, value) in [(1, b"sha256".as_slice()), (2, &key), (3, &signature), (4, message)] {
        bytes_field(&mut arguments, field, value);
    }
    // Only the result counts: a bad signature is an answer, not an error. `true` is field 1, a varint
    // of 1, and stands first.
    let result = hostcalls::call_foreign_function("verify_signature", Some(&arguments)).ok().flatten();
    result.is_some_and(|result| result.starts_with(&[0x08, 0x01]))
}

/// A length-delimited field of a protobuf message.
fn bytes_field(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    const LENGTH_DELIMITED: u8 = 2;
    out.push(field.wrapping_shl(3) | LENGTH_DELIMITED);
    let mut length = value.len();
    while length >= 0x80 {
        out.push(u8::try_from(length & 0x7f).unwrap_or(0) | 0x80);
        length >>= 7;
    }
    out.push(u8::try_from(length).unwrap_or(0));
    out.extend_from_slice(value);
}

/// A counter of the proxy's.
#[derive(Debug, Clone, Copy)]
pub struct Counter(Option<u32>);

impl Counter {
    /// Defines it; counting where that failed does nothing.
    pub fn define(name: &str) -> Self {
        Self(hostcalls::define_metric(MetricType::Counter, name).ok())
    }

    /// One more.
    pub fn increment(self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(self, number: u64) {
        if let (Some(id), Ok(number @ 1..)) = (self.0, i64::try_from(number)) {
            let _best_effort = hostcalls::increment_metric(id, number);
        }
    }
}

/// A gauge of the proxy's, one for all VMs.
#[derive(Debug, Clone, Copy)]
pub struct Gauge(Option<u32>);

impl Gauge {
    /// Defines it; setting where that failed does nothing.
    pub fn define(name: &str) -> Self {
        Self(hostcalls::define_metric(MetricType::Gauge, name).ok())
    }

    /// Sets it.
    pub fn set(self, value: u64) {
        record(self.0, value);
    }
}

/// A histogram of the proxy's.
#[derive(Debug, Clone, Copy)]
pub struct Histogram(Option<u32>);

impl Histogram {
    /// Defines it; observing where that failed does nothing.
    pub fn define(name: &str) -> Self {
        Self(hostcalls::define_metric(MetricType::Histogram, name).ok())
    }

    /// Adds an observation.
    pub fn observe(self, value: u64) {
        record(self.0, value);
    }
}

fn record(metric: Option<u32>, value: u64) {
    if let Some(id) = metric {
        let _best_effort = hostcalls::record_metric(id, value);
    }
}

/// The memory that this VM has from the proxy, in bytes. It only ever grows.
pub fn memory_bytes() -> u64 {
    let pages = std::arch::wasm32::memory_size::<0>();
    u64::try_from(pages).unwrap_or(u64::MAX).saturating_mul(64 * 1024)
}

/// Writes a line to the proxy's log.
pub fn info(message: &str) {
    let _best_effort = hostcalls::log(LogLevel::Info, message);
}

/// Writes a warning to the proxy's log.
pub fn warn(message: &str) {
    let _best_effort = hostcalls::log(LogLevel::Warn, message);
}

/// Writes an error to the proxy's log.
pub fn error(message: &str) {
    let _best_effort = hostcalls::log(LogLevel::Error, message);
}
