//! A gateway with limits: where it counts, who asks it, and a provider that says it used what it is told to.

use std::time::Instant;

use serde_json::{Value, json};

use super::{Provider, Redis, Response, SOON, Step, Tollgate, json_answer, post, request, sse};

/// Where counters are kept.
pub enum Store {
    Memory,
    Redis(Redis),
}

impl Store {
    /// A new Redis.
    pub fn redis() -> Self {
        Self::Redis(Redis::start())
    }

    /// As `x-tollgate-source` names it.
    pub fn source(&self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Redis(_) => "redis",
        }
    }

    /// Its part of a configuration. The deadline is generous: these tests are about what is counted.
    fn section(&self) -> String {
        match self {
            Self::Memory => String::new(),
            Self::Redis(redis) => {
                format!("dependencies: {{ redis: {{ url: '{}', timeout: 10s }} }}\n", redis.url())
            }
        }
    }
}

/// Who sends what. `body` stands behind the model: `, "max_tokens": 1`.
#[derive(Clone, Copy)]
pub struct Ask<'a> {
    pub key: &'a str,
    pub ip: &'a str,
    pub agent: &'a str,
    pub model: &'a str,
    pub path: &'a str,
    pub body: &'a str,
}

impl Ask<'_> {
    pub const CHAT: &'static str = "/v1/chat/completions";

    /// alice asks for nothing in particular.
    pub const PLAIN: Ask<'static> =
        Ask { key: "sk-alice", ip: "203.0.113.1", agent: "a", model: "chat", path: Ask::CHAT, body: "" };

    fn headers<'a>(&'a self, bearer: &'a str) -> Vec<(&'a str, &'a str)> {
        let mut headers = vec![("X-Forwarded-For", self.ip), ("User-Agent", self.agent)];
        if !self.key.is_empty() {
            headers.push(("Authorization", bearer));
        }
        headers
    }

    /// The request.
    pub fn bytes(&self) -> Vec<u8> {
        let body = format!(r#"{{"model":"{}"{}}}"#, self.model, self.body);
        request("POST", self.path, &self.headers(&format!("Bearer {}", self.key)), body.as_bytes())
    }

    pub async fn send(&self, gateway: &Tollgate) -> Response {
        post(gateway.data, &self.bytes()).await
    }

    /// What `GET /v1/limits` tells this caller of this model.
    pub async fn limits(&self, gateway: &Tollgate) -> Response {
        let path = format!("/v1/limits?model={}", self.model);
        post(gateway.data, &request("GET", &path, &self.headers(&format!("Bearer {}", self.key)), b"")).await
    }

    /// What is in use of a limit: of its counters that this caller has for this model, the one used most.
    pub async fn level(&self, gateway: &Tollgate, limit: &str) -> u64 {
        let said = self.limits(gateway).await.json();
        let entries = said["data"].as_array().unwrap_or_else(|| panic!("{said}"));
        let of_limit = entries.iter().filter(|entry| entry["rule"] == limit);
        let used = of_limit.map(|entry| entry["used"].as_u64().expect("a number")).max();
        used.unwrap_or_else(|| panic!("no limit {limit}: {said}"))
    }

    /// Waits until this much of a limit is in use: what was used is known a moment after the answer.
    pub async fn level_becomes(&self, gateway: &Tollgate, limit: &str, wanted: u64) {
        let started = Instant::now();
        loop {
            let level = self.level(gateway, limit).await;
            if level == wanted {
                return;
            }
            assert!(started.elapsed() < SOON, "{limit}: {level}, not {wanted}");
            tokio::task::yield_now().await;
        }
    }
}

