//! Tokens that this worker verified before, so that a known key costs no signature.
//!
//! Only good tokens are remembered, so a flood of forged ones neither fills the cache nor pushes a good
//! one out. What is remembered is that these bytes were signed by that key; whether the key still counts
//! is asked on every request.

use std::sync::Arc;

use ahash::RandomState;

use crate::revocation::Fingerprint;
use crate::rollout::Subject;
use crate::token::Claims;

/// Bytes that an entry takes besides the token and its claims: slot, map entry and allocations, about.
const ENTRY_OVERHEAD_BYTES: usize = 256;

/// A token whose signature was verified.
#[derive(Debug, PartialEq, Eq)]
pub struct Verified {
    /// The header's key id.
    pub kid: String,
    /// Which key verified it, see [`crate::rules::Verifier::tag`].
    pub key_tag: u64,
    /// What was signed.
    pub claims: Claims,
    /// What revocation knows it by.
    pub fingerprint: Fingerprint,
    /// What a rollout draws it by, see [`Subject`].
    pub subject: u64,
    /// What its requests are counted by: the fingerprint of the key's id.
    pub account: u64,
}

impl Verified {
    /// Of a token that was read and whose signature was verified by the key with this tag.
    pub fn new(kid: String, key_tag: u64, claims: Claims) -> Self {
        let fingerprint = claims.fingerprint();
        let subject = Subject::of_key(claims.own.as_deref(), &claims.sub).hash;
        let account = Fingerprint::of(&claims.sub).0;
        Self { kid, key_tag, claims, fingerprint, subject, account }
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
        ]
        .into_iter()
        .fold(size_of::<Self>(), usize::saturating_add)
    }
}

/// A cache bounded by bytes; the clock algorithm (Corbató, 1968) chooses what leaves.
#[derive(Debug)]
pub struct TokenCache {
    slots: Vec<Slot>,
    by_token: std::collections::HashMap<Arc<[u8]>, usize, RandomState>,
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

#[derive(Debug)]
struct Slot {
    token: Arc<[u8]>,
    verified: Arc<Verified>,
    bytes: usize,
    used: bool,
}

impl TokenCache {
    /// A cache of at most `max_bytes`; with 0 it remembers nothing.
    pub fn new(max_bytes: usize) -> Self {
        Self {
            slots: Vec::new(),
            // Random keys per process: tokens are chosen by clients.
            by_token: std::collections::HashMap::with_hasher(RandomState::new()),
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

    /// The token of exactly these bytes, if it was verified before.
    pub fn get(&mut self, token: &[u8]) -> Option<Arc<Verified>> {
        let found = self.by_token.get(token).and_then(|position| self.slots.get_mut(*position));
        let count = if found.is_some() { &mut self.looks.hits } else { &mut self.looks.misses };
        *count = count.saturating_add(1);
        let slot = found?;
        slot.used = true;
        Some(Arc::clone(&slot.verified))
    }

    /// The same without its being counted or kept for longer.
    pub fn peek(&self, token: &[u8]) -> Option<&Arc<Verified>> {
        self.by_token.get(token).and_then(|position| self.slots.get(*position)).map(|slot| &slot.verified)
    }

    /// How often a token was looked for since this was asked last.
    pub fn take_looks(&mut self) -> Looks {
        std::mem::take(&mut self.looks)
    }

    /// Remembers a verified token.
    pub fn insert(&mut self, token: &[u8], verified: Arc<Verified>) {
        let bytes = token.len().saturating_add(verified.bytes()).saturating_add(ENTRY_OVERHEAD_BYTES);
        if bytes > self.max_bytes || self.by_token.contains_key(token) {
            return;
        }
        while self.bytes.saturating_add(bytes) > self.max_bytes {
            self.evict();
        }
        let token: Arc<[u8]> = token.into();
        self.by_token.insert(Arc::clone(&token), self.slots.len());
        self.slots.push(Slot { token, verified, bytes, used: false });
        self.bytes = self.bytes.saturating_add(bytes);
    }

    /// Forgets a token, for instance since it has expired.
    pub fn remove(&mut self, token: &[u8]) {
        if let Some(position) = self.by_token.get(token).copied() {
            self.remove_slot(position);
        }
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
        self.by_token.remove(&slot.token);
        self.bytes = self.bytes.saturating_sub(slot.bytes);
        if let Some(moved) = self.slots.get(position) {
            self.by_token.insert(Arc::clone(&moved.token), position);
        }
    }
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
        };
        Arc::new(Verified::new("k1".into(), 1, claims))
    }

    #[test]
    fn the_bound_is_kept_and_what_is_used_stays() {
        let mut cache = TokenCache::new(10_000);
        cache.insert(b"hot", verified("hot"));
        for n in 0..1_000 {
            cache.insert(format!("token-{n}").as_bytes(), verified("cold"));
            assert!(cache.get(b"hot").is_some(), "evicted at {n}");
            assert!(cache.bytes() <= 10_000);
        }
        assert!(cache.len() > 10);
        assert!(cache.get(b"token-0").is_none());
        assert!(cache.get(b"token-999").is_some());
    }

    #[test]
    fn with_no_room_nothing_is_remembered() {
        let mut cache = TokenCache::new(0);
        cache.insert(b"a", verified("a"));
        assert!(cache.is_empty() && cache.get(b"a").is_none());
    }

    proptest! {
        #[test]
        fn a_token_finds_itself_or_nothing(steps in prop::collection::vec((0u8..3, 0u8..40), 0..400)) {
            let mut cache = TokenCache::new(6_000);
            for (step, n) in steps {
                let token = format!("token-{n}");
                match step {
                    0 => cache.insert(token.as_bytes(), verified(&token)),
                    1 => cache.remove(token.as_bytes()),
                    _ => {
                        if let Some(found) = cache.get(token.as_bytes()) {
                            prop_assert_eq!(&found.claims.jti, &token);
                        }
                    }
                }
                prop_assert!(cache.bytes() <= 6_000);
                prop_assert_eq!(cache.by_token.len(), cache.slots.len());
                prop_assert_eq!(cache.bytes, cache.slots.iter().map(|s| s.bytes).sum::<usize>());
            }
        }
    }
}
