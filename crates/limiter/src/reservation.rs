//! What a store answers: granted, with a reservation to settle; or denied, with a time.

use std::sync::Arc;

use crate::clock::Millis;
use crate::limit::{Charge, Claim, Limit};
use crate::scope::Subject;
use crate::spec::{Correction, Reading, Retry};
use crate::store::{Answer, Source, StoreError};

/// The answer to one request. A refusal is a value, not an error.
#[derive(Debug)]
pub enum Decision {
    /// Every enforced limit had room, and it was taken.
    Granted(Reservation),
    /// At least one enforced limit had no room. Nothing was taken.
    Denied(Denial),
}

impl Decision {
    /// What each limit says, one per charge, in the order of the charges.
    pub fn standings(&self) -> &[Standing] {
        match self {
            Decision::Granted(reservation) => reservation.standings(),
            Decision::Denied(denial) => denial.standings(),
        }
    }

    /// The store's time of the decision, in milliseconds since the Unix epoch.
    pub const fn now(&self) -> Millis {
        match self {
            Decision::Granted(reservation) => reservation.now,
            Decision::Denied(denial) => denial.now,
        }
    }

    /// Who decided.
    pub const fn source(&self) -> Source {
        match self {
            Decision::Granted(reservation) => reservation.source,
            Decision::Denied(denial) => denial.source,
        }
    }

    /// Whether it was granted.
    pub const fn is_granted(&self) -> bool {
        matches!(self, Decision::Granted(_))
    }
}

/// What one limit says after a decision.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Standing {
    /// The limit.
    pub limit: Arc<Limit>,
    /// Whose counter.
    pub subject: Subject,
    /// What this request asked for.
    pub requested: u64,
    /// Whether it was taken. Never of a denial; not of a shadow limit without room.
    pub taken: bool,
    /// Units in use, rounded up. More than the capacity after a late settlement.
    pub used: u64,
    /// Units left to take now.
    pub remaining: u64,
    /// How long until nothing is in use.
    pub reset: Millis,
    /// When what was asked for fits: `Now` unless this limit refuses, or would refuse if it were not a shadow.
    pub retry: Retry,
    /// What tells the counter apart from every earlier one of its name, where a store elsewhere says so.
    #[cfg(feature = "redis")]
    pub(crate) life: u64,
    /// Who says so: tells the time of one server as a master from any other. 0: nobody knows.
    #[cfg(feature = "redis")]
    pub(crate) history: u32,
}

impl Standing {
    /// Of a charge that nobody answered yet.
    pub(crate) fn unanswered(charge: Charge) -> Standing {
        let (limit, subject, requested) = charge.into_parts();
        let (taken, used, remaining, reset, retry) = (false, 0, 0, Millis::ZERO, Retry::Now);
        Standing {
            limit,
            subject,
            requested,
            taken,
            used,
            remaining,
            reset,
            retry,
            #[cfg(feature = "redis")]
            life: 0,
            #[cfg(feature = "redis")]
            history: 0,
        }
    }

    /// What was taken stands at `reading`.
    #[inline]
    pub(crate) fn taken(&mut self, reading: Reading) {
        self.taken = true;
        self.read(reading, Retry::Now);
    }

    /// Nothing was taken, and the counter stands at `reading`.
    #[inline]
    pub(crate) fn read(&mut self, reading: Reading, retry: Retry) {
        (self.used, self.remaining, self.reset) = (reading.used, reading.remaining, reading.reset);
        self.retry = retry;
    }
}

impl Claim for Standing {
    fn limit(&self) -> &Arc<Limit> {
        &self.limit
    }

    fn subject(&self) -> &Subject {
        &self.subject
    }

    fn amount(&self) -> u64 {
        self.requested
    }
}

/// A refusal. Nothing was taken from any limit.
#[derive(Clone, Debug)]
pub struct Denial {
    standings: Vec<Standing>,
    binding: usize,
    now: Millis,
    source: Source,
}

impl Denial {
    /// At least one of the standings is of an enforced limit that refuses.
    pub(crate) fn new(standings: Vec<Standing>, now: Millis) -> Denial {
        let weight = |(_, standing): &(usize, &Standing)| (!standing.limit.is_shadow(), standing.retry);
        // From the back, because `max_by_key` takes the last of equals and the first should bind.
        let binding = standings.iter().enumerate().rev().max_by_key(weight).map_or(0, |(index, _)| index);
        Denial { standings, binding, now, source: Source::Memory }
    }

    #[cfg(feature = "redis")]
    pub(crate) fn decided_by(self, source: Source) -> Denial {
        Denial { source, ..self }
    }

    #[cfg(feature = "redis")]
    pub(crate) fn into_standings(self) -> Vec<Standing> {
        self.standings
    }

    /// What each limit says, one per charge, in the order of the charges.
    pub fn standings(&self) -> &[Standing] {
        &self.standings
    }

