//! What a request holds while it runs, and says it used.

use std::fmt;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use crate::quota::Unit;
use crate::reservation::{Reservation, Standing};
use crate::spec::Correction;

/// How often running requests are heard of: three times in a lease.
const BEAT: Duration = Duration::from_secs(10);

/// In the extensions of every limited request. A handler says by it what the request really used; a stream takes a
/// clone along and says it at its end. When the last clone is gone, what was said is settled; of what nobody said
/// anything, the estimate stands. The body of the answer holds a clone until it was sent, or nobody wants it any more.
///
/// ```
/// use axum::Extension;
/// use tollgate_limiter::{Unit, tower::Meter};
///
/// async fn answer(Extension(meter): Extension<Meter>) -> String {
///     meter.used(Unit::Tokens, 42);
///     "forty-two tokens".into()
/// }
/// ```
#[derive(Clone)]
pub struct Meter(Arc<Held>);

struct Held(Mutex<Option<Open>>);

/// A reservation that is not settled, and what was said so far: one amount per charge, or nothing at all.
struct Open {
    reservation: Reservation,
    used: Vec<u64>,
}

impl Meter {
    pub(super) fn new(reservation: Reservation) -> Meter {
        Meter(Arc::new(Held(Mutex::new(Some(Open { reservation, used: Vec::new() })))))
    }

    /// Says what the request used of a unit, in every limit that counts it. The last word counts.
    pub fn used(&self, unit: Unit, amount: u64) {
        if let Some(Open { reservation, used }) = &mut *self.0.lock() {
            let standings = reservation.standings();
            if used.is_empty() {
                used.extend(standings.iter().map(|standing| standing.requested));
            }
            let counted = used.iter_mut().zip(standings).filter(|(_, one)| one.limit.unit() == unit);
            counted.for_each(|(used, _)| *used = amount);
        }
    }

    /// Settles now what was said. One correction per limit; none the second time.
    pub fn settle(&self) -> Vec<Correction> {
        self.0.settle()
    }

    /// Gives everything back: the request was answered by nobody.
    pub fn refund(&self) -> Vec<Correction> {
        let open = self.0.lock().take();
        open.map_or_else(Vec::new, |open| open.reservation.refund())
    }

    /// What each limit said when the request was let in; nothing after it was settled.
    pub fn standings(&self) -> Vec<Standing> {
        self.0.lock().as_ref().map_or_else(Vec::new, |open| open.reservation.standings().to_vec())
    }
}

impl fmt::Debug for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Meter").field(&self.0.lock().as_ref().map(|open| &open.reservation)).finish()
    }
}

impl Held {
    fn settle(&self) -> Vec<Correction> {
        let open = self.lock().take();
        open.map_or_else(Vec::new, |open| open.reservation.settle(&open.used))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Says of the requests that hold slots of calls in flight that they still run, in a thread of its own, which ends
/// with the last layer that needs it.
pub(super) struct Pulse {
    running: Arc<Mutex<Vec<Weak<Held>>>>,
    /// Dropped, it ends the thread.
    _alive: Sender<()>,
}

impl Pulse {
    pub(super) fn start() -> Pulse {
        let running = Arc::new(Mutex::new(Vec::new()));
        let (alive, ended) = channel::<()>();
        let heard = Arc::clone(&running);
        thread::spawn(move || {
            while ended.recv_timeout(BEAT) == Err(RecvTimeoutError::Timeout) {
                beat(&heard);
            }
        });
        Pulse { running, _alive: alive }
    }

    pub(super) fn watch(&self, meter: &Meter) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that ended are dropped before the list would grow: it is never more than twice what runs.
        if running.len() == running.capacity() {
            running.retain(|held: &Weak<Held>| held.strong_count() > 0);
        }
        running.push(Arc::downgrade(&meter.0));
    }
}

fn beat(running: &Mutex<Vec<Weak<Held>>>) {
    // A clone: whoever starts meanwhile does not wait, and a meter that ends here is settled outside the lock.
    let all = running.lock().unwrap_or_else(PoisonError::into_inner).clone();
    for held in all.iter().filter_map(Weak::upgrade) {
        if let Some(open) = &*held.lock() {
            open.reservation.renew();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::{ManualClock, Millis};
    use crate::limit::{Charge, Limit};
    use crate::memory::MemoryStore;
    use crate::quota::Algorithm;
    use crate::reservation::Decision;
    use crate::scope::Scope;

    #[test]
    fn a_beat_keeps_slots_and_forgets_what_ended() {
        let clock = ManualClock::at(Millis(1_794_614_400_000));
        let store = MemoryStore::new(clock.clone());
        let quota = "2 concurrent".parse().unwrap();
        let limit = Arc::new(Limit::new("r", quota, Algorithm::FixedWindow, Scope::GLOBAL).unwrap());
        let charge = || vec![Charge::new(Arc::clone(&limit), Scope::GLOBAL.subject(|_| "".into()), 1)];
        let pulse = Pulse::start();
        let take = || match store.reserve(charge()) {
            Decision::Granted(reservation) => {
                let meter = Meter::new(reservation);
                pulse.watch(&meter);
                meter
            }
            Decision::Denied(denial) => panic!("{denial:?}"),
        };
        let kept = take();
        for _ in 0..100 {
            drop(take());
            clock.advance(Millis(20_000));
            beat(&pulse.running);
        }
        assert_eq!(store.peek(charge())[0].used, 1);
        assert!(pulse.running.lock().unwrap().len() < 20);
        drop(kept);
        assert_eq!(store.peek(charge())[0].used, 0);
    }
}
