//! Rotation of signing secrets: make before break. A new secret is made (`rotating`), every live proxy gets to know
//! it, then it signs (`active`), and the one before it goes on verifying for a while (`previous`), and ends
//! (`expired`). `immediate` puts the new one in the old one's place in one version; then nothing is signed until every
//! live proxy knows that version, so that no key is handed out that a proxy would refuse.
//!
//! Each step is decided by what the journal has, so the same steps are made after a crash, or by another control plane.
//! [`crate::services::rotation`] makes them when they are due.

use std::time::Duration;

use keygate_core::decide::cache::Verified;
use keygate_core::decide::rules::MAX_KEYS;
use keygate_core::secret::Secret;
use keygate_core::token::crypto::Algorithm;
use keygate_core::token::jti::JtiKey;

use super::{Plan as PlanOf, keys};
use crate::model::change::{Change, Idempotency};
use crate::model::key::{self, KeyRecord};
use crate::model::roles::Roles;
use crate::model::{RecordsError, SigningKeyPolicy, View};
use crate::secrets::record::Identity;
use crate::secrets::record::ring::Held;
use crate::secrets::record::{HsmPair, NewSecret, Retire, Ring, SecretError, SecretRecord, SecretState};

/// No second rotation is begun within this of the first, and none becomes active: a call that is made again, or by
/// several at once, meets the rotation that is under way, and a proxy that joins at this moment is heard of first.
pub const SETTLE: Duration = Duration::from_secs(1);
/// How long after the end of the last key that it is known to have signed a secret verifies: another control plane
/// may have signed with it for as long as it did not hear that it should not. Seconds.
const LATE_S: u64 = 60 * 60;
/// Why a rotation is begun, if nobody says.
pub const UNSAID: &str = "unspecified";
const MAX_WHY_CHARS: usize = 200;

/// A rotation that is wanted.
#[derive(Debug)]
pub struct Order {
    /// The algorithm of the new secret.
    pub alg: Algorithm,
    /// Whether the old secret ends at once.
    pub immediate: bool,
    /// Why.
    pub why: String,
    /// The new secret's bytes, if it was made elsewhere.
    pub imported: Option<Secret<Vec<u8>>>,
    /// The key pair that the HSM made for it, if one is to keep it.
    pub in_hsm: Option<HsmPair>,
}

/// A rotation that was begun.
#[derive(Debug, Clone)]
pub struct Begun {
    /// The new secret's id.
    pub kid: String,
    /// Its stage.
    pub state: SecretState,
    /// The id of the secret that it takes the place of.
    pub old: String,
    /// The ids of those that ended with it.
    pub ended: Vec<String>,
    /// Whether the same request began it before.
    pub replayed: bool,
    /// What the ids of its tokens are made with.
    pub ids: Option<JtiKey>,
}

/// Why a rotation does not go on.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// Another one is under way.
    #[error("a rotation to {0} is under way; wait for it, or cancel it")]
    InProgress(String),
    /// One was begun a moment ago.
    #[error("a rotation to {0} was begun a moment ago; try again in a second if you want another one")]
    JustBegun(String),
    /// Another control plane begins one at this moment.
    #[error("another control plane begins a rotation at this moment")]
    Elsewhere,
    /// None is under way.
    #[error("no rotation is under way that could be cancelled or activated")]
    None,
    /// It has taken effect.
    #[error("the rotation to {0} has taken effect already; rotate again instead")]
    TooLate(String),
    /// Proxies hold so many at most.
    #[error("{MAX_KEYS} secrets verify already, the most that proxies hold; wait until some have expired")]
    TooMany,
    /// The same `Idempotency-Key` came with another request.
    #[error("this Idempotency-Key was used for another request; choose a new one")]
    KeyReused,
    /// A secret.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// The records cannot be read.
    #[error(transparent)]
    Records(#[from] RecordsError),
}

/// Whether a text says why.
pub fn is_why(text: &str) -> bool {
    (1..=MAX_WHY_CHARS).contains(&text.chars().count()) && !text.chars().any(char::is_control)
}

/// The secret that is made known to proxies: it signs once they know it.
pub fn under_way(ring: &Ring) -> Option<&Held> {
    ring.rotating().or_else(|| ring.active().filter(|active| !ring.is_announced(active)))
}

