//! `keygate emergency` and `keygate revocations`: ending many keys, and what was ended.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Output;
use super::client::{Wait, by_role, call, print_json, print_propagation, segment, text};
use super::exit::{Exit, Failure};

const REVOKE: &str = "/api/admin/emergency/revoke";
const LOCKDOWN: &str = "/api/admin/emergency/lockdown";
const APPROVALS: &str = "/api/admin/emergency/approvals";
const REVOCATIONS: &str = "/api/admin/revocations";

/// Measures against many keys at once.
#[derive(Debug, Subcommand)]
pub enum Emergency {
    /// Show what is in force, and what waits for a second approval
    Show,
    /// End every key of a scope with one rule, on every proxy at once; your own key is spared
    Revoke(CutOff),
    /// Approve a rule that another key asked for
    Approve {
        /// The id that its request answered (cutoff_…)
        id: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Take a request for an approval back
    Withdraw {
        /// Its id (cutoff_…)
        id: String,
    },
    /// Lift a rule; the keys that it ended count again, unless they were revoked by themselves
    Lift {
        /// Its id (cutoff_…)
        id: String,
        #[command(flatten)]
        wait: Wait,
    },
    /// Refuse every key but those of exempt roles, for a time
    Lockdown {
        /// For how long
        #[arg(long, default_value = "1h")]
        ttl: String,
        /// A role whose keys go on; may be given again [default: admin]
        #[arg(long = "exempt")]
        exempt: Vec<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// End the lockdown before its time
    Unlock {
        #[command(flatten)]
        wait: Wait,
    },
}

/// A rule that ends keys.
#[derive(Debug, Args)]
pub struct CutOff {
    /// All keys
    #[arg(long, conflicts_with_all = ["role", "owner", "kid"])]
    all: bool,
    /// Keys of this role
    #[arg(long)]
    role: Option<String>,
    /// Keys of this owner
    #[arg(long)]
    owner: Option<String>,
    /// Keys signed with this secret
    #[arg(long)]
    kid: Option<String>,
    /// Keys issued before this time, such as 2026-01-01T00:00:00Z [default: now]
    #[arg(long)]
    created_before: Option<String>,
    /// Keys issued at this time or later
    #[arg(long)]
    created_after: Option<String>,
    /// compromised, user_request, admin_action, suspicious_activity or emergency
    #[arg(long, default_value = "emergency")]
    reason: String,
    /// Only count the keys
    #[arg(long)]
    dry_run: bool,
    /// Do without a second approval where one is needed, and say why; it is logged loudly
    #[arg(long, value_name = "WHY")]
    break_glass: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

impl CutOff {
    fn run(self) -> anyhow::Result<ExitCode> {
        let mut scope = json!({});
        let members = [
            ("role", self.role),
            ("owner", self.owner),
            ("kid", self.kid),
            ("created_before", self.created_before),
            ("created_after", self.created_after),
        ];
        for (name, value) in members {
            if let Some(value) = value {
                scope[name] = value.into();
            }
        }
        let narrowed = ["role", "owner", "kid"].iter().any(|name| scope.get(*name).is_some());
        if !narrowed && !self.all {
            let problem = "say which keys: --role, --owner, --kid, or --all for all of them";
            return Err(Failure::error(Exit::Usage, problem));
        }
        let mut body = json!({ "scope": scope, "dry_run": self.dry_run, "reason": self.reason });
        if let Some(why) = self.break_glass {
            body["break_glass"] = why.into();
        }
        let answer = call("POST", REVOKE, &self.wait.query(), Some(&body))?;
        if self.wait.output.json {
            print_json(&answer);
            return Ok(self.wait.code(&answer));
        }
        let id = text(&answer["cutoff"], "id");
        println!("{} keys: {}", answer["keys"], by_role(&answer["by_role"]));
        if self.dry_run {
            let approval =
                if answer["needs_approval"] == true { "; a second approval is needed" } else { "" };
            println!("nothing was changed{approval}");
        } else if let Some(approval) = answer.get("approval") {
            println!(
                "not in force: another admin has to run: keygate emergency approve {}",
                text(approval, "id")
            );
            println!("until {}", text(approval, "expires_at"));
        } else {
            println!("in force as {id} (version {})", text(&answer, "version"));
            println!("to lift it: keygate emergency lift {id}");
        }
        print_propagation(&answer);
        Ok(self.wait.code(&answer))
    }
}

impl Emergency {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Show => {
                print_json(&call("GET", "/api/admin/emergency", &[], None)?);
                Ok(ExitCode::SUCCESS)
            }
            Self::Revoke(cutoff) => cutoff.run(),
            Self::Approve { id, wait } => {
                change("POST", &format!("{APPROVALS}/{}", segment(&id)?), None, "in force", &wait)
            }
            Self::Withdraw { id } => {
                call("DELETE", &format!("{APPROVALS}/{}", segment(&id)?), &[], None)?;
                println!("withdrawn");
                Ok(ExitCode::SUCCESS)
            }
            Self::Lift { id, wait } => {
                change("DELETE", &format!("{REVOKE}/{}", segment(&id)?), None, "lifted", &wait)
            }
            Self::Lockdown { ttl, exempt, wait } => {
                let mut body = json!({ "ttl": ttl });
                if !exempt.is_empty() {
                    body["exempt_roles"] = json!(exempt);
                }
                change("POST", LOCKDOWN, Some(&body), "locked down", &wait)
            }
            Self::Unlock { wait } => change("DELETE", LOCKDOWN, None, "unlocked", &wait),
        }
    }
}

/// What was revoked, and the set that proxies hold.
#[derive(Debug, Subcommand)]
pub enum Revocations {
    /// List what was revoked, the last one first
    List {
        /// Only those for this reason
        #[arg(long)]
        reason: Option<String>,
        /// At most so many, up to 1000
        #[arg(long, default_value_t = 100)]
        limit: u16,
        #[command(flatten)]
        output: Output,
    },
    /// How much is revoked, and what that costs a proxy
    Stats,
    /// Forget the revocations of keys that have expired; done by itself every five minutes
    Cleanup {
        #[command(flatten)]
        wait: Wait,
    },
    /// Have every proxy take the whole set over anew
    Rebuild {
        #[command(flatten)]
        wait: Wait,
    },
}

impl Revocations {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::List { reason, limit, output } => {
                let mut query = vec![("limit", limit.to_string())];
                query.extend(reason.map(|reason| ("reason", reason)));
                list(&call("GET", REVOCATIONS, &query, None)?, &output);
                Ok(ExitCode::SUCCESS)
            }
            Self::Stats => {
                print_json(&call("GET", &format!("{REVOCATIONS}/stats"), &[], None)?);
                Ok(ExitCode::SUCCESS)
            }
            Self::Cleanup { wait } => {
                change("POST", &format!("{REVOCATIONS}/cleanup"), None, "cleaned up", &wait)
            }
            Self::Rebuild { wait } => {
                change("POST", &format!("{REVOCATIONS}/rebuild"), None, "rebuilt", &wait)
            }
        }
    }
}

fn list(page: &Value, output: &Output) {
    if !output.json {
        println!("{:<21} {:<27} {:<19} {:<27} BY", "AT", "KEY", "REASON", "TOKEN");
    }
    for revocation in page["revocations"].as_array().into_iter().flatten() {
        if output.json {
            println!("{revocation}");
        } else {
            println!(
                "{:<21} {:<27} {:<19} {:<27} {}",
                text(revocation, "at"),
                text(revocation, "key_id"),
                text(revocation, "reason"),
                text(revocation, "jti"),
                text(revocation, "by"),
            );
        }
    }
}

/// Makes a change and says what became of it.
fn change(
    method: &str,
    path: &str,
    body: Option<&Value>,
    done: &str,
    wait: &Wait,
) -> anyhow::Result<ExitCode> {
    let answer = call(method, path, &wait.query(), body)?;
    if wait.output.json {
        print_json(&answer);
    } else {
        println!("{done} (version {})", text(&answer, "version"));
        if let Some(removed) = answer.get("removed") {
            println!("{removed} forgotten, {} left", answer["remaining"]);
        }
        print_propagation(&answer);
    }
    Ok(wait.code(&answer))
}
