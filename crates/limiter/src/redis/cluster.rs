//! A cluster: which master has which slot, learned from the servers and corrected by them.
//! <https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use ::redis::Value;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::address::{Endpoint, announced};
use super::link::{Question, Said, Slot};
use super::node::{Ground, Node, Target};
use crate::store::StoreError;

/// How many slots there are.
const SLOTS: usize = 16_384;
/// A slot that nobody serves.
const NOBODY: u16 = u16::MAX;
/// How many servers one question is passed on to.
const ASKED_MAX: usize = 6;
/// Between questions to a cluster that is not ready.
const PAUSE: Duration = Duration::from_millis(5);
/// How long a server may take to tell who has which slot.
const MAP_DEADLINE: Duration = Duration::from_millis(500);
/// Between questions for the map: at least when there is a reason, and without one.
const MAP_PAUSE: Duration = Duration::from_millis(50);
const MAP_PERIOD: Duration = Duration::from_secs(5);

/// The slot of a key: of what stands between the first `{` and the next `}`, unless that is nothing.
pub(super) fn slot(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag);
    let hashed = tag.filter(|tag| !tag.is_empty()).unwrap_or(key);
    crc16(hashed.as_bytes()) % SLOTS as u16
}

/// CRC16-CCITT (XMODEM).
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |mut crc: u16, byte| {
        crc ^= u16::from(*byte) << 8;
        for _ in 0..8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 };
        }
        crc
    })
}

/// Asks the master of a slot.
pub(super) struct Cluster(Arc<Shared>);

struct Shared {
    ground: Arc<Ground>,
    seeds: Vec<Endpoint>,
    map: watch::Sender<Option<Arc<Map>>>,
    nodes: Mutex<HashMap<Endpoint, Node>>,
    doubts: watch::Sender<u64>,
    problem: Mutex<Option<String>>,
}

/// Which master has which slot.
#[derive(Clone, PartialEq, Eq)]
struct Map {
    masters: Vec<Endpoint>,
    /// Of each slot, the place of its master.
    slots: Vec<u16>,
}

impl Cluster {
    /// Connects in the background.
    pub(super) fn new(ground: &Arc<Ground>, seeds: Vec<Endpoint>) -> Cluster {
        let shared = Arc::new(Shared {
            ground: Arc::clone(ground),
            seeds,
            map: watch::Sender::new(None),
            nodes: Mutex::default(),
            doubts: watch::Sender::new(0),
            problem: Mutex::default(),
        });
        ground.dialer.runtime.spawn(keep_learning(Arc::downgrade(&shared), shared.doubts.subscribe()));
        Cluster(shared)
    }

    /// Asks the master of a slot, and whoever it names. A server that passes a question on has not done it.
    pub(super) async fn ask(
        &self,
        slot: u16,
        until: Instant,
        question: Question<'_>,
    ) -> Result<Said, StoreError> {
        let (mut endpoint, mut is) = (self.owner(slot, until).await?, Slot::Owned);
        let mut asked = 0;
        let overdue = || {
            self.0.doubt();
            question.overdue()
        };
        let question = question.when_overdue(&overdue);
        loop {
            asked += 1;
            let node = self.0.node(&endpoint);
            let answer = node.ask(until, question, is).await;
            let Err(error) = &answer else {
                return answer;
            };
            let StoreError::Refused { code, message } = error else {
                // Broken, silent or gone: another one may have taken its place.
                self.0.doubt();
                return answer;
            };
            if asked == ASKED_MAX {
                return answer;
            }
            match code.as_str() {
                "MOVED" | "ASK" => {
                    let Some(named) = named(message, &endpoint) else {
                        return answer;
                    };
                    is = if code == "ASK" { Slot::Arriving } else { Slot::Owned };
                    if Instant::now() >= until {
                        // Who knows how old that is.
                        self.0.doubt();
                        return answer;
                    }
                    if is == Slot::Owned {
                        self.0.moved(slot, &named);
                    }
                    endpoint = named;
                }
                "CLUSTERDOWN" | "LOADING" | "MASTERDOWN" | "READONLY" => {
                    self.0.doubt();
                    if Instant::now() + PAUSE >= until {
                        return answer;
                    }
                    sleep(PAUSE).await;
                    (endpoint, is) = (self.owner(slot, until).await?, Slot::Owned);
                }
                _ => return answer,
            }
        }
    }

    /// A connection to each master.
    pub(super) async fn masters(&self, until: Instant) -> Result<Vec<Node>, StoreError> {
        self.map(until, |map| !map.masters.is_empty()).await?;
        Ok(self.known_masters())
    }

    /// The same, as far as masters are known.
    pub(super) fn known_masters(&self) -> Vec<Node> {
        let map = self.0.map.borrow().clone();
        map.iter().flat_map(|map| &map.masters).map(|master| self.0.node(master)).collect()
    }

