//! `keygate backup` and `keygate recover`: for the day on which something is lost.

use std::io::{IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use keygate::config::Target;
use keygate::durability::backup::{self, BackupError, Checked, Loss, Mode, Restoration, There};
use keygate::durability::journal;
use keygate::platform::clock::{Clock, rfc3339_ms};
use keygate::redis_store;
use keygate::secrets::keyring::{Keyring, Masters};
use keygate::secrets::master_key::MasterKey;
use keygate::services::admin_key;
use keygate_core::secret::Secret;

use super::configuration::ConfigFile;
use super::exit::Exit;

/// Backups of the journal and the keyring, from which all else is rebuilt.
#[derive(Debug, Subcommand)]
pub enum Backup {
    /// Write the journal and the keyring to one file; the control plane may run meanwhile
    ///
    /// Keep the master key elsewhere: it is not in the file, and without it no restored secret can be opened.
    Create {
        /// The file to write
        file: PathBuf,
        #[command(flatten)]
        data: Data,
    },
    /// Check every record of a backup; changes nothing
    Verify {
        /// The file
        file: PathBuf,
    },
    /// Put a backup in place of what the data directory has; the control plane must be stopped
    ///
    /// Revocations, suspensions, cut-offs, lockdowns and ended secrets that the present journal knows are taken over, and
    /// at the next start also those that proxies and Redis know. The present journal is kept beside. The next start
    /// writes a new admin key.
    #[command(
        after_help = "Exit status: 0 restored, 1 failed, 5 changes of the present journal would be lost (--accept-loss)"
    )]
    Restore {
        /// The file
        file: PathBuf,
        #[command(flatten)]
        data: Data,
        /// Restore although the present journal has changes that are not in the backup and will be lost
        #[arg(long)]
        accept_loss: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
        /// Say what would be lost, and change nothing
        #[arg(long)]
        dry_run: bool,
    },
}

/// Where the data is.
#[derive(Debug, Args)]
pub struct Data {
    /// The control plane's data directory [default: that of the configuration]
    #[arg(long, env = "KEYGATE_DATA_DIR", value_name = "DIR")]
    data_dir: Option<String>,
    #[command(flatten)]
    file: ConfigFile,
}

impl Data {
    pub fn dir(&self) -> anyhow::Result<PathBuf> {
        match self.data_dir.as_ref().filter(|dir| !dir.is_empty()) {
            Some(dir) => Ok(PathBuf::from(dir)),
            None => Ok(self.file.read(&[])?.data_dir),
        }
    }
}

impl Backup {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let now = rfc3339_ms(Clock::system().now_ms());
        match self {
            Self::Create { file, data } => {
                let report = backup::create(&journal_in(&data.dir()?), &file, &now)?;
                println!(
                    "{}: {} records, until {}",
                    file.display(),
                    report.records,
                    or_never(report.last_at.as_ref())
                );
                println!("  head {}", report.head);
                println!("  The keyring is in it, sealed; the master key is not: keep it elsewhere, too.");
            }
            Self::Verify { file } => {
                let parent = Work::new()?;
                let checked = backup::verify(&file, &parent.0.join("journal"))?;
                println!("{}: whole and unchanged", file.display());
                print_checked(&checked);
            }
            Self::Restore { file, data, accept_loss, yes, dry_run } => {
                let mode = Mode { accept_loss, dry_run };
                return restore(&file, &data.dir()?, mode, yes, &now);
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn restore(file: &Path, data_dir: &Path, mode: Mode, yes: bool, now: &str) -> anyhow::Result<ExitCode> {
    let may_go_on = |plan: &Restoration| {
        print_plan(file, data_dir, plan);
        let asks = !yes && plan.there != There::Nothing && std::io::stdin().is_terminal();
        !asks || confirmed("Restore it?")
    };
    match backup::restore(file, data_dir, mode, now, may_go_on) {
        Ok(Some(plan)) if mode.dry_run => {
            print_plan(file, data_dir, &plan);
            println!("Nothing was changed (--dry-run).");
            Ok(ExitCode::SUCCESS)
        }
        Ok(Some(done)) => {
            admin_key::want_at_start(data_dir).with_context(|| data_dir.display().to_string())?;
            print_done(&done);
            Ok(ExitCode::SUCCESS)
        }
        Ok(None) => {
            println!("Nothing was changed.");
            Ok(Exit::Failed.into())
        }
        Err(BackupError::WouldLose(loss)) => {
            eprintln!("keygate: {} has changes that are not in the backup:", data_dir.display());
            eprint!("{}", lost(&loss));
            eprintln!("Nothing was changed. To restore and lose these changes: --accept-loss");
            Ok(Exit::WouldLose.into())
        }
        Err(error) => Err(error.into()),
    }
}

fn or_never(at: Option<&String>) -> &str {
    at.map_or("never", String::as_str)
}

fn print_checked(backup: &Checked) {
    println!("  created  {}", backup.created_at);
    println!("  records  {}, until {}", backup.records, or_never(backup.last_at.as_ref()));
    println!("  secrets  {}", backup.secrets);
    println!("  head     {}", backup.head);
}

fn print_plan(file: &Path, data_dir: &Path, plan: &Restoration) {
    println!("{}: whole and unchanged", file.display());
    print_checked(&plan.backup);
    let until = or_never(plan.backup.last_at.as_ref());
    match &plan.there {
        There::Nothing => {
            println!(
                "{}: no journal. What was changed after {until} is not in the backup.",
                data_dir.display()
            );
        }
        There::Same => println!("{}: the journal is the backup's already.", data_dir.display()),
        There::Damaged { taken_over } => {
            println!("{}: the journal is damaged.", data_dir.display());
            println!("  taken over   {taken_over} changes after the backup that end keys");
            println!("  lost         all others after {until}");
        }
        There::Other(loss) if loss.is_any() => {
            println!("{}: the journal has changes that are not in the backup.", data_dir.display());
            print!("{}", lost(loss));
        }
        There::Other(loss) => {
            println!("{}: the journal is another one, and nothing of it is lost.", data_dir.display());
            if loss.taken_over > 0 {
                println!("  taken over   {} changes that end keys", loss.taken_over);
            }
        }
    }
}

/// The lost changes and those that are taken over, a line each.
fn lost(loss: &Loss) -> String {
    let (first, last) = (or_never(loss.first_at.as_ref()), or_never(loss.last_at.as_ref()));
    let mut text = format!("  made         {first} to {last}\n");
    for (action, number) in &loss.changes {
        text.push_str(&format!("  {number:<12} {action}\n"));
    }
    text.push_str(&format!("  taken over   {} of them, which end keys\n", loss.taken_over));
    text
}

fn print_done(done: &Restoration) {
    println!("Restored {} records.", done.backup.records);
    if let Some(moved_to) = &done.moved_to {
        println!("  The journal that was there is in {}.", moved_to.display());
    }
    println!(
        "  Start the control plane with the master key of that time. It writes a new admin key to admin.key."
    );
    println!("  Proxies that enforce later changes return what they know of ended keys, then go on.");
}

fn confirmed(question: &str) -> bool {
    print!("{question} [y/N] ");
    let _shown_or_not = std::io::stdout().flush();
    let mut answer = String::new();
    let read = std::io::stdin().read_line(&mut answer);
    read.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes")
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
