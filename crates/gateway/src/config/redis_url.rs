//! Where a Redis is: the URLs of `dependencies.redis.url`, which the keys beside it can also make. Pure.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::scalar::{Fault, fault};

/// The highest number of a database.
pub(super) const DB_MAX: u64 = 65_535;
/// Bytes of a URL.
const URL_BYTES_MAX: usize = 4_096;
/// Servers that a URL may name.
const NODES_MAX: usize = 64;
/// Bytes of a user's name or password.
const CREDENTIAL_BYTES_MAX: usize = 1_024;
/// Bytes of a host's name.
const HOST_BYTES_MAX: usize = 253;
/// Bytes of what keys begin with.
const PREFIX_BYTES_MAX: usize = 64;
const REDIS_PORT: u16 = 6_379;
const SENTINEL_PORT: u16 = 26_379;
const HELP: &str = "write redis://host:6379/0, rediss://…, unix:///path, redis+sentinel://h1,h2/master/0 or \
                    redis+cluster://h1,h2";

/// What may stand in a URL as it is.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const PATH: &AsciiSet = &UNRESERVED.remove(b'/');

/// One server, group of servers, or socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RedisUrl {
    place: Place,
    tls: bool,
    username: Option<String>,
    password: Option<String>,
    db: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Server(Node),
    Socket(String),
    Sentinel { nodes: Vec<Node>, master: String, login: SentinelLogin },
    Cluster(Vec<Node>),
}

/// As whom the sentinels are asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SentinelLogin {
    username: Option<String>,
    password: Option<String>,
}

/// What of a URL is written.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shown {
    Everything,
    /// `***` in place of passwords.
    Masked,
    /// Neither users nor passwords.
    Address,
}

/// A host as it stands in a URL, and a port.
type Node = (String, u16);