    /// Whether the master of a slot may answer, as far as it is known: nothing is asked.
    pub(super) fn reaches(&self, slot: u16, patience: Duration) -> bool {
        let Some(map) = self.0.map.borrow().clone() else { return true };
        map.owner(slot).is_some_and(|master| !self.0.node(master).is_gone(patience))
    }

    /// Why no masters are known.
    pub(super) fn problem(&self) -> Option<String> {
        self.0.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The master of a slot, waited for if need be.
    async fn owner(&self, slot: u16, until: Instant) -> Result<Endpoint, StoreError> {
        let map = self.map(until, |map| map.owner(slot).is_some()).await?;
        map.owner(slot).cloned().ok_or(StoreError::Unreachable)
    }

    async fn map(&self, until: Instant, serves: impl Fn(&Map) -> bool) -> Result<Arc<Map>, StoreError> {
        let mut maps = self.0.map.subscribe();
        let good = |map: &Option<Arc<Map>>| map.as_ref().is_some_and(|map| serves(map));
        if !good(&maps.borrow()) {
            self.0.doubt();
        }
        match timeout_at(until, maps.wait_for(good)).await {
            Ok(Ok(map)) => map.clone().ok_or(StoreError::Unreachable),
            _ => Err(StoreError::Unreachable),
        }
    }
}

impl Map {
    fn owner(&self, slot: u16) -> Option<&Endpoint> {
        self.masters.get(usize::from(*self.slots.get(usize::from(slot))?))
    }

    /// With one slot served by another master.
    fn with(&self, slot: u16, master: &Endpoint) -> Map {
        let mut map = self.clone();
        let place = map.masters.iter().position(|known| known == master).unwrap_or_else(|| {
            map.masters.push(master.clone());
            map.masters.len() - 1
        });
        map.slots[usize::from(slot)] = place as u16;
        map
    }

    /// Reads the answer to `CLUSTER SLOTS` of the server at `from`.
    fn read(answer: &Value, from: &Endpoint) -> Option<Map> {
        let Value::Array(ranges) = answer else {
            return None;
        };
        let mut map = Map { masters: Vec::new(), slots: vec![NOBODY; SLOTS] };
        for range in ranges {
            let Value::Array(range) = range else {
                return None;
            };
            let [Value::Int(first), Value::Int(last), Value::Array(master), ..] = &range[..] else {
                return None;
            };
            let [host, Value::Int(port), ..] = &master[..] else {
                return None;
            };
            let host = match host {
                Value::BulkString(host) => String::from_utf8_lossy(host).into_owned(),
                Value::Nil => String::new(),
                _ => return None,
            };
            // A server that does not know its own name leaves it out, or says so.
            let host = if host.is_empty() || host == "?" { host_of(from)? } else { host };
            let master = Endpoint::Tcp(host, u16::try_from(*port).ok()?);
            let place = map.masters.iter().position(|known| *known == master).unwrap_or_else(|| {
                map.masters.push(master);
                map.masters.len() - 1
            });
            let slots = usize::try_from(*first).ok()?..=usize::try_from(*last).ok()?;
            map.slots.get_mut(slots)?.fill(u16::try_from(place).ok()?);
        }
        (!map.masters.is_empty()).then_some(map)
    }
}

impl Shared {
    fn node(&self, endpoint: &Endpoint) -> Node {
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let made = || Node::new(&self.ground, Target::Named(endpoint.clone()));
        nodes.entry(endpoint.clone()).or_insert_with(made).clone()
    }

    /// Has the map asked for.
    fn doubt(&self) {
        self.doubts.send_modify(|times| *times = times.wrapping_add(1));
    }

    /// Notes what a server said of one slot.
    fn moved(&self, slot: u16, to: &Endpoint) {
        self.map.send_if_modified(|map| {
            let Some(known) = map.as_ref().filter(|map| map.owner(slot) != Some(to)) else {
                return false;
            };
            if !known.masters.contains(to) {
                self.node(to).promoted();
            }
            *map = Some(Arc::new(known.with(slot, to)));
            self.ground.master_changed();
            true
        });
        self.doubt();
    }

    /// Asks one server after the other, those first that are connected.
    async fn learn(&self, turn: usize) -> Result<Map, String> {
        let map = self.map.borrow().clone();
        let mut known: Vec<Endpoint> = map.iter().flat_map(|map| map.masters.clone()).collect();
        if !known.is_empty() {
            let first = turn % known.len();
            known.rotate_left(first);
        }
        known.sort_by_key(|endpoint| self.node(endpoint).connected().is_none());
        known.extend(self.seeds.iter().filter(|seed| !known.contains(seed)).cloned().collect::<Vec<_>>());
        let command = ::redis::cmd("CLUSTER").arg("SLOTS").clone();
        let mut problems = Vec::new();
        for endpoint in known {
            let (node, until) = (self.node(&endpoint), Instant::now() + MAP_DEADLINE);
            match node.ask(until, Question::Command(&command), Slot::Owned).await {
                Ok(answer) => match Map::read(&answer.value, &endpoint) {
                    Some(map) => return Ok(map),
                    None => problems.push(format!("{endpoint}: it names no masters")),
                },
                Err(error) => problems.push(node.lately().problem.unwrap_or(format!("{endpoint}: {error}"))),
            }
        }
        Err(format!("no server tells who has which slot: {}", problems.join("; ")))
    }

