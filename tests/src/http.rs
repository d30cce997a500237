//! An HTTP/1.1 client that sends whatever bytes it is told to, over a connection that it keeps: one
//! connection is one worker of Envoy.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::time::Duration;

use serde_json::Value;

/// No call in these tests takes longer, `?wait=applied` included.
const TIMEOUT: Duration = Duration::from_secs(30);

/// A request; header names and values are any bytes.
#[derive(Debug, Clone)]
pub struct Request {
    method: String,
    target: Vec<u8>,
    headers: Vec<(Vec<u8>, Vec<u8>)>,
    body: Vec<u8>,
}

impl Request {
    /// One with any method and target.
    pub fn new(method: &str, target: impl AsRef<[u8]>) -> Self {
        Self {
            method: method.to_owned(),
            target: target.as_ref().to_owned(),
            headers: Vec::new(),
            body: Vec::new(),
        }
    }

    /// A `GET`.
    pub fn get(target: impl AsRef<[u8]>) -> Self {
        Self::new("GET", target)
    }

    /// A `POST` with a JSON body.
    pub fn post(target: impl AsRef<[u8]>, body: &Value) -> Self {
        Self::new("POST", target).json(body)
    }

    /// Adds a header, also a second one of the same name.
    pub fn header(mut self, name: impl AsRef<[u8]>, value: impl AsRef<[u8]>) -> Self {
        self.headers.push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Adds a key as bearer.
    pub fn bearer(self, token: impl AsRef<[u8]>) -> Self {
        let value = [b"Bearer ", token.as_ref()].concat();
        self.header("authorization", value)
    }

    /// Sets a JSON body.
    pub fn json(self, body: &Value) -> Self {
        self.header("content-type", "application/json").body(body.to_string())
    }

    /// Sets the body.
    pub fn body(mut self, body: impl AsRef<[u8]>) -> Self {
        self.body = body.as_ref().to_owned();
        self
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(256 + self.body.len());
        bytes.extend_from_slice(self.method.as_bytes());
        bytes.push(b' ');
        bytes.extend_from_slice(&self.target);
        bytes.extend_from_slice(b" HTTP/1.1\r\nhost: localhost\r\n");
        for (name, value) in &self.headers {
            bytes.extend_from_slice(name);
            bytes.extend_from_slice(b": ");
            bytes.extend_from_slice(value);
            bytes.extend_from_slice(b"\r\n");
        }
        if !self.body.is_empty() || self.method != "GET" {
            bytes.extend_from_slice(format!("content-length: {}\r\n", self.body.len()).as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    /// The status.
    pub status: u16,
    /// The headers in the order they came, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, whole.
    pub body: Vec<u8>,
}

impl Response {
    /// The first header of that name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(have, _)| have == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON; panics when it is none.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{} is not JSON ({error}): {}", self.status, self.text()))
    }

    /// Panics unless the status is `wanted`.
    #[track_caller]
    pub fn expect(self, wanted: u16) -> Self {
        assert_eq!(self.status, wanted, "{}", self.text());
        self
    }

    /// Panics unless it is a problem document with that status and `code`.
    #[track_caller]
    pub fn expect_problem(self, status: u16, code: &str) -> Self {
        let answer = self.expect(status);
        assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{}", answer.text());
        let problem = answer.json();
        assert_eq!(problem["code"], code, "{problem}");
        assert_eq!(problem["status"], status, "{problem}");
        answer
    }
}

/// A connection that is kept.
#[derive(Debug)]
pub struct Connection {
    stream: BufReader<TcpStream>,
}

impl Connection {
    /// Connects to a port of this machine.
    pub fn open(port: u16) -> io::Result<Self> {
        let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// The port at this end.
    pub fn local_port(&self) -> u16 {
        self.stream.get_ref().local_addr().expect("the connection is open").port()
    }

    /// Sends a request and reads its answer.
    pub fn try_send(&mut self, request: &Request) -> io::Result<Response> {
        // What refuses a request early may stop reading it; its answer counts all the same.
        let written = self.stream.get_mut().write_all(&request.encode());
        match self.read_response(request.method == "HEAD") {
            Ok(answer) => Ok(answer),
            Err(error) => Err(written.err().unwrap_or(error)),
        }
    }

    /// Sends a request whose answer is read later with [`Self::receive`].
    #[track_caller]
    pub fn begin(&mut self, request: &Request) {
        self.stream.get_mut().write_all(&request.encode()).expect("the connection is open");
    }

    /// Sends a request but for its last `bytes`, which come with [`Self::send_rest`].
    #[track_caller]
    pub fn begin_without(&mut self, request: &Request, bytes: usize) -> Vec<u8> {
        let mut sent = request.encode();
        let rest = sent.split_off(sent.len() - bytes);
        self.stream.get_mut().write_all(&sent).expect("the connection is open");
        rest
    }

    /// Sends the rest of a request and reads its answer.
    ///
    /// # Errors
    /// When the connection was closed.
    pub fn send_rest(&mut self, rest: &[u8]) -> io::Result<Response> {
        let written = self.stream.get_mut().write_all(rest);
        self.read_response(false).map_err(|error| written.err().unwrap_or(error))
    }

    /// Whether the other end has closed it, or does so within a time.
    pub fn is_closed_within(&mut self, within: Duration) -> bool {
        let stream = self.stream.get_ref();
        stream.set_read_timeout(Some(within)).expect("a time");
        let ended = match (&mut &*stream).read(&mut [0]) {
            Ok(bytes) => bytes == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        };
        stream.set_read_timeout(Some(TIMEOUT)).expect("a time");
        ended
    }

    /// Reads the answer to a request that was begun; not one to a `HEAD`.
    #[track_caller]
    pub fn receive(&mut self) -> Response {
        self.read_response(false).unwrap_or_else(|error| panic!("no answer: {error}"))
    }

    /// Sends a request and reads its answer; panics when there is none.
    #[track_caller]
    pub fn send(&mut self, request: &Request) -> Response {
        self.try_send(request).unwrap_or_else(|error| panic!("no answer: {error}"))
    }

    fn read_response(&mut self, head_only: bool) -> io::Result<Response> {
        let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let status_line = self.read_line()?;
        let status = status_line
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .ok_or_else(|| bad(&format!("not a status line: {status_line:?}")))?;
        let mut headers = Vec::new();
        loop {
            let line = self.read_line()?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').ok_or_else(|| bad("a header without colon"))?;
            headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
        let mut answer = Response { status, headers, body: Vec::new() };
        if head_only || matches!(status, 100..=199 | 204 | 304) {
            return Ok(answer);
        }
        if answer.header("transfer-encoding").is_some_and(|coding| coding.contains("chunked")) {
            loop {
                let line = self.read_line()?;
                let size = line.split(';').next().unwrap_or_default().trim();
                let size = usize::from_str_radix(size, 16).map_err(|_| bad("a bad chunk size"))?;
                let end = answer.body.len() + size;
                answer.body.resize(end, 0);
                self.stream.read_exact(&mut answer.body[end - size..])?;
                self.read_line()?;
                if size == 0 {
                    break;
                }
            }
        } else if let Some(length) = answer.header("content-length") {
            let length = length.parse().map_err(|_| bad("a bad content-length"))?;
            answer.body.resize(length, 0);
            self.stream.read_exact(&mut answer.body)?;
        } else {
            self.stream.read_to_end(&mut answer.body)?;
        }
        Ok(answer)
    }

    fn read_line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        self.stream.read_until(b'\n', &mut line)?;
        if line.pop() != Some(b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.last() == Some(&b'\r') {
            line.pop();
        }
        Ok(String::from_utf8_lossy(&line).into_owned())
    }
}

/// One request over a connection of its own.
pub fn try_call(port: u16, request: &Request) -> io::Result<Response> {
    Connection::open(port)?.try_send(request)
}

/// One request over a connection of its own; panics when there is no answer.
#[track_caller]
pub fn call(port: u16, request: &Request) -> Response {
    try_call(port, request).unwrap_or_else(|error| panic!("no answer on port {port}: {error}"))
}
