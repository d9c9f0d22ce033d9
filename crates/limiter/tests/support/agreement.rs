//! Random histories told to the definition, to memory and to Redis at once.

#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::collections::HashMap;
use std::sync::Arc;

use tollgate_limiter::spec::{Receipt, State};
use tollgate_limiter::{
    Algorithm, Charge, Correction, Decision, Limit, ManualClock, MemoryStore, Millis, RedisStore,
    Reservation, Retry, Standing, Store, Subject,
};

use crate::support::{Random, limit, user};

/// 2100-01-01: what expires by the clock of these histories does not expire by that of the server.
pub(crate) const FUTURE: u64 = 4_102_444_800_000;
const SUBJECTS: usize = 6;
const HELD_MAX: usize = 40;

/// Quotas of one counter: its capacity moves between these.
const QUOTAS: [&[&str]; 7] = [
    &["5/second", "3/second", "900/second"],
    &["7/10 s", "100/10 s"],
    &["60/minute", "61/minute", "10/minute", "7000000/minute"],
    &["1000/hour", "120/hour"],
    &["1000000000/day", "500000000/day", "1000/day", "20/day", "50000/day"],
    &["30/week", "3/week"],
    &["100/month", "90/month"],
];

/// Those of calls in flight.
const SLOTS: &[&str] = &["5 concurrent", "2 concurrent", "12 concurrent", "1000000 concurrent"];

/// Those that are counted in different units of time.
const DAYS: usize = 4;

/// What everybody must agree on: taken, used, remaining, reset, retry.
type View = (bool, u64, u64, Millis, Retry);

fn view(standing: &Standing) -> View {
    (standing.taken, standing.used, standing.remaining, standing.reset, standing.retry)
}

/// The definition, held by a map.
#[derive(Default)]
struct Definition {
    states: HashMap<(String, String), State>,
    births: u64,
}

#[derive(Clone)]
struct Taken {
    key: (String, String),
    limit: Arc<Limit>,
    amount: u64,
    receipt: Option<Receipt>,
}

impl Definition {
    fn key(charge: &Charge) -> (String, String) {
        let name = format!("{}:{}", charge.limit().algorithm(), charge.limit().id());
        (charge.subject().to_string(), name)
    }

    fn look(&mut self, charge: &Charge) -> State {
        self.births += 1;
        let found = self.states.get(&Self::key(charge)).cloned();
        found.unwrap_or_else(|| State::new(charge.limit().rate(), self.births))
    }

    fn needs(charges: &[Charge]) -> Vec<u64> {
        let mut sums: HashMap<_, u64> = HashMap::new();
        let add = |charge: &Charge| {
            let sum = sums.entry(Self::key(charge)).or_default();
            *sum = sum.saturating_add(charge.amount());
            *sum
        };
        charges.iter().map(add).collect()
    }

    fn peek(&mut self, charges: &[Charge], now: Millis) -> Vec<View> {
        let needs = Self::needs(charges);
        let views = charges.iter().zip(needs).map(|(charge, need)| {
            let mut state = self.look(charge);
            state.redate(charge.limit().rate(), now);
            let reading = state.reading(charge.limit().rate(), now);
            let retry = state.wait(charge.limit().rate(), now, need);
            (false, reading.used, reading.remaining, reading.reset, retry)
        });
        views.collect()
    }

