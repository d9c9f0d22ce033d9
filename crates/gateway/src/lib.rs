//! Tollgate: a gateway in front of LLM providers whose limits hold.
//!
//! Start at [`pipeline`]: the life of a request, in order. The rest by floor, each knowing only those below it:
//!
//! | floor | modules |
//! |---|---|
//! | 5 processes, sockets, signals | [`cli`] [`edge`] [`admin`] |
//! | 4 the order of things | [`pipeline`] [`relay`] [`ledger`] [`refusals`] [`reload`] [`fleet`] [`live`] [`usage`] |
//! | 3 one outside world each | [`snapshot`] [`control`] [`identity`] [`admission`] [`limits`] [`route`] [`upstream`] [`simulated`] [`rates`] |
//! | 2 meaning | [`config`] [`metrics`] [`log`] [`error`] [`headers`] [`router`] [`estimate`] [`recent`] [`journal`] |
//! | 1 bytes and values | [`call`] [`dialect`] [`fields`] [`http1`] [`ids`] [`json`] [`request`] [`sse`] |
//! | 0 the engine | [`tollgate_limiter`] |

pub mod admin;
pub mod admission;
pub mod call;
pub mod cli;
pub mod config;
pub mod control;
pub mod dialect;
pub mod edge;
pub mod error;
pub mod estimate;
pub mod fields;
pub mod fleet;
pub mod headers;
pub mod http1;
pub mod identity;
pub mod ids;
pub mod journal;
pub mod json;
pub mod ledger;
pub mod limits;
pub mod live;
pub mod log;
pub mod metrics;
pub mod pipeline;
pub mod rates;
pub mod recent;
pub mod refusals;
pub mod relay;
pub mod reload;
pub mod request;
pub mod route;
pub mod router;
pub mod simulated;
pub mod snapshot;
pub mod sse;
pub mod upstream;
pub mod usage;

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::config::Loaded;
use crate::fleet::Instance;
use crate::ledger::Ledger;
use crate::limits::{Limits, Unusable};
use crate::live::Live;
use crate::log::Log;
use crate::metrics::Metrics;
use crate::rates::Rates;
use crate::recent::Recent;
use crate::route::RetryBudget;
use crate::snapshot::Snapshot;

/// The long-lived parts of a gateway.
pub struct Gateway {
    /// What operators say, and where it is kept.
    pub control: control::Store,
    /// Where the configuration came from; `None`: it cannot be read again.
    pub source: Option<reload::Source>,
    /// One new snapshot at a time.
    building: Mutex<()>,
    /// What the configuration means now.
    pub snapshot: ArcSwap<Snapshot>,
    /// What was used.
    pub limits: Limits,
    /// Where its counters are, if they are shared; changes at the next start only.
    pub redis: Option<config::Redis>,
    /// How fast the shared store answers.
    pub store_latency: Recent,
    /// What is used just now.
    pub rates: Rates,
    /// Which instance this is.
    pub instance: Instance,
    /// Who watches it.
    pub live: Live,
    /// Where requests end.
    pub ledger: Arc<Ledger>,
    /// How often a second provider may be asked.
    pub retries: RetryBudget,
    /// Cancelled when the process begins to end: no longer ready, still accepting.
    pub leaving: CancellationToken,
    /// Cancelled when listeners close: connections end after the answer under way.
    pub closing: CancellationToken,
    /// Cancelled when the grace is over: streams end with an error event.
    pub ending: CancellationToken,
}

impl Gateway {
    /// A gateway for one configuration. Must be called in the runtime that outlives all others.
    ///
    /// # Errors
    /// When the counters' store cannot be used as configured.
    pub fn new(
        loaded: Loaded,
        source: Option<reload::Source>,
        control: control::Store,
        log: Log,
    ) -> Result<Arc<Self>, Unusable> {
        let Loaded { config, effective, .. } = loaded;
        let metrics = Arc::new(Metrics::new(&config.telemetry.metrics_prefix, log.clone()));
        let limits = Limits::open(&config, &metrics)?;
        let redis = config.redis.clone();
        let made_of = snapshot::Source {
            config: Arc::new(config),
            effective: Arc::new(effective),
            control: control.now(),
        };
        let snapshot = Snapshot::new(made_of, None, &metrics);
        tell_aside(&snapshot, None);
        let ending = CancellationToken::new();
        Ok(Arc::new(Self {
            snapshot: ArcSwap::from_pointee(snapshot),
            control,
            source,
            building: Mutex::default(),
            limits,
            redis,
            store_latency: Recent::default(),
            rates: Rates::default(),
            instance: Instance::new(),
            live: Live::default(),
            ledger: Arc::new(Ledger {
                metrics,
                log,
                estimates: Arc::default(),
                refusals: Arc::default(),
                usage: Arc::default(),
                journal: Arc::default(),
                ending: ending.clone(),
            }),
            retries: RetryBudget::default(),
            leaving: CancellationToken::new(),
            closing: CancellationToken::new(),
            ending,
        }))
    }

    /// Compiles anew what holds for requests, and swaps it in whole: of a new configuration if there is one, and of what
    /// operators have said by now. Requests under way keep what they began with.
    pub fn rebuild(&self, loaded: Option<Loaded>) {
        let _turn = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.snapshot.load_full();
        let mut made_of = before.source();
        if let Some(Loaded { config, effective, .. }) = loaded {
            (made_of.config, made_of.effective) = (Arc::new(config), Arc::new(effective));
        }
        made_of.control = self.control.now();
        self.forget_cleared(before.control.version, &made_of.control);
        let next = Snapshot::new(made_of, Some(&before), self.metrics());
        tell_aside(&next, Some(&before));
        self.snapshot.store(Arc::new(next));
    }

    /// What was cleared since a version of the control data is remembered here no more.
    fn forget_cleared(&self, since: u64, control: &control::Control) {
        for (subject, _) in control.clears.iter().filter(|(_, clear)| clear.version > since) {
            self.rates.forget(subject);
            if let Ok(subject) = subject.parse() {
                self.limits.forget(&subject);
            }
        }
    }

    /// Every series of this process.
    pub fn metrics(&self) -> &Metrics {
        &self.ledger.metrics
    }
}

/// Says which rules and keys of operators are not in force, and what is met too much of, unless that was said before.
fn tell_aside(now: &Snapshot, before: Option<&Snapshot>) {
    for aside in &now.merged.aside {
        let said = |before: &Snapshot| before.merged.aside.contains(aside);
        if before.is_some_and(said) {
            continue;
        }
        let (rule, why) = (&aside.name, &aside.why);
        match aside.overlaps {
            true => tracing::error!(%rule, %why, "a limit of the admin API is put aside"),
            false => {
                tracing::warn!(%rule, %why, "a limit of the admin API means nothing with this configuration");
            }
        }
    }
    for (key, what) in now.displaced() {
        if before.is_none_or(|before| before.displaced().get(key) != Some(what)) {
            tracing::error!(%key, what, "a key of the admin API has the id of a key of the file");
        }
    }
    if let Some(overlap) = &now.merged.overlap
        && before.is_none_or(|before| before.merged.overlap.as_ref() != Some(overlap))
    {
        let why = overlap.sentence();
        tracing::error!(%why, "such requests are refused: more limits than can be decided about together");
    }
}
