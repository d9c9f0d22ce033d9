//! What a single piece of text means: durations, sizes, addresses, URLs, names, keys. Pure; every refusal says what is
//! allowed and none repeats the text.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, SystemTime};

use ipnet::IpNet;
use sha2::{Digest, Sha256};
use tollgate_limiter::{Algorithm, Dimension};

/// Characters of a name.
pub(super) const NAME_CHARS_MAX: usize = 128;
/// The longest beginning of names of metrics.
const METRICS_PREFIX_BYTES_MAX: usize = 64;
/// Bytes of a key.
const KEY_BYTES_MAX: usize = 512;
/// Bytes of a URL.
const URL_BYTES_MAX: usize = 2_048;
/// Admin keys out of everybody's examples.
const PLACEHOLDERS: [&str; 10] = [
    "admin",
    "change-me",
    "change_me",
    "changeme",
    "password",
    "secret",
    "sk-1234",
    "sk-12345",
    "test",
    "your-admin-key",
];

/// Why a text was refused: `is not a duration`, and what is allowed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    /// Goes after the text, or after "the value".
    pub(super) what: String,
    /// What is allowed.
    pub(super) help: String,
}

pub(super) fn fault<T>(what: impl Into<String>, help: impl Into<String>) -> Result<T, Fault> {
    Err(Fault { what: what.into(), help: help.into() })
}

/// `true` or `false`.
pub(super) fn boolean(text: &str) -> Result<bool, Fault> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => fault("is neither true nor false", ""),
    }
}

/// A whole number, `_` between digits allowed.
pub(super) fn integer(text: &str, min: u64, max: u64) -> Result<u64, Fault> {
    let help = format!("allowed: {min} to {max}");
    let Some(number) = digits(text) else {
        return fault("is not a whole number", help);
    };
    if number < u128::from(min) || number > u128::from(max) {
        return fault("is out of range", help);
    }
    Ok(u64::try_from(number).unwrap_or(max))
}

/// A share between 0 and 1.
pub(super) fn fraction(text: &str) -> Result<f64, Fault> {
    match text.parse::<f64>() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => fault("is not a share", "allowed: 0 to 1, such as 0.05"),
    }
}

/// A decimal number up to `max`, in units of its last decimal: with three places 0.25 is 250.
pub(super) fn decimal(text: &str, places: u32, max: u64) -> Result<u64, Fault> {
    let help = format!("allowed: 0 to {max}, with up to {places} decimals");
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let are_digits = !decimals.is_empty() && decimals.bytes().all(|b| b.is_ascii_digit());
    let Some(whole) = digits(whole).filter(|_| are_digits) else {
        return fault("is not a number", help);
    };
    let decimals = decimals.trim_end_matches('0');
    let missing = usize::try_from(places).unwrap_or_default().checked_sub(decimals.len());
    let (Some(missing), true) = (missing, whole <= u128::from(max)) else {
        return fault("is out of range", help);
    };
    let fraction = format!("0{decimals}{}", "0".repeat(missing)).parse::<u128>().unwrap_or_default();
    let scale = 10_u128.pow(places);
    match u64::try_from(whole * scale + fraction) {
        Ok(number) if u128::from(number) <= u128::from(max) * scale => Ok(number),
        _ => fault("is out of range", help),
    }
}

/// `250ms`, `300s`, `10m`, `1h`, `7d`; the bounds are in milliseconds.
pub(super) fn duration(text: &str, min_ms: u64, max_ms: u64) -> Result<Duration, Fault> {
    const UNITS: [(&str, u128); 5] =
        [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];
    let range = format!("allowed: {} to {}", duration_text(min_ms), duration_text(max_ms));
    match with_unit(text, &UNITS) {
        None => fault("is not a duration", format!("write 250ms, 300s, 10m or 1h; {range}")),
        Some(ms) if ms < u128::from(min_ms) || ms > u128::from(max_ms) => fault("is out of range", range),
        Some(ms) => Ok(Duration::from_millis(u64::try_from(ms).unwrap_or(max_ms))),
    }
}

