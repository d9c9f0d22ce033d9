//! Refusals: exact words, exact places. Lines are counted from the start of what is added to a file that is right.

use super::{Severity, file, lines, load, load_file, nothing, said, variables};

/// Each addition, and everything that is said of it.
fn expect(cases: &[(&str, &[&str])]) {
    for (more, expected) in cases {
        assert_eq!(said(more), *expected, "{more}");
    }
}

#[test]
fn keys() {
    expect(&[
        (
            "users:\n  - name: x\n    tire: free\n",
            &[
                "t.yml:3:5: users[0].tire: unknown key; did you mean `tier`? allowed: name, team, tier, models, keys",
            ],
        ),
        (
            "sever: {}\n",
            &[
                "t.yml:1:1: sever: unknown key; did you mean `server`? allowed: server, dependencies, settings, telemetry, tiers, limits, auth, users, models",
            ],
        ),
        ("server: []\n", &["t.yml:1:9: server: expected keys and values, found a list"]),
        (
            "server:\n  listen:\n",
            &["t.yml:2:3: server.listen: has no value; give it one, or leave the key out"],
        ),
        (
            "server: { trusted_proxies: 10.0.0.0/8 }\n",
            &["t.yml:1:28: server.trusted_proxies: expected a list, found a value"],
        ),
        ("auth: optional\n", &["t.yml:1:1: duplicate key `auth`; it is on line 4 already"]),
        (
            "\"a\\e[31m\": 1\n",
            &[
                "t.yml:1:1: a\\u{1b}[31m: unknown key; allowed: server, dependencies, settings, telemetry, tiers, limits, auth, users, models",
            ],
        ),
    ]);
}

#[test]
fn single_values() {
    expect(&[
        (
            "server: { listen: 8080, max_body: 10, max_upload: 2GiB }\n",
            &[
                "t.yml:1:19: server.listen: `8080` is not an address to listen on; write an IP address and a port: 0.0.0.0:8080, 127.0.0.1:8081, [::]:8080",
                "t.yml:1:35: server.max_body: `10` is not a size; write 256KB, 10MB or 64MiB; allowed: 1KB to 1GiB",
                "t.yml:1:51: server.max_upload: `2GiB` is out of range; allowed: 1KB to 1GiB",
            ],
        ),
        (
            "server: { shutdown_grace: 5, max_connections_per_ip: 0 }\n",
            &[
                "t.yml:1:27: server.shutdown_grace: `5` is not a duration; write 250ms, 300s, 10m or 1h; allowed: 0ms to 1d",
                "t.yml:1:54: server.max_connections_per_ip: `0` is out of range; allowed: 1 to 1000000",
            ],
        ),
        (
            "settings: { rate_limiting_strategy: fixed, log_format: xml }\n",
            &[
                "t.yml:1:37: settings.rate_limiting_strategy: `fixed` is not known; did you mean `fixed_window`? allowed: fixed_window, sliding_window, moving_window, token_bucket",
                "t.yml:1:56: settings.log_format: `xml` is not known; allowed: json, text",
            ],
        ),
        (
            "server: { trusted_proxies: [10.0.0.0/99] }\n",
            &[
                "t.yml:1:29: server.trusted_proxies[0]: `10.0.0.0/99` is not a network; write 10.0.0.0/8, fd00::/8 or one address",
            ],
        ),
    ]);
}

