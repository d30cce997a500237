//! Limits of keys: by key, by owner, by role, and for a while by an emergency override; and the accounts in which a
//! [`Meter`] counts what was done. All keys of an owner share the limit of a role.
//!
//! ```text
//! account = first 8 bytes, big-endian, of SHA-256 of its name; parts of a name end with NUL, which no identifier has
//!   "key" NUL id                 the limit of one key
//!   "owner" NUL owner            the limit of an owner
//!   "role" NUL owner NUL role    the limit of a role, for the keys of an owner
//!   "client" NUL …               see client
//! ```

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::decide::client::{self, ClientAddress, DEFAULT_IPV6_PREFIX};
use crate::revocation::Fingerprint;
use crate::token::Claims;

/// The most limits that are named for single keys.
pub const MAX_KEYS: usize = 1_000;
/// The most limits that are named for single owners.
pub const MAX_OWNERS: usize = 1_000;
/// The longest window, in seconds: 31 days.
pub const MAX_WINDOW_S: u32 = 31 * 86_400;
/// The largest limit. What is more is no limit.
pub const MAX_UNITS: u32 = 1_000_000_000;
/// The window of an emergency override, in seconds.
pub const AN_HOUR_S: u32 = 3_600;

/// So many units within any window of that length; a request costs one unless its route says more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// How many, at most [`MAX_UNITS`].
    pub units: u32,
    /// Seconds, 1 to [`MAX_WINDOW_S`].
    pub window_s: u32,
}

impl Limit {
    fn is_valid(self) -> bool {
        self.units <= MAX_UNITS && (1..=MAX_WINDOW_S).contains(&self.window_s)
    }
}

/// The limit of each client on public routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientLimit {
    /// Units, at most [`MAX_UNITS`].
    pub units: u32,
    /// Seconds, 1 to [`MAX_WINDOW_S`].
    pub window_s: u32,
    /// Leading bits of an IPv6 address that make a client, 1 to 128.
    #[serde(default = "default_ipv6_prefix", skip_serializing_if = "is_default_ipv6_prefix")]
    pub ipv6_prefix: u8,
}

const fn default_ipv6_prefix() -> u8 {
    DEFAULT_IPV6_PREFIX
}

// Serde hands over a reference.
#[allow(clippy::trivially_copy_pass_by_ref)]
const fn is_default_ipv6_prefix(prefix: &u8) -> bool {
    *prefix == DEFAULT_IPV6_PREFIX
}

impl ClientLimit {
    /// The limit itself.
    pub const fn limit(self) -> Limit {
        Limit { units: self.units, window_s: self.window_s }
    }

    /// The account of the client with this address; one account for all whose address is not known.
    pub fn account(self, address: Option<ClientAddress<'_>>) -> u64 {
        client::account(ClientAddress::bytes_of(address), self.ipv6_prefix)
    }
}

impl From<Limit> for ClientLimit {
    fn from(Limit { units, window_s }: Limit) -> Self {
        Self { units, window_s, ipv6_prefix: DEFAULT_IPV6_PREFIX }
    }
}

/// Limits in place of the roles' own, for a time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    /// Unix seconds from which on it says nothing more.
    pub until: u64,
    /// By role, units an hour; `None`: unlimited.
    pub roles: BTreeMap<String, Option<u32>>,
}

/// Everybody's limits. A role that is not named has none.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// By role.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub roles: BTreeMap<String, Limit>,
    /// By the key's id, in place of its role's; `None`: unlimited.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub keys: BTreeMap<String, Option<Limit>>,
    /// By owner, shared by its keys, in place of their roles'; `None`: unlimited.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub owners: BTreeMap<String, Option<Limit>>,
    /// Of each client's address on public routes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub public: Option<ClientLimit>,
    /// The owner whose keys have none: of the tests that run all the time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exempt_owner: Option<String>,
    /// In place of the roles', while it lasts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub emergency: Option<Override>,
}

