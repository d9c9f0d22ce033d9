//! One shard: subjects, their counters, and who is forgotten first.

use std::cmp::{Ordering, Reverse};
use std::collections::hash_map::Entry;
use std::collections::{BinaryHeap, HashMap};
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use super::key::{Brought, Key};
use super::{Budgets, Occupancy};
use crate::clock::Millis;
use crate::limit::{Claim, Limit};
use crate::reservation::Standing;
use crate::scope::Subject;
use crate::spec::{Correction, Receipt, State};

/// Tickets without a subject that a queue may keep.
const STALE_TICKETS_MAX: usize = 64;

/// Which budget a subject counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Keyed,
    Unauthenticated,
}

impl Class {
    pub(super) fn of(subject: &Subject) -> Class {
        if subject.is_unauthenticated() { Class::Unauthenticated } else { Class::Keyed }
    }
}

/// Subjects by key. Each has one ticket in the queue of its class: when it was expected to have nothing in use, by
/// what was known when the ticket was written. A ticket is brought up to date only when it comes to the front.
pub(super) struct Shard {
    subjects: HashMap<Key, Counters, BuildHasherDefault<Brought>>,
    keyed: Queue,
    unauthenticated: Queue,
    /// Numbers the lives of states and tickets.
    births: u64,
    evicted_live: u64,
    #[cfg(feature = "persist")]
    journal: Option<Journal>,
}

/// The subjects of one class.
struct Queue {
    tickets: BinaryHeap<Reverse<Ticket>>,
    subjects: usize,
    budget: usize,
}

/// The counters of one subject.
struct Counters {
    class: Class,
    /// There is a row of it in the file.
    #[cfg(feature = "persist")]
    stored: bool,
    ticket: u64,
    list: Vec<Counter>,
}

/// One counter, with the limit it was last charged by.
struct Counter {
    limit: Arc<Limit>,
    state: State,
}

/// Ordered by time, then by age.
struct Ticket {
    idle: Millis,
    number: u64,
    key: Key,
}

impl Shard {
    pub(super) fn new(budgets: Budgets) -> Shard {
        Shard {
            subjects: HashMap::default(),
            keyed: Queue::new(budgets.keyed),
            unauthenticated: Queue::new(budgets.unauthenticated),
            births: 0,
            evicted_live: 0,
            #[cfg(feature = "persist")]
            journal: None,
        }
    }

    /// The state of a counter, if there is one.
    pub(super) fn state(&mut self, key: &Key, limit: &Arc<Limit>) -> Option<&mut State> {
        let counters = self.subjects.get_mut(key)?;
        let place = counters.place(limit)?;
        Some(&mut counters.list[place].state)
    }

