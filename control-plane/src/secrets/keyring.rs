//! The keyring: the data keys that open secrets at rest, each wrapped with the master key, in a file of its own beside
//! the journal.
//!
//! ```text
//! {"format":1,"keys":{"root":{"<master>":"<wrapped>"},"<id>":{"<master>":"<wrapped>",…},…}}
//! ```
//!
//! The journal is kept for years and only grows; what is here is taken away when it is not needed any more, and what
//! it opened is gone with it, in the journal, in backups of the journal and in Redis. `root` is the key from which
//! all others are derived that have nothing to do with one secret: of personal data, checkpoints, the shared log.
//!
//! `<master>` tells master keys apart. While a new master key takes the place of an old one, both are given, and each
//! entry that lacks the new one's wrap gets it; the old ones' go once only the new one is given. The file is
//! replaced as a whole, so it can be killed at any moment. The writer's thread alone changes it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use keygate_core::secret::Secret;
use serde::{Deserialize, Serialize};

use crate::platform::files;
use crate::platform::random;
use crate::secrets::hsm::{Hsm, HsmError};
use crate::secrets::master_key::MasterKey;
use crate::secrets::root_key::RootKey;

/// The file, in the data directory.
pub const FILE: &str = "keyring.json";
const FORMAT: u32 = 1;
const ROOT: &str = "root";

/// One data key as each master key wrapped it, by the master key's id.
pub type Wraps = BTreeMap<String, String>;

/// Why data keys cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum KeyringError {
    /// The file cannot be read or written.
    #[error("keyring {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no keyring.
    #[error("keyring {path}: {problem}; restore it from a backup")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The fault.
        problem: String,
    },
    /// Neither master key opens an entry.
    #[error(
        "the keyring was sealed with master key {sealed_with}, and this one is {given}: put the right one back; to change it, name the old one as previous_master_key_file"
    )]
    OtherMasterKey {
        /// Those that it was wrapped with.
        sealed_with: String,
        /// Those that are given.
        given: String,
    },
    /// An entry that was changed, or wrapped for another place.
    #[error("the keyring's entry {id} does not open: it was changed; restore the keyring from a backup")]
    Tampered {
        /// Which.
        id: String,
    },
    /// It is gone.
    #[error("keyring {0} is missing, and the journal beside it is not empty: restore both from one backup")]
    Missing(PathBuf),
    /// Its journal is gone.
    #[error(
        "{0} has the data keys of a journal, and there is none: is its directory not mounted? Put it back, or restore a backup \
             (keygate backup restore). To start over, move the keyring away"
    )]
    JournalMissing(PathBuf),
    /// The HSM with the master key.
    #[error(transparent)]
    Hsm(#[from] HsmError),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    format: u32,
    /// Whether no journal needs its data keys yet: the first start was not finished.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    unused: bool,
    /// The public key that checkpoints of the journal are signed with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    checkpoint_key: Option<String>,
    keys: BTreeMap<String, Wraps>,
}

/// The keyring.
pub struct Keyring {
    /// `None`: it is kept in memory, for tests and for reading.
    path: Option<PathBuf>,
    master: MasterKey,
    previous: Option<MasterKey>,
    hsm: Option<Arc<Hsm>>,
    root: RootKey,
    keys: Mutex<BTreeMap<String, Wraps>>,
    /// Whether no journal needs its data keys yet.
    unused: AtomicBool,
    checkpoint_key: OnceLock<String>,
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyring")
            .field("path", &self.path)
            .field("master", &self.master)
            .finish_non_exhaustive()
    }
}

/// The keys that open a keyring, and the HSM, if there is one.
#[derive(Debug)]
pub struct Masters {
    /// The master key.
    pub master: MasterKey,
    /// The one before, while it is being replaced.
    pub previous: Option<MasterKey>,
    /// The HSM that may keep secrets.
    pub hsm: Option<Arc<Hsm>>,
}

