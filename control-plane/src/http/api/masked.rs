//! Keys that people paste into names, reasons and metadata: they would stand in the journal for years.

use std::borrow::Cow;

use keygate_core::token;

/// In place of a key.
const MASK: &str = "[a key was removed here]";

/// The bytes of a body without the keys in its texts.
pub fn without_keys(body: &[u8]) -> Cow<'_, [u8]> {
    // A key is a JSON object in base64url, so it begins like this.
    if !body.windows(3).any(|part| part == b"eyJ") {
        return Cow::Borrowed(body);
    }
    let (mut masked, mut rest, mut any) = (Vec::with_capacity(body.len()), body, false);
    while let Some(at) = rest.iter().position(|byte| is_of_token(*byte)) {
        let (before, from) = rest.split_at(at);
        let end = from.iter().position(|byte| !is_of_token(*byte)).unwrap_or(from.len());
        // A sentence may end with one.
        let end = end - from[..end].iter().rev().take_while(|byte| **byte == b'.').count();
        let (word, after) = if end == 0 { from.split_at(1) } else { from.split_at(end) };
        masked.extend_from_slice(before);
        let is_key = token::read(word).is_ok();
        any |= is_key;
        masked.extend_from_slice(if is_key { MASK.as_bytes() } else { word });
        rest = after;
    }
    if !any {
        return Cow::Borrowed(body);
    }
    masked.extend_from_slice(rest);
    Cow::Owned(masked)
}

const fn is_of_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.')
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::http::api::world::World;

    #[tokio::test]
    async fn a_key_in_a_text_is_not_kept_and_all_else_is() {
        let world = World::new("").await;
        let key = world.issue("basic").await;
        let body = json!({
            "name": format!("was {key}."), "role": "basic", "reason": format!("instead of {key}"),
            "metadata": { "old": key, "version": "1.2.3", "note": "eyJ is how they begin..." },
        });
        let (status, made) = world.register(&world.admin, body).await;
        assert_eq!(status, 201, "{made}");
        assert_eq!(made["name"], "was [a key was removed here].");
        assert_eq!(
            made["metadata"],
            json!({ "old": "[a key was removed here]", "version": "1.2.3", "note": "eyJ is how they begin..." })
        );
        let lock = json!({ "ttl": "1s", "reason": key });
        assert_eq!(world.call("POST", "/api/admin/emergency/lockdown", &world.admin, lock).await.0, 200);
        let suspend = format!("/api/admin/keys/{}/suspend", made["key_id"].as_str().unwrap());
        assert_eq!(world.call("POST", &suspend, &world.admin, json!({ "reason": key })).await.0, 200);
        let journal = world.serving.app.config.journal_dir();
        let bytes = std::fs::read(journal.join("00000000000000000001.jsonl")).unwrap();
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains("a key was removed here") && !text.contains(&key));
        // Who asks about a key names it.
        let question = json!({ "token": key, "method": "GET", "path": "/" });
        let (status, answer) = world.call("POST", "/api/admin/explain", &world.admin, question).await;
        assert_eq!(status, 200, "{answer}");
        assert!(!answer.to_string().contains("malformed"), "{answer}");
    }
}
