//! Where records are: pages in the shared data of a proxy's VMs.

use std::ops::Range;

use super::Account;
use super::record::Record;
use super::standing::Standing;
use crate::bytes::{Reader, WireError};
use crate::shm::SharedData;

/// Accounts are spread over so many values of the shared data.
pub(super) const PAGES: u16 = 1_024;
/// The most accounts of a page: their number is a byte. So there is room for 200,000 of a proxy before one page is full.
const MAX_RECORDS: usize = 255;
/// Each failure is another VM's success, so that so many in a row take as many VMs that are faster.
const MAX_TRIES: u32 = 64;
/// The number that no value has: written with it, a value is made if there is none and left alone if there is
/// one. (Numbers count up from 1 for every write of the process, so this one is 136 years of a write a second
/// away.)
pub(super) const ABSENT: u32 = u32::MAX;

const MAGIC: &[u8; 4] = b"KGp2";

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

/// Some accounts, as one value of the shared data. Records that nobody asks about stay the bytes that they are, so that a
/// look at one does not cost more with many others beside it.
///
/// ```text
/// 0 4 magic "KGp2"   4 1 number of records, then the records in the order of their accounts:
///   8 key   4 window, s   2 bytes that follow   1 flags: 1 agreed, 2 marked, 4 unreported, 8 short, 16 urgent
///   14 numbers in LEB128: limit, cap, epoch, asked, spent, next ask, reported, elsewhere, elsewhere until, refused,
///      refused at, and of the demand: began, before, now
///   1 number of draws; for each 8 VM, 4 units, 8 until
///   the spends: number, and for each the time since the one before and its units, in LEB128
/// ```
#[derive(Debug, Default)]
pub(super) struct Page {
    /// What was read.
    bytes: Vec<u8>,
    places: Vec<Place>,
}

/// Where a record is.
#[derive(Debug)]
struct Place {
    account: Account,
    record: Held,
}

#[derive(Debug)]
enum Held {
    /// As it was read, there.
    Bytes(Range<usize>),
    /// It was asked about.
    Record(Box<Record>),
}

impl Place {
    /// The record. It is read the first time.
    fn record(&mut self, page: &[u8]) -> Result<&mut Record, PageError> {
        if let Held::Bytes(range) = &self.record {
            let bytes = page.get(range.clone()).ok_or(PageError::Damaged)?;
            let record = Record::decode(self.account, bytes).map_err(|_| PageError::Damaged)?;
            self.record = Held::Record(Box::new(record));
        }
        match &mut self.record {
            Held::Record(record) => Ok(record),
            Held::Bytes(_) => Err(PageError::Damaged),
        }
    }
}

impl Page {
    /// The page of an account.
    pub fn index(account: Account) -> u16 {
        // Fingerprints are evenly spread.
        let place = account.key.rotate_left(20) ^ u64::from(account.window_s);
        u16::try_from(place.checked_rem(PAGES.into()).unwrap_or(0)).unwrap_or(0)
    }

    fn place(&self, account: Account) -> Result<usize, usize> {
        self.places.binary_search_by_key(&account, |place| place.account)
    }

    /// The record of an account, if there is one.
    pub fn find(&mut self, account: Account) -> Result<Option<&mut Record>, PageError> {
        let place = self.place(account).ok().and_then(|place| self.places.get_mut(place));
        place.map(|place| place.record(&self.bytes)).transpose()
    }

    /// The record of an account, made if there is none.
    pub fn record(
        &mut self,
        account: Account,
        limit: u32,
        standing: &Standing,
    ) -> Result<&mut Record, PageError> {
        let place = match self.place(account) {
            Ok(place) => place,
            Err(place) => {
                if self.places.len() >= MAX_RECORDS {
                    return Err(PageError::Crowded);
                }
                let record = Held::Record(Box::new(Record::new(account, limit, standing)));
                self.places.insert(place, Place { account, record });
                place
            }
        };
        self.places.get_mut(place).ok_or(PageError::Damaged)?.record(&self.bytes)
    }

