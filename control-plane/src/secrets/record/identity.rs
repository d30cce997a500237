//! Identifiers of a key that is to be issued.

use keygate_core::token::jti::JtiKey;

use crate::platform::random;

/// Random identifiers of a key to be.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The key's id.
    pub key_id: String,
    /// The token's id.
    pub jti: String,
}

impl Identity {
    /// New ones; the token's made with a key, if proxies are to tell it from made-up ones.
    pub fn new(ids: Option<&JtiKey>) -> Self {
        let jti = ids.map_or_else(random::identifier, |ids| ids.make(random::bytes()));
        Self { key_id: format!("key_{}", random::identifier()), jti }
    }
}
