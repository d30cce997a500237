//! The lease, which decides which VM leads.

use super::SharedData;
use crate::bytes::Reader;

/// Period of a lease, in nanoseconds. The leader renews it at every tick, several times as often.
pub const LEASE_NS: u64 = 1_500_000_000;
const LEASE: &str = "keygate/1/lease";

/// Takes or renews the lease for VM `vm`; whether it leads.
pub fn hold_lease(data: &mut impl SharedData, vm: u64, now_ns: u64) -> bool {
    let Some((bytes, cas)) = data.get(LEASE) else {
        // A new value cannot be written with compare-and-swap, so the first one is nobody's.
        let _raced = data.set(LEASE, &[0; 16], None);
        return false;
    };
    let mut reader = Reader::new(&bytes);
    let holder = reader.u64().unwrap_or(0);
    let until = reader.u64().unwrap_or(0);
    if holder != vm && now_ns < until {
        return false;
    }
    let until = now_ns.saturating_add(LEASE_NS);
    let lease = [vm.to_le_bytes(), until.to_le_bytes()].concat();
    data.set(LEASE, &lease, Some(cas)).is_ok()
}

/// Gives the lease up, so that another VM need not wait for its end.
pub fn release_lease(data: &mut impl SharedData, vm: u64) {
    if let Some((bytes, cas)) = data.get(LEASE)
        && bytes.first_chunk() == Some(&vm.to_le_bytes())
    {
        let _raced = data.set(LEASE, &[0; 16], Some(cas));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shm::tests::Memory;

    #[test]
    fn one_vm_leads_and_another_takes_over_when_it_stops_renewing() {
        let mut data = Memory::default();
        assert!(!hold_lease(&mut data, 1, 0), "the first call only makes the lease");
        assert!(hold_lease(&mut data, 1, 1));
        assert!(!hold_lease(&mut data, 2, 2));
        assert!(hold_lease(&mut data, 1, LEASE_NS));
        assert!(!hold_lease(&mut data, 2, LEASE_NS + 1));
        assert!(hold_lease(&mut data, 2, 2 * LEASE_NS));
        assert!(!hold_lease(&mut data, 1, 2 * LEASE_NS));
        release_lease(&mut data, 1);
        assert!(!hold_lease(&mut data, 1, 2 * LEASE_NS));
        release_lease(&mut data, 2);
        assert!(hold_lease(&mut data, 1, 2 * LEASE_NS));
    }
}
