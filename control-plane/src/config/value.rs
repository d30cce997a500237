//! How the values of settings are read, each with what is wrong with one that cannot be.

use std::path::PathBuf;
use std::time::Duration;

use std::net::SocketAddr;

use keygate_core::decide::rules::MAX_LEEWAY_S;
use keygate_core::token;
use keygate_core::token::crypto::Algorithm;
use toml::Value;

use super::Durability;
use super::LogFormat;
use crate::durability::journal::PersonalData;
use crate::model::rollout::OnBreach;
use crate::model::schedule::Schedule;
use crate::secrets::record::Retire;

pub fn text(value: &Value) -> Result<&str, String> {
    value.as_str().filter(|text| !text.is_empty()).ok_or_else(|| format!("{value} is not a text"))
}

pub fn path(value: &Value) -> Result<PathBuf, String> {
    text(value).map(PathBuf::from)
}

pub fn address(value: &Value) -> Result<SocketAddr, String> {
    let text = text(value)?;
    text.parse().map_err(|_| format!("{text:?} is not an address such as \"127.0.0.1:8000\""))
}

pub fn identifier(value: &Value) -> Result<String, String> {
    let text = text(value)?;
    if token::is_identifier(text) {
        Ok(text.into())
    } else {
        Err(format!(
            "{text:?} must be visible ASCII without spaces, at most {} bytes",
            token::MAX_IDENTIFIER_BYTES
        ))
    }
}

/// A URL that something can be posted to.
pub fn http_url(value: &Value) -> Result<String, String> {
    let text = text(value)?;
    let is_one = text.parse::<axum::http::Uri>().is_ok_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some_and(|host| !host.is_empty())
    });
    // It may hold a token, so it is not repeated.
    if is_one { Ok(text.into()) } else { Err("is not a URL such as \"https://example.com/hook\"".into()) }
}

/// Where a sync port is, which speaks plain HTTP.
pub fn plain_url(value: &Value) -> Result<String, String> {
    let url = http_url(value).ok().filter(|url| url.starts_with("http://"));
    url.ok_or_else(|| "is not a URL such as \"http://keygate-0.keygate:8001\"".into())
}

/// A label of an object or token in an HSM (PKCS#11): at most 32 bytes for a token.
pub fn label(value: &Value) -> Result<String, String> {
    let text = text(value)?;
    if text.len() <= 32 && text.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        Ok(text.into())
    } else {
        Err(format!("{text:?} must be at most 32 printable ASCII characters"))
    }
}

/// A variable has it as a text.
pub fn flag(value: &Value) -> Result<bool, String> {
    match value {
        Value::Boolean(flag) => Ok(*flag),
        Value::String(text) if text == "true" => Ok(true),
        Value::String(text) if text == "false" => Ok(false),
        other => Err(format!("{other} is neither true nor false")),
    }
}

/// A variable has it as a text with commas.
pub fn list(value: &Value) -> Result<Vec<String>, String> {
    match value {
        Value::String(text) => Ok(text.split(',').map(|part| part.trim().to_owned()).collect()),
        Value::Array(values) => values.iter().map(|value| text(value).map(ToOwned::to_owned)).collect(),
        other => Err(format!("{other} is not a list of texts")),
    }
}

pub fn up_to_100(value: &Value) -> Result<u32, String> {
    let wanted = count(value)?;
    u32::try_from(wanted).ok().filter(|n| (1..=100).contains(n)).ok_or_else(|| "must be from 1 to 100".into())
}

/// Reads a duration of so many seconds.
pub fn between(from: u64, to: u64) -> impl Fn(&Value) -> Result<Duration, String> {
    move |value| {
        let wanted = duration(value)?;
        let range = Duration::from_secs(from)..=Duration::from_secs(to);
        let say = || format!("must be from {from}s to {}", humantime::format_duration(*range.end()));
        if range.contains(&wanted) { Ok(wanted) } else { Err(say()) }
    }
}

pub fn overlap(value: &Value) -> Result<Duration, String> {
    let overlap = duration(value)?;
    let range = Duration::from_secs(1)..=Duration::from_secs(366 * 86_400);
    if range.contains(&overlap) && overlap.subsec_nanos() == 0 {
        Ok(overlap)
    } else {
        Err("must be whole seconds from 1s to 366d; to end a secret at once, rotate with 'immediate'".into())
    }
}

pub fn retire(value: &Value) -> Result<Retire, String> {
    match text(value)? {
        "after_overlap" => Ok(Retire::AfterOverlap),
        "with_last_key" => Ok(Retire::WithLastKey),
        other => Err(format!("{other:?} is neither \"after_overlap\" nor \"with_last_key\"")),
    }
}

pub fn schedule(value: &Value) -> Result<Option<Schedule>, String> {
    match text(value)? {
        "off" => Ok(None),
        text => Schedule::parse(text).map(Some),
    }
}

/// Time within which proxies must know a new secret.
pub fn propagation_timeout(value: &Value) -> Result<Duration, String> {
    let timeout = duration(value)?;
    if (Duration::from_secs(1)..=Duration::from_secs(86_400)).contains(&timeout) {
        Ok(timeout)
    } else {
        Err("must be from 1s to 24h".into())
    }
}

