//! The configuration that a command goes by: its file, and the variables.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use keygate::config::settings::{RENAMED, SETTINGS, variable};
use keygate::config::variables::{self, Variable};
use keygate::config::{self, Config, Shown};
use serde_json::json;

use super::Output;
use super::client::print_json;
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
        let (path, text, overrides) = self.sources(flags)?;
        config::read(&text, &overrides).with_context(|| name_of(path.as_deref()))
    }

    /// The file, its text, and what overrides it: key, value and origin.
    fn sources(&self, flags: &[Flag<'_>]) -> anyhow::Result<Sources> {
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
        Ok((path, text, overrides))
    }
}

/// See [`ConfigFile::sources`].
type Sources = (Option<PathBuf>, String, Vec<(&'static str, String, String)>);

fn name_of(file: Option<&Path>) -> String {
    file.map_or_else(|| "no configuration file".to_owned(), |file| file.display().to_string())
}

/// The configuration.
#[derive(Debug, Subcommand)]
pub enum Configuration {
    /// Show each setting that is in force here, and where it comes from: the file, a variable, or the default
    Show {
        #[command(flatten)]
        file: ConfigFile,
        #[command(flatten)]
        output: Output,
    },
}

impl Configuration {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Self::Show { file, output } = self;
        let (path, text, overrides) = file.sources(&[])?;
        config::read(&text, &overrides).with_context(|| name_of(path.as_deref()))?;
        let shown = config::shown(&text, &overrides);
        if output.json {
            let file = path.map(|path| path.display().to_string());
            print_json(&json!({ "file": file, "settings": shown }));
            return Ok(ExitCode::SUCCESS);
        }
        println!("{}", name_of(path.as_deref()));
        for Shown { key, value, origin } in shown {
            println!("{key:<36} {:<28} {origin}", value.unwrap_or_else(|| "-".into()));
        }
        Ok(ExitCode::SUCCESS)
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
