//! The fields of a JSON body: each read once, what is wrong with all of them said together, unknown ones refused.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::StatusCode;
use serde_json::{Map, Value};

use super::problem::{Fault, Problem};
use crate::config;
use crate::control::Time;

/// Entries of `metadata`, and bytes of a value.
const METADATA_MAX: usize = 16;
const METADATA_BYTES_MAX: usize = 512;
/// Characters of free text.
const TEXT_CHARS_MAX: usize = 512;

/// What remains to be read of a body, and what was wrong so far.
pub(super) struct Fields {
    left: Map<String, Value>,
    known: Vec<&'static str>,
    pub(super) faults: Vec<Fault>,
}

/// What a body says of a field.
#[derive(Debug)]
pub(super) enum Given<T> {
    /// Nothing, or what is wrong.
    Absent,
    /// `null`: it is to be as if it had never been said.
    Null,
    Value(T),
}

impl<T> Given<T> {
    /// What holds then.
    pub(super) fn or(self, before: Option<T>) -> Option<T> {
        match self {
            Self::Absent => before,
            Self::Null => None,
            Self::Value(value) => Some(value),
        }
    }

    pub(super) fn value(self) -> Option<T> {
        self.or(None)
    }
}

impl Fields {
    /// Of a body that is one JSON object; an empty one has none.
    pub(super) fn of(body: &Bytes) -> Result<Self, Problem> {
        if body.trim_ascii().is_empty() {
            return Ok(Self::of_map(Map::new()));
        }
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self::of_map(map)),
            Ok(_) => Err(Problem::new(StatusCode::BAD_REQUEST, "the body is no JSON object")),
            Err(error) => Err(Problem::new(StatusCode::BAD_REQUEST, format!("the body is no JSON: {error}"))),
        }
    }

    /// Of an object.
    pub(super) fn of_map(left: Map<String, Value>) -> Self {
        Self { left, known: Vec::new(), faults: Vec::new() }
    }

    /// A text that means something.
    pub(super) fn text<T>(
        &mut self,
        name: &'static str,
        read: impl FnOnce(&str) -> Result<T, String>,
    ) -> Given<T> {
        match self.take(name) {
            None => Given::Absent,
            Some(Value::Null) => Given::Null,
            Some(Value::String(text)) => match read(&text) {
                Ok(value) => Given::Value(value),
                Err(why) => self.wrong(name, why),
            },
            Some(_) => self.wrong(name, "is no text"),
        }
    }

    /// A list of texts, or one in place of it.
    pub(super) fn texts<T>(
        &mut self,
        name: &'static str,
        max: usize,
        read: impl Fn(&str) -> Result<T, String>,
    ) -> Given<Vec<T>> {
        let items = match self.take(name) {
            None => return Given::Absent,
            Some(Value::Null) => return Given::Null,
            Some(text @ Value::String(_)) => vec![text],
            Some(Value::Array(items)) => items,
            Some(_) => return self.wrong(name, "is no list of texts"),
        };
        if items.len() > max {
            return self.wrong(name, format!("has {} entries; at most {max} are allowed", items.len()));
        }
        let before = self.faults.len();
        let mut values = Vec::with_capacity(items.len());
        for (index, item) in items.iter().enumerate() {
            match item.as_str().ok_or_else(|| "is no text".to_owned()).and_then(&read) {
                Ok(value) => values.push(value),
                Err(detail) => self.faults.push(Fault { field: format!("{name}[{index}]"), detail }),
            }
        }
        if self.faults.len() == before { Given::Value(values) } else { Given::Absent }
    }

    /// A whole number within bounds.
    pub(super) fn number(&mut self, name: &'static str, min: u64, max: u64) -> Option<u64> {
        match self.take(name)?.as_u64() {
            Some(number) if (min..=max).contains(&number) => Some(number),
            _ => self.wrong(name, format!("is no whole number of {min} to {max}")).value(),
        }
    }

    /// Names and texts of the operator's own.
    pub(super) fn metadata(&mut self) -> Given<BTreeMap<String, String>> {
        let map = match self.take("metadata") {
            None => return Given::Absent,
            Some(Value::Null) => return Given::Null,
            Some(Value::Object(map)) => map,
            Some(_) => return self.wrong("metadata", "is no object of texts"),
        };
        if map.len() > METADATA_MAX {
            return self.wrong("metadata", format!("has more than {METADATA_MAX} entries"));
        }
        let mut metadata = BTreeMap::new();
        for (key, value) in map {
            let fits = config::name(&key).is_ok();
            match value {
                Value::String(value) if fits && value.len() <= METADATA_BYTES_MAX => {
                    metadata.insert(key, value);
                }
                _ => {
                    let why = format!("names with texts of at most {METADATA_BYTES_MAX} bytes are allowed");
                    return self.wrong("metadata", why);
                }
            }
        }
        Given::Value(metadata)
    }

    /// When something ends: at a moment (`end`: `expires`, `until`), or in a while (`expires_in`).
    pub(super) fn end(&mut self, end: &'static str) -> Given<Time> {
        let at = self.text(end, |text| {
            let time = Time::from(config::date(text)?);
            if time.has_come() { Err("lies in the past".to_owned()) } else { Ok(time) }
        });
        let after = self.text("expires_in", |text| Ok(Time::after(config::duration(text)?)));
        match (at, after) {
            (at, Given::Absent) => at,
            (Given::Absent, after) => after,
            _ => self.wrong("expires_in", format!("`{end}` says it already")),
        }
    }

    /// What is wrong with a field that was read.
    pub(super) fn wrong<T>(&mut self, field: &str, detail: impl Into<String>) -> Given<T> {
        self.faults.push(Fault { field: field.to_owned(), detail: detail.into() });
        Given::Absent
    }

    /// What nobody read: a field of its own notation.
    pub(super) fn rest(self) -> (Map<String, Value>, Vec<Fault>) {
        (self.left, self.faults)
    }

    /// Refuses the body if anything was wrong with it, or if there are fields that nobody reads.
    pub(super) fn finish(mut self) -> Result<(), Problem> {
        let known = self.known.join(", ");
        for field in self.left.keys() {
            let detail = format!("unknown field; allowed: {known}");
            self.faults.push(Fault { field: field.chars().take(64).collect(), detail });
        }
        if self.faults.is_empty() { Ok(()) } else { Err(Problem::fields(self.faults)) }
    }

    /// A missing field that must be there.
    pub(super) fn needed<T>(&mut self, name: &'static str, given: Given<T>) -> Option<T> {
        let before = self.faults.iter().any(|fault| fault.field == name);
        let value = given.value();
        if value.is_none() && !before {
            self.faults.push(Fault { field: name.to_owned(), detail: "is missing".to_owned() });
        }
        value
    }

    fn take(&mut self, name: &'static str) -> Option<Value> {
        self.known.push(name);
        self.left.shift_remove(name)
    }
}

/// A sentence for people.
pub(super) fn sentence(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() || text.chars().count() > TEXT_CHARS_MAX || text.chars().any(char::is_control) {
        return Err(format!("is empty, has control characters, or more than {TEXT_CHARS_MAX} characters"));
    }
    Ok(text.to_owned())
}