#[test]
fn listeners_and_secrets() {
    let open =
        "is no loopback address, and there is no `admin_key`; set server.admin_key, or listen on 127.0.0.1";
    for port in [8081, 8080] {
        let expected = format!("t.yml:1:18: server.admin: 0.0.0.0:{port} {open}");
        assert_eq!(said(&format!("server: {{ admin: 0.0.0.0:{port} }}\n")), [expected]);
    }
    expect(&[
        (
            "server: { listen: 0.0.0.0:8081 }\n",
            &[
                "t.yml:1:19: server.listen: `listen` is 0.0.0.0:8081 and `admin` is 127.0.0.1:8081: both cannot have port 8081; give them different ports, or the same address",
            ],
        ),
        (
            "server: { admin_key: ChangeMe }\n",
            &[
                "t.yml:1:22: server.admin_key: the value is a well-known placeholder; make one with `openssl rand -hex 32`",
            ],
        ),
        (
            "server: { admin_key: k1, admin_keys: [{ name: a, key: k2, role: boss }, { name: admin, key: k3, role: admin }, { name: b, key: k1, role: viewer }] }\n",
            &[
                "t.yml:1:65: server.admin_keys[0].role: `boss` is not known; allowed: viewer, operator, admin",
                "t.yml:1:73: server.admin_keys[1]: this name is taken; give each its own; `admin` is that of server.admin_key",
                "t.yml:1:112: server.admin_keys[2]: this key is there already; make one with `openssl rand -hex 32`",
            ],
        ),
        ("server: { admin_key: \"\" }\n", &["t.yml:1:22: server.admin_key: the value is empty"]),
        (
            "server: { metrics_key: \"$${A}\" }\n",
            &[
                "t.yml:1:24: server.metrics_key: the value still contains `${`; a variable is replaced once; what it holds is not",
            ],
        ),
        (
            "server: { metrics_key: a b }\n",
            &[
                "t.yml:1:24: server.metrics_key: the value cannot be sent in a header; allowed: up to 512 ASCII characters, no spaces",
            ],
        ),
    ]);
}

#[test]
fn limits() {
    expect(&[
        (
            "tiers: { a: [20 concurrent, 5 concurrent], b: { limit: $60k/day, strategy: sliding_window }, c: [9 tokens/60s, 8 input tokens/minute, 7 tokens/minute] }\nusers: [{ name: u, tier: a }, { name: v, tier: b }, { name: w, tier: c }]\n",
            &[
                "t.yml:1:29: tiers.a[1]: `5 concurrent` and `20 concurrent` have the same unit; keep one of them",
                "t.yml:1:56: tiers.b.limit: `$60000/day` is too large to be counted exactly as sliding_window; write fixed_window for it",
                "t.yml:1:135: tiers.c[2]: `7 tokens/minute` and `9 tokens/60 seconds` have the same window; keep one of them",
            ],
        ),
        (
            "limits:\n  - { name: r, per: ip, limit: [10/minute, 20/60s] }\n  - { name: r, per: ip, limit: 1/second }\n",
            &[
                "t.yml:2:44: limits[0].limit[1]: `20/60 seconds` and `10/minute` have the same window; keep one of them",
                "t.yml:3:13: limits[1].name: a second rule or tier is called `r`; the first is at t.yml:6:13",
            ],
        ),
        (
            "limits:\n  - { name: r, per: ip, limit: 1m/day }\n",
            &["t.yml:2:32: limits[0].limit: `1m/day` is no limit: `m` is not a size; for a million write M"],
        ),
        (
            "limits:\n  - { per: [ip, global, uzer], limit: [unlimited, 1/day] }\n",
            &[
                "t.yml:2:5: limits[0]: `name` is missing; a unique name, part of headers and metrics",
                "t.yml:2:17: limits[0].per[1]: `global` stands alone; it means: per nothing",
                "t.yml:2:25: limits[0].per[2]: `uzer` is not known; did you mean `user`? allowed: ip, session, api_key, user, team, tier, model, endpoint, global",
                "t.yml:2:40: limits[0].limit[0]: `unlimited` stands alone; remove it, or the other limits",
            ],
        ),
    ]);
    let burst = said("limits:\n  - { name: r, per: ip, limit: 10/minute burst 5 }\n");
    assert!(
        burst[0].starts_with("t.yml:2:32: limits[0].limit: `10/minute burst 5`: burst needs token_bucket")
    );
}

