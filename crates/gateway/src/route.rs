//! Which providers to ask, in which order, and when to stop.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;

use crate::config::Price;
use crate::error::{Error, Tried};
use crate::metrics::{Metrics, ProviderSeries};
use crate::upstream::{Answer, Deployment, Failure, Flight, Question};

/// Providers asked for one request at most.
const ATTEMPTS_MAX: usize = 8;

/// Asks the deployments in turn until one answers; `now`: when the request had come.
///
/// Those that rest after failures are passed over. When all of them rest, the one whose rest ends first is asked all the
/// same: a request that is refused unasked can never find out that it is back. A second attempt needs a healthy deployment
/// and a place in the retry budget.
///
/// # Errors
/// What the attempts add up to: 429 when one of the providers limits us (it would have answered), 504 when one was too
/// slow, else 502.
pub async fn ask<'a>(
    deployments: &[&'a Arc<Deployment>],
    question: &Question<'_>,
    budget: &RetryBudget,
    attempts: &mut Attempts,
    metrics: &Metrics,
    now: Instant,
) -> Result<(&'a Arc<Deployment>, Box<Answer>), Error> {
    let mut failures: Vec<(&Arc<Deployment>, Failure)> = Vec::new();
    budget.request(now);
    for deployment in deployments {
        if failures.len() == ATTEMPTS_MAX || !deployment.health.take_turn() {
            continue;
        }
        if !failures.is_empty() && !budget.retry(attempts.answered) {
            deployment.health.pass_turn();
            break;
        }
        match attempts.ask(deployment, question, metrics).await {
            Ok(answer) => return Ok((deployment, answer)),
            Err(failure) => failures.push((deployment, failure)),
        }
    }
    let soonest = deployments.iter().min_by_key(|deployment| deployment.health.rests_until());
    if let (true, Some(soonest)) = (failures.is_empty(), soonest) {
        match attempts.ask(soonest, question, metrics).await {
            Ok(answer) => return Ok((soonest, answer)),
            Err(failure) => failures.push((soonest, failure)),
        }
    }
    Err(verdict(&failures))
}

/// What was tried for one request so far; it outlives a request whose caller leaves in the middle of an attempt.
#[derive(Debug)]
pub struct Attempts {
    /// How many.
    pub count: u32,
    /// The last one asked; the model differs from the request's after a fallback.
    pub asked: Option<Arc<ProviderSeries>>,
    /// What it charges.
    pub price: Option<Price>,
    /// It is busy with this request.
    flight: Option<Flight>,
    /// When it was asked.
    pub last_asked: Instant,
    /// When it had answered, or failed.
    pub answered: Instant,
    /// Time spent waiting for providers, in all.
    pub waited: Duration,
    /// The last one asked may have read the request: there was a connection to send it on.
    pub reached: AtomicBool,
}

impl Attempts {
    /// None, of a request that began then.
    pub fn new(started: Instant) -> Self {
        Self {
            count: 0,
            asked: None,
            price: None,
            flight: None,
            last_asked: started,
            answered: started,
            waited: Duration::ZERO,
            reached: AtomicBool::new(false),
        }
    }

    async fn ask(
        &mut self,
        deployment: &Deployment,
        question: &Question<'_>,
        metrics: &Metrics,
    ) -> Result<Box<Answer>, Failure> {
        self.count += 1;
        self.asked = Some(deployment.series.clone());
        self.price = deployment.provider.price;
        self.flight = Some(deployment.in_flight.begin());
        self.last_asked = Instant::now();
        self.reached = AtomicBool::new(false);
        let result = deployment.ask(question, &self.reached, metrics, self.last_asked).await;
        self.answered = Instant::now();
        self.waited += self.answered - self.last_asked;
        result
    }
}

fn verdict(failures: &[(&Arc<Deployment>, Failure)]) -> Error {
    let tried: Tried = failures
        .iter()
        .map(|(deployment, why)| format!("{} at {}: {why}", deployment.model, deployment.name))
        .collect();
    let mut limited = failures.iter().filter_map(|(_, failure)| match failure {
        Failure::Status(StatusCode::TOO_MANY_REQUESTS, wait) => Some(*wait),
        _ => None,
    });
    if let Some(first) = limited.next() {
        let wait = limited.chain([first]).flatten().min();
        return Error::UpstreamLimited(wait, tried);
    }
    if failures.iter().any(|(_, failure)| matches!(failure, Failure::TimedOut(..))) {
        return Error::UpstreamTimeout(tried);
    }
    Error::UpstreamFailed(tried)
}

/// Further attempts are at most a tenth of the requests of the last ten seconds, so that providers in trouble are not
/// asked twice as often as healthy ones. A few are always allowed: with little traffic a tenth is nothing.
pub struct RetryBudget {
    window: Mutex<Window>,
    born: Instant,
}

const SLOTS: usize = 10;
const SLOT: Duration = Duration::from_secs(1);
const RETRIES_ALWAYS: u64 = 10;

#[derive(Default)]
struct Window {
    slots: [Slot; SLOTS],
}

#[derive(Clone, Copy, Default)]
struct Slot {
    number: u64,
    requests: u64,
    retries: u64,
}

impl Default for RetryBudget {
    fn default() -> Self {
        Self { window: Mutex::default(), born: Instant::now() }
    }
}

impl RetryBudget {
    fn request(&self, now: Instant) {
        let number = self.slot_number(now);
        self.lock().slot(number).requests += 1;
    }

    fn retry(&self, now: Instant) -> bool {
        let number = self.slot_number(now);
        let mut window = self.lock();
        let recent = window.slots.iter().filter(|slot| slot.number + SLOTS as u64 > number);
        let (requests, retries) =
            recent.fold((0, 0), |sum, slot| (sum.0 + slot.requests, sum.1 + slot.retries));
        let allowed = retries < RETRIES_ALWAYS.max(requests / 10);
        if allowed {
            window.slot(number).retries += 1;
        }
        allowed
    }

    /// Slots are numbered from `SLOTS`, so that the zeroes of a fresh window are never recent.
    fn slot_number(&self, now: Instant) -> u64 {
        (now.saturating_duration_since(self.born).as_millis() / SLOT.as_millis()) as u64 + SLOTS as u64
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Window> {
        self.window.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Window {
    fn slot(&mut self, number: u64) -> &mut Slot {
        let slot = &mut self.slots[(number % SLOTS as u64) as usize];
        // Who was held up since it looked at the clock is counted with those of now.
        if slot.number < number {
            *slot = Slot { number, ..Slot::default() };
        }
        slot
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tenth_of_the_requests_and_a_few_always() {
        let budget = RetryBudget::default();
        let now = Instant::now();
        let granted = (0..100).filter(|_| budget.retry(now)).count();
        assert_eq!(granted as u64, RETRIES_ALWAYS);
        (0..1_000).for_each(|_| budget.request(now));
        let granted = (0..1_000).filter(|_| budget.retry(now)).count();
        assert_eq!(granted as u64, 100 - RETRIES_ALWAYS);
    }

    #[test]
    fn who_was_held_up_takes_nothing_from_those_of_now() {
        let budget = RetryBudget::default();
        let then = Instant::now();
        let now = then + SLOT * SLOTS as u32;
        (0..1_000).for_each(|_| budget.request(now));
        budget.request(then);
        assert_eq!((0..1_000).filter(|_| budget.retry(now)).count(), 100);
    }
}