/// `10MB`, `64MiB`, `256KB`; bytes.
pub(super) fn size(text: &str, min: usize, max: usize) -> Result<usize, Fault> {
    const UNITS: [(&str, u128); 7] = [
        ("B", 1),
        ("KB", 1_000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("KiB", 1 << 10),
        ("MiB", 1 << 20),
        ("GiB", 1 << 30),
    ];
    let range = format!("allowed: {} to {}", size_text(min), size_text(max));
    match with_unit(text, &UNITS) {
        None => fault("is not a size", format!("write 256KB, 10MB or 64MiB; {range}")),
        Some(bytes) if bytes < min as u128 || bytes > max as u128 => fault("is out of range", range),
        Some(bytes) => Ok(usize::try_from(bytes).unwrap_or(max)),
    }
}

/// An address to listen on.
pub(super) fn address(text: &str) -> Result<SocketAddr, Fault> {
    text.parse().or_else(|_| {
        fault(
            "is not an address to listen on",
            "write an IP address and a port: 0.0.0.0:8080, 127.0.0.1:8081, [::]:8080",
        )
    })
}

/// A network, or one address.
pub(super) fn network(text: &str) -> Result<IpNet, Fault> {
    let single = || text.parse::<IpAddr>().ok().map(IpNet::from);
    let network = text.parse::<IpNet>().ok().or_else(single);
    network.map_or_else(
        || fault("is not a network", "write 10.0.0.0/8, fd00::/8 or one address"),
        |n| Ok(n.trunc()),
    )
}

/// The base URL of a provider, without a trailing slash. An empty path becomes `/v1`.
pub(super) fn base_url(text: &str) -> Result<http::Uri, Fault> {
    const HELP: &str = "write https://api.openai.com or http://10.0.0.5:8000/v1";
    let Ok(uri) = text.parse::<http::Uri>() else {
        return fault("is not a URL", HELP);
    };
    let Some(scheme @ ("http" | "https")) = uri.scheme_str() else {
        return fault("is not a URL with http:// or https://", HELP);
    };
    let Some(authority) = uri.authority().filter(|a| !a.host().is_empty()) else {
        return fault("has no host", HELP);
    };
    if authority.as_str().contains('@') {
        return fault("contains a user or password", "put the secret under `key`");
    }
    if uri.query().is_some() || text.contains('#') {
        return fault("has a query or a fragment", HELP);
    }
    let port = authority.as_str().rsplit_once(':').map(|(_, port)| port).filter(|port| !port.ends_with(']'));
    if port.is_some() && authority.port_u16().is_none_or(|port| port == 0) {
        return fault("has a port that is none", "allowed: 1 to 65535");
    }
    if text.len() > URL_BYTES_MAX {
        return fault("is too long", format!("at most {URL_BYTES_MAX} bytes"));
    }
    let path = match uri.path().trim_end_matches('/') {
        "" => "/v1",
        path => path,
    };
    format!("{scheme}://{authority}{path}").parse().or_else(|_| fault("is not a URL", HELP))
}

/// A name people gave to something.
pub(super) fn name(text: &str) -> Result<(), Fault> {
    if text.is_empty() || text.trim() != text {
        return fault("is empty, or begins or ends with a space", "");
    }
    if text.chars().any(char::is_control) {
        return fault("contains control characters", "");
    }
    if text.chars().count() > NAME_CHARS_MAX {
        return fault("is too long", format!("at most {NAME_CHARS_MAX} characters"));
    }
    Ok(())
}

/// The name of a rule or tier: part of headers and metrics.
pub(super) fn rule_name(text: &str) -> Result<(), Fault> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty() || text.len() > 64 || !text.chars().all(fits) {
        return fault("cannot name a rule or tier", "allowed: 1 to 64 of a-z A-Z 0-9 - _ .");
    }
    Ok(())
}

/// What names of metrics begin with, without the underscore that follows it: `tollgate` for `tollgate` and `tollgate_`.
pub(super) fn metrics_prefix(text: &str) -> Result<&str, Fault> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
    let prefix = text.trim_end_matches('_');
    if prefix.is_empty()
        || text.len() > METRICS_PREFIX_BYTES_MAX
        || text.starts_with(|c: char| c.is_ascii_digit())
        || !text.chars().all(fits)
    {
        let help =
            format!("allowed: 1 to {METRICS_PREFIX_BYTES_MAX} of a-z A-Z 0-9 _ :, and no digit in front");
        return fault("cannot begin names of metrics", help);
    }
    Ok(prefix)
}

/// A secret that travels in a header.
pub(super) fn secret(text: &str) -> Result<(), Fault> {
    if text.is_empty() {
        return fault("is empty", "");
    }
    if text.contains("${") {
        return fault("still contains `${`", "a variable is replaced once; what it holds is not");
    }
    if text.len() > KEY_BYTES_MAX || !text.bytes().all(|b| b.is_ascii_graphic()) {
        return fault(
            "cannot be sent in a header",
            format!("allowed: up to {KEY_BYTES_MAX} ASCII characters, no spaces"),
        );
    }
    Ok(())
}

/// The admin key: a secret, and not one that everybody knows.
pub(super) fn admin_key(text: &str) -> Result<(), Fault> {
    secret(text)?;
    if PLACEHOLDERS.contains(&text.to_ascii_lowercase().as_str()) {
        return fault("is a well-known placeholder", "make one with `openssl rand -hex 32`");
    }
    Ok(())
}

/// The SHA-256 of a caller's key, given as it is or as `sha256:` and 64 hex digits.
pub(super) fn key_hash(text: &str) -> Result<[u8; 32], Fault> {
    if text.starts_with("sha256:") {
        return sha256(text);
    }
    secret(text)?;
    Ok(Sha256::digest(text.as_bytes()).into())
}