impl RedisUrl {
    /// Reads a URL; every part of it is checked.
    pub(super) fn parse(text: &str) -> Result<Self, Fault> {
        if text.len() > URL_BYTES_MAX {
            return fault("is too long", format!("at most {URL_BYTES_MAX} bytes"));
        }
        if text.contains("${") {
            return fault("still contains `${`", "a variable is replaced once; what it holds is not");
        }
        if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
            return fault("contains spaces or control characters", HELP);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return fault("is not the URL of a Redis", HELP);
        };
        let end = rest.find(['/', '?', '#']).unwrap_or(rest.len());
        let (authority, tail) = rest.split_at(end);
        let (userinfo, hosts) = authority.rsplit_once('@').unwrap_or(("", authority));
        let (path, query) = tail.split_once('?').map_or((tail, None), |(path, query)| (path, Some(query)));
        let may_ask = scheme == "unix" || scheme.ends_with("+sentinel");
        if tail.contains('#') || (query.is_some() && !may_ask) {
            return fault("has a query or a fragment", HELP);
        }
        let (username, password) = userinfo.split_once(':').unwrap_or((userinfo, ""));
        let mut url = Self {
            place: Place::Socket(String::new()),
            tls: scheme.starts_with("rediss"),
            username: credential(username)?,
            password: credential(password)?,
            db: 0,
        };
        let parts = path.strip_prefix('/').unwrap_or(path);
        url.place = match scheme {
            "redis" | "rediss" => {
                url.db = database(parts)?;
                let mut nodes = nodes(hosts, REDIS_PORT)?;
                match (nodes.pop(), nodes.is_empty()) {
                    (Some(node), true) => Place::Server(node),
                    _ => {
                        let help =
                            "several servers: redis+sentinel://h1,h2/master/0 or redis+cluster://h1,h2";
                        return fault("names several servers", help);
                    }
                }
            }
            "redis+sentinel" | "rediss+sentinel" => {
                let (master, db) = parts.split_once('/').unwrap_or((parts, ""));
                url.db = database(db)?;
                let Some(master) = decoded(master)?.filter(|name| !name.chars().any(char::is_control)) else {
                    return fault("names no master", "redis+sentinel://h1:26379,h2:26379/mymaster/0");
                };
                let login = sentinel_login(query.unwrap_or_default())?;
                Place::Sentinel { nodes: nodes(hosts, SENTINEL_PORT)?, master, login }
            }
            "redis+cluster" | "rediss+cluster" => {
                if database(parts)? != 0 {
                    return fault("names a database", "a cluster has only the first one");
                }
                Place::Cluster(nodes(hosts, REDIS_PORT)?)
            }
            "unix" => url.socket(hosts, path, query.unwrap_or_default())?,
            _ => return fault("is not the URL of a Redis", HELP),
        };
        Ok(url)
    }

    /// One server, of parts that were checked. An empty user or password is none.
    pub(super) fn server(host: &str, port: Option<u16>) -> Self {
        let host = match host.parse::<std::net::Ipv6Addr>() {
            Ok(address) => format!("[{address}]"),
            Err(_) => host.to_owned(),
        };
        let place = Place::Server((host, port.unwrap_or(REDIS_PORT)));
        Self { place, tls: false, username: None, password: None, db: 0 }
    }

    /// The same place, as this user, in this database.
    pub(super) fn signed_in(self, username: Option<String>, password: Option<String>, db: u64) -> Self {
        let given = |text: Option<String>| text.filter(|text| !text.is_empty());
        Self { username: given(username), password: given(password), db, ..self }
    }

    /// The same place, over TLS.
    pub(super) fn with_tls(self) -> Self {
        Self { tls: true, ..self }
    }

    /// Whether TLS is spoken.
    pub(super) fn is_tls(&self) -> bool {
        self.tls
    }

    /// Whether it is a socket of this machine.
    pub(super) fn is_socket(&self) -> bool {
        matches!(self.place, Place::Socket(_))
    }

    /// Whether it is one server, by its address.
    pub(super) fn is_server(&self) -> bool {
        matches!(self.place, Place::Server(_))
    }

    /// The whole URL: ports and database written out, users and passwords percent-encoded.
    pub(super) fn whole(&self) -> String {
        self.text(Shown::Everything)
    }

    /// The URL without users and passwords.
    pub(super) fn address(&self) -> String {
        self.text(Shown::Address)
    }

    /// The URL with `***` in place of passwords.
    pub(super) fn masked(&self) -> String {
        self.text(Shown::Masked)
    }

    fn text(&self, shown: Shown) -> String {
        let name = |name: &Option<String>| name.as_deref().filter(|_| shown != Shown::Address).map(encoded);
        let secret = |secret: &Option<String>| match shown {
            Shown::Everything => secret.as_deref().map(encoded),
            Shown::Masked => secret.as_ref().map(|_| "***".to_owned()),
            Shown::Address => None,
        };
        let (username, password) = (name(&self.username), secret(&self.password));
        let userinfo = match (&username, &password) {
            (None, None) => String::new(),
            (name, None) => format!("{}@", name.as_deref().unwrap_or_default()),
            (name, Some(password)) => format!("{}:{password}@", name.as_deref().unwrap_or_default()),
        };
        let (db, s) = (self.db, if self.tls { "s" } else { "" });
        match &self.place {
            Place::Server(node) => {
                format!("redis{s}://{userinfo}{}/{db}", listed(std::slice::from_ref(node)))
            }
            Place::Sentinel { nodes, master, login } => {
                let asked = [
                    ("sentinel_username", name(&login.username)),
                    ("sentinel_password", secret(&login.password)),
                ];
                let (hosts, master) = (listed(nodes), encoded(master));
                format!("redis{s}+sentinel://{userinfo}{hosts}/{master}/{db}{}", query(asked))
            }
            Place::Cluster(nodes) => format!("redis{s}+cluster://{userinfo}{}", listed(nodes)),
            Place::Socket(path) => {
                let asked =
                    [("db", (db != 0).then(|| db.to_string())), ("user", username), ("pass", password)];
                format!("unix://{}{}", utf8_percent_encode(path, PATH), query(asked))
            }
        }
    }

    /// `unix:///path?db=1&user=u&pass=p`.
    fn socket(&mut self, hosts: &str, path: &str, query: &str) -> Result<Place, Fault> {
        if !hosts.is_empty() || path.len() < 2 {
            return fault("names no socket", "write unix:///run/redis.sock, with three slashes");
        }
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            match pair.split_once('=') {
                Some(("db", db)) => self.db = database(db)?,
                Some(("user", name)) => self.username = credential(name)?,
                Some(("pass", password)) => self.password = credential(password)?,
                _ => return fault("has an unknown query", "allowed: unix:///path?db=0&user=…&pass=…"),
            }
        }
        Ok(Place::Socket(decoded(path)?.unwrap_or_default()))
    }
}

/// `?sentinel_username=u&sentinel_password=p`: users of sentinels are not those of the servers they watch.
fn sentinel_login(query: &str) -> Result<SentinelLogin, Fault> {
    let mut login = SentinelLogin::default();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("sentinel_username", name)) => login.username = credential(name)?,
            Some(("sentinel_password", password)) => login.password = credential(password)?,
            _ => {
                let help = "allowed: redis+sentinel://h1,h2/master/0?sentinel_username=…&sentinel_password=…";
                return fault("has an unknown query", help);
            }
        }
    }
    Ok(login)
}

