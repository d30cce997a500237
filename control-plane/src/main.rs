//! The `keygate` binary: the control plane and the operator's subcommands.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keygate: {error:#}");
            cli::exit::code_of(&error)
        }
    }
}
