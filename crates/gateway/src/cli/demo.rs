//! `demo`: a gateway to play with. No key, no file, no network.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use clap::{Args, Subcommand};
use http::{Request, header};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::json;

use super::{Outcome, Stopped, block_on, exit};
use crate::{Gateway, config};

const CONFIGURATION: &str = include_str!("demo.yml");

const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);
const ADMIN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 8081);

/// Between two requests of the synthetic traffic, on average.
const TRAFFIC_PAUSE: Duration = Duration::from_millis(400);

/// `hit` waits for a new minute when this one has less left: its requests should meet one window.
const MINUTE_LEFT_MIN: u64 = 5;

/// Requests of one `hit` at most.
const TIMES_MAX: u16 = 1_000;

#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct Options {
    #[command(subcommand)]
    act: Option<Act>,
    /// Where SDKs talk to.
    #[arg(long, default_value_t = LISTEN, value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Health and metrics.
    #[arg(long, default_value_t = ADMIN, value_name = "ADDRESS")]
    admin: SocketAddr,
    /// No synthetic traffic.
    #[arg(long)]
    no_traffic: bool,
}

#[derive(Subcommand)]
enum Act {
    /// Send requests as bob, who may send ten a minute, and show the answers.
    Hit {
        /// How many.
        #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u16).range(1..=TIMES_MAX as i64))]
        times: u16,
        /// The gateway.
        #[arg(long, default_value_t = format!("http://{LISTEN}"))]
        url: String,
        /// Whose key to use.
        #[arg(long, default_value = "sk-demo-bob")]
        key: String,
    },
}

pub(super) fn run(options: &Options) -> Outcome {
    match &options.act {
        Some(Act::Hit { times, url, key }) => block_on(hit(*times, url.trim_end_matches('/'), key))?,
        None => serve(options),
    }
}

fn serve(options: &Options) -> Outcome {
    let addresses = |name: &str| match name {
        "LISTEN" => Some(options.listen.to_string()),
        "ADMIN" => Some(options.admin.to_string()),
        _ => None,
    };
    let loaded = config::load(Some(("demo.yml", CONFIGURATION)), &addresses).map_err(|problems| {
        let problems: Vec<String> = problems.iter().map(ToString::to_string).collect();
        Stopped::new(exit::CONFIG, problems.join("\n"))
    })?;
    let log = super::serve::start_log(loaded.config.settings.log_format);
    let (traffic, listen) = (!options.no_traffic, options.listen);
    let introduction = introduction(options);
    super::serve::serve(loaded, None, log, move |gateway| async move {
        // Nobody reading is no reason not to run.
        let _ = super::print(&introduction);
        if traffic {
            tokio::spawn(send_traffic(gateway, listen));
        }
    })
}

fn introduction(options: &Options) -> String {
    let Options { listen, admin, .. } = options;
    let hit = if *listen == LISTEN { String::new() } else { format!(" --url http://{listen}") };
    format!(
        r#"Tollgate demo: a simulated provider, limits in memory.

  keys    sk-demo-alice (tier pro, 600/minute)   sk-demo-bob (tier free, 10/minute)
  data    http://{listen}/v1      admin  http://{admin}/metrics

Paste:
  curl http://{listen}/v1/chat/completions -H 'Authorization: Bearer sk-demo-alice' \
       -H 'Content-Type: application/json' \
       -d '{{"model":"demo","stream":true,"messages":[{{"role":"user","content":"Hello"}}]}}'

Ten 200s, then two 429s (or: tollgate demo hit --times 12{hit}):
  for i in $(seq 12); do curl -s -o /dev/null -w '%{{http_code}}\n' http://{listen}/v1/chat/completions \
       -H 'Authorization: Bearer sk-demo-bob' -d '{{"model":"demo","messages":[]}}'; done

Ctrl-C ends it.
"#
    )
}

/// Small requests of alice's, streamed and not, until the process ends. Never bob's: his ten are for whoever tries.
async fn send_traffic(gateway: Arc<Gateway>, listen: SocketAddr) {
    let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    let url = format!("http://{}/v1/chat/completions", super::health::reachable(listen));
    while !gateway.leaving.is_cancelled() {
        let pause = TRAFFIC_PAUSE.mul_f64(0.5 + fastrand::f64());
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = gateway.leaving.cancelled() => return,
        }
        let (client, request) =
            (client.clone(), chat(&url, "sk-demo-alice", fastrand::bool(), fastrand::u8(4..24)));
        tokio::spawn(async move {
            if let Ok(answer) = client.request(request).await {
                let _ = answer.into_body().collect().await;
            }
        });
    }
}

fn chat(url: &str, key: &str, stream: bool, max_tokens: u8) -> Request<Full<Bytes>> {
    let body = json!({ "model": "demo", "stream": stream, "max_tokens": max_tokens,
                       "messages": [{ "role": "user", "content": "May I pass?" }] });
    let request = Request::post(url)
        .header(header::AUTHORIZATION, format!("Bearer {key}"))
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::from(body.to_string()));
    request.unwrap_or_default()
}

/// Prints a line for each answer: its status, and what it says of the limit.
async fn hit(times: u16, url: &str, key: &str) -> Outcome {
    let url = format!("{url}/v1/chat/completions");
    if url.parse::<http::Uri>().is_err() || http::HeaderValue::from_str(key).is_err() {
        return Err(Stopped::new(2, format!("`{url}` with key `{key}` makes no request")));
    }
    let left = 60 - SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() % 60;
    if left < MINUTE_LEFT_MIN {
        eprintln!("waiting {left} s for a new minute, so that all requests meet one window");
        tokio::time::sleep(Duration::from_secs(left)).await;
    }
    let client = Client::builder(TokioExecutor::new()).build(HttpConnector::new());
    for number in 1..=times {
        let answer = client.request(chat(&url, key, false, 1)).await;
        let answer = answer.map_err(|error| {
            Stopped::new(
                exit::UNAVAILABLE,
                format!("{url} is not reachable: {error}. Is `tollgate demo` running?"),
            )
        })?;
        let header =
            |name: &str| answer.headers().get(name).and_then(|value| value.to_str().ok()).unwrap_or("-");
        let status = answer.status().as_u16();
        let mut line =
            format!("{number:>3}  {status}  remaining {}", header("x-ratelimit-remaining-requests"));
        if status == 429 {
            line.push_str(&format!("  retry after {} s", header("retry-after")));
        }
        super::print(&line)?;
        let _ = answer.into_body().collect().await;
    }
    Ok(ExitCode::SUCCESS)
}
