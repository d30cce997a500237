//! Printing to standard output: who reads it may stop before the end, as `head` does.

use std::fmt::Arguments;
use std::io::{ErrorKind, Write as _};

/// Writes to standard output; ends the process once the reader is gone.
pub fn write(text: Arguments<'_>) {
    let mut out = std::io::stdout().lock();
    if let Err(error) = out.write_fmt(text).and_then(|()| out.flush()) {
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
