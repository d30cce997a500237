//! Tokens that this worker verified before, so that a known key costs no signature.
//!
//! Only good tokens are remembered, so a flood of forged ones neither fills the cache nor pushes a good
//! one out. What is remembered is that these bytes were signed by that key; whether the key still counts
//! is asked on every request.

use std::collections::HashMap;
use std::sync::Arc;

use ahash::RandomState;

use crate::decide::limits::Accounts;
use crate::decide::rollout::Subject;
use crate::revocation::Fingerprint;
use crate::token::Claims;

/// Bytes that an entry takes besides the token and its claims: slot, map entry and allocations, about.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// So many bytes at the end of a token are hashed to look it up: 24 of its signature. All of it is compared then.
const MARKED_BYTES: usize = 32;

/// A token whose signature was verified.
#[derive(Debug, PartialEq, Eq)]
pub struct Verified {
    /// The header's key id.
    pub kid: String,
    /// Which key verified it, see [`crate::decide::rules::Verifier::tag`].
    pub key_tag: u64,
    /// What was signed.
    pub claims: Claims,
    /// What revocation knows it by.
    pub fingerprint: Fingerprint,
    /// What a rollout draws it by, see [`Subject`].
    pub subject: u64,
    /// The accounts that its requests are counted in, so that a known key costs no hash.
    pub accounts: Accounts,
}

impl Verified {
    /// Of a token that was read and whose signature was verified by the key with this tag. `subject` is the hash of
    /// its [`Subject`], where that was needed before.
    pub fn new(kid: String, key_tag: u64, claims: Claims, subject: Option<u64>) -> Self {
        let fingerprint = claims.fingerprint();
        let subject = subject.unwrap_or_else(|| Subject::of_key(claims.own.as_deref(), &claims.sub).hash);
        let accounts = claims.holder().accounts();
        Self { kid, key_tag, claims, fingerprint, subject, accounts }
    }

    fn bytes(&self) -> usize {
        let claims = &self.claims;
        [
            self.kid.len(),
            claims.iss.len(),
            claims.sub.len(),
            claims.jti.len(),
            claims.role.len(),
            claims.scope.len(),
            claims.aud.as_ref().map_or(0, String::len),
            claims.own.as_ref().map_or(0, String::len),
            claims.lrole.as_ref().map_or(0, String::len),
        ]
        .into_iter()
        .fold(size_of::<Self>(), usize::saturating_add)
    }
}

/// A cache bounded by bytes; the clock algorithm (Corbató, 1968) chooses what leaves.
#[derive(Debug)]
pub struct TokenCache {
    slots: Vec<Slot>,
    /// The place of each in `slots`, by its mark.
    places: HashMap<u64, usize, RandomState>,
    /// Random keys per process: tokens are chosen by clients.
    hasher: RandomState,
    hand: usize,
    bytes: usize,
    max_bytes: usize,
    looks: Looks,
}

/// How often a token was looked for, and found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Looks {
    /// Verified before.
    pub hits: u64,
    /// To be verified.
    pub misses: u64,
}

/// Where a token is in the cache, until that changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place(usize);

#[derive(Debug)]
struct Slot {
    mark: u64,
    token: Box<[u8]>,
    verified: Arc<Verified>,
    bytes: usize,
    used: bool,
}

impl TokenCache {
    /// A cache of at most `max_bytes`; with 0 it remembers nothing.
    #[expect(
        clippy::disallowed_methods,
        reason = "no decision depends on it; clients must not choose what collides"
    )]
    pub fn new(max_bytes: usize) -> Self {
        Self {
            slots: Vec::new(),
            places: HashMap::default(),
            hasher: RandomState::new(),
            hand: 0,
            bytes: 0,
            max_bytes,
            looks: Looks::default(),
        }
    }

    /// Bytes that it holds, about.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Tokens that it holds.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Where the token of exactly these bytes is, if it was verified before.
    pub fn find(&self, token: &[u8]) -> Option<Place> {
        let place = *self.places.get(&self.mark(token))?;
        self.slots.get(place).filter(|slot| same(&slot.token, token)).map(|_| Place(place))
    }

    /// What stands at a place.
    pub fn at(&self, place: Place) -> Option<&Verified> {
        self.slots.get(place.0).map(|slot| &*slot.verified)
    }

    /// Takes what was found, or not: it is counted, and stays for longer.
    pub fn take(&mut self, found: Option<Place>) -> Option<Arc<Verified>> {
        let slot = found.and_then(|place| self.slots.get_mut(place.0));
        let count = if slot.is_some() { &mut self.looks.hits } else { &mut self.looks.misses };
        *count = count.saturating_add(1);
        let slot = slot?;
        slot.used = true;
        Some(Arc::clone(&slot.verified))
    }

    /// How often a token was looked for since this was asked last.
    pub fn take_looks(&mut self) -> Looks {
        std::mem::take(&mut self.looks)
    }

    /// Remembers a verified token.
    pub fn insert(&mut self, token: &[u8], verified: Arc<Verified>) {
        let bytes = token.len().saturating_add(verified.bytes()).saturating_add(ENTRY_OVERHEAD_BYTES);
        let mark = self.mark(token);
        // Of two with the same mark the first one stays: there are no two signatures that end alike but by forgery.
        if bytes > self.max_bytes || self.places.contains_key(&mark) {
            return;
        }
        while self.bytes.saturating_add(bytes) > self.max_bytes {
            self.evict();
        }
        self.places.insert(mark, self.slots.len());
        self.slots.push(Slot { mark, token: token.into(), verified, bytes, used: false });
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Forgets a token, for instance since it has expired.
    pub fn remove(&mut self, token: &[u8]) {
        if let Some(place) = self.find(token) {
            self.remove_slot(place.0);
        }
    }

    /// What a token is looked up by: the hash of its end, which is of its signature, and differs where anything does.
    fn mark(&self, token: &[u8]) -> u64 {
        let end = token.len().saturating_sub(MARKED_BYTES);
        self.hasher.hash_one(token.get(end..))
    }

    fn evict(&mut self) {
        // Twice around at most: the first pass clears every mark.
        for _ in 0..=self.slots.len().saturating_mul(2) {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            match self.slots.get_mut(self.hand) {
                Some(slot) if slot.used => {
                    slot.used = false;
                    self.hand = self.hand.saturating_add(1);
                }
                _ => return self.remove_slot(self.hand),
            }
        }
    }

    fn remove_slot(&mut self, position: usize) {
        if position >= self.slots.len() {
            self.bytes = 0; // Nothing is left to evict.
            return;
        }
        let slot = self.slots.swap_remove(position);
        self.places.remove(&slot.mark);
        self.bytes = self.bytes.saturating_sub(slot.bytes);
        if let Some(moved) = self.slots.get(position) {
            self.places.insert(moved.mark, position);
        }
    }
}

