//! Control data: what operators change is in force everywhere within a second, is durable, and survives restarts.

mod support;

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};
use support::{Provider, Redis, Response, Tollgate, json_answer, post, question, request, soon};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;
/// A change must be in force everywhere within this time.
const EVERYWHERE: Duration = Duration::from_secs(1);

/// Sends a request to the admin API.
async fn admin(gateway: &Tollgate, method: &str, path: &str, body: Value) -> Response {
    admin_with(gateway, method, path, &[], body).await
}

async fn admin_with(
    gateway: &Tollgate,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: Value,
) -> Response {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    post(gateway.admin, &request(method, path, headers, body.as_bytes())).await
}

/// The same, which must be answered with this status.
async fn done(gateway: &Tollgate, method: &str, path: &str, body: Value, status: u16) -> Value {
    let answer = admin(gateway, method, path, body).await;
    assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
    if answer.body.is_empty() { Value::Null } else { answer.json() }
}

/// A chat request with a key; its status and code.
async fn chat(address: SocketAddr, key: &str) -> (u16, Value) {
    let bearer = format!("Bearer {key}");
    let headers = [("Authorization", bearer.as_str())];
    let answer =
        post(address, &request("POST", "/v1/chat/completions", &headers, question(false).as_bytes())).await;
    let code = if answer.status == 200 { Value::Null } else { answer.code() };
    (answer.status, code)
}

/// Waits until requests with a key are answered so, a second at most.
async fn becomes(gateway: &Tollgate, key: &str, status: u16, code: &str) {
    let started = Instant::now();
    loop {
        let (now, why) = chat(gateway.data, key).await;
        if now == status && (status == 200 || why == code) {
            return;
        }
        assert!(started.elapsed() < EVERYWHERE, "still {now} {why}, not {status} {code}");
        // Polling is the only way to see a change arrive; the pause only spares the processor.
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn config(provider: &Provider, more: &str) -> String {
    let url = provider.address;
    format!(
        "users:\n  - {{ name: alice, team: red, tier: free, keys: [sk-alice] }}\ntiers: {{ free: [100/day], \
         pro: [1000/day] }}\nmodels:\n  - {{ name: chat, aliases: [gpt-4o-mini], providers: [{{ type: openai, \
         url: 'http://{url}' }}] }}\n  - {{ name: other, providers: [{{ type: simulated }}] }}\n{more}\n"
    )
}

async fn provider() -> Provider {
    Provider::answering(json_answer("200 OK", "", ANSWER)).await
}

fn with_redis(redis: &Redis, state: &str) -> String {
    format!(
        "dependencies: {{ redis: {{ url: '{}', timeout: 1s }} }}\nsettings: {{ state: {state} }}",
        redis.url()
    )
}

fn key_of(made: &Value) -> (String, String) {
    let text = |field: &str| made[field].as_str().unwrap_or_else(|| panic!("no {field}: {made}")).to_owned();
    (text("id"), text("key"))
}

#[tokio::test]
async fn the_life_of_a_key() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, "")).await;
    let wanted = json!({ "name": "laptop", "user": "alice", "models": ["gpt-4o-mini"], "limits": ["3/day"],
                         "metadata": { "cost-centre": "42" } });
    let made = done(&gateway, "POST", "/admin/keys?dry_run=true", wanted.clone(), 201).await;
    assert_eq!(chat(gateway.data, &key_of(&made).1).await.0, 401, "a dry run makes nothing");
    let answer = admin(&gateway, "POST", "/admin/keys", wanted).await;
    let (id, secret) = key_of(&answer.json());
    assert!(secret.starts_with(&format!("tg_{id}_")) && secret.len() == 61, "{secret}");
    assert_eq!(chat(gateway.data, &secret).await.0, 200, "in force where it was made when that is answered");

    // Shown once.
    let shown = admin(&gateway, "GET", &format!("/admin/keys/{id}"), Value::Null).await;
    assert!(!shown.text().contains(&secret) && !shown.text().contains("hash"), "{}", shown.text());
    assert_eq!(shown.json()["models"], json!(["chat"]), "resolved");
    assert_eq!(shown.json()["status"], "active");
    let etag = shown.header("etag").expect("an etag").to_owned();

    // Its limits are its own, and it may use what it may.
    assert_eq!(chat(gateway.data, &secret).await.0, 200);
    assert_eq!(chat(gateway.data, &secret).await.0, 200);
    assert_eq!(chat(gateway.data, &secret).await, (429, "rate_limit_exceeded".into()));
    let other = question(false).replace("\"chat\"", "\"other\"");
    let headers = [("Authorization", &*format!("Bearer {secret}"))];
    let refused =
        post(gateway.data, &request("POST", "/v1/chat/completions", &headers, other.as_bytes())).await;
    assert_eq!(refused.code(), "model_not_allowed");
    done(
        &gateway,
        "PATCH",
        &format!("/admin/keys/{id}"),
        json!({ "limits": ["5/day"], "models": null }),
        200,
    )
    .await;
    assert_eq!(chat(gateway.data, &secret).await.0, 200, "raised, and counted on");

    // What was decided on an old version is refused.
    let path = format!("/admin/keys/{id}/rotate");
    let stale = admin_with(&gateway, "POST", &path, &[("If-Match", &etag)], json!({ "overlap": "1h" })).await;
    assert_eq!(stale.status, 412, "{}", stale.text());
    let rotated = done(&gateway, "POST", &path, json!({ "overlap": "1h" }), 200).await;
    let (same, next) = key_of(&rotated);
    assert_eq!(same, id);
    assert_ne!(next, secret);
    // Both are one key: they count together, to the fifth and no further.
    assert_eq!(chat(gateway.data, &next).await.0, 200);
    assert_eq!(chat(gateway.data, &secret).await, (429, "rate_limit_exceeded".into()));
    let last = key_of(&done(&gateway, "POST", &path, json!({}), 200).await).1;
    assert_eq!(chat(gateway.data, &next).await, (401, "invalid_api_key".into()), "without overlap");
    assert_eq!(chat(gateway.data, &last).await.0, 429);

    let revoked = done(&gateway, "POST", &format!("/admin/keys/{id}/revoke"), Value::Null, 200).await;
    assert_eq!(revoked["status"], "revoked");
    assert_eq!(chat(gateway.data, &last).await, (401, "invalid_api_key".into()));
    done(&gateway, "DELETE", &format!("/admin/keys/{id}"), Value::Null, 204).await;
    done(&gateway, "GET", &format!("/admin/keys/{id}"), Value::Null, 404).await;
    for line in gateway.lines() {
        assert!(!line.to_string().contains(&secret), "a key in the log: {line}");
    }
}

