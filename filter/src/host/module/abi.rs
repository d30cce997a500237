//! Envoy's functions for dynamic modules (`source/extensions/dynamic_modules/abi/abi.h` of Envoy 1.40), and safe forms of
//! those that the filter uses. Envoy resolves their names when it loads the module.
//!
//! Where Envoy gives a pointer, it is good until the hook that is running returns or the map of headers that it is of is
//! changed, so nothing here outlives the closure or the call that it is made in.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ptr::{self, NonNull};
use std::time::Duration;

/// Bytes of Envoy's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Buffer {
    pointer: *const u8,
    length: usize,
}

/// A header of Envoy's.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Header {
    name: Buffer,
    value: Buffer,
}

impl Buffer {
    const NONE: Self = Self { pointer: ptr::null(), length: 0 };

    /// Of ours, for Envoy to read during a call.
    fn of(bytes: &[u8]) -> Self {
        Self { pointer: bytes.as_ptr(), length: bytes.len() }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        bytes(self.pointer, self.length)
    }
}

impl Header {
    const NONE: Self = Self { name: Buffer::NONE, value: Buffer::NONE };

    /// Its name, in lower case.
    pub fn name(&self) -> &[u8] {
        self.name.bytes()
    }

    /// Its value.
    pub fn value(&self) -> &[u8] {
        self.value.bytes()
    }
}

/// So many things at a place that Envoy gave to a hook; none when the pointer is null.
pub fn bytes<'a, T>(pointer: *const T, length: usize) -> &'a [T] {
    if pointer.is_null() || length == 0 {
        return &[];
    }
    // SAFETY: Envoy says that there are so many, and leaves them be while a hook runs; see above.
    unsafe { std::slice::from_raw_parts(pointer, length) }
}

/// A configuration of the filter, as Envoy knows it.
#[derive(Clone, Copy)]
pub struct Config(NonNull<c_void>);

// SAFETY: Envoy's metrics can be changed from any thread. All else that takes it is called on the main thread, where
// plugins tick.
unsafe impl Send for Config {}
// SAFETY: as above.
unsafe impl Sync for Config {}

/// A request, as Envoy knows it.
#[derive(Clone, Copy)]
pub struct Stream(NonNull<c_void>);

impl Config {
    /// What Envoy gave to a hook.
    pub fn new(pointer: *mut c_void) -> Option<Self> {
        NonNull::new(pointer).map(Self)
    }
}

impl Stream {
    /// What Envoy gave to a hook.
    pub fn new(pointer: *mut c_void) -> Option<Self> {
        NonNull::new(pointer).map(Self)
    }
}

/// Which headers.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum HeaderKind {
    /// Of the request.
    Request = 0,
    /// Of the response.
    Response = 2,
}

/// How urgent a line of the log is.
#[derive(Clone, Copy)]
#[repr(u32)]
pub enum Level {
    /// For who looks.
    Info = 2,
    /// Something is not as it should be.
    Warn = 3,
    /// Something does not work.
    Error = 4,
}

/// What is measured.
#[derive(Clone, Copy)]
pub enum Metric {
    /// What only grows.
    Counter,
    /// What goes up and down.
    Gauge,
    /// What is observed.
    Histogram,
}

/// What went well.
const SUCCESS: u32 = 0;
/// The attribute `source.address`.
const SOURCE_ADDRESS: u32 = 24;

