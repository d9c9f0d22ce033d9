//! One walk over the tree against the table of keys: unknown and missing keys, shapes, and what each text alone can be
//! wrong about. What refers to something else is checked where it is resolved.

use super::keys::ROOT;
use super::kind::{Key, Kind, Section, Types, WhenAbsent, join};
use super::problem::{Problems, quoted, suggest};
use super::redis_url::{self, RedisUrl};
use super::scalar::{self, Fault};
use super::tree::{Entry, Node, Scalar, Value};

/// Reports everything in the tree that the table does not allow.
pub(super) fn check(root: &Node, problems: &mut Problems) {
    map(&ROOT, root, "", problems);
}

/// The same for one section by itself.
pub(super) fn section(section: &Section, node: &Node, problems: &mut Problems) {
    map(section, node, "", problems);
}

/// What one text alone can be wrong about.
pub(super) fn text(kind: &Kind, text: &str) -> Result<(), Fault> {
    match kind {
        Kind::Name => scalar::name(text),
        Kind::RuleName => scalar::rule_name(text),
        Kind::Secret => scalar::secret(text),
        Kind::AdminKey => scalar::admin_key(text),
        Kind::ApiKey => scalar::key_hash(text).map(drop),
        Kind::KeyHash => scalar::sha256(text).map(drop),
        Kind::KeyId => scalar::key_id(text),
        Kind::Bool => scalar::boolean(text).map(drop),
        Kind::Integer { min, max } => scalar::integer(text, *min, *max).map(drop),
        Kind::Fraction => scalar::fraction(text).map(drop),
        Kind::Decimal { places, max } => scalar::decimal(text, *places, *max).map(drop),
        Kind::Duration { min, max } => scalar::duration(text, *min, *max).map(drop),
        Kind::Size { min, max } => scalar::size(text, *min, *max).map(drop),
        Kind::Address => scalar::address(text).map(drop),
        Kind::Network => scalar::network(text).map(drop),
        Kind::Url => scalar::base_url(text).map(drop),
        Kind::RedisUrl => RedisUrl::parse(text).map(drop),
        Kind::Host => redis_url::host(text),
        Kind::Username => redis_url::username(text),
        Kind::Password => redis_url::password(text),
        Kind::Prefix => redis_url::prefix(text),
        Kind::MetricsPrefix => scalar::metrics_prefix(text).map(drop),
        Kind::File => scalar::name(text),
        Kind::Date => scalar::date(text).map(drop),
        Kind::Endpoint => scalar::endpoint(text),
        Kind::OneOf(words) => scalar::one_of(text, words.iter().copied()),
        Kind::Strategy => scalar::strategy(text).map(drop),
        Kind::Mode => scalar::mode(text),
        Kind::Dimension => scalar::dimension(text).map(drop),
        Kind::Quota => Ok(()),
        Kind::List { of, .. } | Kind::OneOrMany { of, .. } | Kind::Named { of, .. } => self::text(of, text),
        Kind::Map(_) | Kind::Either(_) | Kind::Typed(_) => Ok(()),
    }
}

/// How a refused text is named in its message: itself, unless that could show a secret.
pub(super) fn subject(kind: &Kind, scalar: &Scalar) -> String {
    if scalar.expanded
        || kind.is_secret()
        || matches!(kind, Kind::Url | Kind::RedisUrl)
        || scalar.text.is_empty()
    {
        return "the value".to_owned();
    }
    quoted(&scalar.text)
}

fn value(kind: &Kind, node: &Node, path: &str, problems: &mut Problems) {
    if problems.is_full() || matches!(node.value, Value::Faulty) {
        return;
    }
    match kind {
        Kind::Map(section) => map(section, node, path, problems),
        Kind::Named { of, max } => named(of, *max, node, path, problems),
        Kind::List { of, min, max } => match &node.value {
            Value::List(items) => list(of, *min, *max, items, node, path, problems),
            _ => wrong_shape(kind, node, path, problems),
        },
        Kind::OneOrMany { of, max } => match &node.value {
            Value::List(items) => list(of, 1, *max, items, node, path, problems),
            Value::Scalar(_) => value(of, node, path, problems),
            _ => wrong_shape(kind, node, path, problems),
        },
        Kind::Either(kinds) => match kinds.iter().find(|kind| fits(kind, node)) {
            Some(kind) => value(kind, node, path, problems),
            None => wrong_shape(kind, node, path, problems),
        },
        Kind::Typed(types) => typed(types, node, path, problems),
        _ => match &node.value {
            Value::Scalar(scalar) => {
                if let Err(Fault { what, help }) = text(kind, &scalar.text) {
                    problems.error(node.at, path, format!("{} {what}", subject(kind, scalar)), help);
                }
            }
            _ => wrong_shape(kind, node, path, problems),
        },
    }
}

fn list(of: &Kind, min: usize, max: usize, items: &[Node], node: &Node, path: &str, problems: &mut Problems) {
    if items.len() < min {
        problems.error(
            node.at,
            path,
            "an empty list says nothing",
            "leave the key out, or name at least one",
        );
    }
    if items.len() > max {
        problems.error(
            node.at,
            path,
            format!("{} entries are too many", items.len()),
            format!("at most {max}"),
        );
        return;
    }
    for (index, item) in items.iter().enumerate() {
        value(of, item, &format!("{path}[{index}]"), problems);
    }
}

