//! The HTTP client of the server: to other control planes, to proxies that canaries test, and to where notifications go.
//!
//! HTTP/1.1, in the clear or by TLS with Mozilla's roots. A redirect is an answer like others and is not followed. Each
//! exchange has a time for all of it, from resolving the name to the last byte of the body, and a bound for the body.

use std::error::Error;
use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::client::legacy::connect::proxy::Tunnel;
use hyper_util::client::proxy::matcher::Matcher;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tower_service::Service;

/// The most of an answer's head that is read.
const MAX_HEAD_BYTES: usize = 32 * 1024;

type BoxError = Box<dyn Error + Send + Sync>;
type BoxFuture<T> = Pin<Box<dyn Future<Output = Result<T, BoxError>> + Send>>;

/// A rule for where a client may connect.
pub trait Guard: fmt::Debug + Send + Sync {
    /// Whether a host may be called at a port.
    ///
    /// # Errors
    /// The reason why it is not permitted.
    fn permits(&self, host: &str, port: u16) -> Result<(), String>;

    /// Whether an address may be called to which `host` resolved, or which it is.
    ///
    /// # Errors
    /// The reason why it is not permitted.
    fn permits_address(&self, host: &str, address: IpAddr) -> Result<(), String>;
}

/// An exchange that did not come to an answer. Its text has nothing of the request and of the answer.
#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    /// It took too long.
    #[error("no answer in time")]
    Late,
    /// The name has no address.
    #[error("the host is not found")]
    HostNotFound,
    /// The [`Guard`] refused the host or an address of it.
    #[error("{0}")]
    Refused(String),
    /// The network failed.
    #[error("not reached: {0}")]
    Io(io::ErrorKind),
    /// No TLS connection, as when the certificate is not valid for the host.
    #[error("no TLS connection")]
    Tls(#[source] rustls::Error),
    /// The body goes beyond the bound, in bytes.
    #[error("the body is longer than {0} bytes")]
    BodyTooLong(usize),
    /// Not HTTP, or cut short.
    #[error("no answer that can be read")]
    Unreadable(#[source] BoxError),
}

/// A connection was not tried.
#[derive(Debug, thiserror::Error)]
enum NotTried {
    #[error("the host is not found")]
    HostNotFound,
    #[error("{0}")]
    Refused(String),
}

impl HttpError {
    /// Finds the TLS error in one of reading or writing, if that is what it was.
    fn of_io(error: &io::Error) -> Self {
        let mut error = error;
        while let Some(inner) = error.get_ref().and_then(|inner| inner.downcast_ref::<io::Error>()) {
            error = inner;
        }
        let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        tls.map_or(Self::Io(error.kind()), |tls| Self::Tls(tls.clone()))
    }
}

impl From<BoxError> for HttpError {
    /// Finds the cause that says most.
    fn from(error: BoxError) -> Self {
        let mut next: Option<&(dyn Error + 'static)> = Some(error.as_ref());
        while let Some(cause) = next {
            if let Some(not_tried) = cause.downcast_ref::<NotTried>() {
                return match not_tried {
                    NotTried::HostNotFound => Self::HostNotFound,
                    NotTried::Refused(problem) => Self::Refused(problem.clone()),
                };
            }
            if let Some(io) = cause.downcast_ref::<io::Error>() {
                return Self::of_io(io);
            }
            next = cause.source();
        }
        Self::Unreadable(error)
    }
}

/// Resolves names with the system's resolver, once for each connection, and gives only addresses that the guard permits.
/// A connection is made to one of those and to no other.
#[derive(Debug, Clone)]
struct Resolver(Option<Arc<dyn Guard>>);

impl Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = BoxError;
    type Future = BoxFuture<Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let guard = self.0.clone();
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await;
            let found: Vec<_> = found.map_err(|_| NotTried::HostNotFound)?.collect();
            for address in &found {
                let permitted =
                    guard.as_ref().map(|guard| guard.permits_address(name.as_str(), address.ip()));
                permitted.transpose().map_err(NotTried::Refused)?;
            }
            Ok(found.into_iter())
        })
    }
}