impl Limits {
    /// Whether nobody has any.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The limit of a key at `now`, Unix seconds, and the account that it is counted in; `None`: the key has no limit.
    ///
    /// The first of these counts: the key's own limit, its owner's, that of the key which made it, and that of its
    /// limit role, for a time by an emergency override.
    pub fn of_key(&self, key: Holder<'_>, now: u64) -> Option<(Share, Limit)> {
        if key.owner.is_some() && key.owner == self.exempt_owner.as_deref() {
            return None;
        }
        let effective = key.effective_owner();
        let named = |limits: &BTreeMap<String, Option<Limit>>, name: &str| {
            if limits.is_empty() { None } else { limits.get(name).copied() }
        };
        if let Some(own) = named(&self.keys, key.key_id) {
            return own.map(|limit| (Share::Key, limit));
        }
        if let Some(owners) = named(&self.owners, effective) {
            return owners.map(|limit| (Share::Owner, limit));
        }
        if key.owner.is_some()
            && let Some(makers) = named(&self.keys, effective)
        {
            return makers.map(|limit| (Share::Maker, limit));
        }
        if let Some(emergency) = self.emergency.as_ref().filter(|emergency| now < emergency.until)
            && let Some(units) = emergency.roles.get(key.limit_role)
        {
            return units.map(|units| (Share::Role, Limit { units, window_s: AN_HOUR_S }));
        }
        self.roles.get(key.limit_role).map(|limit| (Share::Role, *limit))
    }

    /// The longest window that is in use, in seconds.
    pub fn longest_window_s(&self) -> u32 {
        self.all().map(|limit| limit.window_s).chain([AN_HOUR_S]).max().unwrap_or(AN_HOUR_S)
    }

    /// All of them but the override's.
    fn all(&self) -> impl Iterator<Item = Limit> {
        let named = self.keys.values().chain(self.owners.values()).flatten();
        self.roles.values().chain(named).copied().chain(self.public.map(ClientLimit::limit))
    }

    /// Whether they can be gone by.
    ///
    /// # Errors
    /// What is wrong.
    pub fn check(&self) -> Result<(), &'static str> {
        if self.keys.len() > MAX_KEYS {
            return Err("limits: at most 1000 keys have one of their own");
        }
        if self.owners.len() > MAX_OWNERS {
            return Err("limits: at most 1000 owners have one of their own");
        }
        if !self.all().all(Limit::is_valid) {
            return Err("limits: at most 1,000,000,000 units in a window of 1 s to 31 days");
        }
        if self.public.is_some_and(|public| !(1..=128).contains(&public.ipv6_prefix)) {
            return Err("limits: an IPv6 prefix has 1 to 128 bits");
        }
        let overrides = self.emergency.iter().flat_map(|emergency| emergency.roles.values().flatten());
        if overrides.into_iter().any(|units| *units > MAX_UNITS) {
            return Err("limits: at most 1,000,000,000 units an hour");
        }
        Ok(())
    }
}

/// The view of a key that limits have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder<'k> {
    /// The key's id.
    pub key_id: &'k str,
    /// Its owner, if it has one.
    pub owner: Option<&'k str>,
    /// The role whose limit holds for it.
    pub limit_role: &'k str,
}

impl<'k> Holder<'k> {
    /// The owner; of a key without one, the key itself.
    pub fn effective_owner(self) -> &'k str {
        self.owner.unwrap_or(self.key_id)
    }

    /// The account of each limit that may hold for the key.
    pub fn accounts(self) -> Accounts {
        let owner = self.effective_owner();
        let key = AccountName::Key(self.key_id).account();
        Accounts {
            key,
            owner: AccountName::Owner(owner).account(),
            maker: if self.owner.is_none() { key } else { AccountName::Key(owner).account() },
            role: AccountName::Role { owner, role: self.limit_role }.account(),
        }
    }
}

impl Claims {
    /// The view of the key that limits have.
    pub fn holder(&self) -> Holder<'_> {
        Holder {
            key_id: &self.sub,
            owner: self.own.as_deref(),
            limit_role: self.lrole.as_deref().unwrap_or(&self.role),
        }
    }
}

/// The origin of a key's limit: it decides which keys share the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// Its own limit, which it shares with none but the keys that it made.
    Key,
    /// Its owner's.
    Owner,
    /// That of the key which made it.
    Maker,
    /// That of its limit role, shared by the owner's keys of that limit role.
    Role,
}

/// The accounts of a key, by the origin of the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Accounts {
    key: u64,
    owner: u64,
    maker: u64,
    role: u64,
}

impl Accounts {
    /// The account that a limit of this origin is counted in.
    pub const fn of(self, share: Share) -> u64 {
        match share {
            Share::Key => self.key,
            Share::Owner => self.owner,
            Share::Maker => self.maker,
            Share::Role => self.role,
        }
    }
}