/// What follows the path, of those pairs that have a value.
fn query<const N: usize>(pairs: [(&str, Option<String>); N]) -> String {
    let given = pairs.into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
    let given: Vec<String> = given.collect();
    if given.is_empty() { String::new() } else { format!("?{}", given.join("&")) }
}

/// `host:port`, where the port may be left out.
pub(super) fn host_and_port(text: &str) -> Result<(String, Option<u16>), Fault> {
    const WRITE: &str = "write localhost:6379";
    // The last colon parts a port from the host, unless it stands in the brackets of an address.
    let (name, port) = match text.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => {
            let number = port.parse::<u16>().ok().filter(|number| *number > 0 && !port.starts_with('+'));
            let Some(number) = number else {
                return fault("has a port that is none", "allowed: 1 to 65535");
            };
            (name, Some(number))
        }
        _ => (text, None),
    };
    let inside = name.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    match inside {
        Some(address) if address.parse::<std::net::Ipv6Addr>().is_ok() => Ok((name.to_owned(), port)),
        None if is_host_name(name) => Ok((name.to_owned(), port)),
        _ => fault("has no host", WRITE),
    }
}

/// A host's name or address; of IPv6 with or without brackets.
pub(super) fn host(text: &str) -> Result<(), Fault> {
    let inside = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if inside.parse::<std::net::Ipv6Addr>().is_ok() || is_host_name(text) {
        return Ok(());
    }
    fault(
        "is not a host",
        "write a name or an address, such as localhost or 10.0.0.5; the port has a key of its own",
    )
}

/// The name of a Redis user, or nothing.
pub(super) fn username(text: &str) -> Result<(), Fault> {
    password(text)?;
    match text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        true => fault("contains spaces or control characters", ""),
        false => Ok(()),
    }
}

/// A password, or nothing.
pub(super) fn password(text: &str) -> Result<(), Fault> {
    if text.contains("${") {
        return fault("still contains `${`", "a variable is replaced once; what it holds is not");
    }
    if text.len() > CREDENTIAL_BYTES_MAX {
        return fault("is too long", format!("at most {CREDENTIAL_BYTES_MAX} bytes"));
    }
    Ok(())
}

/// What every key begins with.
pub(super) fn prefix(text: &str) -> Result<(), Fault> {
    let fits = |c: char| !(c.is_control() || c.is_whitespace() || matches!(c, '{' | '}'));
    if text.is_empty() || text.len() > PREFIX_BYTES_MAX || !text.chars().all(fits) {
        let help =
            format!("allowed: 1 to {PREFIX_BYTES_MAX} bytes without braces, spaces and control characters");
        return fault("cannot begin keys", help);
    }
    Ok(())
}

/// A value as it may stand between `://` and `@`.
pub(super) fn encoded(value: &str) -> String {
    utf8_percent_encode(value, UNRESERVED).to_string()
}

fn is_host_name(text: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    !text.is_empty() && text.len() <= HOST_BYTES_MAX && text.bytes().all(fits)
}

fn nodes(text: &str, default_port: u16) -> Result<Vec<Node>, Fault> {
    let node = |text: &str| host_and_port(text).map(|(host, port)| (host, port.unwrap_or(default_port)));
    let nodes: Vec<Node> = text.split(',').take(NODES_MAX + 1).map(node).collect::<Result<_, _>>()?;
    match nodes.len() > NODES_MAX {
        true => fault("names too many servers", format!("at most {NODES_MAX}")),
        false => Ok(nodes),
    }
}

fn listed(nodes: &[Node]) -> String {
    nodes.iter().map(|(host, port)| format!("{host}:{port}")).collect::<Vec<_>>().join(",")
}

/// A number, or nothing for the first one.
fn database(text: &str) -> Result<u64, Fault> {
    match text {
        "" => Ok(0),
        text => super::scalar::integer(text, 0, DB_MAX).or_else(|_| {
            fault(
                "has a database that is none",
                format!("allowed after the host: a number from 0 to {DB_MAX}"),
            )
        }),
    }
}

fn credential(text: &str) -> Result<Option<String>, Fault> {
    let Some(text) = decoded(text)? else { return Ok(None) };
    password(&text).map(|()| Some(text))
}

/// Text without percent-encoding; `None` when there is none.
fn decoded(text: &str) -> Result<Option<String>, Fault> {
    match percent_decode_str(text).decode_utf8() {
        Ok(text) => Ok(Some(text.into_owned()).filter(|text| !text.is_empty())),
        Err(_) => fault("is not UTF-8 behind its percent signs", HELP),
    }
}
