//! Pages with a record that the leader is to look at, marked by workers.

use super::page::{ABSENT, PAGES};
use crate::shm::{Conflict, SharedData};

const KEY: &str = "keygate/2/quota/dirty";
/// One bit a page.
const BYTES: usize = PAGES as usize / 8;
const MAX_TRIES: u32 = 64;

/// Marks a page.
///
/// # Errors
/// When other VMs were always faster; then nothing may be spent that the leader must know of.
pub(super) fn mark(data: &mut impl SharedData, page: u16) -> Result<(), Conflict> {
    let (place, bit) = (usize::from(page >> 3), 1_u8.wrapping_shl(u32::from(page & 7)));
    for _ in 0..MAX_TRIES {
        let (mut bytes, cas) =
            data.get(KEY).filter(|(bytes, _)| bytes.len() == BYTES).unwrap_or((vec![0; BYTES], ABSENT));
        let Some(byte) = bytes.get_mut(place) else { return Ok(()) };
        if *byte & bit != 0 {
            return Ok(());
        }
        *byte |= bit;
        if data.set(KEY, &bytes, Some(cas)).is_ok() {
            return Ok(());
        }
    }
    Err(Conflict)
}

/// The pages that were marked since the last time.
pub(super) fn drain(data: &mut impl SharedData) -> Vec<u16> {
    let Some((bytes, cas)) = data.get(KEY) else { return Vec::new() };
    if bytes.iter().all(|byte| *byte == 0) || data.set(KEY, &[0; BYTES], Some(cas)).is_err() {
        return Vec::new();
    }
    let is_marked = |page: &u16| {
        bytes
            .get(usize::from(page >> 3))
            .is_some_and(|byte| byte & 1_u8.wrapping_shl(u32::from(page & 7)) != 0)
    };
    (0..PAGES).filter(is_marked).collect()
}
