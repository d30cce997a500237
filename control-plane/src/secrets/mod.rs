//! Key material: signing secrets and the keys that seal them. Nothing else sees plain bytes.

pub mod hsm;
pub mod keyring;
pub mod master_key;
pub mod record;
pub mod root_key;
pub mod seal;
