//! `keygate rollout`: which requests go to V1 and which to V2.

use std::process::ExitCode;

use clap::{Args, Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Output;
use super::client::{Wait, print_json, print_propagation, text, words};
use super::exit::{Exit, Failure};
use super::server::call;

const FLAGS: &str = "/api/admin/feature_flags";

/// The rollout from V1 to V2.
#[derive(Debug, Subcommand)]
pub enum Rollout {
    /// Show how it stands, what comes next, and who changed it last
    Status(Output),
    /// Change what is named; all else stays as it is
    Set(Set),
    /// Send everybody back to V1; canary users and percentage are kept for later
    Off(Because),
    /// Hold the share of strategy gradual where it is
    Pause(Because),
    /// Have a share that is held grow on from there
    Resume(Because),
    /// List the changes, the last one first
    History(Output),
    /// Count requests, errors and refusals by version and route
    Metrics(Output),
}

/// A strategy, as it is typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Strategy {
    Off,
    Canary,
    Percentage,
    Gradual,
    Full,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Switch {
    On,
    Off,
}

/// What may be changed.
#[derive(Debug, Args)]
pub struct Set {
    /// Who goes to V2: nobody, canary users, those and a fixed share of all others, those and a growing one, everybody
    #[arg(long)]
    strategy: Option<Strategy>,
    /// The share of strategy percentage, 0 to 100 with at most two decimals
    #[arg(long)]
    percentage: Option<f64>,
    /// An owner or key id that goes to V2 before others; may be given again, and replaces the list; empty for nobody
    #[arg(long = "canary-user", value_name = "OWNER|KEY_ID")]
    canary_users: Vec<String>,
    /// A path, with all below it, or a route's name that is migrated; may be given again, and replaces the list; empty
    /// for all of them
    #[arg(long = "endpoint", value_name = "PATH|ROUTE")]
    endpoints: Vec<String>,
    /// Have strategy gradual go by 5, 25, 50 and 100 %, a week each
    #[arg(long, conflicts_with = "ramp_hours")]
    weekly: bool,
    /// Have strategy gradual grow evenly within so many hours
    #[arg(long, value_name = "HOURS")]
    ramp_hours: Option<f64>,
    /// Whether it is rolled back by itself when V2 does worse than V1
    #[arg(long)]
    guard: Option<Switch>,
    /// Whether a credential that is no key of Keygate is refused, rather than sent to V1
    #[arg(long, value_name = "true|false")]
    v1_retired: Option<bool>,
    #[command(flatten)]
    because: Because,
}

/// Why, and whether to wait.
#[derive(Debug, Args)]
pub struct Because {
    /// Why, for the journal and whoever looks later
    #[arg(long)]
    reason: Option<String>,
    #[command(flatten)]
    wait: Wait,
}

impl Rollout {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Status(output) => {
                let flags = call("GET", FLAGS, &[], None)?;
                if output.json {
                    print_json(&flags);
                } else {
                    print(&flags);
                }
                Ok(ExitCode::SUCCESS)
            }
            Self::Set(set) => set.run(),
            Self::Off(because) => because.put(json!({ "strategy": "off" })),
            Self::Pause(because) => because.put(json!({ "paused": true })),
            Self::Resume(because) => because.put(json!({ "paused": false })),
            Self::History(output) => history(&output),
            Self::Metrics(output) => metrics(&output),
        }
    }
}

impl Set {
    fn run(self) -> anyhow::Result<ExitCode> {
        let mut document = json!({});
        if let Some(strategy) = self.strategy.and_then(|strategy| strategy.to_possible_value()) {
            document["strategy"] = strategy.get_name().into();
        }
        if let Some(percentage) = self.percentage {
            document["percentage"] = percentage.into();
        }
        for (member, listed) in [("canary_users", self.canary_users), ("enabled_endpoints", self.endpoints)] {
            if !listed.is_empty() {
                document[member] = listed.into_iter().filter(|one| !one.is_empty()).collect();
            }
        }
        if self.weekly {
            document["steps"] = "weekly".into();
        }
        if let Some(hours) = self.ramp_hours {
            document["ramp_duration_hours"] = hours.into();
        }
        if let Some(guard) = self.guard {
            document["guard"] = matches!(guard, Switch::On).into();
        }
        if let Some(retired) = self.v1_retired {
            document["v1_retired"] = retired.into();
        }
        if document == json!({}) {
            return Err(Failure::error(Exit::Usage, "say what to change; see keygate rollout set --help"));
        }
        self.because.put(document)
    }
}

