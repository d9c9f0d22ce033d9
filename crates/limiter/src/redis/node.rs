//! One server, or the one that sentinels call master: a connection in the background, with a watchdog.
//!
//! The client's own timeout does not cover waiting for a connection, and it never replaces a connection that swallows
//! everything: the deadline is outside it, and three timeouts in a row bring a new connection beside the old one.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use ::redis::RedisConnectionInfo;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::address::Endpoint;
use super::dial::{CONNECT_DEADLINE, Dialer};
use super::link::{Link, Question, Said, Slot, refused};
use super::scripts::Scripts;
use super::sentinel::Sentinels;
use crate::store::StoreError;

/// Between attempts to connect.
const CONNECT_PAUSE: Duration = Duration::from_millis(50);
/// After so long another attempt is made beside one that takes its time, for so long, again and again: what is sent
/// while a network is away may only be sent once more after seconds.
const HASTE: Duration = Duration::from_millis(80);
/// Between two of those.
const HASTE_PAUSE: Duration = Duration::from_millis(20);
/// How often a master is asked whether it still is one.
const ROLE_PERIOD: Duration = Duration::from_secs(1);
/// How long after its deadline an answer is waited for that may have to be undone.
const LATE: Duration = Duration::from_secs(3);
/// A connection that is older is made anew when its server is the wrong one: its name may mean another one now.
const STALE: Duration = Duration::from_millis(500);
/// Answers of a server that did nothing, because it is the wrong one or not ready.
const NOT_NOW: [&str; 3] = ["READONLY", "LOADING", "MASTERDOWN"];

/// What all connections of a store share.
pub(super) struct Ground {
    pub(super) dialer: Dialer,
    pub(super) login: RedisConnectionInfo,
    pub(super) scripts: Arc<Scripts>,
    /// How many connections were made.
    pub(super) made: watch::Sender<u64>,
    /// Whether nobody else helps out while there is no connection.
    pub(super) alone: bool,
    /// How often somebody else may have become a master.
    pub(super) masters: watch::Sender<u64>,
    pub(super) began: std::time::Instant,
}

impl Ground {
    /// The same, driven by another runtime; `alone` as there.
    pub(super) fn beside(&self, runtime: Handle, alone: bool) -> Ground {
        Ground {
            dialer: Dialer { runtime, ..self.dialer.clone() },
            login: self.login.clone(),
            scripts: Arc::clone(&self.scripts),
            made: self.made.clone(),
            alone,
            masters: self.masters.clone(),
            began: self.began,
        }
    }
}

/// Asks one server. Clones share the connection; without clones it ends.
#[derive(Clone)]
pub(super) struct Node(Arc<Shared>);

struct Shared {
    ground: Arc<Ground>,
    target: Target,
    current: watch::Sender<Option<Arc<Link>>>,
    connecting: AtomicBool,
    lately: Mutex<Lately>,
    /// Who was connected last, and in which of its runs.
    run: Mutex<Option<(Endpoint, u32)>>,
}

/// Who is to be asked.
pub(super) enum Target {
    Named(Endpoint),
    Elected(Sentinels),
}

/// For people.
#[derive(Clone, Debug)]
pub(super) struct Lately {
    /// Since when there is a connection, or none.
    pub(super) since: std::time::Instant,
    /// Why there is none.
    pub(super) problem: Option<String>,
}

impl Ground {
    /// Somebody else may be a master.
    pub(super) fn master_changed(&self) {
        self.masters.send_modify(|times| *times = times.wrapping_add(1));
    }
}

impl Node {
    /// Connects in the background.
    pub(super) fn new(ground: &Arc<Ground>, target: Target) -> Node {
        let lately = Lately { since: std::time::Instant::now(), problem: None };
        let node = Node(Arc::new(Shared {
            ground: Arc::clone(ground),
            target,
            current: watch::Sender::new(None),
            connecting: AtomicBool::new(false),
            lately: Mutex::new(lately),
            run: Mutex::default(),
        }));
        node.0.reconnect();
        if let Target::Elected(sentinels) = &node.0.target {
            ground.dialer.runtime.spawn(follow(Arc::downgrade(&node.0), sentinels.master()));
        }
        node
    }

