//! A [`tower`](https://docs.rs/tower) layer that limits requests: for axum, hyper, tonic, and whatever else speaks it.
//!
//! ```
//! use axum::{Router, routing::get};
//! use http::HeaderName;
//! use tollgate_limiter::limit;
//! use tollgate_limiter::tower::{Per, RateLimitLayer, Rule};
//!
//! # fn app() -> Result<Router, Box<dyn std::error::Error>> {
//! let per_key = Per::header(HeaderName::from_static("x-api-key"));
//! let limits = RateLimitLayer::from_url("memory://")?.limit(Rule::new("free", limit!("3/minute"), per_key))?;
//! let app = Router::new().route("/", get(|| async { "hello" })).route_layer(limits);
//! # Ok(app)
//! # }
//! # app().unwrap();
//! ```
//!
//! - [`Rule`]: how much, per what, counted how, at which cost
//! - [`Per`]: whose counter: a header, the address, the session, the path, or what a closure says
//! - [`Meter`]: in the extensions of every request, to say what it really used, also at the end of a stream
//! - [`Family`]: which headers tell the client
//! - [`Storage`]: where the counters are, by URL
//!
//! A refused request pays nothing, a request meets all its rules at once or none, and its slot of a limit on calls in
//! flight is held until the last byte of the answer was sent, or the client has gone.

use std::fmt;
use std::sync::Arc;

use http::request::Parts;
use http::{Response, StatusCode};
use tower_layer::Layer;

use crate::limit::{Limit, LimitError};
use crate::quota::Algorithm;
use crate::reservation::Denial;

mod body;
mod headers;
mod meter;
mod per;
mod rule;
mod service;
mod storage;

pub use body::MeteredBody;
pub use headers::Family;
pub use meter::Meter;
pub use per::{Per, Proxies, ProxyError};
pub use rule::Rule;
pub use service::RateLimit;
pub use storage::{Storage, StorageError};

use meter::Pulse;
use rule::Entry;

/// The most rules of one layer.
const RULES_MAX: usize = 16;

type Reject = dyn Fn(&Denial, &Parts) -> Response<String> + Send + Sync;

/// Limits the requests of a service. Clones, and the services they make, share counters.
#[derive(Clone)]
pub struct RateLimitLayer {
    policy: Policy,
}

/// What a layer was told. Cheap to clone.
#[derive(Clone)]
struct Policy {
    storage: Storage,
    rules: Arc<[Entry]>,
    families: Arc<[Family]>,
    reject: Arc<Reject>,
    pulse: Option<Arc<Pulse>>,
    when_down: WhenDown,
}

/// What becomes of requests while a shared storage does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenDown {
    /// 503 with `retry-after`: no limit is ever exceeded.
    #[default]
    Closed,
    /// Let through, uncounted.
    Open,
}

impl RateLimitLayer {
    /// Limits nothing yet, and counts in `storage`.
    pub fn new(storage: impl Into<Storage>) -> RateLimitLayer {
        let policy = Policy {
            storage: storage.into(),
            rules: Arc::new([]),
            families: Arc::new([Family::RateLimit, Family::XRateLimit]),
            reject: Arc::new(too_many_requests),
            pulse: None,
            when_down: WhenDown::default(),
        };
        RateLimitLayer { policy }
    }

    /// Limits nothing yet, and counts where the URL says: see [`Storage::from_url`].
    pub fn from_url(url: &str) -> Result<RateLimitLayer, StorageError> {
        Storage::from_url(url).map(RateLimitLayer::new)
    }

    /// One more rule; all of them must say yes. Refuses what cannot be counted exactly, a second rule with the same
    /// name, unit and window, and more than 16 rules.
    pub fn limit(mut self, rule: Rule) -> Result<RateLimitLayer, LimitError> {
        let entry = rule.entry()?;
        let rules = &self.policy.rules;
        if rules.len() == RULES_MAX {
            return Err(LimitError::new(entry.limit.rule(), "16 rules are the most of one layer".into()));
        }
        if rules.iter().any(|other| other.limit.id() == entry.limit.id()) {
            let problem = format!("there is a limit `{}` already; name one differently", entry.limit.id());
            return Err(LimitError::new(entry.limit.rule(), problem));
        }
        if entry.limit.algorithm() == Algorithm::Concurrency && self.policy.pulse.is_none() {
            self.policy.pulse = Some(Arc::new(Pulse::start()));
        }
        self.policy.rules = rules.iter().cloned().chain([entry]).collect();
        Ok(self)
    }

    /// Which headers tell the client where it stands. Without this: [`Family::RateLimit`] and [`Family::XRateLimit`].
    /// `retry-after` comes with every refusal that a wait would help.
    pub fn headers(mut self, families: impl IntoIterator<Item = Family>) -> RateLimitLayer {
        self.policy.families = families.into_iter().collect();
        self
    }

    /// What becomes of requests while a shared storage does not answer, instead of [`WhenDown::Closed`].
    pub fn when_down(mut self, when_down: WhenDown) -> RateLimitLayer {
        self.policy.when_down = when_down;
        self
    }

    /// Makes the answer to a refused request; the headers of the families are added to it. Without this: 429, and a
    /// sentence that says which limit, how much, and when to try again.
    pub fn on_reject<F>(mut self, answer: F) -> RateLimitLayer
    where
        F: Fn(&Denial, &Parts) -> Response<String> + Send + Sync + 'static,
    {
        self.policy.reject = Arc::new(answer);
        self
    }

    /// The limits, in the order in which they were added.
    pub fn limits(&self) -> impl Iterator<Item = &Arc<Limit>> {
        self.policy.rules.iter().map(|entry| &entry.limit)
    }

    /// Where it counts.
    pub fn storage(&self) -> &Storage {
        &self.policy.storage
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = RateLimit<S>;

    fn layer(&self, inner: S) -> RateLimit<S> {
        RateLimit::new(inner, self.policy.clone())
    }
}

impl fmt::Debug for RateLimitLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ids: Vec<&str> = self.limits().map(|limit| limit.id()).collect();
        f.debug_struct("RateLimitLayer").field("limits", &ids).field("storage", self.storage()).finish()
    }
}

fn too_many_requests(denial: &Denial, _: &Parts) -> Response<String> {
    let mut response = Response::new(headers::sentence(denial));
    *response.status_mut() = StatusCode::TOO_MANY_REQUESTS;
    let plain = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(http::header::CONTENT_TYPE, plain);
    response
}
