//! An HTTP server that clients cannot exhaust: a request must come within a time, an idle connection is closed, and where there
//! are too many connections, one that has not sent a whole request gives way to a new one.

mod connections;
mod watched;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tower_service::Service as _;

pub use self::connections::Bounds;
use self::connections::{Connection, Connections, Place};
use self::watched::{Unread, Watched};

/// Time between two looks for connections that are overdue.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Time between two lines of the log that say that there are too many connections.
const WARN_EVERY: Duration = Duration::from_secs(60);
/// Pause after no connection could be accepted.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves until `stopping` turns true; requests that are under way then may take `stop_within`.
pub async fn serve(
    name: &'static str,
    listener: TcpListener,
    router: Router,
    bounds: Bounds,
    stopping: watch::Receiver<bool>,
    stop_within: Duration,
) {
    let mut stops = stopping.clone();
    let connections = Arc::new(Connections::new(bounds));
    let mut tasks = JoinSet::new();
    let mut look = tokio::time::interval(LOOK_EVERY);
    let mut warnings = Warnings { name, refused: 0, last: None };
    loop {
        tokio::select! {
            _ = stops.wait_for(|stop| *stop) => break,
            _ = look.tick() => connections.close_overdue(Instant::now()),
            Some(_ended) = tasks.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => match connections.enter(address.ip(), Instant::now()) {
                    Some(place) => {
                        let stopping = stopping.clone();
                        tasks.spawn(serve_connection(stream, address, router.clone(), place, stopping));
                    }
                    None => warnings.refuse(connections.len(), "every connection has a request under way"),
                },
                Err(error) if is_of_connection(&error) => {}
                Err(error) => {
                    warnings.refuse(connections.len(), &error.to_string());
                    connections.make_room();
                    tokio::time::sleep(PAUSE).await;
                }
            },
        }
    }
    drop(listener);
    let ended = async { while tasks.join_next().await.is_some() {} };
    if tokio::time::timeout(stop_within, ended).await.is_err() {
        tracing::warn!(port = name, requests = tasks.len(), "requests are not done in time; stopping anyway");
        tasks.shutdown().await;
    }
}

async fn serve_connection(
    stream: TcpStream,
    address: SocketAddr,
    router: Router,
    place: Place,
    mut stopping: watch::Receiver<bool>,
) {
    // A poll's answer is a few dozen bytes: Nagle's algorithm would hold it back for 40 ms.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY");
    }
    let connection = Arc::clone(place.connection());
    let io = TokioIo::new(Watched::new(stream, Arc::clone(&connection)));
    let service = service_fn(|request| answer(request, address, router.clone(), Arc::clone(&connection)));
    let mut server = auto::Builder::new(TokioExecutor::new());
    // The connection is watched instead: the server's own time-out would close idle ones, too.
    server.http1().header_read_timeout(None);
    let served = server.serve_connection(io, service);
    tokio::pin!(served);
    let mut stops = false;
    loop {
        tokio::select! {
            ended = &mut served => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a connection ended");
                }
                return;
            }
            () = connection.closing() => return,
            _ = stopping.wait_for(|stop| *stop), if !stops => {
                stops = true;
                served.as_mut().graceful_shutdown();
            }
        }
    }
}

async fn answer(
    request: Request<Incoming>,
    address: SocketAddr,
    mut router: Router,
    connection: Arc<Connection>,
) -> Result<axum::response::Response, std::convert::Infallible> {
    let under_way = connection.begin();
    let mut request = request.map(|body| Body::new(Unread::new(body, &connection)));
    request.extensions_mut().insert(axum::extract::ConnectInfo(address));
    let response = router.call(request).await?;
    Ok(response.map(|body| Body::new(under_way.until_sent(body))))
}

/// Whether accepting failed for the connection that was to be accepted, and not for the server.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

/// Says once a minute that connections are refused, and how many.
struct Warnings {
    name: &'static str,
    refused: u64,
    last: Option<Instant>,
}

impl Warnings {
    fn refuse(&mut self, open: usize, problem: &str) {
        self.refused += 1;
        if self.last.is_none_or(|last| last.elapsed() >= WARN_EVERY) {
            self.last = Some(Instant::now());
            let refused = std::mem::take(&mut self.refused);
            tracing::error!(port = self.name, refused, open, problem, "connections are refused");
        }
    }
}
