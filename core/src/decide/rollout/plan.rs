//! A rollout as it is asked.

use std::collections::{BTreeMap, BTreeSet};

use super::subject::{Domain, Subject};
use super::{ApiVersion, FULL_SHARE, Gradual, Rollout, Strategy};
use crate::decide::policy;

/// A rollout, ready for requests. It is made once for each change of the rules; asking it allocates nothing,
/// but for a path with percent signs where paths are enabled.
#[derive(Debug, Clone)]
pub struct Plan {
    settled: bool,
    strategy: Strategy,
    /// Of every strategy but `gradual`.
    share: u32,
    /// Only where the strategy is `gradual`.
    gradual: Option<Gradual>,
    salt: u64,
    v1_retired: bool,
    /// Both empty: every endpoint.
    routes: BTreeSet<String>,
    paths: Vec<String>,
    /// In order, not hashed: the list is short, and owners are long.
    users: BTreeMap<String, Listed>,
}

impl Plan {
    /// Makes ready a rollout that [`Rollout::validate`] found nothing wrong with.
    pub fn new(rollout: &Rollout) -> Self {
        let mut users: BTreeMap<String, Listed> = BTreeMap::new();
        for user in &rollout.canary_users {
            users.entry(user.clone()).or_default().canary = true;
        }
        for (user, version) in &rollout.override_users {
            users.entry(user.clone()).or_default().fixed = Some(*version);
        }
        let (paths, routes): (Vec<String>, Vec<String>) =
            rollout.enabled_endpoints.iter().cloned().partition(|endpoint| endpoint.starts_with('/'));
        Self {
            settled: rollout.is_settled(),
            strategy: rollout.strategy,
            share: match rollout.strategy {
                Strategy::Off | Strategy::Canary | Strategy::Gradual => 0,
                Strategy::Percentage => rollout.share.min(FULL_SHARE),
                Strategy::Full => FULL_SHARE,
            },
            gradual: rollout.gradual.clone().filter(|_| rollout.strategy == Strategy::Gradual),
            salt: Domain::Salt.hash(rollout.salt.as_bytes()),
            v1_retired: rollout.v1_retired,
            routes: routes.into_iter().collect(),
            paths,
            users,
        }
    }

    /// Whether every request goes to V2 and nobody need be asked about, see [`Rollout::is_settled`].
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// The strategy.
    pub fn strategy(&self) -> Strategy {
        self.strategy
    }

    /// Where a request of this subject goes: endpoint first, then overrides, canary users, strategy.
    /// `route_name` is that of the policy's route that matched, `path` has no query.
    pub fn choose(&self, subject: &Subject<'_>, route_name: Option<&str>, path: &[u8], now_s: u64) -> Choice {
        if self.settled {
            return Choice::v2(Why::Full);
        }
        if !self.enables(route_name, path) {
            return Choice::v1(Why::Endpoint);
        }
        let listed = self.listed(subject);
        if let Some(version) = listed.fixed {
            return Choice { version, why: Why::Override };
        }
        match self.strategy {
            Strategy::Off => Choice::v1(Why::Off),
            Strategy::Full => Choice::v2(Why::Full),
            Strategy::Canary | Strategy::Percentage | Strategy::Gradual if listed.canary => {
                Choice::v2(Why::CanaryUser)
            }
            Strategy::Canary => Choice::v1(Why::NoCanaryUser),
            Strategy::Percentage => self.draw(subject, self.share, Why::Percentage),
            Strategy::Gradual => self.draw(subject, self.share_at(now_s), Why::Gradual),
        }
    }

    /// Where a request goes whose credential is no key of Keygate: to V1 until V1 is retired, and after that
    /// too where V1 serves everybody, which is an endpoint that is not migrated and strategy `off`.
    pub fn for_legacy(&self, route_name: Option<&str>, path: &[u8]) -> Choice {
        if !self.enables(route_name, path) {
            return Choice::v1(Why::Endpoint);
        }
        match (self.strategy, self.v1_retired) {
            (Strategy::Off, _) => Choice::v1(Why::Off),
            (_, false) => Choice::v1(Why::Legacy),
            (_, true) => Choice::v2(Why::Retired),
        }
    }

    /// The share of subjects that goes to V2 at a time, in 10,000ths, besides canary users and overrides.
    pub fn share_at(&self, now_s: u64) -> u32 {
        self.gradual.as_ref().map_or(self.share, |gradual| gradual.share_at(now_s))
    }

