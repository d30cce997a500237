//! The benchmarks: `scripts/bench`. Each starts what it measures, prints a table and writes
//! `target/bench/NAME.json`.

mod durability;
mod estimate;
mod filter;
mod quota;
mod revocation;
mod rotation;

use std::process::ExitCode;

use serde_json::Value;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("durability") => durability::run(),
        Some("filter") => filter::run(),
        // What `filter` starts beside itself.
        Some(filter::server::COMMAND) => filter::server::run(),
        Some(filter::awake::COMMAND) => filter::awake::run(),
        Some("profile") => filter::profile::run(),
        Some("quota") => quota::run(),
        Some("revocation") => revocation::run(),
        Some("rotation") => rotation::run(),
        other => {
            eprintln!(
                "error: there is no benchmark {other:?}; there are: durability, filter, profile, quota, revocation, rotation"
            );
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn write(name: &str, figures: &Value) {
    write_text(&format!("{name}.json"), &format!("{figures:#}\n"));
}

fn write_text(name: &str, text: &str) {
    let directory = keygate_e2e::binaries::root().join("target/bench");
    std::fs::create_dir_all(&directory).expect("a directory for figures");
    let file = directory.join(name);
    std::fs::write(&file, text).expect("the figures");
    println!("\nwritten to {}", file.strip_prefix(keygate_e2e::binaries::root()).unwrap_or(&file).display());
}
