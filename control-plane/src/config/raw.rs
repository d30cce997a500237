//! The configuration as it was typed: values by their dotted keys, each with its origin.

use std::collections::BTreeMap;

use toml::Value;

use super::settings::{self, Default, RENAMED, SETTINGS};

/// Values that were not read yet, and the errors so far.
#[derive(Debug, Default)]
pub(super) struct RawConfig {
    values: BTreeMap<String, (Value, String)>,
    pub errors: Vec<String>,
}

impl RawConfig {
    /// The text of a file, and overrides as key, value and origin, of which later ones win.
    pub fn new(file: &str, overrides: &[(&str, String, String)]) -> Self {
        let mut raw = Self::default();
        match file.parse::<toml::Table>() {
            Ok(table) => raw.flatten(String::new(), Value::Table(table)),
            Err(error) => {
                raw.errors.push(format!("the configuration file: {}", error.to_string().trim_end()))
            }
        }
        for (key, value, origin) in overrides {
            raw.values.insert((*key).to_owned(), (Value::String(value.clone()), origin.clone()));
        }
        raw
    }

    fn flatten(&mut self, prefix: String, value: Value) {
        match value {
            Value::Table(table) => {
                for (name, value) in table {
                    let key = if prefix.is_empty() { name } else { format!("{prefix}.{name}") };
                    self.flatten(key, value);
                }
            }
            value => {
                self.values.insert(prefix, (value, "the configuration file".into()));
            }
        }
    }

    /// Each setting in its order, then those of roles: its key, its value as it was typed or its default, and the origin.
    pub fn shown(mut self) -> Vec<Shown> {
        let mut all = Vec::new();
        for setting in SETTINGS {
            let key = setting.key.to_owned();
            let shown = match (self.values.remove(setting.key), setting.default) {
                (Some((value, origin)), _) => Shown { key, value: Some(text_of(&value)), origin },
                (None, Default::Value(default)) => {
                    Shown { key, value: Some(default.to_owned()), origin: "default".into() }
                }
                (None, Default::Derived(from)) => {
                    Shown { key, value: None, origin: format!("default, from {from}") }
                }
                (None, Default::None) => Shown { key, value: None, origin: "not set".into() },
            };
            all.push(shown);
        }
        let of_roles = self.values.into_iter();
        all.extend(of_roles.map(|(key, (value, origin))| Shown {
            key,
            value: Some(text_of(&value)),
            origin,
        }));
        all
    }

    /// The keys that were not read yet.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// Reads an optional setting.
    pub fn take<T>(&mut self, key: &str, parse: impl FnOnce(&Value) -> Result<T, String>) -> Option<T> {
        let (value, origin) = self.values.remove(key)?;
        match parse(&value) {
            Ok(parsed) => Some(parsed),
            Err(problem) => {
                self.errors.push(format!("{key}: {problem} (from {origin})"));
                None
            }
        }
    }

    /// Reads a setting that has a default in [`SETTINGS`].
    ///
    /// # Panics
    /// When it has none, or one that cannot be read; each start and a test read all of them.
    pub fn get<T>(&mut self, key: &str, parse: impl Fn(&Value) -> Result<T, String>) -> T {
        self.take(key, &parse).unwrap_or_else(|| {
            let setting = settings::find(key).expect("a setting of the table");
            let Default::Value(default) = setting.default else { panic!("{key} has no default") };
            parse(&Value::String(default.into())).expect("a valid default")
        })
    }

    /// The errors; settings that were not read do not exist.
    pub fn into_errors(mut self) -> Vec<String> {
        for (key, (_, origin)) in self.values {
            self.errors.push(match renamed(&key) {
                Some(new) => format!("{key}: is called {new} now (from {origin})"),
                None => format!("{key}: no such setting (from {origin}){}", suggestion(&key)),
            });
        }
        self.errors
    }
}

/// A setting as it is in force.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Shown {
    /// Its key.
    pub key: String,
    /// Its value; `None`: it depends on others, or there is none.
    pub value: Option<String>,
    /// Where that comes from.
    pub origin: String,
}

/// A value as an operator would type it, without a password in a URL.
fn text_of(value: &Value) -> String {
    let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let Some((scheme, rest)) = text.split_once("://") else { return text };
    match rest.rsplit_once('@') {
        Some((login, host)) => {
            let user = login.split(':').next().unwrap_or_default();
            format!("{scheme}://{user}:…@{host}")
        }
        None => text,
    }
}

/// The new key of a former one.
fn renamed(key: &str) -> Option<String> {
    let role = key.strip_prefix("roles.").and_then(|key| key.strip_suffix(".life"));
    role.map(|role| format!("roles.{role}.ttl"))
        .or_else(|| RENAMED.iter().find(|(old, _)| *old == key).map(|(_, new)| (*new).to_owned()))
}

fn suggestion(key: &str) -> String {
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    let similar = SETTINGS.iter().map(|setting| setting.key).find(|known| {
        last(known) == last(key) || known.replace(['_', '.'], "") == key.replace(['_', '.', '-'], "")
    });
    similar.map(|known| format!("; did you mean '{known}'?")).unwrap_or_default()
}
