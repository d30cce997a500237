//! The system calls of a program, as `strace` writes them down: what was asked of the disk, what was told to whom,
//! and in which order.
//!
//! `strace` stops a thread when it enters a call and when it leaves it, and writes that down before the thread goes
//! on. So where one call waits for another of whatever thread, the lines stand in that order.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

use crate::SOON;
use crate::process::Process;
use crate::wait::wait_until;

/// How `strace` is called for [`read`]: every thread, what descriptors are, strings whole but for batches.
pub const STRACE: [&str; 8] = [
    "-f",
    "-yy",
    "-ttt",
    "-s",
    "100000",
    "-e",
    "trace=openat,write,writev,pwrite64,sendto,sendmsg,fsync,fdatasync",
    // The program stays the child of whoever starts this, and stops as it would without.
    "-D",
];

/// One call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// All that stands between its parentheses.
    pub arguments: String,
    /// What it returned.
    pub result: String,
    /// The line at which it was entered.
    pub begun: usize,
    /// The line at which it had returned.
    pub ended: usize,
}

impl Call {
    /// What its first argument is: a path, or the two ends of a connection.
    pub fn target(&self) -> &str {
        // A connection has an arrow in it: 9<TCP:[127.0.0.1:80->127.0.0.1:5000]>
        let Some((_, rest)) = self.arguments.split_once('<') else { return "" };
        let end = rest.find(">, ").or_else(|| rest.strip_suffix('>').map(str::len));
        end.map_or("", |end| &rest[..end])
    }

    /// Whether it is one that returns once what was written is on disk.
    pub fn is_sync(&self) -> bool {
        matches!(self.name.as_str(), "fsync" | "fdatasync")
    }

    /// Whether it sends or writes bytes.
    pub fn is_write(&self) -> bool {
        matches!(self.name.as_str(), "write" | "writev" | "pwrite64" | "sendto" | "sendmsg")
    }

    /// Whether it did what it was for.
    pub fn succeeded(&self) -> bool {
        !self.result.starts_with('-') && !self.result.starts_with('?')
    }
}

/// Panics unless programs can be traced here.
#[track_caller]
pub fn assert_possible() {
    let tried = Command::new("strace").args(["-o", "/dev/null", "true"]).output();
    let tried = tried.unwrap_or_else(|error| panic!("strace does not start ({error}): run scripts/setup"));
    let said = String::from_utf8_lossy(&tried.stderr);
    assert!(
        tried.status.success(),
        "programs cannot be traced here, so it cannot be shown that changes are on disk before they are answered; \
         allow ptrace (in a container: --cap-add SYS_PTRACE): {said}"
    );
}

/// Has a running program killed as one of its threads enters `call` for the `nth` time from now on. Stopped, what is
/// returned lets it live; it ends with the program.
#[track_caller]
pub fn kill_at(process: u32, call: &str, nth: usize, log: &Path) -> Process {
    // What an earlier one said of itself is none of this one's.
    let _ = std::fs::remove_file(log);
    let mut strace = Process::start("strace", Path::new("strace"), log, |command| {
        command.args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}")]);
        command.args(["-e", &format!("inject={call}:signal=KILL:when={nth}"), "-p", &process.to_string()]);
    });
    wait_until(SOON, "strace to attach itself", || {
        strace.assert_runs();
        std::fs::read_to_string(log).is_ok_and(|said| said.contains(" attached"))
    });
    strace
}

/// The calls of a trace, in the order in which they were entered. Those that never returned are left out.
#[track_caller]
pub fn read(file: &Path) -> Vec<Call> {
    let bytes = std::fs::read(file).expect("a trace");
    parse(&String::from_utf8_lossy(&bytes))
}

fn parse(trace: &str) -> Vec<Call> {
    let mut calls = Vec::new();
    let mut unfinished: HashMap<&str, (usize, &str)> = HashMap::new();
    for (number, line) in trace.lines().enumerate() {
        let mut parts = line.trim_start().splitn(2, ' ');
        let (Some(thread), Some(rest)) = (parts.next(), parts.next()) else { continue };
        let Some((_time, text)) = rest.trim_start().split_once(' ') else { continue };
        if let Some(begun) = text.strip_suffix(" <unfinished ...>") {
            unfinished.insert(thread, (number, begun));
        } else if let Some(resumed) = text.strip_prefix("<... ") {
            let Some((_, end)) = resumed.split_once(" resumed>") else { continue };
            let Some((begun, start)) = unfinished.remove(thread) else { continue };
            calls.extend(call(&format!("{start}{end}"), begun, number));
        } else {
            calls.extend(call(text, number, number));
        }
    }
    calls.sort_by_key(|call| call.begun);
    calls
}

fn call(text: &str, begun: usize, ended: usize) -> Option<Call> {
    let (name, rest) = text.split_once('(')?;
    // What is written may hold anything, what is returned holds no quote: so the last one counts.
    let (arguments, result) = rest.rsplit_once(" = ")?;
    let arguments = arguments.trim_end().strip_suffix(')')?;
    let is_name = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_name.then(|| Call {
        name: name.into(),
        arguments: arguments.into(),
        result: result.trim().into(),
        begun,
        ended,
    })
}

/// A change and its answer, as they are known again in a trace.
#[derive(Debug, Clone)]
pub struct Change {
    /// What its record holds, each, in one line of the journal.
    pub record: Vec<String>,
    /// The client's port, of a connection for this change alone.
    pub client_port: u16,
}

