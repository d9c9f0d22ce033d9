//! `${NAME}`, `${NAME:-default}` and `$$` in every scalar value, once. What a variable holds is never expanded again and
//! never changes the structure; keys are left alone. Between `://` and `@` of a `url` it is percent-encoded, so that a
//! password may hold anything.

use std::collections::BTreeSet;
use std::ops::Range;

use super::Environment;
use super::kind::join;
use super::problem::{Origin, Problems, quoted};
use super::redis_url::encoded;
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
        let is_url = path == "url" || path.ends_with(".url");
        let userinfo = if is_url { userinfo(&scalar.text) } else { 0..0 };
        match self.expand(&scalar.text, userinfo) {
            Ok((text, expanded)) => Value::Scalar(Scalar { text, expanded, plain: scalar.plain }),
            Err((message, help)) => {
                self.problems.error(at, path, message, help);
                Value::Faulty
            }
        }
    }

    /// The text with its variables replaced, those that stand in `userinfo` percent-encoded, and whether there was any;
    /// or message and help.
    fn expand(&mut self, text: &str, userinfo: Range<usize>) -> Result<(String, bool), (String, String)> {
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
                let value = self.variable(inside)?;
                let at = text.len() - rest.len() + dollar;
                out.push_str(&if userinfo.contains(&at) { encoded(&value) } else { value });
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

/// Where user and password stand in a URL whose variables are not replaced yet. What a variable holds, and its default,
/// does not move the borders.
fn userinfo(template: &str) -> Range<usize> {
    let mut plain = template.as_bytes().to_vec();
    let mut from = 0;
    while let Some(dollar) = template[from..].find('$').map(|at| from + at) {
        let after = &template[dollar + 1..];
        from = match after.find('}') {
            Some(end) if after.starts_with('{') => {
                plain[dollar..dollar + end + 2].fill(b'x');
                dollar + end + 2
            }
            _ if after.starts_with('$') => dollar + 2,
            _ => dollar + 1,
        };
    }
    let Some(start) = plain.windows(3).position(|three| three == b"://").map(|at| at + 3) else {
        return 0..0;
    };
    let authority = plain[start..].split(|b| matches!(b, b'/' | b'?' | b'#')).next().unwrap_or_default();
    let end = authority.iter().rposition(|b| *b == b'@').unwrap_or_default();
    start..start + end
}
