//! Warnings: what works, but perhaps not as meant.

use super::{file, lines, load_file, said, variables};

#[test]
fn limits_that_never_bind() {
    let tier = |limits: &str| {
        let more = format!("tiers:\n  t: [{limits}]\nusers:\n  - {{ name: u, tier: t }}\n");
        said(&more)
    };
    let line = |idle: &str, first: &str| {
        format!(
            "t.yml:2:6: warning: tiers.t: `{idle}` can never refuse: `{first}` always does first; remove it"
        )
    };
    assert_eq!(tier("60/minute, 50/day"), [line("60/minute", "50/day")]);
    assert_eq!(tier("10/minute, 600/hour"), [line("600/hour", "10/minute")]);
    assert_eq!(tier("10/minute, 599/hour"), [""; 0]);
    // Seven days and a calendar month do not begin together, nor do a Monday's week and two weeks from a Thursday.
    assert_eq!(tier("9/week, 5/month"), [""; 0]);
    // A week touches two months at most.
    assert_eq!(tier("10/week, 5/month"), [line("10/week", "5/month")]);
    assert_eq!(tier("60/week, 50/14 days"), [""; 0]);
    assert_eq!(tier("60/week, 50/2 weeks"), [line("60/week", "50/2 weeks")]);
    assert_eq!(tier("10/day, 310/month"), [line("310/month", "10/day")]);
    assert_eq!(tier("10/day, 309/month"), [""; 0]);
    assert_eq!(tier("10/day, 10/month"), [line("10/day", "10/month")]);
    // What is settled later may exceed the short window, which forgets it, but not the long one.
    assert_eq!(tier("10 tokens/minute, 600 tokens/hour"), [""; 0]);
    assert_eq!(tier("60 tokens/minute, 50 tokens/day"), [line("60 tokens/minute", "50 tokens/day")]);
    // Each token of a prompt is a token.
    assert_eq!(tier("9 tokens/day, 9 input tokens/day"), [line("9 input tokens/day", "9 tokens/day")]);
    assert_eq!(tier("9 tokens/day, 8 output tokens/day"), [""; 0]);
    assert_eq!(tier("9 tokens/day, 9 input tokens/hour, 9 concurrent, 9/hour"), [""; 0]);
}

#[test]
fn limits_that_never_bind_in_other_algorithms() {
    let tier = |strategy: &str, limits: &str| {
        let more = format!(
            "tiers:\n  t: {{ strategy: {strategy}, limit: [{limits}] }}\nusers:\n  - {{ name: u, tier: t }}\n"
        );
        said(&more)
            .iter()
            .map(|line| line.split('`').skip(1).step_by(2).take(2).collect::<Vec<_>>().join(" by "))
            .collect::<Vec<_>>()
    };
    // Two minutes back, because entries are kept a little longer than their minute.
    assert_eq!(tier("moving_window", "10/hour, 10/minute"), ["10/minute by 10/hour"]);
    assert_eq!(tier("moving_window", "10/2 minutes, 10/90 seconds"), [""; 0]);
    assert_eq!(tier("moving_window", "10/minute, 600/hour"), [""; 0]);
    assert_eq!(tier("moving_window", "10/minute, 1_200/hour"), ["1200/hour by 10/minute"]);
    assert_eq!(tier("moving_window", "10 tokens/hour, 10 tokens/minute"), [""; 0]);
    assert_eq!(tier("sliding_window", "10/hour, 19/minute"), [""; 0]);
    assert_eq!(tier("sliding_window", "10/hour, 20/minute"), ["20/minute by 10/hour"]);
    assert_eq!(tier("token_bucket", "10/minute, 600/hour"), ["600/hour by 10/minute"]);
    assert_eq!(tier("token_bucket", "10/minute, 599/hour"), [""; 0]);
    assert_eq!(
        tier("token_bucket", "10/minute burst 20, 600/hour burst 19"),
        ["10/minute burst 20 by 600/hour burst 19"]
    );
    // Two that say the same: the later one goes.
    assert_eq!(
        tier("token_bucket", "60/minute burst 9, 1/second burst 9"),
        ["1/second burst 9 by 60/minute burst 9"]
    );
}

