//! Keys that stay in a hardware security module: a client of PKCS#11 (OASIS, version 2.40).
//!
//! ```text
//!  callers ──job──▶ bounded queue ──▶ one thread: module, session, handles ──PKCS#11──▶ token
//!          ◀─────────── answer, or no longer waited for
//! ```
//!
//! A call into a module blocks for as long as it likes, and a session is for one thread at a time. So one thread makes
//! all calls, and callers wait for its answer, but not for ever. What a call did that was not waited for is not known:
//! it may still take effect.
//!
//! A session can be lost at any call: the token is pulled out, the network fails, somebody logs out. So every
//! operation can be done twice with the effect of once. When one fails as if the session were lost, the token is looked
//! for again, logged in to, and the operation done once more, before anybody hears of it. Only a PIN is never tried
//! twice.

mod error;
mod session;
#[cfg(test)]
pub(crate) mod softhsm;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::thread;
use std::time::{Duration, Instant};

use keygate_core::secret::Secret;
use sha2::{Digest as _, Sha256};

pub use self::error::{Cause, HsmError};
use self::session::{Client, Kind, Login};
use crate::platform::random;

/// How long an answer is waited for. A token in the machine answers within milliseconds, one behind a network within a
/// second; and who waits here holds up every other change.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The same for opening, when modules of network HSMs make and authenticate their connections.
const OPEN_WITHIN: Duration = Duration::from_secs(30);
/// How many calls wait at most. A token that does not answer shall not have them pile up, secrets and all.
const MAX_WAITING: usize = 64;

/// Where the token is and how to log in.
#[derive(Debug, Clone)]
pub struct HsmConfig {
    /// The PKCS#11 module, a shared library of the HSM's vendor.
    pub module: PathBuf,
    /// The token's label.
    pub token: String,
    /// The PIN of the token's user.
    pub pin: Secret<String>,
}

type Job = Box<dyn FnOnce(&mut Client) + Send>;

/// A token, logged in. All methods block, for 5 s at most.
pub struct Hsm {
    token: String,
    jobs: SyncSender<Job>,
}

impl fmt::Debug for Hsm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hsm({:?})", self.token)
    }
}

impl Hsm {
    /// Loads the module, finds the token and logs in. May take 30 s.
    ///
    /// # Errors
    /// When one of these fails. Not to be called again after [`HsmError::PinRefused`] with the same PIN.
    pub fn open(config: HsmConfig) -> Result<Arc<Self>, HsmError> {
        let token = config.token.clone();
        let (jobs, queue) = mpsc::sync_channel::<Job>(MAX_WAITING);
        let (opened, answer) = mpsc::sync_channel(1);
        let work = move || {
            let client = Client::open(&config);
            drop(config);
            let mut client = match client {
                Ok(client) => client,
                Err(error) => return drop(opened.send(Err(error))),
            };
            // Not received when it took too long: then nobody has the other end of the queue, either.
            let _ = opened.send(Ok(()));
            while let Ok(job) = queue.recv() {
                job(&mut client);
            }
            client.close();
        };
        thread::Builder::new().name("hsm".into()).spawn(work).map_err(|_| HsmError::Stopped)?;
        wait(&answer, OPEN_WITHIN)?;
        Ok(Arc::new(Self { token, jobs }))
    }

    /// Sees that there is an AES-256 key of that label, and makes it if not and `may_create`.
    ///
    /// # Errors
    /// When it is missing and may not be made, or cannot be.
    pub fn ensure_wrapping_key(&self, label: &str, may_create: bool) -> Result<(), HsmError> {
        let label = label.to_owned();
        self.ask(ANSWER_WITHIN, move |login| login.ensure_wrapping_key(&label, may_create))
    }

    /// Seals with that AES-256 key, bound to `associated`: IV, ciphertext, tag.
    ///
    /// # Errors
    /// When there is no such key or the HSM fails.
    pub fn wrap(&self, key: &str, associated: &[u8], plain: &[u8]) -> Result<Vec<u8>, HsmError> {
        let (key, associated, plain) = (key.to_owned(), associated.to_vec(), Secret::new(plain.to_vec()));
        self.ask(ANSWER_WITHIN, move |login| login.wrap(&key, &associated, plain.expose()))
    }

    /// Opens what [`Hsm::wrap`] sealed with the same key and the same `associated`.
    ///
    /// # Errors
    /// [`HsmError::DoesNotOpen`] when that is not so; another when there is no such key or the HSM fails.
    pub fn unwrap(&self, key: &str, associated: &[u8], sealed: &[u8]) -> Result<Secret<Vec<u8>>, HsmError> {
        let (key, associated, sealed) = (key.to_owned(), associated.to_vec(), sealed.to_vec());
        self.ask(ANSWER_WITHIN, move |login| login.unwrap(&key, &associated, &sealed))
    }

    /// Makes a key pair for ES256 that does not leave the token; its public point (SEC 1, 65 bytes). After an error
    /// there may be one all the same: [`Hsm::destroy`] it.
    ///
    /// # Errors
    /// [`HsmError::KeyExists`] when anything has that label; another when the HSM fails.
    pub fn generate_p256(&self, label: &str) -> Result<Vec<u8>, HsmError> {
        let (label, id) = (label.to_owned(), random::bytes::<16>());
        self.ask(ANSWER_WITHIN, move |login| login.generate_p256(&label, &id))
    }

    /// Signs with that key pair, for ES256: `r || s`.
    ///
    /// # Errors
    /// When there is no such key or the HSM fails.
    pub fn sign_p256(&self, label: &str, message: &[u8]) -> Result<[u8; 64], HsmError> {
        let (label, digest) = (label.to_owned(), Sha256::digest(message));
        self.ask(ANSWER_WITHIN, move |login| login.sign_p256(&label, &digest))
    }

    /// Whether there is a key pair of that label.
    ///
    /// # Errors
    /// When the HSM fails.
    pub fn has(&self, label: &str) -> Result<bool, HsmError> {
        let label = label.to_owned();
        self.ask(ANSWER_WITHIN, move |login| Ok(login.find(Kind::Private, &label)?.is_some()))
    }

    /// Destroys the key pair of that label, for good; `false` when there is none. Wrapping keys are never destroyed.
    ///
    /// # Errors
    /// When the HSM fails.
    pub fn destroy(&self, label: &str) -> Result<bool, HsmError> {
        let label = label.to_owned();
        self.ask(ANSWER_WITHIN, move |login| login.destroy(&label))
    }

    /// Has it done by the thread, twice if need be, and waits for the answer.
    fn ask<T: Send + 'static>(
        &self,
        within: Duration,
        op: impl Fn(&mut Login) -> Result<T, HsmError> + Send + 'static,
    ) -> Result<T, HsmError> {
        let (answer, answered) = mpsc::sync_channel(1);
        let deadline = Instant::now() + within;
        let job: Job = Box::new(move |client| drop(answer.send(client.run(deadline, &op))));
        match self.jobs.try_send(job) {
            Ok(()) => wait(&answered, within),
            Err(TrySendError::Full(_)) => Err(HsmError::TimedOut(within)),
            Err(TrySendError::Disconnected(_)) => Err(HsmError::Stopped),
        }
    }
}

fn wait<T>(answer: &mpsc::Receiver<Result<T, HsmError>>, within: Duration) -> Result<T, HsmError> {
    answer.recv_timeout(within).unwrap_or_else(|error| match error {
        RecvTimeoutError::Timeout => Err(HsmError::TimedOut(within)),
        RecvTimeoutError::Disconnected => Err(HsmError::Stopped),
    })
}

#[cfg(test)]
mod tests;