/// Makes connections in the clear, under which TLS may come.
#[derive(Clone)]
struct Connector {
    tcp: HttpConnector<Resolver>,
    guard: Option<Arc<dyn Guard>>,
    proxies: Option<Arc<Matcher>>,
}

impl Connector {
    /// Whether the guard permits the host, and its address if it is named by that: an address is not resolved.
    fn check(&self, uri: &Uri) -> Result<(), String> {
        let Some(guard) = &self.guard else { return Ok(()) };
        let host = uri.host().unwrap_or_default();
        let usual = if uri.scheme_str() == Some("https") { 443 } else { 80 };
        guard.permits(host, uri.port_u16().unwrap_or(usual))?;
        match host.trim_start_matches('[').trim_end_matches(']').parse() {
            Ok(address) => guard.permits_address(host, address),
            Err(_) => Ok(()),
        }
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = BoxError;
    type Future = BoxFuture<Self::Response>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        if let Err(problem) = self.check(&uri) {
            return Box::pin(std::future::ready(Err(NotTried::Refused(problem).into())));
        }
        let proxy = self.proxies.as_ref().and_then(|proxies| proxies.intercept(&uri));
        let Some(proxy) = proxy else {
            let connecting = self.tcp.call(uri);
            return Box::pin(async { Ok(connecting.await?) });
        };
        let mut tunnel = Tunnel::new(proxy.uri().clone(), self.tcp.clone());
        if let Some(credentials) = proxy.basic_auth() {
            tunnel = tunnel.with_auth(credentials.clone());
        }
        let connecting = tunnel.call(uri);
        Box::pin(async { Ok(connecting.await?) })
    }
}

/// A client. Clones share connections.
#[derive(Clone)]
pub struct HttpClient(Client<HttpsConnector<Connector>, Full<Bytes>>);

impl fmt::Debug for HttpClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpClient")
    }
}

impl HttpClient {
    /// A client that keeps connections for the next exchange, and gives up one that is not made within `connect_within`.
    pub fn keeping_connections(connect_within: Duration) -> Self {
        let mut tcp = HttpConnector::new_with_resolver(Resolver(None));
        tcp.set_connect_timeout(Some(connect_within));
        Self::build(Connector { tcp, guard: None, proxies: None }, usize::MAX)
    }

    /// A client that connects only where `guard` permits it, for each exchange again.
    pub fn guarded(guard: Arc<dyn Guard>) -> Self {
        let tcp = HttpConnector::new_with_resolver(Resolver(Some(Arc::clone(&guard))));
        Self::build(Connector { tcp, guard: Some(guard), proxies: None }, 0)
    }

    /// A client that connects for each exchange again, through a proxy where one is named for the URL.
    pub fn through(proxies: Matcher) -> Self {
        let tcp = HttpConnector::new_with_resolver(Resolver(None));
        Self::build(Connector { tcp, guard: None, proxies: Some(Arc::new(proxies)) }, 0)
    }

    fn build(mut connector: Connector, kept_connections: usize) -> Self {
        connector.tcp.enforce_http(false);
        connector.tcp.set_nodelay(true);
        let https = HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(rustls::crypto::ring::default_provider())
            .expect("ring has what TLS 1.2 and 1.3 need")
            .https_or_http()
            .enable_http1()
            .wrap_connector(connector);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(kept_connections)
            .http1_max_buf_size(MAX_HEAD_BYTES)
            .build(https);
        Self(client)
    }

    /// Sends a request; the status of the answer, whose body is not read.
    ///
    /// # Errors
    /// When there is no answer `within` this time.
    pub async fn status(
        &self,
        request: Request<Full<Bytes>>,
        within: Duration,
    ) -> Result<StatusCode, HttpError> {
        match tokio::time::timeout(within, self.0.request(request)).await {
            Ok(Ok(answer)) => Ok(answer.status()),
            Ok(Err(error)) => Err(BoxError::from(error).into()),
            Err(_) => Err(HttpError::Late),
        }
    }

