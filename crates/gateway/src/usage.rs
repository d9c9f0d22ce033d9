//! What was used, by whom, of which model: added up here as requests end, and handed to the store about once a second.
//!
//! Nothing here decides anything. The path of a request takes one lock for a moment, and makes no row where there is one.
//! What was handed over and not acknowledged is kept and sent again, as it was: the store adds each batch once. What the
//! process has not handed over when it is killed is lost, a second of it where the store answers.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{Hash, Hasher};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::MutexGuard;
use tollgate_limiter::Cost;

use crate::Gateway;
use crate::config::{Key, Retention};
use crate::control::{self, Batch, COUNT_MAX, Counts, Span, Unavailable, UsageRow};
use crate::ledger::Tokens;
use crate::metrics::Name;

/// How often it is handed over; with the time that takes, within a second.
const FLUSH_EVERY: Duration = Duration::from_millis(800);
/// Rows that wait to be handed over, beside those that are being. What is beyond them is counted together.
const ROWS_MAX: usize = 10_000;
/// Rows of one batch, so that no decision waits long behind it.
const BATCH_ROWS: usize = 50;

/// A request that has ended.
pub struct Ended {
    /// What it came with.
    pub key: Option<Arc<Key>>,
    /// What it asked for; `None`: no model of ours.
    pub model: Option<Name>,
    /// It was answered without asking a provider.
    pub refused: bool,
    /// What it used.
    pub tokens: Option<Tokens>,
    /// What that cost.
    pub cost: Cost,
}

type Open = HashMap<Whose, Counts, foldhash::fast::RandomState>;

/// What was used and is not in the store yet.
pub struct Usage {
    open: Mutex<Open>,
    handed: tokio::sync::Mutex<Handed>,
    writer: String,
}

/// What is being handed over.
#[derive(Default)]
struct Handed {
    /// The number of the last one made.
    last: u64,
    /// Not acknowledged; the first may be in the store all the same.
    batches: VecDeque<Arc<Batch>>,
}

impl Default for Usage {
    fn default() -> Self {
        Self {
            open: Mutex::default(),
            handed: tokio::sync::Mutex::default(),
            writer: format!("{:016x}", fastrand::u64(..)),
        }
    }
}

impl Usage {
    /// Counts a request that ended at this moment.
    pub fn note(&self, at: SystemTime, ended: &mut Ended) {
        let counts = ended.counts();
        let hour = Span::Hour.start(at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
        // Looked for by what the request itself holds, which it gets back.
        let whose = Whose { hour, who: Some((ended.key.take(), ended.model.take())) };
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let full = open.len() >= ROWS_MAX;
        match open.get_mut(&whose) {
            Some(row) => *row += counts,
            None if !full => drop(open.insert(whose.clone(), counts)),
            None => *open.entry(Whose { hour, who: None }).or_default() += counts,
        }
        drop(open);
        (ended.key, ended.model) = whose.who.unwrap_or_default();
    }

    /// Hands over all there is now, and comes back when the store has it.
    ///
    /// # Errors
    /// When the store does not answer: what it has not acknowledged is sent again the next time.
    pub async fn flush(&self, store: &control::Store, retention: Retention) -> Result<(), Unavailable> {
        let mut round = self.round(self.handed.lock().await);
        while let Some(batch) = round.next() {
            store.add_usage(&batch, retention).await?;
            round.acknowledged();
        }
        Ok(())
    }

    /// Rows that the store has not acknowledged.
    pub async fn waiting(&self) -> usize {
        let handed: usize = self.handed.lock().await.batches.iter().map(|batch| batch.rows.len()).sum();
        handed + self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn round<'a>(&'a self, handed: MutexGuard<'a, Handed>) -> Round<'a> {
        Round { usage: self, handed, taken: false }
    }
}

/// One handing over: of what is left of those before, then of what was used until then. What is used meanwhile is for the
/// next: while requests keep ending, a round that waited for it would have no end.
struct Round<'a> {
    usage: &'a Usage,
    handed: MutexGuard<'a, Handed>,
    taken: bool,
}

impl Round<'_> {
    /// The batch to be sent next; the same one until it is acknowledged.
    fn next(&mut self) -> Option<Arc<Batch>> {
        if self.handed.batches.is_empty() && !std::mem::replace(&mut self.taken, true) {
            let open = std::mem::take(&mut *self.usage.open.lock().unwrap_or_else(PoisonError::into_inner));
            self.handed.make(&self.usage.writer, open);
        }
        self.handed.batches.front().cloned()
    }

    fn acknowledged(&mut self) {
        self.handed.batches.pop_front();
    }
}

