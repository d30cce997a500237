//! The counts of a proxy's VMs in the data that they share, where they outlive a VM that traps.
//!
//! Each VM has a page of its own and is the only one that writes to it; an index names the pages. The leader adds them
//! up. A page that nobody wrote to for a while is *closed* and goes into the sums of those that are gone: its VM may
//! have ended with an old configuration. Should it still live, it finds its page closed and begins another one.
//!
//! A leader may die between two writes, and one that stalled may wake up. So each step leaves the sum what it was: a
//! page that is closed does not change any more, the sums of the gone name the pages that are in them, and every
//! write is with compare-and-swap.

use std::collections::BTreeSet;

use super::Counts;
use crate::shm::SharedData;

/// A page that was not written to for so long is closed, nanoseconds.
const IDLE_NS: u64 = 600_000_000_000;
/// The most pages there may be; beyond it the one that was written to longest ago is closed.
const MAX_PAGES: usize = 256;

const INDEX: &str = "keygate/1/counts";
const GONE: &str = "keygate/1/counts-gone";
const ACKNOWLEDGED: &str = "keygate/1/counts-acknowledged";

const OPEN: u8 = 1;
const CLOSED: u8 = 2;

fn page_key(id: u64) -> String {
    format!("keygate/1/counts/{id:016x}")
}

/// What a VM has written.
///
/// ```text
/// 0 1 open (1) or closed (2)   1 8 written at, ns, little-endian   9 counts, JSON
/// ```
struct Page {
    closed: bool,
    written_ns: u64,
    counts: Counts,
}

impl Page {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![if self.closed { CLOSED } else { OPEN }];
        bytes.extend_from_slice(&self.written_ns.to_le_bytes());
        bytes.extend_from_slice(&self.counts.encode());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (kind, rest) = bytes.split_first()?;
        let (written, counts) = rest.split_first_chunk()?;
        Some(Self {
            closed: *kind != OPEN,
            written_ns: u64::from_le_bytes(*written),
            counts: Counts::decode(counts),
        })
    }

    fn read(data: &mut impl SharedData, id: u64) -> Option<(Self, u32)> {
        let (bytes, cas) = data.get(&page_key(id))?;
        Some((Self::decode(&bytes)?, cas))
    }
}

/// Which pages there are, in the order of their ids.
fn index(data: &mut impl SharedData) -> (BTreeSet<u64>, Option<u32>) {
    let Some((bytes, cas)) = data.get(INDEX) else { return (BTreeSet::new(), None) };
    let (ids, _) = bytes.as_chunks::<8>();
    (ids.iter().map(|id| u64::from_le_bytes(*id)).filter(|id| *id != 0).collect(), Some(cas))
}

/// Changes the index; whether that worked, else it is to be tried again.
fn change_index(data: &mut impl SharedData, change: impl FnOnce(&mut BTreeSet<u64>)) -> bool {
    let (mut ids, cas) = index(data);
    if cas.is_none() {
        // A new value cannot be written with compare-and-swap, so the first one names nobody.
        let _raced = data.set(INDEX, &0_u64.to_le_bytes(), None);
        return false;
    }
    change(&mut ids);
    // Never an empty value, which some hosts do not tell from none.
    let bytes: Vec<u8> = [0].iter().chain(&ids).flat_map(|id| id.to_le_bytes()).collect();
    data.set(INDEX, &bytes, cas).is_ok()
}

/// The sums of the pages that are gone, and which of these may still be in the index.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct Gone {
    pages: BTreeSet<u64>,
    counts: Counts,
}

impl Gone {
    fn read(data: &mut impl SharedData) -> (Self, Option<u32>) {
        let Some((bytes, cas)) = data.get(GONE) else { return (Self::default(), None) };
        (serde_json::from_slice(&bytes).unwrap_or_default(), Some(cas))
    }

