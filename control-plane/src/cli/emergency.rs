//! `keygate emergency` and `keygate revocations`: ending many keys, and what was ended.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use keygate::durability::journal::Claim;
use keygate::model::commands::emergency::Lift;
use keygate::services::lift;
use serde_json::{Value, json};

use super::Output;
use super::client::{Wait, by_role, print_json, print_propagation, segment, text, words};
use super::exit::{Exit, Failure};
use super::recovery::Data;
use super::server::call;

const REVOKE: &str = "/api/admin/emergency/revoke";
const LOCKDOWN: &str = "/api/admin/emergency/lockdown";
const APPROVALS: &str = "/api/admin/emergency/approvals";
const REVOCATIONS: &str = "/api/admin/revocations";

/// Measures against many keys at once.
#[derive(Debug, Subcommand)]
pub enum Emergency {
    /// Show what is in force, since when, by whom and until when, and what waits for a second approval
    Show {
        #[command(flatten)]
        output: Output,
    },
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
    Lift(LiftRule),
    /// Refuse every key but those of exempt roles, for a time
    Lockdown {
        /// For how long
        #[arg(long, default_value = "1h")]
        ttl: String,
        /// A role whose keys go on; may be given again [default: admin]
        #[arg(long = "exempt")]
        exempt: Vec<String>,
        /// Refuse also the keys that could end the lockdown before its time
        #[arg(long)]
        lock_out_admins: bool,
        /// Why, for the audit log
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// End the lockdown before its time
    Unlock {
        /// Why, for the audit log
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
}

/// A rule that is to be lifted.
#[derive(Debug, Args)]
pub struct LiftRule {
    /// Its id (cutoff_…); with --offline also "lockdown" or "all"
    id: String,
    /// Why, for the audit log
    #[arg(long)]
    reason: Option<String>,
    /// Needs no key: the control plane of the data directory, which must be stopped, lifts it when it starts again
    #[arg(long, conflicts_with_all = ["reason", "wait"])]
    offline: bool,
    #[command(flatten)]
    data: Data,
    #[command(flatten)]
    wait: Wait,
}

impl LiftRule {
    fn run(self) -> anyhow::Result<ExitCode> {
        let Self { id, reason, offline, data, wait } = self;
        if !offline {
            return change(
                "DELETE",
                &format!("{REVOKE}/{}", segment(&id)?),
                because(reason),
                "lifted",
                &wait,
            );
        }
        let which = match id.as_str() {
            "all" => Lift::All,
            "lockdown" => Lift::Lockdown,
            id => Lift::Cutoff(segment(id)?.to_owned()),
        };
        let dir = data.dir()?;
        let name = || dir.display().to_string();
        // Held until the order is written: a control plane that runs would not see it.
        let _claim = Claim::new(&dir).with_context(name)?;
        lift::want_at_start(&dir, &which).with_context(name)?;
        println!("the control plane lifts it at its next start: keygate serve");
        Ok(ExitCode::SUCCESS)
    }
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
            Self::Show { output } => {
                let emergency = call("GET", "/api/admin/emergency", &[], None)?;
                if output.json {
                    print_json(&emergency);
                } else {
                    show(&emergency);
                }
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
            Self::Lift(rule) => rule.run(),
            Self::Lockdown { ttl, exempt, lock_out_admins, reason, wait } => {
                let mut body = json!({ "ttl": ttl, "lock_out_admins": lock_out_admins });
                if let Some(reason) = reason {
                    body["reason"] = reason.into();
                }
                if !exempt.is_empty() {
                    body["exempt_roles"] = json!(exempt);
                }
                change("POST", LOCKDOWN, Some(body), "locked down", &wait)
            }
            Self::Unlock { reason, wait } => change("DELETE", LOCKDOWN, because(reason), "unlocked", &wait),
        }
    }
}

/// Prints each measure with what ends it.
fn show(emergency: &Value) {
    if emergency["active"] != true && emergency["rate_limits"].is_null() {
        println!("nothing is in force");
    }
    let order = |measure: &Value| {
        println!(
            "  since {} by {}, reason: {}",
            text(measure, "since"),
            text(measure, "by"),
            text(measure, "reason")
        );
    };
    let lockdown = &emergency["lockdown"];
    if !lockdown.is_null() {
        println!("lockdown until {}, but for: {}", text(lockdown, "until"), words(&lockdown["exempt_roles"]));
        order(lockdown);
        println!("  to end it: keygate emergency unlock");
    }
    for cutoff in emergency["cutoffs"].as_array().into_iter().flatten() {
        println!("{} ends {}", text(cutoff, "id"), scope(cutoff));
        order(cutoff);
        for (member, what) in [
            ("requested_by", "asked for by"),
            ("approved_by", "approved by"),
            ("break_glass", "without a second approval:"),
        ] {
            if let Some(text) = cutoff[member].as_str() {
                println!("  {what} {text}");
            }
        }
        println!("  until it is lifted: keygate emergency lift {}", text(cutoff, "id"));
    }
    let limits = &emergency["rate_limits"];
    if !limits.is_null() {
        println!("rate limits overridden until {}: {}", text(limits, "until"), limits["limits"]);
        order(limits);
        println!("  to end it: curl -X DELETE …/api/admin/rate_limits/emergency");
    }
    for waiting in emergency["approvals"].as_array().into_iter().flatten() {
        let approval = &waiting["approval"];
        println!(
            "{} would end {} keys, {}",
            text(approval, "id"),
            waiting["keys"],
            scope(&waiting["cutoff"])
        );
        println!("  asked for by {}, until {}", text(approval, "requested_by"), text(approval, "expires_at"));
        println!("  another admin: keygate emergency approve {}", text(approval, "id"));
    }
}

/// The keys that a cut-off ends.
fn scope(cutoff: &Value) -> String {
    let of = |member: &str| cutoff[member].as_str().map(|value| format!("{member} {value}"));
    let narrowed: Vec<String> = ["role", "owner", "kid"].into_iter().filter_map(of).collect();
    let keys =
        if narrowed.is_empty() { "all keys".to_owned() } else { format!("keys of {}", narrowed.join(", ")) };
    let after = cutoff["created_after"].as_str().map(|time| format!(" at or after {time} and"));
    format!("{keys} issued{} before {}", after.unwrap_or_default(), text(cutoff, "created_before"))
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

/// The body of a change that has nothing but a reason.
fn because(reason: Option<String>) -> Option<Value> {
    reason.map(|reason| json!({ "reason": reason }))
}

/// Makes a change and says what became of it.
fn change(
    method: &str,
    path: &str,
    body: Option<Value>,
    done: &str,
    wait: &Wait,
) -> anyhow::Result<ExitCode> {
    let answer = call(method, path, &wait.query(), body.as_ref())?;
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
