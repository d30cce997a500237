//! Why a decision is as it is.

use serde::{Deserialize, Serialize};

use crate::decide::refusal::Refusal;

/// The result of validating a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validation {
    /// It is valid and permits the request.
    Success,
    /// It is refused.
    Failure,
    /// It is valid, and the request is beyond its limit.
    Limited,
}

impl Validation {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Success, Self::Failure, Self::Limited];

    /// Its name in metrics.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Failure => "failure",
            Self::Limited => "limited",
        }
    }
}

/// Defines the reasons and [`Reason::ALL`] of one list.
macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Precisely why.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Reason {
            $($(#[$doc])* $name,)*
        }

        impl Reason {
            /// All of them, for metrics that exist before they are needed.
            pub const ALL: [Self; [$(stringify!($name)),*].len()] = [$(Self::$name,)*];
        }
    };
}

reasons! {
    /// The key counts and permits it.
    Allowed,
    /// The route is public.
    Public,
    /// The rollout sends it to V1, which decides for itself.
    V1,
    /// No route matches.
    NoRoute,
    /// No credential.
    MissingCredential,
    /// More than one credential.
    TooManyCredentials,
    /// No state yet.
    NoState,
    /// The state is older than the hard age.
    StaleState,
    /// The revocation set cannot be read at the moment.
    RevocationUnknown,
    /// The token cannot be read strictly.
    Malformed,
    /// No such signing secret, or one that does not count any more.
    UnknownKid,
    /// The header's algorithm is not that of the signing secret.
    AlgorithmMismatch,
    /// Another issuer.
    WrongIssuer,
    /// Another audience.
    WrongAudience,
    /// The key has ended.
    Expired,
    /// Issued in the future.
    NotYetValid,
    /// A life longer than any that is issued.
    LifeTooLong,
    /// The token's id is made up, see [`crate::token::jti`]; the signature was not looked at.
    ForgedId,
    /// The signature is not one.
    BadSignature,
    /// Lockdown.
    Lockdown,
    /// Revoked.
    Revoked,
    /// Suspended.
    Suspended,
    /// Under a cut-off.
    Cutoff,
    /// A scope is missing.
    MissingScope,
    /// The role is none of the route's.
    WrongRole,
    /// The key has done as much as it may.
    RateLimited,
    /// How much it has done is not known at the moment.
    LimitUnknown,
    /// The limit is not reached, but the units that are left are elsewhere in the fleet at the moment.
    LimitPending,
}

impl Reason {
    /// Its name in metrics and logs.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Allowed => "allowed",
            Self::Public => "public",
            Self::V1 => "v1",
            Self::NoRoute => "no_route",
            Self::MissingCredential => "missing_credential",
            Self::TooManyCredentials => "too_many_credentials",
            Self::NoState => "no_state",
            Self::StaleState => "stale_state",
            Self::RevocationUnknown => "revocation_unknown",
            Self::Malformed => "malformed",
            Self::UnknownKid => "unknown_kid",
            Self::AlgorithmMismatch => "algorithm_mismatch",
            Self::WrongIssuer => "wrong_issuer",
            Self::WrongAudience => "wrong_audience",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::LifeTooLong => "life_too_long",
            Self::ForgedId => "forged_id",
            Self::BadSignature => "bad_signature",
            Self::Lockdown => "lockdown",
            Self::Revoked => "revoked",
            Self::Suspended => "suspended",
            Self::Cutoff => "cutoff",
            Self::MissingScope => "missing_scope",
            Self::WrongRole => "wrong_role",
            Self::RateLimited => "rate_limited",
            Self::LimitUnknown => "limit_unknown",
            Self::LimitPending => "limit_pending",
        }
    }

    /// Its place in [`Reason::ALL`].
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The result of validating the key of a request; `None` where no key was looked at.
    pub const fn validation(self) -> Option<Validation> {
        match self {
            Self::Allowed => Some(Validation::Success),
            // The key is valid, and has used up its limit.
            Self::RateLimited | Self::LimitPending => Some(Validation::Limited),
            Self::Malformed
            | Self::UnknownKid
            | Self::AlgorithmMismatch
            | Self::WrongIssuer
            | Self::WrongAudience
            | Self::Expired
            | Self::NotYetValid
            | Self::LifeTooLong
            | Self::ForgedId
            | Self::BadSignature
            | Self::Lockdown
            | Self::Revoked
            | Self::Suspended
            | Self::Cutoff
            | Self::MissingScope
            | Self::WrongRole => Some(Validation::Failure),
            Self::Public
            | Self::V1
            | Self::NoRoute
            | Self::MissingCredential
            | Self::TooManyCredentials
            | Self::NoState
            | Self::StaleState
            | Self::RevocationUnknown
            | Self::LimitUnknown => None,
        }
    }

    /// What a client is told, `None` when it passes.
    pub const fn refusal(self) -> Option<Refusal> {
        Some(match self {
            Self::Allowed | Self::Public | Self::V1 => return None,
            Self::NoRoute => Refusal::NoRoute,
            Self::MissingCredential => Refusal::MissingCredential,
            Self::TooManyCredentials => Refusal::TooManyCredentials,
            Self::NoState | Self::StaleState | Self::RevocationUnknown | Self::LimitUnknown => {
                Refusal::Unavailable
            }
            Self::Malformed
            | Self::UnknownKid
            | Self::AlgorithmMismatch
            | Self::WrongIssuer
            | Self::WrongAudience
            | Self::Expired
            | Self::NotYetValid
            | Self::LifeTooLong
            | Self::ForgedId
            | Self::BadSignature
            | Self::Lockdown
            | Self::Revoked
            | Self::Suspended
            | Self::Cutoff => Refusal::InvalidToken,
            Self::MissingScope | Self::WrongRole => Refusal::InsufficientScope,
            Self::RateLimited | Self::LimitPending => Refusal::RateLimited,
        })
    }
}
