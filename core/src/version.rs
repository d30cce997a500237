//! Which state a proxy enforces: [`Version`], ordered, never going back.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A version of the enforced state.
///
/// `source` names the line of history (the millisecond at which a control plane's journal began, so a
/// newer line has the larger number), `seq` the change within it. Versions are ordered by source, then
/// seq, and a proxy never takes an older one than it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version {
    /// The line of history, Unix milliseconds of its beginning.
    pub source: u64,
    /// The change within it.
    pub seq: u64,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}.{}", self.source, self.seq)
    }
}

/// A text is no version.
#[derive(Debug, thiserror::Error)]
#[error("not a version: expected hexadecimal source, a dot, decimal sequence number")]
pub struct ParseVersionError;

impl FromStr for Version {
    type Err = ParseVersionError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (source, seq) = text.split_once('.').ok_or(ParseVersionError)?;
        Ok(Self {
            source: u64::from_str_radix(source, 16).map_err(|_| ParseVersionError)?,
            seq: seq.parse().map_err(|_| ParseVersionError)?,
        })
    }
}

// In JSON a version is its text: 64-bit numbers do not survive every JSON reader (RFC 8259 section 6).
impl Serialize for Version {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_source_wins_whatever_the_sequence_number() {
        let old = Version { source: 1, seq: 900 };
        let new = Version { source: 2, seq: 1 };
        assert!(old < new);
        assert!(new < Version { seq: 2, ..new });
    }

    #[test]
    fn text_and_back() {
        let version = Version { source: 0x19ab_cdef, seq: 42 };
        assert_eq!(version.to_string(), "19abcdef.42");
        assert_eq!(version.to_string().parse::<Version>().unwrap(), version);
        for bad in ["", ".", "1", "1.", ".1", "x.1", "1.x", "1.1.1", "1.-1"] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
    }
}