#[tokio::test]
async fn junk_that_looks_like_a_key_is_no_key() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, "")).await;
    let (_, secret) = key_of(&done(&gateway, "POST", "/admin/keys", json!({}), 201).await);
    for wrong in
        ["tg_", "tg_12345678_x", &secret[..60], &format!("{}A", &secret[..60]), &secret.to_lowercase()]
    {
        if wrong != secret {
            assert_eq!(chat(gateway.data, wrong).await, (401, "invalid_api_key".into()), "{wrong}");
        }
    }
}

#[tokio::test]
async fn what_is_wrong_with_a_body_is_said_field_by_field() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, "")).await;
    for (method, path, body, fields) in [
        (
            "POST",
            "/admin/keys",
            json!({ "user": "bob", "tier": "gold", "limits": ["ten/day"], "models": ["nope"], "nmae": 1 }),
            &["user", "tier", "models[0]", "limits[0]", "nmae"][..],
        ),
        ("POST", "/admin/keys", json!({ "expires": "2001-01-01" }), &["expires"]),
        ("POST", "/admin/keys", json!({ "expires": "2999-01-01", "expires_in": "1h" }), &["expires_in"]),
        ("POST", "/admin/keys/import", json!({ "keys": [{ "hash": "sha256:12" }] }), &["keys[0].hash"]),
        ("POST", "/admin/users", json!({ "team": "" }), &["name", "team"]),
        ("POST", "/admin/bans", json!({ "subject": "ip:nowhere" }), &["subject", "reason"]),
        ("PUT", "/admin/limits/burst", json!({ "limit": "10/fortnight", "per": "moon" }), &["per", "limit"]),
        ("PUT", "/admin/limits/new", json!({}), &["limit", "per"]),
        (
            "PUT",
            "/admin/rate-limit/config",
            json!({ "endpoint": "/v1/nowhere", "requests": 0 }),
            &["endpoint", "requests", "window"],
        ),
        ("POST", "/admin/rate-limit/clear?key=moon:1", Value::Null, &["key"]),
        ("GET", "/admin/keys?limit=0", Value::Null, &["limit"]),
        ("GET", "/admin/keys?cursor=%21", Value::Null, &["cursor"]),
    ] {
        let answer = admin(&gateway, method, path, body).await;
        assert_eq!(answer.status, 422, "{method} {path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        let problem = answer.json();
        let named: Vec<&str> = problem["errors"]
            .as_array()
            .expect("errors")
            .iter()
            .filter_map(|e| e["field"].as_str())
            .collect();
        for field in fields {
            assert!(named.contains(field), "{method} {path}: {field} is not among {named:?}");
        }
    }
    for (method, path, body, status) in [
        ("GET", "/admin/keys/nobody", Value::Null, 404),
        ("GET", "/admin/nothing", Value::Null, 404),
        ("PUT", "/admin/keys", Value::Null, 405),
        ("POST", "/admin/keys", json!([1]), 400),
        ("POST", "/admin/users", json!({ "name": "alice" }), 409),
        ("DELETE", "/admin/limits/free", Value::Null, 409),
    ] {
        let answer = admin(&gateway, method, path, body).await;
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.text());
        assert_eq!(answer.header("content-type"), Some("application/problem+json"));
        assert_eq!(answer.json()["status"], status);
    }
}