#[test]
fn money_without_prices() {
    let warning = |line: u32,
                   col: u32,
                   index: usize,
                   provider: &str,
                   model: &str,
                   quota: &str,
                   rule: &str| {
        format!(
            "t.yml:{line}:{col}: warning: models[{index}].providers[0]: `{quota}` of rule `{rule}` counts nothing for provider `{provider}` of model `{model}`: it has no price; give it one: price: {{ input: 0.15, output: 0.60 }}"
        )
    };
    let warnings = |more: &str, fallback: bool| {
        let priced = "providers: [{ type: simulated, price: { input: 1, output: 2 } }]";
        let text = format!(
            "models:\n  - {{ name: a, {}{priced} }}\n  - {{ name: b, providers: [{{ type: simulated }}] }}\nauth: optional\n{more}",
            if fallback { "fallback: b, " } else { "" }
        );
        lines(&load_file(&text, &super::nothing).unwrap().warnings)
    };
    let b = |quota, rule| warning(3, 28, 1, "simulated", "b", quota, rule);
    let rule = |matches: &str| {
        format!("limits: [{{ name: r, per: global, limit: $1/day, match: {{ {matches} }} }}]\n")
    };
    assert_eq!(warnings(&rule("authenticated: false"), false), [b("$1/day", "r")]);
    assert_eq!(warnings(&rule("model: b"), false), [b("$1/day", "r")]);
    assert_eq!(warnings(&rule("model: a"), false), [""; 0]);
    // What a request falls back to is counted by the rules of the model it asked for.
    assert_eq!(warnings(&rule("model: a"), true), [b("$1/day", "r")]);
    let tier = "tiers: { t: $5/month }\nusers: [{ name: u, tier: t, models: [a], keys: [k] }]\n";
    assert_eq!(warnings(tier, true), [""; 0]);
    assert_eq!(warnings(&tier.replace("models: [a], ", ""), false), [b("$5/month", "t")]);
    assert_eq!(warnings("limits: [{ name: r, per: ip, limit: 5 tokens/day }]\n", false), [""; 0]);
}

#[test]
fn sessions_of_strangers() {
    let session = "limits:\n  - { name: s, per: session, limit: 5/minute }\n";
    assert_eq!(
        said(session),
        [
            "t.yml:2:37: warning: limits[0].limit: rule `s` is per session, and no rule is per ip; add one for the same requests, because a User-Agent is free to change"
        ]
    );
    assert_eq!(said(&format!("{session}  - {{ name: i, per: ip, limit: 50/minute }}\n")), [""; 0]);
    let elsewhere = format!("{session}  - {{ name: i, per: ip, limit: 50/minute, match: {{ model: a }} }}\n");
    assert_eq!(said(&elsewhere).len(), 1);
    let known = session.replace("session,", "session, match: { authenticated: true },");
    assert_eq!(said(&known), [""; 0]);
}

#[test]
fn nobody_there() {
    assert_eq!(
        said("tiers:\n  gold: 1/minute\n"),
        ["t.yml:2:3: warning: tiers.gold: no user is in this tier"]
    );
    assert_eq!(
        said("limits:\n  - { name: r, deny: true }\n"),
        ["t.yml:2:16: warning: limits[0].deny: this refuses every request; say under `match` which ones"]
    );
    assert_eq!(
        said(
            "users: [{ name: u, team: red }]\nlimits:\n  - { name: r, per: ip, limit: 1/minute, match: { team: rod } }\n"
        ),
        [
            "t.yml:3:57: warning: limits[0].match.team: nobody is in team `rod`; did you mean `red`? allowed: red"
        ]
    );
    let typo = said("limits:\n  - { name: r, per: ip, limit: 1/minute, match: { endpoint: /v1/image/* } }\n");
    assert!(
        typo[0].starts_with("t.yml:2:61: warning: limits[0].match.endpoint: no route is like `/v1/image/*`;"),
        "{typo:?}"
    );
    let required = file("").replace("auth: optional\n", "");
    assert_eq!(
        lines(&load_file(&required, &super::nothing).unwrap().warnings),
        [
            "t.yml:1:1: warning: auth: a key is required and there is none: every request is refused; add `users` with keys, set API_KEYS, or write `auth: optional`"
        ]
    );
}

#[test]
fn variables_that_lose() {
    let set = [("TOLLGATE_LISTEN", "127.0.0.1:1"), ("API_KEYS", "k"), ("REQUEST_RATE_LIMIT", "5")];
    let env = variables(&set);
    let warnings = |more: &str| lines(&load_file(&file(more), &env).unwrap().warnings);
    assert_eq!(warnings(""), [""; 0]);
    assert_eq!(
        warnings("server: { listen: 127.0.0.1:2 }\nusers: [{ name: u }]\nlimits: []\n"),
        [
            "environment: warning: TOLLGATE_LISTEN: has no effect: the file says `server.listen` at t.yml:5:11; unset it, or write ${TOLLGATE_LISTEN} in the file",
            "environment: warning: REQUEST_RATE_LIMIT: has no effect: the file says `limits` at t.yml:7:1; unset it, or write ${REQUEST_RATE_LIMIT} in the file",
            "environment: warning: API_KEYS: has no effect: the file says `users` at t.yml:6:1; unset it, or write ${API_KEYS} in the file",
        ]
    );
    assert_eq!(warnings("server: { listen: \"${TOLLGATE_LISTEN}\" }\n"), [""; 0]);
}
