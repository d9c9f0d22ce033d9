//! What a key's value may be, and what holds without one: the vocabulary of the table in `keys`.

/// A map with known keys.
#[derive(Debug)]
pub(super) struct Section {
    /// What it is called in messages, and in the schema's `$defs`.
    pub(super) name: &'static str,
    /// Its keys.
    pub(super) keys: &'static [Key],
}

/// One key of a [`Section`].
#[derive(Debug)]
pub(super) struct Key {
    /// As it is written.
    pub(super) name: &'static str,
    /// What its value may be.
    pub(super) kind: Kind,
    /// What holds when it is left out.
    pub(super) default: WhenAbsent,
    /// One sentence.
    pub(super) doc: &'static str,
}

/// What holds when a key is left out.
#[derive(Clone, Copy, Debug)]
pub(super) enum WhenAbsent {
    /// It may not be left out.
    Required,
    /// Nothing.
    Nothing,
    /// Of a section: as if it were there and empty, so that its keys have their defaults.
    Section,
    /// As if this were written.
    Text(&'static str),
    /// As if the list of these were written.
    List(&'static [&'static str]),
}

/// What a value may be. Durations are bounded in milliseconds, sizes in bytes.
#[derive(Debug)]
pub(super) enum Kind {
    Name,
    RuleName,
    /// A secret sent by or to us.
    Secret,
    AdminKey,
    /// A caller's key, as it is or hashed.
    ApiKey,
    KeyHash,
    KeyId,
    Bool,
    Integer {
        min: u64,
        max: u64,
    },
    Fraction,
    /// A number of at most this many units, with up to this many decimals.
    Decimal {
        places: u32,
        max: u64,
    },
    Duration {
        min: u64,
        max: u64,
    },
    Size {
        min: usize,
        max: usize,
    },
    Address,
    Network,
    Url,
    /// Where a Redis is; may hold a password.
    RedisUrl,
    /// A host's name or address.
    Host,
    /// Of an account; empty: none.
    Username,
    /// Of an account; empty: none.
    Password,
    /// What keys begin with.
    Prefix,
    /// What names of metrics begin with.
    MetricsPrefix,
    /// The path of a file; read where it is needed.
    File,
    Date,
    Endpoint,
    OneOf(&'static [&'static str]),
    Strategy,
    /// How strictly a limit is kept.
    Mode,
    Dimension,
    /// `10/minute`; read where its rule is known.
    Quota,
    /// A list.
    List {
        of: &'static Kind,
        min: usize,
        max: usize,
    },
    /// One value, or a list of at least one.
    OneOrMany {
        of: &'static Kind,
        max: usize,
    },
    /// A map with known keys.
    Map(&'static Section),
    /// A map whose keys are names of rules.
    Named {
        of: &'static Kind,
        max: usize,
    },
    /// The first of these that has the shape of what is written.
    Either(&'static [Kind]),
    /// A map whose `type` chooses the section.
    Typed(Types),
}

/// Words that `type` may be, and the section they choose.
pub(super) type Types = &'static [(&'static [&'static str], &'static Section)];

impl Kind {
    /// Whether a value must never be shown.
    pub(super) fn is_secret(&self) -> bool {
        matches!(self, Self::Secret | Self::AdminKey | Self::ApiKey | Self::KeyHash | Self::Password)
    }
}

impl Key {
    /// Its sentence, as the end of another one.
    pub(super) fn hint(&self) -> String {
        let mut rest = self.doc.trim_end_matches('.').chars();
        rest.next().map_or_else(String::new, |first| first.to_lowercase().chain(rest).collect())
    }
}

impl Section {
    /// A key by its name.
    pub(super) fn key(&self, name: &str) -> Option<&'static Key> {
        self.keys.iter().find(|key| key.name == name)
    }
}

/// `server.listen`, or just `listen` at the top.
pub(super) fn join(path: &str, key: &str) -> String {
    let key = super::problem::shown(key);
    if path.is_empty() { key } else { format!("{path}.{key}") }
}
