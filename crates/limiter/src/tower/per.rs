//! Whose counter a request meets.

use std::borrow::Cow;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use http::HeaderName;
use http::header::USER_AGENT;
use http::request::Parts;
use sha2::{Digest, Sha256};

use crate::names::excerpt;
use crate::scope::{Dimension, Scope, Subject};

/// Longer values than this are counted by their hash.
const VALUE_BYTES_MAX: usize = 64;
/// Counted together: requests of which nothing was found.
const NOBODY: &str = "-";

type Find = dyn Fn(&Parts) -> Option<String> + Send + Sync;

/// What a limit is per. Requests of which it finds nothing share one counter, so leaving a header out is no way round
/// a limit.
///
/// What strangers can make up (headers, addresses, paths) is marked as such: its counters have a budget of their own
/// in memory, and never push out those of callers the service knows.
#[derive(Clone)]
pub struct Per {
    dimension: Option<Dimension>,
    known: bool,
    find: Arc<Find>,
}

impl Per {
    /// One counter for everybody.
    pub fn everyone() -> Per {
        Per { dimension: None, known: true, find: Arc::new(|_| None) }
    }

    /// The value of a header: an API key, a tenant. Counted by its SHA-256, so secrets do not end up in a store.
    pub fn header(name: HeaderName) -> Per {
        Per::new(Dimension::ApiKey, move |parts| {
            parts.headers.get(&name).map(|value| hashed(&[value.as_bytes()]))
        })
    }

    /// The address of the peer, which `peer` finds where the server keeps it. IPv6 by its /64, which is one customer.
    ///
    /// ```
    /// use std::net::SocketAddr;
    /// use axum::extract::ConnectInfo;
    /// use tollgate_limiter::tower::Per;
    ///
    /// // With `into_make_service_with_connect_info::<SocketAddr>()`:
    /// let per_ip = Per::ip(|parts| Some(parts.extensions.get::<ConnectInfo<SocketAddr>>()?.ip()));
    /// ```
    pub fn ip(peer: impl Fn(&Parts) -> Option<IpAddr> + Send + Sync + 'static) -> Per {
        Per::new(Dimension::Ip, move |parts| peer(parts).map(network))
    }

    /// The address of the client behind proxies: if the peer is one of them, the right-most address of
    /// `x-forwarded-for` that is not. What others write into that header is not believed.
    pub fn forwarded_ip(
        proxies: Proxies,
        peer: impl Fn(&Parts) -> Option<IpAddr> + Send + Sync + 'static,
    ) -> Per {
        Per::new(Dimension::Ip, move |parts| Some(network(proxies.client(parts, peer(parts)?))))
    }

    /// The session of somebody without a name: a hash of address and user agent. A user agent is free to change, so
    /// limit the address as well.
    pub fn session(peer: impl Fn(&Parts) -> Option<IpAddr> + Send + Sync + 'static) -> Per {
        Per::new(Dimension::Session, move |parts| {
            let agent = parts.headers.get(USER_AGENT).map_or(&b""[..], |agent| agent.as_bytes());
            Some(hashed(&[network(peer(parts)?).as_bytes(), agent]))
        })
    }

    /// The path, without the query.
    pub fn path() -> Per {
        Per::new(Dimension::Endpoint, |parts| Some(parts.uri.path().to_string()))
    }

    /// What a closure says: the user of a request that was authenticated before, a tenant in the host name.
    pub fn value(find: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Per {
        Per { known: true, ..Per::new(Dimension::User, find) }
    }

    /// Says that the values are made up by strangers: for [`Per::value`] of something nobody checked.
    pub fn unauthenticated(self) -> Per {
        Per { known: false, ..self }
    }

    /// Says that the values were checked before: for a header that only known callers get through with.
    pub fn authenticated(self) -> Per {
        Per { known: true, ..self }
    }

    fn new(dimension: Dimension, find: impl Fn(&Parts) -> Option<String> + Send + Sync + 'static) -> Per {
        Per { dimension: Some(dimension), known: false, find: Arc::new(find) }
    }

    pub(super) fn scope(&self) -> Scope {
        Scope::of(self.dimension)
    }

    pub(super) fn subject(&self, parts: &Parts) -> Subject {
        let value = match (self.find)(parts) {
            Some(value) if value.len() > VALUE_BYTES_MAX => hashed(&[value.as_bytes()]),
            Some(value) => value,
            None => NOBODY.into(),
        };
        let subject = self.scope().subject(|_| Cow::Borrowed(&value));
        if self.known { subject } else { subject.unauthenticated() }
    }
}

impl fmt::Debug for Per {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Per({})", self.scope())
    }
}

/// Networks whose word about addresses is believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Proxies(Vec<(IpAddr, u8)>);

impl Proxies {
    fn trust(&self, address: IpAddr) -> bool {
        self.0.iter().any(|(network, bits)| match (network, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                let shift = 32 - u32::from(*bits);
                (network.to_bits() ^ address.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                let shift = 128 - u32::from(*bits);
                (network.to_bits() ^ address.to_bits()).checked_shr(shift).unwrap_or(0) == 0
            }
            _ => false,
        })
    }

    fn client(&self, parts: &Parts, peer: IpAddr) -> IpAddr {
        let mut client = peer.to_canonical();
        let lines = parts.headers.get_all("x-forwarded-for").iter().rev();
        for hop in lines.filter_map(|line| line.to_str().ok()).flat_map(|line| line.rsplit(',')) {
            if !self.trust(client) {
                break;
            }
            let Some(address) = address(hop.trim()) else { break };
            client = address.to_canonical();
        }
        client
    }
}

impl FromStr for Proxies {
    type Err = ProxyError;

    /// Addresses and networks with commas between: `10.0.0.0/8, 2001:db8::/32, 192.0.2.1`.
    fn from_str(text: &str) -> Result<Proxies, ProxyError> {
        let network = |part: &str| {
            let (address, bits) = part.split_once('/').map_or((part, None), |(a, bits)| (a, Some(bits)));
            let address: IpAddr = address.parse().ok()?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            let bits = bits.map_or(Some(most), |bits| bits.parse().ok())?;
            (bits <= most).then_some((address, bits))
        };
        let parts = text.split(',').map(str::trim).filter(|part| !part.is_empty());
        let networks: Result<_, _> =
            parts.map(|part| network(part).ok_or_else(|| ProxyError(excerpt(part)))).collect();
        networks.map(Proxies)
    }
}

/// Text that is no network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyError(String);

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` is no address and no network; write them as 192.0.2.1 or 10.0.0.0/8", self.0)
    }
}

impl std::error::Error for ProxyError {}

/// An address as it stands in `x-forwarded-for`, perhaps with a port.
fn address(text: &str) -> Option<IpAddr> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.split(']').next());
    let plain = bare.unwrap_or(text);
    plain.parse().ok().or_else(|| {
        let (address, _) = plain.split_once(':')?;
        address.parse::<Ipv4Addr>().ok().map(IpAddr::V4)
    })
}

/// IPv4 as it is; of IPv6 the /64.
fn network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).to_string(),
    }
}

/// The first half of the SHA-256 of the parts, in hex. A part cannot pass for another: each has its length before it.
fn hashed(parts: &[&[u8]]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
