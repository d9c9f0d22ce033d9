//! Where counters are kept: in this process, or in a Redis that many share.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tollgate_limiter::{
    Budgets, Charge, Circuit, Decision, MemoryStore, Place, RedisOptions, RedisStore, ResilientOptions,
    ResilientStore, ServerInfo, Standing, Store, StoreError, Subject, SystemClock, Tls,
};

use crate::config::{Config, Redis};
use crate::metrics::Metrics;
use crate::recent::Recent;

/// The store of a gateway's limits.
pub enum Limits {
    /// Of this process alone. Answers at once.
    Memory(MemoryStore),
    /// Shared.
    Redis(ResilientStore),
}

impl Limits {
    /// The store that a configuration asks for; one in Redis is connected to in the background, on the runtime this is
    /// called in.
    ///
    /// # Errors
    /// When the address of the Redis, or a file of its TLS, cannot be used.
    pub fn open(config: &Config, metrics: &Arc<Metrics>) -> Result<Self, Unusable> {
        let Some(redis) = &config.redis else {
            return in_this_process(config).map(Self::Memory);
        };
        let store = RedisStore::open(options(redis)?.deadline(redis.timeout))
            .map_err(|error| Unusable(format!("dependencies.redis: {error}")))?;
        let (metrics, address) = (metrics.clone(), redis.address.clone());
        let options = ResilientOptions::default()
            .instances(config.settings.instances)
            .on_change(move |circuit| changed(&metrics, &address, circuit));
        Ok(Self::Redis(ResilientStore::new(store, options)))
    }

    /// From now on requests of the runtime this is called in ask by a connection of their own.
    pub fn join_runtime(&self) {
        if let Self::Redis(store) = self {
            store.redis().join_runtime();
        }
    }

    /// Waits until what was settled so far has reached the store, and lets the runtimes that joined end: what is settled
    /// from then on is sent by the one the store was opened on.
    pub async fn leave_runtimes(&self) {
        if let Self::Redis(store) = self {
            store.redis().leave_runtimes();
            store.flush().await;
        }
    }