    /// The position of the refusing charge: with several, the one with the longest wait; never is longest.
    pub const fn binding_index(&self) -> usize {
        self.binding
    }

    /// The standing of the refusing charge.
    pub fn binding(&self) -> &Standing {
        &self.standings[self.binding]
    }

    /// What the refusing limit was asked for.
    pub fn requested(&self) -> u64 {
        self.binding().requested
    }

    /// When it is worth asking again, if ever.
    pub fn retry(&self) -> Retry {
        self.binding().retry
    }

    /// The store's time of the decision, in milliseconds since the Unix epoch.
    pub const fn now(&self) -> Millis {
        self.now
    }

    /// Who refused.
    pub const fn source(&self) -> Source {
        self.source
    }
}

/// What a request holds until it is known what it used. Dropped, the estimate stands.
#[must_use = "settle it with what was really used; dropped, the estimate stands"]
pub struct Reservation {
    standings: Vec<Standing>,
    now: Millis,
    source: Source,
    #[cfg(feature = "redis")]
    unreplicated: bool,
    hold: Box<dyn Hold>,
}

impl Reservation {
    pub(crate) fn new(standings: Vec<Standing>, now: Millis, hold: Box<dyn Hold>) -> Reservation {
        Reservation {
            standings,
            now,
            source: Source::Memory,
            #[cfg(feature = "redis")]
            unreplicated: false,
            hold,
        }
    }

    #[cfg(feature = "redis")]
    pub(crate) fn decided_by(self, source: Source) -> Reservation {
        Reservation { source, ..self }
    }

    /// Granted, although no replica has acknowledged it in time.
    #[cfg(feature = "redis")]
    pub(crate) fn unacknowledged(self) -> Reservation {
        Reservation { unreplicated: true, ..self }
    }

    /// Whether a [replicated](Limit::replicated) limit was charged and no replica acknowledged that in time.
    #[cfg(feature = "redis")]
    pub const fn is_unreplicated(&self) -> bool {
        self.unreplicated
    }

    /// For a store that stands before another: what each limit says, and the other store's side.
    #[cfg(feature = "redis")]
    pub(crate) fn into_parts(self) -> (Vec<Standing>, Box<dyn Hold>) {
        (self.standings, self.hold)
    }

    /// What each limit says, one per charge, in the order of the charges.
    pub fn standings(&self) -> &[Standing] {
        &self.standings
    }

    /// The store's time of the decision, in milliseconds since the Unix epoch.
    pub const fn now(&self) -> Millis {
        self.now
    }

    /// Who decided.
    pub const fn source(&self) -> Source {
        self.source
    }

    /// Replaces what was taken by what was used, one amount per charge, in the order of the charges. Charges without
    /// an amount keep what was taken; those that took nothing stay so. Calls in flight are over, whatever the amount.
    ///
    /// One correction per charge, from a store in this process. To one elsewhere it is sent and not awaited, and
    /// nothing comes back; [`Reservation::settled`] waits.
    pub fn settle(self, actual: &[u64]) -> Vec<Correction> {
        self.hold.settle(&self.standings, actual)
    }

    /// Says that the request still runs. Calls in flight count for [`LEASE`](crate::spec::LEASE) from when they were
    /// last heard of, so whoever limits those says it every ten seconds or so. Other limits do not mind.
    pub fn renew(&self) {
        self.hold.renew(&self.standings);
    }

    /// Says so, and waits until the store has heard it.
    pub async fn renewed(&self) -> Result<(), StoreError> {
        let answer = self.hold.renewed(&self.standings);
        answer.await
    }

    /// Settles, and waits until the store has done it. A settlement is sent once: after an error the estimate may
    /// stand, which the store counts.
    pub async fn settled(self, actual: &[u64]) -> Result<Vec<Correction>, StoreError> {
        let answer = self.hold.settled(&self.standings, actual);
        drop(self);
        answer.await
    }

    /// Gives everything back: the request was answered by nobody.
    pub fn refund(self) -> Vec<Correction> {
        let nothing = vec![0; self.standings.len()];
        self.settle(&nothing)
    }
}

impl std::fmt::Debug for Reservation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reservation").field("standings", &self.standings).field("now", &self.now).finish()
    }
}

/// A store's side of a reservation: what it took, one receipt per standing.
pub(crate) trait Hold: Send + Sync {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction>;

    /// Renews the leases of calls in flight, where there are some.
    fn renew(&self, _standings: &[Standing]) {}

    /// Renews before it returns, or sends it off; the answer is only for who wants to know.
    fn renewed(&self, standings: &[Standing]) -> Answer<'static, ()> {
        self.renew(standings);
        Box::pin(std::future::ready(Ok(())))
    }

    /// Settles before it returns, or sends it off; the answer is only for who wants to know.
    fn settled(&self, standings: &[Standing], actual: &[u64]) -> Answer<'static, Vec<Correction>> {
        let corrections = self.settle(standings, actual);
        Box::pin(std::future::ready(Ok(corrections)))
    }
}