#[tokio::test]
async fn bans_of_every_kind() {
    let provider = provider().await;
    let config = config(&provider, "");
    let gateway = Tollgate::start_with("  trusted_proxies: [127.0.0.0/8]\n", &config, &[]).await;
    let ask = async |ip: &str, key: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [("Authorization", &*bearer), ("X-Forwarded-For", ip), ("User-Agent", "a")];
        post(gateway.data, &request("POST", "/v1/chat/completions", &headers, b"not even JSON")).await
    };
    let made = key_of(&done(&gateway, "POST", "/admin/keys", json!({}), 201).await);
    let session = {
        use sha2::Digest;
        let digest: [u8; 32] = sha2::Sha256::digest("203.0.113.7\na").into();
        digest[..8].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    for (subject, met, not_met) in [
        ("ip:203.0.113.7".to_owned(), ("203.0.113.7", "sk-alice"), ("203.0.113.8", "sk-alice")),
        ("network:203.0.113.0/28".to_owned(), ("203.0.113.15", "sk-alice"), ("203.0.113.16", "sk-alice")),
        ("ip:2001:db8:1:2::3".to_owned(), ("2001:db8:1:2::4", "sk-alice"), ("2001:db8:1:3::3", "sk-alice")),
        (format!("api_key:{}", made.0), ("203.0.113.7", &made.1), ("203.0.113.7", "sk-alice")),
        ("user:alice".to_owned(), ("203.0.113.7", "sk-alice"), ("203.0.113.7", &made.1)),
        (format!("session:{session}"), ("203.0.113.7", "sk-alice"), ("203.0.113.8", "sk-alice")),
    ] {
        let wanted = json!({ "subject": subject, "reason": "too much of it", "expires_in": "1h" });
        let ban = done(&gateway, "POST", "/admin/bans", wanted, 201).await;
        let refused = ask(met.0, met.1).await;
        assert_eq!((refused.status, refused.code()), (403, "banned".into()), "{subject}");
        assert!(refused.message().contains("too much of it"), "{}", refused.message());
        assert_eq!(ask(not_met.0, not_met.1).await.status, 400, "{subject}: others are let in");
        let list = done(&gateway, "GET", "/admin/bans", Value::Null, 200).await;
        assert_eq!(list["data"].as_array().map(Vec::len), Some(1), "{list}");
        done(&gateway, "DELETE", &format!("/admin/bans/{}", ban["id"].as_str().unwrap()), Value::Null, 204)
            .await;
        assert_eq!(ask(met.0, met.1).await.status, 400, "{subject}: let in again");
    }
    let wanted = json!({ "subject": "user:alice", "reason": "a moment", "expires_in": "1s" });
    done(&gateway, "POST", "/admin/bans", wanted, 201).await;
    soon("the end of a ban", async {
        while chat(gateway.data, "sk-alice").await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn limits_over_the_file_and_back() {
    let provider = provider().await;
    let limits = "limits: [{ name: all, per: user, limit: 2/day }]";
    let gateway = Tollgate::start(&config(&provider, limits)).await;
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200);
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200);
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 429);
    let put = done(&gateway, "PUT", "/admin/limits/all", json!({ "limit": "3/day" }), 200).await;
    assert_eq!((&put["per"], &put["source"]), (&json!("user"), &json!("admin")), "the rest is the file's");
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200, "what was used counts on: the third");
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 429);
    // A reload keeps it, and it keeps what was reloaded.
    gateway.configure("", &config(&provider, "limits: [{ name: all, per: user, limit: 1/day }]"));
    done(&gateway, "POST", "/admin/config/reload", Value::Null, 200).await;
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 429);
    let listed = done(&gateway, "GET", "/admin/limits/all", Value::Null, 200).await;
    assert_eq!(listed["limits"][0]["quota"], "3/day", "{listed}");
    done(&gateway, "PUT", "/admin/limits/all", json!({ "limit": "1/day", "shadow": true }), 200).await;
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200, "a shadow refuses nobody");
    done(&gateway, "DELETE", "/admin/limits/all", Value::Null, 204).await;
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 429);
    // For a while: then the file's holds again.
    let for_a_while = json!({ "limit": "100/day", "expires_in": "1s" });
    done(&gateway, "PUT", "/admin/limits/all", for_a_while, 200).await;
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200);
    soon("the end of a limit", async {
        while chat(gateway.data, "sk-alice").await.0 != 429 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    // A bad file changes nothing and says why.
    gateway.configure("", "limits: [{}]");
    let refused = admin(&gateway, "POST", "/admin/config/reload", Value::Null).await;
    assert_eq!((refused.status, refused.header("content-type")), (422, Some("application/problem+json")));
    let checked = admin(&gateway, "POST", "/admin/config/check", json!("x")).await;
    assert_eq!((checked.status, &checked.json()["ok"]), (200, &json!(false)));
}

#[tokio::test]
async fn the_fixed_endpoints_set_and_clear() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, "")).await;
    let set = json!({ "endpoint": "/v1/chat/completions", "requests": 1, "window": 86400 });
    let answer = done(&gateway, "PUT", "/admin/rate-limit/config", set, 200).await;
    let expected = json!({ "status": "success", "message": "Rate limit configuration updated",
                           "endpoint": "/v1/chat/completions", "requests": 1, "window_seconds": 86400 });
    assert_eq!(answer, expected);
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200);
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 429);
    let key = "rate_limit:endpoint:/v1/chat/completions:127.0.0.1";
    let cleared =
        done(&gateway, "POST", &format!("/admin/rate-limit/clear?key={key}"), Value::Null, 200).await;
    let expected =
        json!({ "status": "success", "message": "Rate limit cleared", "key": key, "existed": true });
    assert_eq!(cleared, expected);
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200);
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 429);
    done(&gateway, "DELETE", "/admin/limits/endpoint:/v1/chat/completions", Value::Null, 204).await;
    assert_eq!(chat(gateway.data, "sk-alice").await.0, 200);
    let shown = done(&gateway, "GET", "/admin/config", Value::Null, 200).await;
    assert_eq!(shown["config"]["users"][0]["keys"][0], "***", "{shown}");
    assert_eq!(shown["origins"]["auth"], "default");
}

