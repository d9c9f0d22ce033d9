//! What a URL says: which servers, as whom, and which database.

use std::fmt;
use std::path::PathBuf;

use ::redis::RedisConnectionInfo;

use crate::names::excerpt;

/// The most servers that one URL may name.
const SERVERS_MAX: usize = 64;
const REDIS_PORT: u16 = 6379;
const SENTINEL_PORT: u16 = 26379;

/// One server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Endpoint {
    Tcp(String, u16),
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(host, port) if host.contains(':') => write!(f, "[{host}]:{port}"),
            Endpoint::Tcp(host, port) => write!(f, "{host}:{port}"),
            Endpoint::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

/// Which servers there are, and which of them is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Servers {
    Single(Endpoint),
    Sentinel { sentinels: Vec<Endpoint>, master: String },
    Cluster(Vec<Endpoint>),
}

/// A URL, read.
#[derive(Clone, Debug)]
pub(super) struct Address {
    pub(super) servers: Servers,
    pub(super) tls: bool,
    /// Of the servers that count.
    pub(super) login: RedisConnectionInfo,
    /// Of the sentinels.
    pub(super) sentinel_login: RedisConnectionInfo,
}

impl Address {
    /// Reads a URL. What is wrong with one is said without its password.
    pub(super) fn parse(url: &str) -> Result<Address, String> {
        let (scheme, rest) = url.split_once("://").ok_or("it has no scheme; write `redis://host:6379`")?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (tls, kind) = match scheme {
            "redis" | "valkey" => (false, ""),
            "rediss" | "valkeys" => (true, ""),
            "unix" | "redis+unix" => return unix(rest, query),
            _ => match scheme.split_once('+') {
                Some(("redis" | "valkey", kind @ ("sentinel" | "cluster"))) => (false, kind),
                Some(("rediss" | "valkeys", kind @ ("sentinel" | "cluster"))) => (true, kind),
                _ => {
                    let allowed = "redis, rediss, unix, redis+sentinel, redis+cluster, rediss+sentinel, \
                                   rediss+cluster";
                    return Err(format!("the scheme `{}` is not known; allowed: {allowed}", excerpt(scheme)));
                }
            },
        };
        let (user, rest) = rest.rsplit_once('@').unwrap_or(("", rest));
        let (hosts, path) = rest.split_once('/').unwrap_or((rest, ""));
        let mut login = login(user)?;
        let mut sentinel_login = RedisConnectionInfo::default();
        for (name, value) in parameters(query)? {
            match (kind, name) {
                ("sentinel", "sentinel_username") => sentinel_login = sentinel_login.set_username(value),
                ("sentinel", "sentinel_password") => sentinel_login = sentinel_login.set_password(value),
                ("sentinel", _) => return Err(unknown(name, "sentinel_username, sentinel_password")),
                _ => return Err(unknown(name, "none")),
            }
        }
        let servers = match kind {
            "sentinel" => {
                let (master, database) = path.split_once('/').unwrap_or((path, ""));
                if master.is_empty() {
                    return Err("it does not name the master: `redis+sentinel://host:26379/mymaster`".into());
                }
                login = login.set_db(number(database)?);
                Servers::Sentinel { sentinels: endpoints(hosts, SENTINEL_PORT)?, master: decoded(master)? }
            }
            "cluster" if number(path)? != 0 => return Err("a cluster has no database but 0".into()),
            "cluster" => Servers::Cluster(endpoints(hosts, REDIS_PORT)?),
            _ => {
                login = login.set_db(number(path)?);
                Servers::Single(endpoint(hosts, REDIS_PORT)?)
            }
        };
        Ok(Address { servers, tls, login: quiet(login), sentinel_login: quiet(sentinel_login) })
    }
}

/// `/path/to/socket`, with `db`, `user` and `pass` as parameters.
fn unix(path: &str, query: &str) -> Result<Address, String> {
    let mut login = RedisConnectionInfo::default();
    for (name, value) in parameters(query)? {
        login = match name {
            "db" => login.set_db(number(&value)?),
            "user" => login.set_username(value),
            "pass" => login.set_password(value),
            _ => return Err(unknown(name, "db, user, pass")),
        };
    }
    if !path.starts_with('/') {
        return Err("a socket is named by an absolute path: `unix:///run/redis.sock`".into());
    }
    let servers = Servers::Single(Endpoint::Unix(decoded(path)?.into()));
    let sentinel_login = RedisConnectionInfo::default();
    Ok(Address { servers, tls: false, login: quiet(login), sentinel_login })
}

/// Says no more about itself than it must: `CLIENT SETINFO` is a refused command on many servers.
fn quiet(login: RedisConnectionInfo) -> RedisConnectionInfo {
    login.set_skip_set_lib_name()
}

/// `user:password`, `:password` or `user`. An empty one is none.
fn login(text: &str) -> Result<RedisConnectionInfo, String> {
    let (user, password) = text.split_once(':').unwrap_or((text, ""));
    let mut login = RedisConnectionInfo::default();
    if !user.is_empty() {
        login = login.set_username(decoded(user)?);
    }
    if !password.is_empty() {
        login = login.set_password(decoded(password)?);
    }
    Ok(login)
}

fn parameters(query: &str) -> Result<Vec<(&str, String)>, String> {
    let pairs = query.split('&').filter(|pair| !pair.is_empty());
    // A piece without `=` may be the rest of a password: it is not repeated.
    let wrong = "after `?` come `name=value` pairs; in a password write `?` as %3F and `#` as %23";
    pairs
        .map(|pair| {
            let (name, value) = pair.split_once('=').ok_or(wrong)?;
            Ok((name, decoded(value)?))
        })
        .collect()
}

