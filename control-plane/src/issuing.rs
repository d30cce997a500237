//! Signs the tokens of keys, for the API and for the canary.

use std::sync::Arc;

use keygate_core::secret::Secret;

use crate::config::Config;
use crate::key::KeyRecord;
use crate::secret::{SecretError, Signer};

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