    fn write(&self, data: &mut impl SharedData, cas: Option<u32>) -> bool {
        data.set(GONE, &serde_json::to_vec(self).unwrap_or_default(), cas).is_ok()
    }
}

/// One VM's part.
#[derive(Debug)]
pub struct Ledger {
    page: u64,
    begun: bool,
    /// What stands on pages before this one.
    before: Counts,
    /// What stands on all pages, this one too.
    written: Counts,
}

impl Ledger {
    /// Of the VM with that number.
    pub fn new(vm: u64) -> Self {
        Self { page: vm.max(1), begun: false, before: Counts::default(), written: Counts::default() }
    }

    /// Writes what the VM has counted since it started; whether that worked, else it is to be done again.
    pub fn write(&mut self, data: &mut impl SharedData, counts: &Counts, now_ns: u64) -> bool {
        let mut cas = None;
        if self.begun {
            match Page::read(data, self.page) {
                Some((page, number)) if !page.closed => cas = Some(number),
                // It counts as it is; what came since goes on another one.
                _ => {
                    self.page = self.page.wrapping_add(1).max(1);
                    self.before = self.written.clone();
                    self.begun = false;
                }
            }
        }
        let page = Page { closed: false, written_ns: now_ns, counts: counts.since(&self.before) };
        if data.set(&page_key(self.page), &page.encode(), cas).is_err() {
            return false; // It was closed meanwhile.
        }
        if !self.begun {
            let id = self.page;
            if !change_index(data, |ids| {
                ids.insert(id);
            }) {
                return false;
            }
            self.begun = true;
        }
        self.written = counts.clone();
        true
    }
}

/// What all VMs of this process have written.
pub fn collect(data: &mut impl SharedData) -> Counts {
    let (ids, _) = index(data);
    let (gone, _) = Gone::read(data);
    let mut counts = gone.counts;
    for id in ids.difference(&gone.pages) {
        if let Some((page, _)) = Page::read(data, *id) {
            counts.add_all(&page.counts);
        }
    }
    counts
}

/// Puts away one page to which nobody writes any more, if there is one. For the leader.
pub fn tidy(data: &mut impl SharedData, now_ns: u64) {
    let (ids, _) = index(data);
    let pages = ids.iter().filter_map(|id| Some((*id, Page::read(data, *id)?.0))).collect::<Vec<_>>();
    let oldest = pages.iter().min_by_key(|(_, page)| (!page.closed, page.written_ns));
    let Some((id, page)) = oldest else { return };
    let is_idle = now_ns.saturating_sub(page.written_ns) >= IDLE_NS;
    if page.closed || is_idle || pages.len() > MAX_PAGES {
        let _tried_again = put_away(data, *id);
    }
}

/// `None` when somebody else came between.
fn put_away(data: &mut impl SharedData, id: u64) -> Option<()> {
    let (page, cas) = Page::read(data, id)?;
    let closed = Page { closed: true, ..page };
    data.set(&page_key(id), &closed.encode(), Some(cas)).ok()?;
    let (mut gone, cas) = Gone::read(data);
    if cas.is_none() {
        Gone::default().write(data, None);
        return None; // As of the index.
    }
    if gone.pages.insert(id) {
        gone.counts.add_all(&closed.counts);
        gone.write(data, cas).then_some(())?;
    }
    change_index(data, |ids| {
        ids.remove(&id);
    })
    .then_some(())?;
    // From here on nobody reads it; it cannot be deleted, so it is made small.
    let empty = Page { closed: true, written_ns: 0, counts: Counts::default() };
    let _nobody_cares = data.set(&page_key(id), &empty.encode(), None);
    let (mut gone, cas) = Gone::read(data);
    gone.pages.remove(&id);
    gone.write(data, cas).then_some(())
}

/// What a control plane has acknowledged, as far as a leader of this process knows.
pub fn acknowledged(data: &mut impl SharedData) -> Counts {
    data.get(ACKNOWLEDGED).map_or_else(Counts::default, |(bytes, _)| Counts::decode(&bytes))
}

