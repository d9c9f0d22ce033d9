//! The life of a request, in order: identify → parse → admit → route → relay → end. Start here.
//!
//! One straight function of typed values. Its end is not here: an [`Entry`] is opened first, travels along, and ends the
//! request wherever it is dropped (see [`crate::ledger`]).

use std::future::{Future, poll_fn};
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use http::StatusCode;
use http_body::Body as HttpBody;
use http_body_util::BodyExt;
use serde_json::json;
use tokio_util::sync::CancellationToken;
use tollgate_limiter::Source;

use crate::admission::{Counters, Demand};
use crate::call::{Call, Endpoint, Form};
use crate::config::Count;
use crate::dialect::Usage;
use crate::error::{BodyError, Error};
use crate::fields::Fields;
use crate::headers::Lines;
use crate::identity::{Caller, client_address, identify};
use crate::ids::{RequestId, Trace};
use crate::ledger::{Entry, Outcome};
use crate::metrics::OTHER;
use crate::relay::{Basis, Body, Relay, Reply, Terms, tokens_of_answer};
use crate::request::{Head, Request};
use crate::router::{self, Route};
use crate::snapshot::{EVERY_MODEL, Model, Snapshot};
use crate::upstream::{Answer, AnswerBody, Deployment, Kind, Lane, Question};
use crate::{Gateway, admission, headers, route};

/// A body must come at this pace, after a first [`BODY_PATIENCE`].
const BODY_BYTES_PER_SECOND_MIN: u64 = 1024;
const BODY_PATIENCE: Duration = Duration::from_secs(10);

/// How a request came.
pub struct Arrival<'a> {
    /// Its id, the caller's or ours.
    pub request_id: RequestId,
    /// Who is at the other end of its connection.
    pub peer: IpAddr,
    /// Where its connection is served.
    pub lane: Lane,
    /// Cancelled when it must end because the process does; it is to be polled then.
    pub ending: &'a CancellationToken,
}

/// Answers one request. Never fails: every error is an answer too.
pub async fn answer<B>(gateway: &Gateway, request: Request<B>, arrival: &Arrival<'_>) -> Reply
where
    B: HttpBody<Data = Bytes, Error = BodyError> + Unpin,
{
    let now = gateway.snapshot.load_full();
    let Request { head, body } = request;
    let Arrival { request_id, peer, lane, ending } = *arrival;
    let found = router::route(&head.method, head.target.path());
    let endpoint = found.as_ref().map_or(OTHER, Route::name);
    let trace = Trace::of(&head.fields);
    let forwarded = head.fields.get_all("x-forwarded-for");
    let address = client_address(&now.config.server.trusted_proxies, forwarded, peer);
    let mut entry =
        Box::new(Entry::open(&gateway.ledger, endpoint, Some(&head.method), request_id, trace.id, address));
    let answered = match found {
        Ok(found) => {
            let context = Context { gateway, now: &now, trace: &trace, head: &head, lane, ending };
            handle(&context, &mut entry, found, body).await
        }
        Err(error) => Err(error),
    };
    match answered {
        Ok(answered) => answered.into_reply(entry, ending),
        Err(error) => refuse(entry, &error),
    }
}

/// What stays the same from a request's first step to its last.
struct Context<'a> {
    gateway: &'a Gateway,
    now: &'a Snapshot,
    trace: &'a Trace,
    head: &'a Head,
    lane: Lane,
    ending: &'a CancellationToken,
}

