//! The command line.

#[macro_use]
pub mod print;

mod audit;
mod client;
mod configuration;
mod emergency;
pub mod exit;
mod recovery;
mod rollout;
mod secrets;
mod serve;
mod server;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

/// API keys enforced inside Envoy: the control plane and its operator's commands.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = exit::HELP)]
struct Cli {
    /// The control plane that commands call [default: that of scripts/up, in .keygate/context.toml]
    #[arg(long, global = true, env = "KEYGATE_URL", value_name = "URL")]
    url: Option<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the control plane
    Serve(serve::Serve),
    /// Create, list, show, revoke, suspend and resume keys
    #[command(subcommand)]
    Keys(client::Keys),
    /// End many keys at once, lock down, and lift that again
    #[command(subcommand)]
    Emergency(emergency::Emergency),
    /// List what was revoked, and look after the set that proxies hold
    #[command(subcommand)]
    Revocations(emergency::Revocations),
    /// Show and rotate the signing secrets
    #[command(subcommand)]
    Secrets(secrets::Secrets),
    /// Show and change which requests go to V1 and which to V2
    #[command(subcommand)]
    Rollout(rollout::Rollout),
    /// Show the proxies and what they enforce, and have one give back what it has
    Fleet(client::Fleet),
    /// List what was changed, and check that the record of it is whole
    #[command(subcommand)]
    Audit(audit::Audit),
    /// Back up the journal and the keyring, check a backup, and restore it
    #[command(subcommand)]
    Backup(recovery::Backup),
    Recover(recovery::Recover),
    /// Show the configuration
    #[command(subcommand)]
    Config(configuration::Configuration),
    /// Say how a request would be decided; the key to ask about is read from KEYGATE_KEY or standard input
    Explain(client::Explain),
}

/// How a subcommand prints.
#[derive(Debug, Args)]
struct Output {
    /// Print the API's JSON
    #[arg(long)]
    json: bool,
}

/// Runs what the command line says.
pub fn run() -> anyhow::Result<ExitCode> {
    let Cli { url, command } = Cli::parse();
    server::set_url(url);
    match command {
        Command::Serve(serve) => serve.run(),
        Command::Keys(keys) => keys.run(),
        Command::Emergency(emergency) => emergency.run(),
        Command::Revocations(revocations) => revocations.run(),
        Command::Secrets(secrets) => secrets.run(),
        Command::Rollout(rollout) => rollout.run(),
        Command::Fleet(fleet) => fleet.run(),
        Command::Audit(audit) => audit.run(),
        Command::Backup(backup) => backup.run(),
        Command::Recover(recover) => recover.run(),
        Command::Config(configuration) => configuration.run(),
        Command::Explain(explain) => explain.run(),
    }
}
