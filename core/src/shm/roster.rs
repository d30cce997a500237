//! The VMs of a process: which of them live, how many were started, and the number drawn for all.

use super::SharedData;
use crate::bytes::Reader;

/// A VM that was not heard of for so long is not counted any more, in nanoseconds.
const ROSTER_AGE_NS: u64 = 10_000_000_000;
/// The most VMs counted.
const ROSTER_VMS: usize = 1_024;
const ROSTER: &str = "keygate/1/roster";
const STARTS: &str = "keygate/1/starts";
const INCARNATION: &str = "keygate/1/incarnation";

/// The number drawn for this process, `drawn` if there is none yet.
pub fn incarnation(data: &mut impl SharedData, drawn: u64) -> u64 {
    if data.get(INCARNATION).is_none() {
        let _raced = data.set(INCARNATION, &drawn.to_le_bytes(), None);
    }
    data.get(INCARNATION)
        .and_then(|(bytes, _)| Some(u64::from_le_bytes(*bytes.first_chunk()?)))
        .unwrap_or(drawn)
}

/// Statistics of the VMs of this process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Census {
    /// Number of VMs that were heard of lately.
    pub living: usize,
    /// Number of VMs that were ever started.
    pub started: u64,
    /// Memory of the largest living one, in bytes.
    pub largest_bytes: u64,
}

/// Counts VM `vm` among the living, with the bytes of memory that it has, and says what is known of all.
pub fn roll_call(data: &mut impl SharedData, vm: u64, memory_bytes: u64, now_ns: u64) -> Census {
    let (bytes, cas) = data.get(ROSTER).map_or((Vec::new(), None), |(bytes, cas)| (bytes, Some(cas)));
    let (entries, _) = bytes.as_chunks::<24>();
    let mut living: Vec<[u64; 3]> = entries
        .iter()
        .filter_map(|entry| {
            let mut reader = Reader::new(entry);
            Some([reader.u64().ok()?, reader.u64().ok()?, reader.u64().ok()?])
        })
        .filter(|[id, seen, _]| *id != vm && now_ns.saturating_sub(*seen) < ROSTER_AGE_NS)
        .take(ROSTER_VMS)
        .collect();
    living.push([vm, now_ns, memory_bytes]);
    let bytes: Vec<u8> = living.iter().flatten().flat_map(|number| number.to_le_bytes()).collect();
    // A lost race is made good at the next call.
    let _raced = data.set(ROSTER, &bytes, cas);
    let started = data.get(STARTS).and_then(|(count, _)| Some(u64::from_le_bytes(*count.first_chunk()?)));
    Census {
        living: living.len(),
        started: started.unwrap_or(0),
        largest_bytes: living.iter().map(|[.., memory]| *memory).max().unwrap_or(0),
    }
}

/// Counts a VM that has started; whether that worked, else it is to be tried again at the next tick.
pub fn count_start(data: &mut impl SharedData) -> bool {
    let Some((bytes, cas)) = data.get(STARTS) else {
        // A new value cannot be written with compare-and-swap, so the first one counts nobody.
        let _raced = data.set(STARTS, &0_u64.to_le_bytes(), None);
        return false;
    };
    let count = bytes.first_chunk().map_or(0, |count| u64::from_le_bytes(*count));
    data.set(STARTS, &count.saturating_add(1).to_le_bytes(), Some(cas)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::tests::Memory;

    #[test]
    fn the_roster_forgets_the_silent() {
        let mut data = Memory::default();
        let census = |living, largest_bytes| Census { living, started: 0, largest_bytes };
        assert_eq!(roll_call(&mut data, 1, 50, 0), census(1, 50));
        assert_eq!(roll_call(&mut data, 2, 70, 1), census(2, 70));
        assert_eq!(roll_call(&mut data, 1, 60, ROSTER_AGE_NS), census(2, 70));
        assert_eq!(roll_call(&mut data, 1, 60, ROSTER_AGE_NS + 1), census(1, 60));
    }

    #[test]
    fn every_start_is_counted_once() {
        let mut data = Memory::default();
        assert!(!count_start(&mut data), "the first call only makes the number");
        assert!(count_start(&mut data) && count_start(&mut data));
        assert_eq!(roll_call(&mut data, 1, 0, 0).started, 2);
    }

    #[test]
    fn one_number_for_the_process() {
        let mut data = Memory::default();
        assert_eq!(incarnation(&mut data, 7), 7);
        assert_eq!(incarnation(&mut data, 8), 7);
    }
}