async fn handle<'a, B: HttpBody<Data = Bytes, Error = BodyError> + Unpin>(
    context: &Context<'a>,
    entry: &mut Entry,
    found: Route,
    body: B,
) -> Result<Answered<'a>, Error> {
    let Context { gateway, now, trace, head, lane, ending } = *context;
    let caller = identify(now, &head.fields, entry.address)?;
    entry.key.clone_from(&caller.key);
    if let Some(ban) = now.bans.on(&caller) {
        return Err(Error::Banned(ban.sentence()));
    }
    let endpoint = match found {
        Route::Call(endpoint) => endpoint,
        Route::Models => {
            let list = pin!(list_models(now, &caller, lane));
            return unless_ending(ending, list).await.map(Answered::Ours);
        }
        Route::Model(id) => return one_model(now, &caller, &id).map(Answered::ours),
        Route::Limits => return own_limits(context, &caller).await.map(Answered::ours),
    };
    let call = unless_ending(ending, pin!(parse(now, endpoint, &head.fields, body))).await?;
    let received = Instant::now();
    entry.received = Some(received);
    entry.streamed = call.streamed();
    let model = usable_model(now, &caller, call.model())?;
    entry.model = Some(model.name.clone());
    let mut deployments: Vec<_> =
        now.deployments(model, &caller).filter(|deployment| deployment.serves(endpoint)).collect();
    if deployments.is_empty() {
        return Err(Error::UnsupportedEndpoint(call.model().to_owned(), endpoint.route()));
    }
    let drained: Vec<String> = deployments
        .extract_if(.., |deployment| now.is_drained(deployment))
        .map(|deployment| format!("{} at {}: drained", deployment.model, deployment.name))
        .collect();
    if deployments.is_empty() {
        return Err(Error::UpstreamFailed(drained));
    }

    let plan = now.plans.plan(now.rules(), gateway.metrics(), &caller, endpoint.route(), &model.name);
    let demand = expect(gateway, now, &caller, model, &call, &deployments).await;
    let (admitted, said) =
        admission::admit(&gateway.limits, gateway.metrics(), &gateway.rates, plan, &caller, demand).await?;
    let limit_took = admitted.took();
    entry.source = Some(admitted.source());
    entry.weights = model.token_weights;
    entry.content = Some(call.content());
    entry.admitted = Some(admitted);

    let request_id = entry.request_id;
    let question = Question { call: &call, sent: &head.fields, trace, request_id: &request_id, lane };
    let asked = {
        let (retries, attempts, metrics) = (&gateway.retries, &mut entry.attempts, gateway.metrics());
        let asking = pin!(route::ask(&deployments, &question, retries, attempts, metrics, received));
        unless_ending(ending, asking).await
    };
    let (deployment, answer) = asked.inspect_err(|_| entry.refund())?;
    entry.first_byte = Some(entry.attempts.answered - entry.started());
    Ok(Answered::Theirs(Box::new(Theirs { call, deployment, answer, said, limit_took })))
}

/// What `doing` gives, unless the process ends while it waits. Whoever polls the request does so then.
fn unless_ending<T>(
    ending: &CancellationToken,
    mut doing: Pin<&mut impl Future<Output = Result<T, Error>>>,
) -> impl Future<Output = Result<T, Error>> {
    poll_fn(move |cx| match doing.as_mut().poll(cx) {
        Poll::Pending if ending.is_cancelled() => Poll::Ready(Err(Error::ShuttingDown)),
        polled => polled,
    })
}

/// What a request is answered with, before it is a response.
enum Answered<'a> {
    /// JSON of ours.
    Ours(Bytes),
    /// A provider's answer.
    Theirs(Box<Theirs<'a>>),
}

struct Theirs<'a> {
    call: Call,
    deployment: &'a Arc<Deployment>,
    answer: Box<Answer>,
    /// What the limits said: headers.
    said: Lines,
    limit_took: Duration,
}

impl Answered<'_> {
    fn ours(value: serde_json::Value) -> Self {
        Self::Ours(value.to_string().into())
    }

    fn into_reply(self, mut entry: Box<Entry>, ending: &CancellationToken) -> Reply {
        match self {
            Self::Ours(json) => {
                let mut fields = Lines::new();
                headers::request(&mut fields, &entry.request_id);
                fields.add("content-type", b"application/json");
                entry.answer_starts(StatusCode::OK);
                Reply { status: StatusCode::OK, fields, body: Body::whole(json, entry) }
            }
            Self::Theirs(theirs) => {
                let Theirs { call, deployment, answer, said: mut fields, limit_took } = *theirs;
                headers::request(&mut fields, &entry.request_id);
                headers::from_provider(&mut fields, &answer.head.fields);
                headers::provider(&mut fields, &deployment.name, limit_took, entry.attempts.waited);
                let status = answer.head.status;
                entry.answer_starts(status);
                Reply { status, fields, body: relay(&call, deployment, *answer, entry, ending) }
            }
        }
    }
}

