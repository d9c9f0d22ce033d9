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
    // Seven days and a calendar month do not begin together.
    assert_eq!(tier("10/week, 5/month"), [""; 0]);
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
    let set = [
        ("TOLLGATE_LISTEN", "127.0.0.1:1"),
        ("API_KEYS", "k"),
        ("REQUEST_RATE_LIMIT", "5"),
        ("REDIS_URL", "r"),
    ];
    let env = variables(&set);
    let warnings = |more: &str| lines(&load_file(&file(more), &env).unwrap().warnings);
    let redis = "environment: warning: REDIS_URL: has no effect: this version keeps limits in memory, for this process alone";
    assert_eq!(warnings(""), [redis]);
    assert_eq!(
        warnings("server: { listen: 127.0.0.1:2 }\nusers: [{ name: u }]\nlimits: []\n"),
        [
            "environment: warning: TOLLGATE_LISTEN: has no effect: the file says `server.listen` at t.yml:5:11; unset it, or write ${TOLLGATE_LISTEN} in the file",
            "environment: warning: REQUEST_RATE_LIMIT: has no effect: the file says `limits` at t.yml:7:1; unset it, or write ${REQUEST_RATE_LIMIT} in the file",
            redis,
            "environment: warning: API_KEYS: has no effect: the file says `users` at t.yml:6:1; unset it, or write ${API_KEYS} in the file",
        ]
    );
    assert_eq!(warnings("server: { listen: \"${TOLLGATE_LISTEN}\" }\n"), [redis]);
}
