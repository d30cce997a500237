//! A server that costs little: it answers whatever comes at once with one and the same. The upstream, and the service
//! that ext_authz asks, as processes of their own.

use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// As what the benchmark starts it.
pub const COMMAND: &str = "answer";
/// What the upstream answers.
pub const V2: &[u8] = b"v2";
/// What it answers on the port for V1.
pub const V1: &[u8] = b"v1";
/// No head of a request is longer.
const HEAD_BYTES: usize = 16 * 1024;

/// Serves for ever on what is given as arguments, `PORT=BODY`.
pub fn run() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().expect("a runtime");
    runtime.block_on(async {
        for argument in std::env::args().skip(2) {
            let (port, body) = argument.split_once('=').expect("PORT=BODY");
            let port: u16 = port.parse().expect("a port");
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await;
            let listener = listener.unwrap_or_else(|error| panic!("port {port}: {error}"));
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            tokio::spawn(accept(listener, Arc::from(answer.into_bytes())));
        }
        std::future::pending::<()>().await;
    });
}

async fn accept(listener: TcpListener, answer: Arc<[u8]>) {
    loop {
        // A connection that is gone before it is accepted is no reason to stop.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        tokio::spawn(serve(stream, Arc::clone(&answer)));
    }
}

/// Until the peer has had enough. Requests come without a body, one after the other.
async fn serve(mut stream: TcpStream, answer: Arc<[u8]>) {
    let mut head = vec![0; HEAD_BYTES];
    let mut filled = 0;
    loop {
        match stream.read(&mut head[filled..]).await {
            Ok(0) | Err(_) => return,
            Ok(more) => filled += more,
        }
        if !head[..filled].ends_with(b"\r\n\r\n") {
            continue;
        }
        filled = 0;
        if stream.write_all(&answer).await.is_err() {
            return;
        }
    }
}
