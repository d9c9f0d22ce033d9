//! A client that speaks bytes: what it sends is exactly what a test wrote, and an answer is read strictly.

use std::io;
use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::soon;

/// A connection to the gateway.
pub struct Conn {
    pub stream: TcpStream,
    /// Read and not yet looked at.
    buffer: Vec<u8>,
    framing: Framing,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Framing {
    Length(usize),
    Chunked,
    UntilClose,
    Ended,
}

/// The head of an answer, and of a whole one its body.
#[derive(Clone, Debug)]
pub struct Response {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        let mut found = self.headers.iter().filter(|(key, _)| key == name);
        let value = found.next().map(|(_, value)| value.as_str());
        assert!(found.next().is_none(), "{name} is there twice: {:?}", self.headers);
        value
    }

    /// A header that must be a number.
    pub fn number(&self, name: &str) -> u64 {
        let value = self.header(name).unwrap_or_else(|| panic!("no {name}: {self:?}"));
        value.parse().unwrap_or_else(|_| panic!("{name}: {value}"))
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// `error.code`, of a body that has the shape of an error.
    pub fn code(&self) -> Value {
        let error = &self.json()["error"];
        assert!(error["message"].is_string() && error["type"].is_string(), "{error}");
        assert!(error.get("param").is_some() && error.get("code").is_some(), "{error}");
        assert_eq!(self.header("content-type"), Some("application/json"));
        error["code"].clone()
    }

    pub fn message(&self) -> String {
        self.json()["error"]["message"].as_str().expect("a message").to_owned()
    }
}

impl Conn {
    pub async fn open(address: SocketAddr) -> Self {
        Self::try_open(address).await.expect("the gateway accepts")
    }

    pub async fn try_open(address: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        Ok(Self::on(stream))
    }

    /// One that is open.
    pub fn on(stream: TcpStream) -> Self {
        Self { stream, buffer: Vec::new(), framing: Framing::Ended }
    }

    /// Opens a connection and sends a request on it.
    pub async fn ask(address: SocketAddr, request: &[u8]) -> Self {
        let mut conn = Self::open(address).await;
        conn.send(request).await;
        conn
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("the gateway reads");
    }

    /// Sends what the gateway takes; it may refuse and close before it has read everything.
    pub async fn send_what_goes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The head of the next answer.
    pub async fn head(&mut self) -> Response {
        soon("the head of an answer", self.try_head()).await.expect("an answer")
    }

