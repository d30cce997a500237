//! JSON objects read strictly: a member that stands twice, at any depth and also when one of the two
//! is written with escapes, is an error (RFC 7515 section 4, RFC 7519 section 4 leave it open; we do
//! not). `serde_json` keeps the last one silently, and two readers of one token that keep different
//! ones is how a signed token comes to mean two things.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

/// A JSON value as it stood in the text.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number without sign, fraction or exponent that fits 64 bits.
    Unsigned(u64),
    /// Any other number: negative, with a fraction or an exponent, or out of range.
    OtherNumber,
    /// A string, escapes resolved.
    String(String),
    /// An array.
    Array(Vec<Value>),
    /// An object; the names are distinct.
    Object(Vec<(String, Value)>),
}

/// Why a text is not the JSON object that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("not a JSON object with distinct members")]
pub struct NotAnObject;

/// Reads one JSON object; nothing but white space may follow it.
pub fn object(text: &[u8]) -> Result<Vec<(String, Value)>, NotAnObject> {
    match serde_json::from_slice(text) {
        Ok(Value::Object(members)) => Ok(members),
        _ => Err(NotAnObject),
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without duplicate members")
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Unsigned(value))
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<Value, E> {
        Ok(Value::OtherNumber)
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<Value, E> {
        Ok(Value::OtherNumber)
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E: Error>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut members: Vec<(String, Value)> = Vec::new();
        // A set only once the object is large: a token has a dozen members.
        let mut names = ahash::HashSet::default();
        while let Some((name, value)) = map.next_entry::<String, Value>()? {
            let seen = if members.len() < 16 {
                members.iter().any(|(other, _)| *other == name)
            } else {
                if names.is_empty() {
                    names.extend(members.iter().map(|(other, _)| other.clone()));
                }
                !names.insert(name.clone())
            };
            if seen {
                return Err(A::Error::custom("duplicate member"));
            }
            members.push((name, value));
        }
        Ok(Value::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_member_that_stands_twice_is_refused_wherever_it_is() {
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"\u0061":2}"#,
            r#"{"x":{"a":1,"b":2,"a":3}}"#,
            r#"{"x":[{"a":1,"a":1}]}"#,
        ] {
            assert!(object(text.as_bytes()).is_err(), "{text}");
        }
        let many: Vec<String> = (0..40).map(|i| format!("\"m{i}\":1")).collect();
        assert!(object(format!("{{{}}}", many.join(",")).as_bytes()).is_ok());
        assert!(object(format!("{{{},\"m3\":1}}", many.join(",")).as_bytes()).is_err());
        assert!(object(format!("{{{},\"m39\":1}}", many.join(",")).as_bytes()).is_err());
    }

    #[test]
    fn only_plain_unsigned_integers_count_as_numbers() {
        for (text, want) in [
            ("0", Value::Unsigned(0)),
            ("18446744073709551615", Value::Unsigned(u64::MAX)),
            ("18446744073709551616", Value::OtherNumber),
            ("-1", Value::OtherNumber),
            ("-0", Value::OtherNumber),
            ("1.0", Value::OtherNumber),
            ("1e3", Value::OtherNumber),
        ] {
            let members = object(format!("{{\"n\":{text}}}").as_bytes()).unwrap();
            assert_eq!(members[0].1, want, "{text}");
        }
    }

    #[test]
    fn what_is_no_object_is_an_error_not_a_panic() {
        let deep = "[".repeat(100_000);
        for text in ["", "1", "[]", "{", "{}x", "{\"a\":}", "{\"\\ud800\":1}", &deep] {
            assert!(object(text.as_bytes()).is_err());
        }
        assert!(object(b"{\"a\":\"\xff\"}").is_err());
    }
}
