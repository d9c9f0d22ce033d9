//! `dependencies.redis`: its two forms, TLS, and what the environment adds.

use std::time::Duration;

use tollgate_limiter::WhenDown;

use super::super::Redis;
use super::{file, lines, load, load_file, nothing, said, variables};

/// What `dependencies.redis` with these keys (of a flow mapping) means.
fn redis(keys: &str, set: &[(&str, &str)]) -> Redis {
    let text = file(&format!("dependencies: {{ redis: {{ {keys} }} }}\n"));
    let loaded = load_file(&text, &variables(set)).map_err(|problems| lines(&problems)).unwrap();
    assert_eq!(lines(&loaded.warnings), [""; 0]);
    loaded.config.redis.unwrap()
}

#[test]
fn urls() {
    for (written, whole, address) in [
        ("redis://h", "redis://h:6379/0", "redis://h:6379/0"),
        ("redis://:@h:1/", "redis://h:1/0", "redis://h:1/0"),
        ("rediss://u:p@[::1]:7/15", "rediss://u:p@[::1]:7/15", "rediss://[::1]:7/15"),
        ("redis://u@h", "redis://u@h:6379/0", "redis://h:6379/0"),
        ("redis://:a@b%2f%25:c@h", "redis://:a%40b%2F%25%3Ac@h:6379/0", "redis://h:6379/0"),
        ("unix:///run/r.sock", "unix:///run/r.sock", "unix:///run/r.sock"),
        ("unix://u:p@/run/r.sock?db=3", "unix:///run/r.sock?db=3&user=u&pass=p", "unix:///run/r.sock?db=3"),
        ("unix:///r?user=u&pass=p%20", "unix:///r?user=u&pass=p%20", "unix:///r"),
        (
            "redis+sentinel://:p@h1:1,h2/my master/3",
            "redis+sentinel://:p@h1:1,h2:26379/my%20master/3",
            "redis+sentinel://h1:1,h2:26379/my%20master/3",
        ),
        ("rediss+sentinel://h/m", "rediss+sentinel://h:26379/m/0", "rediss+sentinel://h:26379/m/0"),
        (
            "redis+sentinel://h/m?sentinel_password=p%26q&sentinel_username=u",
            "redis+sentinel://h:26379/m/0?sentinel_username=u&sentinel_password=p%26q",
            "redis+sentinel://h:26379/m/0",
        ),
        (
            "redis+cluster://u:p@h1:7000,h2",
            "redis+cluster://u:p@h1:7000,h2:6379",
            "redis+cluster://h1:7000,h2:6379",
        ),
    ] {
        let found = redis(&format!("url: '{}'", written.replace(' ', "%20")), &[]);
        assert_eq!((found.url.expose(), found.address.as_str()), (whole, address), "{written}");
        assert_eq!((found.timeout, found.prefix.as_str()), (Duration::from_millis(50), "tollgate"));
    }
}

#[test]
fn what_limits_do_while_it_is_down() {
    let limits = "limits:\n  - { name: a, per: ip, limit: 1/minute }\n  - { name: b, per: ip, limit: 1/minute, when_down: open }\n";
    for (keys, expected) in [
        ("host: h", [WhenDown::Share, WhenDown::Open]),
        ("host: h, when_down: closed", [WhenDown::Closed, WhenDown::Open]),
    ] {
        let text = file(&format!("dependencies: {{ redis: {{ {keys} }} }}\n{limits}"));
        let config = load_file(&text, &nothing).map_err(|problems| lines(&problems)).unwrap().config;
        let found: Vec<WhenDown> = config.limits().map(|(_, limit)| limit.while_down()).collect();
        assert_eq!(found, expected, "{keys}");
    }
    let wrong = said("dependencies: { redis: { host: h, when_down: opn } }\n");
    assert_eq!(wrong.len(), 1, "{wrong:?}");
    assert!(wrong[0].contains("share, open, closed"), "{wrong:?}");
}

