//! W3C Trace Context: to which request of somebody's system something here belongs, so that they find it in their own logs
//! and we in ours. Traces are passed on and logged, never recorded.
//!
//! ```text
//! traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01
//!              version, trace id, id of the caller's part of it, flags (01: sampled)
//! ```

use std::fmt;
use std::future::Future;

use axum::http::HeaderMap;

use crate::platform::random;

/// The header.
pub const HEADER: &str = "traceparent";
/// All of version 00; later ones begin like it.
const BYTES: usize = 55;
const SAMPLED: u8 = 1;

tokio::task_local! {
    /// What is told of a change is told deep within the handler that made it, which knows nothing of headers.
    static CURRENT: Trace;
}

/// A trace, without the part of it that is ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    id: u128,
    sampled: bool,
}

impl Trace {
    /// One that begins here. Sampled: whoever records traces behind us would leave it out else.
    pub fn begin() -> Self {
        let id = u128::from_be_bytes(random::bytes::<16>());
        Self { id: id.max(1), sampled: true }
    }

    /// That of a request; one that begins here if it has none, more than one, or one that is wrong.
    pub fn of(headers: &HeaderMap) -> Self {
        let mut values = headers.get_all(HEADER).iter();
        match (values.next(), values.next()) {
            (Some(value), None) => Self::read(value.as_bytes()).unwrap_or_else(Self::begin),
            _ => Self::begin(),
        }
    }

    /// Reads a header's value, as strictly as the standard says (section 3.2).
    pub fn read(value: &[u8]) -> Option<Self> {
        let (known, rest) = value.split_at_checked(BYTES)?;
        let mut parts = known.split(|byte| *byte == b'-');
        let mut number = |digits: usize| hex(parts.next().filter(|part| part.len() == digits)?);
        let (version, id, parent, flags) = (number(2)?, number(32)?, number(16)?, number(2)?);
        // Version 00 has nothing more; what others have more begins with a dash.
        let ends_well = if version == 0 { rest.is_empty() } else { rest.first().is_none_or(|b| *b == b'-') };
        let is_one = version != 0xff && id != 0 && parent != 0 && ends_well;
        is_one.then_some(Self { id, sampled: flags & u128::from(SAMPLED) != 0 })
    }

    /// The header's value for something of ours in it, such as a call.
    pub fn part(&self) -> String {
        let ours = u64::from_be_bytes(random::bytes::<8>()).max(1);
        format!("00-{self}-{ours:016x}-{:02x}", u8::from(self.sampled) * SAMPLED)
    }

    /// Does something as a part of it.
    pub async fn with<T>(self, work: impl Future<Output = T>) -> T {
        CURRENT.scope(self, work).await
    }

    /// The one that is worked for, if there is one.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(|trace| *trace).ok()
    }
}

/// Its id, 32 digits.
impl fmt::Display for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.id)
    }
}

/// A number of at most 32 hexadecimal digits, in lower case as the standard wants them.
fn hex(digits: &[u8]) -> Option<u128> {
    let is_digit = |byte: &u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
    let text = digits.iter().all(is_digit).then(|| str::from_utf8(digits).ok())??;
    u128::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    const ID: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    #[test]
    fn what_the_standard_calls_valid_is_taken() {
        for (good, sampled) in [
            (format!("00-{ID}-00f067aa0ba902b7-01"), true),
            (format!("00-{ID}-00f067aa0ba902b7-00"), false),
            (format!("00-{ID}-00f067aa0ba902b7-ff"), true),
            (format!("00-{ID}-00f067aa0ba902b7-02"), false),
            // Of a later version what is known of it.
            (format!("01-{ID}-00f067aa0ba902b7-01"), true),
            (format!("cc-{ID}-00f067aa0ba902b7-01-what-ever"), true),
        ] {
            let trace = Trace::read(good.as_bytes()).unwrap_or_else(|| panic!("{good}"));
            assert_eq!((trace.to_string().as_str(), trace.sampled), (ID, sampled), "{good}");
        }
    }

    #[test]
    fn nothing_else_is() {
        for bad in [
            String::new(),
            ID.to_owned(),
            format!("ff-{ID}-00f067aa0ba902b7-01"),
            format!("0-{ID}-00f067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", ID.to_uppercase()),
            format!("00-{ID}-00F067aa0ba902b7-01"),
            format!("00-{}-00f067aa0ba902b7-01", "0".repeat(32)),
            format!("00-{ID}-0000000000000000-01"),
            format!("00-{ID}-00f067aa0ba902b7-1"),
            format!("00-{ID}-00f067aa0ba902b7-0x"),
            format!("00-{ID}-00f067aa0ba902b7-01-"),
            format!("00-{ID}-00f067aa0ba902b7-01-more"),
            format!("01-{ID}-00f067aa0ba902b7-01more"),
            format!("00_{ID}_00f067aa0ba902b7_01"),
            format!("00-{ID}00f067aa0ba902b7--01"),
            format!(" 00-{ID}-00f067aa0ba902b7-01"),
            format!("00-+{}-00f067aa0ba902b7-01", &ID[1..]),
            format!("00-{ID}-00f067aa0ba902b7-0é"),
        ] {
            assert_eq!(Trace::read(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_part_is_of_the_same_trace_and_another_one_each_time() {
        let trace = Trace::read(format!("00-{ID}-00f067aa0ba902b7-00").as_bytes()).unwrap();
        let (one, other) = (trace.part(), trace.part());
        assert_ne!(one, other);
        for part in [&one, &other] {
            assert_eq!(Trace::read(part.as_bytes()), Some(trace), "{part}");
            assert!(!part.contains("00f067aa0ba902b7"), "the caller's part is not ours");
        }
        let begun = Trace::begin();
        assert_eq!(Trace::read(begun.part().as_bytes()), Some(begun));
    }

    #[test]
    fn of_two_headers_none_counts() {
        let value = HeaderValue::from_str(&format!("00-{ID}-00f067aa0ba902b7-01")).unwrap();
        let mut headers = HeaderMap::new();
        headers.append(HEADER, value.clone());
        assert_eq!(Trace::of(&headers).to_string(), ID);
        headers.append(HEADER, value);
        assert_ne!(Trace::of(&headers).to_string(), ID);
    }
}
