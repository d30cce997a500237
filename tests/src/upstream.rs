//! The upstream of demo and tests: answers every request with what it received.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// More than any test sends; hyper's own default of 100 would refuse what the proxy let pass.
const MAX_HEADERS: usize = 4096;

/// Serves on `listener` for ever, as the upstream called `name`.
pub async fn serve(listener: TcpListener, name: String, seen: Arc<AtomicU64>) -> Infallible {
    let app = Router::new().fallback(echo).with_state((Arc::<str>::from(name), seen));
    loop {
        // A connection that is gone before it is accepted is no reason to stop.
        let Ok((stream, _)) = listener.accept().await else { continue };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(app.clone());
        tokio::spawn(async move {
            let _ = hyper::server::conn::http1::Builder::new()
                .max_headers(MAX_HEADERS)
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

async fn echo(State((name, seen)): State<(Arc<str>, Arc<AtomicU64>)>, request: Request) -> impl IntoResponse {
    seen.fetch_add(1, Ordering::Relaxed);
    let mut headers = Map::new();
    for (name, value) in request.headers() {
        let value = String::from_utf8_lossy(value.as_bytes());
        match headers.entry(name.as_str()) {
            serde_json::map::Entry::Vacant(entry) => {
                entry.insert(Value::from(value.into_owned()));
            }
            serde_json::map::Entry::Occupied(mut entry) => {
                let both = format!("{}, {value}", entry.get().as_str().unwrap_or_default());
                entry.insert(Value::from(both));
            }
        }
    }
    let body = json!({
        "upstream": &*name,
        "method": request.method().as_str(),
        "path": request.uri().to_string(),
        "headers": headers,
    });
    ([(CONTENT_TYPE, "application/json")], body.to_string())
}

/// An upstream within the test's own process. It ends when dropped.
#[derive(Debug)]
pub struct Upstream {
    port: u16,
    seen: Arc<AtomicU64>,
    stop: Option<oneshot::Sender<()>>,
}

impl Upstream {
    /// Starts one on a port of its own.
    pub fn start(name: &str) -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let seen = Arc::new(AtomicU64::new(0));
        let (stop, stopped) = oneshot::channel();
        let (name, count) = (name.to_owned(), Arc::clone(&seen));
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                listener.set_nonblocking(true).expect("a socket");
                let listener = TcpListener::from_std(listener).expect("a socket");
                tokio::select! {
                    never = serve(listener, name, count) => match never {},
                    _ = stopped => {}
                }
            });
        });
        Self { port, seen, stop: Some(stop) }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many requests have reached it.
    pub fn seen(&self) -> u64 {
        self.seen.load(Ordering::Relaxed)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}