#[test]
fn parts() {
    for (keys, whole) in [
        ("host: h", "redis://h:6379/0"),
        ("host: '::1', port: 1, db: 2", "redis://[::1]:1/2"),
        ("host: '[::1]', username: '', password: ''", "redis://[::1]:6379/0"),
        ("host: h, password: 'a@b/c d'", "redis://:a%40b%2Fc%20d@h:6379/0"),
        ("host: h, username: ü, password: p", "redis://%C3%BC:p@h:6379/0"),
        ("host: h, tls: {}", "rediss://h:6379/0"),
    ] {
        assert_eq!(redis(keys, &[]).url.expose(), whole, "{keys}");
    }
    let more = redis("host: h, timeout: 1s, prefix: 'my:app'", &[]);
    assert_eq!((more.timeout, more.prefix.as_str()), (Duration::from_secs(1), "my:app"));
    assert!(load_file(&file("dependencies: {}\n"), &nothing).unwrap().config.redis.is_none());
    assert!(load_file(&file("dependencies:\n"), &nothing).unwrap().config.redis.is_none());
}

#[test]
fn what_a_variable_holds_is_encoded_before_the_at_sign_only() {
    let contract =
        "url: 'redis://:${REDIS_PASSWORD:-}@${REDIS_HOST:-localhost}:${REDIS_PORT:-6379}/${REDIS_DB:-0}'";
    assert_eq!(redis(contract, &[]).url.expose(), "redis://localhost:6379/0");
    let set = [("REDIS_PASSWORD", "p@s/s:#%40?"), ("REDIS_HOST", "10.0.0.5"), ("REDIS_DB", "4")];
    assert_eq!(redis(contract, &set).url.expose(), "redis://:p%40s%2Fs%3A%23%2540%3F@10.0.0.5:6379/4");
    let whole = [("R", "rediss://u:p%40@h")];
    assert_eq!(redis("url: '${R}'", &whole).url.expose(), "rediss://u:p%40@h:6379/0");
    let default = redis("url: 'redis://${U:-a/b}:${P:-@}@h'", &[]);
    assert_eq!(default.url.expose(), "redis://a%2Fb:%40@h:6379/0");
    let hosts = redis("url: 'redis+cluster://${HOSTS}'", &[("HOSTS", "u:p@h1,h2")]);
    assert_eq!(hosts.url.expose(), "redis+cluster://u:p@h1:6379,h2:6379");
}

#[test]
fn faults() {
    let help = "write redis://host:6379/0, rediss://…, unix:///path, redis+sentinel://h1,h2/master/0 or redis+cluster://h1,h2";
    for (url, expected) in [
        ("localhost", format!("is not the URL of a Redis; {help}")),
        ("http://h", format!("is not the URL of a Redis; {help}")),
        ("redis://", "has no host; write localhost:6379".to_owned()),
        ("redis://h:x", "has a port that is none; allowed: 1 to 65535".to_owned()),
        ("redis://h:0", "has a port that is none; allowed: 1 to 65535".to_owned()),
        ("redis://h/x", "has a database that is none; allowed after the host: a number from 0 to 65535".to_owned()),
        ("redis://h?a=b", format!("has a query or a fragment; {help}")),
        ("rediss://h/#insecure", format!("has a query or a fragment; {help}")),
        ("redis://h1,h2", "names several servers; several servers: redis+sentinel://h1,h2/master/0 or redis+cluster://h1,h2".to_owned()),
        ("redis://:a b@h", format!("contains spaces or control characters; {help}")),
        ("redis://%ff@h", format!("is not UTF-8 behind its percent signs; {help}")),
        ("redis://:$${A}@h", "still contains `${`; a variable is replaced once; what it holds is not".to_owned()),
        ("unix://run/r.sock", "names no socket; write unix:///run/redis.sock, with three slashes".to_owned()),
        ("unix:///r?x=1", "has an unknown query; allowed: unix:///path?db=0&user=…&pass=…".to_owned()),
        ("redis+sentinel://h/m?x=1", "has an unknown query; allowed: redis+sentinel://h1,h2/master/0?sentinel_username=…&sentinel_password=…".to_owned()),
        ("redis+sentinel://h", "names no master; redis+sentinel://h1:26379,h2:26379/mymaster/0".to_owned()),
        ("redis+cluster://h/1", "names a database; a cluster has only the first one".to_owned()),
    ] {
        assert_eq!(
            said(&format!("dependencies: {{ redis: {{ url: '{url}' }} }}\n")),
            [format!("t.yml:1:31: dependencies.redis.url: the value {expected}")]
        );
    }
    let forms = "write `url`, or `host` with `port`, `username`, `password` and `db`";
    for (keys, expected) in [
        (
            "url: 'redis://h', db: 1, host: h",
            vec![
                format!("t.yml:1:44: dependencies.redis.db: `url` says it already; {forms}"),
                format!("t.yml:1:51: dependencies.redis.host: `url` says it already; {forms}"),
            ],
        ),
        (
            "port: 1",
            vec!["t.yml:1:24: dependencies.redis: neither `url` nor `host` is here; write url: redis://localhost:6379/0, or host: localhost, or set REDIS_URL or REDIS_ADDR".to_owned()],
        ),
        (
            "host: 'h:1', port: 0, db: -1, prefix: 'a{b}', timeout: 11s, when_down: open",
            vec![
                "t.yml:1:32: dependencies.redis.host: `h:1` is not a host; write a name or an address, such as localhost or 10.0.0.5; the port has a key of its own".to_owned(),
                "t.yml:1:45: dependencies.redis.port: `0` is out of range; allowed: 1 to 65535".to_owned(),
                "t.yml:1:52: dependencies.redis.db: `-1` is not a whole number; allowed: 0 to 65535".to_owned(),
                "t.yml:1:64: dependencies.redis.prefix: `a{b}` cannot begin keys; allowed: 1 to 64 bytes without braces, spaces and control characters".to_owned(),
                "t.yml:1:81: dependencies.redis.timeout: `11s` is out of range; allowed: 1ms to 10s".to_owned(),
            ],
        ),
        (
            "url: 'redis://h', tls: {}",
            vec!["t.yml:1:44: dependencies.redis.tls: `url` begins with redis://, which is without TLS; write rediss://".to_owned()],
        ),
        (
            "url: 'unix:///r', tls: {}",
            vec!["t.yml:1:44: dependencies.redis.tls: `url` is a socket, and there is no TLS on one; remove `tls`".to_owned()],
        ),
    ] {
        let found = said(&format!("dependencies: {{ redis: {{ {keys} }} }}\n"));
        assert_eq!(found, expected);
    }
}

