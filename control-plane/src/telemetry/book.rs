//! What was counted, on disk: the totals, and of each proxy how far its numbers are in them. A database of its own, so
//! that its fsyncs hold up no change of keys.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use keygate_core::telemetry::Counts;
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::times::Observed;
use crate::rollout::tally::Tally;

/// JSON of [`Known`], by the proxy's incarnation and id.
const PROXIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("proxies");
/// JSON of [`Totals`].
const TOTALS: TableDefinition<'_, (), &[u8]> = TableDefinition::new("totals");

const FILE: &str = "telemetry.redb";

/// Why the book cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum BookError {
    /// The database.
    #[error("the counts of proxies cannot be kept: {0}")]
    Database(#[from] redb::Error),
    /// The file.
    #[error("the counts of proxies cannot be kept: {0}")]
    Io(#[from] std::io::Error),
    /// What stands there is none of ours.
    #[error("the counts of proxies cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

crate::store::from_redb!(BookError);

/// How far the numbers of one proxy's process are counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// When it reported last, Unix seconds.
    pub heard_s: u64,
    /// Its numbers.
    pub counts: Counts,
}

/// A series: its labels and what was counted.
pub type Counted = (BTreeMap<String, String>, u64);

/// All that was counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Counters by the name of their metric, each with its labels.
    pub counters: BTreeMap<String, Vec<Counted>>,
    /// Times.
    pub times: BTreeMap<String, Observed>,
    /// Where the rollout's counts for people begin, and since when, Unix milliseconds.
    #[serde(default)]
    pub reset: (Tally, u64),
}

/// The book.
#[derive(Debug)]
pub struct Book(Database);

/// What stands in it.
pub type Contents = (Totals, HashMap<String, Known>);

impl Book {
    /// Opens it and reads what stands there. One that cannot be read is put aside, and another one is begun: no key
    /// depends on it.
    ///
    /// # Errors
    /// When none can be made.
    pub fn open(dir: &Path) -> Result<(Self, Contents), BookError> {
        let path = dir.join(FILE);
        match Self::try_open(&path) {
            Ok(opened) => Ok(opened),
            Err(error) => {
                let aside = dir.join(format!("{FILE}.broken"));
                tracing::error!(%error, aside = %aside.display(), "the counts of proxies begin anew");
                let _gone_already = std::fs::rename(&path, &aside);
                Self::try_open(&path)
            }
        }
    }

    fn try_open(path: &Path) -> Result<(Self, Contents), BookError> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let book = Self(Database::builder().create_with_backend(FileBackend::new(file)?)?);
        let write = book.0.begin_write()?;
        write.open_table(PROXIES)?;
        write.open_table(TOTALS)?;
        write.commit()?;
        let read = book.0.begin_read()?;
        let totals = match read.open_table(TOTALS)?.get(())? {
            Some(bytes) => serde_json::from_slice(bytes.value())?,
            None => Totals::default(),
        };
        let mut known = HashMap::new();
        for entry in read.open_table(PROXIES)?.iter()? {
            let (id, bytes) = entry?;
            known.insert(id.value().to_owned(), serde_json::from_slice(bytes.value())?);
        }
        Ok((book, (totals, known)))
    }

    /// Writes totals, with the proxies whose numbers are in them, and forgets others; all at once, and on disk.
    ///
    /// # Errors
    /// When the disk does not take it; nothing is written then.
    pub fn write(
        &self,
        totals: &Totals,
        known: &[(String, Known)],
        forgotten: &[String],
    ) -> Result<(), BookError> {
        let write = self.0.begin_write()?;
        {
            let mut proxies = write.open_table(PROXIES)?;
            for (id, known) in known {
                proxies.insert(id.as_str(), serde_json::to_vec(known)?.as_slice())?;
            }
            for id in forgotten {
                proxies.remove(id.as_str())?;
            }
            write.open_table(TOTALS)?.insert((), serde_json::to_vec(totals)?.as_slice())?;
        }
        write.commit()?;
        Ok(())
    }
}
