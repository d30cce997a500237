//! What Envoy calls, by name. It wants all of them to be there, also those that the filter has no use for.

#![allow(unsafe_code)]

use std::cell::RefCell;
use std::ffi::{c_char, c_void};
use std::ptr;

use keygate_core::worker::waiting::Ticket;

use super::{Answers, Module, Next, caught};
use crate::host::{self, Buffer, Config, Header, Stream};
use crate::request::Then;
use crate::response::Awaited;

/// The version of the ABI that this is written for, Envoy 1.40's.
const ABI_VERSION: &std::ffi::CStr = c"v0.2.0";

/// Of headers, bodies and trailers: go on.
const CONTINUE: u32 = 0;
/// Of headers: go no further, nor with body and trailers.
const STOP: u32 = 4;
/// Of a body and of trailers: the same.
const STOP_BODY: u32 = 3;
const STOP_TRAILERS: u32 = 1;
/// A call was answered.
const SUCCESS: u32 = 0;

/// One request.
struct Request {
    module: *const Module,
    plugin: usize,
    /// Nothing of it goes on before this is so.
    passes: bool,
    awaited: Option<Awaited>,
    /// While it waits for units of its limit.
    ticket: Option<Ticket>,
}

impl Request {
    /// Takes it off the list of those that wait, if it is there: it must not be woken any more.
    fn leave(&mut self) {
        if let Some(ticket) = self.ticket.take()
            // SAFETY: see below; a request does not outlive its configuration.
            && let Some(module) = unsafe { self.module.as_ref() }
        {
            caught(|| module.leave(self.plugin, ticket));
        }
    }
}

thread_local! {
    /// Answers to calls of a configuration that Envoy does not have yet: it answers some before it returns from calling.
    static EARLY: RefCell<Answers> = const { RefCell::new(Answers::new()) };
}