#[test]
fn files_of_tls() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let pem = |label: &str| format!("-----BEGIN {label}-----\nMAA=\n-----END {label}-----\n");
    let (ca, key) = (write("ca.pem", &pem("CERTIFICATE")), write("key.pem", &pem("PRIVATE KEY")));
    let empty = write("empty.pem", "nothing here\n");
    let found = redis(&format!("url: 'rediss://h', tls: {{ ca: {ca}, cert: {ca}, key: {key} }}"), &[]);
    assert_eq!(found.tls.ca.unwrap().display().to_string(), ca);
    assert!(found.tls.cert.is_some() && found.tls.key.is_some());
    let sentinel = redis(&format!("url: 'redis+sentinel://h/m', tls: {{ ca: {ca} }}"), &[]);
    assert_eq!(sentinel.url.expose(), "rediss+sentinel://h:26379/m/0");

    let dir = folder.path().display();
    let tls = |keys: &str| {
        let said = said(&format!("dependencies:\n  redis:\n    host: h\n    tls: {{ {keys} }}\n"));
        said.into_iter().map(|line| line.split_once(": ").unwrap().1.to_owned()).collect::<Vec<_>>()
    };
    let place = "dependencies.redis.tls";
    // A folder in a temporary directory may have a long name, which messages shorten.
    let starts = |found: Vec<String>, key: &str, end: &str| {
        assert!(found.len() == 1 && found[0].starts_with(&format!("{place}.{key}: ")), "{found:?}");
        assert!(found[0].contains(end), "{found:?}");
    };
    starts(tls(&format!("ca: {dir}/none.pem")), "ca", "cannot be read: No such file");
    starts(tls(&format!("ca: {dir}")), "ca", "is not a file");
    starts(tls(&format!("ca: {empty}")), "ca", "holds no certificate; it is PEM");
    starts(tls(&format!("cert: {ca}, key: {empty}")), "key", "holds no private key; it is PEM");
    let lonely =
        |other: &str| format!("there is no `{other}` beside it; a certificate and its key come together");
    starts(tls(&format!("cert: {ca}")), "cert", &lonely("key"));
    starts(tls(&format!("key: {key}")), "key", &lonely("cert"));
}

#[test]
fn passwords_stay_hidden() {
    let text = file("dependencies: { redis: { url: 'redis://me:canary@h' } }\n");
    let loaded = load_file(&text, &nothing).unwrap();
    assert!(!format!("{loaded:?}").contains("canary"));
    assert_eq!(loaded.effective["config"]["dependencies"]["redis"]["url"], "redis://me:***@h:6379/0");
    let text = file("dependencies: { redis: { host: h, password: canary } }\n");
    let loaded = load_file(&text, &nothing).unwrap();
    assert!(!format!("{loaded:?}").contains("canary"));
    assert_eq!(loaded.effective["config"]["dependencies"]["redis"]["password"], "***");
    let faulty = said("dependencies: { redis: { url: 'redis://:canary@h/x', password: canary } }\n");
    assert!(faulty.len() == 2 && !faulty.concat().contains("canary"), "{faulty:?}");
}