    /// The connection there is, unless it swallows everything.
    pub(super) fn connected(&self) -> Option<Arc<Link>> {
        self.0.current.borrow().clone().filter(|link| link.answers())
    }

    /// Whether there has been no connection that answers for so long.
    pub(super) fn is_gone(&self, patience: Duration) -> bool {
        self.connected().is_none() && self.0.lately().since.elapsed() >= patience
    }

    pub(super) fn lately(&self) -> Lately {
        self.0.lately().clone()
    }

    /// Another connection is made, which learns anew who this server is: it has become a master.
    pub(super) fn promoted(&self) {
        if let Some(link) = self.connected() {
            self.0.lost(&link);
        }
    }

    /// Asks for nothing. A connection that does not answer in time is given up at once.
    pub(super) async fn check(&self, until: Instant) {
        let Some(link) = self.connected() else { return };
        let ping = ::redis::cmd("PING");
        let answer = self.ask_on(&link, until, Question::Command(&ping), Slot::Owned).await;
        if matches!(answer, Err(StoreError::Timeout)) {
            self.0.lost(&link);
        }
    }

    /// Asks, until the deadline. What a server certainly did not do, because it is no master or not ready, is asked
    /// once more, of the right one.
    pub(super) async fn ask(
        &self,
        until: Instant,
        question: Question<'_>,
        slot: Slot,
    ) -> Result<Said, StoreError> {
        let link = self.link(until).await?;
        let answer = self.ask_on(&link, until, question, slot).await;
        match &answer {
            Err(StoreError::Refused { code, .. }) if NOT_NOW.contains(&code.as_str()) => {}
            _ => return answer,
        }
        if Instant::now() >= until {
            return answer;
        }
        if !self.0.leave(&link) {
            return answer;
        }
        match self.link(until).await {
            Ok(link) => self.ask_on(&link, until, question, slot).await,
            Err(_) => answer,
        }
    }

    async fn link(&self, until: Instant) -> Result<Arc<Link>, StoreError> {
        timeout_at(until, self.0.link()).await.map_err(|_| StoreError::Unreachable)
    }

    async fn ask_on(
        &self,
        link: &Arc<Link>,
        until: Instant,
        question: Question<'_>,
        slot: Slot,
    ) -> Result<Said, StoreError> {
        // Apart: whoever waits for a connection needs no room for a question yet.
        if question.is_not_for(link) {
            return Err(StoreError::Lost);
        }
        let mut asked = Box::pin(link.ask(&self.0.ground.scripts, question, slot, until));
        let mut answer = timeout_at(until, &mut asked).await;
        if answer.is_err() {
            self.0.timed_out(link);
            if question.overdue()
                && let Ok(Some(late)) = timeout(LATE, self.0.unless_superseded(link, asked)).await
            {
                answer = Ok(late);
            }
        }
        let Ok(answer) = answer else {
            return Err(StoreError::Timeout);
        };
        let in_time = Instant::now() < until;
        match answer {
            // The script would have been sent, had there been time.
            Err(error) if !in_time && error.code() == Some("NOSCRIPT") => {
                self.0.timed_out(link);
                return Err(StoreError::Timeout);
            }
            Err(error) if error.is_io_error() || error.is_unrecoverable_error() => {
                self.0.lost(link);
                return Err(StoreError::Lost);
            }
            _ if in_time && link.has_answered() => self.0.changed(None),
            _ => {}
        }
        answer.map(|value| Said { value, history: link.history }).map_err(|error| refused(&error))
    }
}

