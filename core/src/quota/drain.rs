//! Proxies that are about to end: they give back what they have.

use super::Account;
use super::ledger::Ledger;
use super::message::Member;

impl Ledger {
    /// A proxy is about to end: it is to have nothing but what it has spent, which it says with its next questions. So
    /// it takes nothing along, as one does that ends without a word. Its next process is not meant. Whether it is
    /// known.
    pub fn drain(&mut self, proxy: u64, now_ns: u64) -> bool {
        let mut known = false;
        for (member, fellow) in &mut self.members {
            if member.proxy == proxy && fellow.ended.is_none() {
                fellow.leaves_since_ns.get_or_insert(now_ns);
                known = true;
            }
        }
        known
    }

    /// Whether a proxy that leaves has nothing any more but what it has spent.
    pub fn is_drained(&self, proxy: u64) -> bool {
        let of_it = self.members.iter().filter(|(member, _)| member.proxy == proxy);
        let mut rest = of_it.filter(|(_, fellow)| fellow.ended.is_none());
        rest.all(|(member, fellow)| {
            let leaves = fellow.leaves_since_ns.is_some();
            leaves && fellow.share == 0 && self.not_given_back(member).next().is_none()
        })
    }

    /// Accounts of which a proxy that leaves has not said yet what it has spent.
    pub(super) fn not_given_back(&self, member: &Member) -> impl Iterator<Item = Account> {
        let since_ns = self.members.get(member).and_then(|fellow| fellow.leaves_since_ns);
        self.pools.iter().filter_map(move |(account, pool)| {
            let (holder, since_ns) = (pool.get(member)?, since_ns?);
            (holder.told || holder.answered_ns <= since_ns).then_some(*account)
        })
    }

    /// Whether a proxy is being drained.
    pub(super) fn leaves(&self, member: &Member) -> bool {
        self.members.get(member).is_some_and(|fellow| fellow.leaves_since_ns.is_some())
    }
}
