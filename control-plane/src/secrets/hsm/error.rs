//! Answers of a PKCS#11 module, as errors.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use cryptoki::error::{Error as Pkcs11Error, RvError};

/// An answer of a module.
#[derive(Debug)]
pub struct Cause(pub(super) Pkcs11Error);

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

/// Failure of the HSM, with what to do about it.
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
    pub(super) fn may_be_lost(&self) -> bool {
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

    pub(super) const fn is_about_the_pin(&self) -> bool {
        matches!(self, Self::PinRefused { .. } | Self::PinLastTry { .. })
    }
}

/// The error of a call that asked for a mechanism, which it names if the token does not have it.
pub(super) fn refused(mechanism: &'static str, error: Pkcs11Error) -> HsmError {
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
pub(super) const fn refuses_the_pin(code: RvError) -> bool {
    use RvError as R;
    matches!(code, R::PinIncorrect | R::PinInvalid | R::PinLenRange | R::PinLocked | R::PinExpired)
}
