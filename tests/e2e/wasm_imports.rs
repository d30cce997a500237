//! What the filter asks of its host, pinned: an import that Envoy does not have keeps it from starting,
//! and every one that is allowed is one more thing to attack.

use std::collections::BTreeSet;
use std::fs;

use keygate_e2e::binaries;
use wasmparser::{ExternalKind, Parser, Payload, TypeRef};

/// The functions of WASI that Rust's standard library needs here.
const WASI: [&str; 6] =
    ["clock_time_get", "environ_get", "environ_sizes_get", "fd_write", "proc_exit", "random_get"];

/// What the SDK imports for kinds of plugin that this is not. Never called, so not allowed.
const NEVER_CALLED: [&str; 12] = [
    "proxy_close_stream",
    "proxy_dequeue_shared_queue",
    "proxy_enqueue_shared_queue",
    "proxy_get_status",
    "proxy_grpc_call",
    "proxy_grpc_cancel",
    "proxy_grpc_close",
    "proxy_grpc_send",
    "proxy_grpc_stream",
    "proxy_register_shared_queue",
    "proxy_resolve_shared_queue",
    "proxy_set_buffer_bytes",
];

struct Module {
    imports: BTreeSet<(String, String)>,
    exports: BTreeSet<String>,
}

fn filter() -> Module {
    let bytes = fs::read(binaries::filter()).expect("the filter");
    let mut module = Module { imports: BTreeSet::new(), exports: BTreeSet::new() };
    for payload in Parser::new(0).parse_all(&bytes) {
        match payload.expect("a valid module") {
            Payload::ImportSection(section) => {
                for import in section.into_imports() {
                    let import = import.expect("an import");
                    assert!(matches!(import.ty, TypeRef::Func(_)), "{import:?}");
                    module.imports.insert((import.module.to_owned(), import.name.to_owned()));
                }
            }
            Payload::ExportSection(section) => {
                for export in section {
                    let export = export.expect("an export");
                    if export.kind == ExternalKind::Func {
                        module.exports.insert(export.name.to_owned());
                    }
                }
            }
            _ => {}
        }
    }
    module
}

/// What the configuration of Envoy allows.
fn allowed() -> BTreeSet<String> {
    let template = fs::read_to_string(binaries::root().join("envoy/local.yaml.in")).expect("the template");
    let (_, list) = template.split_once("allowed_capabilities:").expect("a list of what is allowed");
    list.lines()
        .map(str::trim)
        .skip_while(|line| line.is_empty())
        .take_while(|line| line.starts_with('#') || line.ends_with(": {}"))
        .filter_map(|line| line.strip_suffix(": {}"))
        .map(str::to_owned)
        .collect()
}

#[test]
fn the_filter_imports_what_envoy_gives() {
    let module = filter();
    let of = |wanted: &str| -> BTreeSet<&str> {
        let from = module.imports.iter().filter(|(from, _)| from == wanted);
        from.map(|(_, name)| name.as_str()).collect()
    };
    assert_eq!(of("wasi_snapshot_preview1"), BTreeSet::from(WASI));
    let env = of("env");
    assert_eq!(env.len() + WASI.len(), module.imports.len(), "imports of elsewhere: {:?}", module.imports);
    assert!(env.iter().all(|name| name.starts_with("proxy_")), "{env:?}");
    assert!(module.exports.contains("proxy_abi_version_0_2_1"), "{:?}", module.exports);
}

#[test]
fn what_is_called_is_allowed_and_nothing_else() {
    let (module, allowed) = (filter(), allowed());
    let imports: BTreeSet<&str> = module.imports.iter().map(|(_, name)| name.as_str()).collect();
    let never_called = BTreeSet::from(NEVER_CALLED);
    let called: BTreeSet<&str> = imports.difference(&never_called).copied().collect();
    let (allowed_calls, allowed_callbacks): (BTreeSet<&str>, BTreeSet<&str>) =
        allowed.iter().map(String::as_str).partition(|name| imports.contains(name));
    assert_eq!(allowed_calls, called);
    let not_there: Vec<_> =
        allowed_callbacks.iter().filter(|name| !module.exports.contains(**name)).collect();
    assert!(not_there.is_empty(), "allowed, and neither imported nor exported: {not_there:?}");
    // Without this one Envoy would let every request pass unseen.
    assert!(allowed_callbacks.contains("proxy_on_request_headers"));
}
