//! Usage reports: what `/admin/usage` tells is what providers said, to the token, whoever asks which gateway, whatever
//! became of Redis meanwhile, and after a restart.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{
    Ask, Conn, Gate, Provider, Redis, Response, SOON, Step, Store, Tollgate, chunk, get, governed,
    json_answer, obedient, post, request, soon, sse,
};

const MODELS: &str = "models:
  - { name: chat, aliases: [gpt-4o-mini], providers: [*upstream] }
  - { name: other, providers: [*upstream] }
  - { name: falling, fallback: [other], providers: [{ <<: *upstream, url: 'http://127.0.0.1:1' }] }
  - { name: limited, providers: [*upstream] }
limits: [{ name: r, match: { model: limited }, per: global, limit: 2/366 days }]
";

/// Requests, refused ones, tokens read, from the cache, written, reasoning, in all, micro-units of money.
type Sums = [u64; 8];

fn sums(line: &Value) -> Sums {
    let number = |value: &Value| value.as_u64().unwrap_or_else(|| panic!("{line}"));
    let tokens =
        ["input", "cached_input", "output", "reasoning", "total"].map(|kind| number(&line["tokens"][kind]));
    let micros = (line["cost"].as_f64().expect("a number") * 1e6).round() as u64;
    let [input, cached, output, reasoning, total] = tokens;
    [number(&line["requests"]), number(&line["refused"]), input, cached, output, reasoning, total, micros]
}

fn add(one: Sums, other: Sums) -> Sums {
    std::array::from_fn(|index| one[index] + other[index])
}

async fn page(gateway: &Tollgate, query: &str) -> Response {
    get(gateway.admin, &format!("/admin/usage?{query}")).await
}

/// Every line, page after page.
async fn lines(gateway: &Tollgate, query: &str) -> Vec<Value> {
    let mut all = Vec::new();
    let mut cursor = String::new();
    loop {
        let answer = page(gateway, &format!("{query}&cursor={cursor}")).await;
        assert_eq!(answer.status, 200, "{query}: {}", answer.text());
        let mut answer = answer.json();
        all.extend(answer["data"].as_array_mut().map(std::mem::take).expect("a list"));
        match answer["next_cursor"].take() {
            Value::Null => return all,
            next => next.as_str().expect("a cursor").clone_into(&mut cursor),
        }
    }
}

/// Sums by name; nobody is "".
async fn by(gateway: &Tollgate, what: &str) -> BTreeMap<String, Sums> {
    let mut sums_by_name = BTreeMap::new();
    for line in lines(gateway, &format!("by={what}&limit=2")).await {
        let name = line[what].as_str().unwrap_or_default().to_owned();
        assert!(sums_by_name.insert(name, sums(&line)).is_none(), "twice: {line}");
    }
    sums_by_name
}

async fn total(gateway: &Tollgate) -> Sums {
    by(gateway, "model").await.into_values().fold(Sums::default(), add)
}

