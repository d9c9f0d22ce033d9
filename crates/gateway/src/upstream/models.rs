//! Asking a provider for its models.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Request, StatusCode, Uri, header};
use http_body_util::Full;

use super::connect::connector;
use super::pool::{Client, Lane};
use super::{
    AnswerBody, Deployment, Failure, Link, Reading, Source, Trust, acceptable, authorization, under,
};
use crate::config::Secret;

/// Longest wait for a list.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks for the models to see whether a provider is there and takes the key.
///
/// # Errors
/// When there is no answer at all.
pub async fn probe(base: &Uri, key: Option<&Secret>, connect: Duration) -> Result<StatusCode, Failure> {
    let client = Client::new(base, connector(base, &mut Trust::default(), connect));
    let mut request = question(base)?;
    if let Some(authorization) = key.and_then(authorization) {
        request.headers_mut().insert(header::AUTHORIZATION, authorization);
    }
    Ok(client.send(request, Lane::default(), &AtomicBool::default()).await?.status())
}

impl Deployment {
    /// The provider's own list, as it wrote it; `None`: it has none.
    ///
    /// # Errors
    /// When it does not answer in time, or not with a list of reasonable size.
    pub async fn models(&self, lane: Lane) -> Result<Option<Bytes>, Failure> {
        let Link::Http(http) = &self.link else { return Ok(None) };
        let mut request = question(&http.base)?;
        if let Some(authorization) = &http.authorization {
            request.headers_mut().insert(header::AUTHORIZATION, authorization.clone());
        }
        let by = Instant::now() + PATIENCE;
        let sent =
            tokio::time::timeout_at(by.into(), http.client.send(request, lane, &AtomicBool::default())).await;
        let (head, body) = sent.map_err(|_| Failure::TimedOut("list of models", PATIENCE))??.into_parts();
        acceptable(head.status, &head.headers)?;
        if !head.status.is_success() {
            return Err(Failure::Status(head.status, None));
        }
        match Reading::of(Source::Http(body)).whole(PATIENCE, PATIENCE, by).await? {
            AnswerBody::Whole(list) => Ok(Some(list)),
            AnswerBody::Open { .. } => Err(Failure::Broken("the list of models is too long".into())),
        }
    }
}

fn question(base: &Uri) -> Result<Request<Full<Bytes>>, Failure> {
    let request = Request::get(under(base, "/models")?).header(header::ACCEPT_ENCODING, "identity");
    request.body(Full::default()).map_err(|error| Failure::Broken(error.to_string()))
}
