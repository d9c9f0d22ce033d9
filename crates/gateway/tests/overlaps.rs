//! No request can meet more limits than a store decides about together, whoever sets them: the file, operators, keys.

mod support;

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Redis, Response, Tollgate, post, question, request, soon};

async fn admin(gateway: &Tollgate, method: &str, path: &str, body: Value) -> Response {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    post(gateway.admin, &request(method, path, &[], body.as_bytes())).await
}

/// The same, which must be answered with this status.
async fn done(gateway: &Tollgate, method: &str, path: &str, body: Value, status: u16) -> Value {
    let answer = admin(gateway, method, path, body).await;
    assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
    if answer.body.is_empty() { Value::Null } else { answer.json() }
}

/// The same, which must be refused because of one field, naming the rules that would be met.
async fn too_many(gateway: &Tollgate, method: &str, path: &str, body: Value, field: &str, said: &[&str]) {
    let problem = done(gateway, method, path, body, 422).await;
    assert_eq!(problem["errors"][0]["field"], field, "{problem}");
    let detail = problem["errors"][0]["detail"].as_str().expect("a detail");
    for part in said {
        assert!(detail.contains(part), "no {part} in {detail}");
    }
}

async fn chat(gateway: &Tollgate, key: &str) -> u16 {
    let bearer = format!("Bearer {key}");
    let body = question(false);
    let ask = request("POST", "/v1/chat/completions", &[("Authorization", &*bearer)], body.as_bytes());
    post(gateway.data, &ask).await.status
}

/// `count` limits of a rule, each of another window.
fn limits(count: usize) -> Vec<String> {
    (1..=count).map(|hours| format!("100000/{hours} hours")).collect()
}

/// Rules `one` for everybody and `few` for tier `few`, with so many limits each; alice and carol are in no tier.
fn config(one: usize, few: usize, more: &str) -> String {
    format!(
        "users: [{{ name: alice, keys: [sk-alice] }}, {{ name: carol, tier: few, keys: [sk-carol] }}]\n\
         tiers: {{ few: {{ per: user, limit: {:?} }} }}\nlimits: [{{ name: one, per: user, limit: {:?} }}]\n\
         models: [{{ name: chat, providers: [{{ type: simulated }}] }}]\n{more}\n",
        limits(few),
        limits(one)
    )
}

fn rule(count: usize) -> Value {
    json!({ "per": "user", "limit": limits(count) })
}

async fn writes_are_refused(store: &str) {
    let gateway = Tollgate::start(&config(10, 3, store)).await;
    done(&gateway, "PUT", "/admin/limits/two", rule(3), 200).await;
    // Carol meets all sixteen; nobody may meet more.
    let named = ["user `carol` can meet 17 limits", "few, one, three, two", "at most 16"];
    too_many(&gateway, "PUT", "/admin/limits/three", rule(1), "limit", &named).await;
    too_many(&gateway, "PUT", "/admin/limits/three?dry_run=true", rule(1), "limit", &named).await;
    let per_route = json!({ "endpoint": "/v1/rerank", "requests": 1, "window": 60 });
    too_many(&gateway, "PUT", "/admin/rate-limit/config", per_route, "endpoint", &["17 limits"]).await;
    let of_alice = json!({ "match": { "user": "alice" }, "per": "user", "limit": limits(3) });
    done(&gateway, "PUT", "/admin/limits/three", of_alice, 200).await;

    // Keys, by what they have of their own and by whose they are.
    let own = json!({ "user": "carol", "limits": ["1/day"] });
    too_many(&gateway, "POST", "/admin/keys", own, "limits", &["17 limits", "1 of the key itself"]).await;
    let made = done(&gateway, "POST", "/admin/keys", json!({ "limits": ["9000/day"] }), 201).await;
    let path = format!("/admin/keys/{}", made["id"].as_str().expect("an id"));
    too_many(&gateway, "PATCH", &path, json!({ "tier": "few" }), "limits", &["17 limits"]).await;
    too_many(&gateway, "PATCH", &path, json!({ "limits": limits(4) }), "limits", &["17 limits"]).await;
    done(&gateway, "PATCH", &path, json!({ "limits": limits(3) }), 200).await;
    let import = json!({ "keys": [{ "hash": format!("sha256:{:064x}", 1), "user": "carol" },
                                  { "hash": format!("sha256:ab{:062x}", 1), "tier": "few", "limits": ["1/day"] }] });
    too_many(&gateway, "POST", "/admin/keys/import", import, "keys[1].limits", &["17 limits"]).await;
    done(&gateway, "POST", "/admin/users", json!({ "name": "bob" }), 201).await;
    done(&gateway, "POST", "/admin/keys", json!({ "user": "bob", "limits": ["9000/day"] }), 201).await;
    too_many(&gateway, "PATCH", "/admin/users/bob", json!({ "tier": "few" }), "tier", &["17 limits"]).await;

    // A rule that takes the place of a larger one can neither be taken away nor end when that leaves no room.
    done(&gateway, "PUT", "/admin/limits/one", rule(7), 200).await;
    done(&gateway, "PUT", "/admin/limits/two", rule(5), 200).await;
    too_many(&gateway, "DELETE", "/admin/limits/one", Value::Null, "name", &["18 limits"]).await;
    let mut for_a_while = rule(7);
    for_a_while["expires_in"] = "1h".into();
    too_many(&gateway, "PUT", "/admin/limits/one", for_a_while, "limit", &["18 limits"]).await;
    let secret = made["key"].as_str().expect("a key");
    for key in ["sk-alice", "sk-carol", secret] {
        assert_eq!(chat(&gateway, key).await, 200, "{key}");
    }

    // So can a file not be taken that would be too much.
    gateway.configure("", &config(10, 5, store));
    let refused = admin(&gateway, "POST", "/admin/config/reload", Value::Null).await;
    assert_eq!(refused.status, 422, "{}", refused.text());
    assert!(refused.text().contains("with the limits and keys of the admin API"), "{}", refused.text());
    let refused = gateway.reload().await;
    assert!(refused["message"].as_str().expect("text").contains("can meet 17 limits"), "{refused}");
    assert_eq!(chat(&gateway, "sk-carol").await, 200);
    gateway.configure("", &config(10, 4, store));
    done(&gateway, "POST", "/admin/config/reload", Value::Null, 200).await;
    assert_eq!(chat(&gateway, "sk-carol").await, 200);
}