    /// Takes every charge, or none.
    pub async fn reserve(&self, charges: impl Iterator<Item = Charge>) -> Result<Decision, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.reserve(charges)),
            Self::Redis(store) => store.reserve(charges.collect()).await,
        }
    }

    /// What every limit would say. Changes nothing.
    pub async fn peek(&self, charges: Vec<Charge>) -> Result<Vec<Standing>, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.peek(charges)),
            Self::Redis(store) => store.peek(charges).await,
        }
    }

    /// Waits until what was settled has reached the store.
    pub async fn flush(&self) {
        match self {
            Self::Memory(_) => {}
            Self::Redis(store) => store.flush().await,
        }
    }

    /// Forgets what was counted for a subject.
    pub async fn clear(&self, subject: &Subject) -> Result<bool, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.clear(subject)),
            Self::Redis(store) => store.clear(subject).await,
        }
    }

    /// Some of the subjects that have counters, and where the next ones are; `None`: those were the last.
    ///
    /// # Errors
    /// When the store does not answer, or does not allow it.
    pub async fn walk(&self, from: Place) -> Result<(Vec<Subject>, Option<Place>), StoreError> {
        match self {
            Self::Memory(store) => Ok(store.walk(from)),
            Self::Redis(store) => store.redis().walk(from).await,
        }
    }

    /// The ids of the limits that have a counter of this subject.
    ///
    /// # Errors
    /// When the store does not answer.
    pub async fn limits_of(&self, subject: &Subject) -> Result<Vec<String>, StoreError> {
        match self {
            Self::Memory(store) => Ok(store.limits_of(subject)),
            Self::Redis(store) => store.redis().limits_of(subject).await,
        }
    }

    /// Forgets what this process remembers of a subject that another one has cleared.
    pub fn forget(&self, subject: &Subject) {
        if let Self::Redis(store) = self {
            store.forget(subject);
        }
    }

    /// Asks a shared store for nothing, to see how long that takes.
    pub async fn measure(&self, latency: &Recent) {
        if let Self::Redis(store) = self
            && let Ok(took) = store.redis().ping().await
        {
            latency.add(took);
        }
    }

    /// How many connections to each server of a shared store decisions go over: one for each runtime that joined, and one.
    pub fn connections(&self) -> usize {
        match self {
            Self::Memory(_) => 0,
            Self::Redis(store) => store.redis().status().lanes,
        }
    }

    /// Whether a shared store does not answer, so that limits do what they say for then.
    pub fn is_degraded(&self) -> bool {
        match self {
            Self::Memory(_) => false,
            Self::Redis(store) => store.state().is_open(),
        }
    }

    /// What the servers of a shared store say of themselves; `None`: there is none.
    pub async fn info(&self) -> Option<Result<ServerInfo, StoreError>> {
        match self {
            Self::Memory(_) => None,
            Self::Redis(store) => Some(store.redis().info().await),
        }
    }

    /// Looks at the servers again and again, for gauges and warnings, until the process ends.
    pub async fn watch(&self, metrics: &Metrics) {
        let Self::Redis(store) = self else { return };
        let mut evicts = false;
        loop {
            // A server that is frozen or full is connected, and counts nothing.
            let counts = store.redis().status().connected && !store.state().is_open();
            metrics.rate_limit_redis_connected.set(i64::from(counts));
            metrics.redis_failed(store.counts().failures, store.redis().counts().unreplicated);
            metrics.settlements_lost(
                store.redis().counts().settlements_lost + store.counts().settlements_dropped,
            );
            if let Ok(info) = store.redis().info().await {
                metrics.redis_said(&info);
                if info.evicts() && !evicts {
                    let policy = info.maxmemory_policy.as_deref().unwrap_or_default();
                    tracing::warn!(
                        policy,
                        "this Redis may evict counters when it is full, and limits with them"
                    );
                }
                evicts = info.evicts();
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }
}

/// A store that cannot be used as configured: why.
#[derive(Clone, Debug)]
pub struct Unusable(String);

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unusable {}

/// How often the servers are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Counters that survive a restart where the configuration has a place for them: beside the control data, in a file of
/// their own.
fn in_this_process(config: &Config) -> Result<MemoryStore, Unusable> {
    let Some(state) = &config.settings.state else {
        return Ok(MemoryStore::new(SystemClock));
    };
    let mut path = state.path.clone().into_os_string();
    path.push(".limits");
    match MemoryStore::open(&path, SystemClock, Budgets::default()) {
        Ok(store) => Ok(store),
        Err(error) if state.is_default => {
            tracing::warn!(%error, "settings.state: counters are kept in memory, and lost at a restart");
            Ok(MemoryStore::new(SystemClock))
        }
        Err(error) => Err(Unusable(format!("settings.state: {error}"))),
    }
}

/// How a Redis is reached, from here and from `check`.
///
/// # Errors
/// When a file of its TLS cannot be read.
pub fn options(redis: &Redis) -> Result<RedisOptions, Unusable> {
    let read = |path: &Option<std::path::PathBuf>| path.as_deref().map(file).transpose();
    let (ca, cert, key) = (read(&redis.tls.ca)?, read(&redis.tls.cert)?, read(&redis.tls.key)?);
    Ok(RedisOptions::new(redis.url.expose()).prefix(&redis.prefix).tls(Tls { ca, cert, key }))
}

fn file(path: &Path) -> Result<Vec<u8>, Unusable> {
    std::fs::read(path)
        .map_err(|error| Unusable(format!("dependencies.redis.tls: {}: {error}", path.display())))
}

/// One line in the log for each change, and the gauges.
fn changed(metrics: &Metrics, address: &str, circuit: Circuit) {
    metrics.rate_limit_degraded.set(i64::from(circuit.is_open()));
    match circuit {
        Circuit::Closed => tracing::info!(address, "Redis answers: limits are shared again"),
        Circuit::Open { why, .. } => {
            tracing::warn!(
                address,
                why = why.as_str(),
                "Redis does not answer: each limit does what when_down says"
            );
        }
    }
}
