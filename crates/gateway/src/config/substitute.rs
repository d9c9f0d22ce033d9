//! `${NAME}`, `${NAME:-default}` and `$$` in every scalar value, once. What a variable holds is never expanded again and
//! never changes the structure; keys are left alone.

use std::collections::BTreeSet;

use super::Environment;
use super::kind::join;
use super::problem::{Origin, Problems, quoted};
use super::tree::{Node, Scalar, Value};

/// Bytes that all variables together may add.
const ADDED_BYTES_MAX: usize = 4 << 20;

/// Replaces variables in every scalar of the tree. Gives back the names of all variables that the file mentions.
pub(super) fn substitute(root: &mut Node, env: Environment<'_>, problems: &mut Problems) -> BTreeSet<String> {
    let mut walk = Walk { env, problems, named: BTreeSet::new(), left: ADDED_BYTES_MAX };
    walk.node(root, "");
    walk.named
}

struct Walk<'a> {
    env: Environment<'a>,
    problems: &'a mut Problems,
    named: BTreeSet<String>,
    left: usize,
}

impl Walk<'_> {
    fn node(&mut self, node: &mut Node, path: &str) {
        match &mut node.value {
            Value::Null | Value::Faulty => {}
            Value::Scalar(scalar) => {
                if scalar.text.contains('$') {
                    node.value = self.scalar(scalar, node.at, path);
                }
            }
            Value::List(items) => {
                for (index, item) in items.iter_mut().enumerate() {
                    self.node(item, &format!("{path}[{index}]"));
                }
            }
            Value::Map(entries) => {
                for entry in entries.iter_mut().filter(|entry| !entry.key.starts_with("x-")) {
                    self.node(&mut entry.value, &join(path, &entry.key));
                }
            }
        }
    }

    fn scalar(&mut self, scalar: &Scalar, at: Origin, path: &str) -> Value {
        match self.expand(&scalar.text) {
            Ok((text, expanded)) => Value::Scalar(Scalar { text, expanded, plain: scalar.plain }),
            Err((message, help)) => {
                self.problems.error(at, path, message, help);
                Value::Faulty
            }
        }
    }

    /// The text with its variables replaced, and whether there was any; or message and help.
    fn expand(&mut self, text: &str) -> Result<(String, bool), (String, String)> {
        let mut out = String::with_capacity(text.len());
        let mut expanded = false;
        let mut rest = text;
        while let Some(dollar) = rest.find('$') {
            out.push_str(&rest[..dollar]);
            let after = &rest[dollar + 1..];
            if let Some(after) = after.strip_prefix('$') {
                out.push('$');
                rest = after;
            } else if let Some(after) = after.strip_prefix('{') {
                let Some((inside, after)) = after.split_once('}') else {
                    return Err(("`${` without `}`".into(), "write `$$` for a dollar sign".into()));
                };
                out.push_str(&self.variable(inside)?);
                expanded = true;
                rest = after;
            } else {
                out.push('$');
                rest = after;
            }
        }
        out.push_str(rest);
        Ok((out, expanded))
    }

    fn variable(&mut self, inside: &str) -> Result<String, (String, String)> {
        let (name, default) = match inside.split_once(":-") {
            Some((name, default)) => (name, Some(default)),
            None => (inside, None),
        };
        let starts_well = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !starts_well || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            let message = format!("{} is not the name of a variable", quoted(name));
            return Err((
                message,
                "allowed: `${NAME}`, `${NAME:-default}`; write `$$` for a dollar sign".into(),
            ));
        }
        self.named.insert(name.to_owned());
        let value = match ((self.env)(name), default) {
            (Some(value), None) => value,
            (Some(value), Some(_)) if !value.is_empty() => value,
            (_, Some(default)) => default.to_owned(),
            (None, None) => {
                let message = format!("the environment variable {} is not set", quoted(name));
                return Err((message, format!("set it, or write `${{{name}:-default}}`")));
            }
        };
        self.left = self
            .left
            .checked_sub(value.len())
            .ok_or_else(|| ("the variables hold more than 4 MiB".to_owned(), String::new()))?;
        Ok(value)
    }
}