impl Keyring {
    /// Opens the keyring of a data directory. With `begins_anew` the journal is empty: a keyring that is missing is made, and
    /// one with data keys is refused, but for those of a first start that was not finished. The root of a new one is derived from
    /// the master key, so control planes that begin with the same master key have the same root; with a master key in
    /// an HSM, which does not give its bytes, it is random. Entries that lack a wrap of the master key get it.
    ///
    /// # Errors
    /// When there is none, it does not open, or it cannot be written.
    pub fn open(data_dir: &Path, masters: Masters, begins_anew: bool) -> Result<Self, KeyringError> {
        let path = data_dir.join(FILE);
        let Masters { master, previous, hsm } = masters;
        let file = read_file(&path)?;
        let found = file.as_ref().map(|file| {
            let mut keys = file.keys.clone();
            if begins_anew && file.unused {
                keys.retain(|id, _| id == ROOT);
            }
            keys
        });
        if begins_anew && found.as_ref().is_some_and(|keys| keys.len() > 1) {
            return Err(KeyringError::JournalMissing(path));
        }
        let (root, keys) = match &found {
            Some(keys) => (unwrap_root(&path, &master, previous.as_ref(), keys)?, keys.clone()),
            None if !begins_anew => return Err(KeyringError::Missing(path)),
            None => {
                let root = previous.as_ref().unwrap_or(&master).first_root();
                let root = root.unwrap_or_else(|| Secret::new(random::bytes::<32>()));
                let wraps = Wraps::from([(master.id(), master.wrap(&associated(ROOT), root.expose())?)]);
                (root, BTreeMap::from([(ROOT.to_owned(), wraps)]))
            }
        };
        let keyring = Self {
            path: Some(path),
            master,
            previous,
            hsm,
            root: RootKey::from(root),
            keys: Mutex::new(keys),
            unused: AtomicBool::new(begins_anew),
            checkpoint_key: file.and_then(|file| file.checkpoint_key).map(OnceLock::from).unwrap_or_default(),
        };
        let changed = keyring.rewrap()?;
        if changed > 0 && found.is_some() {
            keyring.write(&keyring.lock())?;
            tracing::info!(
                changed,
                "data keys were wrapped with the master key, or dropped an old one's wrap"
            );
        }
        Ok(keyring)
    }

