//! `health`: one question to a running gateway, for container health checks.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;

use super::{Configuration, Outcome, Stopped, block_on, exit};

/// Longest wait for the answer.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Args)]
pub(super) struct Options {
    #[command(flatten)]
    configuration: Configuration,
    /// The admin address of the gateway. Default: where the configuration says it is.
    #[arg(long, env = "TOLLGATE_URL", value_name = "URL")]
    url: Option<String>,
}

pub(super) fn run(options: &Options) -> Outcome {
    let base = match &options.url {
        Some(url) => url.trim_end_matches('/').to_owned(),
        None => {
            let loaded = options.configuration.source().load();
            let config = loaded.map_err(|refused| Stopped::new(exit::CONFIG, refused))?.config;
            format!("http://{}", reachable(config.server.admin))
        }
    };
    let (status, text) = block_on(ask(&format!("{base}/readyz")))?
        .map_err(|error| Stopped::new(exit::UNAVAILABLE, format!("{base} is not reachable: {error}")))?;
    super::print(text.trim_end())?;
    Ok(ExitCode::from(if status == 200 { 0 } else { exit::NO }))
}

/// An address to connect to for one that may mean "every interface".
pub(super) fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

async fn ask(url: &str) -> Result<(u16, String), Box<dyn std::error::Error>> {
    let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    let request = Request::get(url).body(Empty::<bytes::Bytes>::new())?;
    let answer = tokio::time::timeout(PATIENCE, client.request(request)).await??;
    let status = answer.status().as_u16();
    let body = tokio::time::timeout(PATIENCE, answer.into_body().collect()).await??.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