    /// Sends a request and reads the answer, all `within` this time, with at most `max_body_bytes` of body.
    ///
    /// # Errors
    /// When there is no such answer.
    pub async fn exchange(
        &self,
        request: Request<Full<Bytes>>,
        within: Duration,
        max_body_bytes: usize,
    ) -> Result<Response<Bytes>, HttpError> {
        let exchange = async {
            let (head, body) = self.0.request(request).await.map_err(BoxError::from)?.into_parts();
            match Limited::new(body, max_body_bytes).collect().await {
                Ok(body) => Ok(Response::from_parts(head, body.to_bytes())),
                Err(error) if error.is::<LengthLimitError>() => Err(HttpError::BodyTooLong(max_body_bytes)),
                Err(error) => Err(error.into()),
            }
        };
        tokio::time::timeout(within, exchange).await.unwrap_or(Err(HttpError::Late))
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);
    const LIMIT: usize = 1_000;

    /// Permits `one.test:PORT` and what resolves to `only`.
    #[derive(Debug)]
    struct Only(&'static str, &'static [IpAddr]);

    impl Guard for Only {
        fn permits(&self, host: &str, _: u16) -> Result<(), String> {
            if host == self.0 { Ok(()) } else { Err(format!("{host} is not named")) }
        }

        fn permits_address(&self, host: &str, address: IpAddr) -> Result<(), String> {
            if self.1.contains(&address) { Ok(()) } else { Err(format!("{host} is at {address}")) }
        }
    }

