//! One multiplexed connection, with a deadline and a watchdog of its own.
//!
//! The client's own timeout does not cover waiting for a connection, and it never replaces a connection that swallows
//! everything: the deadline is outside it, and three timeouts in a row bring a new connection beside the old one.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use ::redis::aio::MultiplexedConnection;
use ::redis::{AsyncConnectionConfig, Client, Cmd, RedisError, Value};
use tokio::runtime::Handle;
use tokio::sync::{Mutex, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::scripts::{Name, Scripts};
use crate::store::StoreError;

/// Timeouts in a row after which a connection is given up.
const TIMEOUTS_MAX: u32 = 3;
/// How long a new connection may take to be made and to answer.
const CONNECT_DEADLINE: Duration = Duration::from_millis(500);
/// Between attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// How often a script that the server forgot again and again is asked for by its digest.
const DIGEST_ATTEMPTS: usize = 3;
/// The first version that reads the flags of a script.
const FLAGS_SINCE: u32 = 7;

/// Asks one server. Clones share the connection.
#[derive(Clone)]
pub(super) struct Connection(Arc<Shared>);

struct Shared {
    client: Client,
    deadline: Duration,
    scripts: Scripts,
    runtime: Handle,
    current: watch::Sender<Option<Arc<Link>>>,
    connecting: AtomicBool,
    made: AtomicU64,
}

/// One connection that was made.
struct Link {
    connection: MultiplexedConnection,
    reads_flags: bool,
    timeouts: AtomicU32,
    loads: [Load; 3],
}

/// Whoever first learns that the server does not know a script sends its text; the others wait for that.
#[derive(Default)]
struct Load {
    turn: Mutex<()>,
    count: AtomicU64,
}

impl Connection {
    /// Connects in the background.
    pub(super) fn new(client: Client, deadline: Duration, scripts: Scripts, runtime: Handle) -> Connection {
        let shared = Shared {
            client,
            deadline,
            scripts,
            runtime,
            current: watch::Sender::new(None),
            connecting: AtomicBool::new(false),
            made: AtomicU64::new(0),
        };
        let connection = Connection(Arc::new(shared));
        connection.0.reconnect();
        connection
    }

    /// How many connections have been made so far.
    pub(super) fn made(&self) -> u64 {
        self.0.made.load(Ordering::Relaxed)
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.0.runtime
    }

    /// Runs a script.
    pub(super) async fn charge(&self, keys: &[String], args: &[&[u8]]) -> Result<Value, StoreError> {
        self.within_deadline(async |link| link.run(&self.0.scripts, Name::Charge, keys, args).await).await
    }

    /// Runs a script that gets through when the server is out of memory, where the server has that.
    pub(super) async fn settle(&self, keys: &[String], args: &[&[u8]]) -> Result<Value, StoreError> {
        self.within_deadline(async |link| {
            let name = if link.reads_flags { Name::SettleAllowOom } else { Name::Settle };
            link.run(&self.0.scripts, name, keys, args).await
        })
        .await
    }

    /// Sends a command.
    pub(super) async fn command(&self, command: &Cmd) -> Result<Value, StoreError> {
        self.within_deadline(async |link| link.send(command).await).await
    }

    async fn within_deadline(
        &self,
        ask: impl AsyncFnOnce(&Link) -> Result<Value, RedisError>,
    ) -> Result<Value, StoreError> {
        let deadline = Instant::now() + self.0.deadline;
        let link = timeout_at(deadline, self.0.link()).await.map_err(|_| StoreError::Unreachable)?;
        match timeout_at(deadline, ask(&link)).await {
            Ok(Ok(value)) => {
                link.timeouts.store(0, Ordering::Relaxed);
                Ok(value)
            }
            Ok(Err(error)) if error.is_io_error() || error.is_unrecoverable_error() => {
                self.0.lost(&link);
                Err(StoreError::Lost)
            }
            Ok(Err(error)) => {
                link.timeouts.store(0, Ordering::Relaxed);
                Err(refused(&error))
            }
            Err(_) => {
                if link.timeouts.fetch_add(1, Ordering::Relaxed) + 1 >= TIMEOUTS_MAX
                    && self.0.is_current(&link)
                {
                    self.0.reconnect();
                }
                Err(StoreError::Timeout)
            }
        }
    }
}

impl Shared {
    /// The connection; when there is none that answers, the one that is being made. A question to a connection that
    /// swallows everything would only have an unknown outcome.
    async fn link(self: &Arc<Shared>) -> Arc<Link> {
        let mut current = self.current.subscribe();
        loop {
            let found = current.borrow_and_update().clone();
            if let Some(link) = found.filter(|link| link.timeouts.load(Ordering::Relaxed) < TIMEOUTS_MAX) {
                return link;
            }
            self.reconnect();
            if current.changed().await.is_err() {
                // The sender is a field of `self`: it outlives this.
                std::future::pending::<()>().await;
            }
        }
    }

    fn is_current(&self, link: &Arc<Link>) -> bool {
        self.current.borrow().as_ref().is_some_and(|current| Arc::ptr_eq(current, link))
    }

    /// Lets go of a broken connection.
    fn lost(self: &Arc<Shared>, link: &Arc<Link>) {
        let dropped = self.current.send_if_modified(|current| {
            let broken = current.as_ref().is_some_and(|current| Arc::ptr_eq(current, link));
            if broken {
                *current = None;
            }
            broken
        });
        if dropped {
            self.reconnect();
        }
    }

    /// Makes a new connection in the background, unless one is being made. The old one serves until then.
    fn reconnect(self: &Arc<Shared>) {
        if self.connecting.swap(true, Ordering::AcqRel) {
            return;
        }
        self.runtime.spawn(keep_connecting(Arc::downgrade(self)));
    }
}

/// Ends when there is a connection, or nobody who wants one.
async fn keep_connecting(shared: Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let made = timeout(CONNECT_DEADLINE, Link::connect(&shared.client)).await;
        if let Ok(Ok(link)) = made {
            shared.made.fetch_add(1, Ordering::Relaxed);
            shared.current.send_replace(Some(Arc::new(link)));
            shared.connecting.store(false, Ordering::Release);
            return;
        }
        drop(shared);
        sleep(CONNECT_PAUSE).await;
    }
}