impl Shared {
    /// The connection; when there is none that answers, the one that is being made. A question to a connection that
    /// swallows everything would only have an unknown outcome.
    async fn link(self: &Arc<Shared>) -> Arc<Link> {
        let mut current = self.current.subscribe();
        loop {
            let found = current.borrow_and_update().clone();
            if let Some(link) = found.filter(|link| link.answers()) {
                return link;
            }
            self.reconnect();
            if current.changed().await.is_err() {
                // The sender is a field of `self`: it outlives this.
                std::future::pending::<()>().await;
            }
        }
    }

    /// A question was not answered in time.
    fn timed_out(self: &Arc<Shared>, link: &Arc<Link>) {
        if link.has_timed_out() {
            self.changed(Some("it does not answer".to_string()));
        }
        if !link.answers() && self.is_current(link) {
            // It may answer after all before there is another one; where somebody else helps out, nobody waits, and
            // another one need not be made before it has had its time.
            if self.ground.alone {
                self.reconnect();
            } else if self.drop_link(link) {
                self.reconnect_after(LATE);
            }
        }
    }

    /// What a connection answers late; `None` when the one after it is given up, too, so that there are never many.
    async fn unless_superseded<T>(
        &self,
        link: &Arc<Link>,
        mut asked: impl Future<Output = T> + Unpin,
    ) -> Option<T> {
        let mut current = self.current.subscribe();
        let mut superseded = pin!(async {
            let next = |now: &Option<Arc<Link>>| now.as_ref().is_some_and(|now| !Arc::ptr_eq(now, link));
            let next = current.wait_for(next).await.ok()?.as_ref().map(Arc::downgrade)?;
            let gone = |now: &Option<Arc<Link>>| {
                !now.as_ref().is_some_and(|now| std::ptr::eq(Arc::as_ptr(now), next.as_ptr()))
            };
            current.wait_for(gone).await.ok().map(drop)
        });
        poll_fn(|context| match Pin::new(&mut asked).poll(context) {
            Poll::Ready(answer) => Poll::Ready(Some(answer)),
            Poll::Pending => superseded.as_mut().poll(context).map(|_| None),
        })
        .await
    }

    fn is_current(&self, link: &Arc<Link>) -> bool {
        self.current.borrow().as_ref().is_some_and(|current| Arc::ptr_eq(current, link))
    }

    /// Gives up a server that is the wrong one, unless that was done a moment ago: then it would be in vain. Says
    /// whether there is reason to ask again.
    fn leave(self: &Arc<Shared>, link: &Arc<Link>) -> bool {
        if let Target::Elected(sentinels) = &self.target {
            sentinels.ask_now();
        }
        if self.is_current(link) && link.made.elapsed() < STALE {
            return false;
        }
        self.lost(link);
        true
    }

    /// Lets go of a connection that is broken, or to the wrong server.
    fn lost(self: &Arc<Shared>, link: &Arc<Link>) {
        if self.drop_link(link) {
            self.reconnect();
        }
    }

    /// Says whether it was the one in use.
    fn drop_link(&self, link: &Arc<Link>) -> bool {
        let dropped = self
            .current
            .send_if_modified(|current| current.take_if(|current| Arc::ptr_eq(current, link)).is_some());
        if dropped {
            self.changed(None);
        }
        dropped
    }

    /// Makes a new connection in the background, unless one is being made. The old one serves until then.
    fn reconnect(self: &Arc<Shared>) {
        self.reconnect_after(Duration::ZERO);
    }

    fn reconnect_after(self: &Arc<Shared>, pause: Duration) {
        if self.connecting.swap(true, Ordering::AcqRel) {
            return;
        }
        self.ground.dialer.runtime.spawn(keep_connecting(Arc::downgrade(self), pause));
    }

