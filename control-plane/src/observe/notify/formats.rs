//! What a notice looks like at each destination.

use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;

use super::Notice;

/// The header with the signature of a webhook's body.
pub const SIGNATURE: &str = "keygate-signature";

/// For any web server.
pub fn webhook(notice: &Notice, source: &str) -> Value {
    let details: serde_json::Map<String, Value> =
        notice.details.iter().map(|(name, text)| ((*name).to_owned(), text.as_str().into())).collect();
    json!({
        "id": notice.id,
        "at": notice.at,
        "source": source,
        "kind": notice.kind.label(),
        "severity": notice.kind.severity(),
        "status": if notice.resolved { "resolved" } else { "firing" },
        "summary": notice.summary,
        "details": details,
    })
}

/// `t=<Unix seconds>,v1=<HMAC-SHA-256 of "<t>.<body>", hexadecimal>`: who knows the secret can tell who sent it, and that
/// it is not an old one sent again.
pub fn signature(secret: &str, at: u64, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).expect("a key of any length will do");
    mac.update(format!("{at}.").as_bytes());
    mac.update(body);
    let hex: String = mac.finalize().into_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("t={at},v1={hex}")
}

/// For an incoming webhook of Slack. `&`, `<` and `>` are escaped, so that nothing becomes a link or calls people.
pub fn slack(notice: &Notice, source: &str) -> Value {
    let escaped = |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
    let sign = match (notice.resolved, notice.kind.severity()) {
        (true, _) => ":white_check_mark:",
        (false, "critical") => ":rotating_light:",
        (false, _) => ":warning:",
    };
    let status = if notice.resolved { "resolved" } else { notice.kind.severity() };
    let mut text = format!("{sign} *Keygate* {status}: {}", escaped(&notice.summary));
    for (name, detail) in &notice.details {
        text.push_str(&format!("\n• {name}: {}", escaped(detail)));
    }
    text.push_str(&format!("\n_{} at {}, by {}_", notice.kind.label(), notice.at, escaped(source)));
    json!({ "text": text, "unfurl_links": false })
}

/// For PagerDuty's Events API v2: a trouble and its end have the same key, so that the end resolves it.
pub fn pagerduty(notice: &Notice, source: &str, routing_key: &str) -> Value {
    let dedup_key = if notice.kind.ends() {
        format!("keygate {source} {}", notice.kind.label())
    } else {
        format!("keygate {source} {} {}", notice.kind.label(), notice.id)
    };
    let mut event = json!({
        "routing_key": routing_key,
        "event_action": if notice.resolved { "resolve" } else { "trigger" },
        "dedup_key": dedup_key,
    });
    if !notice.resolved {
        let details: serde_json::Map<String, Value> =
            notice.details.iter().map(|(name, text)| ((*name).to_owned(), text.as_str().into())).collect();
        event["payload"] = json!({
            "summary": notice.summary,
            "source": source,
            "severity": notice.kind.severity(),
            "timestamp": notice.at,
            "component": "keygate",
            "class": notice.kind.label(),
            "custom_details": details,
        });
    }
    event
}

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::*;
    use crate::platform::trace::Trace;

    fn notice(kind: Kind, resolved: bool) -> Notice {
        Notice {
            id: "n1".into(),
            at: "2026-01-01T00:00:00.000Z".into(),
            kind,
            resolved,
            summary: "proxies <@everyone> & <https://evil|more> wait".into(),
            details: vec![("missing", "envoy-1 <x>".into())],
            trace: Trace::begin(),
        }
    }

    #[test]
    fn slack_reads_no_markup_in_what_people_wrote() {
        let text = slack(&notice(Kind::RotationFailed, false), "cp<1>")["text"].as_str().unwrap().to_owned();
        assert!(!text.contains('<') && !text.contains('>'), "{text}");
        assert!(text.contains("&lt;@everyone&gt; &amp; &lt;https://evil|more&gt;"), "{text}");
    }

    #[test]
    fn a_trouble_and_its_end_are_one_incident_and_events_are_not() {
        let key = |kind, resolved, id: &str| {
            let notice = Notice { id: id.into(), ..notice(kind, resolved) };
            pagerduty(&notice, "cp", "r")["dedup_key"].as_str().unwrap().to_owned()
        };
        assert_eq!(key(Kind::RotationFailed, false, "a"), key(Kind::RotationFailed, true, "b"));
        assert_ne!(key(Kind::MassRevocation, false, "a"), key(Kind::MassRevocation, false, "b"));
        let resolve = pagerduty(&notice(Kind::RotationFailed, true), "cp", "r");
        assert_eq!((&resolve["event_action"], resolve.get("payload")), (&json!("resolve"), None));
    }

    #[test]
    fn the_signature_is_of_time_and_body() {
        // RFC 4231 has no such text; computed with `printf '1.{}' | openssl dgst -sha256 -hmac key`.
        assert_eq!(
            signature("key", 1, b"{}"),
            "t=1,v1=1ba6b8171186efc613e8bcc0cbdab2748f24984d7c5a84faa2637afa0e40d224"
        );
        assert_ne!(signature("key", 1, b"{}"), signature("key", 2, b"{}"));
        assert_ne!(signature("key", 1, b"{}"), signature("yek", 1, b"{}"));
    }
}