/// The secret to which a rotation was begun so little time before `now_ms`, Unix milliseconds, that another one is taken
/// for the same; not one that was cancelled, nor one whose clock was ahead.
fn just_begun(ring: &Ring, now_ms: u64) -> Option<&Held> {
    let settle = u64::try_from(SETTLE.as_millis()).unwrap_or(u64::MAX);
    let begun = ring.all().into_iter().filter(|held| held.record.state < SecretState::Expired);
    // What a history begins with has no stamp.
    begun.max_by_key(|held| held.created).filter(|held| {
        let age = now_ms.checked_sub(held.created.stamp);
        held.created.stamp > 0 && age.is_some_and(|age| age < settle)
    })
}

type Plan<T> = PlanOf<T, RotationError>;

/// Begins a rotation.
///
/// # Errors
/// When one is under way, or the secret cannot be made.
pub fn begin(view: &View<'_>, order: Order, request: Option<Idempotency>) -> Plan<Begun> {
    let ring = view.model.secrets();
    let begun = |record: &SecretRecord, replayed| Begun {
        kid: record.kid.clone(),
        state: record.state,
        old: ring.active().map(|old| old.record.kid.clone()).unwrap_or_default(),
        ended: Vec::new(),
        replayed,
        ids: record.jti_key(view.keys),
    };
    if let Some(request) = &request
        && let Some(seen) = view.records.request(&request.request_id)?
    {
        if seen.body != request.body {
            return Err(RotationError::KeyReused);
        }
        if let Some(held) = ring.get(&seen.made) {
            return Ok((Vec::new(), begun(&held.record, true)));
        }
    }
    if let Some(held) = under_way(ring) {
        return Err(RotationError::InProgress(held.record.kid.clone()));
    }
    if let Some(held) = just_begun(ring, view.now_ms) {
        return Err(RotationError::JustBegun(held.record.kid.clone()));
    }
    if ring.verification_keys().len() >= MAX_KEYS {
        return Err(RotationError::TooMany);
    }
    let Order { alg, immediate, why, imported, in_hsm } = order;
    let new = NewSecret {
        alg,
        state: if immediate { SecretState::Active } else { SecretState::Rotating },
        unannounced: immediate,
        why: Some(why),
        in_hsm,
        imported,
    };
    let secret = SecretRecord::make(new, view.keys, view.now)?;
    let mut begun = begun(&secret, false);
    let mut changes = vec![Change::SecretCreated { secret, idempotency: request }];
    if immediate {
        for old in actives(ring) {
            changes.push(moved(old.record.moved(SecretState::Expired, view.now, view.keys)?, None));
            begun.ended.push(old.record.kid.clone());
        }
    }
    Ok((changes, begun))
}

/// A rotation that a caller asks for, and their new key if their own ends with it.
#[derive(Debug)]
pub struct Asked {
    /// The rotation.
    pub begun: Begun,
    /// The caller's new key, not signed yet.
    pub renewed: Option<KeyRecord>,
}

/// Begins a rotation that the holder of a key asks for. If their key ends with its secret, it is renewed: else they would be
/// locked out. `needs_pair`: the HSM keeps new secrets, so one without its key pair is not begun.
///
/// # Errors
/// As [`begin`]; also when the rotation that was under way as the key pair was not made is over by now.
pub fn ask(
    view: &View<'_>,
    order: Order,
    request: Option<Idempotency>,
    caller: &Verified,
    roles: &Roles,
    needs_pair: bool,
) -> Plan<Asked> {
    let lacks_pair = needs_pair && order.in_hsm.is_none();
    let (mut changes, begun) = begin(view, order, request)?;
    if lacks_pair && !begun.replayed {
        return Err(RotationError::JustBegun(begun.old));
    }
    let ends_caller = begun.ended.contains(&caller.kid);
    let old = if ends_caller { view.key(&caller.claims.sub)? } else { None };
    // Not for a token that was forged in the name of a key.
    let old = old.filter(|old| old.jti == caller.claims.jti && old.revoked.is_none());
    let renewed = old.map(|old| {
        let identity = Identity::new(begun.ids.as_ref());
        let new = key::renewal(&old, roles.get(&old.role), identity, &begun.kid, view.now);
        changes.push(Change::KeyIssued { key: Box::new(new.clone()), idempotency: None });
        changes.push(keys::renewal_of(view, &old, &old.key_id));
        new
    });
    Ok((changes, Asked { begun, renewed }))
}

