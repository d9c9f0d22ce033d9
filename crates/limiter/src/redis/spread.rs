//! Charges whose counters are on different masters of a cluster: one script each, at the same time, and what was
//! granted is given back when another one refuses or fails.
//!
//! Levels are equal afterwards. Meanwhile somebody else may be refused, and nobody is ever let in wrongly: every part
//! is taken before the whole is granted.

use std::future::Future;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::cluster::slot;
use super::plan::{self, Plan};
use super::replay::{Counters, Outcome};
use super::settlement::Held;
use super::{ASKING_MAX, Awaited, GRACE, LATE_MAX, Place, RedisStore, lock};
use crate::clock::Millis;
use crate::limit::Charge;
use crate::reservation::{Decision, Denial, Hold, Standing};
use crate::scope::Subject;
use crate::spec::{Correction, Receipt};
use crate::store::{Answer, Source, StoreError};

/// What one script may be about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Slot,
    /// While a slot moves, its keys may be on two servers: each is asked for by itself.
    Key,
}

/// Whether nothing was done because the keys of one slot are on two servers.
pub(super) fn is_split(error: &StoreError) -> bool {
    matches!(error, StoreError::Refused { code, .. } if code == "TRYAGAIN")
}

/// The positions of those that belong together.
fn groups<'s>(prefix: &str, subjects: impl Iterator<Item = &'s Subject>, by: By) -> Vec<Vec<usize>> {
    let mut groups: Vec<(String, u16, Vec<usize>)> = Vec::new();
    for (index, subject) in subjects.enumerate() {
        let key = plan::key(prefix, subject);
        let slot = slot(&key);
        let together = |known: &(String, u16, _)| known.0 == key || (by == By::Slot && known.1 == slot);
        match groups.iter_mut().find(|known| together(known)) {
            Some((_, _, indexes)) => indexes.push(index),
            None => groups.push((key, slot, vec![index])),
        }
    }
    groups.into_iter().map(|(_, _, indexes)| indexes).collect()
}

/// What one script decides.
struct Part {
    /// Of its charges, among all.
    indexes: Vec<usize>,
    charges: Vec<Charge>,
    plan: Arc<Plan>,
}

/// What it came to: the counters as they were, and whether the charges were taken.
struct Answered {
    part: Part,
    before: Counters,
    granted: bool,
}

impl RedisStore {
    /// Decides in a cluster.
    pub(super) async fn take_spread(&self, charges: Vec<Charge>) -> Result<Decision, StoreError> {
        let mut parts = self.parts(&charges, By::Slot)?;
        let answer = match parts.pop() {
            Some(only) if parts.is_empty() => self.take_together(only.plan, only.charges).await,
            last => {
                parts.extend(last);
                self.take_parts(parts).await
            }
        };
        match answer {
            Err(error) if is_split(&error) => self.take_parts(self.parts(&charges, By::Key)?).await,
            answer => answer,
        }
    }

    /// What every limit would say, in a cluster.
    pub(super) async fn peek_spread(&self, charges: Vec<Charge>) -> Result<Vec<Standing>, StoreError> {
        let answered = match self.ask_parts(self.parts(&charges, By::Slot)?, false).await {
            Err(error) if is_split(&error) => self.ask_parts(self.parts(&charges, By::Key)?, false).await,
            answer => answer,
        };
        Ok(in_order(
            answered?.into_iter().map(|a| (a.part.indexes, a.before.stand(&a.part.plan, a.part.charges))),
        ))
    }

    fn parts(&self, charges: &[Charge], by: By) -> Result<Vec<Part>, StoreError> {
        // Of all of them, also to tell what is wrong with them together.
        let epochs = Some(&self.0.epochs).filter(|_| by == By::Slot);
        let whole = Plan::of_charges(&self.0.prefix, epochs, charges)?;
        let groups = groups(&self.0.prefix, charges.iter().map(Charge::subject), by);
        if let [indexes] = &groups[..] {
            let (indexes, charges) = (indexes.clone(), charges.to_vec());
            return Ok(vec![Part { indexes, charges, plan: Arc::new(whole) }]);
        }
        let part = |indexes: Vec<usize>| {
            let charges: Vec<Charge> = indexes.iter().map(|index| charges[*index].clone()).collect();
            let plan = Arc::new(Plan::of_charges(&self.0.prefix, epochs, &charges)?);
            Ok(Part { indexes, charges, plan })
        };
        groups.into_iter().map(part).collect()
    }