#[tokio::test]
async fn a_drained_provider_is_passed_over() {
    let (first, second) = (provider().await, provider().await);
    let models = format!(
        "auth: optional\nmodels:\n  - name: chat\n    providers: [{{ type: openai, url: 'http://{}' }}, \
         {{ type: openai, url: 'http://{}' }}]\n",
        first.address, second.address
    );
    let gateway = Tollgate::start(&models).await;
    let drain = |provider: &Provider| format!("/admin/models/chat/providers/{}/drain", provider.address);
    done(&gateway, "POST", &drain(&first), json!({ "reason": "maintenance" }), 200).await;
    let ask = request("POST", "/v1/chat/completions", &[], question(false).as_bytes());
    for _ in 0..4 {
        assert_eq!(post(gateway.data, &ask).await.status, 200);
    }
    assert_eq!((first.hits(), second.hits()), (0, 4));
    done(&gateway, "POST", &drain(&second), Value::Null, 200).await;
    assert_eq!(post(gateway.data, &ask).await.status, 502, "nobody is left");
    let models = done(&gateway, "GET", "/admin/models", Value::Null, 200).await;
    assert_eq!(models["data"][0]["providers"][0]["drained"], true);
    done(&gateway, "DELETE", &drain(&first), Value::Null, 204).await;
    assert_eq!(post(gateway.data, &ask).await.status, 200);
    assert_eq!((first.hits(), second.hits()), (1, 4));
    done(&gateway, "POST", "/admin/models/chat/providers/nobody/drain", Value::Null, 404).await;
}

