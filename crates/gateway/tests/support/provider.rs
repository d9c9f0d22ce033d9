//! A provider that does exactly what a test tells it to, on a raw socket.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::watch;

use super::client::find;
use super::soon;

/// What to do with a request, step by step.
#[derive(Clone)]
pub enum Step {
    /// Write these bytes, as one write.
    Send(Vec<u8>),
    /// Write them one by one.
    Bytewise(Vec<u8>),
    /// Write them again and again until the peer leaves.
    Flood(Vec<u8>),
    /// Wait until the test opens the gate.
    Wait(Gate),
    /// Be slow.
    Pause(Duration),
    /// Do nothing more until the peer leaves.
    Hang,
    /// Close the connection.
    Close,
    /// Reset the connection.
    Reset,
}

/// Where a script waits for its test.
#[derive(Clone)]
pub struct Gate {
    open: watch::Sender<bool>,
    reached: watch::Sender<usize>,
}

impl Gate {
    pub fn new() -> Self {
        Self { open: watch::Sender::new(false), reached: watch::Sender::new(0) }
    }

    /// Lets all through, now and later.
    pub fn open(&self) {
        self.open.send_replace(true);
    }

    /// Waits until this many scripts have come to the gate.
    pub async fn reached(&self, count: usize) {
        let mut reached = self.reached.subscribe();
        soon("scripts at the gate", reached.wait_for(|now| *now >= count)).await.expect("the gate is there");
    }

    async fn pass(&self) {
        self.reached.send_modify(|count| *count += 1);
        let mut open = self.open.subscribe();
        open.wait_for(|open| *open).await.expect("the gate is there");
    }
}

/// A request as it arrived.
#[derive(Clone)]
pub struct Seen {
    /// Request line and headers.
    pub head: String,
    pub body: Vec<u8>,
    /// When the peer closed the connection while this request was being answered.
    closed: watch::Receiver<Option<Instant>>,
}

impl Seen {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).expect("a JSON body")
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).expect("UTF-8")
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then_some(value.trim())
        })
    }

    /// Names of all headers, in order of the alphabet.
    pub fn header_names(&self) -> Vec<String> {
        let lines = self.head.lines().skip(1);
        let mut names: Vec<String> =
            lines.filter_map(|line| Some(line.split_once(':')?.0.to_ascii_lowercase())).collect();
        names.sort();
        names
    }

    /// When the peer closed the connection, now or soon.
    pub async fn closed(&self) -> Instant {
        let mut closed = self.closed.clone();
        let when =
            soon("the gateway leaves the provider", closed.wait_for(Option::is_some)).await.map(|when| *when);
        when.expect("the script still runs").expect("it was waited for")
    }
}

type Script = dyn Fn(&Seen) -> Vec<Step> + Send + Sync;

/// A listening provider. Requests that nobody scripted do not exist: each gets what the closure says.
pub struct Provider {
    pub address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    count: watch::Receiver<usize>,
    /// Connections now open.
    open: watch::Receiver<usize>,
    opened: Arc<AtomicU64>,
    flooded: Arc<AtomicU64>,
}

impl Provider {
    /// Starts one that answers each request as `script` says.
    pub async fn start(script: impl Fn(&Seen) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let (seen, count, open) = (Arc::default(), watch::Sender::new(0), watch::Sender::new(0));
        let flooded = Arc::<AtomicU64>::default();
        let this = Self {
            address,
            seen: Arc::clone(&seen),
            count: count.subscribe(),
            open: open.subscribe(),
            opened: Arc::default(),
            flooded: flooded.clone(),
        };
        let opened = this.opened.clone();
        let shared = Arc::new(Shared { script: Box::new(script), seen, count, open, flooded });
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                opened.fetch_add(1, Ordering::Relaxed);
                let shared = shared.clone();
                tokio::spawn(async move {
                    shared.open.send_modify(|open| *open += 1);
                    shared.serve(stream).await;
                    shared.open.send_modify(|open| *open -= 1);
                });
            }
        });
        this
    }

    /// One that always does the same.
    pub async fn always(steps: Vec<Step>) -> Self {
        Self::start(move |_| steps.clone()).await
    }

    /// One that always answers with these bytes.
    pub async fn answering(bytes: Vec<u8>) -> Self {
        Self::always(vec![Step::Send(bytes)]).await
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Seen> {
        self.seen.lock().expect("no test panics with it").clone()
    }

    /// How many requests have come.
    pub fn hits(&self) -> usize {
        *self.count.borrow()
    }

    /// The request with this number, now or soon.
    pub async fn request(&self, number: usize) -> Seen {
        let mut count = self.count.clone();
        soon("a request at the provider", count.wait_for(|count| *count > number))
            .await
            .expect("the provider runs");
        self.requests()[number].clone()
    }

    /// Connections ever opened.
    pub fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    /// Bytes of floods the peers have taken.
    pub fn flooded(&self) -> u64 {
        self.flooded.load(Ordering::Relaxed)
    }

    /// Waits until this many connections are open.
    pub async fn connections_become(&self, wanted: impl Fn(usize) -> bool) {
        let mut open = self.open.clone();
        soon("connections at the provider", open.wait_for(|open| wanted(*open)))
            .await
            .expect("the provider runs");
    }
}

struct Shared {
    script: Box<Script>,
    seen: Arc<Mutex<Vec<Seen>>>,
    count: watch::Sender<usize>,
    open: watch::Sender<usize>,
    flooded: Arc<AtomicU64>,
}

