//! Limits that many processes share: the definition said again in Lua, run by Redis 6.2 or newer, or Valkey.
//!
//! One hash per subject, one field per limit; one script and one round trip for everything a request meets. Scripts
//! return the states they found and the server's time; standings are computed here, by the same definition that the
//! store in memory executes.

use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ::redis::Value;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::timeout;

use crate::clock::{Clock, ManualClock, Millis, SystemClock};
use crate::denials::Denials;
use crate::limit::Charge;
use crate::quota::Algorithm;
use crate::reservation::{Decision, Denial, Reservation, Standing};
use crate::scope::Subject;
use crate::spec::Retry;
use crate::store::{Answer, Source, Store, StoreError};

mod address;
mod cluster;
mod connection;
mod dial;
mod epoch;
mod flights;
mod heal;
mod lanes;
mod late;
mod link;
mod node;
mod pack;
mod plan;
mod plans;
mod replay;
mod scripts;
mod sentinel;
mod settlement;
mod spread;
mod status;
#[cfg(feature = "redis-tls")]
mod tls;
mod underway;
mod walk;

pub use status::{ServerInfo, Status, Topology};
#[cfg(feature = "redis-tls")]
pub use tls::Tls;

use address::Address;
use connection::Connection;
use dial::Dialer;
use epoch::Epochs;
pub(crate) use epoch::epoch_of;
use flights::{Flight, Flights, Reply, Waiting};
pub(crate) use heal::Sighting;
pub(crate) use late::{Beat, Charged, Late, standing as standing_of};
use link::Overdue;
use pack::Packer;
use plan::Plan;
use plans::Plans;
use replay::{Counters, Outcome};
use scripts::Scripts;
use settlement::Held;
use underway::{Piece, Underway};

/// Births are told apart by so many bits.
const LIFE_BITS: u32 = 32;
/// The most decisions that may be asked for at once.
const ASKING_MAX: usize = 16_384;
/// How many scripts are waited for at once whose callers have been told that they took too long.
const LATE_MAX: usize = 256;
/// How much later than the connection a caller gives up: the connection knows more about what went wrong.
const GRACE: Duration = Duration::from_millis(5);
/// No amount above this fits any limit; below, a double is exact.
const AMOUNT_MAX: u64 = 1 << 52;

/// How a store in Redis is reached, and what it does to spare round trips.
#[derive(Clone)]
pub struct RedisOptions {
    url: String,
    #[cfg(feature = "redis-tls")]
    tls: Tls,
    prefix: String,
    deadline: Duration,
    coalescing: bool,
    denial_memory: bool,
    rehearsal: Option<Rehearsal>,
}

/// Scripts with another clock and other text, for tests.
#[derive(Clone, Debug)]
struct Rehearsal {
    clock: ManualClock,
    edits: Vec<(String, String)>,
}

impl RedisOptions {
    /// - `redis://[[user]:password@]host[:port][/database]`
    /// - `unix:///path/to/socket[?db=…&user=…&pass=…]`
    /// - `redis+sentinel://[[user]:password@]host[:port],…/master[/database]`: the master that these sentinels name,
    ///   followed through failovers. User and password are the master's; those of the sentinels are
    ///   `?sentinel_username=…&sentinel_password=…`
    /// - `redis+cluster://[[user]:password@]host[:port],…`: all masters of a cluster; some servers of it are enough
    /// - `rediss://…`, `rediss+sentinel://…`, `rediss+cluster://…`: the same, encrypted (feature `redis-tls`).
    ///   Certificates are checked against the names in the URL, or those that sentinels and servers announce
    ///
    /// In user and password, `% / ? # @` are written `%25 %2F %3F %23 %40`.
    pub fn new(url: &str) -> RedisOptions {
        RedisOptions {
            url: url.to_string(),
            #[cfg(feature = "redis-tls")]
            tls: Tls::default(),
            prefix: "tollgate".to_string(),
            deadline: Duration::from_millis(50),
            coalescing: true,
            denial_memory: true,
            rehearsal: None,
        }
    }

