//! Where records are: pages in the shared data of a proxy's VMs.

use super::Account;
use super::record::Record;
use super::standing::Standing;
use crate::shared::SharedData;
use crate::wire::{Reader, WireError};

/// Accounts are spread over so many values of the shared data.
pub(super) const PAGES: u16 = 1_024;
/// The most accounts of a page: 131,072 of a proxy.
const MAX_RECORDS: usize = 128;
/// Each failure is another VM's success, so that so many in a row take as many VMs that are faster.
const MAX_TRIES: u32 = 64;
/// The number that no value has: written with it, a value is made if there is none and left alone if there is
/// one. (Numbers count up from 1 for every write of the process, so this one is 136 years of a write a second
/// away.)
pub(super) const ABSENT: u32 = u32::MAX;

const MAGIC: &[u8; 4] = b"KGqp";

/// Why a page could not be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PageError {
    /// Other VMs were always faster.
    Contended,
    /// It cannot be read: what was spent is not known.
    Damaged,
    /// It has no room for one more account.
    Crowded,
}

/// Some accounts, as one value of the shared data.
///
/// ```text
/// 0 4 magic "KGqp"   4 1 number of records, then the records in the order of their accounts:
///   8 key   4 window, s   1 flags: 1 agreed, 2 rung, 4 unreported
///   15 numbers in LEB128: limit, held, of, leased, era, term, asked, next ask, reported, elsewhere, refused,
///      dearest, and of the demand: began, before, now
///   1 number of draws; for each 8 VM, 4 units, 8 until
///   the spends: number, and for each the time since the one before and its units, in LEB128
/// ```
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Page {
    records: Vec<Record>,
}

impl Page {
    /// The page of an account.
    pub fn index(account: Account) -> u16 {
        // Fingerprints are evenly spread.
        let place = account.key.rotate_left(20) ^ u64::from(account.window_s);
        u16::try_from(place.checked_rem(PAGES.into()).unwrap_or(0)).unwrap_or(0)
    }

    /// The record of an account, if there is one.
    pub fn find(&mut self, account: Account) -> Option<&mut Record> {
        self.records.iter_mut().find(|record| record.account == account)
    }

    /// The record of an account, made if there is none.
    pub fn record(&mut self, account: Account, limit: u32) -> Result<&mut Record, PageError> {
        let place = match self.records.binary_search_by_key(&account, |record| record.account) {
            Ok(place) => place,
            Err(place) => {
                if self.records.len() >= MAX_RECORDS {
                    return Err(PageError::Crowded);
                }
                self.records.insert(place, Record::new(account, limit));
                place
            }
        };
        self.records.get_mut(place).ok_or(PageError::Damaged)
    }

    /// All records.
    pub fn records(&mut self) -> impl Iterator<Item = &mut Record> {
        self.records.iter_mut()
    }

    /// Forgets records of which nothing would be lost; whether there were any.
    pub fn tidy(&mut self) -> bool {
        let before = self.records.len();
        self.records.retain(|record| !record.is_idle());
        self.records.len() < before
    }

    /// The bytes of it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.push(u8::try_from(self.records.len()).unwrap_or(u8::MAX));
        for record in &self.records {
            record.encode(&mut out);
        }
        out
    }

    /// Reads what [`Page::encode`] wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let mut reader = Reader::new(bytes);
        if reader.take(4)? != MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let count = reader.u8()?;
        if usize::from(count) > MAX_RECORDS {
            return Err(WireError::TooMany);
        }
        let records = (0..count).map(|_| Record::decode(&mut reader)).collect::<Result<Vec<_>, _>>()?;
        if !records.is_sorted_by(|a, b| a.account < b.account) {
            return Err(WireError::UnknownFormat);
        }
        reader.end()?;
        Ok(Self { records })
    }
}

/// Whether a page is to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Write {
    /// As it is now, even if nothing in it was changed.
    Yes,
    /// Not at all.
    No,
}

/// Changes a page by compare-and-swap; `change` may be called several times. A page that is not there is made
/// when `make` says so, else `None` is the answer.
///
/// The standing is read after the page. So a change that was made by an older standing fails once the leader has
/// written a newer one and then the page.
pub(super) fn change<R>(
    data: &mut impl SharedData,
    index: u16,
    make: bool,
    mut change: impl FnMut(&mut Page, &Standing) -> Result<(R, Write), PageError>,
) -> Result<Option<R>, PageError> {
    let key = format!("keygate/1/quota/page/{index}");
    for _ in 0..MAX_TRIES {
        let Some((bytes, cas)) = data.get(&key) else {
            if !make {
                return Ok(None);
            }
            // If another VM made it meanwhile, so much the better.
            let _raced = data.set(&key, &Page::default().encode(), Some(ABSENT));
            continue;
        };
        let mut page = Page::decode(&bytes).map_err(|_| PageError::Damaged)?;
        let standing = Standing::read(data).map(|(standing, _)| standing).unwrap_or_default();
        let (result, write) = change(&mut page, &standing)?;
        if write == Write::No || data.set(&key, &page.encode(), Some(cas)).is_ok() {
            return Ok(Some(result));
        }
    }
    Err(PageError::Contended)
}
