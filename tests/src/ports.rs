//! Ports that no other test has.

use std::fs::{self, File};
use std::net::{Ipv4Addr, TcpListener};

/// Below the range from which the kernel takes the ports of outgoing connections, so that none of
/// those sits on a port between its reservation and its use.
const RANGE: std::ops::Range<u16> = 20_000..30_000;

/// A port reserved among all tests on this machine, for as long as this lives. It is free to listen on,
/// also again after a restart.
#[derive(Debug)]
pub struct Port {
    number: u16,
    // Locked; the kernel unlocks it when the process ends, however it ends.
    _lock: File,
}

impl Port {
    /// Reserves one.
    pub fn reserve() -> Self {
        let directory = std::env::temp_dir().join("keygate-e2e-ports");
        fs::create_dir_all(&directory).expect("a directory for the locks of ports");
        // Each process begins elsewhere, so that tests rarely meet.
        let first = RANGE.start + (std::process::id() % u32::from(RANGE.end - RANGE.start)) as u16;
        (first..RANGE.end)
            .chain(RANGE.start..first)
            .find_map(|number| {
                let lock = File::create(directory.join(number.to_string())).ok()?;
                lock.try_lock().ok()?;
                TcpListener::bind((Ipv4Addr::LOCALHOST, number)).ok()?;
                Some(Self { number, _lock: lock })
            })
            .expect("a free port")
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}
