//! Credentials and addresses → [`Caller`].
//!
//! Keys are looked up by their SHA-256 in the snapshot: no store is asked, so an unknown key costs microseconds and a
//! store that is down refuses nobody.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use ipnet::IpNet;
use sha2::{Digest, Sha256};

use crate::config::{Auth, Key};
use crate::control::{self, Form};
use crate::error::Error;
use crate::fields::Fields;
use crate::snapshot::Snapshot;

/// Addresses looked at in `X-Forwarded-For`, from the right.
const FORWARDED_HOPS_MAX: usize = 32;

/// Who sent a request.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The key it was sent with; `None`: anonymous.
    pub key: Option<Arc<Key>>,
    /// The client's address.
    pub address: IpAddr,
    /// Its `User-Agent`.
    pub agent: Option<Bytes>,
}

impl Caller {
    /// The address as it is [`counted`].
    pub fn ip(&self) -> IpAddr {
        counted(self.address)
    }

    /// The hash of counted address and `User-Agent`: the first 8 bytes of SHA-256 in hex.
    pub fn session(&self) -> String {
        let mut hash = Sha256::new();
        hash.update(self.ip().to_string());
        hash.update(b"\n");
        hash.update(self.agent.as_deref().unwrap_or_default());
        let digest: [u8; 32] = hash.finalize().into();
        format!("{:016x}", u64::from_be_bytes(std::array::from_fn(|index| digest[index])))
    }

    /// What identifies it when a scope asks for more than it has: its key, else its address.
    pub fn fallback_identity(&self) -> String {
        match &self.key {
            Some(key) => format!("api_key={}", key.id),
            None => format!("ip={}", self.ip()),
        }
    }

    /// Name of the user, where the key belongs to one.
    pub fn user(&self) -> Option<&str> {
        Some(&self.key.as_ref()?.user.as_ref()?.name)
    }

    /// The key's team, else the user's.
    pub fn team(&self) -> Option<&str> {
        self.key.as_ref()?.team()
    }

    /// The key's tier, else the user's.
    pub fn tier(&self) -> Option<&str> {
        let key = self.key.as_ref()?;
        key.own.tier.as_deref().or_else(|| key.user.as_ref()?.tier.as_deref())
    }

    /// Whether it may use the model of this resolved name.
    pub fn may_use(&self, model: &str) -> bool {
        let Some(key) = &self.key else { return true };
        let allows = |models: &Option<Vec<String>>| {
            models.as_ref().is_none_or(|models| models.iter().any(|allowed| allowed == model))
        };
        allows(&key.own.models) && key.user.as_ref().is_none_or(|user| allows(&user.models))
    }
}

/// Finds out who sent a request from its headers and its [`client_address`].
///
/// # Errors
/// 400 for two credentials that differ, 401 for one that is missing, unknown, revoked or expired, 503 for one that may be
/// good when nobody can know.
pub fn identify(snapshot: &Snapshot, sent: &Fields, address: IpAddr) -> Result<Caller, Error> {
    let key = match credential(sent)? {
        Some(secret) => Some(known(snapshot, secret)?),
        None if snapshot.config.auth == Auth::Optional => None,
        None => return Err(Error::MissingKey),
    };
    Ok(Caller { key, address, agent: sent.owned("user-agent") })
}

/// An address as it is counted: whoever has one address of an IPv6 /64 has all of them.
pub fn counted(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => address,
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX))),
    }
}

/// The SHA-256 of a key, as files and the look-up have it.
pub fn key_hash(secret: &[u8]) -> [u8; 32] {
    Sha256::digest(secret).into()
}

fn known(snapshot: &Snapshot, secret: &[u8]) -> Result<Arc<Key>, Error> {
    let form = control::form(secret);
    if form == Form::Damaged {
        return Err(Error::UnknownKey);
    }
    let Some(key) = snapshot.key(&key_hash(secret)) else {
        let unknown = form == Form::Ours && !snapshot.control.loaded;
        return Err(if unknown { Error::KeysUnavailable } else { Error::UnknownKey });
    };
    match key.expires {
        _ if key.revoked => Err(Error::RevokedKey),
        Some(end) if end <= SystemTime::now() => Err(Error::ExpiredKey),
        _ => Ok(key.clone()),
    }
}

/// The one credential of a request. A header that is there but carries no bearer token is a wrong key, not a missing
/// one: with `auth: optional` a typo must not turn its sender into somebody anonymous.
fn credential(sent: &Fields) -> Result<Option<&[u8]>, Error> {
    let bearer = sent.get_all("authorization").map(bearer);
    let plain = sent.get_all("x-api-key");
    let mut found: Option<&[u8]> = None;
    for secret in bearer.chain(plain) {
        match found {
            Some(other) if other != secret => return Err(Error::AmbiguousCredentials),
            _ => found = Some(secret),
        }
    }
    Ok(found)
}

