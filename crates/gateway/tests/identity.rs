//! Who is calling: keys in either header, addresses behind proxies, and what a user may use.

mod support;

use support::{Conn, Provider, Response, Tollgate, get, json_answer, post, question, request};

const ANSWER: &str = r#"{"id":"a","choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}"#;

/// alice may use everything, bob only `chat`; `models` are chat (alias gpt-4o-mini), other and vendor/model.
async fn start(auth: &str, server: &str, limits: &str) -> (Provider, Tollgate) {
    let provider = Provider::answering(json_answer("200 OK", "", ANSWER)).await;
    let url = format!("[{{ type: openai, url: 'http://{}', key: sk-upstream }}]", provider.address);
    let config = format!(
        "auth: {auth}\nusers:\n  - name: alice\n    keys: [sk-alice, {{ hash: '{}', expires: 2001-01-01 }}]\n  \
         - name: bob\n    models: [chat]\n    keys: [sk-bob]\nmodels:\n  - name: chat\n    aliases: [gpt-4o-mini]\n    \
         providers: {url}\n  - name: other\n    providers: {url}\n  - name: vendor/model\n    providers: {url}\n{limits}",
        sha256("sk-expired"),
    );
    let gateway = Tollgate::start_with(server, &config, &[]).await;
    (provider, gateway)
}

async fn ask(gateway: &Tollgate, headers: &[(&str, &str)], model: &str) -> Response {
    let body = question(false).replace("\"chat\"", &format!("\"{model}\""));
    post(gateway.data, &request("POST", "/v1/chat/completions", headers, body.as_bytes())).await
}