impl Handed {
    /// Makes batches of rows: each of one hour, the earliest first.
    fn make(&mut self, writer: &str, open: Open) {
        let mut hours: BTreeMap<u64, Vec<(UsageRow, Counts)>> = BTreeMap::new();
        for (whose, counts) in open {
            hours.entry(whose.hour).or_default().push((whose.row(), counts));
        }
        for (hour, rows) in hours {
            for rows in rows.chunks(BATCH_ROWS) {
                self.last += 1;
                let (writer, rows) = (writer.to_owned(), rows.to_vec());
                self.batches.push_back(Arc::new(Batch { writer, number: self.last, hour, rows }));
            }
        }
    }
}

/// Hands over what was used until the process ends. What a store that is away does not take waits for it.
pub async fn run(gateway: Arc<Gateway>) {
    let mut away = false;
    loop {
        tokio::time::sleep(FLUSH_EVERY).await;
        match (flush(&gateway).await, away) {
            (Ok(()), true) => {
                tracing::info!("usage is written again");
                away = false;
            }
            // Of a Redis that is known not to answer the log speaks already.
            (Err(Unavailable(why)), false) if !gateway.limits.is_degraded() => {
                tracing::warn!(%why, "usage cannot be written: it waits");
                away = true;
            }
            _ => {}
        }
    }
}

/// Hands over what was used on this instance. A Redis that is known not to answer is not asked: limits find out when it is
/// back.
///
/// # Errors
/// When the store does not answer.
pub async fn flush(gateway: &Gateway) -> Result<(), Unavailable> {
    if gateway.limits.is_degraded() {
        return Err(Unavailable("Redis does not answer".to_owned()));
    }
    flush_last(gateway).await
}

/// Hands it over if there is any way: the process ends.
///
/// # Errors
/// When the store does not answer.
pub async fn flush_last(gateway: &Gateway) -> Result<(), Unavailable> {
    let retention = gateway.snapshot.load().config.settings.usage;
    gateway.ledger.usage.flush(&gateway.control, retention).await
}

impl Ended {
    fn counts(&self) -> Counts {
        let Tokens { usage, estimated } = self.tokens.unwrap_or_default();
        let mut counts = Counts::default();
        // Added to nothing: each is within its bound then.
        counts += Counts {
            requests: 1,
            refused: u64::from(self.refused),
            estimated: u64::from(estimated),
            input: usage.prompt,
            cached_input: usage.cached,
            output: usage.completion,
            reasoning: usage.reasoning,
            total: usage.total.max(usage.prompt.saturating_add(usage.completion)),
            cost: self.cost.micros().min(COUNT_MAX),
        };
        counts
    }
}

/// What a row is found by, without making one: keys and models as requests hold them, compared by what they say. `None`:
/// all that are beyond the bound.
#[derive(Clone)]
struct Whose {
    hour: u64,
    who: Option<(Option<Arc<Key>>, Option<Name>)>,
}

impl Whose {
    /// User, id of the key, team, model.
    fn said(&self) -> Option<[Option<&str>; 4]> {
        let (key, model) = self.who.as_ref()?;
        let key = key.as_deref();
        let user = key.and_then(|key| Some(key.user.as_ref()?.name.as_str()));
        Some([user, key.map(|key| key.id.as_str()), key.and_then(Key::team), model.as_deref()])
    }

    fn row(&self) -> UsageRow {
        let Some(said) = self.said() else { return UsageRow::other() };
        let [user, api_key, team, model] = said.map(|name| name.map(str::to_owned));
        UsageRow { user, api_key, team, model }
    }
}

impl PartialEq for Whose {
    fn eq(&self, other: &Self) -> bool {
        (self.hour, self.said()) == (other.hour, other.said())
    }
}

impl Eq for Whose {}