pub fn realm(value: &Value) -> Result<String, String> {
    let text = text(value)?;
    let plain = |b: u8| (b' '..=b'~').contains(&b) && b != b'"' && b != b'\\';
    if text.bytes().all(plain) {
        Ok(text.into())
    } else {
        Err(format!("{text:?} must be printable ASCII without quotes and backslashes"))
    }
}

pub fn duration(value: &Value) -> Result<Duration, String> {
    let text = text(value)?;
    humantime::parse_duration(text)
        .map_err(|_| format!("{text:?} is not a duration such as \"5s\" or \"24h\""))
}

pub fn leeway(value: &Value) -> Result<Duration, String> {
    let leeway = duration(value)?;
    if leeway.as_secs() <= MAX_LEEWAY_S && leeway.subsec_nanos() == 0 {
        Ok(leeway)
    } else {
        Err(format!("must be whole seconds, at most {MAX_LEEWAY_S}s"))
    }
}

pub fn max_staleness(value: &Value) -> Result<Duration, String> {
    let age = duration(value)?;
    let range = Duration::from_secs(1)..=Duration::from_secs(86_400);
    if range.contains(&age) && age.subsec_nanos() == 0 {
        Ok(age)
    } else {
        Err("must be whole seconds from 1s to 24h".into())
    }
}

pub fn redis_timeout(value: &Value) -> Result<Duration, String> {
    let timeout = duration(value)?;
    let range = Duration::from_millis(50)..=Duration::from_secs(10);
    if range.contains(&timeout) { Ok(timeout) } else { Err("must be from 50ms to 10s".into()) }
}

/// A variable has it as a text.
pub fn count(value: &Value) -> Result<u64, String> {
    let number = match value {
        Value::Integer(number) => u64::try_from(*number).ok(),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    number.ok_or_else(|| format!("{value} is not a whole number, 0 or more"))
}

pub fn retention(value: &Value) -> Result<Duration, String> {
    let kept = duration(value)?;
    if kept >= Duration::from_secs(86_400) { Ok(kept) } else { Err("must be at least 1d".into()) }
}

pub fn personal_data(value: &Value) -> Result<PersonalData, String> {
    match text(value)? {
        "sealed" => Ok(PersonalData::Sealed),
        "plain" => Ok(PersonalData::Plain),
        other => Err(format!("{other:?} is neither \"sealed\" nor \"plain\"")),
    }
}

pub fn durability(value: &Value) -> Result<Durability, String> {
    match text(value)? {
        "local" => Ok(Durability::Local),
        "replicated" => Ok(Durability::Replicated),
        other => Err(format!("{other:?} is neither \"local\" nor \"replicated\"")),
    }
}

pub fn ttl(value: &Value) -> Result<Duration, String> {
    let ttl = duration(value)?;
    let range = Duration::from_secs(60)..=Duration::from_secs(10 * 366 * 86_400);
    if range.contains(&ttl) { Ok(ttl) } else { Err("must be from 1m to 10 years".into()) }
}

pub fn algorithm(value: &Value) -> Result<Algorithm, String> {
    let text = text(value)?;
    Algorithm::from_name(text).ok_or_else(|| format!("{text:?} is none of \"ES256\", \"EdDSA\", \"HS256\""))
}

/// From 0 to 1; a variable has it as a text.
#[allow(clippy::cast_precision_loss)]
pub fn share(value: &Value) -> Result<f64, String> {
    let number = match value {
        Value::Float(number) => Some(*number),
        Value::Integer(number) => Some(*number as f64),
        Value::String(text) => text.parse().ok(),
        _ => None,
    };
    number
        .filter(|share| (0.0..=1.0).contains(share))
        .ok_or_else(|| format!("{value} is not a share from 0 to 1"))
}

pub fn log_format(value: &Value) -> Result<LogFormat, String> {
    match text(value)? {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(format!("{other:?} is neither \"text\" nor \"json\"")),
    }
}

pub fn requests_per_hour(value: &Value) -> Result<Option<u64>, String> {
    match value.as_integer() {
        Some(-1) => Ok(None),
        Some(limit) => {
            u64::try_from(limit).map(Some).map_err(|_| "must be -1 (unlimited) or 0 and more".into())
        }
        None => Err(format!("{value} is not a whole number; -1 is unlimited")),
    }
}

pub fn words(value: &Value) -> Result<Vec<String>, String> {
    let list = value.as_array().ok_or_else(|| format!("{value} is not a list of texts"))?;
    list.iter().map(identifier).collect()
}

pub fn scopes(value: &Value) -> Result<Vec<String>, String> {
    let words = words(value)?;
    match words.iter().find(|scope| !token::is_scope(scope)) {
        None => Ok(words),
        Some(bad) => Err(format!("{bad:?} is no scope (RFC 6749 section 3.3)")),
    }
}

/// The guard's reaction to a breach.
pub fn on_breach(value: &toml::Value) -> Result<OnBreach, String> {
    match value.as_str() {
        Some("previous") => Ok(OnBreach::Previous),
        Some("off") => Ok(OnBreach::Off),
        Some("hold") => Ok(OnBreach::Hold),
        _ => Err(format!("{value} is none of previous, off and hold")),
    }
}
