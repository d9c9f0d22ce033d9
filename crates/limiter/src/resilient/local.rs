//! Deciding without the shared store: every limit does what it says.

use std::sync::Arc;

use super::counts::add;
use super::{Inner, RETRY, settlements};
use crate::clock::Millis;
use crate::limit::{Charge, Limit, WhenDown};
use crate::quota::Algorithm;
use crate::reservation::{Decision, Denial, Hold, Reservation, Standing};
use crate::spec::{Correction, Retry};
use crate::store::{Source, StoreError};

/// The charges of one request, sorted by what their limits do.
struct Sorted {
    /// Against this process's share of each limit, in order.
    shared: Vec<Charge>,
    /// The limits of those, whole.
    limits: Vec<Arc<Limit>>,
    /// What the others say, by their positions among all charges, in order.
    uncounted: Vec<(usize, Standing)>,
}

impl Inner {
    /// Never waits. An error only for a limit that lets nothing pass.
    pub(super) fn decide(self: &Arc<Inner>, charges: Vec<Charge>) -> Result<Decision, StoreError> {
        let closed = |limit: &Limit| limit.while_down() == WhenDown::Closed && !limit.is_shadow();
        if let Some(charge) = charges.iter().find(|charge| closed(charge.limit())) {
            add(&self.tally.closed, 1);
            return Err(StoreError::Closed { limit: charge.limit().id().to_string(), retry: RETRY });
        }
        let Sorted { shared, limits, uncounted } = self.sort(charges);
        let source = if shared.is_empty() && !uncounted.is_empty() { Source::Open } else { Source::Share };
        add(&self.tally.share, u64::from(source == Source::Share));
        let decision = self.ledger.memory.reserve(shared);
        let now = decision.now();
        Ok(match decision {
            Decision::Granted(reservation) => {
                add(&self.tally.uncounted, u64::from(!uncounted.is_empty()));
                let (standings, hold) = reservation.into_parts();
                self.touched(standings.iter().filter(|standing| standing.taken));
                let positions = uncounted.iter().map(|(position, _)| *position).collect();
                let call = self.calls.begin(&standings);
                let asked = standings.iter().map(|s| self.ledger.asked(&s.limit, &s.subject)).collect();
                let hold = Held { store: Arc::clone(self), hold, uncounted: positions, call, asked };
                let standings = with(standings, uncounted);
                Decision::Granted(Reservation::new(standings, now, Box::new(hold)).decided_by(source))
            }
            Decision::Denied(denial) => {
                let standings = not_never(denial.into_standings(), &limits);
                Decision::Denied(Denial::new(with(standings, uncounted), now).decided_by(source))
            }
        })
    }

    /// Redis has granted what no replica has: the charge stands, and the limits that wanted a replica say what they say
    /// while Redis does not answer.
    pub(super) fn unreplicated(self: &Arc<Inner>, reservation: Reservation) -> Result<Decision, StoreError> {
        let wanted = |standing: &&Standing| standing.taken && standing.limit.waits();
        let closed = |standing: &&Standing| standing.limit.while_down() == WhenDown::Closed;
        if let Some(standing) = reservation.standings().iter().filter(wanted).find(closed) {
            add(&self.tally.closed, 1);
            let limit = standing.limit.id().to_string();
            // Nobody will use it: calls in flight are over, the rest stands.
            reservation.settle(&[]);
            return Err(StoreError::Closed { limit, retry: RETRY });
        }
        let failing = self.failing();
        let shares = |standing: &&Standing| standing.limit.while_down() == WhenDown::Share;
        let shared: Vec<&Standing> = reservation.standings().iter().filter(wanted).filter(shares).collect();
        if shared.is_empty() {
            add(&self.tally.uncounted, 1);
            return Ok(Decision::Granted(reservation.decided_by(Source::Open)));
        }
        add(&self.tally.share, 1);
        let charge = |standing: &&Standing| {
            let charge =
                Charge::new(Arc::clone(&standing.limit), standing.subject.clone(), standing.requested);
            self.ledger.share(&failing, &self.mirror, charge)
        };
        match self.ledger.memory.reserve(shared.iter().map(charge)) {
            Decision::Granted(here) => {
                for Standing { limit, subject, requested, .. } in shared {
                    // Not owed: Redis was charged already.
                    self.ledger.known(limit, subject, *requested, here.now());
                }
                Ok(Decision::Granted(reservation.decided_by(Source::Share)))
            }
            Decision::Denied(denial) => {
                let whole: Vec<Arc<Limit>> = shared.iter().map(|s| Arc::clone(&s.limit)).collect();
                let mut refusing = not_never(denial.into_standings(), &whole).into_iter();
                let mut standings = reservation.standings().to_vec();
                for standing in &mut standings {
                    if wanted(&&*standing) && shares(&&*standing) {
                        *standing = refusing.next().unwrap_or_else(|| standing.clone());
                    }
                    standing.taken = false;
                }
                let now = reservation.now();
                reservation.settle(&[]);
                Ok(Decision::Denied(Denial::new(standings, now).decided_by(Source::Share)))
            }
        }
    }

    /// What every limit would say. Takes nothing.
    pub(super) fn look(&self, charges: Vec<Charge>) -> Vec<Standing> {
        let Sorted { shared, limits, uncounted } = self.sort(charges);
        with(not_never(self.ledger.memory.peek(shared), &limits), uncounted)
    }