    async fn take_parts(&self, parts: Vec<Part>) -> Result<Decision, StoreError> {
        let parts = match self.remembered_parts(parts) {
            Ok(denial) => return Ok(Decision::Denied(denial)),
            Err(parts) => parts,
        };
        let _place = Place::among(&self.0.asking, ASKING_MAX).ok_or(StoreError::Busy)?;
        let (reply, answer) = oneshot::channel();
        let mut answer = Awaited(answer);
        let (store, piece) = (self.clone(), self.0.underway.begin());
        // In a task: whoever asked may leave.
        drop(self.0.connection.here().1.spawn(async move {
            store.decide(parts, reply).await;
            drop(piece);
        }));
        match timeout(self.0.deadline + GRACE, &mut answer.0).await {
            Ok(Ok(decision)) => decision,
            Ok(Err(_)) => Err(StoreError::Lost),
            Err(_) => Err(StoreError::Timeout),
        }
    }

    /// Refuses what was refused a moment ago.
    fn remembered_parts(&self, parts: Vec<Part>) -> Result<Denial, Vec<Part>> {
        let Some(denials) = &self.0.denials else {
            return Err(parts);
        };
        let now = Instant::now();
        let recall = |part: &Part| {
            let (counters, age) = denials.recall(&part.plan, part.plan.subjects(), now)?;
            Some(counters.at(counters.now + Millis::from(age)))
        };
        let Some(counters) = parts.iter().map(recall).collect::<Option<Vec<Counters>>>() else {
            return Err(parts);
        };
        let refuses = |(part, counters): (&Part, &Counters)| counters.refuse(&part.plan, &part.charges);
        if !parts.iter().zip(&counters).any(refuses) {
            return Err(parts);
        }
        let known = parts.into_iter().zip(counters);
        let answered = known.map(|(part, before)| Answered { part, before, granted: false }).collect();
        Ok(denial(answered).decided_by(Source::DenialMemory))
    }

    async fn decide(&self, parts: Vec<Part>, reply: oneshot::Sender<Result<Decision, StoreError>>) {
        let left = Instant::now();
        let departure =
            |part: &Part| self.0.denials.as_ref().map(|d| d.departure(part.plan.subjects(), left));
        let departures: Vec<_> = parts.iter().map(departure).collect();
        let answered = match self.ask_parts(parts, true).await {
            Ok(answered) => answered,
            Err(error) => {
                // Nobody left to tell is nothing to do.
                let _ = reply.send(Err(error));
                return;
            }
        };
        if answered.iter().all(|part| part.granted) {
            if let Err(Ok(Decision::Granted(unwanted))) = reply.send(self.grant_parts(answered)) {
                // Whoever asked has left: nothing will be used.
                unwanted.refund();
            }
            return;
        }
        let known: Vec<_> = answered
            .iter()
            .map(|answered| (Arc::clone(&answered.part.plan), answered.before.clone(), answered.granted))
            .collect();
        let refunds = self.give_back(&answered, false);
        let _ = reply.send(Ok(Decision::Denied(denial(answered))));
        for refund in refunds {
            // Counted where it is sent.
            let _ = refund.await;
        }
        let Some(denials) = &self.0.denials else {
            return;
        };
        for ((plan, before, granted), departure) in known.into_iter().zip(departures) {
            // What has room is remembered only to tell its standing; giving back has made it forgotten.
            let departure = if granted { Some(denials.departure(plan.subjects(), left)) } else { departure };
            if let Some(departure) = departure {
                denials.remember(plan, departure, before, Instant::now());
            }
        }
    }

