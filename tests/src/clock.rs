//! A wall clock for programs under test that a test moves while they run.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A clock; for as many programs as are started with it. Their monotonic clocks are the machine's.
#[derive(Debug, Clone)]
pub struct Clock {
    library: PathBuf,
    file: PathBuf,
}

impl Clock {
    /// One that goes right, which keeps what it needs in `directory`.
    #[track_caller]
    pub fn new(directory: &Path) -> Self {
        let (library, source) = (directory.join("clock.so"), directory.join("clock.c"));
        fs::write(&source, include_str!("clock.c")).expect("the source");
        // Whoever built this program has one: it linked it.
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .args([&library, &source])
            .output();
        let compiled = compiled.unwrap_or_else(|error| panic!("cc does not start: {error}"));
        assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
        let clock = Self { library, file: directory.join("clock") };
        clock.go_ahead_by(0);
        clock
    }

    /// From now on it is so many seconds ahead of the machine's.
    #[track_caller]
    pub fn go_ahead_by(&self, seconds: i64) {
        // In place: the programs have it mapped.
        let file = fs::File::options().write(true).create(true).truncate(false).open(&self.file);
        let write = |file| std::os::unix::fs::FileExt::write_all_at(&file, &seconds.to_ne_bytes(), 0);
        file.and_then(write).expect("the clock");
    }

    /// Has a program that is to be started go by it.
    pub fn give_to(&self, command: &mut Command) {
        command.env("LD_PRELOAD", &self.library).env("E2E_CLOCK", &self.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wall_clock_alone_is_moved() {
        let directory = tempfile::tempdir().expect("a directory");
        let clock = Clock::new(directory.path());
        let asked = |ahead: i64| {
            clock.go_ahead_by(ahead);
            let mut date = Command::new("date");
            clock.give_to(date.arg("+%s"));
            let said = String::from_utf8(date.output().expect("date").stdout).expect("text");
            said.trim().parse::<i64>().expect("seconds")
        };
        let now = asked(0);
        assert!((86_400..86_460).contains(&(asked(86_400) - now)));
        assert!((0..60).contains(&(asked(0) - now)));
    }
}
