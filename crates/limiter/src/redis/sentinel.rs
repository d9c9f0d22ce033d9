//! Who the master is, as the sentinels say: each is asked every second, and tells by itself when that changes.
//! <https://redis.io/docs/latest/develop/reference/sentinel-clients/>

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::{Duration, Instant};

use ::redis::{AsyncConnectionConfig, ProtocolVersion, RedisConnectionInfo, RedisError, Value};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::address::Endpoint;
use super::dial::{Dialer, Socket};

/// How often a sentinel is asked.
const POLL_PERIOD: Duration = Duration::from_secs(1);
/// How long it may take to answer.
const ANSWER_DEADLINE: Duration = Duration::from_millis(500);
/// Between attempts to reach one.
const PAUSE: Duration = Duration::from_millis(250);
/// What a sentinel said longer ago counts only while no other one has said anything since.
const OLD: Duration = Duration::from_secs(5);

/// Asks sentinels in the background, until dropped.
pub(super) struct Sentinels {
    council: Arc<Council>,
    /// Ends with it.
    _watchers: JoinSet<()>,
}

struct Council {
    name: String,
    /// One per sentinel.
    opinions: Mutex<Vec<Result<Opinion, String>>>,
    master: watch::Sender<Option<Endpoint>>,
    asked: watch::Sender<u64>,
}

/// What one sentinel said.
#[derive(Clone)]
struct Opinion {
    /// Grows with every failover.
    epoch: u64,
    master: Endpoint,
    at: Instant,
}

impl Sentinels {
    /// `dialer` and `login` reach the sentinels.
    pub(super) fn new(
        dialer: &Dialer,
        login: &RedisConnectionInfo,
        sentinels: &[Endpoint],
        name: &str,
    ) -> Sentinels {
        let unheard = |sentinel: &Endpoint| Err(format!("{sentinel}: not asked yet"));
        let council = Arc::new(Council {
            name: name.to_string(),
            opinions: Mutex::new(sentinels.iter().map(unheard).collect()),
            master: watch::Sender::new(None),
            asked: watch::Sender::new(0),
        });
        let mut watchers = JoinSet::new();
        for (index, sentinel) in sentinels.iter().enumerate() {
            let watcher = Watcher {
                council: Arc::clone(&council),
                index,
                sentinel: sentinel.clone(),
                dialer: dialer.clone(),
                login: login.clone().set_protocol(ProtocolVersion::RESP3),
            };
            watchers.spawn_on(watcher.keep_watching(), &dialer.runtime);
        }
        Sentinels { council, _watchers: watchers }
    }

    /// The master, or why none is known.
    pub(super) fn known(&self) -> Result<Endpoint, String> {
        if let Some(master) = self.council.master.borrow().clone() {
            return Ok(master);
        }
        let opinions = self.council.opinions.lock().unwrap_or_else(PoisonError::into_inner);
        let problems: Vec<&str> =
            opinions.iter().filter_map(|opinion| Some(opinion.as_ref().err()?.as_str())).collect();
        Err(format!("no sentinel names a master: {}", problems.join("; ")))
    }

    /// The master as it changes.
    pub(super) fn master(&self) -> watch::Receiver<Option<Endpoint>> {
        self.council.master.subscribe()
    }

    /// Asks every sentinel, without waiting for its turn.
    pub(super) fn ask_now(&self) {
        self.council.asked.send_modify(|times| *times = times.wrapping_add(1));
    }

    /// Does something as long as this one is the master.
    pub(super) async fn unless_moved<T>(
        &self,
        master: &Endpoint,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        let mut named = self.master();
        let moved = async { named.wait_for(|named| named.as_ref() != Some(master)).await.is_ok() };
        let (mut work, mut moved) = (pin!(work), pin!(moved));
        poll_fn(|context| match work.as_mut().poll(context) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending => moved.as_mut().poll(context).map(|_| None),
        })
        .await
    }
}