    /// Asks for all parts at once. When one fails, what the others took is given back.
    async fn ask_parts(&self, parts: Vec<Part>, take: bool) -> Result<Vec<Answered>, StoreError> {
        let ask = |part: Part| {
            let ((tell, told), store) = (oneshot::channel(), self.clone());
            drop(self.0.connection.here().1.spawn(async move { store.ask_part(part, take, tell).await }));
            told
        };
        if take {
            self.0.scripts_sent.fetch_add(parts.len() as u64, Ordering::Relaxed);
        }
        let asked: Vec<_> = parts.into_iter().map(ask).collect();
        let (mut answered, mut failed) = (Vec::with_capacity(asked.len()), None);
        for asked in asked {
            match asked.await.unwrap_or(Err(StoreError::Lost)) {
                Ok(part) => answered.push(part),
                Err(error) => failed = Some(worse(failed, error)),
            }
        }
        let Some(error) = failed else {
            return Ok(answered);
        };
        let refunds = self.give_back(&answered, false);
        if is_split(&error) {
            // Asked again in a moment: not against itself.
            for refund in refunds {
                let _ = refund.await;
            }
        }
        Err(error)
    }

    /// Asks for one part. When that takes too long, what it takes after all is given back.
    async fn ask_part(&self, part: Part, take: bool, tell: oneshot::Sender<Result<Answered, StoreError>>) {
        let (tell, late) = (Mutex::new(Some(tell)), Mutex::new(None));
        let overdue = || {
            if let Some(tell) = lock(&tell).take() {
                // Nobody left to tell is nothing to do.
                let _ = tell.send(Err(StoreError::Timeout));
            }
            *lock(&late) = Place::among(&self.0.late, LATE_MAX).filter(|_| take);
            lock(&late).is_some()
        };
        let amounts = part.charges.iter().map(Charge::amount).filter(|_| take).collect();
        let answer = self.0.ask(&part.plan, &part.charges, amounts, &overdue).await;
        let answer = answer.map(|(verdicts, before)| {
            let granted = verdicts.first() == Some(&b'1');
            Answered { part, before, granted }
        });
        let (unwanted, late) = match lock(&tell).take() {
            Some(tell) => (tell.send(answer).err(), false),
            None => (Some(answer), true),
        };
        if let Some(Ok(unwanted)) = unwanted {
            // Sent, not awaited.
            drop(self.give_back(&[unwanted], late));
        }
    }

    /// Gives back what the granted parts took; of what they took too late, only where it was taken.
    fn give_back(&self, answered: &[Answered], late: bool) -> Vec<Answer<'static, Vec<Correction>>> {
        let mut refunds = Vec::new();
        for Answered { part, before, .. } in answered.iter().filter(|answered| answered.granted) {
            if let Outcome::Granted(standings, receipts) =
                before.clone().reserve(&part.plan, part.charges.clone())
            {
                let nothing = vec![0; standings.len()];
                let held = Held::new(self.clone(), receipts).only_in(late.then_some(before.history));
                refunds.push(held.spread().settled(&standings, &nothing));
            }
        }
        refunds
    }

    fn grant_parts(&self, answered: Vec<Answered>) -> Result<Decision, StoreError> {
        let unreplicated = answered.iter().any(|answered| answered.before.unreplicated);
        let mut now = Millis(0);
        let (mut standings, mut receipts) = (Vec::new(), Vec::new());
        for Answered { part, mut before, .. } in answered {
            now = now.max(before.now);
            let Outcome::Granted(taken, held) = before.reserve(&part.plan, part.charges) else {
                return Err(StoreError::Reply("script and definition disagree".into()));
            };
            standings.push((part.indexes.clone(), taken));
            receipts.push((part.indexes, held));
        }
        let (standings, receipts) = (in_order(standings), in_order(receipts));
        let reservation = self.hold(standings, now, receipts, None);
        if !unreplicated {
            return Ok(Decision::Granted(reservation));
        }
        self.0.unreplicated.fetch_add(1, Ordering::Relaxed);
        Ok(Decision::Granted(reservation.unacknowledged()))
    }
}

