//! `/admin/events`: what happens now, as server-sent events (WHATWG HTML, section 9.2).
//!
//! Figures once a second, and on request each request as it ends. Nobody waits for a reader: it is given what is true
//! when it reads, follows the journal by number, and is told how many requests it was too slow to see.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::State;
use axum::response::IntoResponse;
use bytes::Bytes;
use futures_util::stream;
use http::header;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, Interval, MissedTickBehavior};

use super::problem::Problem;
use super::requests::{Filter, shown};
use super::{Ask, Reply, Shared};
use crate::Gateway;
use crate::journal::{Ended, Found, Journal};
use crate::live::{Figures, LISTENERS_MAX, Place};

/// What may be asked for.
pub(super) const PARAMETERS: &[&str] =
    &["figures", "requests", "status", "user", "api_key", "model", "rule", "refused"];

/// How often it is looked whether requests have ended.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How often it is looked whether who listens still may.
const DOOR_EVERY: Duration = Duration::from_secs(1);
/// After so long a silence there is a comment, so that nobody in between takes the connection for dead.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Requests are told of together up to this size.
const TOGETHER_BYTES_MAX: usize = 32 << 10;
/// When who found no place may ask again.
const ASK_AGAIN: Duration = Duration::from_secs(10);

/// `GET /admin/events?figures=&requests=` with the filters of `/admin/requests`.
pub(super) async fn listen(State(gateway): Shared, ask: Ask) -> Reply {
    let figures = ask.flag("figures")?.unwrap_or(true);
    let filter = Filter::of(&ask, &gateway.snapshot.load())?;
    let requests = ask.flag("requests")?.unwrap_or(false);
    if !figures && !requests {
        return Err(Problem::field(
            "figures",
            "is false, and `requests` is not true: there is nothing to tell",
        ));
    }
    if gateway.closing.is_cancelled() {
        return Err(Problem::unavailable("this instance is shutting down"));
    }
    let Some(place) = gateway.live.enter() else {
        let detail = format!("{LISTENERS_MAX} listen already, which is as many as may");
        return Err(Problem::unavailable(detail).after(ASK_AGAIN));
    };
    let listener = Listener {
        figures: figures.then(|| gateway.live.figures(&gateway)),
        requests: requests.then(|| Requests::from_now_on(&gateway.ledger.journal, filter)),
        gateway,
        door: Door { ask, looks: every(DOOR_EVERY) },
        begun: false,
        ended: false,
        _place: place,
    };
    let events = stream::unfold(listener, |mut listener| async {
        let next = listener.next().await?;
        Some((Ok::<Bytes, std::io::Error>(next), listener))
    });
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        // nginx would keep events until it has a page of them.
        (header::HeaderName::from_static("x-accel-buffering"), "no"),
    ];
    Ok((headers, Body::from_stream(events)).into_response())
}

/// One who listens.
struct Listener {
    gateway: Arc<Gateway>,
    figures: Option<watch::Receiver<Figures>>,
    requests: Option<Requests>,
    door: Door,
    begun: bool,
    ended: bool,
    _place: Place,
}

impl Listener {
    /// What is to be said next; `None`: all is said.
    async fn next(&mut self) -> Option<Bytes> {
        if self.ended {
            return None;
        }
        if !std::mem::replace(&mut self.begun, true) {
            return Some(Bytes::from(format!(": {}\nretry: 1000\n\n", self.gateway.instance.name())));
        }
        let closing = self.gateway.closing.clone();
        let silence = Instant::now() + SILENCE_MAX;
        let said = tokio::select! {
            biased;
            () = closing.cancelled() => Err(Closed::ShuttingDown),
            () = self.door.closed(&self.gateway) => Err(Closed::Unauthorized),
            figures = next_figures(self.figures.as_mut()) => Ok(event("figures", &figures)),
            requests = next_requests(self.requests.as_mut(), &self.gateway) => Ok(requests),
            () = tokio::time::sleep_until(silence) => Ok(": still here\n\n".to_owned()),
        };
        self.ended = said.is_err();
        Some(said.unwrap_or_else(|why| self.last_words(why)).into())
    }

