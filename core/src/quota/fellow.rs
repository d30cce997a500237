//! What the ledger knows of one proxy.

use std::collections::BTreeSet;

use super::{ANSWER_NS, Account, Terms, fair_share, unsaid};

/// What is known of a proxy.
#[derive(Debug, Clone, Default)]
pub(super) struct Fellow {
    /// The number of its last question.
    pub number: u64,
    /// What it has at most of every limit.
    pub share: u32,
    /// What it will have, once it has done so: the same or less.
    pub told: u32,
    /// When it was first heard of.
    pub joined_ns: u64,
    /// What it had in the membership before, and is to have again.
    pub owed: u32,
    /// When that was answered; no sooner than it was, after a restart.
    pub answered_ns: u64,
    /// The same, if it is known.
    pub sent_ns: Option<u64>,
    /// When the last answer was sent that it is known to have taken.
    pub acked_ns: Option<u64>,
    /// Since when it was in touch without a break, as far as is known; 0: always.
    pub steady_since_ns: u64,
    /// When it is known to have ended, and whether it had been in touch until then, at least for all windows.
    pub ended: Option<Ended>,
    /// Since when it gives back what it has, because it is about to end.
    pub leaves_since_ns: Option<u64>,
    /// Accounts that it is to report on.
    pub looks: BTreeSet<Account>,
}

/// The end of a proxy's process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ended {
    /// No later than this.
    pub at_ns: u64,
    /// It spent no more of an account than it may without a word.
    pub in_touch: bool,
}

impl Fellow {
    /// By when it spends nothing more, if it is not heard of.
    pub fn end_ns(&self, keep_ns: u64) -> u64 {
        self.ended.map_or(self.answered_ns.saturating_add(keep_ns), |ended| ended.at_ns)
    }

    /// What it may have spent of every limit without a word.
    pub fn locked_share(&self) -> u32 {
        match self.ended {
            Some(Ended { in_touch: true, .. }) => unsaid(self.share),
            Some(Ended { in_touch: false, .. }) | None => self.share,
        }
    }

    /// Whether it is in touch, as far as is known, and stays.
    pub fn lives(&self, terms: Terms, now_ns: u64) -> bool {
        self.leaves_since_ns.is_none()
            && self.ended.is_none()
            && now_ns < self.answered_ns.saturating_add(terms.lease_ns())
    }

    /// What is known once another process of the proxy is known to have followed.
    pub fn end(&mut self, terms: Terms, now_ns: u64) {
        let in_touch = self.acked_ns.is_some_and(|acked_ns| {
            now_ns.saturating_add(ANSWER_NS) <= acked_ns.saturating_add(terms.lease_ns())
        });
        let window_ns = terms.longest_window_ns();
        let steady = self.steady_since_ns == 0 || now_ns >= self.steady_since_ns.saturating_add(window_ns);
        self.ended = Some(Ended { at_ns: now_ns, in_touch: in_touch && steady });
        self.looks.clear();
    }

    /// How many units of an account a proxy may have in use, from now on until what is granted now is back.
    pub fn counted(
        &self,
        holder: Option<&Holder>,
        terms: Terms,
        account: Account,
        limit: u32,
        now_ns: u64,
    ) -> u32 {
        let window_ns = account.window_ns();
        if now_ns >= self.end_ns(terms.keep_ns()).saturating_add(window_ns) {
            return 0;
        }
        let own = fair_share(limit, self.locked_share());
        let Some(holder) = holder else { return own };
        match self.ended {
            Some(Ended { in_touch: true, .. }) => return holder.held,
            Some(Ended { in_touch: false, .. }) => return holder.held.max(own),
            None => {}
        }
        let mut held = holder.held;
        let lapses_ns = holder.answered_ns.saturating_add(terms.lease_ns()).saturating_add(window_ns);
        if now_ns >= lapses_ns {
            held = held.min(own);
        }
        // What it was told it has heard no sooner than that.
        let since_ns = if holder.told { Some(holder.answered_ns) } else { self.acked_ns };
        let sure = !holder.unsure
            && since_ns.is_some_and(|since_ns| {
                now_ns <= since_ns.saturating_add(terms.lease_ns().saturating_mul(2))
            });
        if sure { held } else { held.max(own) }
    }
}

/// What is known of a proxy's part of an account. Without it, the proxy has its own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Holder {
    /// So many units at most.
    pub held: u32,
    /// Of this limit.
    pub of: u32,
    /// How many were in use.
    pub used: u32,
    /// How many are asked for in a window's time.
    pub wanted: u32,
    /// What the dearest request costs that was refused.
    pub dearest: u32,
    /// When that was answered.
    pub answered_ns: u64,
    /// It may have its own meanwhile, if that is more.
    pub unsure: bool,
    /// It was told so, and has not reported it: it knows of this if it knows of its share.
    pub told: bool,
    /// It said that nothing was agreed on before.
    pub own: bool,
}
