//! Tokens of SoftHSM, for the tests of this crate.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock, MutexGuard, PoisonError};

use keygate_core::secret::Secret;
use tempfile::TempDir;

use super::session::INITIALISED;
use super::{Hsm, HsmConfig};
use crate::platform::random;

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
    #[expect(unsafe_code, reason = "SoftHSM is told of its tokens by the environment alone")]
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
        let config = HsmConfig { module, token: label, pin: Secret::new(PIN.into()) };
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