    /// That this is the end; before it, to who may still listen, the requests that ended last.
    fn last_words(&mut self, why: Closed) -> String {
        let mut said = String::new();
        if let (Closed::ShuttingDown, Some(requests)) = (why, &mut self.requests) {
            // As many as the journal has, which is not many.
            let looks = std::iter::repeat_with(|| requests.look(&self.gateway));
            looks.take_while(|more| !more.is_empty()).for_each(|more| said.push_str(&more));
        }
        said.push_str(&event("end", &json!({ "reason": why.reason() }).to_string()));
        said
    }
}

/// Why nothing more is said.
#[derive(Clone, Copy)]
enum Closed {
    /// The instance shuts down.
    ShuttingDown,
    /// Who listens would not be let in any more.
    Unauthorized,
}

impl Closed {
    fn reason(self) -> &'static str {
        match self {
            Self::ShuttingDown => "shutting_down",
            Self::Unauthorized => "unauthorized",
        }
    }
}

/// Whether who listens still may: keys come and go while they do.
struct Door {
    ask: Ask,
    looks: Interval,
}

impl Door {
    /// Comes back when they may no more.
    async fn closed(&mut self, gateway: &Gateway) {
        while self.ask.is_let_in(&gateway.snapshot.load().config.server) {
            self.looks.tick().await;
        }
    }
}

/// Looks that are late do not make up for it.
fn every(period: Duration) -> Interval {
    let mut looks = tokio::time::interval(period);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks
}

async fn next_figures(figures: Option<&mut watch::Receiver<Figures>>) -> Figures {
    let Some(figures) = figures else { return std::future::pending().await };
    match figures.changed().await {
        Ok(()) => figures.borrow_and_update().clone(),
        // Whoever tells them lives as long as the gateway.
        Err(_) => std::future::pending().await,
    }
}

async fn next_requests(requests: Option<&mut Requests>, gateway: &Gateway) -> String {
    let Some(requests) = requests else { return std::future::pending().await };
    loop {
        let said = requests.look(gateway);
        if !said.is_empty() {
            return said;
        }
        requests.looks.tick().await;
    }
}

/// Who follows the requests that end.
struct Requests {
    filter: Filter,
    /// The number of the one to be told of next.
    next: u64,
    looks: Interval,
}

impl Requests {
    fn from_now_on(journal: &Journal, filter: Filter) -> Self {
        Self { filter, next: journal.last() + 1, looks: every(LOOK_EVERY) }
    }

    /// Events of what has ended since the last look, as many as go together.
    fn look(&mut self, gateway: &Gateway) -> String {
        let (journal, own) = (&gateway.ledger.journal, gateway.instance.name());
        let last = journal.last();
        let oldest = *Journal::kept(last).start();
        let mut lost = oldest.saturating_sub(self.next);
        self.next = self.next.max(oldest);
        let (mut said, filter) = (String::new(), &self.filter);
        while self.next <= last && said.len() < TOGETHER_BYTES_MAX {
            let wanted = |ended: &Ended| filter.wants(ended).then(|| shown(ended, own));
            match journal.look(self.next, wanted) {
                Found::There(wanted) => said.extend(wanted.map(|shown| event("request", &shown.to_string()))),
                Found::Gone => lost += 1,
                Found::NotYet => break,
            }
            self.next += 1;
        }
        if lost > 0 {
            let lost: Value = json!({ "requests": lost });
            said.insert_str(0, &event("lost", &lost.to_string()));
        }
        said
    }
}

/// One event; `data` is one line.
fn event(name: &str, data: &str) -> String {
    format!("event: {name}\ndata: {data}\n\n")
}