    fn reserve(&mut self, charges: &[Charge], now: Millis) -> (bool, Vec<View>, Vec<Taken>) {
        for charge in charges {
            if let Some(state) = self.states.get_mut(&Self::key(charge)) {
                state.redate(charge.limit().rate(), now);
            }
        }
        let looked = self.peek(charges, now);
        let refuses = |(charge, view): (&Charge, &View)| !charge.limit().is_shadow() && view.4 != Retry::Now;
        if charges.iter().zip(&looked).any(refuses) {
            return (false, looked, Vec::new());
        }
        let (mut views, mut taken) = (Vec::new(), Vec::new());
        for (charge, looked) in charges.iter().zip(looked) {
            let (rate, key) = (charge.limit().rate(), Self::key(charge));
            let mut state = self.look(charge);
            let receipt = (looked.4 == Retry::Now).then(|| state.charge(rate, now, charge.amount()));
            let reading = state.reading(rate, now);
            let retry = match receipt {
                Some(_) => Retry::Now,
                None => state.wait(rate, now, charge.amount()),
            };
            if receipt.is_some() {
                self.states.insert(key.clone(), state);
            }
            views.push((receipt.is_some(), reading.used, reading.remaining, reading.reset, retry));
            taken.push(Taken { key, limit: Arc::clone(charge.limit()), amount: charge.amount(), receipt });
        }
        (true, views, taken)
    }

    fn settle(&mut self, taken: &[Taken], actual: &[u64], now: Millis) -> Vec<Correction> {
        let mut corrections = vec![Correction::default(); taken.len()];
        for (index, (taken, &actual)) in taken.iter().zip(actual).enumerate() {
            let known = self.states.contains_key(&taken.key);
            let Some(receipt) = &taken.receipt else { continue };
            let over = taken.limit.algorithm() == Algorithm::Concurrency;
            let actual = if over { 0 } else { actual };
            if actual == taken.amount || !known && actual < taken.amount {
                continue;
            }
            self.births += 1;
            let born = State::new(taken.limit.rate(), self.births);
            let state = self.states.entry(taken.key.clone()).or_insert(born);
            state.redate(taken.limit.rate(), now);
            corrections[index] = state.correct(taken.limit.rate(), now, receipt, actual);
        }
        corrections
    }
}

impl Definition {
    fn renew(&mut self, taken: &[Taken], now: Millis) {
        for taken in taken.iter().filter(|taken| taken.limit.algorithm() == Algorithm::Concurrency) {
            if let (Some(receipt), Some(state)) = (&taken.receipt, self.states.get_mut(&taken.key)) {
                state.redate(taken.limit.rate(), now);
                state.renew(taken.limit.rate(), now, receipt);
            }
        }
    }
}

/// A request that was granted, as each of them holds it.
struct Held {
    definition: Vec<Taken>,
    memory: Reservation,
    redis: Reservation,
}

/// Three ledgers of one history.
pub(crate) struct History {
    random: Random,
    clock: ManualClock,
    definition: Definition,
    memory: MemoryStore,
    redis: RedisStore,
    /// Counters of each subject: every capacity it can have, and the one it has.
    subjects: Vec<Vec<(Vec<Arc<Limit>>, usize)>>,
    held: Vec<Held>,
    /// When the latest denial promised room.
    promised: Option<Millis>,
    pub(crate) grants: u64,
    pub(crate) denials: u64,
    pub(crate) settlements: u64,
    pub(crate) renewals: u64,
    pub(crate) together: u64,
}

impl History {
    pub(crate) fn new(seed: u64, clock: ManualClock, redis: RedisStore) -> History {
        let mut random = Random(seed);
        let memory = MemoryStore::new(clock.clone());
        let subjects = (0..SUBJECTS).map(|subject| counters(&mut random, subject)).collect();
        History {
            random,
            clock,
            definition: Definition::default(),
            memory,
            redis,
            subjects,
            held: Vec::new(),
            promised: None,
            grants: 0,
            denials: 0,
            settlements: 0,
            renewals: 0,
            together: 0,
        }
    }

    /// Tells `steps` more; the first difference ends it.
    pub(crate) async fn tell(&mut self, steps: u64) -> Result<(), String> {
        for subject in 0..SUBJECTS {
            self.begin(subject).await?;
        }
        for step in 0..steps {
            let told = match self.random.below(40) {
                0..=5 => self.settle().await,
                14..=15 => self.renew().await,
                6 => self.clear().await,
                7 => {
                    self.change_capacity();
                    Ok(())
                }
                8..=10 => self.peek().await,
                12..=13 => self.together().await,
                11 if self.random.one_in(20) => self.crowd().await,
                _ => self.reserve().await,
            };
            told.map_err(|difference| format!("step {step} at {}: {difference}", self.memory.now()))?;
            self.move_clock();
        }
        Ok(())
    }