#[tokio::test]
async fn writes_that_would_be_one_too_many_are_refused_in_memory() {
    writes_are_refused("settings: { state: none }").await;
}

#[tokio::test]
async fn writes_that_would_be_one_too_many_are_refused_on_redis() {
    let redis = Redis::start();
    let store = format!(
        "dependencies: {{ redis: {{ url: '{}', timeout: 1s }} }}\nsettings: {{ state: none }}",
        redis.url()
    );
    writes_are_refused(&store).await;
}

/// A file that was changed while nothing ran: it starts, without the newest rules that are too many.
#[tokio::test]
async fn what_is_too_much_at_the_start_is_put_aside() {
    let folder = tempfile::tempdir().expect("a folder");
    let store = |path: &Path| format!("settings: {{ state: {} }}", path.join("kept.state").display());
    let store = store(folder.path());
    let first = Tollgate::start(&config(10, 1, &store)).await;
    for (name, count) in [("old", 2), ("new", 2), ("free", 1)] {
        done(&first, "PUT", &format!("/admin/limits/{name}"), rule(count), 200).await;
    }
    drop(first);
    let gateway = Tollgate::start(&config(12, 1, &store)).await;
    let line = gateway.logged(|line| line["message"] == "a limit of the admin API is put aside").await;
    assert_eq!((&line["rule"], &line["level"]), (&json!("free"), &json!("ERROR")));
    let also =
        |line: &Value| line["message"] == "a limit of the admin API is put aside" && line["rule"] == "new";
    gateway.logged(also).await;
    let listed = done(&gateway, "GET", "/admin/limits", Value::Null, 200).await;
    let aside = |name: &str| {
        let of = listed["data"].as_array().expect("rules").iter().find(|rule| rule["name"] == name);
        of.unwrap_or_else(|| panic!("no {name}: {listed}"))["aside"].clone()
    };
    assert!(aside("new")["why"].as_str().expect("why").contains("can meet 17 limits"), "{listed}");
    assert_eq!((&aside("old"), &aside("one"), &aside("few")), (&Value::Null, &Value::Null, &Value::Null));
    let shown = done(&gateway, "GET", "/admin/limits/free", Value::Null, 200).await;
    assert_eq!(shown["aside"]["rule"]["per"], "user", "{shown}");
    assert_eq!(chat(&gateway, "sk-carol").await, 200);
    // There is room again as soon as something is given up.
    done(&gateway, "PUT", "/admin/limits/old", rule(1), 200).await;
    done(&gateway, "DELETE", "/admin/limits/old", Value::Null, 204).await;
    soon("room", async {
        while !done(&gateway, "GET", "/admin/limits/new", Value::Null, 200).await["aside"].is_null() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}