    /// The counters of a subject that is known as what these claims say it is. `None` says only that this was not enough.
    #[inline]
    pub(super) fn known<C: Claim>(&mut self, key: &Key, claims: &[C]) -> Option<Known<'_>> {
        let counters = self.subjects.get_mut(key)?;
        let promoted = || claims.iter().any(|claim| !claim.subject().is_unauthenticated());
        if counters.class == Class::Unauthenticated && promoted() {
            return None;
        }
        Some(Known {
            counters,
            #[cfg(feature = "persist")]
            journal: &mut self.journal,
        })
    }

    /// The state of a counter, born if there was none. A subject once known as keyed stays keyed.
    pub(super) fn state_or_new(
        &mut self,
        key: &Key,
        class: Class,
        limit: &Arc<Limit>,
        now: Millis,
    ) -> &mut State {
        self.births += 1;
        let birth = self.births;
        #[cfg(feature = "persist")]
        journal::mark(&mut self.journal, key);
        let counters = match self.subjects.entry(key.clone()) {
            Entry::Occupied(occupied) => occupied.into_mut(),
            Entry::Vacant(vacant) => {
                let queue = match class {
                    Class::Keyed => &mut self.keyed,
                    Class::Unauthenticated => &mut self.unauthenticated,
                };
                queue.join(now, birth, key);
                vacant.insert(Counters::new(class, birth))
            }
        };
        if counters.class == Class::Unauthenticated && class == Class::Keyed {
            self.unauthenticated.subjects -= 1;
            self.keyed.join(now, birth, key);
            (counters.class, counters.ticket) = (class, birth);
        }
        counters.state_or_new(limit, now, birth)
    }

    /// Settles what `receipt` took. A counter that was forgotten meanwhile is born again only to be charged.
    /// It is another amount than was asked for.
    pub(super) fn settle(
        &mut self,
        key: &Key,
        standing: &Standing,
        now: Millis,
        receipt: &Receipt,
        actual: u64,
    ) -> Correction {
        let (limit, rate) = (&standing.limit, standing.limit.rate());
        let forgotten = self.state(key, limit).is_none();
        if forgotten && actual < standing.requested {
            return Correction::default();
        }
        let state = self.state_or_new(key, Class::of(&standing.subject), limit, now);
        state.redate(rate, now);
        state.correct(rate, now, receipt, actual)
    }

    /// Renews the lease of `receipt`.
    pub(super) fn renew(&mut self, key: &Key, standing: &Standing, now: Millis, receipt: &Receipt) {
        let (limit, rate) = (&standing.limit, standing.limit.rate());
        let state = self.state_or_new(key, Class::of(&standing.subject), limit, now);
        state.redate(rate, now);
        state.renew(rate, now, receipt);
    }

    /// Forgets a subject. Says whether it was known.
    pub(super) fn remove(&mut self, key: &Key) -> bool {
        let Some(counters) = self.subjects.remove(key) else {
            return false;
        };
        #[cfg(feature = "persist")]
        self.mark_removed(key, &counters);
        self.queue(counters.class).subjects -= 1;
        true
    }

    /// Forgets subjects while a class is past its budget: those with nothing in use first, then those nearest to it.
    pub(super) fn make_room(&mut self, now: Millis) {
        for class in [Class::Keyed, Class::Unauthenticated] {
            while self.queue(class).subjects > self.queue(class).budget {
                let Some(Reverse(ticket)) = self.queue(class).tickets.pop() else {
                    break;
                };
                self.redeem(class, ticket, now);
            }
            self.sweep(class);
        }
    }

    /// The names of all subjects.
    pub(super) fn texts(&self) -> Vec<Arc<str>> {
        self.subjects.keys().map(|key| key.text.clone()).collect()
    }

    /// The ids of the limits that a subject has counters of.
    pub(super) fn limits_of(&self, key: &Key) -> Vec<String> {
        let counters = self.subjects.get(key).into_iter().flat_map(|counters| &counters.list);
        counters.map(|counter| counter.limit.id().to_owned()).collect()
    }

    /// Subjects in both classes, and how many were forgotten with something in use.
    pub(super) fn occupancy(&self) -> Occupancy {
        Occupancy {
            keyed: self.keyed.subjects,
            unauthenticated: self.unauthenticated.subjects,
            evicted_live: self.evicted_live,
        }
    }

    /// Forgets the subject of a ticket from the front, if the ticket is still right about it; else renews it.
    fn redeem(&mut self, class: Class, ticket: Ticket, now: Millis) {
        let Some(counters) = self.subjects.get(&ticket.key).filter(|c| c.ticket == ticket.number) else {
            return;
        };
        let reset = counters.reset(now);
        if reset > Millis::ZERO && now + reset > ticket.idle {
            self.queue(class).tickets.push(Reverse(Ticket { idle: now + reset, ..ticket }));
            return;
        }
        self.evicted_live += u64::from(reset > Millis::ZERO);
        self.remove(&ticket.key);
    }

    /// Drops tickets of subjects that were cleared, when they are more than the others.
    fn sweep(&mut self, class: Class) {
        let queue = match class {
            Class::Keyed => &mut self.keyed,
            Class::Unauthenticated => &mut self.unauthenticated,
        };
        if queue.tickets.len() > 2 * queue.subjects + STALE_TICKETS_MAX {
            let subjects = &self.subjects;
            let valid =
                |ticket: &Ticket| subjects.get(&ticket.key).is_some_and(|c| c.ticket == ticket.number);
            queue.tickets.retain(|Reverse(ticket)| valid(ticket));
        }
    }

    fn queue(&mut self, class: Class) -> &mut Queue {
        match class {
            Class::Keyed => &mut self.keyed,
            Class::Unauthenticated => &mut self.unauthenticated,
        }
    }
}

impl Queue {
    fn new(budget: usize) -> Queue {
        Queue { tickets: BinaryHeap::new(), subjects: 0, budget }
    }

    fn join(&mut self, now: Millis, number: u64, key: &Key) {
        self.subjects += 1;
        self.tickets.push(Reverse(Ticket { idle: now, number, key: key.clone() }));
    }
}

impl Counters {
    fn new(class: Class, ticket: u64) -> Counters {
        Counters {
            class,
            #[cfg(feature = "persist")]
            stored: false,
            ticket,
            list: Vec::with_capacity(1),
        }
    }

    fn place(&self, limit: &Arc<Limit>) -> Option<usize> {
        let same =
            |counter: &Counter| Arc::ptr_eq(&counter.limit, limit) || counter.limit.same_counter(limit);
        self.list.iter().position(same)
    }

    fn state_or_new(&mut self, limit: &Arc<Limit>, now: Millis, birth: u64) -> &mut State {
        let place = match self.place(limit) {
            Some(place) => {
                if !Arc::ptr_eq(&self.list[place].limit, limit) {
                    self.list[place].limit = Arc::clone(limit);
                }
                place
            }
            None => {
                // Counters of limits that are no more leave when others come.
                self.list.retain(|counter| counter.reset(now) > Millis::ZERO);
                self.list.push(Counter { limit: Arc::clone(limit), state: State::new(limit.rate(), birth) });
                self.list.len() - 1
            }
        };
        &mut self.list[place].state
    }

    /// How long until nothing is in use in any counter.
    fn reset(&self, now: Millis) -> Millis {
        self.list.iter().map(|counter| counter.reset(now)).max().unwrap_or_default()
    }
}

impl Counter {
    fn reset(&self, now: Millis) -> Millis {
        self.state.reading(self.limit.rate(), now).reset
    }
}

impl PartialEq for Ticket {
    fn eq(&self, other: &Ticket) -> bool {
        (self.idle, self.number) == (other.idle, other.number)
    }
}

impl Eq for Ticket {}

impl PartialOrd for Ticket {
    fn partial_cmp(&self, other: &Ticket) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ticket {
    fn cmp(&self, other: &Ticket) -> Ordering {
        (self.idle, self.number).cmp(&(other.idle, other.number))
    }
}

mod known;
pub(super) use known::Known;

#[cfg(feature = "persist")]
mod journal;
#[cfg(feature = "persist")]
use journal::Journal;
#[cfg(feature = "persist")]
pub(crate) use journal::Row;

#[cfg(test)]
mod tests;
