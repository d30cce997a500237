//! The upstream of demo and tests: answers every request with what it received.

use std::convert::Infallible;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use serde_json::{Map, Value, json};
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// More than any test sends; hyper's own default of 100 would refuse what the proxy let pass.
const MAX_HEADERS: usize = 4096;

/// What an upstream is, and does.
#[derive(Debug, Default)]
pub struct Behaviour {
    /// What it is called. The one called `v1` checks keys by itself, as it did before there was Keygate.
    pub name: String,
    /// How many requests have reached it.
    pub seen: AtomicU64,
    /// Whether it answers 500.
    pub fails: AtomicBool,
}

impl Behaviour {
    /// That of the upstream called `name`.
    pub fn of(name: &str) -> Arc<Self> {
        Arc::new(Self { name: name.to_owned(), ..Self::default() })
    }
}

/// Serves on `listener` for ever.
pub async fn serve(listener: TcpListener, behaviour: Arc<Behaviour>) -> Infallible {
    let app = Router::new().fallback(answer).with_state(behaviour);
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

async fn answer(State(behaviour): State<Arc<Behaviour>>, request: Request) -> Response {
    behaviour.seen.fetch_add(1, Ordering::Relaxed);
    let failed = |status: StatusCode| {
        let body = json!({ "upstream": &behaviour.name, "status": status.as_u16() });
        (status, [(CONTENT_TYPE, "application/json")], body.to_string()).into_response()
    };
    if behaviour.fails.load(Ordering::Relaxed) {
        return failed(StatusCode::INTERNAL_SERVER_ERROR);
    }
    if behaviour.name == "v1" && request.uri().path() != "/" && !is_good_for_v1(request.headers()) {
        return failed(StatusCode::UNAUTHORIZED);
    }
    // hyper resets a connection if the body of its request is left unread, and the client may see the reset first.
    let (head, body) = request.into_parts();
    let Ok(body) = axum::body::to_bytes(body, usize::MAX).await else {
        return failed(StatusCode::BAD_REQUEST);
    };
    echo(&behaviour.name, &head, body.len()).into_response()
}

/// The old check: keys of before, and, as in a real migration, those of Keygate too, which it knows by their look.
fn is_good_for_v1(headers: &HeaderMap) -> bool {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let key =
        text("authorization").and_then(|value| value.strip_prefix("Bearer ")).or_else(|| text("x-api-key"));
    key.is_some_and(|key| {
        key.starts_with("legacy-") || key.starts_with("ey") && key.matches('.').count() == 2
    })
}

fn echo(name: &str, request: &Parts, body_bytes: usize) -> impl IntoResponse + use<> {
    let mut headers = Map::new();
    for (name, value) in &request.headers {
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
        "upstream": name,
        "method": request.method.as_str(),
        "path": request.uri.to_string(),
        "headers": headers,
        "body_bytes": body_bytes,
    });
    ([(CONTENT_TYPE, "application/json")], body.to_string())
}

/// An upstream within the test's own process. It ends when dropped.
#[derive(Debug)]
pub struct Upstream {
    port: u16,
    behaviour: Arc<Behaviour>,
    stop: Option<oneshot::Sender<()>>,
}

impl Upstream {
    /// Starts one on a port of its own.
    pub fn start(name: &str) -> Self {
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let behaviour = Behaviour::of(name);
        let (stop, stopped) = oneshot::channel();
        let served = Arc::clone(&behaviour);
        std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                listener.set_nonblocking(true).expect("a socket");
                let listener = TcpListener::from_std(listener).expect("a socket");
                tokio::select! {
                    never = serve(listener, served) => match never {},
                    _ = stopped => {}
                }
            });
        });
        Self { port, behaviour, stop: Some(stop) }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// How many requests have reached it.
    pub fn seen(&self) -> u64 {
        self.behaviour.seen.load(Ordering::Relaxed)
    }

    /// Has it answer 500, or not any more.
    pub fn fail(&self, fails: bool) {
        self.behaviour.fails.store(fails, Ordering::Relaxed);
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        drop(self.stop.take());
    }
}
