//! Signing secrets in Redis: other control planes have the data keys from there that open what they take in.

use std::sync::Arc;

use super::error::LinkError;
use super::session::{Session, SessionError};
use super::{log, names, projection};
use crate::secrets::keyring::Wraps;
use crate::secrets::record::SecretRecord;

impl Session<'_> {
    /// The data keys of secrets that are not here yet, as another control plane wrapped them.
    pub async fn data_keys(
        &self,
        secrets: impl Iterator<Item = &SecretRecord>,
    ) -> Result<Vec<(String, Wraps)>, SessionError> {
        let mut found = Vec::new();
        for secret in secrets {
            let Some(id) = secret.data_key().filter(|id| !self.node.keys.has(id)) else { continue };
            let text: Option<String> =
                match self.reading.query(redis::cmd("GET").arg(names::secret(&secret.kid))).await {
                    Err(LinkError::WrongType) => None,
                    answer => answer?,
                };
            let wraps = text.and_then(|text| projection::data_key(&text, id));
            found.extend(wraps.map(|wraps| (id.to_owned(), wraps)));
        }
        Ok(found)
    }

    /// Looks again for the data keys of secrets that cannot be opened here.
    pub async fn fetch_data_keys(&self) -> Result<(), SessionError> {
        let secrets = Arc::clone(&self.node.state().secrets);
        let found = self.data_keys(secrets.locked()).await?;
        let is_here = |record: &SecretRecord| record.data_key().is_some_and(|id| self.node.keys.has(id));
        if !found.is_empty() || secrets.locked().any(is_here) {
            self.node.writer.unlock(found).await?;
        }
        Ok(())
    }

    /// Writes every secret whose data key is here, as it stands.
    pub async fn write_secrets(&self) -> Result<(), SessionError> {
        let secrets = Arc::clone(&self.node.state().secrets);
        let open = secrets.all().into_iter().filter(|held| held.is_open());
        let writes =
            open.flat_map(|held| projection::secret(&held.record, &self.node.keys, self.node.clock.now_s()));
        let commands: Vec<_> = writes.flat_map(|write| write.commands(self.writing.is_cluster())).collect();
        Ok(log::write_keys(&self.writing, &commands).await?)
    }

    /// Writes the secrets again whose data key others should find in Redis and do not: somebody deleted it, or wrote
    /// another one of two that were made at once.
    pub async fn check_secrets(&self) -> Result<(), SessionError> {
        let secrets = Arc::clone(&self.node.state().secrets);
        for held in secrets.all() {
            let Some(id) = held.record.data_key().filter(|_| held.is_open()) else { continue };
            let get = redis::cmd("GET").arg(names::secret(&held.record.kid)).to_owned();
            let there: Option<String> = match self.reading.query(&get).await {
                Err(LinkError::WrongType) => None,
                answer => answer?,
            };
            if there.and_then(|text| projection::data_key(&text, id)).is_some() {
                continue;
            }
            let writes = projection::secret(&held.record, &self.node.keys, self.node.clock.now_s());
            let is_cluster = self.reading.is_cluster();
            let commands: Vec<_> = writes.iter().flat_map(|write| write.commands(is_cluster)).collect();
            match log::write_keys(&self.reading, &commands).await {
                Err(error) if error.must_reconnect() => return Err(error.into()),
                _ => {}
            }
        }
        Ok(())
    }
}