    /// Every counter of a subject exists from the beginning: which ones a store forgets early is its own affair.
    async fn begin(&mut self, subject: usize) -> Result<(), String> {
        let all = 0..self.subjects[subject].len();
        let charges = all.map(|counter| self.charge(subject, counter, 1)).collect();
        self.reserve_these(charges).await
    }

    fn charge(&self, subject: usize, counter: usize, amount: u64) -> Charge {
        let (limits, now) = &self.subjects[subject][counter];
        Charge::new(Arc::clone(&limits[*now]), name(subject), amount)
    }

    fn charges(&mut self) -> Vec<Charge> {
        let mut charges = Vec::new();
        for _ in 0..1 + self.random.below(3) {
            // Mostly one subject, so that its counters fill up together.
            let spread = if self.random.one_in(5) { SUBJECTS as u64 } else { 2 };
            let subject = self.random.below(spread) as usize;
            let counter = self.random.below(self.subjects[subject].len() as u64) as usize;
            let (limits, now) = &self.subjects[subject][counter];
            let capacity = limits[*now].capacity();
            let amount = match self.random.below(12) {
                0 => 0,
                1 => capacity,
                2 if self.random.one_in(4) => capacity + 1 + self.random.below(3),
                2 if self.random.one_in(4) => u64::MAX,
                3..=6 => 1 + self.random.below(capacity),
                _ => 1 + self.random.below(capacity / 6 + 1),
            };
            charges.push(self.charge(subject, counter, amount));
        }
        charges
    }

    async fn reserve(&mut self) -> Result<(), String> {
        let charges = self.charges();
        self.reserve_these(charges).await
    }

    async fn reserve_these(&mut self, charges: Vec<Charge>) -> Result<(), String> {
        let redis = Store::reserve(&self.redis, charges.clone()).await.map_err(|error| error.to_string())?;
        self.compare(charges, redis)
    }

    /// Several at once over the same counters: all but the first go as one script, in order.
    async fn together(&mut self) -> Result<(), String> {
        let first = self.charges();
        let mut requests = vec![first.clone()];
        for _ in 0..1 + self.random.below(6) {
            let another = |charge: &Charge| {
                let amount = self.random.below(charge.limit().capacity() / 3 + 2);
                Charge::new(Arc::clone(charge.limit()), charge.subject().clone(), amount)
            };
            requests.push(first.iter().map(another).collect());
        }
        let ask = |charges: &Vec<Charge>| {
            let (store, charges) = (self.redis.clone(), charges.clone());
            tokio::spawn(async move { store.reserve(charges).await })
        };
        let asked: Vec<_> = requests.iter().map(ask).collect();
        for (charges, asked) in requests.into_iter().zip(asked) {
            let redis = asked.await.unwrap().map_err(|error| error.to_string())?;
            self.compare(charges, redis)?;
        }
        self.together += 1;
        Ok(())
    }

    /// Takes the same from definition and memory.
    fn compare(&mut self, charges: Vec<Charge>, redis: Decision) -> Result<(), String> {
        let now = self.memory.now();
        let (granted, views, taken) = self.definition.reserve(&charges, now);
        let memory = self.memory.reserve(charges);
        for (store, decision) in [("memory", &memory), ("redis", &redis)] {
            let theirs: Vec<View> = decision.standings().iter().map(view).collect();
            if (decision.is_granted(), &theirs, decision.now()) != (granted, &views, now) {
                let ours = format!("{granted} {views:?} at {now}");
                return Err(format!("{store} decided {decision:?}, not {ours}"));
            }
        }
        match (memory, redis) {
            (Decision::Granted(memory), Decision::Granted(redis)) => {
                self.grants += 1;
                self.held.push(Held { definition: taken, memory, redis });
                if self.held.len() > HELD_MAX {
                    let forgotten = self.random.below(HELD_MAX as u64) as usize;
                    drop(self.held.swap_remove(forgotten));
                }
            }
            (Decision::Denied(memory), Decision::Denied(redis)) => {
                self.denials += 1;
                if let Retry::After(wait) = redis.retry() {
                    self.promised = Some(now + wait);
                }
                if (memory.binding_index(), memory.retry()) != (redis.binding_index(), redis.retry()) {
                    return Err("another limit binds".into());
                }
            }
            _ => return Err("one granted, one denied".into()),
        }
        Ok(())
    }

