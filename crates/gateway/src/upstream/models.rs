//! Asking a provider for its models.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{StatusCode, Uri};

use super::connect::connector;
use super::connection::Outgoing;
use super::pool::{Client, Lane};
use super::{AnswerBody, Deployment, Failure, Link, Reading, Source, Trust, acceptable, authorization};
use crate::config::Secret;

/// Longest wait for a list.
const PATIENCE: Duration = Duration::from_secs(10);

/// Asks for the models to see whether a provider is there and takes the key.
///
/// # Errors
/// When there is no answer at all.
pub async fn probe(base: &Uri, key: Option<&Secret>, connect: Duration) -> Result<StatusCode, Failure> {
    let connector = connector(base, &mut Trust::default(), connect);
    let client = Client::new(base, connector, key.and_then(authorization).as_ref());
    let by = Instant::now() + PATIENCE;
    let sent = client.send(question(&client), Lane::default(), &AtomicBool::default(), by.into()).await?;
    Ok(sent.ok_or(Failure::TimedOut("list of models", PATIENCE))?.0.status)
}

impl Deployment {
    /// The provider's own list, as it wrote it; `None`: it has none.
    ///
    /// # Errors
    /// When it does not answer in time, or not with a list of reasonable size.
    pub async fn models(&self, lane: Lane) -> Result<Option<Bytes>, Failure> {
        let Link::Http(http) = &self.link else { return Ok(None) };
        let request = question(&http.client);
        let by = Instant::now() + PATIENCE;
        let sent = http.client.send(request, lane, &AtomicBool::default(), by.into()).await?;
        let (head, body) = sent.ok_or(Failure::TimedOut("list of models", PATIENCE))?;
        acceptable(&head)?;
        if !head.status.is_success() {
            return Err(Failure::Status(head.status, None));
        }
        match Reading::of(Source::Http(body)).whole(PATIENCE, PATIENCE, by).await? {
            AnswerBody::Whole(list) => Ok(Some(list)),
            AnswerBody::Open { .. } => Err(Failure::Broken("the list of models is too long".into())),
        }
    }
}

fn question(client: &Client) -> Outgoing {
    Outgoing::new(client.head("GET", "/models", &[]), Bytes::new())
}
