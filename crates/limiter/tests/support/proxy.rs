//! Between a store and its server: connections that from one moment on swallow everything.
#![allow(dead_code)] // each test file uses its own part
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::watch;

pub(crate) struct Proxy {
    port: u16,
    made: Arc<AtomicUsize>,
    /// Connections before this one are black holes.
    swallowed: Arc<AtomicUsize>,
    /// After so many more answers, all are. 0: never.
    answers: Arc<AtomicUsize>,
    /// How long answers are held back.
    delay: watch::Sender<Duration>,
}

impl Proxy {
    pub(crate) async fn start(server: PathBuf) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (made, swallowed) = (Arc::default(), Arc::default());
        let answers = Arc::default();
        let (delay, held) = watch::channel(Duration::ZERO);
        let proxy = Proxy { port, made, swallowed, answers, delay };
        let (made, swallowed) = (Arc::clone(&proxy.made), Arc::clone(&proxy.swallowed));
        let answers = Arc::clone(&proxy.answers);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = made.fetch_add(1, Ordering::SeqCst);
                let Ok(server) = UnixStream::connect(&server).await else { continue };
                let ((from_client, to_client), (from_server, to_server)) =
                    (client.into_split(), server.into_split());
                let (_, at_once) = watch::channel(Duration::ZERO);
                let (made, left) = (Arc::clone(&made), Arc::clone(&answers));
                let counted = swallowed.clone();
                let answered = move || {
                    let last =
                        left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
                    if last == Ok(1) {
                        counted.store(made.load(Ordering::SeqCst), Ordering::SeqCst);
                    }
                };
                tokio::spawn(pass(from_client, to_server, number, Arc::clone(&swallowed), at_once, || {}));
                let (swallowed, held) = (Arc::clone(&swallowed), held.clone());
                tokio::spawn(pass(from_server, to_client, number, swallowed, held, answered));
            }
        });
        proxy
    }

    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// From now on every answer comes so much later. Those held back already come at once.
    pub(crate) fn delay(&self, delay: Duration) {
        self.delay.send_replace(delay);
    }

    /// Makes black holes of all connections there are, once so many more answers have come.
    pub(crate) fn swallow_after(&self, answers: usize) {
        self.answers.store(answers, Ordering::SeqCst);
    }

    /// Makes black holes of all connections there are and will be, until [`Proxy::swallow`].
    pub(crate) fn partition(&self) {
        self.swallowed.store(usize::MAX, Ordering::SeqCst);
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
    mut delay: watch::Receiver<Duration>,
    passed: impl Fn(),
) {
    let mut bytes = vec![0; 65_536];
    while let Ok(length @ 1..) = from.read(&mut bytes).await {
        let held = *delay.borrow_and_update();
        if held > Duration::ZERO {
            // Until then, or until that changes.
            let _ = tokio::time::timeout(held, delay.changed()).await;
        }
        if number >= swallowed.load(Ordering::SeqCst) {
            if to.write_all(&bytes[..length]).await.is_err() {
                return;
            }
            passed();
        }
    }
}
