//! The operator's subcommands for keys and proxies, and what all subcommands print alike.

use std::io::Read as _;
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::Output;
use super::exit::{Exit, Failure};
use super::server::{self, call};

/// Keys.
#[derive(Debug, Subcommand)]
pub enum Keys {
    /// Issue a key and print it; it is shown this once
    Create {
        /// What people will call it
        #[arg(long)]
        name: String,
        /// Its role
        #[arg(long)]
        role: String,
        /// A scope it shall have, of those of its role; may be given again [default: all of them]
        #[arg(long = "scope")]
        scopes: Vec<String>,
        /// Whose it is, an opaque id
        #[arg(long)]
        owner: Option<String>,
        /// How long it lives, such as 24h [default: as long as its role allows]
        #[arg(long)]
        expires_in: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// List keys
    List {
        /// Only keys of this role
        #[arg(long)]
        role: Option<String>,
        /// Only keys of this owner
        #[arg(long)]
        owner: Option<String>,
        /// Only active, suspended, revoked or expired keys
        #[arg(long)]
        state: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Show a key
    Show {
        /// The key's id (key_…)
        id: String,
    },
    /// Revoke a key, for good
    Revoke {
        /// The key's id (key_…)
        id: String,
        /// compromised, expired, user_request, admin_action, suspicious_activity, rotation or emergency
        #[arg(long, default_value = "admin_action")]
        reason: String,
        /// Also revoke the keys that renewed it [default: if the reason is compromised]
        #[arg(long)]
        with_successors: Option<bool>,
        #[command(flatten)]
        wait: Wait,
    },
    /// Suspend a key until it is resumed
    Suspend {
        /// The key's id (key_…)
        id: String,
        /// Why, for others to read
        #[arg(long)]
        reason: Option<String>,
        #[command(flatten)]
        wait: Wait,
    },
    /// End a suspension
    Resume {
        /// The key's id (key_…)
        id: String,
        #[command(flatten)]
        wait: Wait,
    },
}

/// Whether to wait for the proxies.
#[derive(Debug, Args)]
pub struct Wait {
    /// Wait until every proxy enforces it; exit with 3 if one does not in time, with 6 if there is none
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5s")]
    timeout: String,
    #[command(flatten)]
    pub output: Output,
}

impl Wait {
    /// What asks the API to wait.
    pub fn query(&self) -> Vec<(&'static str, String)> {
        if self.wait {
            vec![("wait", "applied".to_owned()), ("timeout", self.timeout.clone())]
        } else {
            Vec::new()
        }
    }

    /// Whether what was answered is in force, as far as that was asked for.
    pub fn code(&self, answer: &Value) -> ExitCode {
        if answer.get("approval").is_some_and(|approval| !approval.is_null()) {
            Exit::WaitsForApproval.into()
        } else if missing(answer) {
            Exit::NotInForce.into()
        } else if answer["propagation"]["total"] == 0 {
            Exit::NoProxy.into()
        } else {
            ExitCode::SUCCESS
        }
    }
}

fn missing(answer: &Value) -> bool {
    answer["propagation"]["missing"].as_array().is_some_and(|missing| !missing.is_empty())
}

/// Says how far a change has got, if that was asked for.
pub fn print_propagation(answer: &Value) {
    let Some(propagation) = answer.get("propagation") else { return };
    if propagation["total"] == 0 {
        println!(
            "no proxy is connected to {}, so nothing enforces it yet; see 'keygate fleet'",
            server::name()
        );
        return;
    }
    println!(
        "enforced by {} of {} proxies, the slowest after {} ms",
        propagation["applied"], propagation["total"], propagation["max_lag_ms"],
    );
    if missing(answer) {
        println!("not yet by: {}", words(&propagation["missing"]));
    }
}

/// A question about a decision.
#[derive(Debug, Args)]
pub struct Explain {
    /// The request's method
    #[arg(long, default_value = "GET")]
    method: String,
    /// The request's path
    path: String,
    /// Ask without a key
    #[arg(long)]
    no_key: bool,
    #[command(flatten)]
    output: Output,
}

impl Keys {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Create { name, role, scopes, owner, expires_in, output } => {
                let mut body = json!({ "name": name, "role": role });
                if !scopes.is_empty() {
                    body["scopes"] = json!(scopes);
                }
                if let Some(owner) = owner {
                    body["owner"] = owner.into();
                }
                if let Some(life) = expires_in {
                    body["expires_in"] = life.into();
                }
                let key = call("POST", "/api/auth/register", &[], Some(&body))?;
                if output.json {
                    print_json(&key);
                } else {
                    // The key alone on standard output: for KEY=$(keygate keys create …).
                    println!("{}", text(&key, "api_key"));
                    eprintln!(
                        "{} ({}: {}), until {}. The key is not shown again.",
                        text(&key, "key_id"),
                        text(&key, "role"),
                        words(&key["scopes"]),
                        text(&key, "expires_at"),
                    );
                }
            }
            Self::List { role, owner, state, output } => {
                list(&[("role", role), ("owner", owner), ("state", state)], &output)?
            }
            Self::Show { id } => {
                print_json(&call("GET", &format!("/api/admin/keys/{}", segment(&id)?), &[], None)?)
            }
            Self::Revoke { id, reason, with_successors, wait } => {
                let body = json!({ "reason": reason, "with_successors": with_successors });
                return change(&id, "revoke", &body, &wait);
            }
            Self::Suspend { id, reason, wait } => {
                let body = reason.map_or(json!({}), |reason| json!({ "reason": reason }));
                return change(&id, "suspend", &body, &wait);
            }
            Self::Resume { id, wait } => return change(&id, "resume", &json!({}), &wait),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn list(filters: &[(&'static str, Option<String>)], output: &Output) -> anyhow::Result<()> {
    let mut cursor: Option<String> = None;
    if !output.json {
        println!("{:<27} {:<10} {:<14} {:<21} NAME", "KEY", "STATE", "ROLE", "EXPIRES");
    }
    loop {
        let mut query: Vec<(&str, String)> =
            filters.iter().filter_map(|(name, value)| Some((*name, value.clone()?))).collect();
        if let Some(cursor) = cursor {
            query.push(("cursor", cursor));
        }
        let page = call("GET", "/api/admin/keys", &query, None)?;
        for key in page["keys"].as_array().into_iter().flatten() {
            if output.json {
                println!("{key}");
            } else {
                println!(
                    "{:<27} {:<10} {:<14} {:<21} {}",
                    text(key, "key_id"),
                    text(key, "state"),
                    text(key, "role"),
                    text(key, "expires_at"),
                    text(key, "name"),
                );
            }
        }
        cursor = page["next_cursor"].as_str().map(Into::into);
        if cursor.is_none() {
            return Ok(());
        }
    }
}

fn change(id: &str, verb: &str, body: &Value, wait: &Wait) -> anyhow::Result<ExitCode> {
    let key = call("POST", &format!("/api/admin/keys/{}/{verb}", segment(id)?), &wait.query(), Some(body))?;
    if wait.output.json {
        print_json(&key);
    } else {
        let already = if key["changed"] == true { "" } else { " already" };
        println!(
            "{} is{already} {} (version {})",
            text(&key, "key_id"),
            text(&key, "state"),
            text(&key, "version")
        );
        for successor in key["successors"].as_array().into_iter().flatten() {
            println!("{}, which renewed it, is {}", text(successor, "key_id"), text(successor, "state"));
        }
        print_propagation(&key);
    }
    Ok(wait.code(&key))
}

/// The proxies.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Fleet {
    #[command(subcommand)]
    command: Option<OneProxy>,
    #[command(flatten)]
    output: Output,
}

/// What there is to do with one of them.
#[derive(Debug, Subcommand)]
enum OneProxy {
    /// Have a proxy that is about to end give back what it has of limits; exit with 3 if it has not in time
    ///
    /// It answers 503 to limited keys from then on, so let it get no more requests before. A new process of it is like any
    /// other. One that ends without this takes its share of every limit along: for the hard age, or an hour where there are
    /// several control planes, and the longest window.
    Drain {
        /// Its node id, as 'keygate fleet' shows it
        proxy: String,
        #[command(flatten)]
        output: Output,
    },
}

impl Fleet {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let Some(OneProxy::Drain { proxy, output }) = self.command else { return fleet(&self.output) };
        let answer = call("POST", "/api/admin/fleet/drain", &[], Some(&json!({ "proxy": proxy })))?;
        let drained = answer["drained"] == true;
        if output.json {
            print_json(&answer);
        } else if drained {
            println!("{proxy} has given back what it did not spend");
        } else {
            println!(
                "{proxy} has not said yet what it spent; is it there? Ask again: keygate fleet drain {proxy}"
            );
        }
        Ok(if drained { ExitCode::SUCCESS } else { Exit::NotInForce.into() })
    }
}

/// Prints the proxies.
fn fleet(output: &Output) -> anyhow::Result<ExitCode> {
    let fleet = call("GET", "/api/admin/fleet", &[], None)?;
    if output.json {
        print_json(&fleet);
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "version {}, enforced by {} of {} proxies",
        text(&fleet, "version"),
        fleet["current"],
        fleet["total"]
    );
    println!("{:<24} {:<9} {:<22} {:>7} {:>4}  LAST SEEN", "PROXY", "STATE", "VERSION", "LAG ms", "VMs");
    for proxy in fleet["proxies"].as_array().into_iter().flatten() {
        let states = ["drained", "stale", "ahead", "current"];
        let state = states.into_iter().find(|state| proxy[*state] == true).unwrap_or("behind");
        println!(
            "{:<24} {state:<9} {:<22} {:>7} {:>4}  {}",
            text(proxy, "id"),
            text(proxy, "version"),
            text(proxy, "lag_ms"),
            text(proxy, "workers"),
            text(proxy, "last_seen"),
        );
    }
    Ok(ExitCode::SUCCESS)
}

impl Explain {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        let mut body = json!({ "method": self.method, "path": self.path });
        if !self.no_key {
            let token = match std::env::var("KEYGATE_KEY") {
                Ok(token) => token,
                Err(_) => {
                    let mut token = String::new();
                    std::io::stdin().read_to_string(&mut token)?;
                    token
                }
            };
            body["token"] = token.trim().into();
        }
        let answer = call("POST", "/api/admin/explain", &[], Some(&body))?;
        if self.output.json {
            print_json(&answer);
            return Ok(ExitCode::SUCCESS);
        }
        for step in answer["steps"].as_array().into_iter().flatten() {
            println!("{:<12} {}", text(step, "step"), text(step, "detail"));
        }
        let status =
            answer["status"].as_u64().map(|status| format!(" with {status} {}", text(&answer, "code")));
        println!(
            "=> {}{}: {}",
            text(&answer, "decision"),
            status.unwrap_or_default(),
            text(&answer, "reason")
        );
        Ok(ExitCode::SUCCESS)
    }
}

/// An id as a segment of a path.
pub fn segment(id: &str) -> anyhow::Result<&str> {
    if id.is_empty() || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-') {
        return Err(Failure::error(
            Exit::Usage,
            "that is no id; see 'keygate keys list' and 'keygate emergency show'",
        ));
    }
    Ok(id)
}

pub fn text(value: &Value, member: &str) -> String {
    match &value[member] {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

pub fn words(list: &Value) -> String {
    list.as_array().into_iter().flatten().filter_map(Value::as_str).collect::<Vec<_>>().join(" ")
}

/// How many keys of each role.
pub fn by_role(counts: &Value) -> String {
    let counts = counts.as_object().into_iter().flatten();
    let listed: Vec<String> = counts.map(|(role, count)| format!("{role} {count}")).collect();
    if listed.is_empty() { "none".into() } else { listed.join(", ") }
}

pub fn print_json(value: &Value) {
    println!("{value:#}");
}
