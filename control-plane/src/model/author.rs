//! The author of a change: whose key orders it, or which part of Keygate, and the reason that was given.

use std::sync::Arc;

use keygate_core::decide::cache::Verified;
use keygate_core::decide::{Reason, ended};
use keygate_core::revocation::Revocations as _;

use crate::model::View;

/// The longest reason, in characters.
pub const MAX_REASON_CHARS: usize = 500;

/// The author of a change.
#[derive(Debug, Clone)]
pub struct Author {
    name: String,
    /// Its key, which must count at the moment of the change.
    key: Option<Arc<Verified>>,
    /// A refusal of its key that does not count.
    ignored: Option<Reason>,
    reason: Option<String>,
}

impl Author {
    /// A part of Keygate, such as `system`, or an operator who edits Redis: `redis`.
    pub fn part(name: impl Into<String>) -> Self {
        Self { name: name.into(), key: None, ignored: None, reason: None }
    }

    /// A key.
    pub fn key(key: Arc<Verified>) -> Self {
        Self { name: key.claims.sub.clone(), key: Some(key), ignored: None, reason: None }
    }

    /// The same, also if its key is refused for this reason.
    #[must_use]
    pub fn although(self, reason: Reason) -> Self {
        Self { ignored: Some(reason), ..self }
    }

    /// The same with the reason for the change.
    #[must_use]
    pub fn because(self, reason: Option<String>) -> Self {
        Self { reason, ..self }
    }

    /// Its name in the journal: the key's id, or the part.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The reason that was given.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Whether its key counts when the change is made. It was decided when the request came; since then it may have been
    /// ended.
    ///
    /// # Errors
    /// The reason for which the key is refused.
    pub fn check(&self, view: &View<'_>) -> Result<(), Reason> {
        let Some(key) = &self.key else { return Ok(()) };
        standing(key, view).or_else(|reason| if self.ignored == Some(reason) { Ok(()) } else { Err(reason) })
    }
}

fn standing(key: &Verified, view: &View<'_>) -> Result<(), Reason> {
    let model = view.model;
    let exp = key.claims.exp;
    if view.now >= exp.saturating_add(model.settings().leeway_s) || exp <= model.expired_until() {
        return Err(Reason::Expired);
    }
    if !model.secrets().accepts(&key.kid, view.now) {
        return Err(Reason::UnknownKid);
    }
    let standing = |fingerprint| model.revocations().standing(fingerprint);
    ended(model.lockdown(), model.cutoffs(), key, view.now, standing)
}

/// Whether a text may be the reason of a change: one line of at most [`MAX_REASON_CHARS`] characters.
pub fn is_reason(text: &str) -> bool {
    !text.trim().is_empty() && text.chars().count() <= MAX_REASON_CHARS && !text.chars().any(char::is_control)
}
