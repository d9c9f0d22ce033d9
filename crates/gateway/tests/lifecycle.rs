//! Start, reload and end of the process.

mod support;

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{
    Conn, Gate, Provider, Step, Tollgate, chat, chat_config, chunk, get, json_answer, openai, over_http2,
    post, question, request, soon, sse,
};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;

fn held_stream(gate: &Gate) -> Vec<Step> {
    let rest = [chunk(sse::delta("rest").as_bytes()), chunk(sse::DONE.as_bytes()), chunk(b"")].concat();
    vec![
        Step::Send([sse::head(), chunk(sse::delta("begun").as_bytes())].concat()),
        Step::Wait(gate.clone()),
        Step::Send(rest),
    ]
}

async fn begin_stream(gateway: &Tollgate) -> Conn {
    let mut conn = Conn::ask(gateway.data, &chat(&question(true))).await;
    assert_eq!(conn.head().await.status, 200);
    conn.until("begun").await;
    conn
}

#[tokio::test]
async fn sigterm_under_500_streams_loses_none_of_them() {
    const STREAMS: usize = 500;
    let gate = Gate::new();
    let script = held_stream(&gate);
    let provider = Provider::start(move |seen| {
        let plain = vec![Step::Send(json_answer("200 OK", "", ANSWER))];
        if seen.json()["stream"] == true { script.clone() } else { plain }
    })
    .await;
    let config = chat_config(&[openai(&provider)]);
    let mut gateway = Tollgate::start_with("  shutdown_grace: 60s\n", &config, &[]).await;
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        streams.push(begin_stream(&gateway).await);
    }
    gate.reached(STREAMS).await;
    let mut idle = Conn::ask(gateway.data, &chat(&question(false))).await;
    assert_eq!(idle.response().await.status, 200);
    assert_eq!(get(gateway.admin, "/readyz").await.status, 200);

    let asked = Instant::now();
    gateway.sigterm();
    soon("no longer ready", async { while get(gateway.admin, "/readyz").await.status == 200 {} }).await;
    assert_eq!(get(gateway.admin, "/readyz").await.status, 503);
    assert_eq!(get(gateway.admin, "/livez").await.status, 200);
    let mut late = 0;
    while let Ok(mut conn) = Conn::try_open(gateway.data).await {
        // Accepted in the last moment is not answered for sure; accepted before is.
        if asked.elapsed() < Duration::from_millis(4_800) {
            conn.send(&chat(&question(false))).await;
            assert_eq!(conn.response().await.status, 200, "accepted after the signal");
            late += 1;
        }
        assert!(asked.elapsed() < Duration::from_secs(8), "still accepting");
    }
    let closed = asked.elapsed();
    println!("{late} requests answered after the signal; closed after {closed:?}");
    assert!(closed >= Duration::from_millis(4_900) && late > 0, "{late} {closed:?}");
    soon("idle connections are closed", idle.closed()).await;
    assert!(gateway.is_alive(), "streams are waited for");

    gate.open();
    for (number, conn) in streams.iter_mut().enumerate() {
        let rest = soon("the rest of a stream", conn.rest()).await;
        let rest = rest.unwrap_or_else(|error| panic!("stream {number}: {error}"));
        assert_eq!(rest, [sse::delta("rest").as_str(), sse::DONE].concat().as_bytes());
    }
    assert!(gateway.ended(Duration::from_secs(10)).await.success());
    let lines = gateway.requests_logged(STREAMS + 1 + late).await;
    assert_eq!(lines.len(), STREAMS + 1 + late);
    assert!(lines.iter().all(|line| line["outcome"] == "done"));
}

