//! The benchmark's Envoy: `envoy/local.yaml.in` with one listener for each of what is compared, all with its options
//! and routes, without the access log.

use std::path::Path;

use keygate_e2e::binaries;
use serde_json::{Value, json};

use super::variant::Listener;

/// What the configuration names.
#[derive(Debug)]
pub struct Places<'a> {
    pub admin_port: u16,
    pub api_port: u16,
    pub sync_port: u16,
    pub upstream_port: u16,
    pub upstream_v1_port: u16,
    pub ext_authz_port: u16,
    pub filter: &'a Path,
    pub empty_filter: &'a Path,
    pub module: &'a Path,
    /// For jwt_authn: the public keys, and the secret, as JWKs.
    pub es256: &'a Value,
    pub eddsa: &'a Value,
    pub hs256: &'a Value,
    /// Whose tokens they are.
    pub issuer: &'a str,
    /// How many tokens jwt_authn may remember.
    pub cached_tokens: usize,
}

/// What stands before a filter in the list of them.
const FILTER: &str = "                  - ";
/// The filter's configuration, but for its last brace.
const CONFIGURATION: &str = r#"{"sync_cluster": "keygate_sync""#;
/// The same with room for more tokens.
const ROOMY: &str = r#"{"sync_cluster": "keygate_sync", "token_cache_bytes": 33554432"#;
/// What stands before a cluster in the list of them.
const CLUSTER: &str = "    - ";

/// The configuration: the template's parts, with the filters of each listener.
#[track_caller]
pub fn envoy(template: &str, listeners: &[(Listener, u16)], places: &Places<'_>) -> String {
    let (head, rest) = cut(template, "  listeners:\n");
    let (listener, clusters) = cut(rest, "\n  clusters:\n");
    let (before, rest) = cut(listener, "                access_log:\n");
    let (_, rest) = cut(rest, "                http_filters:\n");
    let (keygate, after) = cut(rest, "                  - name: envoy.filters.http.router\n");

    let mut text = format!("{head}  listeners:\n");
    for (listener, port) in listeners {
        let name = listener.name();
        let before = put(before, "    - name: http\n", &format!("    - name: {name}\n"));
        let before = put(&before, "stat_prefix: http\n", &format!("stat_prefix: {name}\n"));
        text += &put(&before, "@ENVOY_PORT@", &port.to_string());
        text += "                http_filters:\n";
        text += &filters(*listener, keygate, places);
        text += &format!("                  - name: envoy.filters.http.router\n{after}\n");
    }
    text += "  clusters:\n";
    text += clusters;
    text += &format!("{CLUSTER}{}\n", ext_authz_cluster(places.ext_authz_port));
    [
        ("@ENVOY_ADDRESS@", "127.0.0.1".to_owned()),
        ("@ENVOY_ADMIN_PORT@", places.admin_port.to_string()),
        ("@API_PORT@", places.api_port.to_string()),
        ("@SYNC_PORT@", places.sync_port.to_string()),
        ("@UPSTREAM_PORT@", places.upstream_port.to_string()),
        ("@UPSTREAM_V1_PORT@", places.upstream_v1_port.to_string()),
        ("@FILTER_WASM@", places.filter.display().to_string()),
    ]
    .iter()
    .fold(text, |text, (place, value)| text.replace(place, value))
}

fn filters(listener: Listener, keygate: &str, places: &Places<'_>) -> String {
    let one = |filter: &Value| format!("{FILTER}{filter}\n");
    match listener {
        Listener::Bare | Listener::BareAgain => String::new(),
        // Room for all tokens that are to be known, whatever others come by, as in jwt_authn's cache.
        Listener::Keygate => put(keygate, CONFIGURATION, ROOMY),
        Listener::WasmEmpty => {
            let text = keygate.replace(": keygate\n", ": empty\n");
            put(&text, "@FILTER_WASM@", &places.empty_filter.display().to_string())
        }
        Listener::Module => {
            let entry = binaries::root().join("envoy/module.yaml.in");
            let entry = std::fs::read_to_string(entry).expect("the module's entry");
            put(&put(&entry, "@FILTER_MODULE@", &places.module.display().to_string()), CONFIGURATION, ROOMY)
        }
        Listener::JwtHs256 => one(&jwt_authn(places, places.hs256, None)),
        Listener::JwtCached => one(&jwt_authn(places, places.hs256, Some(places.cached_tokens))),
        Listener::JwtEs256 => one(&jwt_authn(places, places.es256, None)),
        Listener::JwtEdDsa => one(&jwt_authn(places, places.eddsa, None)),
        Listener::ExtAuthz => one(&ext_authz(places.ext_authz_port)),
    }
}

