//! A second approval for cut-offs that end many keys: which ones need it, who may give it, and for how long a
//! request for it counts. Pure: the writer asks, within a plan.

use std::collections::BTreeMap;

use keygate_core::decide::cutoff::Cutoff;
use keygate_core::token::Claims;
use serde::{Deserialize, Serialize};

use crate::model::key::{KeyRecord, KeyState, RevocationReason};

/// How long a request waits, in seconds: long enough to wake somebody, short enough that it is about the keys
/// that were counted.
pub const LIFE_S: u64 = 60 * 60;

/// How many live keys a cut-off hits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Count {
    /// Those that it hits, by role.
    pub by_role: BTreeMap<String, u64>,
    /// All live keys, whether it hits them or not.
    pub live: u64,
}

impl Count {
    /// Those that it hits.
    pub fn keys(&self) -> u64 {
        self.by_role.values().sum()
    }

    /// The part of live keys that it hits, from 0 to 1; 0 when there are none.
    pub fn share(&self) -> f64 {
        if self.live == 0 {
            return 0.0;
        }
        // Counts below 2^53 are exact, and so is "equal to the limit": both are rounded alike.
        #[allow(clippy::cast_precision_loss)]
        let share = self.keys() as f64 / self.live as f64;
        share
    }

    /// Whether that is more than a share that needs no second approval. Without one, nothing is.
    pub fn exceeds(&self, limit: Option<f64>) -> bool {
        limit.is_some_and(|limit| self.share() > limit)
    }
}

/// A cut-off that waits for its second approval. Its id is the cut-off's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proposal {
    /// The rule, as it will be enforced.
    pub cutoff: Cutoff,
    /// Why.
    pub reason: RevocationReason,
    /// The id of the key that asks for it.
    pub requested_by: String,
    /// Unix seconds.
    pub requested_at: u64,
    /// What it hit when it was asked for.
    pub count: Count,
}

/// How a cut-off took force that needed a second approval.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Warrant {
    /// The key with this id gave it.
    ApprovedBy(String),
    /// It did without, with this justification.
    BreakGlass(String),
}

impl Warrant {
    /// That of a journalled cut-off; `None`: it needed none.
    pub fn of(approved_by: Option<&String>, break_glass: Option<&String>) -> Option<Self> {
        let approved = approved_by.cloned().map(Self::ApprovedBy);
        approved.or_else(|| break_glass.cloned().map(Self::BreakGlass))
    }
}

/// Why a cut-off is not approved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApprovalError {
    /// It is the one that asks.
    #[error("The key that asked for this cut-off cannot approve it; another one must.")]
    OwnRequest,
    /// Whoever asks could have made it for that.
    #[error("This key is not older than the request; one that was issued in an earlier second must approve.")]
    KeyTooNew,
    /// The key that asks has ended since. What it asked for may be what gave it away, and the cut-off would
    /// spare nobody who could lift it.
    #[error("The key that asked for this cut-off does not count any more; ask anew.")]
    RequesterEnded,
}

impl Proposal {
    /// Unix seconds: the first at which it cannot be approved any more.
    pub fn expires_at(&self) -> u64 {
        self.requested_at.saturating_add(LIFE_S)
    }

    /// Whether it can be approved at `now`, Unix seconds.
    pub fn is_pending(&self, now: u64) -> bool {
        now < self.expires_at()
    }

    /// Whether the key with these claims may give the second approval.
    ///
    /// # Errors
    /// See [`ApprovalError`].
    pub fn check_approver(&self, claims: &Claims) -> Result<(), ApprovalError> {
        if claims.sub == self.requested_by {
            return Err(ApprovalError::OwnRequest);
        }
        if claims.iat >= self.requested_at {
            return Err(ApprovalError::KeyTooNew);
        }
        Ok(())
    }

    /// Whether the key that asks still counts at `now`, Unix seconds: `requester` is what is known of it,
    /// `in_force` are the cut-offs that hold already.
    ///
    /// # Errors
    /// See [`ApprovalError`].
    pub fn check_requester(
        &self,
        requester: Option<&KeyRecord>,
        in_force: &[Cutoff],
        now: u64,
    ) -> Result<(), ApprovalError> {
        let counts = |key: &KeyRecord| {
            let claims = key.claims("", None); // A cut-off asks for neither issuer nor audience.
            key.state(now) == KeyState::Active
                && !in_force.iter().any(|cutoff| cutoff.hits(&claims, &key.kid))
        };
        if requester.is_some_and(counts) { Ok(()) } else { Err(ApprovalError::RequesterEnded) }
    }
}

#[cfg(test)]
mod tests {
    use keygate_core::decide::cutoff::Scope;

    use super::*;
    use crate::model::change::Change;
    use crate::model::key::Ended;

