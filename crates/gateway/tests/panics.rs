//! A defect of ours, in the middle of a request: what its provider had produced is settled all the same, once.
//!
//! In this process, because no caller can make the binary panic.

use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use http::Method;
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use tollgate::Gateway;
use tollgate::config::{self, LogFormat};
use tollgate::control;
use tollgate::error::BodyError;
use tollgate::ids::RequestId;
use tollgate::log::Log;
use tollgate::pipeline::{Arrival, answer};
use tollgate::relay::Body;
use tollgate::request::Request;
use tollgate::upstream::Lane;

const CONFIG: &str = "
users: [{ name: alice, keys: [sk-alice] }]
models: [{ name: chat, providers: [{ type: simulated, completion_tokens: 20, tokens_per_second: 2000 }] }]
limits: [{ name: r, per: user, limit: [10k tokens/day, 100/day, 5 concurrent] }]
settings: { state: none }
";

/// A log in memory.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl io::Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("nobody panics with it").write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Written {
    fn requests(&self) -> Vec<Value> {
        let text = String::from_utf8(self.0.lock().expect("nobody panics with it").clone()).expect("UTF-8");
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
        lines.filter(|line| line["endpoint"] == "/v1/chat/completions").collect()
    }
}

async fn ask(gateway: &Arc<Gateway>, method: Method, path: &str, body: &str) -> http::Response<Body> {
    let body = Full::new(Bytes::from(body.to_owned())).map_err(|never| -> BodyError { match never {} });
    let request =
        http::Request::builder().method(method).uri(path).header("authorization", "Bearer sk-alice");
    let request = request.body(body).expect("a request");
    let peer = IpAddr::V4(Ipv4Addr::LOCALHOST);
    let request_id = RequestId::parse(b"r-1").expect("an id");
    let arrival = Arrival { request_id, peer, lane: Lane::default(), ending: &gateway.ending };
    answer(gateway, Request::from(request), &arrival).await.into()
}

async fn used(gateway: &Arc<Gateway>) -> Vec<u64> {
    let said = ask(gateway, Method::GET, "/v1/limits", "").await.into_body().collect().await;
    let standings: Value = serde_json::from_slice(&said.expect("an answer").to_bytes()).expect("JSON");
    let of = |entry: &Value| entry["used"].as_u64().expect("a number");
    standings["data"].as_array().expect("a list").iter().map(of).collect()
}

#[tokio::test]
async fn a_panic_in_the_middle_of_an_answer_settles_it() {
    let written = Written::default();
    let log = Log::to(written.clone(), LogFormat::Json);
    let loaded = config::load(Some(("tollgate.yml", CONFIG)), &|_| None).expect("a right configuration");
    let control = control::Store::open(&loaded.config).await.expect("in memory");
    let gateway = Gateway::new(loaded, None, control, log.clone()).expect("memory");
    assert_eq!(used(&gateway).await, [0, 0, 0]);
    let question =
        r#"{"model":"chat","stream":true,"max_tokens":900,"messages":[{"role":"user","content":"Hello"}]}"#;
    let mut settled = 0;
    for events in [1, 5, 0] {
        let asking = gateway.clone();
        let panicked = tokio::spawn(async move {
            let mut body = ask(&asking, Method::POST, "/v1/chat/completions", question).await.into_body();
            for _ in 0..events {
                body.frame().await.expect("an event").expect("an event");
            }
            assert!(used(&asking).await[0] >= 900, "reserved");
            panic!("as planned");
        });
        assert!(panicked.await.expect_err("it panics").is_panic());
        log.flush(std::time::Duration::from_secs(10));
        let lines = written.requests();
        let line = lines.last().expect("a line");
        assert_eq!(line["outcome"], "panicked", "{line}");
        let tokens = |name: &str| line[name].as_u64().expect("a number");
        settled += tokens("prompt_tokens") + tokens("completion_tokens");
        assert_eq!(used(&gateway).await, [settled, lines.len() as u64, 0]);
    }
    assert_eq!(written.requests().len(), 3);
    assert!((1..3 * 40).contains(&settled), "{settled}");
}
