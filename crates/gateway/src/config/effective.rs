//! The configuration that is in force: defaults filled into the tree before it is resolved, and the tree printed with
//! its secrets masked.

use serde_json::{Map, Value as Json, json};

use super::check::section_of;
use super::keys::ROOT;
use super::kind::{Kind, Section, WhenAbsent, join};
use super::problem::{Origin, Problems};
use super::redis_url::RedisUrl;
use super::tree::{Entry, Node, Value};

/// Adds what was left out and has a default. A section that was left out appears when something in it has one.
pub(super) fn fill_defaults(root: &mut Node) {
    fill(&ROOT, root);
}

/// `{"config": …, "origins": {"server.listen": "tollgate.yml:3:11", …}}`, every secret as `***`.
pub(super) fn effective(root: &Node, problems: &Problems) -> Json {
    let mut origins = Map::new();
    let config = print_map(&ROOT, root, "", problems, &mut origins);
    json!({ "config": config, "origins": origins })
}

fn fill(section: &Section, node: &mut Node) {
    let Value::Map(entries) = &mut node.value else {
        return;
    };
    for key in section.keys {
        let position = entries.iter().position(|entry| entry.key == key.name);
        match position {
            Some(index) if !matches!(entries[index].value.value, Value::Null) => {
                fill_value(&key.kind, &mut entries[index].value);
            }
            _ => {
                let Some(mut value) = default_of(key.default) else {
                    continue;
                };
                fill_value(&key.kind, &mut value);
                entries.retain(|entry| entry.key != key.name);
                entries.push(Entry { key: key.name.to_owned(), at: Origin::Default, value });
            }
        }
    }
}

fn default_of(default: WhenAbsent) -> Option<Node> {
    let value = match default {
        WhenAbsent::Text(text) => return Some(Node::text(Origin::Default, text)),
        WhenAbsent::List(texts) => {
            Value::List(texts.iter().map(|t| Node::text(Origin::Default, *t)).collect())
        }
        WhenAbsent::Section => Value::Map(Vec::new()),
        WhenAbsent::Required | WhenAbsent::Nothing => return None,
    };
    Some(Node { at: Origin::Default, value })
}

fn fill_value(kind: &Kind, node: &mut Node) {
    match kind {
        Kind::Map(section) => fill(section, node),
        Kind::Typed(types) => {
            if let Some(section) = section_of(types, node) {
                fill(section, node);
            }
        }
        Kind::Either(kinds) => kinds.iter().for_each(|kind| fill_value(kind, node)),
        Kind::Named { of, .. } => {
            if let Value::Map(entries) = &mut node.value {
                entries.iter_mut().for_each(|entry| fill_value(of, &mut entry.value));
            }
        }
        Kind::List { of, .. } | Kind::OneOrMany { of, .. } => {
            if let Value::List(items) = &mut node.value {
                items.iter_mut().for_each(|item| fill_value(of, item));
            }
        }
        _ => {}
    }
}

fn print(kind: &Kind, node: &Node, path: &str, problems: &Problems, origins: &mut Map<String, Json>) -> Json {
    match (kind, &node.value) {
        (Kind::Either(kinds), _) => {
            let is_map = matches!(node.value, Value::Map(_));
            let chosen = kinds.iter().find(|kind| matches!(kind, Kind::Map(_)) == is_map);
            chosen.map_or(Json::Null, |kind| print(kind, node, path, problems, origins))
        }
        (Kind::Map(section), _) => print_map(section, node, path, problems, origins),
        (Kind::Typed(types), _) => {
            section_of(types, node).map_or(Json::Null, |s| print_map(s, node, path, problems, origins))
        }
        (Kind::Named { of, .. }, Value::Map(entries)) => {
            let named = entries.iter().filter(|entry| !entry.key.starts_with("x-")).map(|entry| {
                let value = print(of, &entry.value, &join(path, &entry.key), problems, origins);
                (entry.key.clone(), value)
            });
            Json::Object(named.collect())
        }
        (Kind::List { of, .. } | Kind::OneOrMany { of, .. }, Value::List(items)) => {
            origins.insert(path.to_owned(), problems.place(node.at).into());
            let print_item = |(index, item)| print(of, item, &format!("{path}[{index}]"), problems, origins);
            Json::Array(items.iter().enumerate().map(print_item).collect())
        }
        (Kind::OneOrMany { of, .. }, Value::Scalar(_)) => print(of, node, path, problems, origins),
        (_, Value::Scalar(scalar)) => {
            origins.insert(path.to_owned(), problems.place(node.at).into());
            if kind.is_secret() { "***".into() } else { typed_scalar(kind, &scalar.text) }
        }
        _ => Json::Null,
    }
}

fn print_map(
    section: &Section,
    node: &Node,
    path: &str,
    problems: &Problems,
    origins: &mut Map<String, Json>,
) -> Json {
    let mut out = Map::new();
    for key in section.keys {
        if let Some(entry) = node.get(key.name) {
            out.insert(
                key.name.to_owned(),
                print(&key.kind, &entry.value, &join(path, key.name), problems, origins),
            );
        }
    }
    Json::Object(out)
}

/// Numbers and booleans as such, everything else as the text that was written.
fn typed_scalar(kind: &Kind, text: &str) -> Json {
    match kind {
        Kind::Bool => (text == "true").into(),
        Kind::Integer { min, max } => super::scalar::integer(text, *min, *max).map_or(Json::Null, Json::from),
        Kind::Fraction => super::scalar::fraction(text).map_or(Json::Null, Json::from),
        Kind::Decimal { .. } => text.replace('_', "").parse::<f64>().map_or(Json::Null, Json::from),
        Kind::RedisUrl => RedisUrl::parse(text).map_or(Json::Null, |url| url.masked().into()),
        _ => text.into(),
    }
}
