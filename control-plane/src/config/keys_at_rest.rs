//! Settings of the master key, which seals secrets at rest, and of the HSM.

use std::path::{Path, PathBuf};

use super::raw::RawConfig;
use super::value::{label, path};
use crate::secrets::master_key::Source;

/// An HSM, without its PIN.
#[derive(Debug, Clone)]
pub struct HsmSettings {
    /// The PKCS#11 module.
    pub module: PathBuf,
    /// The label of the token.
    pub token: String,
    /// File with the PIN.
    pub pin_file: Option<PathBuf>,
}

impl HsmSettings {
    pub(super) fn read(raw: &mut RawConfig) -> Option<Self> {
        let module = raw.take("hsm.module", path);
        let token = raw.take("hsm.token", label);
        let pin_file = raw.take("hsm.pin_file", path);
        match (module, token) {
            (Some(module), Some(token)) => Some(Self { module, token, pin_file }),
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => {
                raw.errors.push("hsm: both hsm.module and hsm.token are needed".into());
                None
            }
        }
    }
}

/// The source of the master key, and of the former one while it is being replaced.
pub(super) fn master_keys(raw: &mut RawConfig, data_dir: &Path) -> (Source, Option<Source>) {
    let file = raw.take("master_key_file", path);
    let former_file = raw.take("previous_master_key_file", path);
    let in_hsm = raw.take("hsm.master_key", label).map(Source::Hsm);
    let former_in_hsm = raw.take("hsm.previous_master_key", label).map(Source::Hsm);
    if file.is_some() && in_hsm.is_some() {
        raw.errors.push(
            "hsm.master_key: master_key_file names a master key too; to go over to the HSM's, name the file as previous_master_key_file".into(),
        );
    }
    if former_file.is_some() && former_in_hsm.is_some() {
        raw.errors.push("hsm.previous_master_key: previous_master_key_file names one too; keep one".into());
    }
    let current = in_hsm.unwrap_or_else(|| Source::File(file.unwrap_or_else(|| data_dir.join("master.key"))));
    (current, former_in_hsm.or_else(|| former_file.map(Source::File)))
}
