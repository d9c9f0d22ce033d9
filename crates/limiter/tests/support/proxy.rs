//! Between a store and its server: connections that from one moment on swallow everything.
#![allow(dead_code)] // each test file uses its own part
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};

pub(crate) struct Proxy {
    port: u16,
    made: Arc<AtomicUsize>,
    /// Connections before this one are black holes.
    swallowed: Arc<AtomicUsize>,
    /// How long answers are held back, in milliseconds.
    delay: Arc<AtomicU64>,
}

impl Proxy {
    pub(crate) async fn start(server: PathBuf) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (made, swallowed) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let delay = Arc::new(AtomicU64::new(0));
        let (to_make, to_swallow, held) = (Arc::clone(&made), Arc::clone(&swallowed), Arc::clone(&delay));
        let proxy = Proxy { port, made: to_make, swallowed: to_swallow, delay: held };
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = made.fetch_add(1, Ordering::SeqCst);
                let Ok(server) = UnixStream::connect(&server).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) =
                    (client.into_split(), server.into_split());
                tokio::spawn(pass(from_client, to_server, number, Arc::clone(&swallowed), Arc::default()));
                let delay = Arc::clone(&delay);
                tokio::spawn(pass(from_server, to_client, number, Arc::clone(&swallowed), delay));
            }
        });
        proxy
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// From now on every answer comes so much later.
    pub(crate) fn delay(&self, delay: Duration) {
        self.delay.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Makes black holes of all connections there are.
    pub(crate) fn swallow(&self) {
        self.swallowed.store(self.made.load(Ordering::SeqCst), Ordering::SeqCst);
    }
}

async fn pass(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    number: usize,
    swallowed: Arc<AtomicUsize>,
    delay: Arc<AtomicU64>,
) {
    let mut bytes = vec![0; 65_536];
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        let delay = delay.load(Ordering::SeqCst);
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
        if number >= swallowed.load(Ordering::SeqCst) && to.write_all(&bytes[..length]).await.is_err() {
            return;
        }
    }
}
