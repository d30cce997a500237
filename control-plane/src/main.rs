//! The `keygate` binary: the control plane and the operator's subcommands.

mod cli;

use std::process::ExitCode;

fn main() -> ExitCode {
    match cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("keygate: {}", cli::print::printable(&once(&error)));
            cli::exit::code_of(&error)
        }
    }
}

/// An error with its causes; some errors have the text of their cause in their own already.
fn once(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    #[test]
    fn nothing_is_said_twice() {
        let cause = || anyhow!("no such file");
        assert_eq!(super::once(&cause()), "no such file");
        assert_eq!(super::once(&cause().context("a.toml")), "a.toml: no such file");
        assert_eq!(super::once(&cause().context("a.toml: no such file")), "a.toml: no such file");
        let deep = Err::<(), _>(cause()).context("b").context("c: b").unwrap_err();
        assert_eq!(super::once(&deep), "c: b: no such file");
    }
}
