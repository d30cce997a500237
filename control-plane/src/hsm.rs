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
//!
//! It is one file, though a long one: what the thread may do with a session and when it needs another belong together.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11};
use cryptoki::error::{Error as Pkcs11Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use keygate_core::token::crypto::P256_POINT_BYTES;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use crate::random;

/// How long an answer is waited for. A token in the machine answers within milliseconds, one behind a network within a
/// second; and who waits here holds up every other change.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// The same for opening, when modules of network HSMs make and authenticate their connections.
const OPEN_WITHIN: Duration = Duration::from_secs(30);
/// How many calls wait at most. A token that does not answer shall not have them pile up, secrets and all.
const MAX_WAITING: usize = 64;

/// AES-GCM as SP 800-38D recommends it.
const IV_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
const AES_KEY_BYTES: u64 = 32;
/// The object identifier of P-256, 1.2.840.10045.3.1.7, in DER: `CKA_EC_PARAMS` (RFC 5480 section 2.1.1.1).
const P256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];

/// Guards every call, and counts how often a module was initialised. A module's state belongs to the process, whoever
/// has it open: `C_Finalize` ends everybody's sessions, must not meet another call, and afterwards the numbers of old
/// sessions and keys are given to new ones. What was opened under another count is therefore not used any more.
static INITIALISED: Mutex<u64> = Mutex::new(0);

/// Where the token is and how to log in.
#[derive(Clone)]
pub struct HsmConfig {
    /// The PKCS#11 module, a shared library of the HSM's vendor.
    pub module: PathBuf,
    /// The token's label.
    pub token: String,
    /// The PIN of the token's user.
    pub pin: Zeroizing<String>,
}

impl fmt::Debug for HsmConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("HsmConfig");
        shown.field("module", &self.module).field("token", &self.token).finish_non_exhaustive()
    }
}

/// What a module answered.
#[derive(Debug)]
pub struct Cause(Pkcs11Error);

impl fmt::Display for Cause {
    /// As the vendor's documentation has it: `C_Sign: CKR_DEVICE_ERROR`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Pkcs11Error::Pkcs11(code, function) = &self.0 else { return self.0.fmt(f) };
        write!(f, "C_{function:?}: CKR")?;
        for letter in format!("{code:?}").chars() {
            let word = if letter.is_ascii_uppercase() { "_" } else { "" };
            write!(f, "{word}{}", letter.to_ascii_uppercase())?;
        }
        Ok(())
    }
}

