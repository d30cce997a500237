//! `keygate backup` and `keygate recover`: for the day on which something is lost.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use keygate::config::Target;
use keygate::durability::backup::{self, Outcome};
use keygate::durability::journal;
use keygate::platform::clock::{Clock, rfc3339_ms};
use keygate::redis_store;
use keygate::secrets::keyring::{Keyring, Masters};
use keygate::secrets::master_key::MasterKey;
use keygate_core::secret::Secret;

/// Backups of the journal, from which all else is rebuilt.
#[derive(Debug, Subcommand)]
pub enum Backup {
    /// Write the journal to one file; the control plane may run meanwhile
    ///
    /// Keep the master key elsewhere: it is not in the file, and without it no restored secret can be opened.
    Export {
        /// The file to write
        file: PathBuf,
        #[command(flatten)]
        data: Data,
    },
    /// Put a backup in place of a journal that is lost or damaged; the control plane must be stopped
    ///
    /// A journal that has more than the backup stays. Of a damaged one, what ended keys after the backup is taken over
    /// at the next start, and it is kept beside. Proxies that enforce later changes than the backup has keep them,
    /// until they find what they know or their hard age has passed.
    Import {
        /// The file
        file: PathBuf,
        #[command(flatten)]
        data: Data,
        /// Changes after the backup are lost for good: have proxies take what there is now, also if they know more
        #[arg(long)]
        accept_loss: bool,
    },
}

/// Where the data is.
#[derive(Debug, Args)]
pub struct Data {
    /// The control plane's data directory
    #[arg(long, env = "KEYGATE_DATA_DIR", default_value = ".keygate/data")]
    data_dir: PathBuf,
}

impl Backup {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let now = rfc3339_ms(Clock::system().now_ms());
        match self {
            Self::Export { file, data } => {
                let report = backup::export(&journal_in(&data.data_dir), &file, &now)?;
                println!(
                    "{}: {} records, until {}",
                    file.display(),
                    report.records,
                    report.last_at.unwrap_or_default()
                );
                println!("  head {}", report.head);
                println!("  The keyring is in it, sealed; the master key is not: keep it elsewhere, too.");
            }
            Self::Import { file, data, accept_loss } => {
                match backup::import(&file, &data.data_dir, accept_loss, &now)? {
                    Outcome::AlreadyThere { records } => {
                        println!("Nothing to do: the journal has all of the backup, and {records} records.");
                    }
                    Outcome::Restored { records, saved, moved_to } => {
                        println!("Restored {records} records.");
                        if let Some(moved_to) = moved_to {
                            println!("  what was there is in {}", moved_to.display());
                            println!(
                                "  {saved} later changes that ended keys were found in it, for the next start"
                            );
                        }
                        println!("  Start the control plane with the master key of that time.");
                        println!("  If a secret was ended at once after the backup, end it again:");
                        println!("  keygate secrets rotate --immediate");
                    }
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Fill a Redis from a journal; needs no control plane
///
/// What is in Redis already stays, and revocations are united, so it can be run at any time and again. A control plane
/// that runs does this by itself.
#[derive(Debug, Args)]
pub struct Recover {
    /// The data directory, or the journal's directory in it or in a backup
    #[arg(long, value_name = "DIR")]
    from_journal: PathBuf,
    /// The Redis to fill; a password is better given as KEYGATE_REDIS_URL
    #[arg(long, value_name = "URL", env = "KEYGATE_REDIS_URL", hide_env_values = true)]
    redis: String,
    /// The master key of the control plane [default: master.key in the data directory]
    #[arg(long, value_name = "FILE", env = "KEYGATE_MASTER_KEY_FILE")]
    master_key_file: Option<PathBuf>,
}

impl Recover {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let target: Target = self.redis.parse().context("--redis")?;
        let dir = journal_in(&self.from_journal);
        let master_key_file =
            self.master_key_file.unwrap_or_else(|| dir.parent().unwrap_or(Path::new(".")).join("master.key"));
        let master = match std::env::var("KEYGATE_MASTER_KEY").ok().filter(|text| !text.is_empty()) {
            Some(text) => MasterKey::from_variable("KEYGATE_MASTER_KEY", Secret::new(text).expose())?,
            None => MasterKey::load(&master_key_file, false)?,
        };
        let data_dir = dir.parent().unwrap_or(Path::new("."));
        let keys = Keyring::read_only(data_dir, Masters { master, previous: None, hsm: None })?;
        let report = journal::verify(&dir, None)?;
        anyhow::ensure!(report.records > 0, "{}: there is no journal here", dir.display());
        println!("{}: {} records, whole and unchanged", dir.display(), report.records);
        keygate_core::token::crypto::native::install();
        let work = Work::new()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let now = Clock::system().now_s();
        let progress = |done: redis_store::Recovered| {
            print!(
                "\r  {} of {} changes, {} keys, {} revocations",
                done.changes, report.records, done.keys, done.revocations
            );
            let _shown_or_not = std::io::stdout().flush();
        };
        let done = runtime.block_on(redis_store::recover(&target, &dir, &work.0, &keys, now, progress));
        println!();
        let done = done?;
        println!("{target} has them all; {} changes were missing there.", done.appended);
        Ok(ExitCode::SUCCESS)
    }
}

fn journal_in(dir: &Path) -> PathBuf {
    let inside = dir.join(journal::DIRECTORY);
    if inside.is_dir() { inside } else { dir.to_owned() }
}

/// A directory for a while.
struct Work(PathBuf);

impl Work {
    fn new() -> anyhow::Result<Self> {
        let path =
            std::env::temp_dir().join(format!("keygate-recover-{}", keygate::platform::random::identifier()));
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700)
            .create(&path)
            .with_context(|| path.display().to_string())?;
        Ok(Self(path))
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        let _gone_or_not = std::fs::remove_dir_all(&self.0);
    }
}