    /// A server that answers every connection with these bytes and keeps it open; the heads that it got.
    async fn server(answer: impl Into<Vec<u8>>) -> (SocketAddr, mpsc::UnboundedReceiver<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (heads, got) = mpsc::unbounded_channel();
        let answer = answer.into();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let (answer, heads) = (answer.clone(), heads.clone());
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match stream.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    let _ = heads.send(String::from_utf8_lossy(&head).into_owned());
                    let _ = stream.write_all(&answer).await;
                    std::future::pending::<()>().await;
                });
            }
        });
        (address, got)
    }

    fn get(uri: &str) -> Request<Full<Bytes>> {
        Request::get(uri).body(Full::default()).unwrap()
    }

    async fn says(client: &HttpClient, uri: &str) -> HttpError {
        client.exchange(get(uri), SOON, LIMIT).await.unwrap_err()
    }

    fn plain() -> HttpClient {
        HttpClient::keeping_connections(SOON)
    }

    #[tokio::test]
    async fn an_answer_comes_back_and_a_redirect_is_one() {
        let moved = "HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 2\r\n\r\nhi";
        let (address, mut heads) = server(moved).await;
        let uri = format!("http://localhost:{}/a?b=c", address.port());
        let answer = plain().exchange(get(&uri), SOON, LIMIT).await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.body().as_ref()), (302, &b"hi"[..]));
        let head = heads.recv().await.unwrap();
        assert!(head.starts_with("GET /a?b=c HTTP/1.1\r\n"), "{head}");
        assert!(head.contains(&format!("host: localhost:{}\r\n", address.port())), "{head}");
    }

    #[tokio::test]
    async fn the_time_is_for_the_whole_exchange() {
        let within = Duration::from_millis(50);
        for begun in ["", "HTTP/1.1 200 OK\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi"] {
            let (address, _heads) = server(begun).await;
            let answer = plain().exchange(get(&format!("http://{address}/")), within, LIMIT).await;
            assert!(matches!(answer, Err(HttpError::Late)), "{begun:?}: {answer:?}");
        }
        let (address, _heads) = server("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhi").await;
        let status = plain().status(get(&format!("http://{address}/")), SOON).await.unwrap();
        assert_eq!(status, StatusCode::OK, "the status alone does not wait for the body");
    }

    #[tokio::test]
    async fn a_body_or_head_that_is_too_long_is_refused() {
        let fits = format!("HTTP/1.1 200 OK\r\ncontent-length: {LIMIT}\r\n\r\n{}", "x".repeat(LIMIT));
        let (address, _heads) = server(fits).await;
        let answer = plain().exchange(get(&format!("http://{address}/")), SOON, LIMIT).await.unwrap();
        assert_eq!(answer.body().len(), LIMIT);
        let endless = format!("HTTP/1.1 200 OK\r\n\r\n{}", "x".repeat(LIMIT + 1));
        let (address, _heads) = server(endless).await;
        let error = says(&plain(), &format!("http://{address}/")).await;
        assert!(matches!(error, HttpError::BodyTooLong(LIMIT)), "{error:?}");
        let (address, _heads) =
            server(format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "x".repeat(2 * MAX_HEAD_BYTES))).await;
        let error = says(&plain(), &format!("http://{address}/")).await;
        assert!(matches!(error, HttpError::Unreadable(_)), "{error:?}");
    }

    #[tokio::test]
    async fn what_went_wrong_is_told_apart() {
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
        let error = says(&plain(), &format!("http://{closed}/")).await;
        assert!(matches!(error, HttpError::Io(io::ErrorKind::ConnectionRefused)), "{error:?}");
        let error = says(&plain(), "http://no-such-host.invalid/").await;
        assert!(matches!(error, HttpError::HostNotFound), "{error:?}");
        let (address, _heads) = server("no HTTP\r\n\r\n").await;
        let error = says(&plain(), &format!("http://{address}/")).await;
        assert!(matches!(error, HttpError::Unreadable(_)), "{error:?}");
    }

    /// A server that answers a TLS handshake in the clear.
    #[tokio::test]
    async fn what_should_be_tls_and_is_not_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serve = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut hello = [0; 3];
            stream.read_exact(&mut hello).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            hello
        });
        let error = says(&plain(), &format!("https://{address}/")).await;
        assert!(matches!(error, HttpError::Tls(_)), "{error:?}");
        let hello = serve.await.unwrap();
        assert_eq!(hello[..2], [0x16, 0x03], "a handshake record");
    }

    #[tokio::test]
    async fn a_guard_refuses_hosts_and_what_they_resolve_to_before_any_connection() {
        const HERE: [IpAddr; 2] =
            [IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), IpAddr::V6(std::net::Ipv6Addr::LOCALHOST)];
        let (address, mut heads) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let port = address.port();
        for (host, permitted, problem) in [
            ("localhost", &[][..], "localhost is at "),
            ("127.0.0.1", &[], "127.0.0.1 is at 127.0.0.1"),
            ("[::1]", &[], "[::1] is at ::1"),
            ("another", &HERE, "localhost is not named"),
        ] {
            let client = HttpClient::guarded(Arc::new(Only(host, permitted)));
            let host = if host == "another" { "localhost" } else { host };
            let error = says(&client, &format!("http://{host}:{port}/")).await;
            assert!(matches!(&error, HttpError::Refused(said) if said.starts_with(problem)), "{error:?}");
        }
        assert!(heads.try_recv().is_err());
        let client = HttpClient::guarded(Arc::new(Only("localhost", &HERE)));
        client.exchange(get(&format!("http://localhost:{port}/")), SOON, LIMIT).await.unwrap();
        assert!(heads.recv().await.is_some());
    }

    #[tokio::test]
    async fn a_proxy_that_is_named_is_asked_for_a_tunnel() {
        let (proxy, mut heads) = server("HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n").await;
        let proxies = Matcher::builder().all(format!("http://user:pass@{proxy}")).no("127.0.0.1").build();
        let client = HttpClient::through(proxies);
        let error = says(&client, "https://hooks.example/").await;
        assert!(matches!(error, HttpError::Unreadable(_)), "{error:?}");
        let head = heads.recv().await.unwrap();
        assert!(head.starts_with("CONNECT hooks.example:443 HTTP/1.1\r\n"), "{head}");
        assert!(head.to_lowercase().contains("proxy-authorization: basic "), "{head}");
        let (address, _heads) = server("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        client.exchange(get(&format!("http://{address}/")), SOON, LIMIT).await.unwrap();
    }
}