impl Link {
    /// Connects, and waits for a first answer: the version.
    async fn connect(client: &Client) -> Result<Link, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_DEADLINE))
            .set_response_timeout(None);
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await?;
        let about: String = ::redis::cmd("INFO").arg("server").query_async(&mut connection).await?;
        let version = about.lines().find_map(|line| line.strip_prefix("redis_version:"));
        let major = version.and_then(|version| version.split('.').next()?.parse::<u32>().ok());
        Ok(Link {
            connection,
            reads_flags: major.is_some_and(|major| major >= FLAGS_SINCE),
            timeouts: AtomicU32::new(0),
            loads: Default::default(),
        })
    }

    async fn send(&self, command: &Cmd) -> Result<Value, RedisError> {
        command.query_async(&mut self.connection.clone()).await
    }

    /// By digest; when the server does not know it, one caller sends the text and the others ask again. What the
    /// server did not know it did not do, so asking again is safe.
    async fn run(
        &self,
        scripts: &Scripts,
        name: Name,
        keys: &[String],
        args: &[&[u8]],
    ) -> Result<Value, RedisError> {
        let (script, load) = (scripts.get(name), &self.loads[name as usize]);
        let call = |how: &str, what: &str| {
            let mut command = ::redis::cmd(how);
            command.arg(what).arg(keys.len()).arg(keys).arg(args);
            command
        };
        let by_digest = call("EVALSHA", &script.digest);
        for _ in 0..DIGEST_ATTEMPTS {
            let loads = load.count.load(Ordering::Acquire);
            match self.send(&by_digest).await {
                Err(error) if error.code() == Some("NOSCRIPT") => {}
                answer => return answer,
            }
            let turn = load.turn.lock().await;
            if load.count.load(Ordering::Acquire) == loads {
                let answer = self.send(&call("EVAL", &script.text)).await;
                load.count.fetch_add(1, Ordering::Release);
                drop(turn);
                return answer;
            }
        }
        self.send(&call("EVAL", &script.text)).await
    }
}

fn refused(error: &RedisError) -> StoreError {
    let message = error.detail().map_or_else(|| error.to_string(), str::to_string);
    let code = error.code().unwrap_or("ERR");
    // Before 7.0 what stopped a script is only named in its words: `@user_script:231: -OOM command not allowed`.
    let inner = message.split_once(": -").and_then(|(_, inner)| inner.split_whitespace().next());
    let inner = inner.filter(|inner| inner.chars().all(|c| c.is_ascii_uppercase()));
    let code = if code == "ERR" { inner.unwrap_or(code) } else { code }.to_string();
    StoreError::Refused { code, message }
}