    /// Many small requests shortly after another: more than a log keeps apart.
    async fn crowd(&mut self) -> Result<(), String> {
        let subject = self.random.below(SUBJECTS as u64) as usize;
        let counters = &self.subjects[subject];
        let moving =
            |(limits, now): &(Vec<Arc<Limit>>, usize)| limits[*now].algorithm() == Algorithm::MovingWindow;
        let Some(counter) = counters.iter().position(moving) else { return Ok(()) };
        let (limits, now) = &counters[counter];
        let gap = 1 + limits[*now].window().longest().get() / 300;
        for _ in 0..40 + self.random.below(60) {
            self.clock.advance(Millis(self.random.below(gap)));
            let charge = self.charge(subject, counter, 1);
            self.reserve_these(vec![charge]).await?;
        }
        Ok(())
    }

    async fn peek(&mut self) -> Result<(), String> {
        let (charges, now) = (self.charges(), self.memory.now());
        let views = self.definition.peek(&charges, now);
        let memory: Vec<View> = self.memory.peek(charges.clone()).iter().map(view).collect();
        let redis = Store::peek(&self.redis, charges).await.map_err(|error| error.to_string())?;
        let redis: Vec<View> = redis.iter().map(view).collect();
        for (store, theirs) in [("memory", memory), ("redis", redis)] {
            if theirs != views {
                return Err(format!("{store} sees {theirs:?}, not {views:?}"));
            }
        }
        Ok(())
    }

    async fn settle(&mut self) -> Result<(), String> {
        if self.held.is_empty() {
            return Ok(());
        }
        let chosen = self.random.below(self.held.len() as u64) as usize;
        let held = self.held.swap_remove(chosen);
        let mut actual = |taken: &Taken| match self.random.below(6) {
            0 => 0,
            1 => taken.amount,
            2 => taken.amount.saturating_add(self.random.below(3 * taken.limit.capacity())),
            3 if self.random.one_in(20) => u64::MAX,
            _ => self.random.below(taken.amount.saturating_add(1).max(1)),
        };
        let mut actual: Vec<u64> = held.definition.iter().map(&mut actual).collect();
        if self.random.one_in(3) {
            actual.fill(0);
        }
        let now = self.memory.now();
        let ours = self.definition.settle(&held.definition, &actual, now);
        let memory = held.memory.settle(&actual);
        let redis = held.redis.settled(&actual).await.map_err(|error| error.to_string())?;
        self.settlements += 1;
        for (store, theirs) in [("memory", memory), ("redis", redis)] {
            if theirs != ours {
                return Err(format!("{store} settled {theirs:?}, not {ours:?}"));
            }
        }
        self.compare_counters(&held.definition).await
    }

    async fn renew(&mut self) -> Result<(), String> {
        let slots = |taken: &Taken| taken.limit.algorithm() == Algorithm::Concurrency;
        let running = |held: &&Held| held.definition.iter().any(slots);
        let count = self.held.iter().filter(running).count();
        if count == 0 {
            return Ok(());
        }
        let chosen = self.random.below(count as u64) as usize;
        let held = self.held.iter().filter(running).nth(chosen).unwrap();
        self.definition.renew(&held.definition, self.memory.now());
        held.memory.renew();
        held.redis.renewed().await.map_err(|error| error.to_string())?;
        self.renewals += 1;
        let taken: Vec<Taken> = held.definition.clone();
        self.compare_counters(&taken).await
    }

