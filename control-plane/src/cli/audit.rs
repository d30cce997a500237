//! `keygate audit`: what was changed, and whether the record of it is whole.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use keygate::durability::journal::{self, Report};
use keygate::secrets::keyring;
use serde_json::Value;

use super::Output;
use super::client::text;
use super::server::call;

/// The audit log.
#[derive(Debug, Subcommand)]
pub enum Audit {
    /// List changes, the last one first: who made them, why, and what was changed from what to what
    List {
        /// Only changes of this type, such as rollout_changed
        #[arg(long)]
        action: Option<String>,
        /// Only what this key did (key_…), or system, redis
        #[arg(long)]
        actor: Option<String>,
        /// Only changes of this key, token, cut-off or secret
        #[arg(long)]
        target: Option<String>,
        /// Not before this time, such as 2026-01-01T00:00:00Z
        #[arg(long)]
        since: Option<String>,
        /// At most so many, up to 1000
        #[arg(long, default_value_t = 20)]
        limit: u16,
        #[command(flatten)]
        output: Output,
    },
    /// Check that a journal is whole and unchanged; needs no server and changes nothing
    ///
    /// Reads every record, and checks the chain of hashes and the signed checkpoints. Says the first record that is
    /// not what was written, with its file and line, and ends with status 1.
    Verify {
        /// The data directory, or the journal's directory in it or in a backup
        dir: PathBuf,
        /// The public key that must have signed the checkpoints, as GET /api/admin/audit/verify shows it (signed_by)
        /// [default: the one that the keyring of the directory names]
        // In base64url one key in 64 begins with a hyphen.
        #[arg(long, allow_hyphen_values = true)]
        key: Option<String>,
        /// The head that a former verification showed: one of the records must have this hash. So records that were cut off
        /// or rewritten since are found, whoever signed them
        #[arg(long, value_name = "HEAD")]
        expect: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Audit {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let (dir, key, expect, json) = match self {
            Self::Verify { dir, key, expect, json } => (dir, key, expect, json),
            Self::List { action, actor, target, since, limit, output } => {
                let filters = [("action", action), ("actor", actor), ("target", target), ("since", since)];
                let mut query = vec![("limit", limit.to_string())];
                query.extend(filters.into_iter().filter_map(|(name, value)| Some((name, value?))));
                list(&call("GET", "/api/admin/audit", &query, None)?, &output);
                return Ok(ExitCode::SUCCESS);
            }
        };
        let dir = if dir.join(journal::DIRECTORY).is_dir() { dir.join(journal::DIRECTORY) } else { dir };
        let of_keyring = || dir.parent().map_or(Ok(None), keyring::checkpoint_key);
        let key = match key {
            Some(key) => Some(key),
            None => of_keyring()?,
        };
        let report = journal::verify(&dir, key.as_deref())?;
        if report.records == 0 {
            anyhow::bail!("{}: there is no journal here", dir.display());
        }
        if let Some(head) = expect.filter(|head| *head != report.head)
            && !journal::contains(&dir, &head)?
        {
            anyhow::bail!(
                "{}: no record has the hash {head}: records were cut off or rewritten since, or it is another journal{}",
                dir.display(),
                if report.removed > 0 { ", or that record was removed for its age" } else { "" }
            );
        }
        if json {
            println!("{}", serde_json::to_string_pretty(&report)?);
        } else {
            print(&dir, &report, key.is_some());
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(page: &Value, output: &Output) {
    for record in page["records"].as_array().into_iter().flatten() {
        if output.json {
            println!("{record}");
            continue;
        }
        let refused = if record["outcome"] == "refused" { " REFUSED" } else { "" };
        println!(
            "{}  {}{refused}  {}  by {}",
            text(record, "at"),
            text(record, "action"),
            text(record, "target"),
            text(record, "actor")
        );
        if let Some(reason) = record["reason"].as_str() {
            println!("  reason: {reason}");
        }
        match record["changes"].as_array() {
            Some(changes) => {
                for change in changes {
                    println!("  {}: {} -> {}", text(change, "member"), change["from"], change["to"]);
                }
            }
            None => print_members(&record["detail"]),
        }
        if !record["undone"].is_null() {
            println!("  undone:");
            print_members(&record["undone"]);
        }
    }
}

/// Prints what a change says, without what it does not say.
fn print_members(detail: &Value) {
    for (name, value) in detail.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        println!("  {name}: {value}");
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