/// Waits until this is what was used: what other instances have not written is a second old at most.
async fn total_becomes(gateway: &Tollgate, wanted: Sums) {
    let started = Instant::now();
    loop {
        let total = total(gateway).await;
        if total == wanted {
            return;
        }
        assert!(started.elapsed() < SOON, "{total:?}, not {wanted:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn start(store: &Store, provider: &Provider) -> Tollgate {
    support::start_counting(store, provider, MODELS).await
}

/// What a request with this number says that it used, and what that costs at $1 and $2 for a million.
fn used(number: u64) -> (Value, Sums) {
    let (input, output) = (10 + number * 7 % 90, 1 + number * 31 % 70);
    let (cached, reasoning) = (number % 10, number % 2);
    let said = json!({ "prompt_tokens": input, "completion_tokens": output, "total_tokens": input + output,
        "prompt_tokens_details": { "cached_tokens": cached },
        "completion_tokens_details": { "reasoning_tokens": reasoning } });
    (said, [1, 0, input, cached, output, reasoning, input + output, input + 2 * output])
}

const KEYS: [(&str, &str, &str); 6] = [
    ("sk-alice", "alice", "red"),
    ("sk-alice-2", "alice", "red"),
    ("sk-bob", "bob", ""),
    ("sk-carol", "carol", "red"),
    ("sk-red", "red", ""),
    ("", "", ""),
];

/// Traffic of every kind; by user, team and model what the provider said.
#[derive(Default)]
struct Expected {
    user: BTreeMap<String, Sums>,
    team: BTreeMap<String, Sums>,
    model: BTreeMap<String, Sums>,
}

impl Expected {
    fn add(&mut self, (_, user, team): (&str, &str, &str), model: &str, more: Sums) {
        for (sums, name) in [(&mut self.user, user), (&mut self.team, team), (&mut self.model, model)] {
            let sum = sums.entry(name.to_owned()).or_default();
            *sum = add(*sum, more);
        }
    }
}

async fn traffic(gateways: &[&Tollgate], expected: &mut Expected) {
    const REFUSED: Sums = [1, 1, 0, 0, 0, 0, 0, 0];
    for number in 0..60 {
        let (gateway, key) = (gateways[number % gateways.len()], KEYS[number % KEYS.len()]);
        let (asked, model) =
            [("gpt-4o-mini", "chat"), ("other", "other"), ("falling", "falling")][number / 6 % 3];
        let (said, sums) = used(number as u64);
        let stream = if number % 4 == 0 { r#", "stream": true"# } else { "" };
        let body = format!(r#", "x_usage": {said}{stream}"#);
        let answer = Ask { key: key.0, model: asked, body: &body, ..Ask::PLAIN }.send(gateway).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        expected.add(key, model, sums);
    }
    // Nobody who is refused pays anything, and everybody is told of.
    let alice = KEYS[0];
    for (ask, status, key, model) in [
        (Ask { key: "sk-canary", ..Ask::PLAIN }, 401, KEYS[5], ""),
        (Ask { model: "canary", ..Ask::PLAIN }, 404, alice, ""),
        (Ask { path: "/v1/audio/speech", body: r#", "stream": 1"#, ..Ask::PLAIN }, 400, alice, ""),
    ] {
        let answer = ask.send(gateways[0]).await;
        if answer.status == status {
            expected.add(key, model, REFUSED);
        } else {
            assert_eq!(ask.path, "/v1/audio/speech", "{}", answer.text());
            expected.add(key, "chat", [1, 0, 0, 0, 0, 0, 0, 0]);
        }
    }
    // Nobody's request for a model: counted nowhere.
    assert_eq!(get(gateways[0].data, "/v1/canary").await.status, 404);
    assert_eq!(get(gateways[0].data, "/v1/models").await.status, 200);
}

async fn agrees(gateway: &Tollgate, expected: &Expected) {
    let wanted = expected.model.values().copied().fold(Sums::default(), add);
    total_becomes(gateway, wanted).await;
    assert_eq!(by(gateway, "user").await, expected.user);
    assert_eq!(by(gateway, "team").await, expected.team);
    assert_eq!(by(gateway, "model").await, expected.model);
    let keys = by(gateway, "api_key").await;
    assert_eq!(keys.len(), KEYS.len());
    assert_eq!(keys.into_values().fold(Sums::default(), add), wanted);
    for step in ["hour", "day"] {
        let lines = lines(gateway, &format!("by=user&step={step}&limit=3")).await;
        assert_eq!(lines.iter().map(sums).fold(Sums::default(), add), wanted, "{step}");
    }
    for (query, wanted) in [
        ("user=alice", expected.user["alice"]),
        ("team=red", expected.team["red"]),
        ("model=chat", expected.model["chat"]),
        ("model=gpt-4o-mini", expected.model["chat"]),
        ("user=", expected.user[""]),
        ("user=nobody", Sums::default()),
        ("user=alice&team=", Sums::default()),
    ] {
        let found = lines(gateway, &format!("by=api_key&{query}")).await;
        assert_eq!(found.iter().map(sums).fold(Sums::default(), add), wanted, "{query}");
    }
}

#[tokio::test]
async fn every_sum_is_what_the_provider_said() {
    for store in [Store::Memory, Store::redis()] {
        let provider = obedient().await;
        let (one, two) = (start(&store, &provider).await, start(&store, &provider).await);
        let mut expected = Expected::default();
        // Without Redis each tells of itself.
        let all = if let Store::Redis(_) = store { vec![&one, &two] } else { vec![&one] };
        traffic(&all, &mut expected).await;
        for gateway in all {
            agrees(gateway, &expected).await;
        }
        for key in ["sk-", "canary"] {
            let told = page(&one, "by=api_key&step=hour").await.text()
                + &page(&one, "format=csv&by=model").await.text();
            assert!(!told.contains(key), "{told}");
        }
        if let Store::Redis(redis) = store {
            let keys = redis.cli(&["KEYS", "*{use}:use:*"]);
            assert!(keys.lines().count() >= 4, "{keys}");
            for key in keys.lines() {
                assert!(redis.cli(&["TTL", key]).parse::<i64>().expect("a number") > 86_400, "{key}");
                assert!(!key.contains("alice") && !key.contains("canary"), "{key}");
            }
        }
    }
}

#[tokio::test]
async fn what_is_refused_cut_and_estimated() {
    let gate = Gate::new();
    let provider = {
        let gate = gate.clone();
        Provider::start(move |seen| {
            let asked = seen.json();
            if asked["stream"] == true {
                let begun = [sse::head(), chunk(sse::delta("abcdef").as_bytes())].concat();
                return vec![Step::Send(begun), Step::Wait(gate.clone()), Step::Hang];
            }
            vec![Step::Send(json_answer("200 OK", "", r#"{"choices":[{"message":{"content":"abc"}}]}"#))]
        })
        .await
    };
    let gateway = start(&Store::Memory, &provider).await;
    for status in [200, 200, 429, 429] {
        assert_eq!(Ask { model: "limited", ..Ask::PLAIN }.send(&gateway).await.status, status);
    }
    let mut cut = Conn::ask(gateway.data, &Ask { body: r#", "stream": true"#, ..Ask::PLAIN }.bytes()).await;
    assert_eq!(cut.head().await.status, 200);
    cut.until("abcdef").await;
    cut.leave();
    let logged = gateway.requests_logged(5).await;
    let tokens = |model: &str| support::tokens_of(logged.iter().filter(|line| line["model"] == model));
    let found = lines(&gateway, "by=model").await;
    let [chat, limited] = &found[..] else { panic!("{found:?}") };
    assert_eq!((&chat["model"], &chat["requests"], &chat["refused"]), (&json!("chat"), &json!(1), &json!(0)));
    assert_eq!((&chat["estimated"], &chat["tokens"]["total"]), (&json!(1), &json!(tokens("chat"))));
    assert_eq!(
        (&limited["requests"], &limited["refused"], &limited["estimated"]),
        (&json!(4), &json!(2), &json!(2))
    );
    assert_eq!(limited["tokens"]["total"], tokens("limited"));
    assert!(tokens("chat") > 0 && tokens("limited") > 0);
}

/// Asks at a gateway again and again until there were so many answers.
async fn ask_often(gateway: &Tollgate, count: u64, numbers: &mut u64) -> Sums {
    let mut sum = Sums::default();
    for _ in 0..count {
        *numbers += 1;
        let (said, sums) = used(*numbers);
        let body = format!(r#", "x_usage": {said}"#);
        let answer = Ask { body: &body, ..Ask::PLAIN }.send(gateway).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        sum = add(sum, sums);
    }
    sum
}

#[tokio::test]
async fn a_redis_that_is_frozen_or_killed_gets_each_request_once() {
    let mut store = Store::Redis(Redis::start_with(&["--appendonly", "yes", "--appendfsync", "always"]));
    let provider = obedient().await;
    let config = governed(&store, &provider, MODELS).replace("timeout: 10s", "timeout: 50ms");
    let server = "  trusted_proxies: [127.0.0.0/8]\n";
    let one = Tollgate::start_with(server, &config, &[]).await;
    let two = Tollgate::start_with(server, &config, &[]).await;
    let (mut expected, mut number) = (Sums::default(), 0);
    let says =
        |line: &Value, words: &str| line["message"].as_str().is_some_and(|said| said.starts_with(words));
    let away = |line: &Value| says(line, "Redis does not answer");
    let back = |line: &Value| says(line, "Redis answers");
    for round in 0..2 {
        let Store::Redis(redis) = &mut store else { panic!("it is one") };
        expected = add(expected, ask_often(&two, 5, &mut number).await);
        expected = add(expected, ask_often(&one, 5, &mut number).await);
        let (seen, others) = (one.lines().len(), two.lines().len());
        if round == 0 {
            redis.signal(Signal::STOP);
            // Hands over what was used, and is not answered: the server finds it when it goes on.
            let refused = page(&one, "").await;
            assert_eq!(
                (refused.status, refused.header("content-type")),
                (503, Some("application/problem+json"))
            );
        } else {
            redis.kill();
        }
        expected = add(expected, ask_often(&one, 20, &mut number).await);
        expected = add(expected, ask_often(&two, 20, &mut number).await);
        one.logged_after(seen, away).await;
        two.logged_after(others, away).await;
        assert_eq!(page(&one, "").await.status, 503);
        expected = add(expected, ask_often(&one, 5, &mut number).await);
        match round {
            0 => redis.signal(Signal::CONT),
            _ => redis.restart(),
        }
        one.logged_after(seen, back).await;
        two.logged_after(others, back).await;
        total_becomes(&two, expected).await;
        total_becomes(&one, expected).await;
    }
}

#[tokio::test]
async fn a_restart_keeps_what_was_used() {
    let dir = tempfile::tempdir().expect("a folder");
    let state = format!("settings: {{ state: '{}' }}\n", dir.path().join("state").display());
    for (store, more) in [(Store::Memory, state.as_str()), (Store::redis(), "settings: { state: none }\n")] {
        let provider = obedient().await;
        let config = governed(&store, &provider, &format!("{MODELS}{more}"));
        let server = "  trusted_proxies: [127.0.0.0/8]\n";
        let (mut expected, mut number) = (Sums::default(), 0);
        for _ in 0..2 {
            let mut gateway = Tollgate::start_with(server, &config, &[]).await;
            expected = add(expected, ask_often(&gateway, 10, &mut number).await);
            total_becomes(&gateway, expected).await;
            // The last ones are written at the end; told twice, it ends at once.
            expected = add(expected, ask_often(&gateway, 3, &mut number).await);
            gateway.requests_logged(13).await;
            gateway.sigterm();
            gateway
                .logged(|line| line["message"].as_str().is_some_and(|said| said.starts_with("ending:")))
                .await;
            gateway.sigterm();
            gateway.ended(SOON).await;
        }
        // Killed, it has lost a second at most.
        let gateway = Tollgate::start_with(server, &config, &[]).await;
        expected = add(expected, ask_often(&gateway, 1, &mut number).await);
        total_becomes(&gateway, expected).await;
        drop(gateway);
        let gateway = Tollgate::start_with(server, &config, &[]).await;
        total_becomes(&gateway, expected).await;
    }
}

#[tokio::test]
async fn a_csv_is_one_for_every_reader() {
    let provider = Provider::answering(json_answer(
        "200 OK",
        "",
        r#"{"usage":{"prompt_tokens":3,"completion_tokens":4}}"#,
    ))
    .await;
    let names = ["=1+1", "a,b", "\"quoted\"", "ünï", "plain", "@x", "'a"];
    let users: String = names
        .iter()
        .enumerate()
        .map(|(number, name)| format!("  - {{ name: {}, keys: [sk-{number}] }}\n", json!(name)))
        .collect();
    let url = provider.address;
    let config = format!(
        "users:\n{users}models: [{{ name: chat, providers: [{{ type: openai, url: 'http://{url}', price: {{ input: 1, \
         output: 0.1 }} }}] }}]\n"
    );
    let gateway = Tollgate::start(&config).await;
    for number in 0..names.len() {
        let key = format!("sk-{number}");
        for _ in 0..=number {
            assert_eq!(Ask { key: &key, ..Ask::PLAIN }.send(&gateway).await.status, 200);
        }
    }
    let all = names.len() * (names.len() + 1) / 2;
    soon("all have ended", async {
        while total(&gateway).await[0] < all as u64 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    let asked = request("GET", "/admin/usage?step=day", &[("Accept", "text/csv")], b"");
    let answer = post(gateway.admin, &asked).await;
    assert_eq!(answer.header("content-type"), Some("text/csv; charset=utf-8; header=present"));
    assert_eq!(answer.text().matches("\r\n").count(), names.len() + 1);
    let mut reader = csv::Reader::from_reader(answer.body.as_slice());
    let header: Vec<String> = reader.headers().expect("a header").iter().map(str::to_owned).collect();
    assert_eq!(
        header,
        [
            "start",
            "end",
            "user",
            "requests",
            "refused",
            "estimated",
            "input_tokens",
            "cached_input_tokens",
            "output_tokens",
            "reasoning_tokens",
            "total_tokens",
            "cost"
        ]
    );
    let mut found = BTreeMap::new();
    for record in reader.records() {
        let record = record.expect("as many fields as names");
        let number = |column: usize| record[column].parse::<u64>().expect("a number");
        assert_eq!((number(6), number(8), number(10)), (3 * number(3), 4 * number(3), 7 * number(3)));
        let micros = 4 * number(3);
        assert_eq!(&record[11], format!("0.{micros:06}").as_str());
        let name = record[2].to_owned();
        assert!(!name.starts_with(['=', '+', '-', '@']), "a formula: {name}");
        found.insert(name, number(3));
    }
    let guarded =
        |name: &str| if name.starts_with(['=', '@']) { format!("'{name}") } else { name.to_owned() };
    let wanted: BTreeMap<String, u64> =
        names.iter().zip(1..).map(|(name, count)| (guarded(name), count)).collect();
    assert_eq!(found, wanted);
    // The same as JSON says it, where nothing is guarded.
    let told: Vec<String> = lines(&gateway, "limit=1")
        .await
        .iter()
        .map(|line| line["user"].as_str().expect("a name").to_owned())
        .collect();
    let mut sorted = names.map(str::to_owned);
    sorted.sort();
    assert_eq!(told, sorted);
}

#[tokio::test]
async fn what_cannot_be_asked_is_said_field_by_field() {
    let provider = obedient().await;
    let gateway = start(&Store::Memory, &provider).await;
    let long = "a".repeat(3_000);
    let huge = format!("cursor={long}");
    let number = format!("from={}", "9".repeat(400));
    let future = format!("from={}", u64::MAX / 2);
    for (query, fields) in [
        ("by=ip", &["by"][..]),
        ("by=User", &["by"]),
        ("step=week", &["step"]),
        ("format=xml", &["format"]),
        ("from=yesterday", &["from"]),
        ("from=-1", &["from"]),
        ("from=1e9", &["from"]),
        ("to=2026-13-01", &["to"]),
        ("to=0", &["from"]),
        (&number, &["from"]),
        (&future, &["from"]),
        ("from=2200-01-01&to=2201-01-01", &["from"]),
        ("from=1970-01-01", &["from"]),
        ("from=2020-01-01&to=2020-01-02&step=hour", &["from"]),
        ("from=2020-01-01&to=2020-01-02&step=day", &["from"]),
        ("from=0", &["from"]),
        ("from=1700000001&to=1700000000", &["from"]),
        ("from=1700000000000", &["from"]),
        ("limit=0", &["limit"]),
        ("limit=1001", &["limit"]),
        ("limit=x", &["limit"]),
        ("cursor=!", &["cursor"]),
        ("cursor=MSAyIDE", &["cursor"]),
        ("cursor=MCAxODQ0Njc0NDA3MzcwOTU1MTYxNSAwID1h", &["cursor"]),
        (&huge, &["cursor"]),
        ("format=csv&limit=3&cursor=x", &["limit", "cursor"]),
        ("by=x&step=x&from=x&to=x", &["by", "step", "from", "to"]),
    ] {
        let answer = page(&gateway, query).await;
        assert_eq!(
            (answer.status, answer.header("content-type")),
            (422, Some("application/problem+json")),
            "{query}"
        );
        let problem = answer.json();
        let named: Vec<&str> = problem["errors"]
            .as_array()
            .expect("errors")
            .iter()
            .filter_map(|e| e["field"].as_str())
            .collect();
        assert_eq!(named, fields, "{query}: {problem}");
    }
    // What is not said, or empty, is as if it were usual; what has not begun is not asked for.
    for query in ["by=&step=&from=&to=&format=&cursor=", "to=2200-01-01", "user=%00&model=%27%22"] {
        let answer = page(&gateway, query).await;
        assert_eq!((answer.status, answer.json()["data"].clone()), (200, json!([])), "{query}");
    }
    let days = page(&gateway, "step=day&from=1970-01-02&to=1970-01-03").await.json();
    assert!(days["detail"].as_str().is_some_and(|said| said.contains("days are kept since")), "{days}");
    let unknown = request("GET", "/admin/usage", &[("X-Admin-Key", "wrong")], b"");
    assert_eq!(post(gateway.admin, &unknown).await.status, 200, "no key is set");
}

#[tokio::test]
async fn a_bucket_in_redis_has_a_bound_and_each_batch_counts_once() {
    const ADD: &str = include_str!("../src/control/usage.lua");
    let redis = Redis::start();
    let add = |number: &str, rows: &[&str]| {
        let head = ["EVAL", ADD, "3", "last", "hour", "day", number, "100", "200", "300", "3", "other"];
        redis.cli(&[&head[..], rows].concat())
    };
    assert_eq!(add("1", &["a", "1 2 3", "b", "1 0"]), "1");
    assert_eq!(add("1", &["a", "1 2 3", "b", "1 0"]), "0");
    assert_eq!(add("2", &["a", "1 0 9007199254740991", "c", "5", "d", "6 1", "e", "7 1"]), "1");
    assert_eq!(add("1", &["a", "1"]), "0");
    for bucket in ["hour", "day"] {
        for (row, counts) in
            [("a", "2 2 9007199254740991"), ("b", "1 0"), ("c", "5"), ("d", ""), ("other", "13 2")]
        {
            assert_eq!(redis.cli(&["HGET", bucket, row]), counts, "{row}");
        }
    }
    for (key, most) in [("last", 100), ("hour", 200), ("day", 300)] {
        let ttl: u64 = redis.cli(&["TTL", key]).parse().expect("a number");
        assert!(ttl <= most && ttl + 20 > most, "{key}: {ttl}");
    }
}
