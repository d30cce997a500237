//! The benchmarks: `scripts/bench`. Each starts what it measures, prints a table and writes
//! `target/bench/NAME.json`.

mod revocation;

use std::process::ExitCode;

fn main() -> ExitCode {
    match std::env::args().nth(1).as_deref() {
        Some("revocation") => revocation::run(),
        other => {
            eprintln!("error: there is no benchmark {other:?}; there is: revocation");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