#[tokio::test]
async fn after_the_grace_streams_end_with_an_error_event() {
    let gate = Gate::new();
    let script = held_stream(&gate);
    let provider =
        Provider::start(
            move |seen| if seen.json()["stream"] == true { script.clone() } else { vec![Step::Hang] },
        )
        .await;
    let config = chat_config(&[openai(&provider)]);
    let mut gateway = Tollgate::start_with("  shutdown_grace: 500ms\n", &config, &[]).await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        streams.push(begin_stream(&gateway).await);
    }
    let mut waiting = Conn::ask(gateway.data, &chat(&question(false))).await;
    let ask = http::Request::post(format!("http://{}/v1/chat/completions", gateway.data));
    let ask = ask.header("authorization", "Bearer sk-alice").body(question(false)).expect("a request");
    let waiting_over_http2 = tokio::spawn(over_http2(gateway.data, ask));
    provider.request(21).await;
    gateway.sigterm();
    for conn in &mut streams {
        let rest = soon("the end of a stream", conn.rest()).await.expect("a whole body");
        let rest = String::from_utf8(rest).expect("UTF-8");
        let error: serde_json::Value =
            serde_json::from_str(rest.strip_prefix("data: ").unwrap_or_else(|| panic!("{rest}")))
                .expect("JSON");
        assert_eq!(
            (&error["error"]["type"], &error["error"]["code"]),
            (&"service_unavailable".into(), &"shutting_down".into())
        );
    }
    let answer = waiting.response().await;
    assert_eq!((answer.status, answer.code()), (503, "shutting_down".into()));
    assert!(answer.number("retry-after") >= 1);
    assert_eq!(waiting_over_http2.await.expect("an answer").status(), 503);
    assert_eq!(gateway.ended(Duration::from_secs(10)).await.code(), Some(0));
    let lines = gateway.requests_logged(22).await;
    for line in lines {
        assert_eq!(line["code"], "shutting_down", "{line}");
        assert!(line["status"] == 503 || line["outcome"] == "shutdown", "{line}");
    }
}

#[tokio::test]
async fn a_second_signal_ends_it_at_once() {
    for (first, second, code) in [(Signal::TERM, Signal::TERM, 143), (Signal::TERM, Signal::INT, 130)] {
        let gate = Gate::new();
        let provider = Provider::always(held_stream(&gate)).await;
        let mut gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
        let _stream = begin_stream(&gateway).await;
        gateway.signal(first);
        gateway.logged(|line| line["message"].as_str().is_some_and(|text| text.starts_with("ending"))).await;
        let asked = Instant::now();
        gateway.signal(second);
        assert_eq!(gateway.ended(Duration::from_secs(4)).await.code(), Some(code));
        println!("ended {:?} after the second signal", asked.elapsed());
    }
}

async fn models(gateway: &Tollgate, key: &str) -> Vec<String> {
    let bearer = format!("Bearer {key}");
    let answer = post(gateway.data, &request("GET", "/v1/models", &[("Authorization", &bearer)], b"")).await;
    let data = answer.json()["data"].as_array().cloned().unwrap_or_default();
    data.iter().map(|model| model["id"].as_str().expect("an id").to_owned()).collect()
}

async fn reloaded_well(gateway: &Tollgate) -> f64 {
    gateway.metrics().await.value("config_last_reload_successful")
}