unsafe extern "C" {
    fn envoy_dynamic_module_callback_log_v2(level: u32, message: Buffer, file: Buffer, line: u32);
    fn envoy_dynamic_module_callback_get_concurrency() -> u32;

    fn envoy_dynamic_module_callback_http_get_headers_size(stream: *mut c_void, kind: u32) -> usize;
    fn envoy_dynamic_module_callback_http_get_headers(
        stream: *mut c_void,
        kind: u32,
        out: *mut Header,
    ) -> bool;
    fn envoy_dynamic_module_callback_http_get_header(
        stream: *mut c_void,
        kind: u32,
        name: Buffer,
        out: *mut Buffer,
        index: usize,
        count: *mut usize,
    ) -> bool;
    fn envoy_dynamic_module_callback_http_add_header(
        stream: *mut c_void,
        kind: u32,
        name: Buffer,
        value: Buffer,
    ) -> bool;
    fn envoy_dynamic_module_callback_http_set_header(
        stream: *mut c_void,
        kind: u32,
        name: Buffer,
        value: Buffer,
    ) -> bool;
    fn envoy_dynamic_module_callback_http_clear_route_cache(stream: *mut c_void);
    fn envoy_dynamic_module_callback_http_send_response(
        stream: *mut c_void,
        status: u32,
        headers: *const Header,
        count: usize,
        body: Buffer,
        details: Buffer,
    );
    fn envoy_dynamic_module_callback_http_set_filter_state_bytes(
        stream: *mut c_void,
        name: Buffer,
        value: Buffer,
    ) -> bool;
    fn envoy_dynamic_module_callback_http_filter_get_attribute_string(
        stream: *mut c_void,
        attribute: u32,
        out: *mut Buffer,
    ) -> bool;
    fn envoy_dynamic_module_callback_http_filter_get_worker_index(stream: *mut c_void) -> u32;
    fn envoy_dynamic_module_callback_http_filter_continue_decoding(stream: *mut c_void);
    fn envoy_dynamic_module_callback_http_filter_scheduler_new(stream: *mut c_void) -> *mut c_void;
    fn envoy_dynamic_module_callback_http_filter_scheduler_commit(scheduler: *mut c_void, event: u64);
    fn envoy_dynamic_module_callback_http_filter_scheduler_delete(scheduler: *mut c_void);

    fn envoy_dynamic_module_callback_http_filter_config_define_counter(
        config: *mut c_void,
        name: Buffer,
        labels: *const Buffer,
        count: usize,
        out: *mut usize,
    ) -> u32;
    fn envoy_dynamic_module_callback_http_filter_config_define_gauge(
        config: *mut c_void,
        name: Buffer,
        labels: *const Buffer,
        count: usize,
        out: *mut usize,
    ) -> u32;
    fn envoy_dynamic_module_callback_http_filter_config_define_histogram(
        config: *mut c_void,
        name: Buffer,
        labels: *const Buffer,
        count: usize,
        out: *mut usize,
    ) -> u32;
    fn envoy_dynamic_module_callback_http_filter_config_increment_counter(
        config: *mut c_void,
        id: usize,
        labels: *const Buffer,
        count: usize,
        value: u64,
    ) -> u32;
    fn envoy_dynamic_module_callback_http_filter_config_set_gauge(
        config: *mut c_void,
        id: usize,
        labels: *const Buffer,
        count: usize,
        value: u64,
    ) -> u32;
    fn envoy_dynamic_module_callback_http_filter_config_record_histogram_value(
        config: *mut c_void,
        id: usize,
        labels: *const Buffer,
        count: usize,
        value: u64,
    ) -> u32;

    fn envoy_dynamic_module_callback_http_filter_config_http_callout(
        config: *mut c_void,
        out: *mut u64,
        cluster: Buffer,
        headers: *const Header,
        count: usize,
        body: Buffer,
        timeout_ms: u64,
    ) -> u32;

    fn envoy_dynamic_module_callback_http_filter_config_scheduler_new(config: *mut c_void) -> *mut c_void;
    fn envoy_dynamic_module_callback_http_filter_config_scheduler_commit(scheduler: *mut c_void, event: u64);
    fn envoy_dynamic_module_callback_http_filter_config_scheduler_delete(scheduler: *mut c_void);
}

// SAFETY, of all calls below: the pointers to Envoy's objects are what it gave to the hook that is running; buffers
// and places for results outlive the call; and of the lists of labels, which are null, none is said to be there.

/// Writes a line to Envoy's log, as of its component `dynamic_modules`.
pub fn log(level: Level, message: &str) {
    let message = Buffer::of(message.as_bytes());
    // SAFETY: see above; without a file.
    unsafe { envoy_dynamic_module_callback_log_v2(level as u32, message, Buffer::NONE, 0) };
}

/// How many workers there are.
pub fn concurrency() -> u32 {
    // SAFETY: it takes nothing.
    unsafe { envoy_dynamic_module_callback_get_concurrency() }
}

/// Which worker a request is of, from 0.
pub fn worker_index(stream: Stream) -> u32 {
    // SAFETY: see above.
    unsafe { envoy_dynamic_module_callback_http_filter_get_worker_index(stream.0.as_ptr()) }
}