/// Why the HSM did not do it, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HsmError {
    /// The module cannot be loaded or initialised.
    #[error("PKCS#11 module {path} cannot be loaded ({cause}); correct the path, or install it")]
    Module { path: PathBuf, cause: Cause },
    /// No token has that label; `present` are the labels that there are.
    #[error("no HSM token has the label {token:?}; there are {present:?}; correct it, or connect the token")]
    NoToken { token: String, present: Vec<String> },
    /// The PIN is wrong, or locked, or too old.
    #[error(
        "HSM token {token:?} refuses the PIN ({cause}); it is not tried again, since tokens lock after a few wrong \
         PINs: correct it and see that the token is not locked, then restart"
    )]
    PinRefused { token: String, cause: Cause },
    /// Somebody tried wrong PINs. It was not tried.
    #[error(
        "HSM token {token:?} locks after one more wrong PIN, so the PIN was not tried: log in once by hand, which \
         gives it all its tries back"
    )]
    PinLastTry { token: String },
    /// The session was lost at run time and there is no new one.
    #[error("HSM token {token:?} is lost ({cause}); see that it is connected and works: the next call tries")]
    Lost { token: String, cause: Box<HsmError> },
    /// There is no such key.
    #[error("the HSM has no key {key:?}; restore it to the token, or correct its label")]
    NoSuchKey { key: String },
    /// A key cannot be made, since something has its label.
    #[error("the HSM has an object {key:?} already; destroy that, or choose another label")]
    KeyExists { key: String },
    /// Several tokens or keys have the label. Which is meant is not guessed.
    #[error("the HSM has {count} {what} with the label {label:?}; rename or remove those that are not meant")]
    Ambiguous { what: &'static str, label: String, count: usize },
    /// What was sealed was changed, or sealed with another key or other associated data.
    #[error(
        "the HSM's key {key:?} does not open it: it was changed, or sealed with another or for another use"
    )]
    DoesNotOpen { key: String },
    /// The token does not do what is asked.
    #[error("the HSM does not support {mechanism} ({cause}); allow it there, or keep this key elsewhere")]
    Unsupported { mechanism: &'static str, cause: Cause },
    /// No answer in time. The operation may still take effect.
    #[error("the HSM did not answer within {0:?}; see that it works and is not overloaded, then try again")]
    TimedOut(Duration),
    /// The answer makes no sense.
    #[error("the HSM gave {0}, against PKCS#11; update its client, or keep this key elsewhere")]
    Malformed(&'static str),
    /// The thread that makes the calls cannot be started, or has ended.
    #[error("the thread for the HSM does not run; restart, and report this")]
    Stopped,
    /// The module says something else.
    #[error("the HSM failed ({0}); its own log should say more")]
    Other(Cause),
}

impl From<Pkcs11Error> for HsmError {
    fn from(error: Pkcs11Error) -> Self {
        Self::Other(Cause(error))
    }
}

impl HsmError {
    /// Whether another session may help. That includes codes that say nothing: SoftHSM says `CKR_GENERAL_ERROR`, or
    /// that it knows no such object, when its token has gone.
    fn may_be_lost(&self) -> bool {
        use RvError as R;
        let Self::Other(Cause(Pkcs11Error::Pkcs11(code, _))) = self else { return false };
        matches!(
            code,
            R::SessionHandleInvalid
                | R::SessionClosed
                | R::UserNotLoggedIn
                | R::CryptokiNotInitialized
                | R::DeviceError
                | R::DeviceRemoved
                | R::SlotIdInvalid
                | R::TokenNotPresent
                | R::TokenNotRecognized
                | R::KeyHandleInvalid
                | R::ObjectHandleInvalid
                | R::OperationActive
                | R::OperationNotInitialized
                | R::GeneralError
                | R::FunctionFailed
                | R::VendorDefined(_)
        )
    }

    const fn is_about_the_pin(&self) -> bool {
        matches!(self, Self::PinRefused { .. } | Self::PinLastTry { .. })
    }
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
        let (key, associated, plain) = (key.to_owned(), associated.to_vec(), Zeroizing::new(plain.to_vec()));
        self.ask(ANSWER_WITHIN, move |login| login.wrap(&key, &associated, &plain))
    }

    /// Opens what [`Hsm::wrap`] sealed with the same key and the same `associated`.
    ///
    /// # Errors
    /// [`HsmError::DoesNotOpen`] when that is not so; another when there is no such key or the HSM fails.
    pub fn unwrap(
        &self,
        key: &str,
        associated: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, HsmError> {
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

/// What the thread has: the module, and a session while there is one.
struct Client {
    path: PathBuf,
    module: Pkcs11,
    token: String,
    pin: AuthPin,
    /// Set when the PIN was refused. It is not tried again.
    pin_refused: Option<RvError>,
    login: Option<Login>,
}

impl Client {
    fn open(config: &HsmConfig) -> Result<Self, HsmError> {
        let path = config.module.clone();
        let module = Pkcs11::new(&path);
        let module = module.map_err(|e| HsmError::Module { path: path.clone(), cause: Cause(e) })?;
        // Keeps it loaded until the process ends: modules have threads and exit handlers of their own, whose code
        // must not be unmapped.
        std::mem::forget(module.clone());
        let (token, pin) = (config.token.clone(), AuthPin::new(config.pin.as_str().into()));
        let mut client = Self { path, module, token, pin, pin_refused: None, login: None };
        client.connect(&mut INITIALISED.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(client)
    }

    /// Does it once; and, if that fails for want of a session, once more in a new one. Not at all when nobody waits for
    /// it any more, since they will have tried again or given up.
    fn run<T>(
        &mut self,
        deadline: Instant,
        op: &impl Fn(&mut Login) -> Result<T, HsmError>,
    ) -> Result<T, HsmError> {
        let mut initialised = INITIALISED.lock().unwrap_or_else(PoisonError::into_inner);
        let in_time = || (Instant::now() < deadline).then_some(()).ok_or(HsmError::TimedOut(ANSWER_WITHIN));
        in_time()?;
        if let Some(login) = self.login.as_mut().filter(|login| login.initialised == *initialised) {
            match op(login) {
                Err(error) if error.may_be_lost() => {
                    tracing::warn!(token = self.token, %error, "lost the HSM's session; logging in again");
                }
                done => return done,
            }
        }
        let token = self.token.clone();
        let login = self.connect(&mut initialised).map_err(|error| match error {
            error if error.is_about_the_pin() => error,
            cause => HsmError::Lost { token, cause: Box::new(cause) },
        })?;
        in_time()?;
        op(login)
    }

    /// A new session. A module may have looked for tokens only when it was initialised, as SoftHSM does; if it does not
    /// find ours, it is initialised anew. That ends other sessions of this process: their owners come here, too.
    fn connect(&mut self, initialised: &mut u64) -> Result<&mut Login, HsmError> {
        self.close_if(*initialised);
        let fresh = self.initialise(initialised)?;
        let mut login = self.log_in(*initialised);
        if login.as_ref().is_err_and(|error| !fresh && !error.is_about_the_pin()) {
            let _ = self.module.clone().finalize();
            self.initialise(initialised)?;
            login = self.log_in(*initialised);
        }
        Ok(self.login.insert(login?))
    }

    /// Whether it was not initialised before.
    fn initialise(&self, initialised: &mut u64) -> Result<bool, HsmError> {
        match self.module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) => {
                *initialised += 1;
                Ok(true)
            }
            Err(Pkcs11Error::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(false),
            Err(e) => Err(HsmError::Module { path: self.path.clone(), cause: Cause(e) }),
        }
    }

    fn log_in(&mut self, initialised: u64) -> Result<Login, HsmError> {
        let token = || self.token.clone();
        let pin_refused = |code| {
            let cause = Cause(Pkcs11Error::Pkcs11(code, Function::Login));
            HsmError::PinRefused { token: token(), cause }
        };
        if let Some(code) = self.pin_refused {
            return Err(pin_refused(code));
        }
        let mut present = Vec::new();
        for slot in self.module.get_slots_with_token()? {
            // A slot that does not tell has just lost its token.
            match self.module.get_token_info(slot) {
                Ok(info) if info.token_initialized() => present.push((slot, info)),
                _ => {}
            }
        }
        let ours: Vec<_> = present.iter().filter(|(_, info)| info.label() == self.token).collect();
        let (slot, info) = match ours.as_slice() {
            [one] => one,
            [] => {
                let present = present.iter().map(|(_, info)| info.label().to_owned()).collect();
                return Err(HsmError::NoToken { token: token(), present });
            }
            many => return Err(HsmError::Ambiguous { what: "tokens", label: token(), count: many.len() }),
        };
        if info.user_pin_final_try() {
            return Err(HsmError::PinLastTry { token: token() });
        }
        // It is closed by hand, and only while its number is still its own.
        let session = self.module.open_rw_session_no_drop(*slot)?;
        match session.login(UserType::User, Some(&self.pin)) {
            // The process is logged in, not the session: another `Hsm` may have done it.
            Ok(()) | Err(Pkcs11Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => {
                let (module, handles) = (self.module.clone(), HashMap::new());
                Ok(Login { module, slot: *slot, session, initialised, handles })
            }
            Err(error) => {
                let _ = session.close();
                match error {
                    Pkcs11Error::Pkcs11(code, _) if refuses_the_pin(code) => {
                        let refused = pin_refused(code);
                        self.pin_refused = Some(code);
                        Err(refused)
                    }
                    error => Err(error.into()),
                }
            }
        }
    }

    fn close(mut self) {
        self.close_if(*INITIALISED.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn close_if(&mut self, initialised: u64) {
        if let Some(login) = self.login.take().filter(|login| login.initialised == initialised) {
            // A session that is lost cannot be closed, and need not be.
            let _ = login.session.close();
        }
    }
}

/// The keys that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Wrapping,
    Private,
    Public,
}

impl Kind {
    /// What those of that label have, and no others.
    fn template(self, label: &str) -> Vec<Attribute> {
        let (class, key_type) = match self {
            Self::Wrapping => (ObjectClass::SECRET_KEY, KeyType::AES),
            Self::Private => (ObjectClass::PRIVATE_KEY, KeyType::EC),
            Self::Public => (ObjectClass::PUBLIC_KEY, KeyType::EC),
        };
        let label = Attribute::Label(label.as_bytes().to_vec());
        vec![Attribute::Token(true), Attribute::Class(class), Attribute::KeyType(key_type), label]
    }
}

/// A session, logged in, and what is known only within it.
struct Login {
    module: Pkcs11,
    slot: Slot,
    session: Session,
    /// The count of [`INITIALISED`] under which it was opened.
    initialised: u64,
    handles: HashMap<(Kind, String), ObjectHandle>,
}

impl Login {
    fn ensure_wrapping_key(&mut self, label: &str, may_create: bool) -> Result<(), HsmError> {
        if self.find(Kind::Wrapping, label)?.is_none() {
            if !may_create {
                return Err(HsmError::NoSuchKey { key: label.into() });
            }
            let mut template = Kind::Wrapping.template(label);
            template.extend([
                Attribute::ValueLen(AES_KEY_BYTES.into()),
                Attribute::Private(true),
                Attribute::Sensitive(true),
                Attribute::Extractable(false),
                Attribute::Encrypt(true),
                Attribute::Decrypt(true),
                // It seals data only: a key that could also wrap keys could be used to get others out.
                Attribute::Wrap(false),
                Attribute::Unwrap(false),
                Attribute::Sign(false),
                Attribute::Verify(false),
                Attribute::Derive(false),
            ]);
            let made = self.session.generate_key(&Mechanism::AesKeyGen, &template);
            made.map_err(|e| refused("CKM_AES_KEY_GEN", e))?;
            // Somebody else may have made one at the same time. Then nothing shall be sealed with either.
            self.find(Kind::Wrapping, label)?;
        }
        Ok(())
    }

    fn wrap(&mut self, label: &str, associated: &[u8], plain: &[u8]) -> Result<Vec<u8>, HsmError> {
        let key = self.key(Kind::Wrapping, label)?;
        let mut iv = random::bytes::<IV_BYTES>();
        let mechanism = gcm(&mut iv, associated)?;
        let sealed = self.session.encrypt(&mechanism, key, plain).map_err(|e| refused("CKM_AES_GCM", e))?;
        // Some put the IV elsewhere. What may not open again is better not sealed.
        if sealed.len() != plain.len() + TAG_BYTES {
            return Err(HsmError::Malformed("a ciphertext of the wrong length"));
        }
        // Some tokens, for FIPS 140, draw the IV themselves and put it where ours was: it is taken as it is now.
        Ok([iv.as_slice(), &sealed].concat())
    }

    fn unwrap(
        &mut self,
        label: &str,
        associated: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, HsmError> {
        let key = self.key(Kind::Wrapping, label)?;
        let does_not_open = || HsmError::DoesNotOpen { key: label.into() };
        if sealed.len() < IV_BYTES + TAG_BYTES {
            return Err(does_not_open());
        }
        match self.decrypt(key, associated, sealed) {
            // Tokens disagree about the code for a wrong tag, SoftHSM's is CKR_GENERAL_ERROR. So it is asked to open
            // something that does open: if it can, the fault is with the data.
            Err(Pkcs11Error::Pkcs11(_, Function::Decrypt)) => {
                let control = self.wrap(label, associated, &[0; 16])?;
                self.decrypt(key, associated, &control).map_err(|e| refused("CKM_AES_GCM", e))?;
                Err(does_not_open())
            }
            opened => opened.map_err(|e| refused("CKM_AES_GCM", e)),
        }
    }

    fn decrypt(
        &self,
        key: ObjectHandle,
        associated: &[u8],
        sealed: &[u8],
    ) -> Result<Zeroizing<Vec<u8>>, Pkcs11Error> {
        let (iv, rest) = sealed.split_first_chunk().ok_or(Pkcs11Error::InvalidValue)?;
        let opened = self.session.decrypt(&gcm(&mut iv.clone(), associated)?, key, rest)?;
        Ok(Zeroizing::new(opened))
    }

    /// With `id` it knows the pair that it made when it is called once more.
    fn generate_p256(&mut self, label: &str, id: &[u8; 16]) -> Result<Vec<u8>, HsmError> {
        let with_id = |kind: Kind| [kind.template(label), vec![Attribute::Id(id.to_vec())]].concat();
        let mut public_template = with_id(Kind::Public);
        let mut private_template = with_id(Kind::Private);
        let made = self.session.find_objects(&private_template)?;
        let public = self.session.find_objects(&public_template)?;
        if let ([_], [public]) = (made.as_slice(), public.as_slice()) {
            return self.point(*public);
        }
        if !self.session.find_objects(&[Attribute::Label(label.as_bytes().to_vec())])?.is_empty() {
            return Err(HsmError::KeyExists { key: label.into() });
        }
        public_template.extend([
            Attribute::EcParams(P256.to_vec()),
            Attribute::Private(false),
            Attribute::Verify(true),
        ]);
        private_template.extend([
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
            Attribute::Sign(true),
            Attribute::Derive(false),
        ]);
        let pair =
            self.session.generate_key_pair(&Mechanism::EccKeyPairGen, &public_template, &private_template);
        let (public, _) = pair.map_err(|e| refused("CKM_EC_KEY_PAIR_GEN with P-256", e))?;
        self.point(public)
    }

    fn point(&self, public: ObjectHandle) -> Result<Vec<u8>, HsmError> {
        let attributes = self.session.get_attributes(public, &[AttributeType::EcPoint])?;
        let [Attribute::EcPoint(der)] = attributes.as_slice() else {
            return Err(HsmError::Malformed("no point of a public key"));
        };
        // An OCTET STRING of 65 bytes; but for tokens of before version 2.30, which give the point itself.
        let point = der.strip_prefix(&[0x04, 0x41]).filter(|p| p.len() == P256_POINT_BYTES).unwrap_or(der);
        if point.len() != P256_POINT_BYTES || point[0] != 0x04 {
            return Err(HsmError::Malformed("a public key that is no uncompressed point of P-256"));
        }
        Ok(point.to_vec())
    }

    fn sign_p256(&mut self, label: &str, digest: &[u8]) -> Result<[u8; 64], HsmError> {
        let key = self.key(Kind::Private, label)?;
        let signature = self.session.sign(&Mechanism::Ecdsa, key, digest);
        let signature = signature.map_err(|e| refused("CKM_ECDSA", e))?;
        signature.try_into().map_err(|_| HsmError::Malformed("a signature of the wrong length"))
    }

    /// The private half first: what can still sign must not be taken for destroyed.
    fn destroy(&mut self, label: &str) -> Result<bool, HsmError> {
        let mut destroyed = false;
        for kind in [Kind::Private, Kind::Public] {
            self.handles.remove(&(kind, label.to_owned()));
            let found = self.session.find_objects(&kind.template(label))?;
            if found.is_empty() {
                self.check_alive()?;
            }
            for key in found {
                self.session.destroy_object(key)?;
                destroyed = true;
            }
        }
        Ok(destroyed)
    }

    /// The key of that label, which must be there.
    fn key(&mut self, kind: Kind, label: &str) -> Result<ObjectHandle, HsmError> {
        let name = (kind, label.to_owned());
        if let Some(known) = self.handles.get(&name) {
            return Ok(*known);
        }
        let found = self.find(kind, label)?.ok_or_else(|| HsmError::NoSuchKey { key: label.into() })?;
        self.handles.insert(name, found);
        Ok(found)
    }

    fn find(&self, kind: Kind, label: &str) -> Result<Option<ObjectHandle>, HsmError> {
        match self.session.find_objects(&kind.template(label))?.as_slice() {
            [] => self.check_alive().map(|()| None),
            [one] => Ok(Some(*one)),
            many => Err(HsmError::Ambiguous { what: "keys", label: label.into(), count: many.len() }),
        }
    }

    /// That nothing was found says something only while the token is there and logged in: otherwise the search finds no
    /// private objects and is no error.
    fn check_alive(&self) -> Result<(), HsmError> {
        self.module.get_token_info(self.slot)?;
        match self.session.get_session_info()?.session_state() {
            SessionState::RwUser => Ok(()),
            _ => Err(Pkcs11Error::Pkcs11(RvError::UserNotLoggedIn, Function::GetSessionInfo).into()),
        }
    }
}

fn gcm<'a>(iv: &'a mut [u8; IV_BYTES], associated: &'a [u8]) -> Result<Mechanism<'a>, Pkcs11Error> {
    let tag_bits = TAG_BYTES as u64 * 8;
    Ok(Mechanism::AesGcm(GcmParams::new(iv, associated, tag_bits.into())?))
}

fn refused(mechanism: &'static str, error: Pkcs11Error) -> HsmError {
    use RvError as R;
    match error {
        Pkcs11Error::NullFunctionPointer
        | Pkcs11Error::Pkcs11(
            R::MechanismInvalid | R::MechanismParamInvalid | R::FunctionNotSupported | R::CurveNotSupported,
            _,
        ) => HsmError::Unsupported { mechanism, cause: Cause(error) },
        error => error.into(),
    }
}

/// Whether a login failed for its PIN rather than for the token.
const fn refuses_the_pin(code: RvError) -> bool {
    use RvError as R;
    matches!(code, R::PinIncorrect | R::PinInvalid | R::PinLenRange | R::PinLocked | R::PinExpired)
}

/// Tokens of SoftHSM, for the tests of this crate.
#[cfg(test)]
pub(crate) mod softhsm {
    use std::fs;
    use std::process::Command;
    use std::sync::{LazyLock, MutexGuard};

    use tempfile::TempDir;

    use super::*;

    const MODULES: [&str; 3] = [
        "/usr/lib/softhsm/libsofthsm2.so",
        "/usr/lib64/pkcs11/libsofthsm2.so",
        "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    ];
    pub const PIN: &str = "5926-correct";

    /// The directories of the tokens, and where the tokens are that were taken away. SoftHSM is told of one place per
    /// process, so this one stays, all but empty.
    static PLACE: LazyLock<TempDir> = LazyLock::new(|| {
        let place = tempfile::tempdir().unwrap();
        for directory in ["tokens", "away"] {
            fs::create_dir(place.path().join(directory)).unwrap();
        }
        let config = place.path().join("softhsm2.conf");
        fs::write(&config, format!("directories.tokendir = {}/tokens\n", place.path().display())).unwrap();
        // SAFETY: the standard library locks the environment against its own readers, not against those in C. SoftHSM
        // is not loaded yet, since who loads it asks here for a token first; and for whoever else may be reading, the
        // first change leaves the old array where it is (glibc, musl).
        #[allow(unsafe_code)]
        unsafe {
            std::env::set_var("SOFTHSM2_CONF", config);
        }
        place
    });

    /// A test that has SoftHSM look for tokens must not find one half made, nor half gone.
    fn nobody_looks() -> MutexGuard<'static, u64> {
        INITIALISED.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A token of its own, with a random label; gone when dropped.
    pub struct Token {
        pub config: HsmConfig,
        /// The name of its directory.
        directory: String,
    }

    impl Token {
        pub fn new() -> Self {
            let missing = "SoftHSM is missing; scripts/setup installs it";
            let module = MODULES.iter().map(PathBuf::from).find(|path| path.exists()).expect(missing);
            let _still = nobody_looks();
            let tokens = || {
                let entries = fs::read_dir(PLACE.path().join("tokens")).unwrap();
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
            };
            let before: Vec<_> = tokens().collect();
            let label = random::identifier();
            let output = Command::new("softhsm2-util")
                .args(["--init-token", "--free", "--so-pin", "1234", "--pin", PIN, "--label", &label])
                .output()
                .expect(missing);
            assert!(output.status.success(), "{output:?}");
            let directory = tokens().find(|name| !before.contains(name)).expect("a new directory");
            let config = HsmConfig { module, token: label, pin: Zeroizing::new(PIN.into()) };
            Self { config, directory }
        }

        pub fn open(&self) -> Arc<Hsm> {
            Hsm::open(self.config.clone()).unwrap()
        }

        /// Takes it out of the machine.
        pub fn take_away(&self) {
            self.shift("tokens", "away");
        }

        /// Puts it back.
        pub fn put_back(&self) {
            self.shift("away", "tokens");
        }

        fn shift(&self, from: &str, to: &str) {
            let _still = nobody_looks();
            let path = |directory| PLACE.path().join(directory).join(&self.directory);
            fs::rename(path(from), path(to)).unwrap();
        }
    }

    impl Drop for Token {
        fn drop(&mut self) {
            let _still = nobody_looks();
            for directory in ["tokens", "away"] {
                let _ = fs::remove_dir_all(PLACE.path().join(directory).join(&self.directory));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use cryptoki::object::AttributeInfo;
    use keygate_core::token::crypto::{Es256, native};

    use super::softhsm::Token;
    use super::*;

    fn is_signed(point: &[u8], message: &[u8], signature: &[u8]) -> bool {
        native::P256::verify(point, message, signature)
    }

    #[test]
    fn a_wrapping_key_is_made_once_and_found_again() {
        let token = Token::new();
        let hsm = token.open();
        let missing = hsm.ensure_wrapping_key("master", false).unwrap_err();
        let text = r#"the HSM has no key "master"; restore it to the token, or correct its label"#;
        assert_eq!(missing.to_string(), text);
        assert!(matches!(hsm.wrap("master", b"", b"key").unwrap_err(), HsmError::NoSuchKey { .. }));
        hsm.ensure_wrapping_key("master", true).unwrap();
        let sealed = hsm.wrap("master", b"id 1", b"a data key").unwrap();
        assert_eq!(sealed.len(), 12 + 10 + 16);
        assert_ne!(hsm.wrap("master", b"id 1", b"a data key").unwrap(), sealed);
        drop(hsm);

        let hsm = token.open();
        hsm.ensure_wrapping_key("master", true).unwrap();
        assert_eq!(hsm.unwrap("master", b"id 1", &sealed).unwrap().as_slice(), b"a data key");
        assert!(!hsm.destroy("master").unwrap());
        hsm.ensure_wrapping_key("master", false).unwrap();
        let empty = hsm.wrap("master", b"", b"").unwrap();
        assert_eq!(hsm.unwrap("master", b"", &empty).unwrap().as_slice(), b"");
    }

    #[test]
    fn what_was_changed_does_not_open() {
        let token = Token::new();
        let hsm = token.open();
        hsm.ensure_wrapping_key("one", true).unwrap();
        hsm.ensure_wrapping_key("two", true).unwrap();
        let sealed = hsm.wrap("one", b"id 1", b"a data key").unwrap();
        let is_refused = |key: &str, associated: &[u8], sealed: &[u8]| {
            let opened = hsm.unwrap(key, associated, sealed);
            assert!(matches!(&opened, Err(HsmError::DoesNotOpen { key: k }) if k == key), "{opened:?}");
        };
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            is_refused("one", b"id 1", &changed);
            is_refused("one", b"id 1", &sealed[..at]);
        }
        is_refused("one", b"id 2", &sealed);
        is_refused("one", b"", &sealed);
        is_refused("two", b"id 1", &sealed);
        assert_eq!(hsm.unwrap("one", b"id 1", &sealed).unwrap().as_slice(), b"a data key");
    }

    #[test]
    fn two_keys_of_one_label_are_not_chosen_from() {
        let token = Token::new();
        let hsm = token.open();
        hsm.ensure_wrapping_key("master", true).unwrap();
        let template = [Kind::Wrapping.template("master"), vec![Attribute::ValueLen(32.into())]].concat();
        let again = move |login: &mut Login| {
            let made = login.session.generate_key(&Mechanism::AesKeyGen, &template);
            Ok(made.map(drop)?)
        };
        hsm.ask(ANSWER_WITHIN, again).unwrap();
        let ambiguous = hsm.wrap("master", b"", b"key").unwrap_err();
        assert!(matches!(ambiguous, HsmError::Ambiguous { what: "keys", count: 2, .. }), "{ambiguous:?}");
    }

    #[test]
    fn a_key_pair_signs_and_stays_and_is_destroyed() {
        let token = Token::new();
        let hsm = token.open();
        assert!(!hsm.has("k1").unwrap());
        assert!(!hsm.destroy("k1").unwrap());
        assert!(matches!(hsm.sign_p256("k1", b"text"), Err(HsmError::NoSuchKey { .. })));
        let point = hsm.generate_p256("k1").unwrap();
        assert!(hsm.has("k1").unwrap());
        assert!(matches!(hsm.generate_p256("k1"), Err(HsmError::KeyExists { .. })));
        let other = hsm.generate_p256("k2").unwrap();

        let signature = token.open().sign_p256("k1", b"text").unwrap();
        assert!(is_signed(&point, b"text", &signature));
        assert!(!is_signed(&point, b"another text", &signature));
        assert!(!is_signed(&other, b"text", &signature));

        assert!(hsm.destroy("k1").unwrap());
        assert!(!hsm.has("k1").unwrap());
        assert!(matches!(hsm.sign_p256("k1", b"text"), Err(HsmError::NoSuchKey { .. })));
        assert!(!hsm.destroy("k1").unwrap());
        assert!(is_signed(&other, b"text", &hsm.sign_p256("k2", b"text").unwrap()));
        assert!(is_signed(&hsm.generate_p256("k1").unwrap(), b"", &hsm.sign_p256("k1", b"").unwrap()));
    }

    #[test]
    fn no_key_can_be_taken_out() {
        let token = Token::new();
        let hsm = token.open();
        hsm.ensure_wrapping_key("master", true).unwrap();
        hsm.generate_p256("k1").unwrap();
        for (kind, label) in [(Kind::Wrapping, "master"), (Kind::Private, "k1")] {
            let seen = hsm.ask(ANSWER_WITHIN, move |login| {
                let key = login.key(kind, label)?;
                let value = login.session.get_attribute_info(key, &[AttributeType::Value])?;
                let kept = [AttributeType::AlwaysSensitive, AttributeType::NeverExtractable];
                let looser = [Attribute::Extractable(true)];
                let loosened = login.session.update_attributes(key, &looser).is_ok();
                Ok((value, login.session.get_attributes(key, &kept)?, loosened))
            });
            let (value, kept, loosened) = seen.unwrap();
            assert!(matches!(value.as_slice(), [AttributeInfo::Sensitive]), "{value:?}");
            assert_eq!(kept, [Attribute::AlwaysSensitive(true), Attribute::NeverExtractable(true)]);
            assert!(!loosened);
        }
    }

    /// As when the session was lost after the pair was made and before anybody was told.
    #[test]
    fn a_pair_that_was_made_already_is_taken_for_it() {
        let token = Token::new();
        let hsm = token.open();
        let make = |id: [u8; 16]| hsm.ask(ANSWER_WITHIN, move |login| login.generate_p256("k1", &id));
        let point = make([1; 16]).unwrap();
        assert_eq!(make([1; 16]).unwrap(), point);
        assert!(matches!(make([2; 16]), Err(HsmError::KeyExists { .. })));
    }

    #[test]
    fn errors_at_opening_say_what_to_do() {
        let token = Token::new();
        let opened = |change: fn(&mut HsmConfig)| {
            let mut config = token.config.clone();
            change(&mut config);
            Hsm::open(config).unwrap_err()
        };
        let error = opened(|config| config.module = "/no/such/module.so".into()).to_string();
        assert!(error.starts_with("PKCS#11 module /no/such/module.so cannot be loaded ("), "{error}");

        let error = opened(|config| config.token = "another".into()).to_string();
        assert!(error.starts_with(r#"no HSM token has the label "another"; there are [""#), "{error}");
        assert!(error.contains(&token.config.token), "{error}");

        let wrong = opened(|config| config.pin = Zeroizing::new("5926-mistaken".into()));
        assert!(matches!(wrong, HsmError::PinRefused { .. }), "{wrong:?}");
        let text = format!("{wrong} {wrong:?} {:?}", token.config);
        assert!(text.contains("(C_Login: CKR_PIN_INCORRECT); it is not tried again"), "{text}");
        assert!(!text.contains("5926"), "{text}");
        token.open();
    }

    /// As when it is changed while Keygate runs.
    #[test]
    fn a_wrong_pin_is_never_tried_again() {
        const CHANGED: &str = "5926-changed";
        let token = Token::new();
        let change_pin = |from: &'static str, to: &'static str| {
            let config = HsmConfig { pin: Zeroizing::new(from.into()), ..token.config.clone() };
            let (from, to) = (AuthPin::new(from.into()), AuthPin::new(to.into()));
            let done = Hsm::open(config).unwrap().ask(ANSWER_WITHIN, move |login| {
                login.session.set_pin(&from, &to)?;
                Ok(())
            });
            done.unwrap();
        };
        let hsm = token.open();
        change_pin(softhsm::PIN, CHANGED);
        token.take_away();
        // It is lost. Unless it had to log in again before, for another test's sake.
        let error = hsm.has("k1").unwrap_err();
        assert!(matches!(error, HsmError::Lost { .. } | HsmError::PinRefused { .. }), "{error:?}");
        token.put_back();
        assert!(matches!(hsm.has("k1"), Err(HsmError::PinRefused { .. })));
        // The old PIN is right again. That it is refused all the same shows that it was not tried.
        change_pin(CHANGED, softhsm::PIN);
        assert!(matches!(hsm.has("k1"), Err(HsmError::PinRefused { .. })));
        assert!(!token.open().has("k1").unwrap());
    }

    #[test]
    fn a_token_that_was_away_is_used_again() {
        let (token, other) = (Token::new(), Token::new());
        let (hsm, others) = (token.open(), other.open());
        // The same number of keys on both, so that their handles are the same numbers.
        hsm.ensure_wrapping_key("master", true).unwrap();
        others.ensure_wrapping_key("master", true).unwrap();
        let point = hsm.generate_p256("k1").unwrap();
        let others_point = others.generate_p256("k1").unwrap();
        let sealed = hsm.wrap("master", b"", b"key").unwrap();
        hsm.sign_p256("k1", b"text").unwrap();
        others.sign_p256("k1", b"text").unwrap();

        token.take_away();
        for _ in 0..2 {
            // None of them says that there is no such key.
            let errors = [
                hsm.has("k1").map(drop),
                hsm.destroy("k1").map(drop),
                hsm.wrap("master", b"", b"key").map(drop),
                hsm.unwrap("master", b"", &sealed).map(drop),
                hsm.ensure_wrapping_key("master", true),
                hsm.generate_p256("k2").map(drop),
                hsm.sign_p256("k1", b"text").map(drop),
            ];
            for error in errors.map(Result::unwrap_err) {
                let HsmError::Lost { token: lost, cause } = &error else { panic!("{error:?}") };
                assert_eq!(*lost, token.config.token);
                assert!(matches!(**cause, HsmError::NoToken { .. }), "{cause:?}");
            }
            // The module was initialised anew under the other, which must not take up what is not its own.
            assert!(is_signed(&others_point, b"text", &others.sign_p256("k1", b"text").unwrap()));
        }

        token.put_back();
        assert!(is_signed(&point, b"text", &hsm.sign_p256("k1", b"text").unwrap()));
        assert_eq!(hsm.unwrap("master", b"", &sealed).unwrap().as_slice(), b"key");
        assert!(is_signed(&others_point, b"text", &others.sign_p256("k1", b"text").unwrap()));
    }

    #[test]
    fn a_session_that_was_lost_is_not_noticed() {
        let token = Token::new();
        let hsm = token.open();
        let ways: [fn(&Login); 2] =
            [|login| login.session.logout().unwrap(), |login| login.module.clone().finalize().unwrap()];
        for lose in ways {
            let lose = || {
                let done = hsm.ask(ANSWER_WITHIN, move |login| {
                    lose(login);
                    Ok(())
                });
                done.unwrap();
            };
            let point = hsm.generate_p256("k1").unwrap();
            lose();
            assert!(hsm.has("k1").unwrap());
            lose();
            assert!(is_signed(&point, b"text", &hsm.sign_p256("k1", b"text").unwrap()));
            lose();
            assert!(matches!(hsm.generate_p256("k1"), Err(HsmError::KeyExists { .. })));
            lose();
            assert!(hsm.destroy("k1").unwrap());
            assert!(!hsm.has("k1").unwrap());
            lose();
            assert!(!hsm.destroy("k1").unwrap());
            lose();
            hsm.generate_p256("k1").unwrap();
            assert!(hsm.destroy("k1").unwrap());
        }
    }

    #[test]
    fn a_token_that_hangs_is_not_waited_for() {
        let token = Token::new();
        let hsm = token.open();
        let (go_on, wait) = mpsc::channel::<()>();
        let (did, done) = mpsc::channel();
        let soon = Duration::from_millis(20);
        let wait = Mutex::new(wait);
        let hangs = hsm.ask(soon, move |_| Ok(wait.lock().unwrap().recv().is_err()));
        assert!(matches!(hangs, Err(HsmError::TimedOut(within)) if within == soon));
        // What waits behind it and is given up is not done later; and no more than so much waits.
        for _ in 0..=MAX_WAITING {
            let did = did.clone();
            let waits = hsm.ask(Duration::ZERO, move |_| Ok(did.send(()).is_ok()));
            assert!(matches!(waits, Err(HsmError::TimedOut(_))));
        }
        assert!(matches!(hsm.has("k1"), Err(HsmError::TimedOut(ANSWER_WITHIN))));
        drop((go_on, did));
        assert!(done.recv().is_err());
        assert!(!hsm.has("k1").unwrap());
    }

    #[test]
    fn a_mechanism_that_is_not_there_is_named() {
        let token = Token::new();
        let error = token.open().ask(ANSWER_WITHIN, move |login| {
            let made = login.session.generate_key(&Mechanism::EccMontgomeryKeyPairGen, &[]);
            made.map(drop).map_err(|e| refused("CKM_EC_MONTGOMERY_KEY_PAIR_GEN", e))
        });
        let text = error.unwrap_err().to_string();
        let named = "CKM_EC_MONTGOMERY_KEY_PAIR_GEN (C_GenerateKey: CKR_MECHANISM_INVALID)";
        assert!(text.contains(named), "{text}");
    }
}