impl Shared {
    async fn serve(&self, mut stream: TcpStream) {
        let _ = stream.set_nodelay(true);
        let mut buffer = Vec::new();
        while let Some((head, body)) = read_request(&mut stream, &mut buffer).await {
            let closed = watch::Sender::new(None);
            let seen = Seen { head, body, closed: closed.subscribe() };
            self.seen.lock().expect("no test panics with it").push(seen.clone());
            self.count.send_modify(|count| *count += 1);
            for step in (self.script)(&seen) {
                if !self.perform(&mut stream, step, &closed).await {
                    return;
                }
            }
        }
    }

    /// Performs one step while watching for the peer to leave; `false`: the connection is over.
    async fn perform(
        &self,
        stream: &mut TcpStream,
        step: Step,
        closed: &watch::Sender<Option<Instant>>,
    ) -> bool {
        let (closes, resets) = (matches!(step, Step::Close | Step::Reset), matches!(step, Step::Reset));
        let (mut read, mut write) = stream.split();
        let act = async {
            match step {
                Step::Send(bytes) => write.write_all(&bytes).await.is_ok(),
                Step::Bytewise(bytes) => {
                    for byte in bytes {
                        if write.write_all(&[byte]).await.is_err() {
                            return false;
                        }
                    }
                    true
                }
                Step::Flood(bytes) => {
                    while write.write_all(&bytes).await.is_ok() {
                        self.flooded.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    }
                    false
                }
                Step::Wait(gate) => {
                    gate.pass().await;
                    true
                }
                Step::Pause(pause) => {
                    tokio::time::sleep(pause).await;
                    true
                }
                Step::Hang => std::future::pending().await,
                Step::Close => false,
                Step::Reset => false,
            }
        };
        // Nothing is pipelined by the gateway, so whatever can be read here is its end.
        let left = async {
            let mut byte = [0];
            let _ = read.read(&mut byte).await;
            closed.send_replace(Some(Instant::now()));
        };
        let goes_on = tokio::select! {
            biased;
            () = left => false,
            goes_on = act => goes_on,
        };
        if !goes_on && !closes {
            // A write may notice before the read does.
            closed.send_if_modified(|when| when.replace(when.unwrap_or_else(Instant::now)).is_none());
        }
        if resets {
            let _ = stream.set_zero_linger();
        }
        goes_on
    }
}

async fn read_request(stream: &mut TcpStream, buffer: &mut Vec<u8>) -> Option<(String, Vec<u8>)> {
    let end = loop {
        if let Some(end) = find(buffer, b"\r\n\r\n") {
            break end + 4;
        }
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    };
    let head = String::from_utf8(buffer.drain(..end).collect()).ok()?;
    let length = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim())
    });
    let length: usize = length.map_or(0, |length| length.parse().expect("a length"));
    while buffer.len() < length {
        if stream.read_buf(buffer).await.ok()? == 0 {
            return None;
        }
    }
    Some((head, buffer.drain(..length).collect()))
}

/// An address that refuses connections for as long as the socket lives.
pub fn refusing() -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    let address = socket.local_addr().expect("its address");
    (socket, address)
}

/// An address that never completes a connection for as long as the returned sockets live: its backlog is full.
pub async fn blackhole() -> (TcpListener, Vec<TcpStream>, SocketAddr) {
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.bind(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
    let listener = socket.listen(0).expect("a listener");
    let address = listener.local_addr().expect("its address");
    let mut waiting = Vec::new();
    // Full when a further connection is not made at once; loopback needs no time.
    while let Ok(connected) =
        tokio::time::timeout(Duration::from_millis(100), TcpStream::connect(address)).await
    {
        waiting.push(connected.expect("a connection"));
        assert!(waiting.len() < 64, "the backlog does not fill");
    }
    (listener, waiting, address)
}

/// One chunk of a chunked body; empty bytes make the last one.
pub fn chunk(bytes: &[u8]) -> Vec<u8> {
    let size = format!("{:x}\r\n", bytes.len());
    [size.as_bytes(), bytes, b"\r\n"].concat()
}

/// A whole JSON answer.
pub fn json_answer(status: &str, headers: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{headers}content-length: {length}\r\n\r\n{body}")
        .into_bytes()
}

/// Pieces of event streams.
pub mod sse {
    use super::chunk;

    pub const DONE: &str = "data: [DONE]\n\n";

    /// The head of a chunked event stream.
    pub fn head() -> Vec<u8> {
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec()
    }

    /// An event with one piece of an answer.
    pub fn delta(text: &str) -> String {
        let text = serde_json::Value::from(text);
        format!(
            "data: {{\"id\":\"c-1\",\"object\":\"chat.completion.chunk\",\"choices\":[{{\"index\":0,\"delta\":\
             {{\"content\":{text}}},\"finish_reason\":null}}],\"usage\":null}}\n\n"
        )
    }

    /// The event that reports usage and nothing else.
    pub fn usage(prompt: u64, completion: u64) -> String {
        format!(
            "data: {{\"id\":\"c-1\",\"object\":\"chat.completion.chunk\",\"choices\":[],\"usage\":{{\"prompt_tokens\":\
             {prompt},\"completion_tokens\":{completion},\"total_tokens\":{}}}}}\n\n",
            prompt + completion
        )
    }

    /// Head, these events in a chunk each, end.
    pub fn whole(events: &[&str]) -> Vec<u8> {
        let mut bytes = head();
        for event in events {
            bytes.extend(chunk(event.as_bytes()));
        }
        bytes.extend(chunk(b""));
        bytes
    }
}
