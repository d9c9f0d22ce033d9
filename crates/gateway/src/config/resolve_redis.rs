//! `dependencies.redis`: one URL out of the two forms, and the files of TLS.

use std::path::PathBuf;

use super::keys::REDIS;
use super::kind::join;
use super::pem;
use super::problem::Problems;
use super::redis_url::{self, RedisUrl};
use super::resolve::{duration, integer, read, texts};
use super::scalar::{self, Fault};
use super::tree::{Node, Value};
use super::{Redis, RedisTls, Secret};

const PATH: &str = "dependencies.redis";

/// The keys that say together what `url` says alone.
pub(super) const PARTS: [&str; 5] = ["host", "port", "username", "password", "db"];

/// Reads `dependencies.redis`. `None`: there is none, or something is wrong with it.
pub(super) fn redis(root: &Node, problems: &mut Problems) -> Option<Redis> {
    let node = &root.get("dependencies")?.value.get("redis")?.value;
    if !matches!(node.value, Value::Map(_)) {
        return None;
    }
    let url = match node.get("url") {
        Some(_) => whole(node, problems),
        None => of_parts(node, problems),
    };
    let (url, files) = tls(node, url, problems);
    let url = url?;
    Some(Redis {
        url: Secret::new(url.whole()),
        address: url.address(),
        tls: files,
        timeout: duration(node, REDIS.key("timeout")?)?,
        prefix: read(node, "prefix", |text| redis_url::prefix(text).map(|()| text.to_owned()))?,
    })
}

fn whole(node: &Node, problems: &mut Problems) -> Option<RedisUrl> {
    for entry in PARTS.iter().filter_map(|key| node.get(key)) {
        let help = "write `url`, or `host` with `port`, `username`, `password` and `db`";
        problems.error(entry.at, &join(PATH, &entry.key), "`url` says it already", help);
    }
    read(node, "url", RedisUrl::parse)
}

fn of_parts(node: &Node, problems: &mut Problems) -> Option<RedisUrl> {
    if node.get("host").is_none() {
        let help = "write url: redis://localhost:6379/0, or host: localhost, or set REDIS_URL or REDIS_ADDR";
        problems.error(node.at, PATH, "neither `url` nor `host` is here", help);
    }
    let text = |key: &str, check: fn(&str) -> Result<(), Fault>| {
        read(node, key, |text| check(text).map(|()| text.to_owned()))
    };
    let number = |key: &str| integer(node, REDIS.key(key)?);
    let port = number("port").and_then(|port| u16::try_from(port).ok());
    let (username, password) = (text("username", redis_url::username), text("password", redis_url::password));
    let server = RedisUrl::server(&text("host", redis_url::host)?, port);
    Some(server.signed_in(username, password, number("db").unwrap_or_default()))
}

/// The files of `tls`. One server named by a URL says in its scheme whether TLS is spoken; in all other cases `tls` says it.
fn tls(node: &Node, url: Option<RedisUrl>, problems: &mut Problems) -> (Option<RedisUrl>, RedisTls) {
    let Some(entry) = node.get("tls") else {
        return (url, RedisTls::default());
    };
    let path = join(PATH, "tls");
    let files = RedisTls {
        ca: file(&entry.value, "ca", pem::certificates, problems),
        cert: file(&entry.value, "cert", pem::certificates, problems),
        key: file(&entry.value, "key", pem::private_key, problems),
    };
    for (key, other) in [("cert", "key"), ("key", "cert")] {
        if let (Some(lonely), None) = (entry.value.get(key), entry.value.get(other)) {
            let message = format!("there is no `{other}` beside it");
            problems.error(lonely.at, &join(&path, key), message, "a certificate and its key come together");
        }
    }
    let by_scheme = node.get("url").is_some();
    if let Some(url) = &url {
        if url.is_socket() {
            problems.error(entry.at, &path, "`url` is a socket, and there is no TLS on one", "remove `tls`");
        } else if by_scheme && url.is_server() && !url.is_tls() {
            problems.error(
                entry.at,
                &path,
                "`url` begins with redis://, which is without TLS",
                "write rediss://",
            );
        }
    }
    (url.map(RedisUrl::with_tls), files)
}

fn file(
    node: &Node,
    key: &str,
    check: fn(&std::path::Path) -> Result<(), Fault>,
    problems: &mut Problems,
) -> Option<PathBuf> {
    let items = texts(node, key, &join(PATH, "tls"));
    let item = items.first().filter(|item| scalar::name(item.text).is_ok())?;
    let path = PathBuf::from(item.text);
    if let Err(Fault { what, help }) = check(&path) {
        let name = if item.expanded { "the file".to_owned() } else { item.quoted() };
        problems.error(item.at, &item.path, format!("{name} {what}"), help);
    }
    Some(path)
}
