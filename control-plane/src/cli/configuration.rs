//! The configuration that a command goes by: its file, and the variables.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use keygate::config::settings::{RENAMED, SETTINGS, variable};
use keygate::config::variables::{self, Variable};
use keygate::config::{self, Config};

use super::exit::{Exit, Failure};

/// Files that are read when no other is named: the first one that is there.
const FILES: [&str; 2] = ["keygate.toml", "/etc/keygate/keygate.toml"];

/// The file.
#[derive(Debug, Args)]
pub struct ConfigFile {
    /// Configuration file [default: ./keygate.toml or /etc/keygate/keygate.toml, the first one that is there]
    #[arg(long, env = "KEYGATE_CONFIG", value_name = "FILE")]
    config: Option<String>,
}

/// A flag that takes the place of a setting: the setting's key, the flag, and its value if it was given.
pub type Flag<'f> = (&'static str, &'static str, &'f Option<String>);

impl ConfigFile {
    /// The file that is read, if there is one.
    pub fn path(&self) -> Option<PathBuf> {
        let default = || FILES.map(Path::new).into_iter().find(|path| path.exists()).map(Path::to_owned);
        self.config.as_ref().filter(|path| !path.is_empty()).map(PathBuf::from).or_else(default)
    }

    /// Reads the file, then `KEYGATE_*` variables, then flags.
    pub fn read(&self, flags: &[Flag<'_>]) -> anyhow::Result<Config> {
        check_variables()?;
        let path = self.path();
        let text = match &path {
            Some(path) => std::fs::read_to_string(path).with_context(|| path.display().to_string())?,
            None => String::new(),
        };
        let mut overrides = Vec::new();
        // A variable by a former name is refused, like its key.
        for key in SETTINGS.iter().map(|setting| setting.key).chain(RENAMED.map(|(old, _)| old)) {
            let variable = variable(key);
            if let Some(value) = std::env::var(&variable).ok().filter(|value| !value.is_empty()) {
                overrides.push((key, value, variable));
            }
        }
        for (key, flag, value) in flags {
            if let Some(value) = value {
                overrides.push((key, value.clone(), (*flag).to_owned()));
            }
        }
        config::read(&text, &overrides).with_context(|| match path {
            Some(path) => path.display().to_string(),
            None => "no configuration file".to_owned(),
        })
    }
}

/// Refuses variables whose names are nearly those of settings, and warns of others that nothing reads.
fn check_variables() -> anyhow::Result<()> {
    let mut errors = Vec::new();
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        if !name.starts_with("KEYGATE_") {
            continue;
        }
        match variables::judge(&name) {
            Variable::Known => {}
            Variable::Misspelt(meant) => errors.push(format!("{name}: there is no such variable; {meant}?")),
            Variable::Unknown => {
                eprintln!("keygate: warning: {name} is no setting of Keygate and is ignored")
            }
        }
    }
    if errors.is_empty() { Ok(()) } else { Err(Failure::error(Exit::Usage, errors.join("\n"))) }
}