/// What may have been done outweighs what was not.
fn worse(known: Option<StoreError>, error: StoreError) -> StoreError {
    match known {
        Some(known) if known.outcome_unknown() || !error.outcome_unknown() => known,
        _ => error,
    }
}

fn denial(answered: Vec<Answered>) -> Denial {
    let now = answered.iter().map(|answered| answered.before.now).max().unwrap_or(Millis(0));
    let standings = in_order(
        answered.into_iter().map(|a| (a.part.indexes, a.before.stand(&a.part.plan, a.part.charges))),
    );
    Denial::new(standings, now).decided_by(Source::Redis)
}

/// What belongs to positions, by position.
fn in_order<T>(parts: impl IntoIterator<Item = (Vec<usize>, Vec<T>)>) -> Vec<T> {
    let mut all: Vec<(usize, T)> =
        parts.into_iter().flat_map(|(indexes, items)| indexes.into_iter().zip(items)).collect();
    all.sort_by_key(|(index, _)| *index);
    all.into_iter().map(|(_, item)| item).collect()
}

/// What a reservation holds of several masters.
struct Spread {
    parts: Parts,
    /// The heartbeats sent last. What is sent next waits for them, or one that came late would hold a slot that nobody
    /// uses.
    sent: Mutex<Option<JoinHandle<()>>>,
}

/// Receipts, one for each charge.
#[derive(Clone)]
struct Parts {
    store: RedisStore,
    receipts: Vec<Option<Receipt>>,
    only_in: Option<u32>,
}

impl Held {
    /// The same, settled in every slot by itself.
    pub(super) fn spread(self) -> Box<dyn Hold> {
        let parts = Parts { store: self.store, receipts: self.receipts, only_in: self.only_in };
        Box::new(Spread { parts, sent: Mutex::new(None) })
    }
}

impl Parts {
    /// What is held of these charges.
    fn part(&self, indexes: &[usize], standings: &[Standing]) -> (Held, Vec<Standing>) {
        let receipts = indexes.iter().map(|index| self.receipts[*index]).collect();
        let standings = indexes.iter().map(|index| standings[*index].clone()).collect();
        (Held::new(self.store.clone(), receipts).only_in(self.only_in), standings)
    }

    fn groups(&self, standings: &[Standing], by: By) -> Vec<Vec<usize>> {
        groups(&self.store.0.prefix, standings.iter().map(|standing| &standing.subject), by)
    }

    /// Sends the settlement of every slot, before anything is awaited.
    fn settle(
        &self,
        standings: &[Standing],
        actual: &[u64],
    ) -> impl Future<Output = Result<Vec<Correction>, StoreError>> + Send + 'static {
        let send = |indexes: Vec<usize>| {
            let (held, standings) = self.part(&indexes, standings);
            let actual: Vec<u64> = indexes.iter().map(|index| actual[*index]).collect();
            let answer = held.settled(&standings, &actual);
            (indexes, Settling { held, standings, actual, answer })
        };
        let sent: Vec<_> = self.groups(standings, By::Slot).into_iter().map(send).collect();
        async move {
            let mut corrections = Vec::with_capacity(sent.len());
            for (indexes, settling) in sent {
                corrections.push(settling.done().await.map(|done| (indexes, done)));
            }
            corrections.into_iter().collect::<Result<Vec<_>, _>>().map(in_order)
        }
    }
}

impl Spread {
    fn sent(&self) -> MutexGuard<'_, Option<JoinHandle<()>>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hold for Spread {
    fn settle(&self, standings: &[Standing], actual: &[u64]) -> Vec<Correction> {
        drop(self.settled(standings, actual));
        Vec::new()
    }

    fn renew(&self, standings: &[Standing]) {
        let mut sent = self.sent();
        let (before, parts, standings) = (sent.take(), self.parts.clone(), standings.to_vec());
        *sent = Some(self.parts.store.0.connection.here().1.spawn(async move {
            if let Some(before) = before {
                // Only its being over matters.
                let _ = before.await;
            }
            let renew = |indexes: Vec<usize>| {
                let (held, standings) = parts.part(&indexes, &standings);
                held.alone().renewed(&standings)
            };
            let renewals: Vec<_> = parts.groups(&standings, By::Key).into_iter().map(renew).collect();
            for renewal in renewals {
                // One that is lost harms nobody: the next comes well before the lease ends.
                let _ = renewal.await;
            }
        }));
    }

