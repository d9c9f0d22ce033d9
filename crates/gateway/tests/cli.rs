//! The verbs that ask and print: what they say, where, and how they exit.

mod support;

use std::process::{Command, Output};

use serde_json::Value;
use support::{Provider, Redis, Tollgate, chat_config, json_answer, openai, refusing};

/// Runs the binary with nothing in its environment and no file in its way.
async fn run(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let folder = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(arguments).current_dir(folder.path()).env_clear().envs(environment.iter().copied());
    let ran = tokio::task::spawn_blocking(move || command.output()).await;
    drop(folder);
    ran.expect("no panic").expect("the binary runs")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

fn file(config: &str) -> tempfile::NamedTempFile {
    let file = tempfile::Builder::new().suffix(".yml").tempfile().expect("a file");
    std::fs::write(file.path(), config).expect("it can be written");
    file
}

#[tokio::test]
async fn version_schema_and_completions_are_printed() {
    let version = run(&["version"], &[]).await;
    assert_eq!(text(&version.stdout), concat!("tollgate ", env!("CARGO_PKG_VERSION"), "\n"));
    let schema: Value = serde_json::from_slice(&run(&["schema", "config"], &[]).await.stdout).expect("JSON");
    assert!(schema["properties"]["models"].is_object(), "{schema}");
    let api: Value = serde_json::from_slice(&run(&["schema", "admin"], &[]).await.stdout).expect("JSON");
    assert!(api["paths"]["/admin/keys/{id}"]["patch"].is_object(), "{api}");
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&["completions", shell], &[]).await;
        assert!(script.status.success() && text(&script.stdout).contains("tollgate"), "{shell}");
    }
}

#[tokio::test]
async fn wrong_usage_is_2_and_says_what_is_right() {
    for arguments in [&["serv"][..], &["serve", "--wach"], &["demo", "hit", "--times", "0"]] {
        let ran = run(arguments, &[]).await;
        assert_eq!(ran.status.code(), Some(2), "{arguments:?}");
        assert!(!ran.stderr.is_empty() && ran.stdout.is_empty(), "{arguments:?}");
    }
}

#[tokio::test]
async fn nothing_to_serve_names_the_demo() {
    let ran = run(&["serve"], &[]).await;
    assert_eq!(ran.status.code(), Some(78));
    assert!(text(&ran.stderr).contains("tollgate demo"), "{}", text(&ran.stderr));
}