    pub async fn try_head(&mut self) -> io::Result<Response> {
        loop {
            if let Some(end) = find(&self.buffer, b"\r\n\r\n") {
                let head = String::from_utf8(self.buffer.drain(..end + 4).collect()).expect("ASCII");
                return Ok(self.parse_head(&head));
            }
            if self.more().await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn parse_head(&mut self, head: &str) -> Response {
        let mut lines = head.trim_end().split("\r\n");
        let status_line = lines.next().expect("a status line");
        let status = status_line.strip_prefix("HTTP/1.1 ").expect("HTTP/1.1");
        let headers: Vec<(String, String)> = lines
            .map(|line| line.split_once(": ").expect("a header"))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let response = Response { status: status[..3].parse().expect("a status"), headers, body: Vec::new() };
        self.framing = match (response.header("content-length"), response.header("transfer-encoding")) {
            (Some(length), None) => Framing::Length(length.parse().expect("a length")),
            (None, Some("chunked")) => Framing::Chunked,
            (None, None) => Framing::UntilClose,
            both => panic!("framed as {both:?}"),
        };
        response
    }

    /// The next bytes of the body without their framing; `None` at its end. A body that breaks off is an error.
    pub async fn data(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            match self.framing {
                Framing::Ended | Framing::Length(0) => {
                    self.framing = Framing::Ended;
                    return Ok(None);
                }
                Framing::Length(left) if !self.buffer.is_empty() => {
                    let taken = left.min(self.buffer.len());
                    self.framing = Framing::Length(left - taken);
                    return Ok(Some(self.buffer.drain(..taken).collect()));
                }
                Framing::UntilClose if !self.buffer.is_empty() => {
                    return Ok(Some(std::mem::take(&mut self.buffer)));
                }
                Framing::Chunked => {
                    if let Some(data) = self.whole_chunk() {
                        if data.is_empty() {
                            self.framing = Framing::Ended;
                            return Ok(None);
                        }
                        return Ok(Some(data));
                    }
                }
                _ => {}
            }
            if self.more().await? == 0 {
                if self.framing == Framing::UntilClose {
                    self.framing = Framing::Ended;
                    return Ok(None);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn whole_chunk(&mut self) -> Option<Vec<u8>> {
        let line = find(&self.buffer, b"\r\n")?;
        let size = std::str::from_utf8(&self.buffer[..line]).expect("a chunk size");
        let size = usize::from_str_radix(size, 16).expect("a chunk size");
        let end = line + 2 + size;
        (self.buffer.len() >= end + 2).then(|| {
            assert_eq!(&self.buffer[end..end + 2], b"\r\n");
            let data = self.buffer[line + 2..end].to_vec();
            self.buffer.drain(..end + 2);
            data
        })
    }

    async fn more(&mut self) -> io::Result<usize> {
        self.stream.read_buf(&mut self.buffer).await
    }

    /// The rest of the body.
    pub async fn rest(&mut self) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        while let Some(data) = self.data().await? {
            all.extend(data);
        }
        Ok(all)
    }

    /// Reads of the body until it has come to contain `needle`; returns what was read.
    pub async fn until(&mut self, needle: &str) -> Vec<u8> {
        let mut all = Vec::new();
        soon("a part of the body", async {
            while find(&all, needle.as_bytes()).is_none() {
                let data = self.data().await.expect("the body goes on");
                all.extend(data.expect("the body goes on"));
            }
        })
        .await;
        all
    }

    /// A whole answer.
    pub async fn response(&mut self) -> Response {
        soon("an answer", self.try_response()).await.expect("an answer")
    }

    pub async fn try_response(&mut self) -> io::Result<Response> {
        let mut response = self.try_head().await?;
        response.body = self.rest().await?;
        Ok(response)
    }

    /// Waits until the gateway closes; what it still sent. A reset counts as closed.
    pub async fn closed(&mut self) -> Vec<u8> {
        while let Ok(1..) = self.more().await {}
        std::mem::take(&mut self.buffer)
    }

    /// Leaves, and says when.
    pub fn leave(self) -> Instant {
        drop(self.stream);
        Instant::now()
    }

    /// Leaves with a reset.
    pub fn reset(self) {
        self.stream.set_zero_linger().expect("a socket");
    }
}

pub fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack.windows(needle.len()).position(|window| window == needle)
}

/// A request's bytes. `headers` come after `Host`; a body brings its length.
pub fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut head = format!("{method} {path} HTTP/1.1\r\nHost: gateway\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() {
        head.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    [head.as_bytes(), body].concat()
}

/// A chat request of alice's.
pub fn chat(body: &str) -> Vec<u8> {
    let headers = [("Authorization", "Bearer sk-alice"), ("Content-Type", "application/json")];
    request("POST", "/v1/chat/completions", &headers, body.as_bytes())
}

/// Sends one request on a connection of its own, in HTTP/2; `:authority` is that of its URI.
pub async fn over_http2(address: SocketAddr, request: http::Request<String>) -> http::Response<Bytes> {
    let stream = TcpStream::connect(address).await.expect("a connection");
    let (mut sender, driver) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.expect("HTTP/2");
    tokio::spawn(driver);
    let answer = sender.send_request(request).await.expect("an answer");
    let (head, body) = answer.into_parts();
    let body = body.collect().await.expect("all of it").to_bytes();
    http::Response::from_parts(head, body)
}

/// Sends one request on a connection of its own.
pub async fn post(address: SocketAddr, request: &[u8]) -> Response {
    Conn::ask(address, request).await.response().await
}

pub async fn get(address: SocketAddr, path: &str) -> Response {
    post(address, &request("GET", path, &[], b"")).await
}