// SAFETY, of all that is exported here: Envoy alone calls it, with what `abi.h` says: its own pointers, and ours as it
// got them from the hooks that make them, until it gives them to those that end them. A request does not outlive its
// configuration. A panic does not leave: Rust would end the process.

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_program_init() -> *const c_char {
    ABI_VERSION.as_ptr()
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_config_new(
    config: *mut c_void,
    name: Buffer,
    configuration: Buffer,
) -> *const c_void {
    EARLY.take();
    let started = caught(|| {
        let config = Config::new(config).ok_or("Envoy gave no configuration")?;
        let name = String::from_utf8_lossy(name.bytes());
        EARLY.with(|early| Module::start(config, &name, configuration.bytes().to_vec(), early))
    });
    match started.unwrap_or_else(|| Err("the filter panicked over it".to_owned())) {
        Ok(module) => Box::into_raw(module).cast_const().cast(),
        Err(problem) => {
            // Envoy keeps the configuration it had, or does not start with this one.
            host::error(&format!("configuration refused: {problem}"));
            ptr::null()
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_config_destroy(module: *const c_void) {
    if !module.is_null() {
        // SAFETY: see above; this is the last time.
        let module = unsafe { Box::from_raw(module.cast_mut().cast::<Module>()) };
        caught(|| drop(module));
    }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_config_scheduled(
    _config: *mut c_void,
    module: *const c_void,
    _event: u64,
) {
    // SAFETY: see above.
    if let Some(module) = unsafe { module.cast::<Module>().as_ref() } {
        caught(|| module.on_tick());
        caught(|| module.plan());
    }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_config_http_callout_done(
    _config: *mut c_void,
    module: *const c_void,
    call: u64,
    result: u32,
    headers: *const Header,
    headers_count: usize,
    chunks: *const Buffer,
    chunks_count: usize,
) {
    // SAFETY: see above.
    let module = unsafe { module.cast::<Module>().as_ref() };
    caught(|| {
        let (headers, chunks) = (host::bytes(headers, headers_count), host::bytes(chunks, chunks_count));
        let answer = (result == SUCCESS).then(|| host::call_answer(headers, chunks));
        match module {
            Some(module) => module.on_answer(call, answer),
            None => EARLY.with_borrow_mut(|early| early.push_back((call, answer))),
        }
    });
    if let Some(module) = module {
        caught(|| module.plan());
    }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_new(
    module: *const c_void,
    stream: *mut c_void,
) -> *const c_void {
    let module = module.cast::<Module>();
    // SAFETY: see above.
    let (Some(there), Some(stream)) = (unsafe { module.as_ref() }, Stream::new(stream)) else {
        return ptr::null(); // Envoy closes the stream.
    };
    let request =
        Request { module, plugin: there.plugin_of(stream), passes: false, awaited: None, ticket: None };
    Box::into_raw(Box::new(request)).cast_const().cast()
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_destroy(request: *const c_void) {
    if !request.is_null() {
        // SAFETY: see above; this is the last time.
        let mut request = unsafe { Box::from_raw(request.cast_mut().cast::<Request>()) };
        request.leave();
    }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_request_headers(
    stream: *mut c_void,
    request: *const c_void,
    _end_of_stream: bool,
) -> u32 {
    // SAFETY: see above; no other hook of this request runs meanwhile.
    let request = unsafe { request.cast_mut().cast::<Request>().as_mut() };
    let (Some(request), Some(stream)) = (request, Stream::new(stream)) else { return STOP };
    // SAFETY: see above.
    let Some(module) = (unsafe { request.module.as_ref() }) else { return STOP };
    match caught(|| module.on_request(request.plugin, stream)) {
        Some(Next::Then(Then::Continue(awaited))) => {
            request.passes = true;
            request.awaited = awaited;
            CONTINUE
        }
        Some(Next::Then(Then::Answered)) => STOP,
        Some(Next::Wait(ticket)) => {
            request.ticket = Some(ticket);
            STOP
        }
        None => {
            caught(|| module.refuse_after_panic(request.plugin, stream));
            STOP
        }
    }
}

/// Of a request that waits: units of its limit may have come.
#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_scheduled(
    stream: *mut c_void,
    request: *const c_void,
    _event: u64,
) {
    let place = request.cast_mut().cast::<Request>();
    // SAFETY: see above. What is answered or goes on may be ended by that, within the call that does it, so no reference
    // into the request is held meanwhile.
    let Some(Request { module, plugin, ticket: Some(ticket), .. }) = (unsafe { place.as_ref() }) else {
        return;
    };
    let (module, plugin, ticket) = (*module, *plugin, *ticket);
    // SAFETY: see above.
    let (Some(module), Some(stream)) = (unsafe { module.as_ref() }, Stream::new(stream)) else { return };
    match caught(|| module.on_woken(plugin, stream, ticket)) {
        Some(Next::Then(Then::Continue(awaited))) => {
            // SAFETY: it was not answered, so it is still there.
            if let Some(request) = unsafe { place.as_mut() } {
                (request.passes, request.awaited, request.ticket) = (true, awaited, None);
            }
            host::continue_decoding(stream);
        }
        Some(Next::Then(Then::Answered) | Next::Wait(_)) => {}
        None => {
            caught(|| module.refuse_after_panic(plugin, stream));
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_response_headers(
    stream: *mut c_void,
    request: *const c_void,
    _end_of_stream: bool,
) -> u32 {
    // SAFETY: see above; no other hook of this request runs meanwhile.
    let mut request = unsafe { request.cast_mut().cast::<Request>().as_mut() };
    if let Some(request) = &mut request {
        request.leave(); // Envoy answered by itself, as after a time-out.
    }
    if let (Some(request), Some(stream)) = (request, Stream::new(stream))
        && let Some(awaited) = request.awaited.take()
        // SAFETY: see above.
        && let Some(module) = unsafe { request.module.as_ref() }
    {
        caught(|| module.on_response(request.plugin, stream, awaited));
    }
    CONTINUE
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_request_body(
    _stream: *mut c_void,
    request: *const c_void,
    _end_of_stream: bool,
) -> u32 {
    if passes(request) { CONTINUE } else { STOP_BODY }
}

#[unsafe(no_mangle)]
extern "C" fn envoy_dynamic_module_on_http_filter_request_trailers(
    _stream: *mut c_void,
    request: *const c_void,
) -> u32 {
    if passes(request) { CONTINUE } else { STOP_TRAILERS }
}

fn passes(request: *const c_void) -> bool {
    // SAFETY: see above.
    unsafe { request.cast::<Request>().as_ref() }.is_some_and(|request| request.passes)
}

/// Hooks that do nothing.
macro_rules! unused {
    ($($name:ident($($argument:ty),*) $(-> $answer:ty = $value:expr)?;)*) => {$(
        #[unsafe(no_mangle)]
        extern "C" fn $name($(_: $argument),*) $(-> $answer)? {
            $($value)?
        }
    )*};
}

type Envoys = *mut c_void;
type Ours = *const c_void;

unused! {
    envoy_dynamic_module_on_http_filter_response_body(Envoys, Ours, bool) -> u32 = CONTINUE;
    envoy_dynamic_module_on_http_filter_response_trailers(Envoys, Ours) -> u32 = CONTINUE;
    envoy_dynamic_module_on_http_filter_stream_complete(Envoys, Ours);
    envoy_dynamic_module_on_http_filter_http_callout_done(
        Envoys, Ours, u64, u32, *const Header, usize, *const Buffer, usize
    );
    envoy_dynamic_module_on_http_filter_http_stream_headers(
        Envoys, Ours, u64, *const Header, usize, bool
    );
    envoy_dynamic_module_on_http_filter_http_stream_data(
        Envoys, Ours, u64, *const Buffer, usize, bool
    );
    envoy_dynamic_module_on_http_filter_http_stream_trailers(Envoys, Ours, u64, *const Header, usize);
    envoy_dynamic_module_on_http_filter_http_stream_complete(Envoys, Ours, u64);
    envoy_dynamic_module_on_http_filter_http_stream_reset(Envoys, Ours, u64, u32);
    envoy_dynamic_module_on_http_filter_downstream_above_write_buffer_high_watermark(Envoys, Ours);
    envoy_dynamic_module_on_http_filter_downstream_below_write_buffer_low_watermark(Envoys, Ours);
}