fn relay(
    call: &Call,
    deployment: &Arc<Deployment>,
    answer: Answer,
    mut entry: Box<Entry>,
    ending: &CancellationToken,
) -> Body {
    let events = answer.kind == Kind::Events;
    let waited = entry.attempts.answered - entry.attempts.last_asked;
    deployment.series.duration.observe(waited.as_secs_f64());
    deployment.latency.add(waited);
    if events {
        deployment.series.first_token.observe(waited.as_secs_f64());
        deployment.first_token.add(waited);
        entry.first_event = Some(Instant::now());
    }
    let basis = Basis { prompt: entry.expected_prompt(), counts_deltas: deployment.counts_deltas() };
    match answer.body {
        AnswerBody::Whole(bytes) => {
            if answer.head.status.is_success() {
                entry.tokens = tokens_of_answer(basis, &bytes, |bytes| entry.tokens_of_text(bytes));
            }
            Body::whole(bytes, entry)
        }
        AnswerBody::Open { head, rest } => {
            let deadline = entry.attempts.last_asked + deployment.provider.deadlines.total;
            let terms = Terms { call, deployment: deployment.clone(), basis, events, deadline, ending };
            Body::Relay(Box::pin(Relay::new(terms, head, rest, entry)))
        }
    }
}

fn refuse(mut entry: Box<Entry>, error: &Error) -> Reply {
    let status = error.status();
    let mut fields = Lines::new();
    headers::request(&mut fields, &entry.request_id);
    error.headers(&mut fields);
    match error {
        Error::Limited(denial, _) => entry.limited(denial),
        Error::Denied(rule) => entry.rule = Some(rule.clone()),
        Error::LimiterUnavailable(_) => entry.source = Some(Source::Closed),
        _ => {}
    }
    entry.code = error.code();
    entry.outcome = Some(match error {
        Error::CallerLeft => Outcome::ClientLeft,
        Error::ShuttingDown => Outcome::Shutdown,
        _ => Outcome::Refused,
    });
    entry.answer_starts(status);
    Reply { status, fields, body: Body::whole(error.body(), entry) }
}

/// What a call will use, and what that may cost at the dearest provider that could answer it.
async fn expect(
    gateway: &Gateway,
    now: &Snapshot,
    caller: &Caller,
    model: &Model,
    call: &Call,
    deployments: &[&Arc<Deployment>],
) -> Demand {
    let counted = match (model.count, deployments.first()) {
        (Count::Exact, Some(first)) => {
            now.tokenizers.count(first.provider.model_name.as_deref().unwrap_or(call.model()), call).await
        }
        _ => None,
    };
    let key = caller.key.as_ref().map(|key| key.id.as_str());
    let estimate = gateway.ledger.estimates.before(key, &model.name, &call.content(), counted);
    let usage = Usage { prompt: estimate.input, completion: estimate.output, ..Usage::default() };
    let prices = deployments.iter().filter_map(|deployment| deployment.provider.price.as_ref());
    let cost = prices.map(|price| admission::cost(price, &usage)).max().unwrap_or_default();
    Demand { estimate, cost }
}

/// The model of this name, where the caller may use it. One it may not use is a 403, not a 404: it is told apart from a
/// typo, and the names are no secret among those who have a key.
fn usable_model<'a>(now: &'a Snapshot, caller: &Caller, name: &str) -> Result<&'a Arc<Model>, Error> {
    let model = now.model(name).ok_or_else(|| Error::ModelNotFound(name.to_owned()))?;
    if caller.may_use(&model.name) { Ok(model) } else { Err(Error::ModelNotAllowed(name.to_owned())) }
}

fn model_object(name: &str) -> serde_json::Value {
    json!({ "id": name, "object": "model", "created": 0, "owned_by": "tollgate" })
}

/// The models the caller may use; where every name is one, the provider's own list.
async fn list_models(now: &Snapshot, caller: &Caller, lane: Lane) -> Result<Bytes, Error> {
    if let Some(deployment) = now.model(EVERY_MODEL).and_then(|every| every.deployments.first()) {
        let listed = deployment.models(lane).await;
        if let Some(list) =
            listed.map_err(|why| Error::UpstreamFailed(vec![format!("{}: {why}", deployment.name)]))?
        {
            return Ok(list);
        }
    }
    let models: Vec<_> = now.models_of(caller).map(model_object).collect();
    Ok(json!({ "object": "list", "data": models }).to_string().into())
}

fn one_model(now: &Snapshot, caller: &Caller, id: &str) -> Result<serde_json::Value, Error> {
    match now.model(id).filter(|model| caller.may_use(&model.name)) {
        Some(_) => Ok(model_object(id)),
        None => Err(Error::ModelNotFound(id.to_owned())),
    }
}

