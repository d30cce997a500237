//! Counts on disk: the totals, and of each proxy how far its numbers are in them. A database of its own, so that its
//! fsyncs hold up no change of keys.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use keygate_core::telemetry::Counts;
use redb::backends::FileBackend;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};

use super::counts::Counts as Counted;
use super::tally::Tally;

/// JSON of [`Known`], by the proxy's incarnation and id.
const PROXIES: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("proxies");
/// JSON of [`Totals`].
const TOTALS: TableDefinition<'_, (), &[u8]> = TableDefinition::new("totals");

const FILE: &str = "telemetry.redb";
/// Format of [`Totals`]. A file of another one is put aside.
const FORMAT: u32 = 2;

/// Failure to read or write the counts.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryStoreError {
    /// The database.
    #[error("the counts of proxies cannot be kept: {0}")]
    Database(#[from] redb::Error),
    /// The file.
    #[error("the counts of proxies cannot be kept: {0}")]
    Io(#[from] std::io::Error),
    /// Bytes that are no counts.
    #[error("the counts of proxies cannot be read: {0}")]
    Json(#[from] serde_json::Error),
    /// Counts of another version.
    #[error("the counts of proxies have format {0}; this version reads format {FORMAT}")]
    Format(u32),
}

crate::durability::store::from_redb!(TelemetryStoreError);

/// Numbers of one proxy's process that are counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Known {
    /// Time of its last report, Unix seconds.
    pub heard_s: u64,
    /// Its numbers.
    pub counts: Counts,
}

/// Everything that is counted, as it is saved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    format: u32,
    /// Counts.
    pub counts: Counted,
    /// Counts of the rollout when an operator last reset them, and when that was, Unix milliseconds; 0: never.
    pub reset: (Tally, u64),
}

impl Totals {
    /// Totals in the format of this version.
    pub const fn new(counts: Counted, reset: (Tally, u64)) -> Self {
        Self { format: FORMAT, counts, reset }
    }

    fn read(bytes: &[u8]) -> Result<Self, TelemetryStoreError> {
        #[derive(Deserialize)]
        struct Header {
            #[serde(default)]
            format: u32,
        }
        let Header { format } = serde_json::from_slice(bytes)?;
        if format != FORMAT {
            return Err(TelemetryStoreError::Format(format));
        }
        Ok(serde_json::from_slice(bytes)?)
    }
}

impl Default for Totals {
    fn default() -> Self {
        Self::new(Counted::default(), Default::default())
    }
}

/// File of the counts.
#[derive(Debug)]
pub struct TelemetryStore(Database);

/// Contents of the file.
pub type Contents = (Totals, HashMap<String, Known>);

impl TelemetryStore {
    /// Opens and reads the file. One that cannot be read is put aside and an empty one is made: no key depends on it.
    ///
    /// # Errors
    /// When no file can be made.
    pub fn open(dir: &Path) -> Result<(Self, Contents), TelemetryStoreError> {
        let path = dir.join(FILE);
        match Self::try_open(&path) {
            Ok(opened) => Ok(opened),
            Err(error) => {
                let aside = dir.join(format!("{FILE}.broken"));
                tracing::error!(%error, aside = %aside.display(), "the counts of proxies start from zero; the file is put aside");
                let _gone_already = std::fs::rename(&path, &aside);
                Self::try_open(&path)
            }
        }
    }

    fn try_open(path: &Path) -> Result<(Self, Contents), TelemetryStoreError> {
        let file =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let store = Self(Database::builder().create_with_backend(FileBackend::new(file)?)?);
        let write = store.0.begin_write()?;
        write.open_table(PROXIES)?;
        write.open_table(TOTALS)?;
        write.commit()?;
        let read = store.0.begin_read()?;
        let totals = match read.open_table(TOTALS)?.get(())? {
            Some(bytes) => Totals::read(bytes.value())?,
            None => Totals::default(),
        };
        let mut known = HashMap::new();
        for entry in read.open_table(PROXIES)?.iter()? {
            let (id, bytes) = entry?;
            known.insert(id.value().to_owned(), serde_json::from_slice(bytes.value())?);
        }
        Ok((store, (totals, known)))
    }

    /// Writes totals together with the proxies whose numbers are in them, and removes `forgotten` ones, in one durable
    /// transaction.
    ///
    /// # Errors
    /// When the disk does not take it; nothing is written then.
    pub fn write(
        &self,
        totals: &Totals,
        known: &[(String, Known)],
        forgotten: &[String],
    ) -> Result<(), TelemetryStoreError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_another_format_are_refused_with_both_formats() {
        let error = Totals::read(br#"{"counters":{},"times":{}}"#).unwrap_err();
        assert_eq!(error.to_string(), "the counts of proxies have format 0; this version reads format 2");
        let totals = serde_json::to_vec(&Totals::default()).unwrap();
        assert_eq!(Totals::read(&totals).unwrap(), Totals::default());
    }
}
