//! What a running gateway tells as it happens: its server-sent events, followed over whatever breaks.

use std::collections::VecDeque;
use std::time::Duration;

use http::{Method, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use serde_json::Value;
use tokio::time::{Instant, sleep_until, timeout};

use super::{ANSWER_BYTES_MAX, Admin, PATIENCE, Stopped, cause, is_problem, plain};
use crate::sse::{Event, Splitter};

/// A gateway says something every ten seconds at least; after such a silence it is gone.
const SILENCE_MAX: Duration = Duration::from_secs(30);
/// Before it is tried again: at first, doubled with each time up to the last.
const WAIT_FIRST: Duration = Duration::from_millis(500);
const WAIT_MAX: Duration = Duration::from_secs(8);

/// What a gateway told.
pub(in crate::cli) enum Told {
    /// The figures of a second.
    Figures(Value),
    /// A request that ended.
    Request(Value),
    /// So many more ended than we could read.
    Lost(u64),
}

/// What one hears of it.
pub(in crate::cli) enum Heard {
    /// It told this.
    Told(Told),
    /// It is gone, for this reason; after this time it is tried again.
    Gone(String, Duration),
    /// It is there again.
    Back,
}

/// One who listens, and goes on listening when the connection breaks.
pub(in crate::cli) struct Listener<'a> {
    admin: &'a Admin,
    query: Vec<(&'a str, &'a str)>,
    state: State,
}

enum State {
    Open(Box<Stream>),
    Gone { wait: Duration, until: Instant },
}

struct Stream {
    body: Incoming,
    splitter: Splitter,
    ready: VecDeque<Event>,
}

/// Why there is no stream.
struct Refused {
    why: Stopped,
    /// The same in a few words, where there may be one later.
    passing: Option<String>,
}

impl<'a> Listener<'a> {
    /// Begins to listen, with these parameters of `GET /admin/events`.
    pub(in crate::cli) async fn open(
        admin: &'a Admin,
        query: Vec<(&'a str, &'a str)>,
    ) -> Result<Self, Stopped> {
        let stream = admin.listen(&query).await.map_err(|refused| refused.why)?;
        Ok(Self { admin, query, state: State::Open(stream) })
    }

    /// What is heard next. May be dropped at any time: nothing is missed.
    ///
    /// # Errors
    /// When it is of no use to try again.
    pub(in crate::cli) async fn next(&mut self) -> Result<Heard, Stopped> {
        match &mut self.state {
            State::Open(stream) => match stream.next().await {
                Ok(told) => Ok(Heard::Told(told)),
                Err(why) => Ok(self.gone(why, WAIT_FIRST)),
            },
            State::Gone { wait, until } => {
                let again = (*wait * 2).min(WAIT_MAX);
                sleep_until(*until).await;
                match self.admin.listen(&self.query).await {
                    Ok(stream) => {
                        self.state = State::Open(stream);
                        Ok(Heard::Back)
                    }
                    Err(Refused { passing: Some(why), .. }) => Ok(self.gone(why, again)),
                    Err(Refused { why, passing: None }) => Err(why),
                }
            }
        }
    }

    fn gone(&mut self, why: String, wait: Duration) -> Heard {
        self.state = State::Gone { wait, until: Instant::now() + wait };
        Heard::Gone(why, wait)
    }
}

impl Admin {
    async fn listen(&self, query: &[(&str, &str)]) -> Result<Box<Stream>, Refused> {
        let final_word = |why| Refused { why, passing: None };
        let passing = |why: &str| Refused { why: self.unreachable(true, why), passing: Some(plain(why)) };
        let request = self.request(&Method::GET, &["events"], query, None).map_err(final_word)?;
        let answered = timeout(PATIENCE, self.client.request(request)).await;
        let answered = answered.map_err(|_| passing(&format!("no answer within {PATIENCE:?}")))?;
        let (head, body) = answered.map_err(|error| passing(&cause(&error)))?.into_parts();
        if head.status == StatusCode::OK {
            let (splitter, ready) = (Splitter::new(), VecDeque::new());
            return Ok(Box::new(Stream { body, splitter, ready }));
        }
        let body = timeout(PATIENCE, Limited::new(body, ANSWER_BYTES_MAX).collect()).await;
        let body = body.ok().and_then(Result::ok).map(|body| body.to_bytes()).unwrap_or_default();
        let is_passing = head.status.is_server_error() || head.status == StatusCode::TOO_MANY_REQUESTS;
        match self.judge(head.status, is_problem(&head.headers), &body) {
            Err(why) => Err(Refused { passing: is_passing.then(|| why.message.clone()), why }),
            Ok(_) => Err(final_word(self.strange(&format!("status {}", head.status.as_u16())))),
        }
    }
}

impl Stream {
    /// What is told next, or why nothing will be.
    async fn next(&mut self) -> Result<Told, String> {
        loop {
            while let Some(event) = self.ready.pop_front() {
                if let Some(told) = told(&event)? {
                    return Ok(told);
                }
            }
            let frame = timeout(SILENCE_MAX, self.body.frame()).await;
            let frame = frame.map_err(|_| format!("it was silent for {SILENCE_MAX:?}"))?;
            let frame = frame.ok_or("it closed the connection")?.map_err(|error| plain(&cause(&error)))?;
            if let Ok(data) = frame.into_data() {
                self.ready.extend(self.splitter.push(data));
            }
        }
    }
}

/// What an event tells; nothing, if it is one that we do not know.
fn told(event: &Event) -> Result<Option<Told>, String> {
    let Some(data) = event.data() else { return Ok(None) };
    let data: Value = serde_json::from_slice(&data).map_err(|_| "it tells something that is no JSON")?;
    Ok(match event.name() {
        Some("figures") => Some(Told::Figures(data)),
        Some("request") => Some(Told::Request(data)),
        Some("lost") => Some(Told::Lost(data["requests"].as_u64().unwrap_or(0))),
        Some("end") if data["reason"] == "unauthorized" => {
            return Err("the admin key is not let in any more".to_owned());
        }
        Some("end") => return Err("it is shutting down".to_owned()),
        _ => None,
    })
}
