//! What proxies count, and how the control plane gets it exactly once.
//!
//! Each VM counts in its own memory ([`Tally`]). Now and then it writes its sums to shared data ([`ledger`]), where
//! they outlive it. The leader adds up what all VMs of the process wrote and reports it ([`Report`]).
//!
//! Every number only grows for as long as the process lives. A report says of each how much was acknowledged, by
//! whatever control plane, and how much it is now; the control plane counts what is beyond the greater of that and of
//! what it has counted itself. So a report that is sent again counts nothing twice, whoever sends it, and a proxy
//! that goes over to another control plane brings nothing along that the first one has counted.

pub mod ledger;
mod tally;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

pub use self::tally::{Awaited, Stopwatch, Tally};
use crate::decide::Reason;
use crate::decide::rollout::ApiVersion;

/// The upper bounds of the buckets of times, in nanoseconds: from what a token that was verified before takes to what
/// nobody should wait for. What is above the last has a bucket of its own.
pub const BOUNDS_NS: [u64; 16] = [
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
];
/// The number of buckets.
pub const BUCKETS: usize = BOUNDS_NS.len() + 1;

/// The most numbers of a report; more of them are for the next.
pub const MAX_REPORTED: usize = 2_000;
/// The most bytes of a series' name. A route's has 64, a role's 256.
pub const MAX_SERIES_BYTES: usize = 400;

/// What the time of is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Timing {
    /// A decision, from the request's headers to what is done with them.
    Validation,
    /// The part of it in which the token is read and verified, or found to be remembered.
    Decode,
}

impl Timing {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Validation, Self::Decode];

    const fn label(self) -> &'static str {
        match self {
            Self::Validation => "validation",
            Self::Decode => "decode",
        }
    }
}

/// What an upstream answered, where that tells of trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Trouble {
    /// A status of 500 or more, also of Envoy itself when the upstream could not be reached.
    Error,
    /// 401, 403 or 429: V1 refuses a key.
    Denied,
}

impl Trouble {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Error, Self::Denied];

    /// What a status is of.
    pub const fn of(status: u16) -> Option<Self> {
        match status {
            500.. => Some(Self::Error),
            401 | 403 | 429 => Some(Self::Denied),
            _ => None,
        }
    }

    /// Its name in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Denied => "denied",
        }
    }
}

/// How often something took how long.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// How often it took up to each of [`BOUNDS_NS`] and longer than the one before; at last, longer than all.
    pub buckets: [u64; BUCKETS],
    /// All of the time together, nanoseconds.
    pub sum_ns: u64,
}

impl Times {
    /// Adds a time.
    pub fn add(&mut self, ns: u64) {
        let bucket = bucket_of(ns);
        if let Some(count) = self.buckets.get_mut(bucket) {
            *count = count.saturating_add(1);
        }
        self.sum_ns = self.sum_ns.saturating_add(ns);
    }
}

/// The bucket that a time belongs to.
pub fn bucket_of(ns: u64) -> usize {
    BOUNDS_NS.partition_point(|bound| *bound < ns)
}

/// What a number is of. Its text is its name wherever numbers are kept or sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Series<'s> {
    /// Decisions on requests.
    Decision {
        /// Precisely why.
        reason: Reason,
        /// The route's name; empty when none matched.
        route: &'s str,
        /// The key's role; empty when there is no key whose signature is verified.
        role: &'s str,
    },
    /// Answers of an upstream to requests that passed.
    Answer {
        /// Which upstream.
        version: ApiVersion,
        /// What it answered.
        trouble: Trouble,
        /// The route's name.
        route: &'s str,
    },
    /// Times within one bucket.
    Bucket {
        /// Of what.
        timing: Timing,
        /// Which bucket.
        bucket: usize,
    },
    /// All of a time together, nanoseconds.
    TimeSum {
        /// Of what.
        timing: Timing,
    },
}

