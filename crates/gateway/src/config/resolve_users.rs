//! `users` and their keys.

use std::collections::HashMap;
use std::sync::Arc;

use super::kind::join;
use super::problem::{Origin, Problems, quoted};
use super::resolve::{Index, read, texts};
use super::scalar;
use super::tree::{Node, Value};
use super::{Key, Own, User};

/// Hex digits of a key's id.
const KEY_ID_DIGITS: usize = 12;

/// All users and keys that are whole, and the names that rules may refer to.
#[derive(Default)]
pub(super) struct Users {
    pub(super) users: Vec<Arc<User>>,
    pub(super) keys: Vec<Key>,
    pub(super) names: Index,
    pub(super) teams: Index,
    /// Path of the first key with this hash.
    hashes: HashMap<[u8; 32], String>,
    /// The same by id.
    ids: HashMap<String, String>,
}

/// Reads `users`.
pub(super) fn users(root: &Node, models: &Index, tiers: &Index, problems: &mut Problems) -> Users {
    let mut out = Users::default();
    let nodes = root.get("users").map_or(&[][..], |entry| entry.value.items());
    for (i, node) in nodes.iter().enumerate() {
        let path = format!("users[{i}]");
        let user = user(node, &path, models, tiers, &mut out, problems).map(Arc::new);
        for (j, key) in node.get("keys").map_or(&[][..], |entry| entry.value.items()).iter().enumerate() {
            out.key(key, format!("{path}.keys[{j}]"), user.clone(), problems);
        }
        out.users.extend(user);
    }
    out
}

/// Adds the keys of `API_KEYS`.
pub(super) fn keys_of_nobody(keys: &[Node], out: &mut Users, problems: &mut Problems) {
    for key in keys {
        out.key(key, "API_KEYS".to_owned(), None, problems);
    }
}

fn user(
    node: &Node,
    path: &str,
    models: &Index,
    tiers: &Index,
    out: &mut Users,
    problems: &mut Problems,
) -> Option<User> {
    let text = |key| read(node, key, |text| scalar::name(text).map(|()| text.to_owned()));
    let (name, team) = (text("name"), text("team"));
    match &name {
        Some(name) if !out.names.add(name, name) => {
            let at = node.get("name").map_or(node.at, |entry| entry.value.at);
            let message = format!("a second user is called {}", quoted(name));
            problems.error(at, &join(path, "name"), message, "names are unique");
        }
        Some(_) => {}
        None => out.names.leave_open(),
    }
    if let Some(team) = &team {
        out.teams.add(team, team);
    }
    let tier = texts(node, "tier", path).first().and_then(|item| tiers.look_up("tier", item, problems));
    let allowed = node.get("models").map(|_| {
        let items = texts(node, "models", path);
        items.iter().filter_map(|item| models.look_up("model", item, problems)).collect()
    });
    Some(User { name: name?, team, tier, models: allowed })
}

impl Users {
    fn key(&mut self, node: &Node, path: String, user: Option<Arc<User>>, problems: &mut Problems) {
        let (hash, at) = match &node.value {
            Value::Map(_) => {
                (read(node, "hash", scalar::sha256), node.get("hash").map(|entry| entry.value.at))
            }
            _ => (node.as_text().and_then(|text| scalar::key_hash(text).ok()), None),
        };
        let Some(hash) = hash else { return };
        if let Some(first) = self.hashes.get(&hash) {
            let at = at.unwrap_or(node.at);
            let message = match at {
                Origin::Variable(_) => "the same key is listed twice".to_owned(),
                _ => format!("the same key is {first} already"),
            };
            return problems.error(at, &path, message, "a key has one owner");
        }
        let id: String = hash.iter().take(KEY_ID_DIGITS / 2).map(|byte| format!("{byte:02x}")).collect();
        if let Some(first) = self.ids.get(&id) {
            let message = format!("its id, {KEY_ID_DIGITS} digits of its hash, is that of {first}");
            return problems.error(at.unwrap_or(node.at), &path, message, "make another key");
        }
        self.hashes.insert(hash, path.clone());
        self.ids.insert(id.clone(), path);
        self.keys.push(Key {
            hash,
            id,
            name: read(node, "name", |text| scalar::name(text).map(|()| text.to_owned())),
            expires: read(node, "expires", scalar::date),
            revoked: false,
            user,
            own: Own::default(),
        });
    }
}