    /// Whom an encrypted connection believes, and as whom it shows itself.
    #[cfg(feature = "redis-tls")]
    pub fn tls(self, tls: Tls) -> RedisOptions {
        RedisOptions { tls, ..self }
    }

    /// What every key begins with, instead of `tollgate`. No braces: they mark what keeps keys together.
    pub fn prefix(self, prefix: &str) -> RedisOptions {
        RedisOptions { prefix: prefix.to_string(), ..self }
    }

    /// How long a decision may take, waiting for a connection included, instead of 50 ms.
    pub fn deadline(self, deadline: Duration) -> RedisOptions {
        RedisOptions { deadline, ..self }
    }

    /// One script per request, also for requests that could share one.
    pub fn without_coalescing(self) -> RedisOptions {
        RedisOptions { coalescing: false, ..self }
    }

    /// Asks Redis about every request, also about one it has just refused.
    pub fn without_denial_memory(self) -> RedisOptions {
        RedisOptions { denial_memory: false, ..self }
    }

    /// For tests: `clock` instead of the server's, and the scripts with every `from` replaced by its `to`.
    #[doc(hidden)]
    pub fn rehearse(self, clock: ManualClock, edits: &[(&str, &str)]) -> RedisOptions {
        let edits = edits.iter().map(|(from, to)| (from.to_string(), to.to_string())).collect();
        RedisOptions { rehearsal: Some(Rehearsal { clock, edits }), ..self }
    }
}

/// Counters in Redis. Clones share one connection.
#[derive(Clone)]
pub struct RedisStore(Arc<Inner>);

struct Inner {
    prefix: String,
    epochs: Epochs,
    deadline: Duration,
    coalescing: bool,
    connection: Connection,
    /// Plans of requests, and of settlements.
    charging: Plans,
    settling: Plans,
    flights: Arc<Flights>,
    asking: AtomicUsize,
    /// Scripts that are waited for although they took too long.
    late: AtomicUsize,
    /// Scripts on their way, settlements among them.
    underway: Arc<Underway>,
    denials: Option<Denials<Arc<Plan>, Counters>>,
    clock: Option<ManualClock>,
    births: AtomicU64,
    hasher: RandomState,
    scripts_sent: AtomicU64,
    unreplicated: AtomicU64,
    settlements_lost: AtomicU64,
}

/// What a store in Redis has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RedisCounts {
    /// Connections made.
    pub connections: u64,
    /// Deciding scripts sent: fewer than decisions.
    pub scripts: u64,
    /// Grants of [replicated](crate::Limit::replicated) limits that no replica acknowledged in time.
    pub unreplicated: u64,
    /// Settlements that failed or were never answered: the estimate may stand.
    pub settlements_lost: u64,
}

impl RedisStore {
    /// Connects in the background, on the runtime it is called in, and again whenever the connection is lost. Fails
    /// on a URL or prefix that is none, and outside a tokio runtime.
    pub fn open(options: RedisOptions) -> Result<RedisStore, OpenError> {
        let wrong = |problem: String| OpenError { problem };
        if options.prefix.is_empty() || options.prefix.contains(|c: char| "{}".contains(c) || c.is_control())
        {
            let prefix = crate::names::excerpt(&options.prefix);
            return Err(wrong(format!("`{prefix}` cannot begin keys: no braces, nothing invisible")));
        }
        let address = Address::parse(&options.url)
            .map_err(|problem| wrong(format!("this is no address of a Redis: {problem}")))?;
        let runtime = Handle::try_current().map_err(|_| wrong("there is no tokio runtime here".into()))?;
        #[cfg(not(feature = "redis-tls"))]
        if address.tls {
            let problem = "an encrypted connection needs the feature `redis-tls` of tollgate-limiter";
            return Err(wrong(format!("{problem}, which is not built in")));
        }
        let dialer = Dialer {
            runtime,
            #[cfg(feature = "redis-tls")]
            tls: address.tls.then(|| options.tls.connector()).transpose().map_err(wrong)?,
        };
        let scripts = Scripts::new(options.rehearsal.as_ref());
        let hasher = RandomState::new();
        let connection = Connection::new(address, dialer, scripts, options.deadline);
        let epochs =
            if connection.is_cluster() { Epochs::of_slots } else { Epochs::of_server }(&options.prefix);
        Ok(RedisStore(Arc::new(Inner {
            connection,
            epochs,
            prefix: options.prefix,
            deadline: options.deadline,
            coalescing: options.coalescing,
            charging: Plans::new(),
            settling: Plans::new(),
            flights: Arc::default(),
            asking: AtomicUsize::new(0),
            late: AtomicUsize::new(0),
            underway: Arc::default(),
            denials: options.denial_memory.then(Denials::new),
            clock: options.rehearsal.map(|rehearsal| rehearsal.clock),
            births: AtomicU64::new(0),
            hasher,
            scripts_sent: AtomicU64::new(0),
            unreplicated: AtomicU64::new(0),
            settlements_lost: AtomicU64::new(0),
        })))
    }