    fn proposal() -> Proposal {
        Proposal {
            cutoff: Cutoff {
                id: "cutoff_1".into(),
                scope: Scope::default(),
                created_before: 1_001,
                created_after: 0,
                excluded_key: Some("key_1".into()),
            },
            reason: RevocationReason::Emergency,
            requested_by: "key_1".into(),
            requested_at: 1_000,
            count: Count::default(),
        }
    }

    fn key(sub: &str, iat: u64) -> Claims {
        Claims {
            iss: "keygate".into(),
            sub: sub.into(),
            jti: "j".into(),
            iat,
            exp: iat + 10_000,
            nbf: None,
            aud: None,
            role: "admin".into(),
            scope: "system:manage".into(),
            own: None,
            lrole: None,
        }
    }

    #[test]
    fn another_and_older_key_approves() {
        let proposal = proposal();
        for (sub, iat, wanted) in [
            ("key_2", 999, Ok(())),
            ("key_2", 1_000, Err(ApprovalError::KeyTooNew)),
            ("key_2", 1_001, Err(ApprovalError::KeyTooNew)),
            ("key_1", 1, Err(ApprovalError::OwnRequest)),
        ] {
            assert_eq!(proposal.check_approver(&key(sub, iat)), wanted, "{sub} {iat}");
        }
    }

    #[test]
    fn whoever_asked_must_still_count() {
        let asks = KeyRecord {
            key_id: "key_1".into(),
            jti: "j".into(),
            kid: "k".into(),
            name: "n".into(),
            role: "admin".into(),
            scopes: Vec::new(),
            owner: None,
            limit_role: None,
            registered_by: None,
            metadata: serde_json::Map::new(),
            issued_at: 900,
            expires_at: 2_000,
            renews: None,
            renewed_by: None,
            revoked: None,
            suspended: None,
        };
        let revocation = Ended { at: 1, reason: RevocationReason::Compromised, by: "key_2".into() };
        let revoked = KeyRecord { revoked: Some(revocation), ..asks.clone() };
        let suspension = Ended { at: 1, reason: None, by: "key_2".into() };
        let suspended = KeyRecord { suspended: Some(suspension), ..asks.clone() };
        let sparing =
            |excluded_key: &str| Cutoff { excluded_key: Some(excluded_key.into()), ..proposal().cutoff };
        for (requester, in_force, now, counts) in [
            (Some(&asks), vec![], 1_000, true),
            (Some(&asks), vec![], 1_999, true),
            (Some(&asks), vec![], 2_000, false),
            (Some(&revoked), vec![], 1_000, false),
            (Some(&suspended), vec![], 1_000, false),
            (None, vec![], 1_000, false),
            (Some(&asks), vec![sparing("key_1")], 1_000, true),
            (Some(&asks), vec![sparing("key_1"), sparing("key_2")], 1_000, false),
        ] {
            let wanted = if counts { Ok(()) } else { Err(ApprovalError::RequesterEnded) };
            assert_eq!(
                proposal().check_requester(requester, &in_force, now),
                wanted,
                "{requester:?} {in_force:?} {now}"
            );
        }
    }

    #[test]
    fn a_request_waits_for_an_hour() {
        let proposal = proposal();
        assert!(proposal.is_pending(1_000) && proposal.is_pending(1_000 + 3_599));
        assert!(!proposal.is_pending(1_000 + 3_600));
        assert!(proposal.is_pending(0), "the clock was set back");
    }

    #[test]
    fn a_journal_from_before_approvals_reads_and_is_written_alike() {
        let line = r#"{"type":"cutoff_added","cutoff":{"id":"c","scope":{},"created_before":5,"created_after":0},"reason":"emergency"}"#;
        let change: Change = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&change).unwrap(), line);
        let proposed = Change::CutoffProposed { proposal: proposal() };
        let line = serde_json::to_string(&proposed).unwrap();
        assert_eq!(serde_json::from_str::<Change>(&line).unwrap(), proposed);
    }

    #[test]
    fn more_than_the_share_needs_it_and_no_less() {
        for (hit, live, limit, exceeds) in [
            (25, 100, Some(0.25), false),
            (26, 100, Some(0.25), true),
            (1, 10, Some(0.1), false),
            (1, 3, Some(1.0 / 3.0), false),
            (1, 1_000_000, Some(0.0), true),
            (0, 100, Some(0.0), false),
            (0, 0, Some(0.0), false),
            (100, 100, Some(1.0), false),
            (100, 100, None, false),
        ] {
            let by_role = BTreeMap::from([("admin".into(), hit / 2), ("basic".into(), hit - hit / 2)]);
            let count = Count { by_role, live };
            assert_eq!(count.exceeds(limit), exceeds, "{count:?} {limit:?}");
        }
    }
}