    fn sort(&self, charges: Vec<Charge>) -> Sorted {
        let failing = self.failing();
        let mut shared = Vec::with_capacity(charges.len());
        let mut limits = Vec::with_capacity(charges.len());
        let mut uncounted = Vec::new();
        for (position, charge) in charges.into_iter().enumerate() {
            match charge.limit().while_down() {
                WhenDown::Share => {
                    limits.push(Arc::clone(charge.limit()));
                    shared.push(self.ledger.share(&failing, &self.mirror, charge));
                }
                WhenDown::Open => uncounted.push((position, uncounted_standing(charge, Retry::Now))),
                WhenDown::Closed => {
                    uncounted.push((position, uncounted_standing(charge, Retry::After(RETRY))))
                }
            }
        }
        Sorted { shared, limits, uncounted }
    }

    /// The shared store is owed other amounts than before.
    fn touched<'s>(&self, standings: impl Iterator<Item = &'s Standing>) {
        for standing in standings {
            if standing.limit.algorithm() != Algorithm::Concurrency {
                self.ledger.touched(&standing.limit, &standing.subject);
            }
        }
        self.wake_if_closed();
    }
}

/// A limit that counts nothing now.
fn uncounted_standing(charge: Charge, retry: Retry) -> Standing {
    let (limit, subject, requested) = charge.into_parts();
    let remaining = limit.capacity();
    let (taken, used, reset, life, history) = (false, 0, Millis::ZERO, 0, 0);
    Standing { limit, subject, requested, taken, used, remaining, reset, retry, life, history }
}

/// All standings, in the order of the charges.
fn with(mut standings: Vec<Standing>, uncounted: Vec<(usize, Standing)>) -> Vec<Standing> {
    for (position, standing) in uncounted {
        standings.insert(position, standing);
    }
    standings
}

/// What is more than a share but not more than the limit fits when the store is back. When that is nobody knows.
fn not_never(mut standings: Vec<Standing>, limits: &[Arc<Limit>]) -> Vec<Standing> {
    for index in 0..standings.len() {
        let standing = &standings[index];
        if standing.retry != Retry::Never {
            continue;
        }
        let same = |other: &&Standing| {
            other.limit.same_counter(&standing.limit) && other.subject == standing.subject
        };
        let before = standings[..=index].iter().filter(same);
        let needed = before.fold(0_u64, |sum, other| sum.saturating_add(other.requested));
        if needed <= limits[index].capacity() {
            standings[index].retry = Retry::After(RETRY);
        }
    }
    standings
}

/// What a reservation holds that was granted without the shared store: it is settled here, and what it used is among
/// what the shared store is owed.
struct Held {
    store: Arc<Inner>,
    hold: Box<dyn Hold>,
    /// Positions of the charges that were not counted.
    uncounted: Vec<usize>,
    /// Its calls in flight.
    call: Option<u64>,
    /// Of those that were counted: what the shared store had been asked to take over by then.
    asked: Vec<u64>,
}

impl Held {
    /// Those that were counted, of a list with an item per charge.
    fn counted<T: Clone>(&self, all: &[T]) -> Vec<T> {
        let counted = |(position, _): &(usize, &T)| self.uncounted.binary_search(position).is_err();
        all.iter().enumerate().filter(counted).map(|(_, item)| item.clone()).collect()
    }
}

impl Held {
    /// What the shared store was charged meanwhile, it gives back, too: where it still can, and no more than it took.
    fn give_back_late(&self, standings: &[Standing], corrections: &[Correction]) {
        let given_back =
            standings.iter().zip(corrections).zip(&self.asked).filter(|((_, c), _)| c.returned > 0);
        for ((Standing { limit, subject, .. }, correction), asked) in given_back {
            let overpaid = self.store.ledger.overpaid(limit, subject, *asked, correction.returned);
            let Some((limit, receipt, less)) = overpaid else { continue };
            let (subject, amount) = (subject.clone(), receipt.amount());
            let standing = crate::redis::standing_of(&limit, &subject, amount);
            let hold = self.store.redis.held_late(receipt);
            let held = settlements::Held { store: Arc::clone(&self.store), hold, here: None };
            held.settle(&[standing], &[amount - less]);
        }
    }
}

impl Hold for Held {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        self.call.iter().for_each(|call| self.store.end_call(*call));
        if self.uncounted.is_empty() {
            let corrections = self.hold.settle(standings, actual);
            self.store.touched(changed(standings, &corrections));
            self.give_back_late(standings, &corrections);
            return corrections;
        }
        let counted = self.counted(standings);
        let mut corrections = self.hold.settle(&counted, &self.counted(actual));
        self.store.touched(changed(&counted, &corrections));
        self.give_back_late(&counted, &corrections);
        for position in &self.uncounted {
            corrections.insert(*position, Correction::default());
        }
        corrections
    }

    fn renew(&self, standings: &[Standing]) {
        self.hold.renew(&self.counted(standings));
        self.call.iter().for_each(|call| self.store.renew_call(*call));
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.call.iter().for_each(|call| self.store.forget_call(*call));
    }
}

fn changed<'s>(standings: &'s [Standing], corrections: &[Correction]) -> impl Iterator<Item = &'s Standing> {
    let changed = corrections.iter().map(|correction| *correction != Correction::default());
    standings.iter().zip(changed.collect::<Vec<bool>>()).filter(|(_, changed)| *changed).map(|(s, _)| s)
}