    /// What it has done so far.
    pub fn counts(&self) -> RedisCounts {
        RedisCounts {
            connections: self.0.connection.made(),
            scripts: self.0.scripts_sent.load(Ordering::Relaxed),
            unreplicated: self.0.unreplicated.load(Ordering::Relaxed),
            settlements_lost: self.0.settlements_lost.load(Ordering::Relaxed),
        }
    }

    /// From now on whoever asks on the runtime this is called in uses a connection of its own, driven there. For services
    /// that run one event loop for each core: no thread has to wake another for a decision. Decisions stay exact; only
    /// requests of one loop gather in one script. Outside of a runtime it does nothing.
    pub fn join_runtime(&self) {
        self.0.connection.join();
    }

    /// Undoes every [`RedisStore::join_runtime`]: whatever is asked or settled from now on is sent by the runtime that the
    /// store was opened on. To be called before the others end, because what they have not sent ends with them.
    pub fn leave_runtimes(&self) {
        self.0.connection.leave();
    }

    /// Sends a command that is no decision to the server that `key` is on, within the deadline: for a service's own data
    /// beside the counters. A command that changes something is sent once, but where a server said that it did not do it.
    pub async fn command(&self, key: &str, command: &::redis::Cmd) -> Result<Value, StoreError> {
        self.0.connection.command(&key.to_string(), command).await
    }

    /// How it is connected, as this process sees it: nothing is asked.
    pub fn status(&self) -> Status {
        self.0.connection.status()
    }

    /// How long Redis takes to answer, waiting for a connection included; of a cluster, the slowest master.
    pub async fn ping(&self) -> Result<Duration, StoreError> {
        self.0.connection.ping().await
    }

    /// What Redis says of itself, as far as it does. The deadline is that of a decision.
    pub async fn info(&self) -> Result<ServerInfo, StoreError> {
        self.0.connection.info().await
    }

    async fn take(&self, charges: Vec<Charge>) -> Result<Decision, StoreError> {
        if charges.is_empty() {
            // Nothing to ask about; the time of nothing is that of this machine.
            return Ok(Decision::Granted(self.hold(Vec::new(), SystemClock.now(), Vec::new(), None)));
        }
        if self.0.connection.is_cluster() {
            return self.take_spread(charges).await;
        }
        let met = charges.iter().map(|charge| (charge.limit(), charge.subject()));
        let make = || Plan::of_charges(&self.0.prefix, Some(&self.0.epochs), &charges);
        let plan = self.0.charging.plan(met, make)?;
        self.take_together(plan, charges).await
    }

