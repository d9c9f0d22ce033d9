//! The service a layer makes.

use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::header::{HeaderValue, RETRY_AFTER};
use http::request::Parts;
use http::{HeaderMap, Request, Response, StatusCode};
use tower_service::Service;

use super::body::MeteredBody;
use super::headers;
use super::meter::Meter;
use super::{Policy, WhenDown};
use crate::limit::Charge;
use crate::reservation::{Decision, Denial, Reservation};
use crate::store::StoreError;

/// Lets requests through while their limits allow it.
#[derive(Clone)]
pub struct RateLimit<S> {
    inner: S,
    policy: Policy,
}

impl<S> RateLimit<S> {
    pub(super) fn new(inner: S, policy: Policy) -> RateLimit<S> {
        RateLimit { inner, policy }
    }
}

impl<S, B, R> Service<Request<B>> for RateLimit<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: From<String>,
{
    type Response = Response<MeteredBody<R>>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The one that was polled ready is the one that is called; the clone stays behind.
        let clone = self.inner.clone();
        let mut inner = mem::replace(&mut self.inner, clone);
        let policy = self.policy.clone();
        Box::pin(async move {
            let (mut parts, body) = request.into_parts();
            let charges: Vec<Charge> = policy.rules.iter().filter_map(|rule| rule.charge(&parts)).collect();
            if charges.is_empty() {
                let response = inner.call(Request::from_parts(parts, body)).await?;
                return Ok(response.map(|body| MeteredBody::new(body, None)));
            }
            match policy.storage.reserve(charges).await {
                Ok(Decision::Granted(reservation)) => {
                    let (meter, told) = policy.admit(reservation);
                    parts.extensions.insert(meter.clone());
                    let mut response = inner.call(Request::from_parts(parts, body)).await?;
                    response.headers_mut().extend(told);
                    Ok(response.map(|body| MeteredBody::new(body, Some(meter))))
                }
                Ok(Decision::Denied(denial)) => {
                    let response = policy.refuse(&denial, &parts);
                    Ok(response.map(|text| MeteredBody::new(R::from(text), None)))
                }
                Err(_) if policy.when_down == WhenDown::Open => {
                    let response = inner.call(Request::from_parts(parts, body)).await?;
                    Ok(response.map(|body| MeteredBody::new(body, None)))
                }
                Err(error) => Ok(unavailable(&error).map(|text| MeteredBody::new(R::from(text), None))),
            }
        })
    }
}

impl Policy {
    fn admit(&self, reservation: Reservation) -> (Meter, HeaderMap) {
        let mut told = HeaderMap::new();
        headers::granted(&mut told, &self.families, &reservation);
        let meter = Meter::new(reservation);
        if let Some(pulse) = &self.pulse {
            pulse.watch(&meter);
        }
        (meter, told)
    }

    fn refuse(&self, denial: &Denial, parts: &Parts) -> Response<String> {
        let mut response = (self.reject)(denial, parts);
        headers::denial(response.headers_mut(), &self.families, denial);
        response
    }
}

/// Nobody can say whether there is room: never a 429.
fn unavailable(error: &StoreError) -> Response<String> {
    let mut response = Response::new(format!("Rate limits cannot be checked: {error}. Please try again."));
    *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    response
}
