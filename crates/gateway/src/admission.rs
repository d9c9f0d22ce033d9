//! Caller and call → the charges of every limit they meet, and what becomes of them: taken before, settled after.
//!
//! What a caller meets on an endpoint for a model is worked out once for each configuration, into a [`Plan`]; a request
//! fills in amounts, asks the store once, and holds what was taken as [`Admitted`] until it is known what was used.

mod amounts;
mod counts;
mod plan;
mod standings;
mod strangers;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tollgate_limiter::{CHARGES_MAX, Decision, Reservation, Source, Standing, StoreError, Unit};

pub use self::amounts::{Demand, Used, cost};
pub use self::counts::{Counts as LimitCounts, Said};
pub use self::plan::{Plan, Plans};
pub use self::standings::{Counters, shown};
use crate::error::Error;
use crate::headers::{self, Lines};
use crate::identity::Caller;
use crate::limits::Limits;
use crate::metrics::Metrics;
use crate::rates::Rates;

/// Calls in flight say that they still run this often; they count for [`tollgate_limiter::LEASE`] after they last did.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Asks every limit of `plan`, all or none: what is held, and what the limits say as headers.
///
/// # Errors
/// 403 where a rule denies, 429 where a limit has no room, 503 where the store does not answer.
pub async fn admit(
    limits: &Limits,
    metrics: &Metrics,
    rates: &Rates,
    plan: Arc<Plan>,
    caller: &Caller,
    demand: Demand,
) -> Result<(Admitted, Lines), Error> {
    if let Some(rule) = plan.denied() {
        return Err(Error::Denied(rule.clone()));
    }
    let started = Instant::now();
    let decided = limits.reserve(plan.charges(caller, &demand)).await;
    let took = started.elapsed();
    let decision = decided.map_err(|error| {
        if let StoreError::Closed { .. } = error {
            metrics.decided(Source::Closed, took);
        }
        plan.count_failed();
        failed(&error)
    })?;
    metrics.decided(decision.source(), took);
    rates.note(&decision, started + took);
    match decision {
        Decision::Granted(reservation) => {
            plan.count_granted(reservation.standings());
            let reserved = reserved_tokens(reservation.standings());
            metrics.rate_limit_tokens.reserved.inc_by(reserved);
            let said = headers::granted(&reservation, plan.words());
            let source = reservation.source();
            let hold = Hold::new(reservation, &plan);
            Ok((Admitted { hold, plan, demand, reserved, took, source }, said))
        }
        Decision::Denied(denial) => {
            plan.count_denied(&denial);
            Err(Error::Limited(Box::new(denial), plan.words().clone()))
        }
    }
}

/// Tokens taken, each once, whatever number of limits they were taken from: what was asked for was first clamped to the
/// limits, for a client may ask for any number.
fn reserved_tokens(standings: &[Standing]) -> u64 {
    let most = |unit| {
        let taken = standings.iter().filter(|standing| standing.taken && standing.limit.unit() == unit);
        taken.map(|standing| standing.requested).max().unwrap_or(0)
    };
    most(Unit::Tokens).max(most(Unit::InputTokens).saturating_add(most(Unit::OutputTokens)))
}

/// Whether a unit is tokens of some kind.
fn counts_tokens(unit: Unit) -> bool {
    matches!(unit, Unit::Tokens | Unit::InputTokens | Unit::OutputTokens)
}

/// Failures of the store are counted by the store itself.
fn failed(error: &StoreError) -> Error {
    match error {
        StoreError::Closed { retry, .. } => {
            Error::LimiterUnavailable(Some(Duration::from_millis(retry.get())))
        }
        _ => Error::LimiterUnavailable(None),
    }
}

/// What a request holds that was let through. Dropped unsettled, its estimates stand.
#[must_use = "settle it with what was used; dropped, the estimates stand"]
pub struct Admitted {
    hold: Hold,
    plan: Arc<Plan>,
    demand: Demand,
    /// Tokens, of all kinds together.
    reserved: u64,
    took: Duration,
    source: Source,
}

/// A reservation; with calls in flight, one that is renewed while it is held.
enum Hold {
    Plain(Reservation),
    Renewed { held: Arc<Mutex<Option<Reservation>>>, heartbeat: tokio::task::AbortHandle },
}

impl Admitted {
    /// What it was admitted by.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What it was expected to use.
    pub fn demand(&self) -> &Demand {
        &self.demand
    }

    /// How long the decision took.
    pub fn took(&self) -> Duration {
        self.took
    }

    /// Who decided.
    pub fn source(&self) -> Source {
        self.source
    }

    /// Replaces the estimates by what was used. Sent, not waited for. Gives back what it was admitted by.
    pub fn settle(self, used: &Used, metrics: &Metrics) -> Arc<Plan> {
        if self.plan.counts_tokens() {
            let tokens = used.usage.prompt.saturating_add(used.usage.completion);
            metrics.rate_limit_tokens.used.inc_by(tokens);
            metrics.rate_limit_tokens.returned.inc_by(self.reserved.saturating_sub(tokens));
        }
        if let Some(reservation) = self.hold.take() {
            let standings = reservation.standings();
            let (mut few, mut many) = ([0; CHARGES_MAX], Vec::new());
            let amounts = match few.get_mut(..standings.len()) {
                Some(few) => few,
                None => {
                    many.resize(standings.len(), 0);
                    &mut many[..]
                }
            };
            for (amount, standing) in amounts.iter_mut().zip(standings) {
                *amount = used.amount(standing.limit.unit());
            }
            let corrections = reservation.settle(amounts);
            let of_tokens =
                corrections.iter().zip(self.plan.units()).filter(|(_, unit)| counts_tokens(*unit));
            let forgiven = of_tokens.map(|(correction, _)| correction.forgiven).max().unwrap_or(0);
            if forgiven > 0 {
                metrics.rate_limit_tokens.forgiven.inc_by(forgiven);
            }
            metrics.rate_limit_settlements.settled.inc();
        }
        self.plan
    }

    /// Gives everything back: it reached no provider. The plan is the caller's, as with [`Admitted::settle`].
    pub fn refund(self, metrics: &Metrics) -> Arc<Plan> {
        if let Some(reservation) = self.hold.take() {
            reservation.refund();
            metrics.rate_limit_tokens.returned.inc_by(self.reserved);
            metrics.rate_limit_settlements.refunded.inc();
        }
        self.plan
    }
}

impl Hold {
    fn new(reservation: Reservation, plan: &Plan) -> Self {
        if !plan.holds_calls() {
            return Self::Plain(reservation);
        }
        let held = Arc::new(Mutex::new(Some(reservation)));
        let renewed = Arc::downgrade(&held);
        let beat = async move {
            loop {
                tokio::time::sleep(HEARTBEAT).await;
                let Some(held) = renewed.upgrade() else { return };
                if let Some(reservation) = &*held.lock().unwrap_or_else(PoisonError::into_inner) {
                    reservation.renew();
                }
            }
        };
        Self::Renewed { held, heartbeat: tokio::spawn(beat).abort_handle() }
    }

    fn take(self) -> Option<Reservation> {
        match self {
            Self::Plain(reservation) => Some(reservation),
            Self::Renewed { held, heartbeat } => {
                heartbeat.abort();
                held.lock().unwrap_or_else(PoisonError::into_inner).take()
            }
        }
    }
}