    fn settled(&self, standings: &[Standing], actual: &[u64]) -> Answer<'static, Vec<Correction>> {
        // Without an amount, what was taken stays.
        let amount =
            |(index, standing): (usize, &Standing)| *actual.get(index).unwrap_or(&standing.requested);
        let actual: Vec<u64> = standings.iter().enumerate().map(amount).collect();
        let (reply, answer) = oneshot::channel();
        let (_, runtime) = self.parts.store.0.connection.here();
        // Nobody who wants to know is the usual case.
        match self.sent().take() {
            None => {
                let settling = self.parts.settle(standings, &actual);
                drop(runtime.spawn(async move { reply.send(settling.await) }));
            }
            Some(before) => {
                let (parts, standings) = (self.parts.clone(), standings.to_vec());
                let piece = parts.store.0.underway.begin();
                drop(runtime.spawn(async move {
                    let _ = before.await;
                    let _ = reply.send(parts.settle(&standings, &actual).await);
                    drop(piece);
                }));
            }
        }
        Box::pin(async move { answer.await.unwrap_or(Err(StoreError::Lost)) })
    }
}

/// A settlement in one slot.
struct Settling {
    held: Held,
    standings: Vec<Standing>,
    actual: Vec<u64>,
    answer: Answer<'static, Vec<Correction>>,
}

impl Settling {
    /// Waits for it; when the slot's keys are on two servers, nothing was done, and each is settled by itself.
    async fn done(self) -> Result<Vec<Correction>, StoreError> {
        let Settling { held, standings, actual, answer } = self;
        match answer.await {
            Err(error) if is_split(&error) => {}
            answer => return answer,
        }
        let store = held.store.clone();
        let all = Parts { store: held.store, receipts: held.receipts, only_in: held.only_in };
        let mut corrections = Vec::new();
        for indexes in all.groups(&standings, By::Key) {
            let (held, standings) = all.part(&indexes, &standings);
            let actual: Vec<u64> = indexes.iter().map(|index| actual[*index]).collect();
            let done = held.alone().settled(&standings, &actual).await;
            if done.as_ref().is_err_and(is_split) {
                store.0.settlements_lost.fetch_add(1, Ordering::Relaxed);
            }
            corrections.push(done.map(|done| (indexes, done)));
        }
        corrections.into_iter().collect::<Result<Vec<_>, _>>().map(in_order)
    }
}

#[cfg(test)]
mod tests {
    use super::{By, groups};
    use crate::redis::cluster::slot;
    use crate::redis::plan;
    use crate::scope::Subject;

    /// No script is about keys of two slots, whatever the subjects.
    #[test]
    fn what_goes_together_is_in_one_slot() {
        let texts = ["user:alice:model:m", "user:alice", "ip:10.0.0.1", "global", "user:", "user::model:m"];
        let mut subjects: Vec<Subject> = texts.iter().map(|text| text.parse().expect("it is one")).collect();
        subjects.push("ip:10.0.0.1".parse::<Subject>().expect("it is one").of_tenant("alice"));
        subjects.extend((0..300).map(|n| format!("user:u{n}").parse::<Subject>().expect("it is one")));
        let key = |index: &usize| plan::key("tollgate", &subjects[*index]);
        let by_slot = groups("tollgate", subjects.iter(), By::Slot);
        for group in &by_slot {
            assert!(group.iter().all(|index| slot(&key(index)) == slot(&key(&group[0]))));
        }
        let together = by_slot.iter().find(|group| group.contains(&0)).expect("it is there");
        assert!([0, 1, 6].iter().all(|index| together.contains(index)), "one tenant, one script");
        for group in groups("tollgate", subjects.iter(), By::Key) {
            assert!(group.iter().all(|index| key(index) == key(&group[0])));
        }
    }
}
