//! A tree of values, each of which knows where it stands.

use super::problem::Origin;

/// One value, and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Node {
    /// Its first character.
    pub(super) at: Origin,
    /// What stands there.
    pub(super) value: Value,
}

/// What a [`Node`] is.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// Nothing, `~` or `null`.
    Null,
    /// Text, however it was quoted.
    Scalar(Scalar),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file, keys unique.
    Map(Vec<Entry>),
    /// Something wrong that was reported already.
    Faulty,
}

/// A piece of text.
#[derive(Clone, Debug)]
pub(super) struct Scalar {
    /// The text after YAML's own escapes.
    pub(super) text: String,
    /// Written without quotes.
    pub(super) plain: bool,
    /// Something in it came from an environment variable, so no message repeats it.
    pub(super) expanded: bool,
}

/// One key of a map with its value.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    /// The key.
    pub(super) key: String,
    /// Where the key stands.
    pub(super) at: Origin,
    /// Its value.
    pub(super) value: Node,
}

impl Node {
    /// Text that stands nowhere in a file.
    pub(super) fn text(at: Origin, text: impl Into<String>) -> Self {
        Self { at, value: Value::Scalar(Scalar { text: text.into(), plain: false, expanded: false }) }
    }

    /// The value of a key, if this is a map that has it.
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries().iter().find(|entry| entry.key == key)
    }

    /// Keys and values, if this is a map; otherwise none.
    pub(super) fn entries(&self) -> &[Entry] {
        match &self.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The items of a list; a scalar or map counts as a list of itself; nothing has none.
    pub(super) fn items(&self) -> &[Node] {
        match &self.value {
            Value::List(items) => items,
            Value::Null | Value::Faulty => &[],
            _ => std::slice::from_ref(self),
        }
    }

    /// The text, if this is a scalar.
    pub(super) fn as_text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(scalar) => Some(&scalar.text),
            _ => None,
        }
    }
}
