//! A token's session: when another one is needed, and what is done within one.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11};
use cryptoki::error::{Error as Pkcs11Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::aead::GcmParams;
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::Slot;
use cryptoki::types::AuthPin;
use keygate_core::secret::Secret;
use keygate_core::token::crypto::P256_POINT_BYTES;

use super::error::{refused, refuses_the_pin};
use super::{ANSWER_WITHIN, Cause, HsmConfig, HsmError};
use crate::platform::random;

/// AES-GCM as SP 800-38D recommends it.
const IV_BYTES: usize = 12;
const TAG_BYTES: usize = 16;
const AES_KEY_BYTES: u64 = 32;
/// The object identifier of P-256, 1.2.840.10045.3.1.7, in DER: `CKA_EC_PARAMS` (RFC 5480 section 2.1.1.1).
const P256: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];

/// Guards every call, and counts how often a module was initialised. A module's state belongs to the process, whoever
/// has it open: `C_Finalize` ends everybody's sessions, must not meet another call, and afterwards the numbers of old
/// sessions and keys are given to new ones. What was opened under another count is therefore not used any more.
pub(super) static INITIALISED: Mutex<u64> = Mutex::new(0);

/// What the thread has: the module, and a session while there is one.
pub(super) struct Client {
    path: PathBuf,
    module: Pkcs11,
    token: String,
    pin: AuthPin,
    /// Set when the PIN was refused. It is not tried again.
    pin_refused: Option<RvError>,
    login: Option<Login>,
}

impl Client {
    /// Loads the module, finds the token and logs in.
    pub(super) fn open(config: &HsmConfig) -> Result<Self, HsmError> {
        let path = config.module.clone();
        let module = Pkcs11::new(&path);
        let module = module.map_err(|e| HsmError::Module { path: path.clone(), cause: Cause(e) })?;
        // Keeps it loaded until the process ends: modules have threads and exit handlers of their own, whose code
        // must not be unmapped.
        std::mem::forget(module.clone());
        let (token, pin) = (config.token.clone(), AuthPin::new(config.pin.expose().as_str().into()));
        let mut client = Self { path, module, token, pin, pin_refused: None, login: None };
        client.connect(&mut INITIALISED.lock().unwrap_or_else(PoisonError::into_inner))?;
        Ok(client)
    }

    /// Does it once; and, if that fails for want of a session, once more in a new one. Not at all when nobody waits for
    /// it any more, since they will have tried again or given up.
    pub(super) fn run<T>(
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

    /// Closes the session, if there is one.
    pub(super) fn close(mut self) {
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
pub(super) enum Kind {
    Wrapping,
    Private,
    Public,
}

impl Kind {
    /// What those of that label have, and no others.
    pub(super) fn template(self, label: &str) -> Vec<Attribute> {
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
pub(super) struct Login {
    pub(super) module: Pkcs11,
    slot: Slot,
    pub(super) session: Session,
    /// The count of [`INITIALISED`] under which it was opened.
    initialised: u64,
    handles: HashMap<(Kind, String), ObjectHandle>,
}

impl Login {
    pub(super) fn ensure_wrapping_key(&mut self, label: &str, may_create: bool) -> Result<(), HsmError> {
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

    pub(super) fn wrap(&mut self, label: &str, associated: &[u8], plain: &[u8]) -> Result<Vec<u8>, HsmError> {
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

    pub(super) fn unwrap(
        &mut self,
        label: &str,
        associated: &[u8],
        sealed: &[u8],
    ) -> Result<Secret<Vec<u8>>, HsmError> {
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
    ) -> Result<Secret<Vec<u8>>, Pkcs11Error> {
        let (iv, rest) = sealed.split_first_chunk().ok_or(Pkcs11Error::InvalidValue)?;
        let opened = self.session.decrypt(&gcm(&mut iv.clone(), associated)?, key, rest)?;
        Ok(Secret::new(opened))
    }

    /// With `id` it knows the pair that it made when it is called once more.
    pub(super) fn generate_p256(&mut self, label: &str, id: &[u8; 16]) -> Result<Vec<u8>, HsmError> {
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

    pub(super) fn sign_p256(&mut self, label: &str, digest: &[u8]) -> Result<[u8; 64], HsmError> {
        let key = self.key(Kind::Private, label)?;
        let signature = self.session.sign(&Mechanism::Ecdsa, key, digest);
        let signature = signature.map_err(|e| refused("CKM_ECDSA", e))?;
        signature.try_into().map_err(|_| HsmError::Malformed("a signature of the wrong length"))
    }

    /// The private half first: what can still sign must not be taken for destroyed.
    pub(super) fn destroy(&mut self, label: &str) -> Result<bool, HsmError> {
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
    pub(super) fn key(&mut self, kind: Kind, label: &str) -> Result<ObjectHandle, HsmError> {
        let name = (kind, label.to_owned());
        if let Some(known) = self.handles.get(&name) {
            return Ok(*known);
        }
        let found = self.find(kind, label)?.ok_or_else(|| HsmError::NoSuchKey { key: label.into() })?;
        self.handles.insert(name, found);
        Ok(found)
    }

    pub(super) fn find(&self, kind: Kind, label: &str) -> Result<Option<ObjectHandle>, HsmError> {
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
