//! `keygate serve`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::Args;
use keygate::app::{self, FromEnvironment, RunError};
use keygate::config::settings::{self, SETTINGS};
use keygate::config::{Config, LogFormat};
use keygate::platform::clock::Clock;
use keygate::services::admin_key;
use keygate_core::secret::Secret;
use tokio::signal::unix::{SignalKind, signal};

use super::configuration::ConfigFile;

/// Settings come from keygate.toml, then KEYGATE_* variables, then these flags.
#[derive(Debug, Args)]
#[command(after_help = after_help())]
pub struct Serve {
    #[command(flatten)]
    file: ConfigFile,
    /// Check the configuration and stop
    #[arg(long)]
    check: bool,
    #[arg(long, help = help("listen"))]
    listen: Option<String>,
    #[arg(long, help = help("sync_listen"))]
    sync_listen: Option<String>,
    #[arg(long, help = help("data_dir"))]
    data_dir: Option<String>,
    #[arg(long, help = help("admin_key_file"))]
    admin_key_file: Option<String>,
    #[arg(long, help = help("fleet_token_file"))]
    fleet_token_file: Option<String>,
    #[arg(long, help = help("master_key_file"))]
    master_key_file: Option<String>,
    #[arg(long, help = help("previous_master_key_file"))]
    previous_master_key_file: Option<String>,
    /// Issue another first admin key at the start, and write it in place of the one before: for who is locked out
    #[arg(long)]
    new_admin_key: bool,
    /// Redis that control planes share; a password is better given as KEYGATE_REDIS_URL
    #[arg(long, value_name = "URL")]
    redis: Option<String>,
    #[arg(long, value_name = "FILE", help = help("policy_file"))]
    policy: Option<String>,
}

fn after_help() -> String {
    let mut text = "Settings, by their key in keygate.toml and their variable:\n".to_owned();
    for setting in SETTINGS {
        text.push_str(&format!("  {:<35} {:<43} {}\n", setting.key, setting.variable(), setting.describe()));
    }
    text.push_str(
        "\nSecrets in variables instead of files: KEYGATE_FLEET_TOKEN, KEYGATE_MASTER_KEY, KEYGATE_PREVIOUS_MASTER_KEY,\n\
         KEYGATE_HSM_PIN, KEYGATE_NOTIFY_SLACK_URL, KEYGATE_NOTIFY_PAGERDUTY_KEY, KEYGATE_NOTIFY_WEBHOOK_SECRET.\n\
         Roles are tables of keygate.toml:\n",
    );
    text.push_str("  [roles.NAME]  ttl = \"7d\", requests_per_hour = 100 (-1: unlimited), scopes = [...], may_create = [...]\n");
    text
}

/// The help of a flag, which is that of its setting.
fn help(key: &str) -> String {
    settings::find(key).map(|setting| setting.describe()).unwrap_or_default()
}

impl Serve {
    fn read(&self) -> anyhow::Result<Config> {
        self.file.read(&[
            ("listen", "--listen", &self.listen),
            ("sync_listen", "--sync-listen", &self.sync_listen),
            ("data_dir", "--data-dir", &self.data_dir),
            ("admin_key_file", "--admin-key-file", &self.admin_key_file),
            ("fleet_token_file", "--fleet-token-file", &self.fleet_token_file),
            ("master_key_file", "--master-key-file", &self.master_key_file),
            ("previous_master_key_file", "--previous-master-key-file", &self.previous_master_key_file),
            ("redis.url", "--redis", &self.redis),
            ("policy_file", "--policy", &self.policy),
        ])
    }

    pub fn run(self) -> anyhow::Result<ExitCode> {
        let config = self.read()?;
        if self.check {
            match self.file.path() {
                Some(path) => println!("{}: the configuration is valid.", path.display()),
                None => println!("No configuration file; variables and flags are valid."),
            }
            return Ok(ExitCode::SUCCESS);
        }
        start_log(config.log_format);
        hold_secrets_back()?;
        let given = FromEnvironment {
            fleet_token: variable_with_secret("KEYGATE_FLEET_TOKEN"),
            master_key: variable_with_secret("KEYGATE_MASTER_KEY"),
            previous_master_key: variable_with_secret("KEYGATE_PREVIOUS_MASTER_KEY"),
            hsm_pin: variable_with_secret("KEYGATE_HSM_PIN"),
            slack_url: variable_with_secret("KEYGATE_NOTIFY_SLACK_URL"),
            pagerduty_key: variable_with_secret("KEYGATE_NOTIFY_PAGERDUTY_KEY"),
            webhook_secret: variable_with_secret("KEYGATE_NOTIFY_WEBHOOK_SECRET"),
        };
        let (new_admin_key, file) = (self.new_admin_key, self.file.path());
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        runtime.block_on(async {
            let serving = app::start(config, Clock::system(), given).await?;
            if new_admin_key {
                admin_key::issue(&serving.app.node).await.map_err(RunError::from)?;
            }
            tracing::info!(
                api = %serving.api_address()?,
                sync = %serving.sync_address()?,
                version = %serving.app.state().version,
                data_dir = %serving.app.config.data_dir.display(),
                config = %file.map_or_else(|| "none".to_owned(), |path| path.display().to_string()),
                "keygate serves"
            );
            let mut terminate = signal(SignalKind::terminate())?;
            let mut interrupt = signal(SignalKind::interrupt())?;
            let shutdown = async move {
                tokio::select! {
                    _ = terminate.recv() => {}
                    _ = interrupt.recv() => {}
                }
            };
            serving.run(shutdown).await;
            anyhow::Ok(())
        })?;
        // What still reads on a thread of its own is not waited for.
        runtime.shutdown_background();
        Ok(ExitCode::SUCCESS)
    }
}

fn variable_with_secret(name: &str) -> Option<Secret<String>> {
    std::env::var(name).ok().filter(|value| !value.is_empty()).map(Secret::new)
}

/// Has the kernel write no memory of this process to disk when it dies, neither to a file nor to a program that
/// collects core dumps, and let no other process of the same user read it. What is not wiped yet stays in memory.
fn hold_secrets_back() -> anyhow::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).context("no core dumps")?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("no core dumps")
}

fn start_log(format: LogFormat) {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::prelude::*;
    // KEYGATE_LOG=debug shows a line a request; or levels by module, as in `info,keygate::sync=debug`.
    let wanted = std::env::var("KEYGATE_LOG").ok().filter(|text| !text.is_empty());
    let filter = wanted.and_then(|text| text.parse().ok());
    let log = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let registry = tracing_subscriber::registry()
        .with(filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO)));
    match format {
        LogFormat::Text => {
            registry.with(log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))).init();
        }
        LogFormat::Json => registry.with(log.json().flatten_event(true)).init(),
    }
}
