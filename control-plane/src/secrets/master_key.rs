//! The master key, which wraps the data keys of the keyring: from a file, from the environment, or in an HSM that
//! wraps with it and never gives it away.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use keygate_core::secret::Secret;

use crate::platform::files;
use crate::platform::random;
use crate::secrets::hsm::{Hsm, HsmError};
use crate::secrets::root_key::RootKey;
use crate::secrets::seal::{open, seal};

/// Why there is no master key.
#[derive(Debug, thiserror::Error)]
#[error("master key {origin}: {problem}")]
pub struct MasterKeyError {
    /// Where it should come from.
    origin: String,
    /// What is wrong.
    problem: String,
}

/// The key that wraps data keys.
#[derive(Clone)]
pub struct MasterKey(Kind);

#[derive(Clone)]
enum Kind {
    /// Its bytes are here.
    Here(Secret<[u8; 32]>),
    /// In an HSM, by its label.
    InHsm(Arc<Hsm>, String),
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MasterKey({})", self.id())
    }
}

impl MasterKey {
    /// Reads the master key's file; makes it, mode 0600, if `may_create`.
    ///
    /// # Errors
    /// When it is missing and may not be made, or is not 32 bytes in base64url.
    pub fn load(path: &Path, may_create: bool) -> Result<Self, MasterKeyError> {
        let error = |problem: String| MasterKeyError { origin: path.display().to_string(), problem };
        match std::fs::read_to_string(path).map(Secret::new) {
            Ok(text) => {
                Self::parse(text.expose()).ok_or_else(|| error("is not 32 bytes in base64url".into()))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound && may_create => {
                let text = Secret::new(BASE64URL.encode(Secret::new(random::bytes::<32>()).expose()));
                files::write_private(path, text.expose().as_bytes()).map_err(|e| error(e.to_string()))?;
                Self::parse(text.expose()).ok_or_else(|| error("cannot be made".into()))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Err(error(
                "is not there, but secrets were sealed with it; put it back, without it no key can be issued"
                    .into(),
            )),
            Err(e) => Err(error(e.to_string())),
        }
    }

    /// From the text of a variable.
    ///
    /// # Errors
    /// When it is not 32 bytes in base64url.
    pub fn from_variable(variable: &'static str, text: &str) -> Result<Self, MasterKeyError> {
        Self::parse(text).ok_or_else(|| MasterKeyError {
            origin: variable.into(),
            problem: "is not 32 bytes in base64url, as `openssl rand 32 | basenc --base64url` gives them"
                .into(),
        })
    }

    /// The AES key of that label in an HSM.
    pub fn in_hsm(hsm: Arc<Hsm>, label: String) -> Self {
        Self(Kind::InHsm(hsm, label))
    }

    /// From its bytes.
    pub fn of(bytes: [u8; 32]) -> Self {
        Self(Kind::Here(Secret::new(bytes)))
    }

    fn parse(text: &str) -> Option<Self> {
        let bytes = Secret::new(BASE64URL.decode(text.trim().trim_end_matches('=')).ok()?);
        Some(Self(Kind::Here(Secret::new(bytes.expose().as_slice().try_into().ok()?))))
    }

    /// The root of a keyring that begins with it: the same each time; `None` where an HSM keeps it.
    pub fn first_root(&self) -> Option<Secret<[u8; 32]>> {
        match &self.0 {
            Kind::Here(bytes) => Some(RootKey::from(bytes.clone()).derive("keygate keyring root")),
            Kind::InHsm(..) => None,
        }
    }

    /// Tells it apart from others, and says nothing of it.
    pub fn id(&self) -> String {
        match &self.0 {
            Kind::Here(bytes) => {
                let id = RootKey::from(bytes.clone()).derive("keygate master key id");
                id.expose()[..6].iter().map(|byte| format!("{byte:02x}")).collect()
            }
            Kind::InHsm(_, label) => format!("hsm:{label}"),
        }
    }

    /// Wraps a key, bound to `associated`.
    ///
    /// # Errors
    /// When the HSM fails.
    pub fn wrap(&self, associated: &str, key: &[u8; 32]) -> Result<String, HsmError> {
        match &self.0 {
            Kind::Here(bytes) => Ok(seal(wrapping(bytes).expose(), associated, key)),
            Kind::InHsm(hsm, label) => Ok(BASE64URL.encode(hsm.wrap(label, associated.as_bytes(), key)?)),
        }
    }

    /// Unwraps what [`MasterKey::wrap`] wrapped with the same `associated`; `None` when that is not so.
    ///
    /// # Errors
    /// When the HSM fails.
    pub fn unwrap(&self, associated: &str, wrapped: &str) -> Result<Option<Secret<[u8; 32]>>, HsmError> {
        let key = match &self.0 {
            Kind::Here(bytes) => open(wrapping(bytes).expose(), associated, wrapped),
            Kind::InHsm(hsm, label) => {
                let Ok(wrapped) = BASE64URL.decode(wrapped) else { return Ok(None) };
                match hsm.unwrap(label, associated.as_bytes(), &wrapped) {
                    Ok(key) => Some(key),
                    Err(HsmError::DoesNotOpen { .. }) => None,
                    Err(error) => return Err(error),
                }
            }
        };
        Ok(key.and_then(|key| key.expose().as_slice().try_into().ok()).map(Secret::new))
    }
}

/// The key that wraps: another one than what else is derived from the master key.
fn wrapping(bytes: &Secret<[u8; 32]>) -> Secret<[u8; 32]> {
    RootKey::from(bytes.clone()).derive("keygate wrapped data keys")
}

/// Where a master key comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A file.
    File(PathBuf),
    /// The HSM, by its label.
    Hsm(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_master_key_is_made_once_and_missed_when_it_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("master.key");
        assert!(MasterKey::load(&path, false).is_err());
        let made = MasterKey::load(&path, true).unwrap();
        assert_eq!(made.id(), MasterKey::load(&path, false).unwrap().id());
        std::fs::write(&path, "short").unwrap();
        assert!(MasterKey::load(&path, true).is_err());
        assert!(MasterKey::from_variable("V", "short").is_err());
    }

    #[test]
    fn a_key_is_unwrapped_by_who_wrapped_it_in_its_place_only() {
        let (one, two) = (MasterKey::of([1; 32]), MasterKey::of([2; 32]));
        assert_ne!(one.id(), two.id());
        let wrapped = one.wrap("a", &[7; 32]).unwrap();
        assert_eq!(one.unwrap("a", &wrapped).unwrap(), Some(Secret::new([7; 32])));
        assert!(one.unwrap("b", &wrapped).unwrap().is_none());
        assert!(two.unwrap("a", &wrapped).unwrap().is_none());
    }
}