    /// Decides what one script can.
    async fn take_together(&self, plan: Arc<Plan>, charges: Vec<Charge>) -> Result<Decision, StoreError> {
        let charges = match self.0.remembered(&plan, charges) {
            Ok(denial) => return Ok(Decision::Denied(denial)),
            Err(charges) => charges,
        };
        let _place = Place::among(&self.0.asking, ASKING_MAX).ok_or(StoreError::Busy)?;
        let (reply, answer) = oneshot::channel();
        let mut answer = Awaited(answer);
        let waiting = Waiting { charges, reply: Reply::new(reply) };
        let (lane, runtime) = self.0.connection.here();
        let journey = if self.0.coalescing {
            self.0
                .flights
                .join((lane, Arc::clone(&plan)), waiting)
                .map(|(flight, batch)| (Some(flight), batch))
        } else {
            Some((None, vec![waiting]))
        };
        // In a task: whoever asked may leave, and others may wait for the same script.
        if let Some((flight, batch)) = journey {
            let next = Next { flight, _piece: self.0.underway.begin() };
            drop(runtime.spawn(self.clone().fly(plan, next, batch)));
        }
        match timeout(self.0.deadline + GRACE, &mut answer.0).await {
            Ok(Ok(decision)) => decision,
            Ok(Err(_)) => Err(StoreError::Lost),
            Err(_) => Err(StoreError::Timeout),
        }
    }

    /// Decides one batch after the other, as long as requests gather. When a script takes too long, somebody else goes on,
    /// and this only waits for what it granted, to give that back.
    async fn fly(self, plan: Arc<Plan>, mut next: Next, mut batch: Vec<Waiting>) {
        while !batch.is_empty() {
            let waiting = batch.into_iter().filter(|waiting| !waiting.reply.is_closed());
            let (requests, replies): (Vec<_>, Vec<_>) =
                waiting.map(|Waiting { charges, reply }| (charges, reply)).unzip();
            let (goes_on, late) = (Mutex::new(Some(next)), Mutex::new(None));
            let overdue = || {
                for reply in &replies {
                    // Nobody left to tell is nothing to do.
                    let _ = reply.send(Err(StoreError::Timeout));
                }
                let goes_on = lock(&goes_on).take().map(|mut next| (next.batch(), next));
                if let Some((batch, next)) = goes_on.filter(|(batch, _)| !batch.is_empty()) {
                    drop(Handle::current().spawn(self.flight(Arc::clone(&plan), next, batch)));
                }
                *lock(&late) = Place::among(&self.0.late, LATE_MAX);
                lock(&late).is_some()
            };
            let departure = self.0.denials.as_ref().map(|d| d.departure(plan.subjects(), Instant::now()));
            let refused = self.decide_together(&plan, requests, &replies, &overdue).await;
            // What comes late is too old to be remembered.
            let Some(went_on) = lock(&goes_on).take() else { return };
            if let (Some(refused), Some(denials), Some(departure)) = (refused, &self.0.denials, departure) {
                denials.remember(Arc::clone(&plan), departure, refused, Instant::now());
            }
            next = went_on;
            batch = next.batch();
        }
    }