#[test]
fn rules_that_refuse() {
    let rule = |keys: &str| said(&format!("limits:\n  - {{ name: r, match: {{ model: a }}, {keys} }}\n"));
    let missing = "write `deny: true`";
    let neither = rule("deny: false");
    assert!(neither[0].starts_with("t.yml:2:5: limits[0]: `per` is missing; what is counted"), "{neither:?}");
    assert!(neither[1].starts_with("t.yml:2:5: limits[0]: `limit` is missing;"), "{neither:?}");
    assert!(neither[1].ends_with(missing) && neither.len() == 2, "{neither:?}");
    for key in ["limit: 1/minute", "per: ip", "strategy: token_bucket", "mode: strict", "shadow: true"] {
        let name = key.split(':').next().unwrap();
        assert_eq!(
            rule(&format!("deny: true, {key}")),
            [format!(
                "t.yml:2:49: limits[0].{name}: `{name}` says nothing beside `deny: true`; keep one of them"
            )]
        );
    }
    assert_eq!(
        rule("per: ip, limit: 1/minute, mode: leased"),
        ["t.yml:2:69: limits[0].mode: `leased` is not in this version; allowed: strict"]
    );
    assert_eq!(rule("deny: maybe"), ["t.yml:2:43: limits[0].deny: `maybe` is neither true nor false"]);
}

#[test]
fn prices_and_weights() {
    let model = |keys: &str| errors(&format!("models:\n  - {{ name: a, {keys} }}\n"));
    let provider = |price: &str| model(&format!("providers: [{{ type: simulated, price: {{ {price} }} }}]"));
    let place = "t.yml:2:63: models[0].providers[0].price.input:";
    let money = "allowed: 0 to 1000000, with up to 6 decimals";
    for (amount, said) in [
        ("$1", "is not a number"),
        ("-1", "is not a number"),
        ("1e3", "is not a number"),
        ("1.", "is not a number"),
        ("0.0000001", "is out of range"),
        ("1000000.000001", "is out of range"),
        ("99999999999999999999", "is out of range"),
    ] {
        let expected = format!("{place} `{amount}` {said}; {money}");
        assert_eq!(provider(&format!("input: {amount}, output: 1")), [expected]);
    }
    assert_eq!(
        provider("cached_input: 1"),
        [
            "t.yml:2:54: models[0].providers[0].price: `input` is missing; money per million prompt tokens",
            "t.yml:2:54: models[0].providers[0].price: `output` is missing; money per million completion tokens",
        ]
    );
    let simulated = "providers: [{ type: simulated }]";
    assert_eq!(
        model(&format!(
            "count: exactly, token_weights: {{ cached_input: 1.5, reasoning: 0.0001 }}, {simulated}"
        )),
        [
            "t.yml:2:23: models[0].count: `exactly` is not known; did you mean `exact`? allowed: estimate, exact",
            "t.yml:2:63: models[0].token_weights.cached_input: `1.5` is out of range; allowed: 0 to 1, with up to 3 decimals",
            "t.yml:2:79: models[0].token_weights.reasoning: `0.0001` is out of range; allowed: 0 to 1, with up to 3 decimals",
        ]
    );
}

#[test]
fn what_a_rule_matches() {
    expect(&[(
        "limits:\n  - { name: r, per: ip, limit: 1/minute, match: { model: bb, user: u, tier: t, endpoint: v1, api_key: zz, ip: x, authenticated: maybe } }\n",
        &[
            "t.yml:2:58: limits[0].match.model: there is no model `bb`; allowed: a, b",
            "t.yml:2:68: limits[0].match.user: there is no user `u`; there is none",
            "t.yml:2:77: limits[0].match.tier: there is no tier `t`; there is none",
            "t.yml:2:90: limits[0].match.endpoint: `v1` is not a path; write /v1/chat/completions or /v1/images/*",
            "t.yml:2:103: limits[0].match.api_key: `zz` is not the id of a key; the first 12 hex digits of its SHA-256, lower case; of a key that begins with tg_ the 8 characters after it",
            "t.yml:2:111: limits[0].match.ip: `x` is not a network; write 10.0.0.0/8, fd00::/8 or one address",
            "t.yml:2:129: limits[0].match.authenticated: `maybe` is neither true nor false",
        ],
    )]);
}