    /// Writes it, once the journal has records that need it. Until then one that was not there before is not, so that a
    /// wrong master key, which shows when the journal is read, leaves nothing behind.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn save(&self) -> Result<(), KeyringError> {
        self.unused.store(false, Ordering::Relaxed);
        self.write(&self.lock())
    }

    /// Notes the public key that checkpoints of the journal are signed with, for those who verify it.
    pub fn note_checkpoint_key(&self, key: String) {
        let _same = self.checkpoint_key.set(key);
    }

    /// The same, for reading beside a control plane that may run: nothing is written.
    ///
    /// # Errors
    /// When there is none, or it does not open.
    pub fn read_only(data_dir: &Path, masters: Masters) -> Result<Self, KeyringError> {
        let path = data_dir.join(FILE);
        let Masters { master, previous, hsm } = masters;
        let Some(keys) = read(&path)? else { return Err(KeyringError::Missing(path)) };
        let root = RootKey::from(unwrap_root(&path, &master, previous.as_ref(), &keys)?);
        let (unused, checkpoint_key) = (AtomicBool::default(), OnceLock::new());
        Ok(Self { path: None, master, previous, hsm, root, keys: Mutex::new(keys), unused, checkpoint_key })
    }

    /// One that is kept nowhere, for tests and for reading a journal.
    pub fn in_memory(master: MasterKey, root: RootKey) -> Self {
        Self {
            path: None,
            master,
            previous: None,
            hsm: None,
            root,
            keys: Mutex::default(),
            unused: AtomicBool::default(),
            checkpoint_key: OnceLock::new(),
        }
    }

    /// Gives every entry the wraps that it should have; how many had others.
    fn rewrap(&self) -> Result<usize, KeyringError> {
        let mut changed = 0;
        for (id, wraps) in self.lock().iter_mut() {
            let before = wraps.clone();
            for master in [Some(&self.master), self.previous.as_ref()].into_iter().flatten() {
                if !wraps.contains_key(&master.id()) {
                    let key = unwrap(&self.master, self.previous.as_ref(), id, wraps)?;
                    wraps.insert(master.id(), master.wrap(&associated(id), key.expose())?);
                }
            }
            wraps.retain(|master, _| self.given().any(|given| given.id() == *master));
            changed += usize::from(*wraps != before);
        }
        Ok(changed)
    }

    fn given(&self) -> impl Iterator<Item = &MasterKey> {
        [Some(&self.master), self.previous.as_ref()].into_iter().flatten()
    }

    /// The root.
    pub fn root(&self) -> &RootKey {
        &self.root
    }

    /// The HSM that may keep secrets.
    pub fn hsm(&self) -> Option<&Arc<Hsm>> {
        self.hsm.as_ref()
    }

    /// A data key; `None` when it is not there.
    ///
    /// # Errors
    /// When it does not open.
    pub fn get(&self, id: &str) -> Result<Option<Secret<[u8; 32]>>, KeyringError> {
        let wraps = self.lock().get(id).cloned();
        wraps.map(|wraps| unwrap(&self.master, self.previous.as_ref(), id, &wraps)).transpose()
    }

    /// Whether a data key is there.
    pub fn has(&self, id: &str) -> bool {
        self.lock().contains_key(id)
    }

    /// A data key as it is wrapped, for other control planes; `None` when it is not there.
    pub fn wraps(&self, id: &str) -> Option<Wraps> {
        self.lock().get(id).cloned()
    }

    /// Keeps a data key, durably.
    ///
    /// # Errors
    /// When it cannot be wrapped or written; then it is not kept.
    pub fn put(&self, id: &str, key: &[u8; 32]) -> Result<(), KeyringError> {
        let mut wraps = Wraps::new();
        for master in self.given() {
            wraps.insert(master.id(), master.wrap(&associated(id), key)?);
        }
        self.change(|keys| drop(keys.insert(id.to_owned(), wraps)))
    }

    /// Keeps a data key as another control plane wrapped it, durably, if it opens here.
    ///
    /// # Errors
    /// When it does not, or cannot be written.
    pub fn take(&self, id: &str, wraps: &Wraps) -> Result<(), KeyringError> {
        if self.lock().contains_key(id) {
            return Ok(());
        }
        let key = unwrap(&self.master, self.previous.as_ref(), id, wraps)?;
        self.put(id, key.expose())
    }

    /// Destroys every data key but these; how many there were. What they opened is gone for good.
    ///
    /// # Errors
    /// When the file cannot be written; then they are still there.
    pub fn keep_only(&self, ids: &BTreeSet<&str>) -> Result<usize, KeyringError> {
        let stays = |id: &str| id == ROOT || ids.contains(id);
        let surplus = self.lock().keys().filter(|id| !stays(id)).count();
        if surplus > 0 {
            self.change(|keys| keys.retain(|id, _| stays(id)))?;
        }
        Ok(surplus)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, Wraps>)) -> Result<(), KeyringError> {
        let mut keys = self.lock();
        let mut changed = keys.clone();
        change(&mut changed);
        self.write(&changed)?;
        *keys = changed;
        Ok(())
    }

    fn write(&self, keys: &BTreeMap<String, Wraps>) -> Result<(), KeyringError> {
        let Some(path) = &self.path else { return Ok(()) };
        let unused = self.unused.load(Ordering::Relaxed);
        let checkpoint_key = self.checkpoint_key.get().cloned();
        write_file(path, &File { format: FORMAT, unused, checkpoint_key, keys: keys.clone() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Wraps>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the keyring of a data directory has data keys that a journal needs.
///
/// # Errors
/// When it cannot be read.
pub fn is_used(data_dir: &Path) -> Result<bool, KeyringError> {
    Ok(read_file(&data_dir.join(FILE))?.is_some_and(|file| !file.unused && file.keys.len() > 1))
}

/// The public key of the checkpoints beside the keyring of a data directory, if it says one.
///
/// # Errors
/// When it cannot be read.
pub fn checkpoint_key(data_dir: &Path) -> Result<Option<String>, KeyringError> {
    Ok(read_file(&data_dir.join(FILE))?.and_then(|file| file.checkpoint_key))
}

fn associated(id: &str) -> String {
    format!("keygate data key {id}")
}

fn unwrap(
    master: &MasterKey,
    previous: Option<&MasterKey>,
    id: &str,
    wraps: &Wraps,
) -> Result<Secret<[u8; 32]>, KeyringError> {
    for given in [Some(master), previous].into_iter().flatten() {
        if let Some(wrapped) = wraps.get(&given.id()) {
            let key = given.unwrap(&associated(id), wrapped)?;
            return key.ok_or_else(|| KeyringError::Tampered { id: id.into() });
        }
    }
    let ids = |ids: Vec<String>| ids.join(" or ");
    Err(KeyringError::OtherMasterKey {
        sealed_with: ids(wraps.keys().cloned().collect()),
        given: ids([Some(master), previous].into_iter().flatten().map(MasterKey::id).collect()),
    })
}

fn unwrap_root(
    path: &Path,
    master: &MasterKey,
    previous: Option<&MasterKey>,
    keys: &BTreeMap<String, Wraps>,
) -> Result<Secret<[u8; 32]>, KeyringError> {
    let wraps = keys.get(ROOT).ok_or_else(|| damaged(path, "it has no root".into()))?;
    unwrap(master, previous, ROOT, wraps)
}

fn damaged(path: &Path, problem: String) -> KeyringError {
    KeyringError::Damaged { path: path.into(), problem }
}

/// The entries of a file, wrapped as they are; `None` when there is no file.
///
/// # Errors
/// When it cannot be read, or is no keyring.
pub fn read(path: &Path) -> Result<Option<BTreeMap<String, Wraps>>, KeyringError> {
    Ok(read_file(path)?.map(|file| file.keys))
}

fn read_file(path: &Path) -> Result<Option<File>, KeyringError> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(KeyringError::Io { path: path.into(), source }),
    };
    let file: File = serde_json::from_slice(&text).map_err(|error| damaged(path, error.to_string()))?;
    if file.format != FORMAT {
        return Err(damaged(path, format!("it has format {}, this version reads {FORMAT}", file.format)));
    }
    Ok(Some(file))
}

/// Writes a file with these entries, whole or not at all.
///
/// # Errors
/// When the disk fails.
pub fn write(path: &Path, keys: BTreeMap<String, Wraps>) -> Result<(), KeyringError> {
    write_file(path, &File { format: FORMAT, unused: false, checkpoint_key: None, keys })
}

fn write_file(path: &Path, file: &File) -> Result<(), KeyringError> {
    let text = serde_json::to_vec(file).expect("plain data");
    files::write_private(path, &text).map_err(|source| KeyringError::Io { path: path.into(), source })
}

#[cfg(test)]
mod tests;