impl fmt::Display for Series<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decision { reason, route, role } => {
                write!(f, "decision {} {} {}", reason.label(), word(route), word(role))
            }
            Self::Answer { version, trouble, route } => {
                write!(f, "answer {} {} {}", version.label(), trouble.label(), word(route))
            }
            Self::Bucket { timing, bucket } => write!(f, "time {} {bucket}", timing.label()),
            Self::TimeSum { timing } => write!(f, "time {} sum", timing.label()),
        }
    }
}

/// A part of a name. What is no word in it is nothing, so that a name always has its parts.
fn word(text: &str) -> &str {
    if text.bytes().all(|byte| byte.is_ascii_graphic()) { text } else { "" }
}

impl<'s> Series<'s> {
    /// The series of a name; `None` for one that is not known here, as of a newer filter.
    pub fn of(name: &'s str) -> Option<Self> {
        let mut parts = name.split(' ');
        let (kind, first, second, third) = (parts.next()?, parts.next()?, parts.next()?, parts.next());
        if parts.next().is_some() {
            return None;
        }
        match (kind, third) {
            ("decision", Some(role)) => {
                let reason = Reason::ALL.into_iter().find(|reason| reason.label() == first)?;
                Some(Self::Decision { reason, route: second, role })
            }
            ("answer", Some(route)) => {
                let version = [ApiVersion::V1, ApiVersion::V2].into_iter().find(|v| v.label() == first)?;
                let trouble = Trouble::ALL.into_iter().find(|trouble| trouble.label() == second)?;
                Some(Self::Answer { version, trouble, route })
            }
            ("time", None) => {
                let timing = Timing::ALL.into_iter().find(|timing| timing.label() == first)?;
                if second == "sum" {
                    return Some(Self::TimeSum { timing });
                }
                let bucket = second.parse().ok().filter(|bucket| *bucket < BUCKETS)?;
                Some(Self::Bucket { timing, bucket })
            }
            _ => None,
        }
    }
}

/// Numbers by the names of their series.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counts(BTreeMap<String, u64>);

impl Counts {
    /// The number of a series; 0 when there is none.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, number)| (name.as_str(), *number))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// So many more of a series.
    pub fn add(&mut self, name: String, number: u64) {
        if number > 0 {
            let sum = self.0.entry(name).or_default();
            *sum = sum.saturating_add(number);
        }
    }

    /// All of `others` more.
    pub fn add_all(&mut self, others: &Self) {
        for (name, number) in others.iter() {
            self.add(name.to_owned(), number);
        }
    }

    /// Makes a number as great as `number`, if it is not.
    pub fn raise(&mut self, name: &str, number: u64) {
        match self.0.get_mut(name) {
            Some(known) => *known = number.max(*known),
            None if number > 0 => drop(self.0.insert(name.to_owned(), number)),
            None => {}
        }
    }

    /// What is here beyond `before`.
    pub fn since(&self, before: &Self) -> Self {
        let beyond =
            self.iter().map(|(name, number)| (name.to_owned(), number.saturating_sub(before.get(name))));
        Self(beyond.filter(|(_, number)| *number > 0).collect())
    }

    /// The bytes that shared data hold.
    fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// Of what somebody wrote who is none of us, nothing counts.
    fn decode(bytes: &[u8]) -> Self {
        serde_json::from_slice(bytes).unwrap_or_default()
    }
}

/// What a proxy tells of itself: `POST /sync/v1/report`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`crate::sync::wire::FORMAT`].
    pub format: u32,
    /// Envoy's `node.id`.
    pub proxy: String,
    /// Tells a restarted proxy from the one before: all numbers of it begin with 0.
    pub incarnation: String,
    /// Of each series that has grown: what was acknowledged, and what it is now.
    pub counts: BTreeMap<String, (u64, u64)>,
}

/// What is answered to a [`Report`]: all of it is counted and kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// When to report again, if there is something new, in milliseconds.
    pub again_ms: u64,
}