/// Makes the secret that is `rotating` the one that signs; those that signed verify for as long as `policy` says.
/// With a `justification` nobody was waited for.
///
/// # Errors
/// When `kid` is not that secret any more, or one cannot be sealed anew.
pub fn activate(
    view: &View<'_>,
    policy: &SigningKeyPolicy,
    kid: &str,
    justification: Option<String>,
) -> Plan<()> {
    let ring = view.model.secrets();
    let new = ring.rotating().filter(|held| held.record.kid == kid).ok_or(RotationError::None)?;
    let (now, keys) = (view.now, view.keys);
    let mut changes = vec![moved(new.record.moved(SecretState::Active, now, keys)?, justification)];
    // One that another control plane made and that cannot be opened here stays beside, and signs no more.
    for old in actives(ring).filter(|old| old.is_open()) {
        let retire = policy.retire(old.record.alg);
        changes.push(moved(old.record.retired(retire, policy.end(retire, now), now, keys)?, None));
    }
    Ok((changes, ()))
}

/// Every live proxy knows the secret that is active since an immediate rotation, or is not waited for any more.
///
/// # Errors
/// When `kid` is not that secret any more.
pub fn announce(view: &View<'_>, kid: &str, justification: Option<String>) -> Plan<()> {
    let ring = view.model.secrets();
    let active = ring.active().filter(|held| held.record.kid == kid && !ring.is_announced(held));
    let kid = active.ok_or(RotationError::None)?.record.kid.clone();
    Ok((vec![Change::SecretAnnounced { kid, justification }], ()))
}

/// Goes on with what is under way without waiting for proxies; the secret's id.
///
/// # Errors
/// When nothing is under way.
pub fn force(view: &View<'_>, policy: &SigningKeyPolicy, justification: String) -> Plan<String> {
    let ring = view.model.secrets();
    let (changes, kid) = if let Some(held) = ring.rotating() {
        (activate(view, policy, &held.record.kid, Some(justification))?.0, &held.record.kid)
    } else if let Some(held) = under_way(ring) {
        (announce(view, &held.record.kid, Some(justification))?.0, &held.record.kid)
    } else {
        return Err(RotationError::None);
    };
    Ok((changes, kid.clone()))
}

/// Ends a rotation whose secret has not signed yet; the secret's id.
///
/// # Errors
/// When there is none.
pub fn cancel(view: &View<'_>) -> Plan<String> {
    let ring = view.model.secrets();
    let Some(held) = ring.rotating() else {
        let unannounced = under_way(ring);
        return Err(
            unannounced.map_or(RotationError::None, |held| RotationError::TooLate(held.record.kid.clone()))
        );
    };
    let kid = held.record.kid.clone();
    let ended = held.record.moved(SecretState::Expired, view.now, view.keys)?;
    Ok((vec![moved(ended, None)], kid))
}

/// Whether there is something for [`tidy`] to do at `now`, Unix seconds.
pub fn is_untidy(ring: &Ring, now: u64) -> bool {
    !ring.surplus(SecretState::Rotating).is_empty()
        || ring.surplus(SecretState::Active).iter().any(|held| held.is_open())
        || ring.all().into_iter().any(|held| is_over(ring, held, now))
}

/// Ends what is over at `now`, Unix seconds: secrets that verify no more, and those beside the one that signs or
/// rotates, as control planes make them that could not hear each other. By a clock that does not jump ahead, since
/// nothing ended comes back.
///
/// # Errors
/// When one cannot be sealed anew.
pub fn tidy(view: &View<'_>, now: u64) -> Plan<()> {
    let (ring, keys) = (view.model.secrets(), view.keys);
    let mut changes = Vec::new();
    for held in ring.surplus(SecretState::Rotating) {
        changes.push(moved(held.record.moved(SecretState::Expired, view.now, keys)?, None));
    }
    // Nobody ordered their end, so none of their keys ends with them.
    for held in ring.surplus(SecretState::Active).into_iter().filter(|held| held.is_open()) {
        changes.push(moved(held.record.retired(Retire::WithLastKey, None, view.now, keys)?, None));
    }
    for held in ring.all().into_iter().filter(|held| is_over(ring, held, now)) {
        changes.push(moved(held.record.moved(SecretState::Expired, view.now, keys)?, None));
    }
    Ok((changes, ()))
}