#[test]
fn users() {
    expect(&[(
        "users:\n  - { name: u, tier: gold, models: [c], keys: [k1, k1, { hash: k, expires: soon }, { name: l }, \"\"] }\n  - { name: u, models: [] }\ntiers: { god: 1/minute }\n",
        &[
            "t.yml:2:22: users[0].tier: there is no tier `gold`; did you mean `god`? allowed: god",
            "t.yml:2:37: users[0].models[0]: there is no model `c`; allowed: a, b",
            "t.yml:2:52: users[0].keys[1]: the same key is users[0].keys[0] already; a key has one owner",
            "t.yml:2:64: users[0].keys[2].hash: the value is not a SHA-256; write `sha256:` and 64 hex digits, from `printf %s \"$KEY\" | sha256sum`",
            "t.yml:2:76: users[0].keys[2].expires: `soon` is not a date; write 2027-01-01 or 2027-01-01T12:00:00Z",
            "t.yml:2:84: users[0].keys[3]: `hash` is missing; `sha256:` and 64 hex digits",
            "t.yml:2:97: users[0].keys[4]: the value is empty",
            "t.yml:3:13: users[1].name: a second user is called `u`; names are unique",
            "t.yml:3:24: users[1].models: an empty list says nothing; leave the key out, or name at least one",
        ],
    )]);
}

/// What is said of a whole file, without the warnings.
fn errors(text: &str) -> Vec<String> {
    let problems = load_file(text, &nothing).unwrap_err();
    lines(&problems.into_iter().filter(|problem| problem.severity == Severity::Error).collect::<Vec<_>>())
}

#[test]
fn models() {
    let sim = "providers: [{ type: simulated }]";
    let text = format!(
        "models:\n  - {{ name: a, fallback: [b], {sim} }}\n  - {{ name: b, aliases: [a], fallback: [cc], {sim} }}\n  - {{ name: c, aliases: [cc], fallback: [b, d, b], {sim} }}\n  - {{ name: '*', providers: [] }}\n"
    );
    assert_eq!(
        errors(&text),
        [
            "t.yml:3:26: models[1].aliases[0]: a second model is called `a`; names and aliases are unique",
            "t.yml:4:42: models[2].fallback[0]: the fallback goes in a circle: b → c → b",
            "t.yml:4:45: models[2].fallback[1]: there is no model `d`; allowed: a, b, c, cc, *",
            "t.yml:4:48: models[2].fallback[2]: `b` is listed twice",
            "t.yml:4:48: models[2].fallback[2]: the fallback goes in a circle: b → c → b",
            "t.yml:5:13: models[3].name: `*` is not a name; TOLLGATE_UPSTREAM serves every model",
            "t.yml:5:29: models[3].providers: an empty list says nothing; leave the key out, or name at least one",
        ]
    );
    assert_eq!(errors(""), ["t.yml:1:1: `models` is missing; what may be called"]);
    assert_eq!(errors("- a"), ["t.yml:1:1: expected keys and values, found a list"]);
}

#[test]
fn providers() {
    let provider =
        |keys: &str| errors(&format!("models:\n  - name: a\n    providers:\n      - {{ {keys} }}\n"));
    let place = "t.yml:4:28: models[0].providers[0].url: the value";
    let help = "write https://api.openai.com or http://10.0.0.5:8000/v1";
    for (url, said) in [
        ("ftp://x", format!("is not a URL with http:// or https://; {help}")),
        ("x", format!("is not a URL with http:// or https://; {help}")),
        ("http://", format!("is not a URL; {help}")),
        ("http://u:p@x", "contains a user or password; put the secret under `key`".to_owned()),
        ("http://x?y", format!("has a query or a fragment; {help}")),
        ("http://x#y", format!("has a query or a fragment; {help}")),
        ("http://x:99999", "has a port that is none; allowed: 1 to 65535".to_owned()),
    ] {
        assert_eq!(provider(&format!("type: vllm, url: '{url}'")), [format!("{place} {said}")]);
    }
    assert_eq!(
        provider("type: opnai"),
        [
            "t.yml:4:17: models[0].providers[0].type: `opnai` is not a type of provider; did you mean `openai`? allowed: openai, vllm, ollama, tei, simulated"
        ]
    );
    assert_eq!(
        provider("url: x"),
        [
            "t.yml:4:9: models[0].providers[0]: `type` is missing; allowed: openai, vllm, ollama, tei, simulated"
        ]
    );
    assert_eq!(
        provider("type: simulated, latency: 1, fail_rate: 2, idle_timeout: 0s"),
        [
            "t.yml:4:37: models[0].providers[0].latency: `1` is not a duration; write 250ms, 300s, 10m or 1h; allowed: 0ms to 1h",
            "t.yml:4:51: models[0].providers[0].fail_rate: `2` is not a share; allowed: 0 to 1, such as 0.05",
            "t.yml:4:68: models[0].providers[0].idle_timeout: `0s` is out of range; allowed: 1ms to 1d",
        ]
    );
}

