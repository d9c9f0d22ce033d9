//! What operators made of limits, who and when, and the way back: on both stores, over restarts, after a deletion.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Redis, Response, Tollgate, post, request};

async fn ask(
    gateway: &Tollgate,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Value,
) -> Response {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let headers = [&[("X-Admin-Key", "key-of-olga")], headers].concat();
    post(gateway.admin, &request(method, path, &headers, body.as_bytes())).await
}

/// The same, which must be answered with this status.
async fn done(gateway: &Tollgate, method: &str, path: &str, body: Value, status: u16) -> Value {
    let answer = ask(gateway, method, path, &[], body).await;
    assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
    if answer.body.is_empty() { Value::Null } else { answer.json() }
}

async fn start(store: &str) -> Tollgate {
    let config = format!(
        "users: [{{ name: alice, keys: [sk-alice] }}]\nlimits: [{{ name: all, per: user, limit: 100/day }}]\n\
         models: [{{ name: chat, providers: [{{ type: simulated }}] }}]\n{store}\n"
    );
    let server = "  admin_keys:\n    - { name: olga, key: key-of-olga, role: operator }\n    \
                  - { name: view, key: key-of-view, role: viewer }\n";
    Tollgate::start_with(server, &config, &[]).await
}

/// Number, action, and the quotas before and after, of each version, the latest first.
async fn versions(gateway: &Tollgate, name: &str) -> Vec<(u64, String, Value, Value)> {
    let list = done(gateway, "GET", &format!("/admin/limits/{name}/history"), Value::Null, 200).await;
    let row = |version: &Value| {
        assert_eq!((&version["actor"], &version["address"]), (&json!("olga"), &json!("127.0.0.1")));
        assert!(version["time"].as_str().is_some_and(|time| time.ends_with('Z')), "{version}");
        let quota = |side: &str| version[side]["rule"]["limit"].clone();
        let number = version["version"].as_u64().expect("a number");
        (number, version["action"].as_str().expect("a text").to_owned(), quota("before"), quota("after"))
    };
    list["data"].as_array().expect("versions").iter().map(row).collect()
}

async fn quota(gateway: &Tollgate, name: &str) -> Value {
    let rule = done(gateway, "GET", &format!("/admin/limits/{name}"), Value::Null, 200).await;
    rule["limits"][0]["quota"].clone()
}

/// Changes limits on one gateway; gives back the number of the version that set 20 a day.
async fn there_and_back(gateway: &Tollgate) -> u64 {
    assert!(versions(gateway, "all").await.is_empty(), "the file's has none");
    for limit in ["10/day", "20/day", "30/day"] {
        done(gateway, "PUT", "/admin/limits/all", json!({ "limit": limit }), 200).await;
    }
    let told = versions(gateway, "all").await;
    let quotas: Vec<_> = told.iter().map(|(_, action, was, is)| (action.as_str(), was, is)).collect();
    let [ten, twenty, thirty] = ["10/day", "20/day", "30/day"].map(Value::from);
    assert_eq!(
        quotas,
        [("put", &twenty, &thirty), ("put", &ten, &twenty), ("put", &Value::Null, &ten)],
        "the latest first"
    );
    let (first, second) = (told[2].0, told[1].0);
    let back = |version: u64| json!({ "version": version });
    let path = "/admin/limits/all/rollback";

    done(gateway, "POST", &format!("{path}?dry_run=true"), back(second), 200).await;
    assert_eq!((quota(gateway, "all").await, versions(gateway, "all").await.len()), (thirty.clone(), 3));
    let stale = ask(gateway, "POST", path, &[("If-Match", &format!("\"{second}\""))], back(first)).await;
    assert_eq!(stale.status, 412, "{}", stale.text());
    let current = ask(gateway, "GET", "/admin/limits/all", &[], Value::Null).await;
    let etag = current.header("etag").expect("an etag").to_owned();
    let made = ask(gateway, "POST", path, &[("If-Match", &etag)], back(first)).await;
    assert_eq!(made.status, 200, "{}", made.text());
    let said = made.json();
    assert_eq!((&said["rolled_back_to"], &said["rule"]["limits"][0]["quota"]), (&json!(first), &ten));
    assert_eq!(made.header("etag"), Some(&*format!("\"{}\"", said["version"])));
    assert_eq!(quota(gateway, "all").await, ten);

    // Also after it was deleted; and to the deletion, where the file's holds.
    done(gateway, "DELETE", "/admin/limits/all", Value::Null, 204).await;
    assert_eq!(quota(gateway, "all").await, "100/day");
    let deleted = versions(gateway, "all").await[0].clone();
    assert_eq!((&*deleted.1, &deleted.2, &deleted.3), ("delete", &ten, &Value::Null));
    done(gateway, "POST", path, back(deleted.0), 409).await;
    done(gateway, "POST", path, back(second), 200).await;
    assert_eq!(quota(gateway, "all").await, twenty);
    let said = done(gateway, "POST", path, back(deleted.0), 200).await;
    assert_eq!(said["rule"]["source"], "file", "{said}");
    done(gateway, "POST", path, back(second), 200).await;

    // The fixed endpoint's, whose name has slashes; with and without percent-encoding.
    let set = json!({ "endpoint": "/v1/rerank", "requests": 5, "window": 60 });
    done(gateway, "PUT", "/admin/rate-limit/config", set, 200).await;
    assert_eq!(versions(gateway, "endpoint:/v1/rerank").await.len(), 1);
    assert_eq!(versions(gateway, "endpoint%3A%2Fv1%2Frerank").await.len(), 1);

    let audit = done(gateway, "GET", "/admin/audit", Value::Null, 200).await;
    let rollback =
        audit["data"].as_array().expect("records").iter().find(|note| note["action"] == "limits.rollback");
    assert_eq!(rollback.expect("in the audit")["after"]["spec"]["limit"], "20/day");
    second
}

