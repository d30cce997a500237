//! `keygate audit`: reading a journal without a server.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use keygate::durability::journal::{self, Report};

/// The audit log.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// Check that a journal is whole and unchanged; needs no server and changes nothing
    ///
    /// Reads every record, and checks the chain of hashes and the signed checkpoints. Says the first record that is
    /// not what was written, with its file and line, and ends with status 1.
    Verify {
        /// The data directory, or the journal's directory in it or in a backup
        dir: PathBuf,
        /// The public key that must have signed the checkpoints, as GET /api/admin/audit/verify shows it (signed_by)
        // In base64url one key in 64 begins with a hyphen.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Audit {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Self::Verify { dir, key, json } = self;
        let dir = if dir.join(journal::DIRECTORY).is_dir() { dir.join(journal::DIRECTORY) } else { dir };
        let report = journal::verify(&dir, key.as_deref())?;
        if report.records == 0 {
            anyhow::bail!("{}: there is no journal here", dir.display());
        }
        if json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&dir, &report, key.is_some());
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn print(dir: &Path, report: &Report, trusted: bool) {
    let time = |at: &Option<String>| at.clone().unwrap_or_default();
    println!("{}: whole and unchanged", dir.display());
    println!("  records      {} in {} segments", report.records, report.segments);
    if report.removed > 0 {
        println!(
            "  removed      {} of them, for their age; what still counts of them is kept",
            report.removed
        );
    }
    println!("  from, to     {}, {}", time(&report.first_at), time(&report.last_at));
    println!("  head         {}", report.head);
    println!("  checkpoints  {}, the last one of record {}", report.checkpoints, report.signed_until);
    for key in &report.signed_by {
        println!("  signed by    {key}");
    }
    if report.torn {
        println!("  The last line is half written, as after a crash; it was never answered.");
    }
    if !trusted {
        println!(
            "  Compare the key with the one you know, or give it as --key: whoever can write these files"
        );
        println!("  could have signed them with a key of their own.");
    }
}