/// Whether both are the same bytes; by words, four at a time, since WebAssembly's `memcmp` goes by bytes.
fn same(one: &[u8], other: &[u8]) -> bool {
    let (ones, one_rest) = one.as_chunks::<32>();
    let (others, other_rest) = other.as_chunks::<32>();
    let differ = |one: &[u8; 32], other: &[u8; 32]| {
        let (ones, _) = one.as_chunks::<8>();
        let (others, _) = other.as_chunks::<8>();
        let pairs = ones.iter().zip(others);
        pairs.fold(0, |all, (one, other)| all | (u64::from_le_bytes(*one) ^ u64::from_le_bytes(*other))) != 0
    };
    one.len() == other.len()
        && !ones.iter().zip(others).any(|(one, other)| differ(one, other))
        && one_rest == other_rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn verified(jti: &str) -> Arc<Verified> {
        let claims = Claims {
            iss: "keygate".into(),
            sub: "key".into(),
            jti: jti.into(),
            iat: 0,
            exp: 1,
            nbf: None,
            aud: None,
            role: "basic".into(),
            scope: String::new(),
            own: None,
            lrole: None,
        };
        Arc::new(Verified::new("k1".into(), 1, claims, None))
    }

    fn get(cache: &mut TokenCache, token: &[u8]) -> Option<Arc<Verified>> {
        let found = cache.find(token);
        cache.take(found)
    }

    #[test]
    fn the_bound_is_kept_and_what_is_used_stays() {
        let mut cache = TokenCache::new(10_000);
        cache.insert(b"hot", verified("hot"));
        for n in 0..1_000 {
            cache.insert(format!("token-{n}").as_bytes(), verified("cold"));
            assert!(get(&mut cache, b"hot").is_some(), "evicted at {n}");
            assert!(cache.bytes() <= 10_000);
        }
        assert!(cache.len() > 10);
        assert!(get(&mut cache, b"token-0").is_none());
        assert!(get(&mut cache, b"token-999").is_some());
    }

    #[test]
    fn with_no_room_nothing_is_remembered() {
        let mut cache = TokenCache::new(0);
        cache.insert(b"a", verified("a"));
        assert!(cache.is_empty() && get(&mut cache, b"a").is_none());
    }

    #[test]
    fn a_token_that_ends_like_another_is_not_taken_for_it() {
        let end = "s".repeat(MARKED_BYTES);
        let token = |head: &str| format!("{head}.{end}").into_bytes();
        let mut cache = TokenCache::new(10_000);
        cache.insert(&token("one"), verified("one"));
        cache.insert(&token("two"), verified("two"));
        assert_eq!(get(&mut cache, &token("one")).unwrap().claims.jti, "one");
        for other in [token("two"), token("onf"), end.into_bytes(), Vec::new()] {
            assert!(get(&mut cache, &other).is_none());
            cache.remove(&other);
        }
        assert_eq!(cache.len(), 1);
    }

    proptest! {
        #[test]
        fn two_are_the_same_as_slices_are(one in prop::collection::vec(0u8..2, 0..80), other in prop::collection::vec(0u8..2, 0..80)) {
            prop_assert_eq!(same(&one, &other), one == other);
            prop_assert!(same(&one, &one.clone()));
            for place in 0..one.len() {
                let mut changed = one.clone();
                changed[place] ^= 1;
                prop_assert!(!same(&one, &changed));
            }
        }

        #[test]
        fn a_token_finds_itself_or_nothing(steps in prop::collection::vec((0u8..3, 0u8..40), 0..400)) {
            let mut cache = TokenCache::new(6_000);
            for (step, n) in steps {
                let token = format!("token-{n}");
                match step {
                    0 => cache.insert(token.as_bytes(), verified(&token)),
                    1 => cache.remove(token.as_bytes()),
                    _ => {
                        if let Some(found) = get(&mut cache, token.as_bytes()) {
                            prop_assert_eq!(&found.claims.jti, &token);
                        }
                    }
                }
                prop_assert!(cache.bytes() <= 6_000);
                prop_assert_eq!(cache.places.len(), cache.slots.len());
                prop_assert_eq!(cache.bytes, cache.slots.iter().map(|s| s.bytes).sum::<usize>());
            }
        }
    }
}