    /// Uses a map: connects to all masters, lets go of servers that are none and not connected.
    fn adopt(&self, map: Map) {
        let before = self.map.borrow().clone();
        for master in &map.masters {
            let node = self.node(master);
            if before.as_ref().is_some_and(|before| !before.masters.contains(master)) {
                node.promoted();
            }
        }
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.retain(|endpoint, node| map.masters.contains(endpoint) || node.connected().is_some());
        drop(nodes);
        self.map.send_if_modified(|known| {
            let changed = known.as_deref() != Some(&map);
            if changed && known.is_some() {
                self.ground.master_changed();
            }
            *known = Some(Arc::new(map));
            changed
        });
    }
}

/// Until nobody wants to know any more.
async fn keep_learning(shared: Weak<Shared>, mut doubts: watch::Receiver<u64>) {
    for turn in 0.. {
        let Some(shared) = shared.upgrade() else {
            return;
        };
        doubts.mark_unchanged();
        let problem = shared.learn(turn).await.map(|map| shared.adopt(map)).err();
        *shared.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
        drop(shared);
        sleep(MAP_PAUSE).await;
        if let Ok(Err(_)) = timeout(MAP_PERIOD, doubts.changed()).await {
            return;
        }
    }
}

fn host_of(endpoint: &Endpoint) -> Option<String> {
    match endpoint {
        Endpoint::Tcp(host, _) => Some(host.clone()),
        Endpoint::Unix(_) => None,
    }
}

/// `3999 10.0.0.1:6381`: whom a server names instead of itself.
fn named(message: &str, asked: &Endpoint) -> Option<Endpoint> {
    match announced(message.split_whitespace().nth(1)?)? {
        Endpoint::Tcp(host, port) if host.is_empty() || host == "?" => {
            Some(Endpoint::Tcp(host_of(asked)?, port))
        }
        endpoint => Some(endpoint),
    }
}

#[cfg(test)]
mod tests {
    use ::redis::Value;

    use super::{Endpoint, Map, NOBODY, named, slot};

    fn tcp(host: &str, port: u16) -> Endpoint {
        Endpoint::Tcp(host.to_string(), port)
    }

    #[test]
    fn slots_are_those_of_the_specification() {
        assert_eq!(super::crc16(b"123456789"), 0x31c3);
        assert_eq!(slot("foo"), 12_182);
        assert_eq!(slot("{user1000}.following"), slot("{user1000}.followers"));
        assert_eq!(slot("foo{}{bar}"), super::crc16(b"foo{}{bar}") % 16_384);
        assert_eq!(slot("foo{{bar}}zap"), slot("{{bar}"));
    }

    #[test]
    fn maps_are_read() {
        let text = |text: &str| Value::BulkString(text.into());
        let range = |first, last, host: Value, port| {
            Value::Array(vec![
                Value::Int(first),
                Value::Int(last),
                Value::Array(vec![host, Value::Int(port), text("id"), Value::Array(vec![])]),
                Value::Array(vec![text("replica"), Value::Int(1)]),
            ])
        };
        let from = tcp("asked", 7_000);
        let ranges = vec![range(0, 9, text("a"), 1), range(10, 20, text(""), 2), range(30, 40, text("a"), 1)];
        let map = Map::read(&Value::Array(ranges), &from).expect("it is read");
        assert_eq!(map.masters, [tcp("a", 1), tcp("asked", 2)]);
        assert_eq!(
            [0, 20, 30].map(|slot| map.owner(slot).cloned()),
            [Some(tcp("a", 1)), Some(tcp("asked", 2)), Some(tcp("a", 1))]
        );
        assert_eq!((map.owner(25), map.slots[25]), (None, NOBODY));
        assert_eq!(map.with(25, &tcp("b", 3)).owner(25), Some(&tcp("b", 3)));
        for wrong in [range(0, 16_384, text("a"), 1), range(5, 4_000, Value::Nil, 70_000), Value::Okay] {
            assert!(Map::read(&Value::Array(vec![wrong]), &from).is_none());
        }
        assert!(Map::read(&Value::Array(vec![]), &from).is_none());
    }

    #[test]
    fn redirections_are_read() {
        let asked = tcp("asked", 7_000);
        assert_eq!(named("3999 10.0.0.1:6381", &asked), Some(tcp("10.0.0.1", 6_381)));
        assert_eq!(named("3999 ::1:6381", &asked), Some(tcp("::1", 6_381)));
        assert_eq!(named("3999 :6381", &asked), Some(tcp("asked", 6_381)));
        assert_eq!(named("3999", &asked), None);
    }
}