    /// [`RedisStore::fly`], as something of a known size.
    fn flight(
        &self,
        plan: Arc<Plan>,
        next: Next,
        batch: Vec<Waiting>,
    ) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(self.clone().fly(plan, next, batch))
    }

    /// Decides these requests with one script, and answers each. Gives the counters that refused one of them, if that is worth
    /// remembering.
    async fn decide_together(
        &self,
        plan: &Arc<Plan>,
        requests: Vec<Vec<Charge>>,
        replies: &[Reply],
        overdue: Overdue<'_>,
    ) -> Option<Counters> {
        let first = requests.first()?;
        let amounts = requests.iter().flatten().map(Charge::amount).collect();
        self.0.scripts_sent.fetch_add(1, Ordering::Relaxed);
        let answer = self.0.ask(plan, first, amounts, overdue).await;
        let (verdicts, mut counters) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                for reply in replies {
                    // Nobody left to tell is nothing to do.
                    let _ = reply.send(Err(error.clone()));
                }
                return None;
            }
        };
        // What came too late is nobody's, and a server that has taken over since may not know of it.
        let late = replies.first().is_some_and(Reply::is_answered);
        let only_in = late.then_some(counters.history);
        let mut denied = false;
        let mut verdicts = verdicts.into_iter();
        for (charges, reply) in requests.into_iter().zip(replies) {
            let outcome = counters.reserve(plan, charges);
            let verdict = verdicts.next() == Some(b'1');
            denied |= matches!(&outcome, Outcome::Denied(denial) if worth_remembering(denial));
            let decision = match outcome {
                Outcome::Granted(standings, receipts) if verdict => {
                    Ok(Decision::Granted(self.grant(standings, &counters, receipts, only_in)))
                }
                Outcome::Denied(denial) if !verdict => Ok(Decision::Denied(denial.decided_by(Source::Redis))),
                _ => Err(StoreError::Reply("script and definition disagree".into())),
            };
            if let Err(Ok(Decision::Granted(unwanted))) = reply.send(decision) {
                // Whoever asked has left: nothing will be used.
                unwanted.refund();
            }
        }
        denied.then_some(counters)
    }

    fn grant(
        &self,
        standings: Vec<Standing>,
        counters: &Counters,
        receipts: Vec<Option<crate::spec::Receipt>>,
        only_in: Option<u32>,
    ) -> Reservation {
        let reservation = self.hold(standings, counters.now, receipts, only_in);
        if !counters.unreplicated {
            return reservation;
        }
        self.0.unreplicated.fetch_add(1, Ordering::Relaxed);
        reservation.unacknowledged()
    }

    fn hold(
        &self,
        standings: Vec<Standing>,
        now: Millis,
        receipts: Vec<Option<crate::spec::Receipt>>,
        only_in: Option<u32>,
    ) -> Reservation {
        let held = Held::new(self.clone(), receipts).only_in(only_in);
        let hold = if self.0.connection.is_cluster() { held.spread() } else { Box::new(held) };
        Reservation::new(standings, now, hold).decided_by(Source::Redis)
    }
}

impl Store for RedisStore {
    fn reserve(&self, charges: Vec<Charge>) -> Answer<'_, Decision> {
        Box::pin(self.take(charges))
    }

    fn peek(&self, charges: Vec<Charge>) -> Answer<'_, Vec<Standing>> {
        Box::pin(async move {
            if charges.is_empty() {
                return Ok(Vec::new());
            }
            if self.0.connection.is_cluster() {
                return self.peek_spread(charges).await;
            }
            let plan = Plan::of_charges(&self.0.prefix, Some(&self.0.epochs), &charges)?;
            let (_, counters) = self.0.ask(&plan, &charges, Vec::new(), &|| false).await?;
            Ok(counters.stand(&plan, charges))
        })
    }

    fn clear<'s>(&'s self, subject: &'s Subject) -> Answer<'s, bool> {
        Box::pin(async move {
            let key = plan::key(&self.0.prefix, subject);
            self.0.forget(&key);
            let both = [&key, &plan::leases_key(&key)];
            let answer = self.0.connection.command(&key, ::redis::cmd("DEL").arg(&both)).await;
            self.0.forget(&key);
            Ok(matches!(answer?, Value::Int(1..)))
        })
    }

    fn flush(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(self.0.underway.over())
    }
}

/// The answer that somebody waits for who may leave at any moment: also when it has come and was not yet looked at. What it
/// grants goes back then.
struct Awaited(oneshot::Receiver<Result<Decision, StoreError>>);

impl Drop for Awaited {
    fn drop(&mut self) {
        self.0.close();
        if let Ok(Ok(Decision::Granted(unwanted))) = self.0.try_recv() {
            unwanted.refund();
        }
    }
}

impl fmt::Debug for RedisOptions {
    /// Without the URL, which may hold a password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let RedisOptions { prefix, deadline, coalescing, denial_memory, .. } = self;
        let mut shown = f.debug_struct("RedisOptions");
        shown.field("prefix", prefix).field("deadline", deadline);
        shown.field("coalescing", coalescing).field("denial_memory", denial_memory).finish_non_exhaustive()
    }
}

impl fmt::Debug for RedisStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisStore").field("prefix", &self.0.prefix).field("counts", &self.counts()).finish()
    }
}