    /// All records.
    pub fn records(&mut self) -> Result<Vec<&mut Record>, PageError> {
        self.places.iter_mut().map(|place| place.record(&self.bytes)).collect()
    }

    /// The records that are marked for the leader.
    pub fn marked(&mut self) -> Result<Vec<&mut Record>, PageError> {
        let bytes = &self.bytes;
        let is_marked = |place: &&mut Place| match &place.record {
            Held::Bytes(range) => bytes.get(range.clone()).is_some_and(Record::is_marked),
            Held::Record(record) => record.marked,
        };
        self.places.iter_mut().filter(is_marked).map(|place| place.record(bytes)).collect()
    }

    /// Forgets records of which nothing would be lost, of those that were asked about; whether there were any.
    pub fn tidy(&mut self) -> bool {
        let before = self.places.len();
        self.places.retain(|place| !matches!(&place.record, Held::Record(record) if record.is_idle()));
        self.places.len() < before
    }

    /// The bytes of it.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.bytes.len().saturating_add(256));
        out.extend_from_slice(MAGIC);
        out.push(u8::try_from(self.places.len()).unwrap_or(u8::MAX));
        for Place { account, record } in &self.places {
            out.extend_from_slice(&account.key.to_le_bytes());
            out.extend_from_slice(&account.window_s.to_le_bytes());
            let length_at = out.len();
            out.extend_from_slice(&[0; 2]);
            match record {
                Held::Bytes(range) => {
                    out.extend_from_slice(self.bytes.get(range.clone()).unwrap_or_default())
                }
                Held::Record(record) => record.encode(&mut out),
            }
            // 255 draws and 132 groups of spends come to less than 10,000 bytes.
            let length = out.len().saturating_sub(length_at).saturating_sub(2);
            let length = u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes();
            if let Some(place) = out.get_mut(length_at..).and_then(|rest| rest.get_mut(..2)) {
                place.copy_from_slice(&length);
            }
        }
        out
    }

    /// Reads what [`Page::encode`] wrote, but for the records themselves.
    pub fn decode(bytes: Vec<u8>) -> Result<Self, WireError> {
        let mut reader = Reader::new(&bytes);
        let mut at = 5_usize;
        if reader.take(4)? != MAGIC {
            return Err(WireError::UnknownFormat);
        }
        let count = reader.u8()?;
        if usize::from(count) > MAX_RECORDS {
            return Err(WireError::TooMany);
        }
        let mut places = Vec::with_capacity(count.into());
        for _ in 0..count {
            let account = Account { key: reader.u64()?, window_s: reader.u32()? };
            let length = usize::from(reader.u16()?);
            reader.take(length)?;
            let begin = at.saturating_add(14);
            at = begin.saturating_add(length);
            places.push(Place { account, record: Held::Bytes(begin..at) });
        }
        if !places.is_sorted_by(|a, b| a.account < b.account) {
            return Err(WireError::UnknownFormat);
        }
        reader.end()?;
        Ok(Self { bytes, places })
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

/// The name of a page in the shared data. Made at least once for each request with a limit that looks at shared data.
pub(super) fn key(index: u16) -> String {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let mut key = String::with_capacity(32);
    key.push_str("keygate/2/quota/page/");
    for shift in [12, 8, 4, 0] {
        let digit = usize::from(index.wrapping_shr(shift) & 0xf);
        key.push(HEX.get(digit).copied().unwrap_or(b'0').into());
    }
    key
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
    let key = key(index);
    for _ in 0..MAX_TRIES {
        let Some((bytes, cas)) = data.get(&key) else {
            if !make {
                return Ok(None);
            }
            // If another VM made it meanwhile, so much the better.
            let _raced = data.set(&key, &Page::default().encode(), Some(ABSENT));
            continue;
        };
        let mut page = Page::decode(bytes).map_err(|_| PageError::Damaged)?;
        let standing = Standing::read(data).map(|(standing, _)| standing).unwrap_or_default();
        let (result, write) = change(&mut page, &standing)?;
        if write == Write::No || data.set(&key, &page.encode(), Some(cas)).is_ok() {
            return Ok(Some(result));
        }
    }
    Err(PageError::Contended)
}