/// Whether a secret that signs no more verifies no more either.
fn is_over(ring: &Ring, held: &Held, now: u64) -> bool {
    held.record.state == SecretState::Previous && ends_at(ring, held).is_some_and(|end| now >= end)
}

/// When a secret that signs no more stops verifying, as far as is known, Unix seconds.
pub fn ends_at(ring: &Ring, held: &Held) -> Option<u64> {
    match (held.record.state, held.record.not_after) {
        (SecretState::Previous, None) => {
            let last = ring.last_expiry(&held.record.kid);
            Some(last.max(held.record.since).saturating_add(LATE_S))
        }
        (SecretState::Previous, end) => end,
        _ => None,
    }
}

fn actives(ring: &Ring) -> impl Iterator<Item = &Held> {
    ring.active().into_iter().chain(ring.surplus(SecretState::Active))
}

fn moved(secret: SecretRecord, justification: Option<String>) -> Change {
    Change::SecretMoved { secret, justification }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::hlc::Mark;
    use crate::secrets::keyring::Keyring;
    use crate::secrets::master_key::MasterKey;
    use crate::secrets::root_key::RootKey;

    fn keyring() -> Keyring {
        keygate_core::token::crypto::native::install();
        Keyring::in_memory(MasterKey::of([1; 32]), RootKey::of([2; 32]))
    }

    fn mark(stamp: u64) -> Mark {
        Mark { stamp, source: std::cmp::Reverse(7) }
    }

    /// A secret that stopped signing at 1,000 s.
    fn previous(ring: &mut Ring, keys: &Keyring, retire: Retire, not_after: Option<u64>) -> String {
        let active = SecretRecord::make(NewSecret::first(Algorithm::HS256, None), keys, 500).unwrap();
        let record = active.retired(retire, not_after, 1_000, keys).unwrap();
        ring.take(&record, mark(1), (1, true), keys).unwrap();
        record.kid
    }

    #[test]
    fn a_secret_is_over_at_its_end_or_an_hour_after_its_last_key() {
        let keys = keyring();
        let mut ring = Ring::default();
        previous(&mut ring, &keys, Retire::AfterOverlap, Some(87_400));
        assert!(!is_untidy(&ring, 87_399) && is_untidy(&ring, 87_400));

        let mut ring = Ring::default();
        let kid = previous(&mut ring, &keys, Retire::WithLastKey, None);
        assert!(!is_untidy(&ring, 1_000 + LATE_S - 1) && is_untidy(&ring, 1_000 + LATE_S));
        ring.note_key(&kid, 50_000);
        ring.note_key(&kid, 40_000);
        assert!(!is_untidy(&ring, 50_000 + LATE_S - 1) && is_untidy(&ring, 50_000 + LATE_S));
        assert_eq!(ends_at(&ring, ring.get(&kid).unwrap()), Some(50_000 + LATE_S));
    }

    #[test]
    fn what_was_begun_a_moment_ago_is_told_from_what_a_clock_says_is_to_come() {
        let keys = keyring();
        let mut ring = Ring::default();
        let record = SecretRecord::make(NewSecret::first(Algorithm::HS256, None), &keys, 5).unwrap();
        ring.take(&record, mark(5_000), (1, true), &keys).unwrap();
        assert!(just_begun(&ring, 5_000).is_some() && just_begun(&ring, 5_999).is_some());
        assert!(just_begun(&ring, 6_000).is_none());
        assert!(just_begun(&ring, 4_999).is_none(), "begun by a clock that was ahead");
        let ended = record.moved(SecretState::Expired, 5, &keys).unwrap();
        ring.take(&ended, mark(5_001), (2, true), &keys).unwrap();
        assert!(just_begun(&ring, 5_500).is_none(), "it was cancelled");
    }
}
