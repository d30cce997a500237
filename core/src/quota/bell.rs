//! How a worker tells the leader that there is something to ask the control plane.

use super::page::{ABSENT, PAGES};
use crate::shared::SharedData;

const KEY: &str = "keygate/1/quota/bell";
/// What an empty list looks like: hosts do not tell an empty value from none.
const SILENT: [u8; 2] = PAGES.to_le_bytes();
/// The most pages in the list. Others are found when the leader goes through all pages.
const MAX_PAGES: usize = 512;
const MAX_TRIES: u32 = 16;

/// Says that there is something to ask about an account of a page. It may get lost; the leader finds it later.
pub(super) fn ring(data: &mut impl SharedData, page: u16) {
    for _ in 0..MAX_TRIES {
        let (mut bytes, cas) = data.get(KEY).unwrap_or((SILENT.to_vec(), ABSENT));
        let number = page.to_le_bytes();
        let (pages, _) = bytes.as_chunks::<2>();
        if pages.contains(&number) || pages.len() > MAX_PAGES {
            return;
        }
        bytes.extend_from_slice(&number);
        if data.set(KEY, &bytes, Some(cas)).is_ok() {
            return;
        }
    }
}

/// The pages that the bell was rung for since the last time.
pub(super) fn answer(data: &mut impl SharedData) -> Vec<u16> {
    let Some((bytes, cas)) = data.get(KEY) else { return Vec::new() };
    if bytes.len() <= SILENT.len() || data.set(KEY, &SILENT, Some(cas)).is_err() {
        return Vec::new();
    }
    let (pages, _) = bytes.as_chunks::<2>();
    pages.iter().map(|page| u16::from_le_bytes(*page)).filter(|page| *page < PAGES).collect()
}