#[tokio::test]
async fn sighup_takes_a_good_file_and_refuses_a_bad_one() {
    let gate = Gate::new();
    let provider = Provider::always(held_stream(&gate)).await;
    let config = chat_config(&[openai(&provider)]);
    let gateway = Tollgate::start(&config).await;
    let mut stream = begin_stream(&gateway).await;
    assert_eq!(reloaded_well(&gateway).await, 1.0);

    gateway.configure(
        "  max_bodi: 5\n",
        &config.replace("sk-alice", "sk-new").replace("type: openai", "type: opnai"),
    );
    let line = gateway.reload().await;
    let said = line["message"].as_str().expect("a message");
    assert_eq!(line["level"], "ERROR", "{line}");
    for part in ["tollgate.yml:4:3", "max_bodi", "max_body", "opnai", "openai"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    assert_eq!(reloaded_well(&gateway).await, 0.0);
    assert_eq!(models(&gateway, "sk-alice").await, ["chat", "gpt-4o-mini"]);
    assert!(models(&gateway, "sk-new").await.is_empty());

    gateway.configure("", &config.replace("sk-alice", "sk-new").replace("gpt-4o-mini", "other-alias"));
    assert_eq!(gateway.reload().await["message"], "configuration reloaded");
    assert_eq!(reloaded_well(&gateway).await, 1.0);
    assert_eq!(models(&gateway, "sk-new").await, ["chat", "other-alias"]);
    assert!(models(&gateway, "sk-alice").await.is_empty(), "the old key is gone");

    std::fs::remove_file(gateway.config_path()).expect("it is there");
    assert_eq!(gateway.reload().await["level"], "ERROR");
    assert_eq!(reloaded_well(&gateway).await, 0.0);
    assert_eq!(models(&gateway, "sk-new").await, ["chat", "other-alias"]);

    gate.open();
    let rest = soon("a stream from before", stream.rest()).await.expect("a whole body");
    assert!(rest.ends_with(sse::DONE.as_bytes()), "what was under way goes on");
}

#[tokio::test]
async fn watch_sees_writes_renames_and_moved_symlinks() {
    let provider = Provider::always(vec![Step::Hang]).await;
    let config = |alias: &str| {
        let config = chat_config(&[openai(&provider)]).replace("gpt-4o-mini", alias);
        format!("server:\n  listen: 127.0.0.1:0\n  admin: 127.0.0.2:0\n{config}")
    };
    let gateway = Tollgate::start_with("", &chat_config(&[openai(&provider)]), &["--watch"]).await;
    let file = gateway.config_path();
    let dir = file.parent().expect("a directory").to_owned();
    let becomes = async |alias: &'static str| {
        soon(alias, async { while models(&gateway, "sk-alice").await != ["chat", alias] {} }).await;
    };
    // There is no signal that says a watch is in place, so the first change is made until it is seen.
    soon("the watch", async {
        while models(&gateway, "sk-alice").await != ["chat", "written"] {
            std::fs::write(&file, config("written")).expect("written");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    })
    .await;
    let beside = dir.join(".tollgate.yml.swp");
    std::fs::write(&beside, config("renamed")).expect("written");
    std::fs::rename(&beside, &file).expect("renamed");
    becomes("renamed").await;
    // As Kubernetes mounts a ConfigMap: the file links to ..data/, and ..data moves.
    for version in ["one", "two"] {
        std::fs::create_dir(dir.join(version)).expect("made");
        std::fs::write(dir.join(version).join("tollgate.yml"), config(version)).expect("written");
    }
    std::os::unix::fs::symlink("one", dir.join("..data")).expect("linked");
    std::fs::remove_file(&file).expect("removed");
    std::os::unix::fs::symlink("..data/tollgate.yml", &file).expect("linked");
    becomes("one").await;
    std::os::unix::fs::symlink("two", dir.join("..data_tmp")).expect("linked");
    std::fs::rename(dir.join("..data_tmp"), dir.join("..data")).expect("moved");
    becomes("two").await;
    std::fs::write(dir.join("two/tollgate.yml"), "models: [").expect("written");
    std::fs::write(&beside, "").expect("written");
    gateway.metrics_become(|metrics| metrics.value("config_last_reload_successful") == 0.0).await;
    assert_eq!(models(&gateway, "sk-alice").await, ["chat", "two"]);
}

#[tokio::test]
async fn a_directory_that_is_never_quiet_hides_no_change() {
    let provider = Provider::always(vec![Step::Hang]).await;
    let config = chat_config(&[openai(&provider)]);
    let gateway = Tollgate::start_with("", &config, &["--watch"]).await;
    let file = gateway.config_path();
    let log = file.with_file_name("noise.log");
    let noise = tokio::spawn(async move {
        for line in 0_u64.. {
            std::fs::write(&log, line.to_string()).expect("written");
            // The pace of the noise: faster than any quiet that could be waited for.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    let changed = config.replace("gpt-4o-mini", "changed");
    let changed = format!("server:\n  listen: 127.0.0.1:0\n  admin: 127.0.0.2:0\n{changed}");
    std::fs::write(&file, changed).expect("written");
    soon("the change", async { while models(&gateway, "sk-alice").await != ["chat", "changed"] {} }).await;
    noise.abort();
}

fn damage(text: &str, random: &mut fastrand::Rng) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    for _ in 0..random.usize(1..4) {
        let at = random.usize(..bytes.len());
        match random.u8(..5) {
            0 => bytes[at] ^= 1 << random.u8(..8),
            1 => bytes[at] = *random.choice(b"{}[]:-#&*!|>'\"%@`$, \t\n~<").expect("one of them"),
            2 => drop(bytes.drain(at..(at + random.usize(1..30)).min(bytes.len()))),
            3 => drop(bytes.splice(at..at, b"  ".iter().copied())),
            _ => bytes.truncate(at.max(1)),
        }
    }
    bytes
}

#[tokio::test]
async fn five_hundred_damaged_files_change_nothing_or_all() {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    // A generation shows in a model, a key and a limit: a file applied in part would show two of them.
    let config = |generation: usize| {
        let config = chat_config(&[openai(&provider)]).replace("sk-alice", &format!("sk-{generation}"));
        let limit = 1_000_000 + generation;
        let config = config.replace("gpt-4o-mini", &format!("alias-{generation}"));
        format!("{config}limits:\n  - name: r\n    per: global\n    limit: {limit}/day\n")
    };
    let mut gateway = Tollgate::start(&config(0)).await;
    let stands = async |gateway: &Tollgate, generation: usize| {
        let bearer = format!("Bearer sk-{generation}");
        let body = question(false).replace("\"chat\"", &format!("\"alias-{generation}\""));
        let chat = request("POST", "/v1/chat/completions", &[("Authorization", &bearer)], body.as_bytes());
        let answer = post(gateway.data, &chat).await;
        assert_eq!(answer.status, 200, "generation {generation}: {}", answer.text());
        assert_eq!(answer.number("x-ratelimit-limit-requests"), 1_000_000 + generation as u64);
    };
    let mut random = fastrand::Rng::with_seed(5);
    let (mut refused, mut generation) = (0, 0);
    for round in 0..500 {
        gateway.configure("", &config(generation + 1));
        let next = std::fs::read_to_string(gateway.config_path()).expect("it is there");
        std::fs::write(gateway.config_path(), damage(&next, &mut random)).expect("written");
        let taken = gateway.reload().await["message"] == "configuration reloaded";
        assert_eq!(reloaded_well(&gateway).await, f64::from(u8::from(taken)), "round {round}");
        if taken {
            // What it says is anybody's guess; the next generation must come in whole all the same.
            generation += 1;
            gateway.configure("", &config(generation));
            assert_eq!(gateway.reload().await["message"], "configuration reloaded");
            assert_eq!(reloaded_well(&gateway).await, 1.0);
        } else {
            refused += 1;
        }
        stands(&gateway, generation).await;
    }
    println!("{refused} refused, {generation} taken");
    assert!(refused > 250 && generation > 10, "{refused} {generation}");
    assert!(gateway.is_alive());
    assert!(!gateway.lines().iter().any(|line| line.to_string().contains("panicked")));
}

fn run(dir: &std::path::Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.env_clear().current_dir(dir).args(arguments).stdin(Stdio::null());
    command.output().expect("it runs")
}

#[test]
fn a_start_that_fails_says_why() {
    let dir = tempfile::tempdir().expect("a directory");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("its address");
    let model = "models: [{ name: m, providers: [{ type: simulated }] }]\n";
    let files = [
        ("bad.yml", "serverr: {}\nmodels: []\nauth: maybe\n".to_owned()),
        (
            "taken.yml",
            format!("auth: optional\nserver: {{ listen: '{address}', admin: '127.0.0.2:0' }}\n{model}"),
        ),
    ];
    for (name, text) in &files {
        std::fs::write(dir.path().join(name), text).expect("written");
    }
    for (arguments, code, parts) in [
        (
            &["serve", "-c", "bad.yml"][..],
            78,
            &["bad.yml:1:1", "serverr", "server", "bad.yml:3:7", "maybe"][..],
        ),
        (&["serve", "-c", "missing.yml"], 78, &["missing.yml", "tollgate demo"]),
        (&["serve", "-c", "taken.yml"], 69, &[&address.to_string()]),
        (&["serve"], 78, &["tollgate demo"]),
        (&["serv"], 2, &["serve"]),
        (&["serve", "--wach"], 2, &["--watch"]),
    ] {
        let output = run(dir.path(), arguments);
        let said = String::from_utf8(output.stderr).expect("UTF-8");
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{arguments:?}");
        for part in parts {
            assert!(said.contains(part), "{arguments:?}: {part}: {said}");
        }
    }
}

#[tokio::test]
async fn metrics_are_called_as_the_configuration_says() {
    let models = "models: [{ name: chat, providers: [{ type: simulated }] }]\nauth: optional\n";
    // An underscore follows, whether it is written or not.
    for prefix in ["acme", "acme_"] {
        let gateway = Tollgate::start(&format!("{models}telemetry: {{ metrics_prefix: {prefix} }}\n")).await;
        let text = gateway.metrics().await.0;
        let mut names = text.lines().filter(|line| !line.starts_with('#'));
        let named = |line: &str| line.starts_with("acme_") || line.starts_with("process_");
        assert!(names.all(named), "{text}");
        for name in ["\nacme_build_info{", "\nacme_rate_limit_degraded 0", "\nprocess_threads "] {
            assert!(text.contains(name), "no {name:?}:\n{text}");
        }
        gateway.configure("", models);
        gateway.signal(rustix::process::Signal::HUP);
        gateway
            .logged(|line| {
                line["message"] == "telemetry.metrics_prefix takes effect at the next start"
                    && (&line["was"], &line["is"]) == (&"acme".into(), &"tollgate".into())
            })
            .await;
    }
}