impl Hash for Whose {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.hour, self.said()).hash(state);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::config::Own;
    use crate::dialect;

    fn key(id: &str, team: Option<&str>) -> Arc<Key> {
        let own = Own { team: team.map(str::to_owned), ..Own::default() };
        let (name, user) = (None, None);
        Arc::new(Key { hash: [0; 32], id: id.to_owned(), name, expires: None, revoked: false, user, own })
    }

    fn ended(key: Arc<Key>, prompt: u64) -> Ended {
        let usage = dialect::Usage { prompt, completion: 1, total: prompt + 1, ..dialect::Usage::default() };
        let tokens = Some(Tokens { usage, estimated: false });
        Ended {
            key: Some(key),
            model: Some("chat".into()),
            refused: false,
            tokens,
            cost: Cost::of(1_000_000, 1),
        }
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    /// What batches that were added once come to.
    #[derive(Default)]
    struct Added(RefCell<(u64, Vec<Arc<Batch>>)>);

    impl Added {
        fn add(&self, batch: &Arc<Batch>) -> bool {
            let mut added = self.0.borrow_mut();
            if batch.number > added.0 {
                added.0 = batch.number;
                added.1.push(batch.clone());
            }
            true
        }

        fn input(&self) -> u64 {
            self.0.borrow().1.iter().flat_map(|batch| &batch.rows).map(|(_, counts)| counts.input).sum()
        }
    }

    /// As a store does it that answers what `send` says.
    fn hand_over(usage: &Usage, send: impl Fn(Arc<Batch>) -> bool) -> bool {
        let mut round = usage.round(usage.handed.try_lock().expect("nobody else hands over"));
        while let Some(batch) = round.next() {
            if !send(batch) {
                return false;
            }
            round.acknowledged();
        }
        true
    }

    #[tokio::test]
    async fn each_hour_has_its_rows_and_a_row_is_one_whoever_holds_it() {
        let usage = Usage::default();
        for (second, key) in [
            (3_599, key("a", None)),
            (3_600, key("a", None)),
            (7_199, key("a", None)),
            (7_199, key("a", Some("red"))),
            (7_200, key("b", None)),
        ] {
            usage.note(at(second), &mut ended(key, 10));
        }
        let added = Added::default();
        let sent = hand_over(&usage, |batch| added.add(&batch));
        assert!(sent);
        let batches = added.0.borrow();
        let shape: Vec<(u64, u64, usize)> =
            batches.1.iter().map(|batch| (batch.number, batch.hour, batch.rows.len())).collect();
        assert_eq!(shape, [(1, 0, 1), (2, 3_600, 2), (3, 7_200, 1)]);
        let plain = batches.1[1].rows.iter().find(|(row, _)| row.team.is_none()).expect("a row");
        assert_eq!((plain.1.requests, plain.1.input, plain.1.output, plain.1.total), (2, 20, 2, 22));
        assert_eq!((plain.1.cost, plain.1.refused), (2, 0));
    }

    #[tokio::test]
    async fn a_lost_acknowledgement_counts_once() {
        let usage = Usage::default();
        let added = Added::default();
        let mut random = fastrand::Rng::with_seed(7);
        let mut noted = 0;
        for round in 0..500_u64 {
            for _ in 0..random.u64(..4) {
                usage.note(at(round * 900), &mut ended(key(&random.u8(..9).to_string(), None), round));
                noted += round;
            }
            let fate = random.u8(..3);
            hand_over(&usage, |batch| fate > 0 && added.add(&batch) && fate == 2);
        }
        let sent = hand_over(&usage, |batch| added.add(&batch));
        assert_eq!((sent, added.input(), usage.waiting().await), (true, noted, 0));
    }

    #[tokio::test]
    async fn a_round_ends_while_requests_do() {
        let usage = Usage::default();
        let note = || usage.note(at(0), &mut ended(key("a", None), 1));
        let (added, sent) = (Added::default(), std::cell::Cell::new(0));
        note();
        let lost = hand_over(&usage, |_| false);
        note();
        let whole = hand_over(&usage, |batch| {
            sent.set(sent.get() + 1);
            assert!(sent.get() <= 2, "it goes on");
            // One ends while each batch is sent.
            note();
            added.add(&batch)
        });
        // What was left over; what there was when that was sent. The last is for the next.
        assert_eq!((lost, whole, sent.get(), added.input(), usage.waiting().await), (false, true, 2, 3, 1));
    }

    #[tokio::test]
    async fn what_waits_is_bounded_and_nothing_of_it_is_lost() {
        let usage = Usage::default();
        for number in 0..3 * ROWS_MAX {
            usage.note(at(0), &mut ended(key(&number.to_string(), None), 1));
        }
        assert_eq!(usage.waiting().await, ROWS_MAX + 1);
        let added = Added::default();
        let sent = hand_over(&usage, |batch| added.add(&batch));
        assert_eq!((sent, added.input()), (true, 3 * ROWS_MAX as u64));
        let batches = added.0.borrow();
        assert!(batches.1.iter().all(|batch| batch.rows.len() <= BATCH_ROWS));
        let other = batches.1.iter().flat_map(|batch| &batch.rows).find(|(row, _)| *row == UsageRow::other());
        assert_eq!(other.map(|(_, counts)| counts.requests), Some(2 * ROWS_MAX as u64));
    }
}