#[test]
fn syntax() {
    let quotes = "inside […] and {…} YAML wants quotes around `$`: \"${NAME}\"";
    for text in ["models: [${A}]\n", "models: {a: ${A}}\n", "models: [\n  a,\n  ${A:-b}]\n"] {
        let said = errors(text);
        assert!(said.len() == 1 && said[0].ends_with(quotes), "{said:?}");
    }
    assert!(errors("models: [${A}]\n")[0].starts_with("t.yml:1:11: "));
    assert_eq!(
        errors("a: 1\n---\nb: 1\n").last().map(String::as_str),
        Some("t.yml:2:1: a second document starts here; a configuration is one document: remove `---`")
    );
    assert_eq!(errors("a: &a [*a]\n"), ["t.yml:1:8: this alias stands inside what it names"]);
    assert_eq!(errors(&"[".repeat(2_000)), ["t.yml:1:65: recursion limit exceeded"]);
    assert_eq!(
        errors(&" ".repeat((1 << 20) + 1)),
        ["t.yml:1:1: 1048577 bytes are too many; at most 1 MiB is read"]
    );
    let laughs = (1..10).fold("a0: &a0 [x]\n".to_owned(), |text, n| {
        let inside = vec![format!("*a{}", n - 1); 9].join(",");
        format!("{text}a{n}: &a{n} [{inside}]\n")
    });
    let said = errors(&laughs);
    assert!(
        said[0].ends_with("more than 200000 values; aliases count as often as they are used"),
        "{said:?}"
    );
}

#[test]
fn variables_that_cannot_be_replaced() {
    let env = variables(&[("SECRET", "s3cr3t value"), ("INNER", "a${SECRET}"), ("EMPTY", "")]);
    let said = |value: &str| {
        let text = file(&format!("server:\n  admin_key: {value}\n  shutdown_grace: ${{SECRET}}\n"));
        let said = lines(&load_file(&text, &env).unwrap_err());
        assert!(!said.concat().contains("s3cr3t"));
        assert_eq!(said.len(), 2);
        said[0].clone()
    };
    let expect =
        |value, expected: &str| assert_eq!(said(value), format!("t.yml:6:14: server.admin_key: {expected}"));
    expect("${UNSET}", "the environment variable `UNSET` is not set; set it, or write `${UNSET:-default}`");
    expect("${UNSET:-}", "the value is empty");
    expect("${EMPTY}", "the value is empty");
    expect("a${B", "`${` without `}`; write `$$` for a dollar sign");
    expect(
        "${9}",
        "`9` is not the name of a variable; allowed: `${NAME}`, `${NAME:-default}`; write `$$` for a dollar sign",
    );
    expect("${INNER}", "the value still contains `${`; a variable is replaced once; what it holds is not");
    expect(
        "${SECRET}",
        "the value cannot be sent in a header; allowed: up to 512 ASCII characters, no spaces",
    );
}

