//! The JSON Schema of the configuration file, made from the table of keys, for editors.

use serde_json::{Map, Value as Json, json};
use tollgate_limiter::{Algorithm, Dimension};

use super::keys::ROOT;
use super::kind::{Kind, Section, WhenAbsent};

/// JSON Schema, draft 2020-12, of a `tollgate.yml`. A `${VARIABLE}` is allowed wherever a number or a word is.
pub fn schema() -> Json {
    let mut definitions = Map::new();
    let mut root = section(&ROOT, &mut definitions);
    if let Json::Object(root) = &mut root {
        root.insert("$schema".into(), "https://json-schema.org/draft/2020-12/schema".into());
        root.insert("title".into(), "tollgate.yml".into());
        root.insert("$defs".into(), Json::Object(definitions));
    }
    root
}

fn section(section: &Section, definitions: &mut Map<String, Json>) -> Json {
    let mut properties = Map::new();
    for key in section.keys {
        let mut value = kind(&key.kind, definitions);
        if let Json::Object(value) = &mut value {
            value.insert("description".into(), key.doc.into());
            match key.default {
                WhenAbsent::Text(text) => drop(value.insert("default".into(), text.into())),
                WhenAbsent::List(texts) => drop(value.insert("default".into(), texts.into())),
                WhenAbsent::Required | WhenAbsent::Nothing | WhenAbsent::Section => {}
            }
        }
        properties.insert(key.name.into(), value);
    }
    let required = section.keys.iter().filter(|key| matches!(key.default, WhenAbsent::Required));
    // `models` may come from the environment.
    let required: Vec<&str> =
        required.map(|key| key.name).filter(|_| !std::ptr::eq(section.keys, ROOT.keys)).collect();
    json!({
        "type": "object",
        "properties": properties,
        "patternProperties": { "^x-": true },
        "additionalProperties": false,
        "required": required,
    })
}

fn kind(of: &Kind, definitions: &mut Map<String, Json>) -> Json {
    let text = |pattern: &str| json!({ "anyOf": [{ "type": "string", "pattern": pattern }, variable()] });
    match of {
        Kind::Name => json!({ "type": ["string", "number", "boolean"] }),
        Kind::Quota => json!({ "type": "string" }),
        Kind::Secret | Kind::AdminKey | Kind::ApiKey => json!({ "type": ["string", "number"] }),
        Kind::RuleName => text("^[A-Za-z0-9._-]{1,64}$"),
        Kind::KeyHash => text("^sha256:[0-9A-Fa-f]{64}$"),
        Kind::KeyId => json!({ "type": ["string", "number"] }),
        Kind::Bool => json!({ "anyOf": [{ "type": "boolean" }, { "enum": ["true", "false"] }, variable()] }),
        Kind::Integer { min, max } => {
            json!({ "anyOf": [{ "type": "integer", "minimum": min, "maximum": max }, { "type": "string", "pattern": "^[0-9_]+$" }, variable()] })
        }
        Kind::Fraction => {
            json!({ "anyOf": [{ "type": "number", "minimum": 0, "maximum": 1 }, variable()] })
        }
        Kind::Decimal { places, max } => json!({ "anyOf": [
            { "type": "number", "minimum": 0, "maximum": max },
            { "type": "string", "pattern": format!("^[0-9_]+([.][0-9]{{1,{places}}})?$") },
            variable(),
        ] }),
        Kind::Duration { .. } => text("^[0-9_]+ *(ms|s|m|h|d)$"),
        Kind::Size { .. } => text("^[0-9_]+ *([KMG]i?)?B$"),
        Kind::Address | Kind::Network | Kind::RedisUrl | Kind::File => json!({ "type": "string" }),
        Kind::Host | Kind::Username | Kind::Password | Kind::Prefix => {
            json!({ "type": ["string", "number"] })
        }
        Kind::Url => text("^https?://"),
        Kind::MetricsPrefix => text("^[a-zA-Z_:][a-zA-Z0-9_:]*$"),
        Kind::Date => text("^[0-9]{4}-[0-9]{2}-[0-9]{2}"),
        Kind::Endpoint => text("^/"),
        Kind::OneOf(words) => words_of(words.iter().copied()),
        Kind::Strategy => words_of(Algorithm::ALL.iter().map(|algorithm| algorithm.as_str())),
        Kind::Mode => words_of(["strict"].into_iter()),
        Kind::Dimension => {
            words_of(Dimension::ALL.iter().map(|dimension| dimension.as_str()).chain(["global"]))
        }
        Kind::List { of, min, max } => {
            json!({ "type": "array", "items": kind(of, definitions), "minItems": min, "maxItems": max })
        }
        Kind::OneOrMany { of, max } => {
            let one = kind(of, definitions);
            json!({ "anyOf": [one, { "type": "array", "items": one, "minItems": 1, "maxItems": max }] })
        }
        Kind::Map(section) => reference(section, definitions),
        Kind::Named { of, max } => json!({
            "type": "object",
            "patternProperties": { "^x-": true },
            "additionalProperties": kind(of, definitions),
            "maxProperties": max,
        }),
        Kind::Either(kinds) => {
            json!({ "anyOf": kinds.iter().map(|of| kind(of, definitions)).collect::<Vec<_>>() })
        }
        Kind::Typed(types) => {
            let sections = types.iter().map(|(_, section)| reference(section, definitions));
            json!({ "anyOf": sections.collect::<Vec<_>>() })
        }
    }
}

fn reference(of: &'static Section, definitions: &mut Map<String, Json>) -> Json {
    if !definitions.contains_key(of.name) {
        let definition = section(of, definitions);
        definitions.insert(of.name.into(), definition);
    }
    json!({ "$ref": format!("#/$defs/{}", of.name) })
}

fn words_of<'a>(words: impl Iterator<Item = &'a str>) -> Json {
    json!({ "anyOf": [{ "enum": words.collect::<Vec<_>>() }, variable()] })
}

fn variable() -> Json {
    json!({ "type": "string", "pattern": "\\$\\{" })
}