fn map(section: &Section, node: &Node, path: &str, problems: &mut Problems) {
    let Value::Map(entries) = &node.value else {
        return no_map(node, path, problems);
    };
    for entry in entries.iter().filter(|entry| !entry.key.starts_with("x-")) {
        let path = join(path, &entry.key);
        match section.key(&entry.key) {
            None => {
                let help = suggest(&entry.key, section.keys.iter().map(|key| key.name));
                problems.error(entry.at, &path, "unknown key", help);
            }
            Some(key) => given(key, entry, section, &path, problems),
        }
    }
    for key in section.keys.iter().filter(|key| matches!(key.default, WhenAbsent::Required)) {
        if node.get(key.name).is_none() {
            problems.error(node.at, path, format!("{} is missing", quoted(key.name)), key.hint());
        }
    }
}

/// A known key. `server:` with everything below it commented out is as good as left out.
fn given(key: &Key, entry: &Entry, section: &Section, path: &str, problems: &mut Problems) {
    let at_top = std::ptr::eq(section.keys, ROOT.keys);
    let may_be_empty =
        at_top && !matches!(key.kind, Kind::OneOf(_)) && !matches!(key.default, WhenAbsent::Required);
    match &entry.value.value {
        Value::Null if may_be_empty => {}
        Value::Null => problems.error(entry.at, path, "has no value", "give it one, or leave the key out"),
        _ => value(&key.kind, &entry.value, path, problems),
    }
}

fn named(of: &Kind, max: usize, node: &Node, path: &str, problems: &mut Problems) {
    let Value::Map(entries) = &node.value else {
        return no_map(node, path, problems);
    };
    if entries.len() > max {
        problems.error(
            node.at,
            path,
            format!("{} entries are too many", entries.len()),
            format!("at most {max}"),
        );
        return;
    }
    for entry in entries.iter().filter(|entry| !entry.key.starts_with("x-")) {
        let path = join(path, &entry.key);
        if let Err(Fault { what, help }) = scalar::rule_name(&entry.key) {
            problems.error(entry.at, &path, format!("{} {what}", quoted(&entry.key)), help);
        }
        value(of, &entry.value, &path, problems);
    }
}

fn typed(types: Types, node: &Node, path: &str, problems: &mut Problems) {
    if !matches!(node.value, Value::Map(_)) {
        return no_map(node, path, problems);
    }
    let words = types.iter().flat_map(|(words, _)| words.iter().copied());
    let Some(entry) = node.get("type") else {
        let help = format!("allowed: {}", words.collect::<Vec<_>>().join(", "));
        return problems.error(node.at, path, "`type` is missing", help);
    };
    match (&entry.value.value, section_of(types, node)) {
        (_, Some(section)) => map(section, node, path, problems),
        (Value::Scalar(wrong), None) => {
            let message = format!("{} is not a type of provider", subject(&Kind::OneOf(&[]), wrong));
            problems.error(entry.value.at, &join(path, "type"), message, suggest(&wrong.text, words));
        }
        (Value::Faulty, None) => {}
        (_, None) => wrong_shape(&Kind::OneOf(&[]), &entry.value, &join(path, "type"), problems),
    }
}

/// The section that the `type` of a map chooses.
pub(super) fn section_of(types: Types, node: &Node) -> Option<&'static Section> {
    let word = node.get("type")?.value.as_text()?;
    types.iter().find(|(words, _)| words.contains(&word)).map(|(_, section)| *section)
}

fn no_map(node: &Node, path: &str, problems: &mut Problems) {
    let message = format!("expected keys and values, found {}", found(&node.value));
    problems.error(node.at, path, message, "");
}

fn wrong_shape(kind: &Kind, node: &Node, path: &str, problems: &mut Problems) {
    let message = format!("expected {}, found {}", expected(kind), found(&node.value));
    problems.error(node.at, path, message, "");
}

/// Whether a value has the shape that a kind needs, whatever is in it.
fn fits(kind: &Kind, node: &Node) -> bool {
    match &node.value {
        Value::List(_) => matches!(kind, Kind::List { .. } | Kind::OneOrMany { .. }),
        Value::Map(_) => is_map(kind),
        Value::Scalar(_) => !is_map(kind) && !matches!(kind, Kind::List { .. }),
        Value::Null | Value::Faulty => false,
    }
}

fn is_map(kind: &Kind) -> bool {
    matches!(kind, Kind::Map(_) | Kind::Named { .. } | Kind::Typed(_))
}

fn expected(kind: &Kind) -> String {
    match kind {
        Kind::List { .. } => "a list".to_owned(),
        Kind::OneOrMany { .. } => "a value or a list".to_owned(),
        Kind::Either(kinds) => kinds.iter().map(expected).collect::<Vec<_>>().join(", or "),
        kind if is_map(kind) => "keys and values".to_owned(),
        _ => "a value".to_owned(),
    }
}

fn found(value: &Value) -> &'static str {
    match value {
        Value::Null => "nothing",
        Value::Scalar(_) | Value::Faulty => "a value",
        Value::List(_) => "a list",
        Value::Map(_) => "keys and values",
    }
}
