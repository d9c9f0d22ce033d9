//! Coalescing: while one script for a plan is on its way, requests with the same plan gather and go as one script.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use super::plan::Plan;
use crate::limit::Charge;
use crate::reservation::Decision;
use crate::store::StoreError;

/// The most requests that one script decides: a server serves nobody else meanwhile.
const BATCH_MAX: usize = 64;

/// One request that waits.
pub(super) struct Waiting {
    pub(super) charges: Vec<Charge>,
    pub(super) reply: Reply,
}

/// Whom to answer; once.
pub(super) struct Reply(Mutex<Option<oneshot::Sender<Answer>>>);

type Answer = Result<Decision, StoreError>;

impl Reply {
    pub(super) fn new(to: oneshot::Sender<Answer>) -> Reply {
        Reply(Mutex::new(Some(to)))
    }

    /// Gives it back where nobody waits for it: whoever asked has left, or was answered before.
    pub(super) fn send(&self, answer: Answer) -> Result<(), Answer> {
        match self.lock().take() {
            Some(to) => to.send(answer),
            None => Err(answer),
        }
    }

    /// Whether that was done.
    pub(super) fn is_answered(&self) -> bool {
        self.lock().is_none()
    }

    /// Whether nobody waits for it.
    pub(super) fn is_closed(&self) -> bool {
        self.lock().as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    fn lock(&self) -> MutexGuard<'_, Option<oneshot::Sender<Answer>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which plans have a script on its way, and who waits for the next one.
#[derive(Default)]
pub(super) struct Flights(Mutex<HashMap<Route, Vec<Waiting>>>);

/// A plan, and the connection that its scripts go by: who asks on another runtime waits for scripts of their own, not
/// for a thread to wake another.
type Route = (usize, Arc<Plan>);

/// The right to send scripts for a plan: one at a time has it.
pub(super) struct Flight {
    flights: Arc<Flights>,
    route: Route,
    landed: bool,
}

impl Flights {
    /// Waits for the script on its way, or is given the right to send one.
    pub(super) fn join(
        self: &Arc<Flights>,
        route: Route,
        waiting: Waiting,
    ) -> Option<(Flight, Vec<Waiting>)> {
        let mut gathering = self.lock();
        if let Some(others) = gathering.get_mut(&route) {
            others.push(waiting);
            return None;
        }
        gathering.insert(route.clone(), Vec::new());
        Some((Flight { flights: Arc::clone(self), route, landed: false }, vec![waiting]))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Route, Vec<Waiting>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight {
    /// Those who gathered meanwhile, in order; without any, the flight is over.
    pub(super) fn next(&mut self) -> Vec<Waiting> {
        let mut gathering = self.flights.lock();
        let others = gathering.get_mut(&self.route).map(|others| {
            let rest = others.split_off(others.len().min(BATCH_MAX));
            std::mem::replace(others, rest)
        });
        let batch = others.unwrap_or_default();
        if batch.is_empty() {
            gathering.remove(&self.route);
            self.landed = true;
        }
        batch
    }
}

impl Drop for Flight {
    /// Cut short, it takes those who wait with it: they learn that at once, and the next one starts anew.
    fn drop(&mut self) {
        if !self.landed {
            self.flights.lock().remove(&self.route);
        }
    }
}