#[test]
fn the_environment_alone() {
    let redis = |set: &[(&str, &str)]| {
        let set = [set, &[("TOLLGATE_UPSTREAM", "http://x")]].concat();
        let loaded = load(None, &variables(&set)).map_err(|problems| lines(&problems)).unwrap();
        (loaded.config.redis.map(|redis| redis.url.expose().to_owned()), lines(&loaded.warnings))
    };
    let is = |url: &str| (Some(url.to_owned()), Vec::new());
    assert_eq!(redis(&[]), (None, Vec::new()));
    assert_eq!(redis(&[("REDIS_URL", "rediss://:p@h/1")]), is("rediss://:p@h:6379/1"));
    assert_eq!(redis(&[("REDIS_ADDR", "h:1")]), is("redis://h:1/0"));
    let three = [("REDIS_ADDR", "[::1]"), ("REDIS_PASSWORD", "a@b"), ("REDIS_DB", "2")];
    assert_eq!(redis(&three), is("redis://:a%40b@[::1]:6379/2"));
    let both = [&three[..], &[("REDIS_URL", "redis://h")]].concat();
    let loses = |variable| format!("environment: warning: {variable}: has no effect: REDIS_URL is set");
    let losers = ["REDIS_ADDR", "REDIS_PASSWORD", "REDIS_DB"].map(loses).to_vec();
    assert_eq!(redis(&both), (Some("redis://h:6379/0".to_owned()), losers));
    let alone = "environment: warning: REDIS_PASSWORD: has no effect: REDIS_ADDR is not set".to_owned();
    assert_eq!(redis(&[("REDIS_PASSWORD", "p")]), (None, vec![alone]));

    let upstream = ("TOLLGATE_UPSTREAM", "http://x");
    let refused =
        |variable, value| lines(&load(None, &variables(&[upstream, (variable, value)])).unwrap_err());
    assert_eq!(
        refused("REDIS_ADDR", "h:port"),
        ["environment: REDIS_ADDR: `h:port` has a port that is none; allowed: 1 to 65535"]
    );
    assert!(
        refused("REDIS_URL", "h:6379")[0].starts_with("environment: REDIS_URL: the value is not the URL")
    );
}

#[test]
fn the_environment_beside_a_file() {
    let set = [("REDIS_URL", "redis://e"), ("REDIS_ADDR", "e:1"), ("REDIS_PASSWORD", "p"), ("REDIS_DB", "2")];
    let load = |more: &str, set: &[(&str, &str)]| {
        let loaded = load_file(&file(more), &variables(set)).map_err(|problems| lines(&problems)).unwrap();
        let warnings = loaded.warnings.iter().map(|warning| warning.path.clone()).collect::<Vec<_>>();
        (loaded.config.redis.unwrap(), warnings)
    };
    let (url, losers) = load("dependencies: { redis: { url: 'redis://f' } }\n", &set);
    assert_eq!(url.url.expose(), "redis://f:6379/0");
    assert_eq!(losers, ["REDIS_URL", "REDIS_ADDR", "REDIS_PASSWORD", "REDIS_DB"]);
    let (named, losers) = load("dependencies: { redis: { url: '${REDIS_URL}' } }\n", &set[..1]);
    assert_eq!((named.url.expose(), losers.len()), ("redis://e:6379/0", 0));
    // The file says where; what it leaves out is taken from the environment.
    let (host, losers) = load("dependencies: { redis: { host: f } }\n", &set);
    assert_eq!(
        (host.url.expose(), losers),
        ("redis://:p@f:6379/2", vec!["REDIS_URL".to_owned(), "REDIS_ADDR".to_owned()])
    );
    let (none, losers) = load("dependencies: { redis: { timeout: 1s } }\n", &set[1..]);
    assert_eq!(
        (none.url.expose(), none.timeout, losers.len()),
        ("redis://:p@e:1/2", Duration::from_secs(1), 0)
    );
    let (whole, losers) = load("dependencies:\n  redis:\n", &set[..1]);
    assert_eq!((whole.url.expose(), losers.len()), ("redis://e:6379/0", 0));
}
