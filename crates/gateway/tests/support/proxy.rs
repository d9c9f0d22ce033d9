//! Between gateways and a server: connections that are slow, swallow everything, or break.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// Pieces under way in one direction of one connection; then its sender waits.
const UNDER_WAY_MAX: usize = 1_024;

/// A listener that passes on what it is sent, as well as it is told to.
pub struct Proxy {
    /// Where gateways connect.
    pub address: SocketAddr,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    /// Connections ever made.
    made: AtomicUsize,
    /// Connections before this one are black holes.
    swallowed: AtomicUsize,
    /// All of them are.
    partitioned: AtomicBool,
    /// How much later answers come, in milliseconds.
    delay: AtomicU64,
    /// Counts the times all connections were reset.
    resets: watch::Sender<u64>,
}

impl Faults {
    fn passes(&self, number: usize) -> bool {
        number >= self.swallowed.load(Ordering::SeqCst) && !self.partitioned.load(Ordering::SeqCst)
    }
}

impl Proxy {
    /// One in front of `server`; without faults until told of them.
    pub async fn start(server: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let faults = Arc::<Faults>::default();
        let shared = faults.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connect(client, server, shared.clone()));
            }
        });
        Self { address, faults }
    }

    /// How a configuration names it.
    pub fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }

    /// From now on every answer comes so much later.
    pub fn delay(&self, delay: Duration) {
        self.faults.delay.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Makes black holes of all connections there are; new ones are well.
    pub fn swallow(&self) {
        self.faults.swallowed.store(self.faults.made.load(Ordering::SeqCst), Ordering::SeqCst);
    }

    /// Makes black holes of all connections, new ones too, or ends that.
    pub fn partition(&self, on: bool) {
        self.faults.partitioned.store(on, Ordering::SeqCst);
    }

    /// Resets all connections there are.
    pub fn reset(&self) {
        self.faults.resets.send_modify(|resets| *resets += 1);
    }
}

/// Passes on a connection until one side ends it, or all are reset.
async fn connect(mut client: TcpStream, server: SocketAddr, faults: Arc<Faults>) {
    let number = faults.made.fetch_add(1, Ordering::SeqCst);
    let mut resets = faults.resets.subscribe();
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    for stream in [&client, &server] {
        let _ = stream.set_nodelay(true);
    }
    let reset = {
        let ((from_client, to_client), (from_server, to_server)) = (client.split(), server.split());
        tokio::select! {
            () = pass(from_client, to_server, number, &faults, false) => false,
            () = pass(from_server, to_client, number, &faults, true) => false,
            _ = resets.changed() => true,
        }
    };
    if reset {
        let _ = client.set_zero_linger();
    }
}

/// One direction of a connection. Answers are held back each for itself: a slow way is no narrow one.
async fn pass(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>, number: usize, faults: &Faults, answers: bool) {
    let (send, mut under_way) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY_MAX);
    let read = async move {
        let mut bytes = vec![0; 65_536];
        while let Ok(length @ 1..) = from.read(&mut bytes).await {
            let delay = if answers { faults.delay.load(Ordering::SeqCst) } else { 0 };
            let due = Instant::now() + Duration::from_millis(delay);
            if send.send((due, bytes[..length].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let write = async {
        while let Some((due, bytes)) = under_way.recv().await {
            if due > Instant::now() {
                tokio::time::sleep_until(due).await;
            }
            if faults.passes(number) && to.write_all(&bytes).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(read, write);
}