/// Notes what was acknowledged.
pub fn acknowledge(data: &mut impl SharedData, counts: &Counts) {
    let _never = data.set(ACKNOWLEDGED, &counts.encode(), None);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::shm::tests::Memory;

    fn counts(number: u64) -> Counts {
        let mut counts = Counts::default();
        counts.add("n".into(), number);
        counts
    }

    fn write(ledger: &mut Ledger, data: &mut Memory, number: u64, now_ns: u64) {
        let counts = counts(number);
        while !ledger.write(data, &counts, now_ns) {}
    }

    #[test]
    fn what_all_vms_wrote_is_added_up() {
        let mut data = Memory::default();
        let (mut one, mut two) = (Ledger::new(1), Ledger::new(9));
        assert!(collect(&mut data).is_empty());
        write(&mut one, &mut data, 3, 0);
        write(&mut two, &mut data, 4, 0);
        write(&mut one, &mut data, 5, 0);
        assert_eq!(collect(&mut data).get("n"), 9);
    }

    #[test]
    fn a_page_is_put_away_and_its_vm_goes_on_with_another() {
        let mut data = Memory::default();
        let (mut one, mut two) = (Ledger::new(1), Ledger::new(9));
        write(&mut one, &mut data, 3, 0);
        write(&mut two, &mut data, 4, IDLE_NS);
        for _ in 0..4 {
            tidy(&mut data, IDLE_NS);
            assert_eq!(collect(&mut data).get("n"), 7);
        }
        assert_eq!(index(&mut data).0, BTreeSet::from([9]));
        write(&mut one, &mut data, 10, IDLE_NS);
        assert_eq!(collect(&mut data).get("n"), 14);
        assert_eq!(index(&mut data).0, BTreeSet::from([2, 9]));
    }

    #[test]
    fn pages_do_not_grow_in_number_for_ever() {
        let mut data = Memory::default();
        for vm in 0..1_000 {
            write(&mut Ledger::new(vm * 16 + 1), &mut data, 1, vm);
            tidy(&mut data, vm);
            tidy(&mut data, vm);
        }
        assert!(index(&mut data).0.len() <= MAX_PAGES + 1);
        assert_eq!(collect(&mut data).get("n"), 1_000);
    }

    /// Shared data whose owner dies at the n-th write.
    struct Dying<'d>(&'d mut Memory, usize);

    impl SharedData for Dying<'_> {
        fn get(&mut self, key: &str) -> Option<(Vec<u8>, u32)> {
            self.0.get(key)
        }

        fn set(&mut self, key: &str, value: &[u8], cas: Option<u32>) -> Result<(), crate::shm::Conflict> {
            self.1 = self.1.checked_sub(1).ok_or(crate::shm::Conflict)?;
            self.0.set(key, value, cas)
        }
    }

    proptest! {
        /// Whatever VMs count, whenever pages are put away, and wherever a leader dies in that: the sum is what was
        /// written last.
        #[test]
        fn the_sum_is_exact(steps in prop::collection::vec((0u8..3, 0usize..4, 0u64..5, 0usize..6), 1..80)) {
            let mut data = Memory::default();
            let mut vms: Vec<(Ledger, u64)> = (0..4).map(|vm| (Ledger::new(vm * 1_000 + 1), 0)).collect();
            let mut now_ns = 0;
            for (step, vm, number, writes) in steps {
                match step {
                    0 | 1 => {
                        let (ledger, total) = &mut vms[vm];
                        *total += number;
                        write(ledger, &mut data, *total, now_ns);
                    }
                    _ => {
                        now_ns += IDLE_NS * number;
                        tidy(&mut Dying(&mut data, writes), now_ns);
                    }
                }
                let all: u64 = vms.iter().map(|(_, total)| total).sum();
                prop_assert_eq!(collect(&mut data).get("n"), all);
            }
        }
    }
}