fn unknown(name: &str, allowed: &str) -> String {
    format!("the parameter `{}` is not known; allowed: {allowed}", excerpt(name))
}

fn number(text: &str) -> Result<i64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    let found = text.parse().ok().filter(|number| (0..=i64::from(u16::MAX)).contains(number));
    found.ok_or_else(|| format!("`{}` is no number of a database", excerpt(text)))
}

fn endpoints(text: &str, port: u16) -> Result<Vec<Endpoint>, String> {
    let endpoints: Vec<Endpoint> =
        text.split(',').map(|one| endpoint(one, port)).collect::<Result<_, _>>()?;
    if endpoints.len() > SERVERS_MAX {
        return Err(format!("it names {} servers; at most {SERVERS_MAX} are allowed", endpoints.len()));
    }
    Ok(endpoints)
}

/// `host`, `host:port`, `[v6]:port`.
fn endpoint(text: &str, default: u16) -> Result<Endpoint, String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or("a `[` without its `]`")?;
            (host, port.strip_prefix(':').unwrap_or(port))
        }
        None => text.split_once(':').unwrap_or((text, "")),
    };
    if host.is_empty() {
        return Err("it names no host".into());
    }
    let port = if port.is_empty() { Some(default) } else { port.parse().ok().filter(|port| *port > 0) };
    // What stands there may be a piece of a password: it is not repeated.
    let port =
        port.ok_or("a port is a number from 1 to 65535; in a password write `/` as %2F, `?` as %3F")?;
    Ok(Endpoint::Tcp(host.to_string(), port))
}

/// An address as servers announce it: `host:port`, where a v6 host has no brackets.
pub(super) fn announced(text: &str) -> Option<Endpoint> {
    let (host, port) = text.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some(Endpoint::Tcp(host.to_string(), port.parse().ok()?))
}

/// With `%2F` read as what it means.
fn decoded(text: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        bytes.push(match byte {
            b'%' => match (digit(rest.next()), digit(rest.next())) {
                (Some(high), Some(low)) => (high * 16 + low) as u8,
                _ => return Err("a `%` without two hexadecimal digits; write `%` as %25".into()),
            },
            other => other,
        });
    }
    String::from_utf8(bytes).map_err(|_| "it decodes to bytes that are no text".into())
}

#[cfg(test)]
mod tests {
    use super::{Address, Endpoint, Servers};

    fn tcp(host: &str, port: u16) -> Endpoint {
        Endpoint::Tcp(host.to_string(), port)
    }

    #[test]
    fn urls_say_where_and_as_whom() {
        let read = |url: &str| Address::parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
        let plain = read("redis://:@localhost:6379/0");
        assert_eq!(plain.servers, Servers::Single(tcp("localhost", 6379)));
        assert_eq!((plain.login.username(), plain.login.password(), plain.tls), (None, None, false));
        let full = read("rediss://ann:p%40s%2Fs:x@[::1]:7000/3");
        assert_eq!(full.servers, Servers::Single(tcp("::1", 7000)));
        assert_eq!(full.login.username(), Some("ann"));
        assert_eq!(full.login.password(), Some("p@s/s:x"));
        assert_eq!((full.login.db(), full.tls), (3, true));
        let socket = read("unix:///run/redis.sock?db=2&pass=x");
        assert_eq!(socket.servers, Servers::Single(Endpoint::Unix("/run/redis.sock".into())));
        assert_eq!((socket.login.db(), socket.login.password()), (2, Some("x")));
        let watched = read("redis+sentinel://:pw@h1,h2:26380/mymaster/1?sentinel_password=s");
        let sentinels = vec![tcp("h1", 26379), tcp("h2", 26380)];
        assert_eq!(watched.servers, Servers::Sentinel { sentinels, master: "mymaster".into() });
        assert_eq!((watched.login.password(), watched.sentinel_login.password()), (Some("pw"), Some("s")));
        assert_eq!(watched.login.db(), 1);
        let cluster = read("rediss+cluster://h1:7000,h2:7001");
        assert_eq!(cluster.servers, Servers::Cluster(vec![tcp("h1", 7000), tcp("h2", 7001)]));
        assert!(cluster.tls);
    }

    #[test]
    fn what_is_no_url_is_told_without_its_password() {
        let wrong = [
            ("localhost:6379", "no scheme"),
            ("http://localhost", "`http` is not known"),
            ("redis://", "names no host"),
            ("redis://h:0", "a port is"),
            ("redis://u:hunter2?x@h", "name=value"),
            ("redis://u:hunter2/x@h/y", "no number of a database"),
            ("redis://:hunter2%zz@h", "hexadecimal"),
            ("redis://:hunter2@h/?db=1", "`db` is not known"),
            ("redis+sentinel://:hunter2@h", "does not name the master"),
            ("redis+cluster://h/1", "no database but 0"),
            ("unix://relative.sock", "absolute path"),
            ("redis://[::1", "without its `]`"),
        ];
        for (url, words) in wrong {
            let problem = Address::parse(url).map(|_| ()).expect_err(url);
            assert!(problem.contains(words) && !problem.contains("hunter"), "{url}: {problem}");
        }
        let many = format!("redis+cluster://{}", vec!["h"; 65].join(","));
        assert!(Address::parse(&many).is_err());
    }

    #[test]
    fn addresses_are_shown_as_written() {
        let shown = [tcp("::1", 1), tcp("h", 2), Endpoint::Unix("/a".into())].map(|e| e.to_string());
        assert_eq!(shown, ["[::1]:1", "h:2", "unix:///a"]);
        assert_eq!(super::announced("::1:7000"), Some(tcp("::1", 7000)));
        assert_eq!(super::announced(":7000"), Some(tcp("", 7000)));
        assert_eq!(super::announced("7000"), None);
    }
}
