//! The servers of a store, whatever their number, as one that is asked within a deadline.

use std::pin::pin;
use std::sync::{Arc, PoisonError, RwLock, Weak};
use std::time::Duration;

use ::redis::{Cmd, RedisConnectionInfo, Value};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::address::{Address, Servers};
use super::cluster::Cluster;
use super::dial::Dialer;
use super::lanes::Lanes;
use super::link::{Overdue, Question, Said, Slot};
use super::node::{Ground, Node, Target};
use super::scripts::Scripts;
use super::sentinel::Sentinels;
use super::status::{ServerInfo, Status, Topology};
use crate::store::StoreError;

/// Between two questions that only keep a connection alive.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// When a server that waits for a replica should have answered, and between reminders.
const ANSWER_PATIENCE: Duration = Duration::from_millis(22);
const NUDGE_PAUSE: Duration = Duration::from_millis(5);

/// Asks the server that a key is on.
pub(super) struct Connection {
    address: Address,
    deadline: Duration,
    topology: Topology,
    /// What was asked for, without a password.
    asked_for: String,
    home: Arc<Lane>,
    /// Of runtimes that joined, each once.
    lanes: RwLock<Vec<Arc<Lane>>>,
    /// For what waits for replicas: nobody else waits with it.
    replicated: Lanes,
}

/// Connections driven by one runtime, for those who ask there.
struct Lane {
    ground: Arc<Ground>,
    servers: Way,
}

pub(super) enum Way {
    One(Node),
    Cluster(Cluster),
}

impl Way {
    /// Connects in the background.
    pub(super) fn new(ground: &Arc<Ground>, servers: Servers, sentinel_login: &RedisConnectionInfo) -> Way {
        match servers {
            Servers::Single(endpoint) => Way::One(Node::new(ground, Target::Named(endpoint))),
            Servers::Sentinel { sentinels, master } => {
                let sentinels = Sentinels::new(&ground.dialer, sentinel_login, &sentinels, &master);
                Way::One(Node::new(ground, Target::Elected(sentinels)))
            }
            Servers::Cluster(seeds) => Way::Cluster(Cluster::new(ground, seeds)),
        }
    }

    /// The keys are all in one slot.
    pub(super) async fn ask(
        &self,
        until: Instant,
        keys: &[String],
        question: Question<'_>,
    ) -> Result<Said, StoreError> {
        match self {
            Way::One(node) => node.ask(until, question, Slot::Owned).await,
            Way::Cluster(cluster) => {
                let key = keys.first().map_or("", String::as_str);
                cluster.ask(super::cluster::slot(key), until, question).await
            }
        }
    }
}

impl Connection {
    /// Connects in the background.
    pub(super) fn new(address: Address, dialer: Dialer, scripts: Scripts, deadline: Duration) -> Connection {
        let list = |endpoints: &[super::address::Endpoint]| -> String {
            endpoints.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
        };
        let (topology, asked_for) = match &address.servers {
            Servers::Single(endpoint) => (Topology::Single, endpoint.to_string()),
            Servers::Sentinel { sentinels, master } => {
                (Topology::Sentinel, format!("{}/{master}", list(sentinels)))
            }
            Servers::Cluster(seeds) => (Topology::Cluster, list(seeds)),
        };
        let ground = Arc::new(Ground {
            dialer,
            login: address.login.clone(),
            scripts: Arc::new(scripts),
            made: watch::Sender::new(0),
            alone: true,
            masters: watch::Sender::new(0),
            began: std::time::Instant::now(),
        });
        let replicated = Lanes::new(address.servers.clone(), address.sentinel_login.clone());
        let home = Arc::new(Lane::new(&address, ground));
        Connection { address, deadline, topology, asked_for, home, lanes: RwLock::default(), replicated }
    }

    /// How many connections have been made so far.
    pub(super) fn made(&self) -> u64 {
        *self.home.ground.made.borrow()
    }

    /// Counts the connections that were made.
    pub(super) fn connections(&self) -> watch::Receiver<u64> {
        self.home.ground.made.subscribe()
    }

    /// Asks for nothing on the connections that others than the first runtime drive: those that do not answer are given
    /// up, and the first one helps out.
    pub(super) async fn check_lanes(&self) {
        let lanes = self.lanes.read().unwrap_or_else(PoisonError::into_inner).clone();
        let until = Instant::now() + self.deadline;
        let check = |lane: Arc<Lane>| {
            self.runtime().spawn(async move {
                if let Way::One(node) = &lane.servers {
                    node.check(until).await;
                }
            })
        };
        for checked in lanes.into_iter().map(check).collect::<Vec<_>>() {
            // Whatever became of it, the others are to be checked.
            let _ = checked.await;
        }
    }

    pub(super) fn masters_changed(&self) -> watch::Receiver<u64> {
        self.home.ground.masters.subscribe()
    }

    /// The runtime that outlives the others.
    pub(super) fn runtime(&self) -> &Handle {
        &self.home.ground.dialer.runtime
    }