#[tokio::test]
async fn a_limit_is_rolled_back_and_its_history_survives_a_restart() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = format!("settings: {{ state: {} }}", folder.path().join("kept.state").display());
    let mut gateway = start(&store).await;
    let second = there_and_back(&gateway).await;
    let told = versions(&gateway, "all").await;
    gateway.signal(rustix::process::Signal::KILL);
    gateway.ended(support::SOON).await;
    let gateway = start(&store).await;
    assert_eq!(versions(&gateway, "all").await, told);
    done(&gateway, "PUT", "/admin/limits/all", json!({ "limit": "9/day" }), 200).await;
    done(&gateway, "POST", "/admin/limits/all/rollback", json!({ "version": second }), 200).await;
    assert_eq!(quota(&gateway, "all").await, "20/day");
}

#[tokio::test]
async fn a_limit_is_rolled_back_on_another_instance() {
    let redis = Redis::start();
    let store = format!(
        "dependencies: {{ redis: {{ url: '{}', timeout: 1s }} }}\nsettings: {{ state: none }}",
        redis.url()
    );
    let (one, other) = (start(&store).await, start(&store).await);
    let second = there_and_back(&one).await;
    let told = versions(&one, "all").await;
    let started = Instant::now();
    while versions(&other, "all").await != told || versions(&other, "endpoint:/v1/rerank").await.is_empty() {
        assert!(started.elapsed() < Duration::from_secs(1), "it is not known everywhere");
        // Polling is the only way to see it; the pause only spares the processor.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    done(&other, "PUT", "/admin/limits/all", json!({ "limit": "9/day" }), 200).await;
    done(&other, "POST", "/admin/limits/all/rollback", json!({ "version": second }), 200).await;
    assert_eq!(quota(&other, "all").await, "20/day");
}

#[tokio::test]
async fn what_is_wrong_with_a_rollback_is_said() {
    let gateway = start("settings: { state: none }").await;
    done(&gateway, "PUT", "/admin/limits/all", json!({ "limit": "1/day", "expires_in": "1s" }), 200).await;
    let version = versions(&gateway, "all").await[0].0;
    let path = "/admin/limits/all/rollback";
    for (path, body, status) in [
        (path, json!({}), 422),
        (path, json!({ "version": "1" }), 422),
        (path, json!({ "version": version + 1 }), 422),
        (path, json!({ "version": version, "verison": 1 }), 422),
        ("/admin/limits/none/rollback", json!({ "version": 1 }), 404),
        ("/admin/limits/all", json!({ "version": 1 }), 405),
    ] {
        done(&gateway, "POST", path, body, status).await;
    }
    done(&gateway, "GET", "/admin/limits/none/history", Value::Null, 404).await;
    done(&gateway, "GET", "/admin/limits/all/history?cursor=eA", Value::Null, 422).await;
    let named = json!({ "per": "user", "limit": "1/day" });
    done(&gateway, "PUT", "/admin/limits/endpoint:/v1/x/history", named, 422).await;
    // What was to end has ended.
    let started = Instant::now();
    while quota(&gateway, "all").await != "100/day" {
        assert!(started.elapsed() < support::SOON, "it does not end");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let problem = done(&gateway, "POST", path, json!({ "version": version }), 422).await;
    assert!(problem["detail"].as_str().expect("text").contains("was to end at"), "{problem}");
    // It is the file's again: there is nothing of operators to take away, and its version is the one that is shown.
    done(&gateway, "DELETE", "/admin/limits/all", Value::Null, 409).await;
    let shown = ask(&gateway, "GET", "/admin/limits/all", &[], Value::Null).await;
    let etag = shown.header("etag").expect("an etag").to_owned();
    let path_of_all = "/admin/limits/all?dry_run=true";
    for (etag, status) in [(&*etag, 200), (&*format!("\"{version}\""), 412)] {
        let put = ask(&gateway, "PUT", path_of_all, &[("If-Match", etag)], json!({ "limit": "2/day" })).await;
        assert_eq!(put.status, status, "{etag}: {}", put.text());
    }
    let viewer = [("X-Admin-Key", "key-of-view")];
    let look = post(gateway.admin, &request("GET", "/admin/limits/all/history", &viewer, b"")).await;
    let change = post(gateway.admin, &request("POST", path, &viewer, br#"{"version":1}"#)).await;
    assert_eq!((look.status, change.status), (200, 403));
}

/// A history is of the last versions only, and paged.
#[tokio::test]
async fn a_history_is_bounded() {
    let gateway = start("settings: { state: none }").await;
    for number in 1..=60 {
        done(&gateway, "PUT", "/admin/limits/all", json!({ "limit": format!("{number}/day") }), 200).await;
    }
    let told = versions(&gateway, "all").await;
    assert_eq!((told.len(), &told[49].2, &told[49].3), (50, &json!("10/day"), &json!("11/day")));
    let (mut seen, mut cursor) = (0, String::new());
    loop {
        let path = format!("/admin/limits/all/history?limit=20&cursor={cursor}");
        let page = done(&gateway, "GET", &path, Value::Null, 200).await;
        seen += page["data"].as_array().expect("versions").len();
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen, 50);
    // Large versions crowd out others, but the latest stays whatever its size.
    let teams: Vec<String> = (0..700).map(|n| format!("{}{n}", "x".repeat(100))).collect();
    let large = json!({ "per": "user", "limit": "1/day", "match": { "team": teams } });
    for _ in 0..3 {
        done(&gateway, "PUT", "/admin/limits/large", large.clone(), 200).await;
    }
    assert_eq!(versions(&gateway, "large").await.len(), 1);
}