impl Inner {
    /// Sends the charging script: the verdicts, and the counters as they were before it.
    async fn ask(
        &self,
        plan: &Plan,
        charges: &[Charge],
        amounts: Vec<u64>,
        overdue: Overdue<'_>,
    ) -> Result<(Vec<u8>, Counters), StoreError> {
        let life = self.life();
        let mut order = Packer::default();
        order.list(3);
        order.number(life);
        order.list(amounts.len());
        amounts.into_iter().for_each(|amount| order.number(amount.min(AMOUNT_MAX)));
        order.number(plan.epochs as u64);
        let now = self.time_given();
        let args: [&[u8]; 3] = [&plan.set, &order.0, now.as_bytes()];
        let used = if self.clock.is_some() { 3 } else { 2 };
        let (reply, unreplicated) = if plan.waits {
            // Apart, or every decision would be twice as large for the few that wait.
            let asked = self.connection.charge_replicated(&plan.keys, &args[..used], overdue);
            let (reply, replicas) = Box::pin(asked).await?;
            (reply, replicas == 0)
        } else {
            (self.connection.charge(&plan.keys, &args[..used], overdue).await?, false)
        };
        let Value::Array(parts) = reply.value else {
            return Err(StoreError::Reply("no list".into()));
        };
        let [Value::Int(now), Value::BulkString(verdicts), states @ ..] = &parts[..] else {
            return Err(StoreError::Reply("not a time, verdicts and counters".into()));
        };
        let rates = charges.iter().map(|charge| charge.limit().rate());
        let counters = Counters::read(plan, rates, (*now, reply.history), states, life)?;
        Ok((verdicts.clone(), counters.unreplicated(unreplicated)))
    }

    /// Refuses what Redis refused a moment ago; else gives the charges back.
    fn remembered(&self, plan: &Arc<Plan>, charges: Vec<Charge>) -> Result<Denial, Vec<Charge>> {
        let Some(denials) = &self.denials else {
            return Err(charges);
        };
        let Some((counters, age)) = denials.recall(plan, plan.subjects(), Instant::now()) else {
            return Err(charges);
        };
        let counters = counters.at(counters.now + Millis::from(age));
        if !counters.refuse(plan, &charges) {
            return Err(charges);
        }
        let standings = counters.stand(plan, charges);
        Ok(Denial::new(standings, counters.now).decided_by(Source::DenialMemory))
    }

    fn forget(&self, key: &str) {
        if let Some(denials) = &self.denials {
            denials.forget(key);
        }
    }

    /// Known to nobody before, as far as chance allows.
    fn life(&self) -> u64 {
        self.hasher.hash_one(self.births.fetch_add(1, Ordering::Relaxed)) >> (u64::BITS - LIFE_BITS)
    }

    /// The time for scripts whose clock is given.
    fn time_given(&self) -> String {
        self.clock.as_ref().map_or_else(String::new, |clock| clock.now().get().to_string())
    }
}

/// Whether a limit refuses that is not on calls in flight: those may end at any moment, so they are asked for each time.
fn worth_remembering(denial: &Denial) -> bool {
    denial.standings().iter().any(|standing| {
        let limit = &standing.limit;
        !limit.is_shadow() && standing.retry != Retry::Now && limit.algorithm() != Algorithm::Concurrency
    })
}

/// What a task has that sends scripts: the right to do so, and that it counts as work under way.
struct Next {
    /// Without one it is a single script.
    flight: Option<Flight>,
    _piece: Piece,
}

impl Next {
    /// Those who gathered meanwhile.
    fn batch(&mut self) -> Vec<Waiting> {
        self.flight.as_mut().map_or_else(Vec::new, Flight::next)
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A place among so many at most, given up when dropped.
struct Place<'s>(&'s AtomicUsize);

impl Place<'_> {
    fn among(all: &AtomicUsize, most: usize) -> Option<Place<'_>> {
        let place = Place(all);
        (all.fetch_add(1, Ordering::Relaxed) < most).then_some(place)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A store that cannot be opened: why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenError {
    problem: String,
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.problem)
    }
}

impl std::error::Error for OpenError {}