    /// When that share next changes by itself, Unix seconds, and to what; see [`Gradual::next_step`].
    pub fn next_step(&self, now_s: u64) -> Option<(u64, u32)> {
        self.gradual.as_ref()?.next_step(now_s)
    }

    /// Which of [`FULL_SHARE`] buckets a subject is in: it is in every share that is larger.
    pub fn bucket(&self, subject: &Subject<'_>) -> u32 {
        let scaled = u128::from(mix(subject.hash ^ self.salt)).saturating_mul(u128::from(FULL_SHARE));
        // The high half of the product, so less than FULL_SHARE.
        u32::try_from(scaled.wrapping_shr(64)).unwrap_or(FULL_SHARE)
    }

    fn draw(&self, subject: &Subject<'_>, share: u32, why: Why) -> Choice {
        if self.bucket(subject) < share { Choice::v2(why) } else { Choice::v1(why) }
    }

    fn enables(&self, route_name: Option<&str>, path: &[u8]) -> bool {
        if self.routes.is_empty() && self.paths.is_empty() {
            return true;
        }
        if route_name.is_some_and(|name| self.routes.contains(name)) {
            return true;
        }
        if self.paths.is_empty() {
            return false;
        }
        // As the policy reads it; a path that it refuses is no endpoint.
        let Some(path) = policy::canonical_path(path) else { return false };
        self.paths.iter().any(|tree| match path.strip_prefix(tree.as_bytes()) {
            Some(rest) => rest.is_empty() || rest.starts_with(b"/") || tree.ends_with('/'),
            None => false,
        })
    }

    fn listed(&self, subject: &Subject<'_>) -> Listed {
        if self.users.is_empty() {
            return Listed::default();
        }
        let find =
            |name: Option<&str>| name.and_then(|name| self.users.get(name)).copied().unwrap_or_default();
        let (key, owner) = (find(subject.key_id), find(subject.owner));
        Listed { fixed: key.fixed.or(owner.fixed), canary: key.canary || owner.canary }
    }
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The version of the upstream.
    pub version: ApiVersion,
    /// Precisely why; for metrics, logs and explanations.
    pub why: Why,
}

impl Choice {
    /// V2, since there is no migration.
    pub const SETTLED: Self = Self::v2(Why::Full);

    const fn v1(why: Why) -> Self {
        Self { version: ApiVersion::V1, why }
    }

    const fn v2(why: Why) -> Self {
        Self { version: ApiVersion::V2, why }
    }
}

/// Why a request goes where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Why {
    /// V1: the endpoint is none of those that are migrated.
    Endpoint,
    /// The version is fixed for this user.
    Override,
    /// V2: a canary user.
    CanaryUser,
    /// V1: the strategy is `off`.
    Off,
    /// V1: the strategy is `canary`, and this is no canary user.
    NoCanaryUser,
    /// In or out of the share of strategy `percentage`.
    Percentage,
    /// In or out of the share of strategy `gradual` at this time.
    Gradual,
    /// V2: the strategy is `full`.
    Full,
    /// V1: the credential is no key of Keygate, and V1 is not retired.
    Legacy,
    /// V2, which will refuse it: the credential is no key of Keygate, and V1 is retired.
    Retired,
}

impl Why {
    /// All of them, for metrics that exist before they are needed.
    pub const ALL: [Self; 10] = [
        Self::Endpoint,
        Self::Override,
        Self::CanaryUser,
        Self::Off,
        Self::NoCanaryUser,
        Self::Percentage,
        Self::Gradual,
        Self::Full,
        Self::Legacy,
        Self::Retired,
    ];

    /// Its name in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Endpoint => "endpoint",
            Self::Override => "override",
            Self::CanaryUser => "canary_user",
            Self::Off => "off",
            Self::NoCanaryUser => "no_canary_user",
            Self::Percentage => "percentage",
            Self::Gradual => "gradual",
            Self::Full => "full",
            Self::Legacy => "legacy",
            Self::Retired => "retired",
        }
    }

    /// Its place in [`Why::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }
}

/// What the two lists say of one name.
#[derive(Debug, Clone, Copy, Default)]
struct Listed {
    fixed: Option<ApiVersion>,
    canary: bool,
}

/// The finaliser of SplitMix64: a permutation of 64 bits that lets each bit of the input change each bit of
/// the output about half of the time.
pub(super) fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
