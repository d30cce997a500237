//! The line between one proxy and the control plane, or between two others, which a test can cut without a word: nothing is
//! reset or closed, what is sent is lost.
//!
//! The kernel drops the packets, by a rule of `nft`, where it lets us; that takes root. Where it does
//! not, as in a container without the right to change its network, a relay stands between the two that
//! goes silent: it keeps its connections, forwards nothing and accepts nothing.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::SOON;
use crate::wait::try_wait_for;

/// The proxy's own address, which tells its packets from those of other proxies on this machine.
pub const SOURCE: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

/// A line to a port of this machine. Whole when dropped, by whatever way the test ends.
#[derive(Debug)]
pub enum Line {
    /// The kernel drops what goes between [`SOURCE`] and the port.
    Kernel {
        /// The port.
        port: u16,
        /// What drops, while the line is cut.
        rule: Option<Rule>,
    },
    /// A relay in between.
    Relay(Relay),
}

impl Line {
    /// One to `port`, whole.
    #[track_caller]
    pub fn to(port: u16) -> Self {
        match Rule::drop_all(port) {
            Ok(_) => Self::Kernel { port, rule: None },
            Err(problem) => {
                println!(
                    "the kernel drops no packets for this test ({problem}): a relay goes silent instead"
                );
                Self::Relay(Relay::start(port))
            }
        }
    }

    /// One to `port` through a relay, whole.
    pub fn relay(port: u16) -> Self {
        Self::Relay(Relay::start(port))
    }

    /// Loses the connections there are, as a balancer does that was replaced: they stay open, and what is sent
    /// is confirmed and goes nowhere. New ones are as they should. Only through a relay.
    #[track_caller]
    pub fn lose_connections(&self) {
        let Self::Relay(relay) = self else { panic!("the kernel loses no connections") };
        relay.gate.lose();
    }

    /// Leads to another port from now on, and breaks the connections there are. Only a relay can.
    #[track_caller]
    pub fn lead_to(&self, port: u16) {
        let Self::Relay(relay) = self else { panic!("the kernel leads nowhere else") };
        relay.gate.lead_to(port);
    }

    /// Where the proxy connects to.
    pub fn port(&self) -> u16 {
        match self {
            Self::Kernel { port, .. } => *port,
            Self::Relay(relay) => relay.port,
        }
    }

    /// Cuts it.
    #[track_caller]
    pub fn cut(&mut self) {
        match self {
            Self::Kernel { port, rule } => {
                *rule = Some(Rule::drop_all(*port).expect("it could be done before"))
            }
            Self::Relay(relay) => relay.gate.set(true),
        }
    }

    /// Makes it whole again.
    pub fn heal(&mut self) {
        match self {
            Self::Kernel { rule, .. } => drop(rule.take()),
            Self::Relay(relay) => relay.gate.set(false),
        }
    }
}

/// A rule of the kernel. It belongs to a process of `nft` that stays for as long as this lives, so it
/// goes with this process even if that is killed.
#[derive(Debug)]
pub struct Rule(Child);

impl Rule {
    fn drop_all(port: u16) -> Result<Self, String> {
        let table = format!("ip keygate_e2e_{}_{port}", std::process::id());
        let mut nft = Command::new("nft")
            .arg("--interactive")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|error| format!("nft: {error}"))?;
        let commands = format!(
            "add table {table} {{ flags owner; }}\n\
             add chain {table} input {{ type filter hook input priority 0; }}\n\
             add rule {table} input ip saddr {SOURCE} tcp dport {port} drop\n\
             add rule {table} input ip daddr {SOURCE} tcp sport {port} drop\n"
        );
        let written = nft.stdin.as_mut().map(|input| input.write_all(commands.as_bytes()));
        let rule = Self(nft);
        if !matches!(written, Some(Ok(()))) {
            return Err("nft takes no commands".to_owned());
        }
        let holds = || {
            let listed = Command::new("nft").args(["list", "table"]).args(table.split(' ')).output().ok()?;
            let text = String::from_utf8_lossy(&listed.stdout).into_owned();
            (text.matches(" drop").count() == 2).then_some(())
        };
        try_wait_for(SOON / 10, holds).ok_or("nft may not, or the kernel cannot")?;
        Ok(rule)
    }
}

impl Drop for Rule {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Carries bytes between a port of its own and another, unless it is silent. It ends when dropped.
#[derive(Debug)]
pub struct Relay {
    port: u16,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    silent: bool,
    over: bool,
    /// How often connections were lost.
    losses: u64,
    /// Where it leads.
    to: u16,
    /// Both ends of all connections.
    ends: Vec<TcpStream>,
}

impl Gate {
    fn set(&self, silent: bool) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).silent = silent;
        self.changed.notify_all();
    }

    fn lead_to(&self, port: u16) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.to = port;
        for end in state.ends.drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    /// Connects one that came with where it leads; both ends, each twice.
    fn connect(&self, near: TcpStream) -> std::io::Result<[(TcpStream, TcpStream); 2]> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let far = TcpStream::connect((Ipv4Addr::LOCALHOST, state.to))?;
        state.ends.extend([near.try_clone()?, far.try_clone()?]);
        Ok([(near.try_clone()?, far.try_clone()?), (far, near)])
    }

    fn lose(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).losses += 1;
    }

    fn losses(&self) -> u64 {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).losses
    }

    fn end(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).over = true;
        self.changed.notify_all();
    }

    /// Waits while it is silent; whether to go on.
    fn pass(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.silent && !state.over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        !state.over
    }
}

impl Relay {
    fn start(to: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let gate = Arc::new(Gate::default());
        gate.lead_to(to);
        let shared = Arc::clone(&gate);
        let thread = std::thread::spawn(move || {
            for near in listener.incoming() {
                if !shared.pass() {
                    return;
                }
                let Ok(both) = near.and_then(|near| shared.connect(near)) else { continue };
                for (from, to) in both {
                    let gate = Arc::clone(&shared);
                    std::thread::spawn(move || carry(from, to, &gate));
                }
            }
        });
        Self { port, gate, thread: Some(thread) }
    }
}

fn carry(mut from: TcpStream, mut to: TcpStream, gate: &Gate) {
    let _ = to.set_nodelay(true);
    let mut bytes = [0; 65536];
    let losses = gate.losses();
    while let Ok(read @ 1..) = from.read(&mut bytes) {
        if gate.losses() > losses {
            continue;
        }
        if !gate.pass() || to.write_all(&bytes[..read]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    if gate.pass() {
        let _ = to.shutdown(Shutdown::Both);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.gate.end();
        // It waits for a connection: this is the last one.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
