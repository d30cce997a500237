//! Units spent within a window, by time.

use std::collections::VecDeque;

use crate::bytes::{Reader, WireError};

/// Slots of a window. All units of a slot are free when the last of them is, so at most 1/128 of a window is lost.
const SLOTS: u64 = 128;
/// The most slots with a spend in them: those of a window, and the ones that it has begun and not yet left.
const MAX_GROUPS: usize = 132;

/// Spends of one account within the window. A unit that was spent at `t` is back at `t` + window, never before.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Spends {
    /// In the order of their slots, one a slot.
    groups: VecDeque<Group>,
}

/// The spends of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    /// When the last of them was.
    pub last_ns: u64,
    /// How many.
    pub units: u32,
}

impl Spends {
    /// Notes that `units` were spent at a time, or before it.
    pub fn add(&mut self, at_ns: u64, units: u32, window_ns: u64) {
        if units == 0 {
            return;
        }
        let slot = |ns| slot(ns, window_ns);
        let place = self.groups.partition_point(|group| slot(group.last_ns) < slot(at_ns));
        let full = self.groups.len() >= MAX_GROUPS;
        let place = if full { place.min(self.groups.len().saturating_sub(1)) } else { place };
        match self.groups.get_mut(place) {
            // Where there is no room for one more, the neighbour takes it: it comes back later then.
            Some(group) if full || slot(group.last_ns) == slot(at_ns) => {
                group.last_ns = group.last_ns.max(at_ns);
                group.units = group.units.saturating_add(units);
            }
            _ => self.groups.insert(place, Group { last_ns: at_ns, units }),
        }
    }

    /// Drops the spends whose window is over; calls `dropped` with each group.
    pub fn expire(&mut self, now_ns: u64, window_ns: u64, mut dropped: impl FnMut(Group)) {
        while self.groups.front().is_some_and(|group| group.last_ns.saturating_add(window_ns) <= now_ns) {
            if let Some(group) = self.groups.pop_front() {
                dropped(group);
            }
        }
    }

    /// Units whose window is not over at a time.
    pub fn used_at(&self, now_ns: u64, window_ns: u64) -> u32 {
        let live = self.groups.iter().rev();
        let live = live.take_while(|group| group.last_ns.saturating_add(window_ns) > now_ns);
        live.fold(0, |sum, group| sum.saturating_add(group.units))
    }

    /// Units in use.
    pub fn used(&self) -> u32 {
        self.groups.iter().fold(0, |sum, group| sum.saturating_add(group.units))
    }

    /// The time at which `units` of them are free again; `None` if there are not so many.
    pub fn back_at(&self, units: u32, window_ns: u64) -> Option<u64> {
        let mut back = 0_u32;
        for group in &self.groups {
            back = back.saturating_add(group.units);
            if back >= units {
                return Some(group.last_ns.saturating_add(window_ns));
            }
        }
        None
    }

    /// Time of the last of them; 0 if there is none.
    pub fn last_ns(&self) -> u64 {
        self.groups.back().map_or(0, |group| group.last_ns)
    }

    /// Each slot's.
    pub fn groups(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter()
    }

    /// Whether nothing is in use.
    pub fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// A number of groups, then for each the time since the one before and the units, in LEB128.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put(out, u64::try_from(self.groups.len()).unwrap_or(u64::MAX));
        let mut before = 0;
        for group in &self.groups {
            put(out, group.last_ns.saturating_sub(before));
            put(out, group.units.into());
            before = group.last_ns;
        }
    }

    /// Reads what [`Spends::encode`] wrote.
    pub fn decode(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let count = take(reader)?;
        if count > u64::try_from(MAX_GROUPS).unwrap_or(u64::MAX) {
            return Err(WireError::TooMany);
        }
        let mut groups = VecDeque::new();
        let mut before = 0_u64;
        for _ in 0..count {
            before = before.saturating_add(take(reader)?);
            let units = u32::try_from(take(reader)?).map_err(|_| WireError::TooMany)?;
            groups.push_back(Group { last_ns: before, units });
        }
        Ok(Self { groups })
    }
}

/// The slot of a time: a window has 128.
pub(super) fn slot(at_ns: u64, window_ns: u64) -> u64 {
    at_ns.checked_div(window_ns.checked_div(SLOTS).unwrap_or(1).max(1)).unwrap_or(at_ns)
}

/// Writes a number in LEB128.
pub(super) fn put(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(low_bits(number) | 0x80);
        number >>= 7;
    }
    out.push(low_bits(number));
}

fn low_bits(number: u64) -> u8 {
    u8::try_from(number & 0x7f).unwrap_or(0)
}

/// Reads a number in LEB128.
pub(super) fn take(reader: &mut Reader<'_>) -> Result<u64, WireError> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = reader.u8()?;
        let bits = u64::from(byte & 0x7f);
        // The tenth byte has room for one bit.
        if shift == 63 && bits > 1 {
            return Err(WireError::TooMany);
        }
        number |= bits.wrapping_shl(shift);
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(WireError::TooMany)
}