/// A token of Keygate in `Authorization: Bearer`, and forwarded as Keygate forwards it.
fn jwt_authn(places: &Places<'_>, key: &Value, cached: Option<usize>) -> Value {
    let jwks = json!({ "keys": [key] }).to_string();
    let mut provider = json!({
        "issuer": places.issuer,
        "local_jwks": { "inline_string": jwks },
        "forward": true,
    });
    if let Some(tokens) = cached {
        provider["jwt_cache_config"] = json!({ "jwt_cache_size": tokens });
    }
    json!({
        "name": "envoy.filters.http.jwt_authn",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": { "keys": provider },
            "rules": [{ "match": { "prefix": "/" }, "requires": { "provider_name": "keys" } }],
        },
    })
}

fn ext_authz(port: u16) -> Value {
    json!({
        "name": "envoy.filters.http.ext_authz",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz",
            "transport_api_version": "V3",
            "http_service": {
                "server_uri": {
                    "uri": format!("http://127.0.0.1:{port}"),
                    "cluster": "ext_authz",
                    "timeout": "5s",
                },
            },
        },
    })
}

fn ext_authz_cluster(port: u16) -> Value {
    let address = json!({ "socket_address": { "address": "127.0.0.1", "port_value": port } });
    json!({
        "name": "ext_authz",
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": "ext_authz",
            "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": address } }] }],
        },
    })
}

/// What is before and after a text that is there once.
#[track_caller]
fn cut<'t>(text: &'t str, at: &str) -> (&'t str, &'t str) {
    assert_eq!(text.matches(at).count(), 1, "local.yaml.in has {at:?} once");
    text.split_once(at).expect("it is there")
}

#[track_caller]
fn put(text: &str, place: &str, value: &str) -> String {
    let (before, after) = cut(text, place);
    format!("{before}{value}{after}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_differ_by_their_filters_alone_and_keygates_are_those_of_the_template() {
        let template = std::fs::read_to_string(keygate_e2e::binaries::root().join("envoy/local.yaml.in"));
        let template = template.expect("the template");
        let key = json!({ "kty": "oct", "k": "c2VjcmV0" });
        let places = Places {
            admin_port: 1,
            api_port: 2,
            sync_port: 3,
            upstream_port: 4,
            upstream_v1_port: 5,
            ext_authz_port: 6,
            filter: Path::new("/filter.wasm"),
            empty_filter: Path::new("/empty.wasm"),
            module: Path::new("/module.so"),
            es256: &key,
            eddsa: &key,
            hs256: &key,
            issuer: "keygate",
            cached_tokens: 10,
        };
        let of = |listener| envoy(&template, &[(listener, 7)], &places);
        let strip = |text: String, listener: Listener| text.replace(listener.name(), "NAME");
        let bare = of(Listener::Bare);
        assert_eq!(strip(bare.clone(), Listener::Bare), strip(of(Listener::BareAgain), Listener::BareAgain));
        assert!(!bare.contains("_PORT@") && !bare.contains("_ADDRESS@"), "{bare}");
        assert!(!bare.contains("access_log") && !bare.contains("wasm.v3"));

        let keygate = of(Listener::Keygate).replace("/filter.wasm", "@FILTER_WASM@");
        let section =
            template.split("http_filters:\n").nth(1).and_then(|rest| rest.split("route_config").next());
        assert!(keygate.replace(ROOMY, CONFIGURATION).contains(section.expect("the filters")));
        let module = of(Listener::Module);
        assert!(
            module.contains("/module.so")
                && module.contains("token_cache_bytes")
                && !module.contains("wasm.v3")
        );
        let empty = of(Listener::WasmEmpty);
        assert!(
            empty.contains("vm_id: empty")
                && empty.contains("/empty.wasm")
                && !empty.contains("/filter.wasm")
        );
        assert_eq!(of(Listener::JwtCached).matches("jwt_cache_size").count(), 1);
        assert!(!of(Listener::JwtHs256).contains("jwt_cache_size"));
    }
}