    /// The first connection that comes about.
    async fn connect_in_time(&self) -> Result<Link, String> {
        let mut patient = pin!(self.connect());
        if !self.ground.alone {
            return patient.await;
        }
        let mut pause = HASTE;
        loop {
            if let Ok(made) = timeout(pause, &mut patient).await {
                return made;
            }
            // One that swallows everything is of no use beside two that are being made.
            self.current.send_if_modified(|current| current.take_if(|link| !link.answers()).is_some());
            let mut hasty = pin!(timeout(HASTE, self.connect()));
            let first =
                poll_fn(|context| match (patient.as_mut().poll(context), hasty.as_mut().poll(context)) {
                    (_, Poll::Ready(Ok(Ok(made)))) => Poll::Ready(Some(Ok(made))),
                    (Poll::Ready(made), _) => Poll::Ready(Some(made)),
                    (_, Poll::Ready(_)) => Poll::Ready(None),
                    _ => Poll::Pending,
                });
            if let Some(made) = first.await {
                return made;
            }
            pause = HASTE_PAUSE;
        }
    }

    /// To the server that is to be asked, if it is one that counts.
    async fn connect(&self) -> Result<Link, String> {
        let ground = &self.ground;
        let connect = async |endpoint: &Endpoint| {
            let made = Link::connect(&ground.dialer, endpoint.clone(), &ground.login).await;
            made.map_err(|error| format!("{endpoint}: {error}"))
        };
        let sentinels = match &self.target {
            Target::Named(endpoint) => return connect(endpoint).await,
            Target::Elected(sentinels) => sentinels,
        };
        let endpoint = sentinels.known()?;
        let made = sentinels.unless_moved(&endpoint, connect(&endpoint)).await;
        let link = made.unwrap_or_else(|| Err(format!("{endpoint} is no master any more")))?;
        match &link.role {
            Some(role) if role != "master" => {
                sentinels.ask_now();
                Err(format!("{endpoint} is no master: it says `{role}`"))
            }
            _ => Ok(link),
        }
    }

    /// Notes who is connected. One that does not tell its runs apart may have been started again.
    fn met(&self, link: &Link) {
        let run = (link.endpoint.clone(), link.term);
        let before = self.run.lock().unwrap_or_else(PoisonError::into_inner).replace(run.clone());
        if before.is_some_and(|before| before != run || link.term == 0) {
            self.ground.master_changed();
        }
    }

    fn changed(&self, problem: Option<String>) {
        *self.lately() = Lately { since: std::time::Instant::now(), problem };
    }

    fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Begins after a pause. Ends when there is a connection, or nobody who wants one.
async fn keep_connecting(shared: Weak<Shared>, pause: Duration) {
    if !pause.is_zero() {
        sleep(pause).await;
    }
    while let Some(shared) = shared.upgrade() {
        match shared.connect_in_time().await {
            Ok(link) => {
                shared.met(&link);
                let before = shared.current.send_replace(Some(Arc::new(link)));
                shared.ground.made.send_modify(|made| *made += 1);
                if !before.is_some_and(|before| before.answers()) {
                    shared.changed(None);
                }
                shared.connecting.store(false, Ordering::Release);
                return;
            }
            Err(problem) => shared.lately().problem = Some(problem),
        }
        drop(shared);
        sleep(CONNECT_PAUSE).await;
    }
}

/// Leaves a server when sentinels name another one, or when it is no master any more.
async fn follow(shared: Weak<Shared>, mut master: watch::Receiver<Option<Endpoint>>) {
    loop {
        if let Ok(Err(_)) = timeout(ROLE_PERIOD, master.changed()).await {
            return;
        }
        let named = master.borrow_and_update().clone();
        let Some(shared) = shared.upgrade() else {
            return;
        };
        let Some(link) = shared.current.borrow().clone() else {
            continue;
        };
        if named.is_some_and(|named| named != link.endpoint) {
            shared.lost(&link);
        } else if let Ok(Ok(Some(role))) = timeout(CONNECT_DEADLINE, link.ask_role()).await
            && role != "master"
        {
            shared.leave(&link);
        }
    }
}
