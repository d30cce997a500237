//! What a control plane keeps of the ledger, and how it goes on from that.

use serde::{Deserialize, Serialize};

use super::fellow::{Ended, Fellow, Holder};
use super::ledger::Ledger;
use super::message::Member;
use super::{Account, Terms};

/// All that has to be kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// The ledger's number.
    pub era: u64,
    /// The terms that were in force.
    pub terms: Terms,
    /// Whether it began in doubt, and that was not over. If it is over since, that only means more caution.
    #[serde(default)]
    pub in_doubt: bool,
    /// Proxies.
    pub members: Vec<SavedMember>,
    /// Accounts of which a proxy has something else than its own.
    pub pools: Vec<SavedPool>,
}

/// What has to be kept of a proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedMember {
    /// Which.
    pub member: Member,
    /// The number of its last question.
    pub number: u64,
    /// Its share, of [`super::SHARES`].
    pub share: u32,
    /// When it was last known to be in touch, by the control plane's clock.
    pub acked_ns: Option<u64>,
    /// Since when without a break.
    pub steady_since_ns: u64,
    /// Whether it has ended; if so, whether it was in touch until then.
    pub ended_in_touch: Option<bool>,
}

/// What has to be kept of an account.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedPool {
    /// Which.
    pub account: Account,
    /// Each proxy with the units that it has at most, and the limit of which that is.
    pub holders: Vec<(Member, u32, u32)>,
}

impl Ledger {
    /// Goes on from what was kept, if all that had to be was. `same_clock` says whether times that were kept are of the
    /// clock that `now_ns` is of, as with a monotonic clock of the same boot of the same host. If not, proxies that
    /// restarted meanwhile leave more behind.
    pub fn resume(terms: Terms, saved: &Saved, same_clock: bool, now_ns: u64) -> Self {
        let terms = terms.longest(saved.terms);
        let mut ledger = if saved.in_doubt {
            Self::in_doubt(terms, saved.era, now_ns)
        } else {
            Self::new(terms, saved.era)
        };
        for saved in &saved.members {
            let fellow = Fellow {
                number: saved.number,
                share: saved.share,
                told: saved.share,
                answered_ns: now_ns,
                acked_ns: saved.acked_ns.filter(|_| same_clock),
                steady_since_ns: if same_clock { saved.steady_since_ns } else { now_ns },
                ended: saved.ended_in_touch.map(|in_touch| Ended { at_ns: now_ns, in_touch }),
                ..Fellow::default()
            };
            ledger.members.insert(saved.member.clone(), fellow);
        }
        for SavedPool { account, holders } in &saved.pools {
            let pool = ledger.pools.entry(*account).or_default();
            for (member, held, of) in holders {
                let (used, wanted, dearest) = (*held, *held, 0);
                let (unsure, told) = (true, true);
                let holder = Holder {
                    held: *held,
                    of: *of,
                    used,
                    wanted,
                    dearest,
                    answered_ns: now_ns,
                    unsure,
                    told,
                    own: false,
                };
                pool.insert(member.clone(), holder);
                if let Some(fellow) = ledger.members.get_mut(member) {
                    fellow.looks.insert(*account);
                }
            }
        }
        ledger
    }

    /// Goes on by longer terms.
    pub fn lengthen(&mut self, terms: Terms, now_ns: u64) {
        let leaves = |(member, fellow): (&Member, &Fellow)| Some((member.clone(), fellow.leaves_since_ns?));
        let leaving: Vec<(Member, u64)> = self.members.iter().filter_map(leaves).collect();
        *self = Self::resume(terms, &self.saved(), true, now_ns);
        for (member, since_ns) in leaving {
            if let Some(fellow) = self.members.get_mut(&member) {
                fellow.leaves_since_ns = Some(since_ns);
            }
        }
    }

    /// All that has to be kept.
    pub fn saved(&self) -> Saved {
        Saved {
            era: self.era,
            terms: self.terms,
            in_doubt: self.doubt_until_ns > 0,
            members: self.members.keys().filter_map(|member| self.member(member)).collect(),
            pools: self.pools.keys().filter_map(|account| self.pool(*account)).collect(),
        }
    }

    /// What has to be kept of a proxy; `None`: nothing.
    pub fn member(&self, member: &Member) -> Option<SavedMember> {
        let fellow = self.members.get(member)?;
        Some(SavedMember {
            member: member.clone(),
            number: fellow.number,
            share: fellow.share,
            acked_ns: fellow.acked_ns,
            steady_since_ns: fellow.steady_since_ns,
            ended_in_touch: fellow.ended.map(|ended| ended.in_touch),
        })
    }

    /// What has to be kept of an account; `None`: nothing.
    pub fn pool(&self, account: Account) -> Option<SavedPool> {
        let holders = self.pools.get(&account)?.iter();
        let holders = holders.map(|(member, holder)| (member.clone(), holder.held, holder.of)).collect();
        Some(SavedPool { account, holders })
    }
}
