//! Issues keys: makes the record, signs the token, then journals both, for the API and for the canary. A key that cannot be
//! signed is not issued.

use std::sync::Arc;
use std::time::Duration;

use keygate_core::secret::Secret;

use crate::config::Config;
use crate::durability::writer::{CommitError, Committed};
use crate::model::View;
use crate::model::author::Author;
use crate::model::change::Change;
use crate::model::commands::keys::{Issuance, IssueError};
use crate::model::key::{KeyRecord, KeyRequestError};
use crate::node::Node;
use crate::secrets::record::ring::NoSigner;
use crate::secrets::record::{SecretError, Signer};

/// Time for which a caller waits for the secret that signs.
const SIGNER_WITHIN: Duration = Duration::from_secs(10);
/// Number of times that a key is made again because another secret signs by then. Rotations are at least a second apart.
const TRIES: usize = 3;

/// A key that was issued, and its token.
pub struct Issued {
    /// Its record.
    pub key: KeyRecord,
    /// Its token.
    pub token: Secret<String>,
    /// Whether an earlier request issued it.
    pub replayed: bool,
}

/// A key cannot be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// The secret does not sign.
    #[error("the key cannot be signed: {0}")]
    Secret(#[from] SecretError),
    /// The thread that signs ended.
    #[error("the key was not signed: the control plane stops")]
    Stopped,
}

/// A key is not issued.
#[derive(Debug, thiserror::Error)]
pub enum IssuingError {
    /// The request for it is refused.
    #[error(transparent)]
    Request(#[from] KeyRequestError),
    /// The command is refused.
    #[error(transparent)]
    Command(#[from] IssueError),
    /// Nothing signs.
    #[error(transparent)]
    NoSigner(#[from] NoSigner),
    /// It cannot be signed.
    #[error(transparent)]
    Sign(#[from] SignError),
    /// It cannot be journalled.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// Another secret signs each time that it was made.
    #[error("Secrets are being rotated; retry later.")]
    Rotating,
}

/// Issues a key in the name of `author`: `make` makes its record for the secret that signs it, at a Unix second; `command`
/// decides about it.
///
/// # Errors
/// See [`IssuingError`].
pub async fn issue<M, C>(
    node: &Node,
    author: &Author,
    make: M,
    command: C,
) -> Result<(Issued, Committed), IssuingError>
where
    M: Fn(&Signer, u64) -> Result<KeyRecord, KeyRequestError>,
    C: Fn(&View<'_>, &KeyRecord) -> Result<(Vec<Change>, Issuance), IssueError> + Clone + Send + 'static,
{
    for _ in 0..TRIES {
        wait_for_signer(node).await;
        let signer = Arc::clone(node.state().secrets.signer()?);
        let made_at = node.clock.now_s();
        let key = make(&signer, made_at)?;
        let token = token(&node.config, &signer, &key).await?;
        let (command, made) = (command.clone(), key.clone());
        let (issuance, committed) =
            node.writer.submit(author, move |view: &View<'_>| command(view, &made)).await??;
        match issuance {
            Issuance::Overtaken => {}
            Issuance::EndsThisSecond => wait_next_second(node, made_at).await,
            Issuance::New => return Ok((Issued { key, token, replayed: false }, committed)),
            Issuance::Replayed(key, signer) => {
                let token = self::token(&node.config, &signer, &key).await?;
                return Ok((Issued { key: *key, token, replayed: true }, committed));
            }
        }
    }
    Err(IssuingError::Rotating)
}

/// The token of a key.
///
/// # Errors
/// See [`SignError`].
pub async fn token(
    config: &Config,
    signer: &Arc<Signer>,
    key: &KeyRecord,
) -> Result<Secret<String>, SignError> {
    let claims = key.claims(&config.issuer, config.audience.as_deref());
    if !signer.takes_long() {
        return Ok(signer.sign(&claims)?);
    }
    let signer = Arc::clone(signer);
    let signed = tokio::task::spawn_blocking(move || signer.sign(&claims)).await;
    Ok(signed.map_err(|_| SignError::Stopped)??)
}

/// Waits until the second is over in which a key was made.
async fn wait_next_second(node: &Node, made_at: u64) {
    let next_ms = made_at.saturating_add(1).saturating_mul(1_000);
    let left = next_ms.saturating_sub(node.clock.now_ms()).min(1_000);
    tokio::time::sleep(Duration::from_millis(left)).await;
}

/// Waits a moment until a secret signs: after an immediate rotation none does until every live proxy knows the new one.
pub async fn wait_for_signer(node: &Node) {
    let mut states = node.states.clone();
    let signs = states.wait_for(|state| state.secrets.signer().is_ok());
    let _signs_or_not = tokio::time::timeout(SIGNER_WITHIN, signs).await;
}
