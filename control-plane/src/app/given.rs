//! What the environment and files outside the configuration give: secrets, the keys that open what is sealed, and where
//! notifications go.

use std::path::PathBuf;
use std::sync::Arc;

use keygate_core::secret::Secret;

use super::RunError;
use crate::config::{self, Config};
use crate::observe::notify::Destination;
use crate::secrets::hsm::{Hsm, HsmConfig};
use crate::secrets::keyring::{Keyring, Masters};
use crate::secrets::master_key::{MasterKey, Source};

/// What is shorter could be guessed.
const MIN_WEBHOOK_SECRET_BYTES: usize = 16;

/// What is given by the environment alone, so that it is in no file and on no command line.
#[derive(Default)]
pub struct FromEnvironment {
    /// In place of the fleet token's file.
    pub fleet_token: Option<Secret<String>>,
    /// In place of the master key's file.
    pub master_key: Option<Secret<String>>,
    /// In place of the previous master key's file.
    pub previous_master_key: Option<Secret<String>>,
    /// In place of the PIN's file.
    pub hsm_pin: Option<Secret<String>>,
    /// In place of the file with Slack's URL.
    pub slack_url: Option<Secret<String>>,
    /// In place of the file with PagerDuty's routing key.
    pub pagerduty_key: Option<Secret<String>>,
    /// In place of the file with the secret that signs notifications.
    pub webhook_secret: Option<Secret<String>>,
}

/// The keyring, opened with the master keys that are configured; a master key that is missing is made if `may_create`.
pub fn keyring(config: &Config, given: &FromEnvironment, may_create: bool) -> Result<Keyring, RunError> {
    let hsm = match &config.hsm {
        None => None,
        Some(settings) => {
            let pin = match (&given.hsm_pin, &settings.pin_file) {
                (Some(pin), _) => pin.clone(),
                (None, Some(path)) => {
                    let what = format!("hsm.pin_file = {}", path.display());
                    let text = std::fs::read_to_string(path).map(Secret::new);
                    let text = text.map_err(|source| RunError::Io { what, source })?;
                    Secret::new(text.expose().trim().to_owned())
                }
                (None, None) => return Err(RunError::NoPin),
            };
            let (module, token) = (settings.module.clone(), settings.token.clone());
            Some(Hsm::open(HsmConfig { module, token, pin })?)
        }
    };
    let key = |source: &Source, variable, text: Option<&Secret<String>>, may_create| {
        Ok::<_, RunError>(match (text, source, &hsm) {
            (Some(text), ..) => MasterKey::from_variable(variable, text.expose())?,
            (None, Source::File(path), _) => MasterKey::load(path, may_create)?,
            (None, Source::Hsm(label), Some(hsm)) => {
                hsm.ensure_wrapping_key(label, may_create)?;
                MasterKey::in_hsm(Arc::clone(hsm), label.clone())
            }
            (None, Source::Hsm(_), None) => return Err(RunError::NoPin), // The configuration has no such.
        })
    };
    let previous = match (&config.previous_master_key, &given.previous_master_key) {
        (None, None) => None,
        (source, text) => {
            let source = source.as_ref().unwrap_or(&config.master_key);
            Some(key(source, "KEYGATE_PREVIOUS_MASTER_KEY", text.as_ref(), false)?)
        }
    };
    // While one takes the place of another, the new one may be made, too.
    let begins_anew = may_create;
    let may_create = may_create || previous.is_some();
    let master = key(&config.master_key, "KEYGATE_MASTER_KEY", given.master_key.as_ref(), may_create)?;
    Ok(Keyring::open(&config.data_dir, Masters { master, previous, hsm }, begins_anew)?)
}

/// Where notifications go, with the secrets from their files or the environment.
pub fn destinations(config: &Config, given: &FromEnvironment) -> Result<Vec<Destination>, RunError> {
    let notify = &config.notify;
    let secret = |setting: &str, text: &Option<Secret<String>>, file: &Option<PathBuf>| {
        let text = match (text, file) {
            (Some(text), _) => text.clone(),
            (None, Some(path)) => {
                let what = format!("{setting} = {}", path.display());
                Secret::new(std::fs::read_to_string(path).map_err(|source| RunError::Io { what, source })?)
            }
            (None, None) => return Ok::<_, RunError>(None),
        };
        Ok(Some(Secret::new(text.expose().trim().to_owned())))
    };
    let mut destinations = Vec::new();
    if let Some(url) = secret("notify.slack_url_file", &given.slack_url, &notify.slack_url_file)? {
        if config::http_url(&toml::Value::String(url.expose().clone())).is_err() {
            return Err(RunError::Notify("notify.slack_url_file: that is no URL".into()));
        }
        destinations.push(Destination::Slack { url });
    }
    let key = secret("notify.pagerduty_key_file", &given.pagerduty_key, &notify.pagerduty_key_file)?;
    if let Some(routing_key) = key {
        destinations.push(Destination::PagerDuty { url: notify.pagerduty_url.clone(), routing_key });
    }
    let signs = secret("notify.webhook_secret_file", &given.webhook_secret, &notify.webhook_secret_file)?;
    match (&notify.webhook_url, signs) {
        (Some(url), Some(secret)) if secret.expose().len() >= MIN_WEBHOOK_SECRET_BYTES => {
            destinations.push(Destination::Webhook { url: url.clone(), secret });
        }
        (None, None) => {}
        _ => {
            return Err(RunError::Notify(format!(
                "notify.webhook_url needs a secret of at least {MIN_WEBHOOK_SECRET_BYTES} characters in \
                 notify.webhook_secret_file or KEYGATE_NOTIFY_WEBHOOK_SECRET, and the other way round"
            )));
        }
    }
    Ok(destinations)
}