#[tokio::test]
async fn a_key_is_required_and_comes_in_one_of_two_headers() {
    let (provider, gateway) = start("required", "", "").await;
    for headers in [
        &[("Authorization", "Bearer sk-alice")][..],
        &[("authorization", "bearer sk-alice")],
        &[("X-API-Key", "sk-alice")],
        &[("x-api-key", "sk-alice")],
        &[("Authorization", "Bearer sk-alice"), ("X-API-Key", "sk-alice")],
    ] {
        let answer = ask(&gateway, headers, "chat").await;
        assert_eq!(answer.status, 200, "{headers:?}: {}", answer.text());
    }
    let asked = provider.hits();
    for headers in [
        &[][..],
        &[("Authorization", "Bearer sk-nobody")],
        &[("Authorization", "Bearer ")],
        &[("Authorization", "Bearer")],
        &[("Authorization", "sk-alice")],
        &[("Authorization", "Basic c2stYWxpY2U=")],
        &[("Authorization", "Bearer SK-ALICE")],
        &[("Authorization", "Bearer sk-alice2")],
        &[("X-API-Key", "")],
        &[("X-API-Key", "Bearer sk-alice")],
        &[("api-key", "sk-alice")],
        &[("Cookie", "key=sk-alice")],
    ] {
        let answer = ask(&gateway, headers, "chat").await;
        assert_eq!((answer.status, answer.code()), (401, "invalid_api_key".into()), "{headers:?}");
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
        assert!(answer.header("x-request-id").is_some(), "{headers:?}");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    for headers in [
        &[("Authorization", "Bearer sk-alice"), ("X-API-Key", "sk-bob")][..],
        &[("Authorization", "Bearer sk-alice"), ("Authorization", "Bearer sk-bob")],
        &[("X-API-Key", "sk-alice"), ("X-API-Key", "sk-nobody")],
        &[("Authorization", "Basic sk-alice"), ("X-API-Key", "sk-alice")],
    ] {
        let answer = ask(&gateway, headers, "chat").await;
        assert_eq!((answer.status, answer.code()), (400, "ambiguous_credentials".into()), "{headers:?}");
    }
    assert_eq!(provider.hits(), asked, "no refused request reaches a provider");
    for line in gateway.lines() {
        assert!(!line.to_string().contains("sk-"), "a key in the log: {line}");
    }
}

#[tokio::test]
async fn every_path_that_needs_a_key_asks_for_it() {
    let (_provider, gateway) = start("required", "", "").await;
    assert_eq!(get(gateway.data, "/v1/models").await.status, 401);
    assert_eq!(get(gateway.data, "/v1/models/chat").await.status, 401);
    for path in ["/v1/embeddings", "/v1/audio/transcriptions", "/v1/images/generations", "/api/v1/chat"] {
        let answer = post(gateway.data, &request("POST", path, &[], b"{}")).await;
        assert_eq!(answer.status, 401, "{path}");
    }
    // A 401 comes before the body is looked at.
    let announced = b"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: 100\r\n\r\n";
    assert_eq!(Conn::ask(gateway.data, announced).await.head().await.status, 401);
}

#[tokio::test]
async fn optional_keys_are_optional_but_not_wrong() {
    let (_provider, gateway) = start("optional", "", "").await;
    assert_eq!(ask(&gateway, &[], "chat").await.status, 200);
    assert_eq!(ask(&gateway, &[("Authorization", "Bearer sk-bob")], "chat").await.status, 200);
    for wrong in ["Bearer sk-nobody", "Bearer", ""] {
        let answer = ask(&gateway, &[("Authorization", wrong)], "chat").await;
        assert_eq!((answer.status, answer.code()), (401, "invalid_api_key".into()), "{wrong:?}");
    }
    let lines = gateway.requests_logged(5).await;
    assert!(lines[0].get("user").is_none() && lines[0].get("api_key").is_none());
    assert_eq!(lines[1]["user"], "bob");
    assert_eq!(lines[1]["api_key"].as_str().map(str::len), Some(12));
}

#[tokio::test]
async fn an_expired_key_is_no_key() {
    let (_provider, gateway) = start("optional", "", "").await;
    let answer = ask(&gateway, &[("Authorization", "Bearer sk-expired")], "chat").await;
    assert_eq!((answer.status, answer.code()), (401, "invalid_api_key".into()));
    assert!(answer.message().contains("expired"), "{}", answer.message());
}

fn sha256(key: &str) -> String {
    use sha2::Digest;
    let digest = sha2::Sha256::digest(key);
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

#[tokio::test]
async fn a_user_uses_its_models_and_sees_no_others() {
    let (provider, gateway) = start("required", "", "").await;
    let (alice, bob) = ([("Authorization", "Bearer sk-alice")], [("Authorization", "Bearer sk-bob")]);
    for (who, model, status, code) in [
        (&alice, "chat", 200, ""),
        (&alice, "other", 200, ""),
        (&alice, "vendor/model", 200, ""),
        (&bob, "chat", 200, ""),
        (&bob, "gpt-4o-mini", 200, ""),
        (&bob, "other", 403, "model_not_allowed"),
        (&bob, "nothing", 404, "model_not_found"),
        (&alice, "CHAT", 404, "model_not_found"),
        (&alice, "chat ", 404, "model_not_found"),
    ] {
        let asked = provider.hits();
        let answer = ask(&gateway, who, model).await;
        assert_eq!(answer.status, status, "{model}: {}", answer.text());
        if status != 200 {
            assert_eq!(answer.code(), code, "{model}");
            assert_eq!(answer.json()["error"]["param"], "model");
            let kind = if status == 403 { "permission_error" } else { "invalid_request_error" };
            assert_eq!(answer.json()["error"]["type"], kind);
            assert_eq!(provider.hits(), asked);
        }
    }
    let list = |headers: &[(&str, &str)]| request("GET", "/v1/models", headers, b"");
    let names = |answer: Response| -> Vec<String> {
        let data = answer.json()["data"].as_array().expect("a list").clone();
        data.iter().map(|model| model["id"].as_str().expect("an id").to_owned()).collect()
    };
    let all = names(post(gateway.data, &list(&alice)).await);
    assert_eq!(all, ["chat", "gpt-4o-mini", "other", "vendor/model"]);
    assert_eq!(names(post(gateway.data, &list(&bob)).await), ["chat", "gpt-4o-mini"]);
    for (who, path, status) in [
        (&alice, "/v1/models/other", 200),
        (&alice, "/v1/models/vendor%2Fmodel", 200),
        (&alice, "/v1/models/vendor%2fmodel", 200),
        (&alice, "/v1/models/vendor/model", 404),
        (&alice, "/v1/models/%6fther", 404),
        (&bob, "/v1/models/chat", 200),
        (&bob, "/v1/models/other", 404),
        (&bob, "/v1/models/nothing", 404),
    ] {
        let answer = post(gateway.data, &request("GET", path, who, b"")).await;
        assert_eq!(answer.status, status, "{path}");
    }
    let one = post(gateway.data, &request("GET", "/v1/models/vendor%2Fmodel", &alice, b"")).await;
    assert_eq!(one.json()["id"], "vendor/model");
}

#[tokio::test]
async fn only_trusted_proxies_say_who_the_client_is() {
    for (trusted, forwarded, expected) in [
        ("", &["203.0.113.9"][..], "127.0.0.1"),
        ("127.0.0.0/8", &[], "127.0.0.1"),
        ("127.0.0.0/8", &["203.0.113.9"], "203.0.113.9"),
        ("127.0.0.0/8", &["6.6.6.6, 203.0.113.9"], "203.0.113.9"),
        ("127.0.0.0/8, 10.0.0.0/8", &["6.6.6.6, 203.0.113.9, 10.1.1.1"], "203.0.113.9"),
        ("127.0.0.0/8, 10.0.0.0/8", &["6.6.6.6, 203.0.113.9", "10.1.1.1"], "203.0.113.9"),
        ("127.0.0.0/8", &["203.0.113.9, "], "127.0.0.1"),
        ("127.0.0.0/8", &["203.0.113.9, evil"], "127.0.0.1"),
        ("127.0.0.0/8", &["[2001:db8:1:2:3::4]:4711"], "2001:db8:1:2:3::4"),
        ("127.0.0.1", &["127.0.0.2, 203.0.113.9"], "203.0.113.9"),
    ] {
        let (_provider, gateway) = start("optional", &format!("  trusted_proxies: [{trusted}]\n"), "").await;
        let headers: Vec<_> = forwarded.iter().map(|value| ("X-Forwarded-For", *value)).collect();
        let answer = ask(&gateway, &headers, "chat").await;
        assert_eq!(answer.status, 200);
        assert_eq!(gateway.requests_logged(1).await[0]["ip"], expected, "{trusted} {forwarded:?}");
    }
}

#[tokio::test]
async fn an_ipv6_network_of_64_bits_is_one_address() {
    let limits = "limits: [{ name: by-ip, per: ip, limit: 2/day }]\n";
    let (_provider, gateway) = start("optional", "  trusted_proxies: [127.0.0.0/8]\n", limits).await;
    for (address, status) in [
        ("2001:db8:1:2::1", 200),
        ("2001:db8:1:2:ffff::9", 200),
        ("2001:db8:1:2:3:4:5:6", 429),
        ("2001:db8:1:3::1", 200),
        ("::ffff:203.0.113.9", 200),
        ("203.0.113.9", 200),
        ("203.0.113.9", 429),
        ("203.0.113.10", 200),
    ] {
        let answer = ask(&gateway, &[("X-Forwarded-For", address)], "chat").await;
        assert_eq!(answer.status, status, "{address}: {}", answer.text());
    }
}