#[tokio::test]
async fn users_imports_lists_and_the_audit() {
    let provider = provider().await;
    let gateway = Tollgate::start_with("  admin_key: s3cr3t-canary\n", &config(&provider, ""), &[]).await;
    let headers = [("X-Admin-Key", "s3cr3t-canary")];
    let ask = async |method: &str, path: &str, body: Value| {
        let answer = admin_with(&gateway, method, path, &headers, body).await;
        assert!(answer.status < 300, "{method} {path}: {}", answer.text());
        assert!(!answer.text().contains("s3cr3t-canary"));
        if answer.body.is_empty() { Value::Null } else { answer.json() }
    };
    assert_eq!(admin(&gateway, "GET", "/admin/keys", Value::Null).await.status, 401);
    ask("POST", "/admin/users", json!({ "name": "bob", "team": "blue", "models": ["chat"] })).await;
    let hash = {
        use sha2::Digest;
        let digest = sha2::Sha256::digest("sk-imported");
        digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let keys = json!({ "keys": [{ "hash": format!("sha256:{hash}"), "user": "bob", "name": "old" }] });
    let imported = ask("POST", "/admin/keys/import", keys.clone()).await;
    assert_eq!(imported["data"][0]["id"].as_str(), Some(&hash[..12]));
    assert_eq!(chat(gateway.data, "sk-imported").await.0, 200);
    let twice = admin_with(&gateway, "POST", "/admin/keys/import", &headers, keys).await;
    assert_eq!(twice.status, 422, "{}", twice.text());
    let held = admin_with(&gateway, "DELETE", "/admin/users/bob", &headers, Value::Null).await;
    assert_eq!(held.status, 409, "{}", held.text());
    ask("PATCH", "/admin/users/bob", json!({ "models": ["other"] })).await;
    assert_eq!(chat(gateway.data, "sk-imported").await, (403, "model_not_allowed".into()));

    for _ in 0..5 {
        ask("POST", "/admin/keys", json!({ "user": "bob" })).await;
    }
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = ask("GET", &format!("/admin/keys?user=bob&limit=4&cursor={cursor}"), Value::Null).await;
        let ids =
            page["data"].as_array().expect("a list").iter().map(|key| key["id"].as_str().unwrap().to_owned());
        seen.extend(ids);
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    let sorted: std::collections::BTreeSet<&String> = seen.iter().collect();
    assert_eq!((seen.len(), sorted.len()), (6, 6), "each once");
    let users = ask("GET", "/admin/users?limit=1", Value::Null).await;
    assert_eq!(users["data"][0]["name"], "alice");
    assert!(users["next_cursor"].is_string());

    let audit = ask("GET", "/admin/audit?limit=7", Value::Null).await;
    let entries = audit["data"].as_array().expect("a list");
    let actions: Vec<&str> = entries.iter().filter_map(|entry| entry["action"].as_str()).collect();
    assert_eq!(
        actions[..6],
        ["keys.create", "keys.create", "keys.create", "keys.create", "keys.create", "users.patch"]
    );
    assert_eq!(entries[5]["before"]["models"], json!(["chat"]));
    assert_eq!(entries[5]["after"]["models"], json!(["other"]));
    assert_eq!((&entries[5]["actor"], &entries[5]["address"]), (&json!("admin"), &json!("127.0.0.1")));
    assert!(!audit.to_string().contains(&hash), "no hash in the audit");
    let more =
        ask("GET", &format!("/admin/audit?cursor={}", audit["next_cursor"].as_str().unwrap()), Value::Null)
            .await;
    assert_eq!(more["data"].as_array().map(Vec::len), Some(1), "{more}");
}

/// The SHA-256 of a key, as files and imports have it, and its id.
fn hash_of(secret: &str) -> (String, String) {
    use sha2::Digest;
    let digest: String = sha2::Sha256::digest(secret).iter().map(|byte| format!("{byte:02x}")).collect();
    (format!("sha256:{digest}"), digest[..12].to_owned())
}

#[tokio::test]
async fn no_key_comes_to_the_id_of_another() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, "")).await;
    let (of_file, id_of_file) = hash_of("sk-alice");
    let (taken, id) = hash_of("sk-imported");
    let import = |hashes: &[&str]| {
        let keys: Vec<Value> = hashes.iter().map(|hash| json!({ "hash": hash, "user": "alice" })).collect();
        json!({ "keys": keys })
    };
    done(&gateway, "POST", "/admin/keys/import", import(&[&taken]), 201).await;
    // The same beginning, another end: the id of a key that is there, of one of the file, of another in the same import.
    let like = |id: &str, end: u8| format!("sha256:{id}{:052x}", end);
    let (fresh, _) = hash_of("sk-fresh");
    for (hashes, field) in [
        ([&fresh, &like(&id, 1)], "keys[1].hash"),
        ([&like(&id_of_file, 1), &fresh], "keys[0].hash"),
        ([&like("00112233aabb", 1), &like("00112233aabb", 2)], "keys[1].hash"),
        ([&of_file, &fresh], "keys[0].hash"),
    ] {
        let hashes: Vec<&str> = hashes.iter().map(|hash| hash.as_str()).collect();
        let problem = done(&gateway, "POST", "/admin/keys/import", import(&hashes), 422).await;
        assert_eq!(problem["errors"][0]["field"], field, "{problem}");
        assert_eq!(problem["errors"].as_array().map(Vec::len), Some(1), "{problem}");
    }
    let keys = done(&gateway, "GET", "/admin/keys", Value::Null, 200).await;
    assert_eq!(keys["data"].as_array().map(Vec::len), Some(1), "all or none: {keys}");
    assert_eq!(chat(gateway.data, "sk-fresh").await.0, 401);
    assert_eq!(chat(gateway.data, "sk-imported").await.0, 200);
}

