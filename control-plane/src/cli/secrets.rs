//! `keygate secrets`: the signing secrets and their rotation.

use std::io::Read as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use keygate_core::secret::Secret;
use serde_json::{Value, json};

use super::Output;
use super::client::{by_role, print_json, text, words};
use super::exit::Exit;
use super::server::{call, call_as};

const STATUS: &str = "/api/admin/secrets/status";
const ROTATE: &str = "/api/admin/secrets/rotate";
const FORCE: &str = "/api/admin/secrets/rotate/force";
/// How often it is looked whether a rotation has come to its end.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// Signing secrets.
#[derive(Debug, Subcommand)]
pub enum Secrets {
    /// Show the secrets, what a rotation waits for, and when the next one is due
    Status(Output),
    /// Begin a rotation to a new secret
    Rotate(Rotate),
    /// Begin a rotation to an HS256 secret that was made elsewhere
    ///
    /// Its bytes are read in base64url from KEYGATE_SECRET or standard input.
    Import(Rotate),
    /// End a rotation whose secret has not signed yet
    Cancel(Output),
    /// Have the new secret sign without waiting for proxies that do not know it; they refuse its keys until they do
    Force {
        /// Why, for the journal
        #[arg(long, value_name = "WHY")]
        justification: String,
        #[command(flatten)]
        output: Output,
    },
}

/// A rotation.
#[derive(Debug, Args)]
pub struct Rotate {
    /// Why, for the journal
    #[arg(long, default_value = "unspecified")]
    reason: String,
    /// End the secret that signs now, with every key that it signed, at once
    #[arg(long)]
    immediate: bool,
    /// Go over to ES256, EdDSA or HS256
    #[arg(long)]
    algorithm: Option<String>,
    /// Only count the keys that would end before their time
    #[arg(long)]
    dry_run: bool,
    /// How long proxies may take to know the new secret before it counts as a failure
    #[arg(long, value_name = "DURATION")]
    propagation_timeout: Option<String>,
    /// Wait until the new secret signs; exit with 3 if it does not in time
    #[arg(long)]
    wait: bool,
    /// How long to wait
    #[arg(long, default_value = "5m")]
    timeout: String,
    #[command(flatten)]
    output: Output,
}

