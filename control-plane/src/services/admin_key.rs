//! The key of the first operator: a new history begins with one, and a restored one gets another.

use std::fs;
use std::io;
use std::path::Path;

use keygate_core::decide::rules::RulesError;

use crate::config::Config;
use crate::durability::journal::JournalError;
use crate::durability::writer::{CommitError, OpenError};
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::Change;
use crate::model::commands::emergency;
use crate::model::key::{Creator, KeyRecord, KeyRequest};
use crate::node::Node;
use crate::platform::files;
use crate::secrets::record::Signer;
use crate::secrets::record::ring::Held;

/// Stands in the data directory until a new admin key was written.
const WANTED: &str = "admin_key.wanted";

/// No admin key is issued.
#[derive(Debug, thiserror::Error)]
pub enum AdminKeyError {
    /// It cannot be made or written.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be journalled.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// Has the control plane of a data directory write a new admin key at its next start.
///
/// # Errors
/// When the directory cannot be written.
pub fn want_at_start(data_dir: &Path) -> io::Result<()> {
    files::write_private(&data_dir.join(WANTED), b"")
}

/// The same, for a control plane that runs.
pub(super) fn want(data_dir: &Path) {
    if let Err(error) = want_at_start(data_dir) {
        tracing::error!(%error, "it cannot be noted that a new admin key is to be written");
    }
}

/// Whether a new admin key is to be written.
pub(super) fn is_wanted(data_dir: &Path) -> bool {
    data_dir.join(WANTED).exists()
}

/// Issues a new admin key if one is wanted and can be signed at once; the secret that signed it.
pub async fn issue_if_wanted(node: &Node) -> Option<String> {
    let may_be = is_wanted(&node.config.data_dir) && node.state().secrets.signer().is_ok();
    if may_be { issue_when_signed(node).await } else { None }
}

/// Issues a new admin key once there is a secret that signs and that proxies know; that secret.
pub(super) async fn issue_when_signed(node: &Node) -> Option<String> {
    let mut states = node.states.clone();
    states.wait_for(|state| state.secrets.signer().is_ok()).await.ok()?;
    match issue(node).await {
        Ok(kid) => {
            if let Err(error) = fs::remove_file(node.config.data_dir.join(WANTED)) {
                tracing::error!(%error, "a new admin key will be written at the next start, too");
            }
            Some(kid)
        }
        Err(error) => {
            tracing::error!(%error, "no new admin key is written; try keygate serve --new-admin-key");
            None
        }
    }
}

/// Issues another admin key, which no rule in force refuses, and writes it to the file of the first one, which stays valid. No
/// key is asked for: the caller starts the control plane, with its master key. Returns the secret that signed it.
///
/// # Errors
/// When it cannot be issued or written.
pub async fn issue(node: &Node) -> Result<String, AdminKeyError> {
    let config = node.config.clone();
    let plan = move |view: &View<'_>| {
        let signer = view.model.secrets().active().and_then(Held::signer).cloned();
        let signer = signer.ok_or(OpenError::Rules(RulesError::Invalid("no secret signs")))?;
        let key = record(&config, &signer, view.now)?;
        let mut changes = emergency::spare(view, &key);
        changes.push(Change::KeyIssued { key: Box::new(key.clone()), idempotency: None });
        Ok::<_, OpenError>((changes, (key, signer)))
    };
    let author = Author::part("system").because(Some("a new admin key was asked for at the start".into()));
    let ((key, signer), _) = node.writer.submit(&author, plan).await??;
    write(&node.config, &signer, &key)?;
    Ok(key.kid)
}

/// The record of an admin key.
///
/// # Errors
/// When the configuration has no role for it.
pub fn record(config: &Config, signer: &Signer, now: u64) -> Result<KeyRecord, OpenError> {
    let scopes = config.roles.get("admin").map_or_else(String::new, |admin| admin.scopes.join(" "));
    let request = KeyRequest { name: "bootstrap".into(), role: "admin".into(), ..KeyRequest::default() };
    let creator = Creator { key_id: None, role: "admin", limit_role: "admin", scopes: &scopes, owner: None };
    request.record(creator, &config.roles, signer.identity(), &signer.kid, now).map_err(OpenError::FirstKey)
}

/// Writes the token of a key to the file of the first admin key.
///
/// # Errors
/// When it cannot be signed or written.
pub fn write(config: &Config, signer: &Signer, key: &KeyRecord) -> Result<(), OpenError> {
    let token = signer.sign(&key.claims(&config.issuer, config.audience.as_deref()))?;
    files::write_private(&config.admin_key_file, token.expose().as_bytes())
        .map_err(|source| JournalError::Io { path: config.admin_key_file.clone(), source })?;
    tracing::info!(path = %config.admin_key_file.display(), key_id = key.key_id, "wrote an admin key");
    Ok(())
}