/// The token of `Bearer TOKEN` (RFC 6750; the scheme's case does not matter); empty for any other scheme.
fn bearer(value: &[u8]) -> &[u8] {
    match value.split_at_checked(7) {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token.trim_ascii(),
        _ => b"",
    }
}

/// The peer's address; behind a trusted proxy the right-most untrusted one of `X-Forwarded-For`, whose lines are
/// `forwarded`. What cannot be read ends the walk at the last hop that was trusted.
pub fn client_address<'a>(
    trusted: &[IpNet],
    forwarded: impl Iterator<Item = &'a [u8]>,
    peer: IpAddr,
) -> IpAddr {
    let is_trusted = |address: IpAddr| trusted.iter().any(|net| net.contains(&address));
    let mut client = peer.to_canonical();
    if trusted.is_empty() || !is_trusted(client) {
        return client;
    }
    let lines: Vec<&[u8]> = forwarded.collect();
    let hops = lines.iter().rev().flat_map(|line| line.rsplit(|&byte| byte == b','));
    for hop in hops.take(FORWARDED_HOPS_MAX) {
        let Some(address) = forwarded_address(hop) else {
            break;
        };
        client = address;
        if !is_trusted(address) {
            break;
        }
    }
    client
}

/// `192.0.2.1`, `192.0.2.1:80`, `2001:db8::1`, `[2001:db8::1]`, `[2001:db8::1]:80`.
fn forwarded_address(hop: &[u8]) -> Option<IpAddr> {
    let text = std::str::from_utf8(hop).ok()?.trim();
    let parsed = text.parse().ok().or_else(|| Some(text.parse::<std::net::SocketAddr>().ok()?.ip()));
    let parsed = parsed.or_else(|| text.strip_prefix('[')?.strip_suffix(']')?.parse().ok());
    parsed.map(|address: IpAddr| address.to_canonical())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(pairs: &[(&str, &str)]) -> Fields {
        pairs.iter().copied().collect()
    }

    #[test]
    fn one_credential_from_either_header() {
        for (pairs, expected) in [
            (&[][..], None),
            (&[("authorization", "Bearer k")][..], Some(&b"k"[..])),
            (&[("authorization", "bearer  k ")], Some(b"k")),
            (&[("x-api-key", "k")], Some(b"k")),
            (&[("authorization", "Bearer k"), ("x-api-key", "k")], Some(b"k")),
            (&[("authorization", "Basic azpr")], Some(b"")),
            (&[("authorization", "Bearer")], Some(b"")),
            (&[("authorization", "")], Some(b"")),
        ] {
            assert_eq!(credential(&sent(pairs)).unwrap(), expected, "{pairs:?}");
        }
        for pairs in [
            &[("authorization", "Bearer k"), ("x-api-key", "l")],
            &[("authorization", "Bearer k"), ("authorization", "Bearer l")],
            &[("authorization", "Basic k"), ("x-api-key", "k")],
        ] {
            assert!(matches!(credential(&sent(pairs)), Err(Error::AmbiguousCredentials)), "{pairs:?}");
        }
    }

    #[test]
    fn the_right_most_untrusted_address() {
        let trusted: Vec<IpNet> = vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()];
        for (peer, forwarded, expected) in [
            ("192.0.2.9", &["1.2.3.4"][..], "192.0.2.9"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["1.2.3.4"], "1.2.3.4"),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4"], "1.2.3.4"),
            ("10.0.0.1", &["6.6.6.6, 1.2.3.4, 10.9.9.9"], "1.2.3.4"),
            ("10.0.0.1", &["6.6.6.6", "1.2.3.4 , 10.9.9.9:123"], "1.2.3.4"),
            ("10.0.0.1", &["1.2.3.4, junk, 10.9.9.9"], "10.9.9.9"),
            ("10.0.0.1", &["10.1.1.1, 10.2.2.2"], "10.1.1.1"),
            ("::ffff:10.0.0.1", &["[2003::1]:443"], "2003::1"),
            ("10.0.0.1", &["::ffff:1.2.3.4"], "1.2.3.4"),
        ] {
            let lines = forwarded.iter().map(|line| line.as_bytes());
            let found = client_address(&trusted, lines, peer.parse().unwrap());
            assert_eq!(found, expected.parse::<IpAddr>().unwrap(), "{peer} {forwarded:?}");
        }
    }

    #[test]
    fn ipv6_counts_by_64() {
        let caller = |address: &str, agent: &'static str| Caller {
            key: None,
            address: address.parse().unwrap(),
            agent: Some(Bytes::from_static(agent.as_bytes())),
        };
        assert_eq!(caller("2003:1:2:3:4:5:6:7", "a").ip().to_string(), "2003:1:2:3::");
        assert_eq!(caller("192.0.2.7", "a").ip().to_string(), "192.0.2.7");
        assert_eq!(caller("2003:1:2:3::4", "a").session(), caller("2003:1:2:3:9::", "a").session());
        assert_ne!(caller("2003:1:2:3::4", "a").session(), caller("2003:1:2:3::4", "b").session());
    }
}