impl Secrets {
    pub fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Status(output) => status(&output),
            Self::Rotate(rotate) => rotate.run(None),
            Self::Import(rotate) => {
                let secret = read_secret()?;
                rotate.run(Some(secret))
            }
            Self::Cancel(output) => {
                let answer = call("DELETE", ROTATE, &[], None)?;
                if output.json {
                    print_json(&answer);
                } else {
                    println!("cancelled: {} signs nothing", text(&answer, "version_id"));
                }
                Ok(ExitCode::SUCCESS)
            }
            Self::Force { justification, output } => {
                let answer = call("POST", FORCE, &[], Some(&json!({ "justification": justification })))?;
                if output.json {
                    print_json(&answer);
                } else {
                    println!("{} signs", text(&answer, "version_id"));
                    println!("not known to: {}", words(&answer["without"]));
                }
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

fn read_secret() -> anyhow::Result<Secret<String>> {
    if let Some(secret) = std::env::var("KEYGATE_SECRET").ok().filter(|text| !text.is_empty()) {
        return Ok(Secret::new(secret));
    }
    let mut secret = Secret::new(String::new());
    std::io::stdin().read_to_string(secret.expose_mut()).context("the secret, from standard input")?;
    Ok(secret)
}

fn status(output: &Output) -> anyhow::Result<ExitCode> {
    let answer = call("GET", STATUS, &[], None)?;
    if output.json {
        print_json(&answer);
        return Ok(ExitCode::SUCCESS);
    }
    println!("{:<32} {:<9} {:<6} {:<21} {:<21} REASON", "SECRET", "STATE", "ALG", "SINCE", "ENDS");
    for secret in answer["versions"].as_array().into_iter().flatten() {
        println!(
            "{:<32} {:<9} {:<6} {:<21} {:<21} {}{}",
            text(secret, "version_id"),
            text(secret, "state"),
            text(secret, "alg"),
            text(secret, "since"),
            text(secret, "ends_at"),
            text(secret, "reason"),
            if secret["open"] == false { "  (cannot be opened here)" } else { "" },
        );
    }
    if let Some(waiting) = answer["rotation"].as_object().and_then(|rotation| rotation.get("waiting_for")) {
        println!("the rotation waits for: {}", names(waiting));
    }
    if answer["rotation"]["state"] == "active" {
        println!("no key can be issued until then");
    }
    if answer["rotation"]["stalled"] == true {
        println!("that takes too long; see 'keygate fleet', then wait, or keygate secrets force or cancel");
    }
    if !answer["failure"].is_null() {
        println!("the last step failed: {}", text(&answer, "failure"));
    }
    println!("next rotation: {}", text(&answer, "next_rotation"));
    Ok(ExitCode::SUCCESS)
}

fn names(list: &Value) -> String {
    let names: Vec<&str> = list.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    if names.is_empty() { "nobody".into() } else { names.join(", ") }
}

impl Rotate {
    fn run(self, secret: Option<Secret<String>>) -> anyhow::Result<ExitCode> {
        let timeout = humantime::parse_duration(&self.timeout).context("--timeout")?;
        let mut body = json!({ "reason": self.reason, "immediate": self.immediate, "dry_run": self.dry_run });
        if let Some(algorithm) = &self.algorithm {
            body["algorithm"] = algorithm.as_str().into();
        }
        if let Some(propagation_timeout) = &self.propagation_timeout {
            body["propagation_timeout"] = propagation_timeout.as_str().into();
        }
        if let Some(secret) = &secret {
            body["secret"] = secret.expose().trim().into();
        }
        let answer = call("POST", ROTATE, &[], Some(&body))?;
        let kid = text(&answer, "version_id");
        // Who ended the secret of their own key goes on with the one that came for it.
        if self.output.json {
            print_json(&answer);
        } else {
            let ends = &answer["ends"];
            let when = match ends["at"].as_str() {
                Some(at) => format!("at {at}"),
                None => "each at its own time".into(),
            };
            eprintln!(
                "keys that end before their time: {} ({}), {when}",
                ends["keys"],
                by_role(&ends["by_role"])
            );
            if self.dry_run {
                eprintln!("nothing was changed");
                return Ok(ExitCode::SUCCESS);
            }
            eprintln!("{kid} is {}", text(&answer, "state"));
            if let Some(key) = answer["api_key"].as_str() {
                eprintln!("your own key has ended with the secret; this one takes its place:");
                println!("{key}");
            }
        }
        if self.dry_run || !self.wait {
            return Ok(ExitCode::SUCCESS);
        }
        let key = answer["api_key"].as_str();
        let deadline = Instant::now() + timeout;
        let mut said = String::new();
        loop {
            let status = match key {
                Some(key) => call_as(key, "GET", STATUS, &[], None)?,
                None => call("GET", STATUS, &[], None)?,
            };
            // After an immediate rotation it is active at once, and signs when every proxy knows it.
            let is_under_way = status["rotation"]["version_id"] == kid.as_str();
            if status["active"]["version_id"] == kid.as_str() && !is_under_way {
                eprintln!("{kid} signs");
                return Ok(ExitCode::SUCCESS);
            }
            if !is_under_way {
                anyhow::bail!("the rotation to {kid} was cancelled");
            }
            let waiting = &status["rotation"]["waiting_for"];
            let waits = names(waiting);
            if waits != said && waiting != &json!([]) {
                eprintln!("waiting for: {waits}");
                said = waits;
            }
            if Instant::now() >= deadline {
                eprintln!("it does not sign yet, so no key can be issued with it; the rotation continues");
                return Ok(Exit::NotInForce.into());
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }
}