/// Does something with all headers.
pub fn with_headers<R>(stream: Stream, kind: HeaderKind, f: impl FnOnce(&[Header]) -> R) -> Option<R> {
    /// Of so many the places are on the stack.
    const FEW: usize = 32;
    // SAFETY: see above.
    let count =
        unsafe { envoy_dynamic_module_callback_http_get_headers_size(stream.0.as_ptr(), kind as u32) };
    let (mut few, mut many) = ([Header::NONE; FEW], Vec::new());
    let headers = match few.get_mut(..count) {
        Some(few) => few,
        None => {
            many.resize(count, Header::NONE);
            many.as_mut_slice()
        }
    };
    // SAFETY: see above; there is room for so many.
    let done = unsafe {
        envoy_dynamic_module_callback_http_get_headers(stream.0.as_ptr(), kind as u32, headers.as_mut_ptr())
    };
    done.then(|| f(headers))
}

/// The first header of that name.
pub fn header(stream: Stream, kind: HeaderKind, name: &str) -> Option<Buffer> {
    let mut value = Buffer::NONE;
    // SAFETY: see above; how many there are is not asked.
    let found = unsafe {
        envoy_dynamic_module_callback_http_get_header(
            stream.0.as_ptr(),
            kind as u32,
            Buffer::of(name.as_bytes()),
            &raw mut value,
            0,
            ptr::null_mut(),
        )
    };
    found.then_some(value)
}

/// Adds a header, and leaves others of that name; whether that worked. Envoy takes no empty value. It costs less than
/// [`set_header`], which has Envoy make an index of all headers.
pub fn add_header(stream: Stream, kind: HeaderKind, name: &str, value: &str) -> bool {
    let (name, value) = (Buffer::of(name.as_bytes()), Buffer::of(value.as_bytes()));
    // SAFETY: see above.
    unsafe { envoy_dynamic_module_callback_http_add_header(stream.0.as_ptr(), kind as u32, name, value) }
}

/// Takes all headers of that name out; whether that worked.
pub fn remove_header(stream: Stream, kind: HeaderKind, name: &str) -> bool {
    let name = Buffer::of(name.as_bytes());
    // SAFETY: see above; no value means so.
    unsafe {
        envoy_dynamic_module_callback_http_set_header(stream.0.as_ptr(), kind as u32, name, Buffer::NONE)
    }
}

/// Gives the headers of that name that value, which must not be empty; whether that worked.
pub fn set_header(stream: Stream, kind: HeaderKind, name: &str, value: &str) -> bool {
    let (name, value) = (Buffer::of(name.as_bytes()), Buffer::of(value.as_bytes()));
    // SAFETY: see above.
    unsafe { envoy_dynamic_module_callback_http_set_header(stream.0.as_ptr(), kind as u32, name, value) }
}

/// Has the route of the request matched again.
pub fn clear_route_cache(stream: Stream) {
    // SAFETY: see above.
    unsafe { envoy_dynamic_module_callback_http_clear_route_cache(stream.0.as_ptr()) };
}

/// Answers the request.
pub fn send_response(stream: Stream, status: u16, headers: &[(&str, &str)], body: &[u8]) {
    let headers = of_ours(headers);
    // SAFETY: see above.
    unsafe {
        envoy_dynamic_module_callback_http_send_response(
            stream.0.as_ptr(),
            status.into(),
            headers.as_ptr(),
            headers.len(),
            Buffer::of(body),
            Buffer::of(b"keygate"),
        );
    }
}

/// Lets a request go on whose headers were stopped. Envoy may call other hooks of it meanwhile, and end it.
pub fn continue_decoding(stream: Stream) {
    // SAFETY: see above.
    unsafe { envoy_dynamic_module_callback_http_filter_continue_decoding(stream.0.as_ptr()) };
}

/// Sets filter state that access logs print as text; whether that worked.
pub fn set_filter_state(stream: Stream, name: &str, value: &str) -> bool {
    let (name, value) = (Buffer::of(name.as_bytes()), Buffer::of(value.as_bytes()));
    // SAFETY: see above.
    unsafe { envoy_dynamic_module_callback_http_set_filter_state_bytes(stream.0.as_ptr(), name, value) }
}

/// The address that a request comes from, with its port.
pub fn source_address(stream: Stream) -> Option<Buffer> {
    let mut value = Buffer::NONE;
    // SAFETY: see above.
    let found = unsafe {
        envoy_dynamic_module_callback_http_filter_get_attribute_string(
            stream.0.as_ptr(),
            SOURCE_ADDRESS,
            &raw mut value,
        )
    };
    found.then_some(value)
}