/// A provider that does what the members of a request tell it: `x_status` is its status (0: it says nothing), `x_type` its
/// content type then, `x_usage` the usage it reports, `x_text` what it writes. Streams come in an event for each word.
/// To a form it answers with a transcript.
pub async fn obedient() -> Provider {
    Provider::start(|seen| {
        let Ok(asked) = serde_json::from_slice::<Value>(&seen.body) else {
            let usage =
                json!({ "type": "tokens", "input_tokens": 14, "output_tokens": 45, "total_tokens": 59 });
            let transcript = json!({ "text": "May pass.", "usage": usage });
            return vec![Step::Send(json_answer("200 OK", "", &transcript.to_string()))];
        };
        match asked["x_status"].as_u64() {
            None | Some(200) => {}
            Some(0) => return vec![Step::Hang],
            Some(status) => {
                let kind = asked["x_type"].as_str().unwrap_or("application/json");
                let body = r#"{"error":{"message":"No. You may not pass."}}"#;
                let head =
                    format!("HTTP/1.1 {status} No\r\ncontent-type: {kind}\r\ncontent-length: {}", body.len());
                return vec![Step::Send(format!("{head}\r\n\r\n{body}").into_bytes())];
            }
        }
        let text = asked["x_text"].as_str().unwrap_or("May pass.");
        if asked["stream"] == true {
            return vec![Step::Send(stream(text, &asked))];
        }
        let mut answer = json!({ "choices": [{ "message": { "content": text } }] });
        if !asked["x_usage"].is_null() {
            answer["usage"] = asked["x_usage"].clone();
        }
        vec![Step::Send(json_answer("200 OK", "", &answer.to_string()))]
    })
    .await
}

fn stream(text: &str, asked: &Value) -> Vec<u8> {
    let mut events: Vec<String> = text.split_inclusive(' ').map(sse::delta).collect();
    if asked["stream_options"]["include_usage"] == true && !asked["x_usage"].is_null() {
        events.push(format!("data: {}\n\n", json!({ "choices": [], "usage": asked["x_usage"] })));
    }
    events.push(sse::DONE.to_owned());
    let events: Vec<&str> = events.iter().map(String::as_str).collect();
    sse::whole(&events)
}

/// A configuration: alice has two keys and is in team `red` with carol; alice and bob are in tier `gold`, carol in
/// `silver`; a user in no team is called `red`, too. `rest` has `models` (their providers: `[*upstream]`, at $1 and $2 per
/// million tokens) and `limits`.
pub fn governed(store: &Store, provider: &Provider, rest: &str) -> String {
    format!(
        "x-upstream: &upstream {{ type: openai, url: 'http://{}', price: {{ input: 1, output: 2 }} }}\n\
         auth: optional\ntiers: {{ gold: [unlimited], silver: [unlimited] }}\nusers:\n  \
         - {{ name: alice, team: red, tier: gold, keys: [sk-alice, sk-alice-2] }}\n  \
         - {{ name: bob, tier: gold, keys: [sk-bob] }}\n  \
         - {{ name: carol, team: red, tier: silver, keys: [sk-carol] }}\n  \
         - {{ name: red, keys: [sk-red] }}\n{}{rest}\n",
        provider.address,
        store.section()
    )
}

/// Starts a gateway with the model `chat` (alias `gpt-4o-mini`), `other`, and these limits.
pub async fn start_governed(store: &Store, provider: &Provider, limits: &str) -> Tollgate {
    let models = "models:\n  - { name: chat, aliases: [gpt-4o-mini], providers: [*upstream] }\n  \
                  - { name: other, providers: [*upstream] }\n";
    start_counting(store, provider, &format!("{models}{limits}")).await
}

/// Starts one with this `rest` of [`governed`], and waits until it counts where it should.
pub async fn start_counting(store: &Store, provider: &Provider, rest: &str) -> Tollgate {
    let config = governed(store, provider, rest);
    let gateway = Tollgate::start_with("  trusted_proxies: [127.0.0.0/8]\n", &config, &[]).await;
    if let Store::Redis(_) = store {
        gateway.metrics_become(|metrics| metrics.value("rate_limit_redis_connected") == 1.0).await;
    }
    gateway
}
