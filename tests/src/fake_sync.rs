//! Something on the sync port that is no control plane: every way in which a poll can fail.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::wait::wait_for;

/// What it does with a connection on which a request has begun to arrive.
#[derive(Debug, Clone)]
pub enum Behaviour {
    /// Answers with these bytes and closes.
    Answer(Vec<u8>),
    /// Closes without a word.
    Close,
    /// Never answers; keeps the connection.
    Silence,
}

impl Behaviour {
    /// An HTTP answer with this status and body.
    pub fn http(status: &str, body: &[u8]) -> Self {
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/octet-stream\r\ncontent-length: {}\r\nconnection: close\r\n\r\n",
            body.len()
        );
        Self::Answer([head.as_bytes(), body].concat())
    }
}

/// A server that misbehaves. It ends when dropped.
#[derive(Debug)]
pub struct FakeSync {
    port: u16,
    stop: Arc<AtomicBool>,
    polls: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl FakeSync {
    /// Listens on `port`, which must be free.
    #[track_caller]
    pub fn start(port: u16, behaviour: Behaviour) -> Self {
        // What listened there before may take a moment to be gone.
        let listener = wait_for(Duration::from_secs(5), "the sync port to be free", || {
            TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok()
        });
        let stop = Arc::new(AtomicBool::new(false));
        let polls = Arc::new(AtomicU64::new(0));
        let (stopping, count) = (Arc::clone(&stop), Arc::clone(&polls));
        let thread = std::thread::spawn(move || {
            let mut kept = Vec::new();
            for stream in listener.incoming() {
                if stopping.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(stream) = stream else { continue };
                kept.extend(answer(stream, &behaviour));
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self { port, stop, polls, thread: Some(thread) }
    }

    /// How many polls it has met.
    pub fn polls(&self) -> u64 {
        self.polls.load(Ordering::Relaxed)
    }
}

impl Drop for FakeSync {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // It waits for a connection: this is the last one.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the connection when it is to be kept.
fn answer(mut stream: TcpStream, behaviour: &Behaviour) -> Option<TcpStream> {
    stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
    stream.set_write_timeout(Some(Duration::from_secs(1))).ok()?;
    let _ = stream.set_nodelay(true);
    // One read takes a whole poll as a rule; what is left over is part of the misbehaviour.
    let _ = stream.read(&mut [0; 65536]);
    match behaviour {
        Behaviour::Answer(bytes) => {
            let _ = stream.write_all(bytes);
            None
        }
        Behaviour::Close => None,
        Behaviour::Silence => Some(stream),
    }
}