/// Defines a metric, which Envoy allows only while it makes a configuration.
pub fn define_metric(config: Config, metric: Metric, name: &str) -> Option<usize> {
    let (mut id, name) = (0, Buffer::of(name.as_bytes()));
    let define = match metric {
        Metric::Counter => envoy_dynamic_module_callback_http_filter_config_define_counter,
        Metric::Gauge => envoy_dynamic_module_callback_http_filter_config_define_gauge,
        Metric::Histogram => envoy_dynamic_module_callback_http_filter_config_define_histogram,
    };
    // SAFETY: see above.
    let result = unsafe { define(config.0.as_ptr(), name, ptr::null(), 0, &raw mut id) };
    (result == SUCCESS).then_some(id)
}

/// Adds to a counter, sets a gauge, or has a histogram observe. From any thread.
pub fn change_metric(config: Config, metric: Metric, id: usize, value: u64) {
    let change = match metric {
        Metric::Counter => envoy_dynamic_module_callback_http_filter_config_increment_counter,
        Metric::Gauge => envoy_dynamic_module_callback_http_filter_config_set_gauge,
        Metric::Histogram => envoy_dynamic_module_callback_http_filter_config_record_histogram_value,
    };
    // SAFETY: see above.
    let _best_effort = unsafe { change(config.0.as_ptr(), id, ptr::null(), 0, value) };
}

/// Calls a cluster; `None` when that cannot be begun. From the main thread.
pub fn call(
    config: Config,
    cluster: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    timeout: Duration,
) -> Option<u64> {
    let headers = of_ours(headers);
    let mut call = 0;
    // SAFETY: see above.
    let result = unsafe {
        envoy_dynamic_module_callback_http_filter_config_http_callout(
            config.0.as_ptr(),
            &raw mut call,
            Buffer::of(cluster.as_bytes()),
            headers.as_ptr(),
            headers.len(),
            Buffer::of(body),
            // 0 is for ever.
            u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX).max(1),
        )
    };
    (result == SUCCESS).then_some(call)
}

fn of_ours(headers: &[(&str, &str)]) -> Vec<Header> {
    let header = |(name, value): &(&str, &str)| Header {
        name: Buffer::of(name.as_bytes()),
        value: Buffer::of(value.as_bytes()),
    };
    headers.iter().map(header).collect()
}

/// Has Envoy's main thread call the filter.
pub struct Scheduler(NonNull<c_void>);

// SAFETY: Envoy lets any thread commit an event and end a scheduler.
unsafe impl Send for Scheduler {}

impl Scheduler {
    /// One for a configuration. From the main thread.
    pub fn new(config: Config) -> Option<Self> {
        // SAFETY: see above.
        let scheduler =
            unsafe { envoy_dynamic_module_callback_http_filter_config_scheduler_new(config.0.as_ptr()) };
        NonNull::new(scheduler).map(Self)
    }

    /// The main thread calls `envoy_dynamic_module_on_http_filter_config_scheduled` soon, if the configuration is
    /// still there.
    pub fn commit(&self) {
        // SAFETY: it is not ended yet.
        unsafe { envoy_dynamic_module_callback_http_filter_config_scheduler_commit(self.0.as_ptr(), 0) };
    }
}

impl Drop for Scheduler {
    fn drop(&mut self) {
        // SAFETY: this is the only owner, and so the only time.
        unsafe { envoy_dynamic_module_callback_http_filter_config_scheduler_delete(self.0.as_ptr()) };
    }
}

/// Has a request's worker call the filter about it. It must end before the worker does, which ends all its requests
/// before: Envoy posts to the worker without a look whether it is still there.
pub struct Waker(NonNull<c_void>);

// SAFETY: Envoy lets any thread commit an event and end a scheduler. What it holds of the request is a weak reference,
// which the worker alone follows.
unsafe impl Send for Waker {}

impl Waker {
    /// One for a request. From its worker.
    pub fn new(stream: Stream) -> Option<Self> {
        // SAFETY: see above.
        let scheduler = unsafe { envoy_dynamic_module_callback_http_filter_scheduler_new(stream.0.as_ptr()) };
        NonNull::new(scheduler).map(Self)
    }

    /// The worker calls `envoy_dynamic_module_on_http_filter_scheduled` soon, if the request is still there.
    pub fn wake(&self) {
        // SAFETY: it is not ended yet.
        unsafe { envoy_dynamic_module_callback_http_filter_scheduler_commit(self.0.as_ptr(), 0) };
    }
}

impl Drop for Waker {
    fn drop(&mut self) {
        // SAFETY: this is the only owner, and so the only time.
        unsafe { envoy_dynamic_module_callback_http_filter_scheduler_delete(self.0.as_ptr()) };
    }
}