/// Whether a change was on disk before a byte of its answer left; else what is wrong. `journal` is the directory of
/// the journal's segments, `api_port` where the answer comes from.
///
/// # Errors
/// What is wrong.
pub fn on_disk_before_answered(
    calls: &[Call],
    journal: &str,
    api_port: u16,
    change: &Change,
) -> Result<(), String> {
    let segment_of = |call: &Call| {
        let path = call.target();
        (path.starts_with(journal) && path.ends_with(".jsonl")).then(|| path.to_owned())
    };
    let holds = |call: &&Call| {
        // A line feed within a string is written as `\n`.
        call.arguments.split("\\n").any(|line| change.record.iter().all(|part| line.contains(part.as_str())))
    };
    let written = calls
        .iter()
        .filter(|call| call.is_write() && call.succeeded() && segment_of(call).is_some())
        .find(holds)
        .ok_or_else(|| format!("{change:?} was not written to the journal"))?;
    let segment = segment_of(written).unwrap_or_default();
    let connection = format!("127.0.0.1:{api_port}->127.0.0.1:{}]", change.client_port);
    let answer = calls
        .iter()
        .find(|call| call.is_write() && call.target().ends_with(&connection))
        .ok_or_else(|| format!("{change:?} was not answered to {connection}"))?;
    let between = |call: &&Call, after: usize| {
        call.is_sync() && call.result == "0" && call.begun > after && call.ended < answer.begun
    };
    if !calls.iter().any(|call| call.target() == segment && between(&call, written.ended)) {
        return Err(format!("{change:?} was answered before {segment} was synced"));
    }
    let created = calls.iter().find(|call| call.name == "openat" && call.result.contains(&segment));
    let Some(created) = created else { return Err(format!("{segment} was not opened")) };
    let is_new = created.arguments.contains("O_CREAT");
    if is_new && !calls.iter().any(|call| call.target() == journal && between(&call, created.ended)) {
        return Err(format!("{change:?} was answered before the directory of its new segment was synced"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const JOURNAL: &str = "/d/journal";

    fn change() -> Change {
        Change { record: vec!["key_revoked".into(), "key_1".into()], client_port: 5000 }
    }

    fn judge(lines: &[&str]) -> Result<(), String> {
        let opened = [
            r#"7 1.0 openat(AT_FDCWD</d>, "/d/journal/1.jsonl", O_WRONLY|O_CREAT|O_APPEND, 0600) = 9</d/journal/1.jsonl>"#,
            r"7 1.1 fsync(10</d/journal>)       = 0",
        ];
        let trace: Vec<&str> = opened.iter().chain(lines).copied().collect();
        on_disk_before_answered(&parse(&trace.join("\n")), JOURNAL, 80, &change())
    }

    const WRITE: &str = r#"7 2.0 write(9</d/journal/1.jsonl>, "{\"key_revoked\",\"key_1\"}\n", 25) = 25"#;
    const SYNC: &str = r"7 3.0 fdatasync(9</d/journal/1.jsonl>) = 0";
    const ANSWER: &str = r#"8 4.0 sendto(11<TCP:[127.0.0.1:80->127.0.0.1:5000]>, "HTTP/1.1 200 OK\r\n = 1", 20, MSG_NOSIGNAL, NULL, 0) = 20"#;

    #[test]
    fn written_synced_answered() {
        assert_eq!(judge(&[WRITE, SYNC, ANSWER]), Ok(()));
    }

    #[test]
    fn any_other_order_is_found() {
        for wrong in [
            &[WRITE, ANSWER][..],
            &[WRITE, ANSWER, SYNC],
            &[SYNC, WRITE, ANSWER],
            &[SYNC, ANSWER],
            &[WRITE, SYNC],
            &[WRITE, "7 3.0 fdatasync(9</d/journal/2.jsonl>) = 0", ANSWER],
            &[WRITE, "7 3.0 fdatasync(9</d/journal/1.jsonl>) = -1 EIO (Input/output error)", ANSWER],
        ] {
            assert!(judge(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_call_lasts_until_it_is_resumed() {
        let begun = "7 3.0 fdatasync(9</d/journal/1.jsonl> <unfinished ...>";
        let resumed = "7 3.9 <... fdatasync resumed>)   = 0";
        assert_eq!(judge(&[WRITE, begun, resumed, ANSWER]), Ok(()));
        assert!(judge(&[WRITE, begun, ANSWER, resumed]).is_err());
        let answer = ANSWER
            .replace(", 20, MSG_NOSIGNAL, NULL, 0) = 20", ", 20, MSG_NOSIGNAL, NULL, 0 <unfinished ...>");
        let answered = "8 4.1 <... sendto resumed>) = 20";
        assert_eq!(judge(&[WRITE, SYNC, &answer, answered]), Ok(()));
        assert!(judge(&[WRITE, &answer, SYNC, answered]).is_err(), "it may leave as soon as it is begun");
    }

    #[test]
    fn a_new_segment_needs_its_directory_synced() {
        let create = r#"7 1.0 openat(AT_FDCWD</d>, "/d/journal/1.jsonl", O_WRONLY|O_CREAT, 0600) = 9</d/journal/1.jsonl>"#;
        let trace = [create, WRITE, SYNC, ANSWER].join("\n");
        assert!(on_disk_before_answered(&parse(&trace), JOURNAL, 80, &change()).is_err());
        let reopened = trace.replace("|O_CREAT", "");
        assert_eq!(on_disk_before_answered(&parse(&reopened), JOURNAL, 80, &change()), Ok(()));
    }
}