/// The name of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccountName<'n> {
    /// Of the limit of the key with this id.
    Key(&'n str),
    /// Of the limit of this owner.
    Owner(&'n str),
    /// Of the limit of a role, for the keys of an owner.
    Role {
        /// The effective owner.
        owner: &'n str,
        /// The limit role.
        role: &'n str,
    },
}

impl AccountName<'_> {
    /// The account of this name.
    pub fn account(self) -> u64 {
        let name = match self {
            Self::Key(id) => format!("key\0{id}"),
            Self::Owner(owner) => format!("owner\0{owner}"),
            Self::Role { owner, role } => format!("role\0{owner}\0{role}"),
        };
        Fingerprint::of(&name).0
    }
}

/// What is left of a limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Left {
    /// The limit.
    pub limit: Limit,
    /// Units that are left, as far as is known here.
    pub remaining: u32,
    /// Seconds until there are more, at least 1.
    pub reset_s: u64,
}

/// What a meter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metered {
    /// It is within the limit, and was counted.
    Within(Left),
    /// It is not.
    Beyond(Left),
    /// Units are left in the fleet, but not at this proxy yet: they come within a second.
    Pending(Left),
    /// It is not known: what was counted cannot be read, or this proxy has no part of the limit yet.
    Unknown,
    /// Nobody counts here.
    Not,
}

/// Counts what is done.
pub trait Meter {
    /// Counts a request that costs `cost` of `account`, if it is within the limit.
    fn spend(&mut self, account: u64, limit: Limit, cost: u32) -> Metered;
}