/// A key that was taken in, and that the file has as well since: the file says what holds, but for one that is revoked.
#[tokio::test]
async fn a_key_of_the_file_that_operators_have_too() {
    let provider = provider().await;
    let gateway = Tollgate::start(&config(&provider, "")).await;
    let (hash, id) = hash_of("sk-both");
    let keys = json!({ "keys": [{ "hash": hash, "models": ["other"] }] });
    done(&gateway, "POST", "/admin/keys/import", keys, 201).await;
    assert_eq!(chat(gateway.data, "sk-both").await, (403, "model_not_allowed".into()));
    let with_both = config(&provider, "").replace("keys: [sk-alice]", "keys: [sk-alice, sk-both]");
    gateway.configure("", &with_both);
    done(&gateway, "POST", "/admin/config/reload", Value::Null, 200).await;
    gateway.logged(|line| line["level"] == "ERROR" && line["key"] == id).await;
    let shown = done(&gateway, "GET", &format!("/admin/keys/{id}"), Value::Null, 200).await;
    assert!(shown["displaced"].as_str().expect("what holds").contains("in the file"), "{shown}");
    assert_eq!(chat(gateway.data, "sk-both").await.0, 200);
    done(&gateway, "POST", &format!("/admin/keys/{id}/revoke"), Value::Null, 200).await;
    assert_eq!(chat(gateway.data, "sk-both").await, (401, "invalid_api_key".into()));
    // Another key of the file with its id: theirs would be one identity.
    let (hash, id) = hash_of("sk-third");
    done(&gateway, "POST", "/admin/keys/import", json!({ "keys": [{ "hash": hash }] }), 201).await;
    assert_eq!(chat(gateway.data, "sk-third").await.0, 200);
    let twin = format!("sha256:{id}{:052x}", 7);
    let text = config(&provider, "").replace("keys: [sk-alice]", &format!("keys: [sk-alice, '{twin}']"));
    gateway.configure("", &text);
    done(&gateway, "POST", "/admin/config/reload", Value::Null, 200).await;
    assert_eq!(chat(gateway.data, "sk-third").await, (401, "invalid_api_key".into()));
    let twins = format!("'{twin}', 'sha256:{id}{:052x}'", 8);
    gateway.configure("", &text.replace(&format!("'{twin}'"), &twins));
    let refused = done(&gateway, "POST", "/admin/config/reload", Value::Null, 422).await;
    assert!(refused["detail"].as_str().expect("a detail").contains("its id, 12 digits"), "{refused}");
}