/// `sha256:` and 64 hex digits.
pub(super) fn sha256(text: &str) -> Result<[u8; 32], Fault> {
    let hex = text.strip_prefix("sha256:").unwrap_or_default().as_bytes();
    let mut hash = [0; 32];
    if hex.len() != 64 || !hex.iter().all(u8::is_ascii_hexdigit) {
        return fault(
            "is not a SHA-256",
            "write `sha256:` and 64 hex digits, from `printf %s \"$KEY\" | sha256sum`",
        );
    }
    for (byte, pair) in hash.iter_mut().zip(hex.chunks_exact(2)) {
        let digit = |c: u8| char::from(c).to_digit(16).unwrap_or_default() as u8;
        *byte = digit(pair[0]) << 4 | digit(pair[1]);
    }
    Ok(hash)
}

/// The id of a key: 12 hex digits of its hash, or the 8 characters after `tg_`.
pub(super) fn key_id(text: &str) -> Result<(), Fault> {
    let of_hash = text.len() == 12 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if of_hash || (text.len() == 8 && text.bytes().all(|b| b.is_ascii_alphanumeric())) {
        return Ok(());
    }
    fault(
        "is not the id of a key",
        "the first 12 hex digits of its SHA-256, lower case; of a key that begins with tg_ the 8 characters after it",
    )
}

/// A glob on canonical routes.
pub(super) fn endpoint(text: &str) -> Result<(), Fault> {
    if text.starts_with('/') && text.len() <= 256 && text.bytes().all(|b| b.is_ascii_graphic()) {
        return Ok(());
    }
    fault("is not a path", "write /v1/chat/completions or /v1/images/*")
}

/// `2027-01-01` (its beginning, UTC) or RFC 3339.
pub(super) fn date(text: &str) -> Result<SystemTime, Fault> {
    let at_midnight =
        |date: jiff::civil::Date| date.to_zoned(jiff::tz::TimeZone::UTC).ok().map(|z| z.timestamp());
    let day = || text.parse().ok().filter(|_| text.len() == 10).and_then(at_midnight);
    match day().or_else(|| text.parse::<jiff::Timestamp>().ok()) {
        Some(timestamp) => Ok(timestamp.into()),
        None => fault("is not a date", "write 2027-01-01 or 2027-01-01T12:00:00Z"),
    }
}

/// One of a few words.
pub(super) fn one_of<'a>(text: &str, words: impl Iterator<Item = &'a str> + Clone) -> Result<(), Fault> {
    if words.clone().any(|word| word == text) {
        return Ok(());
    }
    fault("is not known", super::problem::suggest(text, words))
}

/// A name of a limiter's algorithm.
pub(super) fn strategy(text: &str) -> Result<Algorithm, Fault> {
    let found = Algorithm::ALL.iter().copied().find(|algorithm| algorithm.as_str() == text);
    let names = Algorithm::ALL.iter().map(|algorithm| algorithm.as_str());
    found.map_or_else(|| fault("is not known", super::problem::suggest(text, names)), Ok)
}

/// How strictly a limit is kept.
pub(super) fn mode(text: &str) -> Result<(), Fault> {
    if text == "leased" {
        return fault("is not in this version", "allowed: strict");
    }
    one_of(text, ["strict"].into_iter())
}

/// What a limit can be per. `None`: `global`.
pub(super) fn dimension(text: &str) -> Result<Option<Dimension>, Fault> {
    if text == "global" {
        return Ok(None);
    }
    let found = Dimension::ALL.iter().copied().find(|dimension| dimension.as_str() == text);
    let names = Dimension::ALL.iter().map(|dimension| dimension.as_str()).chain(["global"]);
    found.map_or_else(|| fault("is not known", super::problem::suggest(text, names)), |d| Ok(Some(d)))
}

/// The largest unit that says it in whole numbers.
pub(super) fn duration_text(ms: u64) -> String {
    let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1_000, "s")];
    match units.iter().find(|(factor, _)| ms >= *factor && ms.is_multiple_of(*factor)) {
        Some((factor, unit)) => format!("{}{unit}", ms / factor),
        None => format!("{ms}ms"),
    }
}

fn size_text(bytes: usize) -> String {
    let units = [(1 << 30, "GiB"), (1_000_000, "MB"), (1_000, "KB")];
    match units.iter().find(|(factor, _)| bytes >= *factor && bytes.is_multiple_of(*factor)) {
        Some((factor, unit)) => format!("{}{unit}", bytes / factor),
        None => format!("{bytes}B"),
    }
}

fn with_unit(text: &str, units: &[(&str, u128)]) -> Option<u128> {
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '_')?;
    let (number, unit) = text.split_at(end);
    let (_, factor) = units.iter().find(|(name, _)| *name == unit.trim_start())?;
    digits(number)?.checked_mul(*factor)
}

/// Digits with `_` between them; far more than anything allowed still fits.
fn digits(text: &str) -> Option<u128> {
    let well_formed =
        text.split('_').all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()));
    if !well_formed || text.len() > 30 {
        return None;
    }
    text.replace('_', "").parse().ok()
}