/// What has grown beyond what was acknowledged, as a report has it.
pub fn grown(counts: &Counts, acknowledged: &Counts) -> BTreeMap<String, (u64, u64)> {
    let grown = counts.iter().map(|(name, number)| (name, acknowledged.get(name), number));
    let grown = grown.filter(|(_, before, now)| before < now);
    grown.take(MAX_REPORTED).map(|(name, before, now)| (name.to_owned(), (before, now))).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_name_is_read_as_it_was_written() {
        let mut all = vec![
            Series::Decision { reason: Reason::Allowed, route: "chat", role: "basic" },
            Series::Decision { reason: Reason::NoRoute, route: "", role: "" },
            Series::Answer { version: ApiVersion::V1, trouble: Trouble::Denied, route: "chat" },
            Series::Answer { version: ApiVersion::V2, trouble: Trouble::Error, route: "" },
        ];
        for timing in Timing::ALL {
            all.push(Series::TimeSum { timing });
            all.extend((0..BUCKETS).map(|bucket| Series::Bucket { timing, bucket }));
        }
        for series in all {
            assert_eq!(Series::of(&series.to_string()), Some(series));
        }
        let odd = Series::Decision { reason: Reason::Revoked, route: "chat", role: "a b\n" }.to_string();
        assert_eq!(odd, "decision revoked chat ");
    }

    #[test]
    fn what_is_no_name_is_none() {
        for name in [
            "",
            "decision",
            "decision allowed a",
            "decision well a b",
            "time validation 17",
            "time x 1",
            "answer v3 error a",
            "answer v1 well a",
        ] {
            assert_eq!(Series::of(name), None, "{name}");
        }
        assert_eq!(Series::of("decision allowed a b c"), None);
        assert_eq!(Series::of("time validation -1"), None);
    }

    #[test]
    fn a_time_goes_to_the_first_bucket_that_holds_it() {
        for (ns, bucket) in
            [(0, 0), (1_000, 0), (1_001, 1), (100_000_000, 15), (100_000_001, 16), (u64::MAX, 16)]
        {
            let mut times = Times::default();
            times.add(ns);
            assert_eq!((times.buckets[bucket], times.sum_ns), (1, ns));
        }
    }

    #[test]
    fn a_report_is_this_json() {
        let mut counts = Counts::default();
        counts.add("decision allowed chat basic".into(), 3);
        counts.add("decision revoked chat basic".into(), 1);
        let mut acknowledged = Counts::default();
        acknowledged.raise("decision allowed chat basic", 1);
        acknowledged.raise("decision revoked chat basic", 1);
        let report = Report {
            format: 1,
            proxy: "edge-1".into(),
            incarnation: "0f".into(),
            counts: grown(&counts, &acknowledged),
        };
        let json = r#"{"format":1,"proxy":"edge-1","incarnation":"0f","counts":{"decision allowed chat basic":[1,3]}}"#;
        assert_eq!(serde_json::to_string(&report).unwrap(), json);
        assert_eq!(serde_json::from_str::<Report>(json).unwrap(), report);
    }

    proptest! {
        #[test]
        fn any_text_is_a_name_or_none(text in ".{0,60}") {
            if let Some(series) = Series::of(&text) {
                prop_assert_eq!(Series::of(&series.to_string()).is_some(), true);
            }
        }

        #[test]
        fn what_is_beyond_and_what_was_before_make_the_whole(
            before in prop::collection::btree_map("[a-c]", 0u64..9, 0..4),
            more in prop::collection::btree_map("[a-c]", 0u64..9, 0..4),
        ) {
            let before = Counts(before.into_iter().filter(|(_, n)| *n > 0).collect());
            let mut whole = before.clone();
            whole.add_all(&Counts(more));
            let mut again = before.clone();
            again.add_all(&whole.since(&before));
            prop_assert_eq!(again, whole);
        }
    }
}
