//! What is compared.

/// A listener of the benchmark's Envoy, by its filters before the router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listener {
    /// None.
    Bare,
    /// None, once more: what differs from `Bare` is noise.
    BareAgain,
    /// A proxy-wasm filter that does nothing.
    WasmEmpty,
    /// jwt_authn without its cache.
    JwtHs256,
    JwtEs256,
    JwtEdDsa,
    /// jwt_authn with all tokens in its cache.
    JwtCached,
    /// ext_authz, which asks a service that says yes.
    ExtAuthz,
    /// In WebAssembly.
    Keygate,
    /// The same as a dynamic module.
    Module,
}

impl Listener {
    pub const ALL: [Self; 10] = [
        Self::Bare,
        Self::BareAgain,
        Self::WasmEmpty,
        Self::JwtHs256,
        Self::JwtEs256,
        Self::JwtEdDsa,
        Self::JwtCached,
        Self::ExtAuthz,
        Self::Keygate,
        Self::Module,
    ];

    /// Whether it is Keygate, in whichever form.
    pub fn is_keygate(self) -> bool {
        matches!(self, Self::Keygate | Self::Module)
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Bare => "bare",
            Self::BareAgain => "bare_again",
            Self::WasmEmpty => "wasm_empty",
            Self::JwtHs256 => "jwt_authn_hs256",
            Self::JwtEs256 => "jwt_authn_es256",
            Self::JwtEdDsa => "jwt_authn_eddsa",
            Self::JwtCached => "jwt_authn_cached",
            Self::ExtAuthz => "ext_authz",
            Self::Keygate => "keygate",
            Self::Module => "module",
        }
    }
}

/// What requests show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// HS256 tokens, each many times.
    Known,
    /// The same, to a route whose upstream is told nothing of a key.
    Lean,
    /// Tokens like those of `Known`, of a role without a limit.
    Unlimited,
    /// ES256 tokens, each many times.
    Es256,
    /// EdDSA tokens, each many times.
    EdDsa,
    /// ES256 tokens, so many of a hundred never seen before; the others are of `Known`.
    New(usize),
    /// Tokens that somebody made up who has no key.
    Forged,
    /// Good tokens with the signature of another one: what somebody can make up who has a key.
    Altered,
}

/// One of what is compared.
#[derive(Debug)]
pub struct Variant {
    pub name: &'static str,
    pub listener: Listener,
    pub load: Load,
    /// How many of a hundred requests of a round are sent: fewer where each costs more.
    pub share: usize,
    /// Beside the point: its cost is measured, its speed is not.
    pub aside: bool,
}

const fn of(name: &'static str, listener: Listener, load: Load, share: usize) -> Variant {
    Variant { name, listener, load, share, aside: false }
}

const fn aside(name: &'static str, listener: Listener, load: Load, share: usize) -> Variant {
    Variant { name, listener, load, share, aside: true }
}

/// All; the first is what the others are compared with.
pub const ALL: [Variant; 21] = [
    of("bare", Listener::Bare, Load::Known, 100),
    aside("bare_again", Listener::BareAgain, Load::Known, 100),
    of("wasm_empty", Listener::WasmEmpty, Load::Known, 100),
    of("jwt_authn_hs256", Listener::JwtHs256, Load::Known, 100),
    of("jwt_authn_es256", Listener::JwtEs256, Load::Es256, 50),
    of("jwt_authn_eddsa", Listener::JwtEdDsa, Load::EdDsa, 50),
    of("jwt_authn_cached", Listener::JwtCached, Load::Known, 100),
    of("ext_authz", Listener::ExtAuthz, Load::Known, 50),
    of("keygate_known", Listener::Keygate, Load::Known, 100),
    aside("keygate_unlimited", Listener::Keygate, Load::Unlimited, 100),
    aside("keygate_lean", Listener::Keygate, Load::Lean, 100),
    aside("keygate_new_1", Listener::Keygate, Load::New(1), 100),
    aside("keygate_new_10", Listener::Keygate, Load::New(10), 50),
    of("keygate_new", Listener::Keygate, Load::New(100), 20),
    of("keygate_forged", Listener::Keygate, Load::Forged, 50),
    aside("keygate_altered", Listener::Keygate, Load::Altered, 25),
    of("module_known", Listener::Module, Load::Known, 100),
    aside("module_unlimited", Listener::Module, Load::Unlimited, 100),
    of("module_new", Listener::Module, Load::New(100), 20),
    of("module_forged", Listener::Module, Load::Forged, 50),
    aside("module_altered", Listener::Module, Load::Altered, 25),
];

/// The one of that name.
#[track_caller]
pub fn named(name: &str) -> usize {
    let place = ALL.iter().position(|variant| variant.name == name);
    place.unwrap_or_else(|| panic!("there is no {name}"))
}
