//! What limits are per, and whose counter one request meets.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::names::UnknownName;

/// One thing a limit can be per.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dimension {
    /// The caller's address.
    Ip,
    /// The caller's session.
    Session,
    /// The key, by its identifier.
    ApiKey,
    /// The user a key belongs to.
    User,
    /// The user's team.
    Team,
    /// The user's tier.
    Tier,
    /// The model asked for.
    Model,
    /// The route asked for.
    Endpoint,
}

impl Dimension {
    /// Every dimension, in the order in which a subject names them.
    pub const ALL: [Dimension; 8] = [
        Dimension::Ip,
        Dimension::Session,
        Dimension::ApiKey,
        Dimension::User,
        Dimension::Team,
        Dimension::Tier,
        Dimension::Model,
        Dimension::Endpoint,
    ];

    /// The name used in configuration and subjects: `api_key`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Dimension::Ip => "ip",
            Dimension::Session => "session",
            Dimension::ApiKey => "api_key",
            Dimension::User => "user",
            Dimension::Team => "team",
            Dimension::Tier => "tier",
            Dimension::Model => "model",
            Dimension::Endpoint => "endpoint",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Dimension {
    type Err = UnknownName;

    fn from_str(name: &str) -> Result<Dimension, UnknownName> {
        let found = Dimension::ALL.into_iter().find(|dimension| dimension.as_str() == name);
        found.ok_or_else(|| UnknownName::new("scope", name, Dimension::ALL.map(Dimension::as_str)))
    }
}

/// What a limit is per: a set of dimensions. The empty set is global: one counter for everybody.
/// Displayed as in metrics: `user,model`, `global`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Scope(u8);

impl Scope {
    /// One counter for everybody.
    pub const GLOBAL: Scope = Scope(0);

    /// The set of these dimensions.
    pub fn of(dimensions: impl IntoIterator<Item = Dimension>) -> Scope {
        Scope(dimensions.into_iter().fold(0, |set, dimension| set | dimension.bit()))
    }

    /// Whether the limit is per this.
    pub const fn contains(self, dimension: Dimension) -> bool {
        self.0 & dimension.bit() != 0
    }

    /// The dimensions, in the order of [`Dimension::ALL`].
    pub fn iter(self) -> impl Iterator<Item = Dimension> {
        Dimension::ALL.into_iter().filter(move |dimension| self.contains(*dimension))
    }

    /// The scope filled in for one request: `user:alice:model:gpt-4o`. Separators and control characters in
    /// values are percent-encoded, so different values never make the same subject. The caller bounds the
    /// length of values that come from outside.
    pub fn subject<'v>(self, mut value: impl FnMut(Dimension) -> Cow<'v, str>) -> Subject {
        if self == Scope::GLOBAL {
            return Subject { text: Arc::from("global"), unauthenticated: false, tenant: None };
        }
        let mut text = String::with_capacity(64);
        for dimension in self.iter() {
            if !text.is_empty() {
                text.push(':');
            }
            text.push_str(dimension.as_str());
            text.push(':');
            encode(&value(dimension), &mut text);
        }
        Subject { text: text.into(), unauthenticated: false, tenant: None }
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Scope::GLOBAL {
            return f.write_str("global");
        }
        for (index, dimension) in self.iter().enumerate() {
            f.write_str(if index == 0 { "" } else { "," })?;
            f.write_str(dimension.as_str())?;
        }
        Ok(())
    }
}

/// Whose counter it is: a scope filled in. Cheap to clone; equal when the text is.
#[derive(Clone)]
pub struct Subject {
    text: Arc<str>,
    unauthenticated: bool,
    tenant: Option<Arc<str>>,
}

impl Subject {
    /// Marks a subject whose values any stranger can make up. Stores keep those in a budget of their own, so that
    /// they never push out the counters of known callers.
    pub fn unauthenticated(self) -> Subject {
        Subject { unauthenticated: true, ..self }
    }

    /// Names the tenant it belongs to: a team or user, else a key. A store of several nodes keeps the counters of one
    /// tenant together. The same subject always belongs to the same tenant; it is no part of the text.
    pub fn of_tenant(self, tenant: &str) -> Subject {
        let mut text = String::with_capacity(tenant.len());
        encode(tenant, &mut text);
        Subject { tenant: Some(text.into()), ..self }
    }

    /// The same with what keeps its counters together, as [`Subject::tag`] says it.
    #[cfg(feature = "redis")]
    pub(crate) fn tagged(self, tag: &str) -> Subject {
        Subject { tenant: Some(tag.into()), ..self }
    }

    /// What keeps counters together: the tenant; unless one was named, that of the subject itself: its team, user or
    /// key, else all of it.
    pub fn tag(&self) -> &str {
        if let Some(tenant) = &self.tenant {
            return tenant;
        }
        let parts = || self.text.split(':');
        let value = |name: &str| parts().zip(parts().skip(1)).step_by(2).find(|(part, _)| *part == name);
        let tenants = [Dimension::Team, Dimension::User, Dimension::ApiKey];
        let found = tenants.into_iter().find_map(|tenant| value(tenant.as_str()));
        found.map_or(&self.text, |(_, value)| value)
    }

    /// Whether it was marked as made up by a stranger.
    pub const fn is_unauthenticated(&self) -> bool {
        self.unauthenticated
    }

    /// The canonical text: `user:alice:model:gpt-4o`, `global`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    pub(crate) fn shared_text(&self) -> Arc<str> {
        Arc::clone(&self.text)
    }
}

impl PartialEq for Subject {
    #[inline]
    fn eq(&self, other: &Subject) -> bool {
        Arc::ptr_eq(&self.text, &other.text) || self.text == other.text
    }
}

impl Eq for Subject {}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subject({})", self.text)
    }
}

/// Text that is no subject.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubjectError(String);

impl fmt::Display for SubjectError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` is no subject; write `global`, or scopes and values in order such as `user:alice:model:m`",
            self.0
        )
    }
}

impl std::error::Error for SubjectError {}

impl FromStr for Subject {
    type Err = SubjectError;

    /// Reads the canonical text back.
    fn from_str(text: &str) -> Result<Subject, SubjectError> {
        let wrong = || SubjectError(crate::names::excerpt(text));
        let mut parts = text.split(':');
        let mut last = None;
        while let Some(name) = parts.next() {
            if text == "global" {
                break;
            }
            let dimension: Dimension = name.parse().map_err(|_| wrong())?;
            let value = parts.next().ok_or_else(wrong)?;
            if last >= Some(dimension) || value.chars().any(|c| c.is_control() || matches!(c, '{' | '}')) {
                return Err(wrong());
            }
            last = Some(dimension);
        }
        Ok(Subject { text: text.into(), unauthenticated: false, tenant: None })
    }
}

fn encode(value: &str, out: &mut String) {
    let plain = |c: char| !(c.is_control() || matches!(c, '{' | '}' | ':' | '%'));
    let mut rest = value;
    while let Some(at) = rest.find(|c| !plain(c)) {
        let (before, after) = rest.split_at(at);
        out.push_str(before);
        let length = after.chars().next().map_or(0, char::len_utf8);
        let (special, after) = after.split_at(length);
        for byte in special.bytes() {
            out.push('%');
            for digit in [byte >> 4, byte & 15] {
                out.push(char::from(b"0123456789ABCDEF"[usize::from(digit)]));
            }
        }
        rest = after;
    }
    out.push_str(rest);
}