#[tokio::test]
async fn check_says_all_faults_with_their_places() {
    let file = file("servr: {}\nmodels: []\ntiers: { free: [\"1/fortnight\"] }\n");
    let path = file.path().to_str().expect("UTF-8");
    let ran = run(&["check", path], &[]).await;
    assert_eq!(ran.status.code(), Some(1));
    let said = text(&ran.stdout);
    for part in [":1:1: servr: unknown key; did you mean `server`?", ":2:9: models", ":3:17: tiers.free[0]"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    let json: Value =
        serde_json::from_slice(&run(&["check", path, "--json"], &[]).await.stdout).expect("JSON");
    assert_eq!((&json["ok"], &json["problems"][0]["line"]), (&Value::Bool(false), &1.into()));
}

#[tokio::test]
async fn check_reaches_providers_unless_told_not_to() {
    let there = Provider::answering(json_answer("200 OK", "", r#"{"data":[]}"#)).await;
    let locked = Provider::answering(json_answer("401 Unauthorized", "", "{}")).await;
    let (_socket, gone) = refusing();
    let gone = format!("type: openai, url: 'http://{gone}'");
    for (provider, expected) in [(openai(&there), 0), (openai(&locked), 1), (gone, 69)] {
        let file = file(&chat_config(&[provider]));
        let path = file.path().to_str().expect("UTF-8");
        let ran = run(&["check", path], &[]).await;
        assert_eq!(ran.status.code(), Some(expected), "{}", text(&ran.stdout));
        // The variable is the default; a file that is named wins.
        let offline = run(&["check", path, "--offline"], &[("TOLLGATE_CONFIG", "/nowhere.yml")]).await;
        assert_eq!(offline.status.code(), Some(0), "{}", text(&offline.stdout));
    }
    let asked = there.requests();
    assert!(asked[0].head.starts_with("GET /v1/models "), "{}", asked[0].head);
    assert_eq!(asked[0].header("authorization"), Some("Bearer sk-upstream"));
}

#[tokio::test]
async fn check_reaches_redis_unless_told_not_to() {
    let redis = Redis::start_with(&["--requirepass", "s3cr3t"]);
    let models = "auth: optional\nmodels: [{ name: m, providers: [{ type: simulated }] }]\n";
    let config = |url: &str| file(&format!("dependencies: {{ redis: {{ url: '{url}' }} }}\n{models}"));
    let with_password = config(&format!("redis://:s3cr3t@{}/3", redis.address()));
    let path = with_password.path().to_str().expect("UTF-8");
    let ran = run(&["check", path], &[]).await;
    let (said, address) = (text(&ran.stdout), format!("redis://{}/3", redis.address()));
    assert_eq!(ran.status.code(), Some(0), "{said}");
    assert!(said.contains(&format!("redis {address}: reachable")) && !said.contains("s3cr3t"), "{said}");

    let (_socket, gone) = refusing();
    let gone = config(&format!("redis://:s3cr3t@{gone}"));
    let path = gone.path().to_str().expect("UTF-8");
    // Somebody's variable is no reason to refuse a file that says where its Redis is.
    let away = run(&["check", path, "--json"], &[("REDIS_URL", "redis://127.0.0.1:1")]).await;
    let offline = run(&["check", path, "--offline"], &[]).await;
    assert_eq!((away.status.code(), offline.status.code()), (Some(69), Some(0)));
    let report: Value = serde_json::from_slice(&away.stdout).expect("JSON");
    assert!(report["redis"]["problem"].as_str().is_some_and(|why| why.contains("no connection")), "{report}");
    assert!(
        report["problems"][0]["message"].as_str().is_some_and(|said| said.contains("no effect")),
        "{report}"
    );
    assert!(!report.to_string().contains("s3cr3t"), "{report}");
    assert_eq!(Redis::start().cli(&["PING"]), "PONG");
}

#[tokio::test]
async fn check_says_every_rule_in_words() {
    let config = "auth: optional\nlimits:\n  - { name: t, per: ip, limit: [10k tokens/minute, 4 concurrent] }\n  \
                  - { name: m, per: ip, limit: $5/month, shadow: true }\n  - { name: v, match: { endpoint: /v1/videos }, deny: true }\n  \
                  - { name: u, per: ip, limit: unlimited }\nmodels: [{ name: m, providers: [{ type: simulated, price: { input: 1, output: 1 } }] }]\n";
    let file = file(config);
    let path = file.path().to_str().expect("UTF-8");
    let said = text(&run(&["check", path, "--offline"], &[]).await.stdout);
    for line in [
        "limit t-tokens-minute: per ip, at most 10000 tokens per minute window, at most 20000 in any 60 s\n",
        "limit t-concurrency: per ip, at most 4 in flight at any moment\n",
        "limit m-cost-month: per ip, at most $5 per calendar month (UTC), at most $10 in any 28 days (shadow: counted",
        "rule v: refuses every request it matches\n",
        "rule u: unlimited\n",
        "ok: 0 errors, 0 warnings",
    ] {
        assert!(said.contains(line), "{line} in {said}");
    }
    let json = run(&["check", path, "--offline", "--json"], &[]).await;
    let report: Value = serde_json::from_slice(&json.stdout).expect("JSON");
    assert_eq!((&report["denies"][0], &report["redis"]), (&"v".into(), &Value::Null));
    assert_eq!(
        (&report["limits"][2]["unit"], &report["limits"][2]["shadow"]),
        (&"cost".into(), &true.into())
    );
}

#[tokio::test]
async fn check_prints_what_each_limit_promises_and_no_secret() {
    let config = "tiers: { free: [60/minute] }\nusers: [{ name: bob, tier: free, keys: [sk-canary] }]\n\
                  models: [{ name: m, providers: [{ type: simulated }] }]\n";
    let file = file(config);
    let path = file.path().to_str().expect("UTF-8");
    let ran = run(&["check", path, "--offline", "--show-effective"], &[]).await;
    let said = text(&ran.stdout);
    assert!(said.contains("limit free-requests-minute: per user,model, at most 60 per minute"), "{said}");
    assert!(said.contains("at most 120 in any 60 s"), "{said}");
    assert!(said.contains("\"listen\": \"0.0.0.0:8080\"") && !said.contains("sk-canary"), "{said}");
}

#[tokio::test]
async fn health_is_yes_no_or_not_there() {
    let provider = Provider::answering(Vec::new()).await;
    let mut gateway = Tollgate::start(&chat_config(&[openai(&provider)])).await;
    let url = format!("http://{}", gateway.admin);
    let asked = run(&["health"], &[("TOLLGATE_URL", &url)]).await;
    assert_eq!((asked.status.code(), text(&asked.stdout)), (Some(0), "ok\n".into()));
    gateway.sigterm();
    gateway.logged(|line| line["message"].as_str().is_some_and(|said| said.starts_with("ending"))).await;
    assert_eq!(run(&["health", "--url", &url], &[]).await.status.code(), Some(1));
    gateway.sigterm();
    gateway.ended(support::SOON).await;
    assert_eq!(run(&["health", "--url", &url], &[]).await.status.code(), Some(69));
}