/// What the caller's limits say, for every model it may use or for the one it asks about (`?model=`). Costs nothing.
async fn own_limits(context: &Context<'_>, caller: &Caller) -> Result<serde_json::Value, Error> {
    let Context { gateway, now, head, .. } = *context;
    if caller.key.is_none() {
        return Err(Error::MissingKey);
    }
    let counters = counters(gateway, now, head, caller)?;
    counters.standings(&gateway.limits).await
}

fn counters(gateway: &Gateway, now: &Snapshot, head: &Head, caller: &Caller) -> Result<Counters, Error> {
    let query = form_urlencoded::parse(head.target.query().unwrap_or_default().as_bytes());
    let asked = query.filter(|(name, _)| name == "model").map(|(_, model)| model).last();
    let models: Vec<&Arc<Model>> = match asked {
        Some(name) => vec![usable_model(now, caller, &name)?],
        // Where every name is a model, they are counted as one.
        None => now.models_of(caller).chain([EVERY_MODEL]).filter_map(|name| now.model(name)).collect(),
    };
    let calls = models.iter().flat_map(|model| Endpoint::ALL.iter().map(move |endpoint| (model, endpoint)));
    let plans = calls.map(|(model, endpoint)| {
        now.plans.glance(now.rules(), gateway.metrics(), caller, endpoint.route(), &model.name)
    });
    Ok(Counters::of(caller, plans))
}

async fn parse<B: HttpBody<Data = Bytes, Error = BodyError> + Unpin>(
    now: &Snapshot,
    endpoint: Endpoint,
    sent: &Fields,
    body: B,
) -> Result<Call, Error> {
    let server = &now.config.server;
    match sent.get("content-encoding") {
        Some(encoding) if encoding != b"identity" => return Err(Error::CompressedBody),
        _ => {}
    }
    match (endpoint.form(), headers::multipart(sent)) {
        (Form::Json | Form::Either, None) => {
            Call::from_json(endpoint, collect(body, server.max_body).await?).map_err(Error::Call)
        }
        (Form::Multipart | Form::Either, Some(kind)) => {
            Call::from_multipart(endpoint, kind, collect(body, server.max_upload).await?).map_err(Error::Call)
        }
        (Form::Json, Some(_)) => {
            Err(Error::Malformed("This endpoint takes a JSON body, not multipart.".into()))
        }
        (Form::Multipart, None) => {
            Err(Error::Malformed("This endpoint takes a multipart/form-data body.".into()))
        }
    }
}

/// The whole body, bounded in size and in time: it may neither come slowly nor stop coming.
async fn collect<B>(mut body: B, bytes_max: usize) -> Result<Bytes, Error>
where
    B: HttpBody<Data = Bytes, Error = BodyError> + Unpin,
{
    let announced = body.size_hint().lower();
    if announced > bytes_max as u64 {
        return Err(Error::BodyTooLarge(bytes_max));
    }
    let mut waited_since = None;
    let mut first = Bytes::new();
    let mut all: Vec<u8> = Vec::new();
    loop {
        let received = first.len() + all.len();
        let came = match body.frame().now_or_never() {
            // What is here already, as most bodies are with their heads, takes no time.
            Some(came) => came,
            None => {
                let now = tokio::time::Instant::now();
                let pace = Duration::from_secs(received as u64 / BODY_BYTES_PER_SECOND_MIN);
                let due = (*waited_since.get_or_insert(now) + pace).min(now) + BODY_PATIENCE;
                let came = tokio::time::timeout_at(due, body.frame()).await;
                came.map_err(|_| Error::SlowBody)?
            }
        };
        let frame = match came {
            None => break,
            Some(Err(BodyError::Left)) => return Err(Error::CallerLeft),
            Some(Err(BodyError::Malformed(why))) => return Err(Error::Malformed(why.into())),
            Some(Ok(frame)) => frame,
        };
        let Ok(data) = frame.into_data() else { continue };
        if received + data.len() > bytes_max {
            return Err(Error::BodyTooLarge(bytes_max));
        }
        if received == 0 {
            first = data;
            continue;
        }
        if all.is_empty() {
            all.reserve(announced as usize);
            all.extend_from_slice(&std::mem::take(&mut first));
        }
        all.extend_from_slice(&data);
    }
    Ok(if all.is_empty() { first } else { all.into() })
}
