//! Calls that the SDK has no safe or no cheap form of. The only unsafe code of the filter in WebAssembly.

#![allow(unsafe_code)]

use std::ptr;

#[link(wasm_import_module = "wasi_snapshot_preview1")]
unsafe extern "C" {
    fn clock_time_get(clock: u32, precision: u64, time: *mut u64) -> u32;
}

#[link(wasm_import_module = "env")]
unsafe extern "C" {
    fn proxy_get_header_map_pairs(map: u32, data: *mut *mut u8, size: *mut usize) -> u32;
}

/// WASI's number of the monotonic clock.
const MONOTONIC: u32 = 1;
/// The ABI's number of the request's headers.
const REQUEST_HEADERS: u32 = 0;
/// What went well.
const OK: u32 = 0;

/// The monotonic clock of the process, nanoseconds.
pub fn monotonic_ns() -> Option<u64> {
    let mut now = 0;
    // SAFETY: the host writes eight bytes to `now`, which outlives the call.
    let status = unsafe { clock_time_get(MONOTONIC, 1, &raw mut now) };
    (status == OK).then_some(now)
}

/// All headers of the request, in the layout of the ABI.
pub fn request_headers() -> Option<Vec<u8>> {
    let (mut data, mut size) = (ptr::null_mut(), 0);
    // SAFETY: the host writes a pointer and a size, and both places outlive the call.
    let status = unsafe { proxy_get_header_map_pairs(REQUEST_HEADERS, &raw mut data, &raw mut size) };
    if status != OK {
        return None;
    }
    if data.is_null() || size == 0 {
        return Some(Vec::new());
    }
    // SAFETY: the host got these bytes from `proxy_on_memory_allocate`, where the SDK makes a boxed slice of just
    // this size and gives it away; the host wrote all of it, and nobody else frees it.
    Some(unsafe { Vec::from_raw_parts(data, size, size) })
}