    /// What is in the counters afterwards.
    async fn compare_counters(&mut self, taken: &[Taken]) -> Result<(), String> {
        let looks = taken.iter().map(|taken| {
            let subject: Subject = taken.key.0.parse().unwrap();
            Charge::new(Arc::clone(&taken.limit), subject, 1)
        });
        let charges: Vec<Charge> = looks.collect();
        let views = self.definition.peek(&charges, self.memory.now());
        let redis = Store::peek(&self.redis, charges).await.map_err(|error| error.to_string())?;
        let redis: Vec<View> = redis.iter().map(view).collect();
        if redis == views { Ok(()) } else { Err(format!("redis is left with {redis:?}, not {views:?}")) }
    }

    async fn clear(&mut self) -> Result<(), String> {
        if !self.random.one_in(4) {
            return Ok(());
        }
        let number = self.random.below(SUBJECTS as u64) as usize;
        let subject = name(number);
        self.definition.states.retain(|key, _| key.0 != subject.as_str());
        let memory = self.memory.clear(&subject);
        let redis = Store::clear(&self.redis, &subject).await.map_err(|error| error.to_string())?;
        if memory != redis {
            return Err(format!("redis cleared: {redis}, memory: {memory}"));
        }
        self.begin(number).await
    }

    fn change_capacity(&mut self) {
        let spread = if self.random.one_in(5) { SUBJECTS as u64 } else { 2 };
        let subject = self.random.below(spread) as usize;
        let counter = self.random.below(self.subjects[subject].len() as u64) as usize;
        let (limits, now) = &mut self.subjects[subject][counter];
        *now = self.random.below(limits.len() as u64) as usize;
    }

    fn move_clock(&mut self) {
        let (now, random) = (self.memory.now().get(), &mut self.random);
        if let Some(promised) = self.promised.take().filter(|_| random.one_in(20)) {
            // To the moment it was promised for, or one before.
            self.clock.set(promised - Millis(random.below(2)));
            return;
        }
        let to = match random.below(200) {
            0 => now + random.below(40 * 86_400_000),
            1 => now + random.below(86_400_000),
            2 => now.saturating_sub(random.below(86_400_000)),
            3..=6 => now.saturating_sub(random.below(90_000)),
            7..=20 => now + random.below(70_000),
            21..=60 => now + random.below(3_000),
            61..=100 => now + random.below(50),
            _ => now,
        };
        self.clock.set(Millis(to.max(FUTURE)));
    }
}

fn name(subject: usize) -> Subject {
    user(["alice", "bob", "carol", "dave", "erin", "frank"][subject])
}

/// Two to six counters: the first subjects have one of each algorithm.
fn counters(random: &mut Random, subject: usize) -> Vec<(Vec<Arc<Limit>>, usize)> {
    let mut counters = Vec::new();
    for number in 0..4 + random.below(4) as usize {
        let algorithm = Algorithm::ALL[number % 4];
        let days = subject == 0 && algorithm == Algorithm::TokenBucket;
        let quotas = QUOTAS[if days { DAYS } else { random.below(QUOTAS.len() as u64) as usize }];
        let rule = format!("r{subject}{number}");
        let shadow = number >= 4 && random.one_in(2);
        let make = |quota: &str| {
            let limit = limit(&rule, quota, algorithm);
            if shadow { Arc::new(Arc::unwrap_or_clone(limit).shadow()) } else { limit }
        };
        let mut limits: Vec<Arc<Limit>> = quotas.iter().map(|quota| make(quota)).collect();
        if algorithm == Algorithm::TokenBucket && limits[0].algorithm() == algorithm {
            limits.extend(quotas.iter().map(|quota| make(&format!("{quota} burst 12"))));
        }
        counters.push((limits, 0));
    }
    // Of the first subjects, also calls in flight: two limits, whose leases are in one set.
    for number in 0..if subject < 3 { 2 } else { 0 } {
        let rule = format!("s{subject}{number}");
        let limits = SLOTS.iter().map(|quota| limit(&rule, quota, Algorithm::Concurrency)).collect();
        counters.push((limits, number));
    }
    counters
}