    /// The runtime that drives what is asked here, and a number that tells it from others.
    pub(super) fn here(&self) -> (usize, Handle) {
        let lane = self.lane();
        (Arc::as_ptr(&lane).addr(), lane.ground.dialer.runtime.clone())
    }

    /// From now on the runtime this is called in has connections of its own.
    pub(super) fn join(&self) {
        let Ok(runtime) = Handle::try_current() else { return };
        let mut lanes = self.lanes.write().unwrap_or_else(PoisonError::into_inner);
        let known = std::iter::once(&self.home).chain(&*lanes).any(|lane| lane.is_of(&runtime));
        if !known {
            // Which servers of a cluster the first one reaches says nothing of those that this one would ask.
            let ground = Arc::new(self.home.ground.beside(runtime.clone(), self.is_cluster()));
            let lane = Arc::new(Lane::new(&self.address, ground));
            drop(runtime.spawn(keep_alive(Arc::downgrade(&lane), self.deadline)));
            lanes.push(lane);
        }
    }

    /// There is one runtime again.
    pub(super) fn leave(&self) {
        self.lanes.write().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// One that lost its connection is helped out by the first: it may never get another, when a server takes no more
    /// clients.
    fn lane(&self) -> Arc<Lane> {
        let lanes = self.lanes.read().unwrap_or_else(PoisonError::into_inner);
        let here = Handle::try_current().ok().filter(|_| !lanes.is_empty());
        let joined = here.and_then(|here| lanes.iter().find(|lane| lane.is_of(&here)));
        Arc::clone(joined.filter(|lane| lane.is_connected()).unwrap_or(&self.home))
    }

    /// Whether keys may be on different servers.
    pub(super) const fn is_cluster(&self) -> bool {
        matches!(self.topology, Topology::Cluster)
    }

    /// Whether the master of this key may answer, while others do: of one master, that is asked for.
    pub(super) fn reaches(&self, key: &str) -> bool {
        match &self.home.servers {
            Way::One(_) => true,
            Way::Cluster(cluster) => cluster.reaches(super::cluster::slot(key), self.deadline),
        }
    }

    /// Whether one of several masters has a connection that answers.
    pub(super) fn answers_in_part(&self) -> bool {
        match &self.home.servers {
            Way::One(_) => false,
            Way::Cluster(cluster) => cluster.known_masters().iter().any(|node| node.connected().is_some()),
        }
    }

    /// Runs the charging script.
    pub(super) async fn charge(
        &self,
        keys: &[String],
        args: &[&[u8]],
        overdue: Overdue<'_>,
    ) -> Result<Said, StoreError> {
        self.ask(keys, Question::Charge(keys, args, overdue)).await
    }

    /// Runs the charging script and waits for a replica, when it took something, on a connection of its own. Says how many
    /// have acknowledged it.
    pub(super) async fn charge_replicated(
        &self,
        keys: &[String],
        args: &[&[u8]],
        overdue: Overdue<'_>,
    ) -> Result<(Said, i64), StoreError> {
        let until = Instant::now() + self.deadline;
        let lane = self.replicated.idlest(&self.home.ground);
        let mut asked = pin!(lane.way.ask(until, keys, Question::ChargeReplicated(keys, args, overdue)));
        let (mut patience, ping) = (ANSWER_PATIENCE, ::redis::cmd("PING"));
        let answer = loop {
            if let Ok(answer) = timeout(patience, &mut asked).await {
                break answer;
            }
            if Instant::now() >= until {
                break asked.await;
            }
            patience = NUDGE_PAUSE;
            // A server with nothing else to do looks only ten times a second who has waited long enough. Whatever it
            // answers, it has looked.
            let _ = self.home.servers.ask(until, keys, Question::Command(&ping)).await;
        };
        let Said { value, history } = answer?;
        match value {
            Value::Array(mut both) => match (both.pop(), both.pop()) {
                (Some(Value::Int(acknowledged)), Some(value)) => Ok((Said { value, history }, acknowledged)),
                _ => Err(StoreError::Reply("not an answer and a count".into())),
            },
            _ => Err(StoreError::Reply("no list".into())),
        }
    }

    /// Runs the settling script, which gets through when the server is out of memory, where the server has that; if a
    /// history is given, only on the server of that.
    pub(super) async fn settle(
        &self,
        keys: &[String],
        args: &[&[u8]],
        only_in: Option<u32>,
    ) -> Result<Said, StoreError> {
        self.ask(keys, Question::Settle(keys, args, only_in)).await
    }

    /// Runs a script.
    pub(super) async fn heal(&self, keys: &[String], args: &[&[u8]]) -> Result<Said, StoreError> {
        self.ask(keys, Question::Heal(keys, args)).await
    }

    /// Sends a command about a key.
    pub(super) async fn command(&self, key: &String, command: &Cmd) -> Result<Value, StoreError> {
        Ok(self.ask(std::slice::from_ref(key), Question::Command(command)).await?.value)
    }

    /// The keys are all in one slot.
    async fn ask(&self, keys: &[String], question: Question<'_>) -> Result<Said, StoreError> {
        let until = Instant::now() + self.deadline;
        self.lane().servers.ask(until, keys, question).await
    }

    /// How long every master took to answer; the slowest counts.
    pub(super) async fn ping(&self) -> Result<Duration, StoreError> {
        let start = Instant::now();
        self.ask_all(&::redis::cmd("PING")).await?;
        Ok(start.elapsed())
    }

    /// What every master says of itself.
    pub(super) async fn info(&self) -> Result<ServerInfo, StoreError> {
        let mut all: Option<ServerInfo> = None;
        for answer in self.ask_all(&::redis::cmd("INFO")).await? {
            let Value::BulkString(text) = answer else {
                return Err(StoreError::Reply("INFO is no text".into()));
            };
            let info = ServerInfo::parse(&String::from_utf8_lossy(&text));
            all = Some(match all {
                None => info,
                Some(all) => all.and(info),
            });
        }
        Ok(all.unwrap_or_default())
    }

    /// Sends a command to the master of this number, and says whether there is one after it; `None`: there is no such.
    pub(super) async fn ask_one(
        &self,
        number: usize,
        command: &Cmd,
    ) -> Result<Option<(Value, bool)>, StoreError> {
        let until = Instant::now() + self.deadline;
        let nodes = match &self.home.servers {
            Way::One(node) => vec![node.clone()],
            Way::Cluster(cluster) => cluster.masters(until).await?,
        };
        let Some(node) = nodes.get(number).cloned() else { return Ok(None) };
        let command = command.clone();
        let asked = self
            .runtime()
            .spawn(async move { node.ask(until, Question::Command(&command), Slot::Owned).await });
        let answer = asked.await.map_err(|_| StoreError::Lost)??.value;
        Ok(Some((answer, number + 1 < nodes.len())))
    }

    async fn ask_all(&self, command: &Cmd) -> Result<Vec<Value>, StoreError> {
        let until = Instant::now() + self.deadline;
        let nodes = match &self.home.servers {
            Way::One(node) => vec![node.clone()],
            Way::Cluster(cluster) => cluster.masters(until).await?,
        };
        let ask = |node: Node| {
            let command = command.clone();
            self.runtime()
                .spawn(async move { node.ask(until, Question::Command(&command), Slot::Owned).await })
        };
        let asked: Vec<_> = nodes.into_iter().map(ask).collect();
        let mut answers = Vec::with_capacity(asked.len());
        for asked in asked {
            answers.push(asked.await.map_err(|_| StoreError::Lost)??.value);
        }
        Ok(answers)
    }

    pub(super) fn status(&self) -> Status {
        let (nodes, problem) = match &self.home.servers {
            Way::One(node) => (vec![node.clone()], None),
            Way::Cluster(cluster) => (cluster.known_masters(), cluster.problem()),
        };
        let links: Vec<_> = nodes.iter().map(Node::connected).collect();
        let connected = !links.is_empty() && links.iter().all(Option::is_some);
        let lately: Vec<_> = nodes.iter().map(Node::lately).collect();
        let concerned = lately.iter().zip(&links).filter(|(_, link)| link.is_some() == connected);
        let since = concerned.clone().map(|(lately, _)| lately.since);
        // Connected since the last one was; disconnected since the first one is.
        let since = if connected { since.max() } else { since.min() };
        let first = links.iter().flatten().next();
        let names: Vec<String> = links.iter().flatten().map(|link| link.endpoint.to_string()).collect();
        Status {
            connected,
            topology: self.topology,
            address: if names.is_empty() { self.asked_for.clone() } else { names.join(",") },
            lanes: 1 + self.lanes.read().unwrap_or_else(PoisonError::into_inner).len(),
            since: since.unwrap_or(self.home.ground.began),
            problem: if connected {
                None
            } else {
                concerned.filter_map(|(l, _)| l.problem.clone()).next().or(problem)
            },
            version: first.and_then(|link| link.version.clone()),
            role: first.and_then(|link| link.role.clone()),
        }
    }
}

impl Lane {
    fn new(address: &Address, ground: Arc<Ground>) -> Lane {
        let servers = Way::new(&ground, address.servers.clone(), &address.sentinel_login);
        Lane { ground, servers }
    }

    fn is_connected(&self) -> bool {
        match &self.servers {
            Way::One(node) => node.connected().is_some(),
            // Which of its servers would be asked is not known here.
            Way::Cluster(_) => true,
        }
    }

    fn is_of(&self, runtime: &Handle) -> bool {
        self.ground.dialer.runtime.id() == runtime.id()
    }
}

/// Asks for nothing now and then: a connection that was closed, or swallows everything, is noticed before a decision has
/// to. The first connection has the heartbeat of its instance.
async fn keep_alive(lane: Weak<Lane>, deadline: Duration) {
    let ping = ::redis::cmd("PING");
    loop {
        tokio::time::sleep(KEEP_ALIVE).await;
        let Some(lane) = lane.upgrade() else { return };
        if let Way::One(node) = &lane.servers {
            // That it failed, and what follows from it, the node knows itself.
            let _ = node.ask(Instant::now() + deadline, Question::Command(&ping), Slot::Owned).await;
        }
    }
}
