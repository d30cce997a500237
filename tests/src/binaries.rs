//! Where the programs under test are.

use std::path::{Path, PathBuf};

/// The root of the checkout.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate is in a workspace")
}

/// The control plane.
pub fn keygate() -> PathBuf {
    existing("KEYGATE_BIN", target().join("debug/keygate"))
}

/// The filter.
pub fn filter() -> PathBuf {
    existing("KEYGATE_WASM", target().join("wasm32-wasip1/filter/keygate_filter.wasm"))
}

/// The filter that a test can make trap.
pub fn trap_filter() -> PathBuf {
    existing("KEYGATE_TRAP_WASM", target().join("wasm32-wasip1/filter-trap/keygate_filter.wasm"))
}

/// The filter as a dynamic module.
pub fn module() -> PathBuf {
    existing("KEYGATE_MODULE", target().join("module/libkeygate_filter.so"))
}

/// The same, for tests that make it panic.
pub fn trap_module() -> PathBuf {
    existing("KEYGATE_TRAP_MODULE", target().join("debug/libkeygate_filter.so"))
}

/// The filter that does nothing.
pub fn empty_filter() -> PathBuf {
    existing("KEYGATE_EMPTY_WASM", target().join("wasm32-wasip1/filter/examples/empty.wasm"))
}

/// Envoy: the one named, else one on `PATH`, else the one that `scripts/setup` downloads.
pub fn envoy() -> PathBuf {
    existing(
        "KEYGATE_ENVOY",
        on_path("envoy").unwrap_or_else(|| cache().join("envoy-1.40.0/envoy/_bin/envoy")),
    )
}

/// Redis.
pub fn redis_server() -> PathBuf {
    installed("redis-server")
}

/// Redis's Sentinel.
pub fn redis_sentinel() -> PathBuf {
    installed("redis-sentinel")
}

/// What operators type their commands with.
pub fn redis_cli() -> PathBuf {
    installed("redis-cli")
}

/// Prometheus.
pub fn prometheus() -> PathBuf {
    installed("prometheus")
}

/// What checks Prometheus's files.
pub fn promtool() -> PathBuf {
    installed("promtool")
}

/// What checks Alertmanager's file.
pub fn amtool() -> PathBuf {
    installed("amtool")
}

/// What makes certificates.
pub fn openssl() -> PathBuf {
    installed("openssl")
}

fn installed(name: &str) -> PathBuf {
    on_path(name).unwrap_or_else(|| panic!("{name} is not on PATH: run scripts/setup first"))
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}

fn target() -> PathBuf {
    // A test runs as `target/debug/deps/e2e-…`, also when the target directory is elsewhere.
    let this = std::env::current_exe().expect("a program knows its path");
    this.ancestors()
        .find(|directory| directory.ends_with("debug"))
        .and_then(Path::parent)
        .map_or_else(|| root().join("target"), Path::to_owned)
}

fn cache() -> PathBuf {
    let named = |name| std::env::var_os(name).map(PathBuf::from);
    named("KEYGATE_CACHE").unwrap_or_else(|| {
        named("XDG_CACHE_HOME")
            .or_else(|| named("HOME").map(|home| home.join(".cache")))
            .unwrap_or_else(|| PathBuf::from("/tmp"))
            .join("keygate")
    })
}

fn existing(variable: &str, usual: PathBuf) -> PathBuf {
    let path = std::env::var_os(variable).map_or(usual, PathBuf::from);
    assert!(
        path.is_file(),
        "{} is missing: run scripts/setup, scripts/build and scripts/build trap-filter first, or set {variable}",
        path.display()
    );
    path
}