impl Council {
    /// Notes what a sentinel said. The one that knows of the latest failover is believed.
    fn hear(&self, index: usize, opinion: Result<Opinion, String>) {
        let mut opinions = self.opinions.lock().unwrap_or_else(PoisonError::into_inner);
        match (&mut opinions[index], opinion) {
            // One that cannot be reached has not changed its mind.
            (Ok(_), Err(_)) => {}
            (place, opinion) => *place = opinion,
        }
        let given = || opinions.iter().flatten();
        let Some(latest) = given().map(|opinion| opinion.at).max() else {
            return;
        };
        let fresh = given().filter(|opinion| latest.duration_since(opinion.at) < OLD);
        let Some(believed) = fresh.max_by_key(|opinion| opinion.epoch) else {
            return;
        };
        self.master.send_if_modified(|master| {
            let changed = master.as_ref() != Some(&believed.master);
            if changed {
                *master = Some(believed.master.clone());
            }
            changed
        });
    }
}

/// Asks one sentinel.
struct Watcher {
    council: Arc<Council>,
    index: usize,
    sentinel: Endpoint,
    dialer: Dialer,
    login: RedisConnectionInfo,
}

impl Watcher {
    async fn keep_watching(self) {
        loop {
            let Err(problem) = self.watch().await;
            self.council.hear(self.index, Err(format!("{}: {problem}", self.sentinel)));
            sleep(PAUSE).await;
        }
    }

    /// As long as the connection lasts.
    async fn watch(&self) -> Result<Infallible, String> {
        let (push, mut pushed) = mpsc::unbounded_channel();
        let config = AsyncConnectionConfig::new().set_push_sender(push);
        let told = |error: RedisError| error.to_string();
        let mut socket = self.dialer.dial(&self.sentinel, &self.login, config).await.map_err(told)?;
        let subscribed = timeout(ANSWER_DEADLINE, socket.connection.subscribe("+switch-master")).await;
        subscribed.map_err(|_| "no answer in time")?.map_err(told)?;
        let mut asked = self.council.asked.subscribe();
        loop {
            let opinion = timeout(ANSWER_DEADLINE, self.ask(&mut socket)).await;
            self.council.hear(self.index, Ok(opinion.map_err(|_| "no answer in time")??));
            let (mut pushed, mut asked) = (pin!(pushed.recv()), pin!(asked.changed()));
            let told = poll_fn(|context| {
                let (pushed, asked) = (pushed.as_mut().poll(context), asked.as_mut().poll(context));
                if pushed.is_ready() || asked.is_ready() { Poll::Ready(()) } else { Poll::Pending }
            });
            // Told or not: it is asked again.
            let _ = timeout(POLL_PERIOD, told).await;
        }
    }

    async fn ask(&self, socket: &mut Socket) -> Result<Opinion, String> {
        let name = &self.council.name;
        let told = |error: RedisError| error.to_string();
        let by_name = ::redis::cmd("SENTINEL").arg("get-master-addr-by-name").arg(name).clone();
        let found: Value = by_name.query_async(&mut socket.connection).await.map_err(told)?;
        let found: Option<(String, u16)> = ::redis::from_redis_value(found).map_err(|e| e.to_string())?;
        let (host, port) = found.ok_or_else(|| format!("it knows no master named `{name}`"))?;
        // More than some sentinels tell everybody. Unknown epochs are equal.
        let more = ::redis::cmd("SENTINEL").arg("master").arg(name).clone();
        let epoch = match more.query_async::<Value>(&mut socket.connection).await {
            Ok(more) => epoch(more).unwrap_or(0),
            Err(error) if error.is_io_error() || error.is_unrecoverable_error() => return Err(told(error)),
            Err(_) => 0,
        };
        Ok(Opinion { epoch, master: Endpoint::Tcp(host, port), at: Instant::now() })
    }
}

fn epoch(about: Value) -> Option<u64> {
    let about: std::collections::HashMap<String, String> = ::redis::from_redis_value(about).ok()?;
    about.get("config-epoch")?.parse().ok()
}