impl Because {
    fn put(self, mut document: Value) -> anyhow::Result<ExitCode> {
        if let Some(reason) = self.reason {
            document["reason"] = reason.into();
        }
        let answer = call("PUT", FLAGS, &self.wait.query(), Some(&document))?;
        if self.wait.output.json {
            print_json(&answer);
        } else {
            print(&answer);
            print_propagation(&answer);
        }
        Ok(self.wait.code(&answer))
    }
}

fn print(flags: &Value) {
    let v1 = match (flags["v1_available"] == true, flags["v1_retired"] == true) {
        (false, _) => "  (no V1 is configured: everything goes to V2)",
        (true, true) => "  (V1 is retired)",
        (true, false) => "",
    };
    let paused = if flags["paused"] == true { ", paused" } else { "" };
    println!("strategy      {}{paused}{v1}", text(flags, "strategy"));
    println!("to V2         {} % of all users", text(flags, "effective_percentage"));
    let next = &flags["next_step"];
    if !next.is_null() {
        println!("next          {} % at {}", text(next, "percentage"), text(next, "at"));
    }
    for (label, member) in [("canary users", "canary_users"), ("endpoints", "enabled_endpoints")] {
        if flags[member].as_array().is_some_and(|listed| !listed.is_empty()) {
            println!("{label:<13} {}", words(&flags[member]));
        }
    }
    for (user, version) in flags["override_users"].as_object().into_iter().flatten() {
        println!("{:<13} {user} to {}", "fixed", version.as_str().unwrap_or_default());
    }
    println!("guard         {}", if flags["guard"] == true { "on" } else { "off" });
    let last = &flags["last_change"];
    if !last.is_null() {
        println!("last change   {} by {}: {}", text(last, "at"), text(last, "by"), text(last, "reason"));
    }
    let counts = &flags["metrics"];
    println!(
        "requests      {} to V1, {} to V2 ({} %)",
        text(counts, "v1_requests"),
        text(counts, "v2_requests"),
        text(counts, "v2_percentage"),
    );
}

fn history(output: &Output) -> anyhow::Result<ExitCode> {
    let answer = call("GET", &format!("{FLAGS}/history"), &[], None)?;
    if output.json {
        print_json(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<25} {:<11} {:>6}  {:<27} REASON", "AT", "STRATEGY", "TO V2", "BY");
    for change in answer["changes"].as_array().into_iter().flatten() {
        println!(
            "{:<25} {:<11} {:>4} %  {:<27} {}",
            text(change, "at"),
            text(change, "strategy"),
            text(change, "percentage"),
            text(change, "by"),
            text(change, "reason"),
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn metrics(output: &Output) -> anyhow::Result<ExitCode> {
    let counts = call("GET", &format!("{FLAGS}/metrics"), &[], None)?;
    if output.json {
        print_json(&counts);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<7} {:>12} {:>9} {:>10} {:>10}", "VERSION", "REQUESTS", "SHARE", "ERRORS", "REFUSED");
    for version in ["v1", "v2"] {
        let count = |what: &str| text(&counts, &format!("{version}_{what}"));
        println!(
            "{version:<7} {:>12} {:>7} % {:>10} {:>10}",
            count("requests"),
            count("percentage"),
            count("errors"),
            count("refused")
        );
    }
    for row in counts["by_endpoint"].as_array().into_iter().flatten() {
        let counted = row.as_object().into_iter().flatten().filter(|(_, count)| count.is_number());
        let counted: Vec<String> = counted.map(|(what, count)| format!("{what} {count}")).collect();
        println!("  {} {}: {}", text(row, "version"), text(row, "endpoint"), counted.join(", "));
    }
    if !counts["since"].is_null() {
        println!("since {}", text(&counts, "since"));
    }
    Ok(ExitCode::SUCCESS)
}