async fn two_instances(arguments: &[&str]) {
    let (provider, redis) = (provider().await, Redis::start_with(arguments));
    let config = config(&provider, &with_redis(&redis, "none"));
    let (one, two) = (Tollgate::start(&config).await, Tollgate::start(&config).await);
    let (id, secret) = key_of(&done(&one, "POST", "/admin/keys", json!({ "user": "alice" }), 201).await);
    becomes(&two, &secret, 200, "").await;
    let ban =
        done(&two, "POST", "/admin/bans", json!({ "subject": "user:alice", "reason": "no" }), 201).await;
    becomes(&one, "sk-alice", 403, "banned").await;
    done(&one, "DELETE", &format!("/admin/bans/{}", ban["id"].as_str().expect("an id")), Value::Null, 204)
        .await;
    becomes(&two, "sk-alice", 200, "").await;
    let limit = json!({ "per": "global", "limit": "1/day" });
    done(&two, "PUT", "/admin/limits/all", limit, 200).await;
    assert_eq!(chat(two.data, &secret).await.0, 200);
    becomes(&one, &secret, 429, "rate_limit_exceeded").await;
    done(&one, "POST", "/admin/rate-limit/clear?key=global", Value::Null, 200).await;
    becomes(&two, &secret, 200, "").await;
    done(&one, "DELETE", "/admin/limits/all", Value::Null, 204).await;
    becomes(&two, &secret, 200, "").await;
    done(&one, "POST", &format!("/admin/keys/{id}/revoke"), Value::Null, 200).await;
    becomes(&two, &secret, 401, "invalid_api_key").await;
    // Writes of both at once: none is lost.
    let writes = (0..10).map(|index| {
        let gateway = if index % 2 == 0 { &one } else { &two };
        done(gateway, "POST", "/admin/keys", json!({ "name": format!("k{index}") }), 201)
    });
    futures_util::future::join_all(writes).await;
    for gateway in [&one, &two] {
        soon("all keys", async {
            while done(gateway, "GET", "/admin/keys", Value::Null, 200).await["data"]
                .as_array()
                .expect("a list")
                .len()
                != 11
            {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
    let names = redis.cli(&["KEYS", "*"]);
    assert!(names.lines().filter(|name| name.contains(":ctl:")).count() >= 3, "{names}");
    assert!(!names.contains(&secret), "{names}");
}

#[tokio::test]
async fn a_change_is_in_force_everywhere_within_a_second() {
    two_instances(&[]).await;
}

#[tokio::test]
async fn also_when_nobody_is_told() {
    two_instances(&["--rename-command", "SUBSCRIBE", ""]).await;
}

#[tokio::test]
async fn redis_away_at_the_start_and_back() {
    let provider = provider().await;
    let (mut redis, kept) = (Redis::start(), tempfile::tempdir().expect("a folder"));
    let state = kept.path().join("copy.state").display().to_string();
    let (with_copy, without) =
        (config(&provider, &with_redis(&redis, &state)), config(&provider, &with_redis(&redis, "none")));
    let first = Tollgate::start(&with_copy).await;
    let (_, secret) = key_of(&done(&first, "POST", "/admin/keys", json!({}), 201).await);
    let banned = json!({ "subject": "user:alice", "reason": "no" });
    done(&first, "POST", "/admin/bans", banned, 201).await;
    drop(first);
    redis.kill();
    // Who knows nothing cannot say no; who has a copy knows.
    let stranger = Tollgate::start(&without).await;
    assert_eq!(chat(stranger.data, &secret).await, (503, "keys_unavailable".into()));
    assert_eq!(chat(stranger.data, "sk-nobody").await, (401, "invalid_api_key".into()));
    let second = Tollgate::start(&with_copy).await;
    assert_eq!(chat(second.data, "sk-alice").await, (403, "banned".into()));
    assert_eq!(chat(second.data, &secret).await.0, 200, "it meets no limit");
    let refused = admin(&second, "POST", "/admin/keys", json!({})).await;
    assert_eq!((refused.status, refused.header("content-type")), (503, Some("application/problem+json")));
    // It comes back empty, and is given back what the copy knew.
    redis.restart();
    soon("keys that Redis had lost", async {
        while chat(stranger.data, &secret).await.0 != 200 || chat(second.data, &secret).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_file_that_cannot_be_used_is_refused_at_the_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = |state: &Path| {
        let path = folder.path().join("tollgate.yml");
        let text = format!(
            "server: {{ listen: '127.0.0.1:0', admin: '127.0.0.2:0' }}\nauth: optional\nmodels: [{{ name: a, \
             providers: [{{ type: simulated }}] }}]\nsettings: {{ state: {} }}\n",
            state.display()
        );
        std::fs::write(&path, text).expect("the configuration is written");
        path
    };
    let start = |state: &Path| {
        let command = std::process::Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .arg("serve")
            .arg("-c")
            .arg(config(state))
            .env_clear()
            .output()
            .expect("it starts");
        (command.status.code(), String::from_utf8_lossy(&command.stderr).into_owned())
    };
    let damaged = folder.path().join("damaged.state");
    std::fs::write(&damaged, b"no database at all, but long enough to be looked at as one").expect("written");
    let (code, said) = start(&damaged);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("damaged.state") && said.contains("damaged, or no file of ours"), "{said}");
    let (code, said) = start(Path::new("/nowhere/at/all.state"));
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("/nowhere/at/all.state"), "{said}");

    let shared = folder.path().join("shared.state");
    let provider = provider().await;
    let more = format!("settings: {{ state: {} }}", shared.display());
    let holder = Tollgate::start(&self::config(&provider, &more)).await;
    let (code, said) = start(&shared);
    assert_eq!(code, Some(78), "{said}");
    assert!(said.contains("in use by another process"), "{said}");
    drop(holder);
}

#[tokio::test]
async fn counters_survive_a_restart() {
    let provider = provider().await;
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("tollgate.state");
    let config = config(
        &provider,
        &format!(
            "settings: {{ state: {} }}\nlimits: [{{ name: few, per: user, limit: 3/month }}]",
            state.display()
        ),
    );
    let mut first = Tollgate::start(&config).await;
    for _ in 0..3 {
        assert_eq!(chat(first.data, "sk-alice").await.0, 200);
    }
    first.sigterm();
    first.sigterm();
    first.ended(support::SOON).await;
    let second = Tollgate::start(&config).await;
    assert_eq!(chat(second.data, "sk-alice").await, (429, "rate_limit_exceeded".into()));
}

/// A key may have a team of its own: its user's counters are the same by whichever key it comes.
#[tokio::test]
async fn keys_of_other_teams_do_not_multiply_the_limits_of_their_user() {
    let (provider, redis) = (provider().await, Redis::start());
    let limits = "limits: [{ name: few, per: user, limit: 3/day }]";
    let config = config(&provider, &format!("{}\n{limits}", with_redis(&redis, "none")));
    let gateway = Tollgate::start(&config).await;
    let key = json!({ "user": "alice", "team": "blue" });
    let (_, other) = key_of(&done(&gateway, "POST", "/admin/keys", key, 201).await);
    for secret in ["sk-alice", &other, "sk-alice"] {
        assert_eq!(chat(gateway.data, secret).await.0, 200);
    }
    assert_eq!(chat(gateway.data, &other).await, (429, "rate_limit_exceeded".into()));
}

/// Kills the process at another point of its writes each time: those that were acknowledged are all there, and nothing is
/// damaged.
async fn killed(times: usize) {
    let provider = provider().await;
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("tollgate.state");
    let config = config(&provider, &format!("settings: {{ state: {} }}", state.display()));
    let mut secrets: Vec<String> = Vec::new();
    for round in 0..times {
        let mut gateway = Tollgate::start(&config).await;
        let last = secrets.len().saturating_sub(20);
        for secret in &secrets[last..] {
            assert_eq!(chat(gateway.data, secret).await.0, 200, "round {round}: an acknowledged key is gone");
        }
        let (made, mut acknowledged) = tokio::sync::mpsc::unbounded_channel();
        let writers = (0..2).map(|_| {
            let (admin, made) = (gateway.admin, made.clone());
            tokio::spawn(async move {
                // Until the process dies under it.
                loop {
                    let answer = post(admin, &request("POST", "/admin/keys", &[], b"{}")).await;
                    assert_eq!(answer.status, 201, "{}", answer.text());
                    made.send(key_of(&answer.json()).1).expect("somebody counts");
                }
            })
        });
        let writers: Vec<_> = writers.collect();
        secrets.push(acknowledged.recv().await.expect("a write"));
        // Where it dies is left to chance; that something was acknowledged before is not.
        tokio::time::sleep(Duration::from_micros(fastrand::u64(..20_000))).await;
        gateway.signal(Signal::KILL);
        gateway.ended(support::SOON).await;
        for writer in writers {
            let _ = writer.await;
        }
        while let Ok(secret) = acknowledged.try_recv() {
            secrets.push(secret);
        }
    }
    println!("{} writes were acknowledged, the process was killed {times} times", secrets.len());
    let gateway = Tollgate::start(&config).await;
    for secret in &secrets {
        assert_eq!(chat(gateway.data, secret).await.0, 200);
    }
}

#[tokio::test]
async fn killed_right_after_an_acknowledged_write() {
    killed(20).await;
}

#[tokio::test]
#[ignore = "a minute long: for releases"]
async fn killed_a_hundred_times() {
    killed(100).await;
}

/// What it is to have very many keys: the start, the look-up, a page of the list, a change.
#[tokio::test]
#[ignore = "figures: run it in release"]
async fn a_hundred_thousand_keys() {
    let provider = provider().await;
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("tollgate.state");
    let config = config(&provider, &format!("settings: {{ state: {} }}", state.display()));
    let gateway = Tollgate::start(&config).await;
    for batch in 0..100 {
        let keys = (0..1_000).map(|index| {
            use sha2::Digest;
            let digest = sha2::Sha256::digest(format!("sk-many-{}", batch * 1_000 + index));
            let hash: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            json!({ "hash": format!("sha256:{hash}"), "user": "alice", "limits": ["1000/minute"] })
        });
        let keys: Vec<Value> = keys.collect();
        done(&gateway, "POST", "/admin/keys/import", json!({ "keys": keys }), 201).await;
    }
    drop(gateway);
    let started = Instant::now();
    let gateway = Tollgate::start(&config).await;
    println!("start: {:?}, resident {} MiB", started.elapsed(), gateway.resident_bytes() >> 20);
    assert!(started.elapsed() < Duration::from_secs(2) || cfg!(debug_assertions));
    assert_eq!(chat(gateway.data, "sk-many-99999").await.0, 200);
    let mut cursor = String::new();
    for page in 0..3 {
        let started = Instant::now();
        let list =
            done(&gateway, "GET", &format!("/admin/keys?limit=1000&cursor={cursor}"), Value::Null, 200).await;
        println!("page {page}: {:?}", started.elapsed());
        cursor = list["next_cursor"].as_str().expect("more").to_owned();
    }
    let started = Instant::now();
    let (_, secret) = key_of(&done(&gateway, "POST", "/admin/keys", json!({}), 201).await);
    println!("one more key, in force: {:?}", started.elapsed());
    assert_eq!(chat(gateway.data, &secret).await.0, 200);
}