/// Counts nothing: where a decision is asked for and nothing is done.
impl Meter for () {
    fn spend(&mut self, _: u64, _: Limit, _: u32) -> Metered {
        Metered::Not
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        serde_json::from_str(
            r#"{"roles":{"basic":{"units":100,"window_s":3600},"fast":{"units":50,"window_s":1}},
                "keys":{"key_1":{"units":5,"window_s":60},"key_2":null},
                "emergency":{"until":1000,"roles":{"basic":1000,"fast":null}}}"#,
        )
        .unwrap()
    }

    fn holder<'k>(key_id: &'k str, owner: Option<&'k str>, limit_role: &'k str) -> Holder<'k> {
        Holder { key_id, owner, limit_role }
    }

    #[test]
    fn a_keys_own_limit_counts_before_an_override_and_that_before_its_roles() {
        let limits = limits();
        let of = |key: &str, role: &str, now| {
            let of_key = limits.of_key(holder(key, Some("me"), role), now);
            of_key.map(|(share, limit)| (share, limit.units, limit.window_s))
        };
        assert_eq!(of("key_1", "basic", 0), Some((Share::Key, 5, 60)));
        assert_eq!(of("key_2", "basic", 0), None);
        assert_eq!(of("key_3", "basic", 999), Some((Share::Role, 1_000, 3_600)));
        assert_eq!(of("key_3", "basic", 1_000), Some((Share::Role, 100, 3_600)), "it ends by itself");
        assert_eq!(of("key_3", "fast", 999), None);
        assert_eq!(of("key_3", "fast", 1_000), Some((Share::Role, 50, 1)));
        assert_eq!(of("key_3", "admin", 0), None);
        assert_eq!(limits.longest_window_s(), 3_600);
        let exempt = Limits { exempt_owner: Some("me".into()), ..limits };
        assert_eq!(exempt.of_key(holder("key_3", Some("me"), "basic"), 0), None);
        assert!(exempt.of_key(holder("key_3", None, "basic"), 0).is_some());
        assert!(exempt.of_key(holder("me", None, "basic"), 0).is_some(), "its owner, not its id");
    }

    #[test]
    fn an_owners_limit_counts_before_its_makers_and_a_keys_own_before_both() {
        let mut limits = limits();
        limits.owners.insert("acme".into(), Some(Limit { units: 7, window_s: 10 }));
        limits.owners.insert("free".into(), None);
        let of = |limits: &Limits, key: &str, owner: Option<&str>| {
            limits.of_key(holder(key, owner, "basic"), 0).map(|(share, limit)| (share, limit.units))
        };
        assert_eq!(of(&limits, "key_9", Some("acme")), Some((Share::Owner, 7)));
        assert_eq!(of(&limits, "key_1", Some("acme")), Some((Share::Key, 5)));
        assert_eq!(of(&limits, "key_9", Some("free")), None);
        assert_eq!(of(&limits, "key_9", Some("key_1")), Some((Share::Maker, 5)), "made by key_1");
        assert_eq!(of(&limits, "key_9", Some("key_2")), None, "made by key_2, which is unlimited");
        assert_eq!(of(&limits, "key_9", Some("other")), Some((Share::Role, 1_000)));
        assert_eq!(of(&limits, "acme", None), Some((Share::Owner, 7)), "a key is its own owner");
        limits.owners.insert("key_1".into(), Some(Limit { units: 8, window_s: 10 }));
        assert_eq!(of(&limits, "key_9", Some("key_1")), Some((Share::Owner, 8)));
    }

    #[test]
    fn accounts_are_shared_by_owner_and_limit_role_and_are_otherwise_distinct() {
        let account = |share, key, owner, role| holder(key, owner, role).accounts().of(share);
        let role = |key, owner, role| account(Share::Role, key, owner, role);
        assert_eq!(role("key_1", None, "basic"), role("key_2", Some("key_1"), "basic"));
        assert_eq!(role("key_1", Some("acme"), "basic"), role("key_2", Some("acme"), "basic"));
        assert_eq!(
            account(Share::Key, "key_1", None, "a"),
            account(Share::Maker, "key_2", Some("key_1"), "b")
        );
        assert_eq!(
            account(Share::Owner, "key_1", Some("acme"), "a"),
            account(Share::Owner, "key_2", Some("acme"), "b")
        );
        let distinct = std::collections::BTreeSet::from([
            role("key_1", None, "basic"),
            role("key_1", None, "other"),
            role("key_2", None, "basic"),
            role("key_1", Some("acme"), "basic"),
            role("x", Some("a"), "b"),
            AccountName::Key("key_1").account(),
            AccountName::Owner("key_1").account(),
            AccountName::Owner("acme").account(),
            AccountName::Key("acme").account(),
            AccountName::Owner("role").account(),
        ]);
        assert_eq!(distinct.len(), 10);
        // The bytes that the ledger of a fleet knows accounts by.
        assert_eq!(AccountName::Key("key_1").account(), Fingerprint::of("key\0key_1").0);
        assert_eq!(role("key_1", Some("acme"), "basic"), Fingerprint::of("role\0acme\0basic").0);
    }

    #[test]
    fn the_limit_of_clients_is_written_as_before_unless_it_has_a_prefix() {
        let before = r#"{"units":3,"window_s":60}"#;
        let limit: ClientLimit = serde_json::from_str(before).unwrap();
        assert_eq!(limit, ClientLimit { units: 3, window_s: 60, ipv6_prefix: 64 });
        assert_eq!(serde_json::to_string(&limit).unwrap(), before);
        let other = ClientLimit { ipv6_prefix: 56, ..limit };
        let written = r#"{"units":3,"window_s":60,"ipv6_prefix":56}"#;
        assert_eq!(serde_json::to_string(&other).unwrap(), written);
        assert_eq!(serde_json::from_str::<ClientLimit>(written).unwrap(), other);
    }

    #[test]
    fn limits_that_cannot_be_are_refused() {
        assert_eq!(limits().check(), Ok(()));
        assert!(!limits().is_empty() && Limits::default().is_empty());
        for (units, window_s) in [(1, 0), (1, MAX_WINDOW_S + 1), (MAX_UNITS + 1, 1)] {
            let mut limits = limits();
            limits.public = Some(Limit { units, window_s }.into());
            assert!(limits.check().is_err(), "{units} {window_s}");
        }
        for (ipv6_prefix, holds) in [(0, false), (1, true), (128, true), (129, false)] {
            let mut limits = limits();
            limits.public = Some(ClientLimit { units: 1, window_s: 1, ipv6_prefix });
            assert_eq!(limits.check().is_ok(), holds, "/{ipv6_prefix}");
        }
        let mut many = limits();
        many.keys = (0..=MAX_KEYS).map(|n| (n.to_string(), None)).collect();
        assert!(many.check().is_err());
        let mut many = limits();
        many.owners = (0..=MAX_OWNERS).map(|n| (n.to_string(), None)).collect();
        assert!(many.check().is_err());
        let mut wrong = limits();
        wrong.owners.insert("acme".into(), Some(Limit { units: 1, window_s: 0 }));
        assert!(wrong.check().is_err());
    }
}
