//! A real redis-server on a unix socket in a folder of its own, gone when dropped.
#![allow(dead_code)] // each test file uses its own part
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use redis::aio::MultiplexedConnection;
use tollgate_limiter::{RedisOptions, RedisStore, Store, StoreError, Subject};

static FOLDERS: AtomicU32 = AtomicU32::new(0);

pub(crate) struct Server {
    process: Child,
    folder: PathBuf,
    more: Vec<String>,
}

impl Server {
    pub(crate) fn start() -> Server {
        Server::start_with(&[])
    }

    pub(crate) fn start_with(more: &[&str]) -> Server {
        let number = FOLDERS.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("limiter-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let more: Vec<String> = more.iter().map(|option| option.to_string()).collect();
        Server { process: run(&folder, &more), folder, more }
    }

    /// A folder with nobody in it: the server starts with [`Server::again`].
    pub(crate) fn absent() -> Server {
        let mut server = Server::start();
        server.crash();
        server
    }

    /// Ends the process as a crash would, with all it knew.
    pub(crate) fn crash(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Starts it once more, after a crash.
    pub(crate) fn again(&mut self) {
        self.process = run(&self.folder, &self.more);
    }

    pub(crate) fn url(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.folder.join("redis.sock")
    }

    pub(crate) fn id(&self) -> u32 {
        self.process.id()
    }

    /// Sends the process a signal: `STOP`, `CONT`. After `STOP` it does nothing any more.
    pub(crate) fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(format!("-{signal}")).arg(self.id().to_string()).status();
        assert!(sent.unwrap().success());
        let stopped = || {
            let about = std::fs::read_to_string(format!("/proc/{}/stat", self.id())).unwrap();
            about.rsplit_once(") ").unwrap().1.starts_with('T')
        };
        while signal == "STOP" && !stopped() {
            std::thread::yield_now();
        }
    }

    /// A connection of the test's own; waits until the server answers.
    pub(crate) async fn client(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        let start = Instant::now();
        loop {
            match client.get_multiplexed_async_connection().await {
                Ok(connection) => return connection,
                Err(error) if start.elapsed().as_secs() > 20 => {
                    panic!("redis-server does not answer: {error}")
                }
                Err(_) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
            }
        }
    }

    /// Options with a deadline that a busy machine keeps.
    pub(crate) fn options(&self) -> RedisOptions {
        RedisOptions::new(&self.url()).deadline(std::time::Duration::from_secs(10))
    }

    /// A store that is connected.
    pub(crate) async fn store(&self, options: RedisOptions) -> RedisStore {
        self.client().await;
        let store = RedisStore::open(options).unwrap();
        let nobody: Subject = "user:nobody".parse().unwrap();
        while store.clear(&nobody).await == Err(StoreError::Unreachable) {}
        store
    }
}

fn run(folder: &Path, more: &[String]) -> Child {
    Command::new("redis-server")
        .args(["--port", "0", "--save", "", "--appendonly", "no", "--unixsocket", "redis.sock", "--dir"])
        .arg(folder)
        .args(more)
        .current_dir(folder)
        .stdout(Stdio::null())
        .stdin(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("redis-server is needed for this test: {error}"))
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}