#[test]
fn more_limits_than_one_request_may_meet() {
    let rule = |n: usize, matches: &str| {
        format!("  - {{ name: r{n}, per: ip, limit: 1/minute, match: {{ {matches} }} }}\n")
    };
    let rules = |count: usize, matches: &dyn Fn(usize) -> String| {
        let rules: String = (0..count).map(|n| rule(n, &matches(n))).collect();
        said(&format!("limits:\n{rules}"))
    };
    let too_many = "t.yml:1:1: limits: one request of a caller without a key can meet 17 limits; at most 16: match fewer, or merge rules";
    assert_eq!(rules(17, &|_| "authenticated: false".into()), [too_many]);
    assert_eq!(rules(16, &|_| "authenticated: false".into()), [""; 0]);
    // Half of them for one model, half for the other: no request meets all.
    assert_eq!(rules(32, &|n| format!("model: {}", ["a", "b"][n % 2])), [""; 0]);
    assert_eq!(rules(32, &|n| format!("ip: 10.{}.0.0/16", n % 2)), [""; 0]);
    assert_eq!(rules(34, &|n| format!("ip: 10.{}.0.0/16", n % 2)).len(), 1);
    assert_eq!(rules(32, &|n| format!("endpoint: /v1/{}", ["responses", "rerank"][n % 2])), [""; 0]);
    assert_eq!(rules(17, &|_| "endpoint: /v1/*".into()), [too_many]);
}

#[test]
fn environments() {
    let said = |set: &[(&str, &str)]| lines(&load(None, &variables(set)).unwrap_err());
    assert_eq!(
        said(&[]),
        [
            "environment: TOLLGATE_UPSTREAM: no configuration file, and this variable is not set; give a file with -c, or set TOLLGATE_UPSTREAM to the URL of a provider, or try `tollgate demo`"
        ]
    );
    let upstream = ("TOLLGATE_UPSTREAM", "http://x");
    assert_eq!(
        said(&[upstream, ("API_KEYS", "a,,b,a")]),
        [
            "environment: API_KEYS: key 2 is empty",
            "environment: API_KEYS: the same key is listed twice; a key has one owner"
        ]
    );
    assert_eq!(
        said(&[
            upstream,
            ("RATE_LIMITER_CAPACITY", "20"),
            ("REQUEST_RATE_LIMIT", "0"),
            ("TOLLGATE_LISTEN", "x")
        ]),
        [
            "environment: REQUEST_RATE_LIMIT: `0` is out of range; allowed: 1 to 1000000000",
            "environment: RATE_LIMITER_REFILL_RATE: is not set, but RATE_LIMITER_CAPACITY is; a token bucket needs both",
            "environment: TOLLGATE_LISTEN: `x` is not an address to listen on; write an IP address and a port: 0.0.0.0:8080, 127.0.0.1:8081, [::]:8080",
        ]
    );
    for rate in ["0", "-1", "1e3", "0.0000001", ".", "x", "99999999999"] {
        let said = said(&[upstream, ("RATE_LIMITER_CAPACITY", "20"), ("RATE_LIMITER_REFILL_RATE", rate)]);
        let help = "allowed: above 0, up to 1000000000, at most 6 decimals: 5 or 0.5";
        let expected = format!(
            "environment: RATE_LIMITER_REFILL_RATE: `{rate}` is not a number of requests a second; {help}"
        );
        assert_eq!(said, [expected]);
    }
    assert_eq!(
        said(&[upstream, ("TOLLGATE_ADMIN_KEY", "sk-1234")]),
        [
            "environment: TOLLGATE_ADMIN_KEY: the value is a well-known placeholder; make one with `openssl rand -hex 32`"
        ]
    );
}

#[test]
fn names_of_metrics() {
    let refused = |prefix: &str| said(&format!("telemetry: {{ metrics_prefix: '{prefix}' }}\n"));
    let help = "allowed: 1 to 64 of a-z A-Z 0-9 _ :, and no digit in front";
    for wrong in ["9lives", "a-b", "ü", "___", "a b"] {
        let expected =
            format!("t.yml:1:30: telemetry.metrics_prefix: `{wrong}` cannot begin names of metrics; {help}");
        assert_eq!(refused(wrong), [expected]);
    }
    assert_eq!(refused(&"a".repeat(65)).len(), 1);
    for right in ["acme", "acme_", "_a", "team:llm", &"a".repeat(64)] {
        assert_eq!(refused(right), [""; 0], "{right}");
    }
}
