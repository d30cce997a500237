//! What stands between a client and a server and makes trouble: it delays what the server answers, or resets
//! connections in the middle of what the client sends.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::net::sockopt::set_socket_linger;

/// It carries bytes as they are until it is told otherwise. It ends when dropped.
#[derive(Debug)]
pub struct Middleman {
    port: u16,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    over: AtomicBool,
    delay_ms: AtomicU64,
    resets: AtomicBool,
    /// How many connections were reset.
    cuts: AtomicU64,
}

impl Middleman {
    /// One before a port of this machine.
    pub fn before(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let own = listener.local_addr().expect("a bound socket has an address").port();
        let shared = Arc::new(Shared::default());
        let all = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            for near in listener.incoming() {
                if all.over.load(Ordering::Acquire) {
                    return;
                }
                if let (Ok(near), Ok(far)) = (near, TcpStream::connect((Ipv4Addr::LOCALHOST, port))) {
                    join(near, far, &all);
                }
            }
        });
        Self { port: own, shared, thread: Some(thread) }
    }

    /// Where to connect to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// From now on, whatever the server sends comes so much later.
    pub fn delay(&self, delay: Duration) {
        let delay = u64::try_from(delay.as_millis()).expect("a short time");
        self.shared.delay_ms.store(delay, Ordering::Release);
    }

    /// From now on, each connection is reset after some bytes of the client, each time after another number of them:
    /// in the middle of a command, of a pipeline, of the login.
    pub fn reset(&self, resets: bool) {
        self.shared.resets.store(resets, Ordering::Release);
    }

    /// How many connections were reset.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::Acquire)
    }
}

impl Drop for Middleman {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        // It waits for a connection: this is the last one.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn join(near: TcpStream, far: TcpStream, shared: &Arc<Shared>) {
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let (Ok(near_too), Ok(far_too)) = (near.try_clone(), far.try_clone()) else { return };
    let (up, down) = (Arc::clone(shared), Arc::clone(shared));
    std::thread::spawn(move || carry_up(near, far, &up));
    std::thread::spawn(move || carry_down(far_too, near_too, &down));
}

/// From 1 byte to 8 KiB, in no order.
fn bytes_before_reset(cut: u64) -> usize {
    usize::try_from(1 + cut * 1_597 % 8_192).expect("a small number")
}

fn carry_up(mut near: TcpStream, mut far: TcpStream, shared: &Shared) {
    let mut bytes = [0; 65536];
    let mut left = None;
    while let Ok(read @ 1..) = near.read(&mut bytes) {
        let mut carried = read;
        if shared.resets.load(Ordering::Acquire) {
            let left: &mut usize =
                left.get_or_insert_with(|| bytes_before_reset(shared.cuts.fetch_add(1, Ordering::AcqRel)));
            carried = carried.min(*left);
            *left -= carried;
        }
        if far.write_all(&bytes[..carried]).is_err() {
            break;
        }
        if left == Some(0) {
            // A reset instead of an orderly end, as soon as the other thread has let go of it too.
            let _ = set_socket_linger(&near, Some(Duration::ZERO));
            let _ = far.shutdown(Shutdown::Both);
            return;
        }
    }
    let _ = far.shutdown(Shutdown::Both);
}

fn carry_down(mut far: TcpStream, mut near: TcpStream, shared: &Shared) {
    let mut bytes = [0; 65536];
    while let Ok(read @ 1..) = far.read(&mut bytes) {
        let delay = shared.delay_ms.load(Ordering::Acquire);
        if delay > 0 {
            std::thread::sleep(Duration::from_millis(delay)); // This is the trouble, not a wait for it.
        }
        if near.write_all(&bytes[..read]).is_err() {
            return;
        }
    }
    let is_cut = shared.resets.load(Ordering::Acquire);
    if !is_cut {
        let _ = near.shutdown(Shutdown::Both);
    }
}
