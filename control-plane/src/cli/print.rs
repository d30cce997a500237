//! Printing to standard output: who reads it may stop before the end, as `head` does.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write as _};

/// A text without what a terminal obeys, or reads in another direction: names and reasons come from elsewhere. Each such
/// character stands as JSON escapes it.
pub fn printable(text: &str) -> String {
    let is_obeyed = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let escaped = |c: char| if is_obeyed(c) { format!("\\u{:04x}", u32::from(c)) } else { c.to_string() };
    if text.chars().any(is_obeyed) { text.chars().map(escaped).collect() } else { text.to_owned() }
}

/// Writes to standard output; ends the process once the reader is gone.
pub fn write(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    let text = printable(&text.to_string());
    if let Err(error) = out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // 128 + SIGPIPE, as of a program that the signal ends.
        std::process::exit(if error.kind() == ErrorKind::BrokenPipe { 141 } else { 1 });
    }
}

/// As of the standard library, but for a closed pipe.
macro_rules! print {
    ($($text:tt)*) => { $crate::cli::print::write(format_args!($($text)*)) };
}

/// As of the standard library, but for a closed pipe.
macro_rules! println {
    () => { $crate::cli::print::write(format_args!("\n")) };
    ($($text:tt)*) => { $crate::cli::print::write(format_args!("{}\n", format_args!($($text)*))) };
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn what_a_terminal_obeys_is_shown_and_not_obeyed() {
        for (text, wanted) in [
            ("plain \tü\n", "plain \tü\n"),
            ("a\u{1b}[31m", "a\\u001b[31m"),
            ("a\rb\0", "a\\u000db\\u0000"),
            ("a\u{202e}b\u{2028}", "a\\u202eb\\u2028"),
        ] {
            assert_eq!(printable(text), wanted);
        }
    }
}
