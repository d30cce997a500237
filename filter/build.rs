//! Has the dynamic module stay loaded: its thread-local state has destructors, which must not be unloaded before
//! the threads end that Envoy made.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").is_ok_and(|os| os == "linux") {
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
