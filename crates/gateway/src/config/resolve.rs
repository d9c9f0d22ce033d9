//! From the checked tree to the typed configuration: names are looked up, secrets hashed, and what contradicts something
//! elsewhere is reported. Faulty parts were reported before and are passed over here.

use std::collections::HashMap;
use std::net::SocketAddr;

use super::keys::{SERVER, SETTINGS};
use super::kind::{Key, Kind, join};
use super::problem::{Origin, Problems, quoted, suggest};
use super::review::{self, Whole};
use super::scalar::{self, Fault};
use super::tree::{Node, Scalar, Value};
use super::{AdminKey, Auth, Config, LogFormat, Retention, Role, Secret, Server, Settings, State, Telemetry};
use super::{resolve_models, resolve_redis, resolve_rules, resolve_users};

/// What `settings.state` is where nothing is to be kept.
pub(super) const NO_STATE: &str = "none";

/// Resolves the whole tree. `None` when something in it was refused, now or before.
pub(super) fn resolve(root: &Node, api_keys: &[Node], problems: &mut Problems) -> Option<Config> {
    let (models, model_names) = resolve_models::models(root, problems);
    let tier_names = resolve_rules::tier_names(root);
    let mut users = resolve_users::users(root, &model_names, &tier_names, problems);
    resolve_users::keys_of_nobody(api_keys, &mut users, problems);
    let names = Names { models: &model_names, tiers: &tier_names, users: &users.names, teams: &users.teams };
    let rules = resolve_rules::rules(root, &names, problems);
    let server = server(root, problems);
    let redis = resolve_redis::redis(root, problems);
    let auth = auth(root);
    let settings = settings(root);
    let telemetry = telemetry(root);
    let whole = Whole {
        root,
        rules: &rules,
        models: &models,
        users: &users.users,
        keys: &users.keys,
        auth: auth.unwrap_or(Auth::Required),
    };
    review::review(&whole, problems);
    if problems.any_errors() {
        return None;
    }
    Some(Config {
        server: server?,
        redis,
        settings: settings?,
        telemetry: telemetry?,
        auth: auth?,
        rules,
        users: users.users,
        keys: users.keys,
        models,
    })
}

/// Everything a rule can refer to.
pub(super) struct Names<'a> {
    pub(super) models: &'a Index,
    pub(super) tiers: &'a Index,
    pub(super) users: &'a Index,
    pub(super) teams: &'a Index,
}

/// Names of one kind, and what each stands for.
#[derive(Debug, Default)]
pub(super) struct Index {
    meanings: HashMap<String, String>,
    /// In the order of the file, for messages.
    order: Vec<String>,
    /// Some name is not known, because its place is faulty or every name is one: nothing can be called missing.
    open: bool,
}

impl Index {
    /// A name, or another name for it. `false`: it is taken.
    pub(super) fn add(&mut self, name: &str, meaning: &str) -> bool {
        if self.meanings.contains_key(name) {
            return false;
        }
        self.meanings.insert(name.to_owned(), meaning.to_owned());
        self.order.push(name.to_owned());
        true
    }

    /// From now on every name is accepted.
    pub(super) fn leave_open(&mut self) {
        self.open = true;
    }

    /// What a name stands for, if it is in the index.
    pub(super) fn meaning<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.meanings.get(name).map(String::as_str).or(self.open.then_some(name))
    }

    /// The names that are allowed.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.order.iter().map(String::as_str)
    }

    /// What the text of a node stands for; not known: a problem.
    pub(super) fn look_up(&self, what: &str, item: &Item<'_>, problems: &mut Problems) -> Option<String> {
        match self.meaning(item.text) {
            Some(meaning) => Some(meaning.to_owned()),
            None => {
                if !problems.is_full() {
                    let message = format!("there is no {what} {}", item.quoted());
                    problems.error(item.at, &item.path, message, suggest(item.text, self.names()));
                }
                None
            }
        }
    }
}

/// One text of a list, or the text that stands in place of a list.
#[derive(Clone, Debug)]
pub(super) struct Item<'a> {
    pub(super) at: Origin,
    pub(super) path: String,
    pub(super) text: &'a str,
    /// Something in it came from an environment variable, so no message repeats it.
    pub(super) expanded: bool,
}

impl Item<'_> {
    /// The text for a message, unless that could show a secret.
    pub(super) fn quoted(&self) -> String {
        if self.expanded { "as the variable says".to_owned() } else { quoted(self.text) }
    }
}

/// The value of a key, read as text.
pub(super) fn read<T>(node: &Node, key: &str, parse: impl FnOnce(&str) -> Result<T, Fault>) -> Option<T> {
    parse(node.get(key)?.value.as_text()?).ok()
}

/// The texts under a key: of a list, or the one that stands there.
pub(super) fn texts<'a>(node: &'a Node, key: &str, path: &str) -> Vec<Item<'a>> {
    node.get(key).map_or_else(Vec::new, |entry| items(&entry.value, &join(path, key)))
}

/// The texts of a list, or the one that stands in place of a list.
pub(super) fn items<'a>(node: &'a Node, path: &str) -> Vec<Item<'a>> {
    let is_list = matches!(node.value, Value::List(_));
    let item = |(index, item): (usize, &'a Node)| {
        let path = if is_list { format!("{path}[{index}]") } else { path.to_owned() };
        match &item.value {
            Value::Scalar(Scalar { text, expanded, .. }) => {
                Some(Item { at: item.at, path, text, expanded: *expanded })
            }
            _ => None,
        }
    };
    node.items().iter().enumerate().filter_map(item).collect()
}

/// A duration, bounded as the table says.
pub(super) fn duration(node: &Node, key: &Key) -> Option<std::time::Duration> {
    let Kind::Duration { min, max } = key.kind else {
        return None;
    };
    read(node, key.name, |text| scalar::duration(text, min, max))
}

/// A decimal number in units of its last decimal, bounded as the table says.
pub(super) fn decimal(node: &Node, key: &Key) -> Option<u64> {
    let Kind::Decimal { places, max } = key.kind else {
        return None;
    };
    read(node, key.name, |text| scalar::decimal(text, places, max))
}

/// A whole number, bounded as the table says.
pub(super) fn integer(node: &Node, key: &Key) -> Option<u64> {
    let Kind::Integer { min, max } = key.kind else {
        return None;
    };
    read(node, key.name, |text| scalar::integer(text, min, max))
}

fn server(root: &Node, problems: &mut Problems) -> Option<Server> {
    let node = &root.get("server")?.value;
    let address = |key| read(node, key, scalar::address);
    let secret = |key| read(node, key, |text| scalar::secret(text).map(|()| Secret::new(text)));
    let size = |key: &str| match SERVER.key(key)?.kind {
        Kind::Size { min, max } => read(node, key, |text| scalar::size(text, min, max)),
        _ => None,
    };
    let (listen, admin) = (address("listen"), address("admin"));
    if let (Some(listen), Some(admin)) = (listen, admin) {
        check_listeners(node, listen, admin, problems);
    }
    let networks = texts(node, "trusted_proxies", "server");
    Some(Server {
        listen: listen?,
        admin: admin?,
        admin_key: secret("admin_key"),
        admin_keys: admin_keys(node, problems),
        metrics_key: secret("metrics_key"),
        trusted_proxies: networks.iter().filter_map(|item| scalar::network(item.text).ok()).collect(),
        shutdown_grace: duration(node, SERVER.key("shutdown_grace")?)?,
        max_body: size("max_body")?,
        max_upload: size("max_upload")?,
        max_connections_per_ip: usize::try_from(integer(node, SERVER.key("max_connections_per_ip")?)?)
            .ok()?,
    })
}

/// Keys and names are each for one: who had the second of two like keys would act in the name of the first.
fn admin_keys(node: &Node, problems: &mut Problems) -> Vec<AdminKey> {
    let first = node.get("admin_key").and_then(|entry| entry.value.as_text());
    let mut names = vec!["admin".to_owned()];
    let mut keys: Vec<&str> = first.into_iter().collect();
    let items = node.get("admin_keys").map_or(&[][..], |entry| entry.value.items());
    let mut read_keys = Vec::new();
    for (index, item) in items.iter().enumerate() {
        let text = |key: &str| item.get(key).and_then(|entry| entry.value.as_text());
        let (Some(name), Some(key), Some(role)) =
            (text("name"), text("key"), text("role").and_then(Role::of))
        else {
            continue;
        };
        let path = format!("server.admin_keys[{index}]");
        if names.iter().any(|other| other == name) {
            let help = "give each its own; `admin` is that of server.admin_key";
            problems.error(item.at, &path, "this name is taken", help);
        }
        if keys.contains(&key) {
            problems.error(
                item.at,
                &path,
                "this key is there already",
                "make one with `openssl rand -hex 32`",
            );
        }
        names.push(name.to_owned());
        keys.push(key);
        read_keys.push(AdminKey { name: name.to_owned(), key: Secret::new(key), role });
    }
    read_keys
}

fn check_listeners(node: &Node, listen: SocketAddr, admin: SocketAddr, problems: &mut Problems) {
    let place = |key: &str| node.get(key).map_or(node.at, |entry| entry.value.at);
    if !admin.ip().to_canonical().is_loopback()
        && node.get("admin_key").is_none()
        && node.get("admin_keys").is_none_or(|keys| keys.value.items().is_empty())
    {
        let message = format!("{admin} is no loopback address, and there is no `admin_key`");
        let help = "set server.admin_key, or listen on 127.0.0.1";
        problems.error(place("admin"), "server.admin", message, help);
    }
    let same_port = listen.port() == admin.port() && listen.port() != 0;
    let overlap = listen.ip().is_unspecified() || admin.ip().is_unspecified();
    if same_port && overlap && listen != admin {
        // Whoever wrote one of them wants to know where that one is.
        let key = if place("admin") == Origin::Default { "listen" } else { "admin" };
        let message =
            format!("`listen` is {listen} and `admin` is {admin}: both cannot have port {}", admin.port());
        problems.error(
            place(key),
            &join("server", key),
            message,
            "give them different ports, or the same address",
        );
    }
}

fn auth(root: &Node) -> Option<Auth> {
    match root.get("auth")?.value.as_text()? {
        "required" => Some(Auth::Required),
        "optional" => Some(Auth::Optional),
        _ => None,
    }
}

fn telemetry(root: &Node) -> Option<Telemetry> {
    let prefix = |text: &str| scalar::metrics_prefix(text).map(str::to_owned);
    Some(Telemetry { metrics_prefix: read(&root.get("telemetry")?.value, "metrics_prefix", prefix)? })
}

fn settings(root: &Node) -> Option<Settings> {
    let node = &root.get("settings")?.value;
    let log_format = match node.get("log_format")?.value.as_text()? {
        "json" => LogFormat::Json,
        "text" => LogFormat::Text,
        _ => return None,
    };
    let state = &node.get("state")?.value;
    let path = state.as_text()?;
    let is_default = state.at == Origin::Default;
    Some(Settings {
        defaults: resolve_rules::defaults(root),
        state: (path != NO_STATE).then(|| State { path: path.into(), is_default }),
        control_poll: duration(node, SETTINGS.key("control_poll")?)?,
        log_format,
        instances: u32::try_from(integer(node, SETTINGS.key("instances")?)?).ok()?,
        require_noeviction: read(node, "require_noeviction", scalar::boolean)?,
        usage: Retention {
            hours: duration(node, SETTINGS.key("usage_hours")?)?,
            days: duration(node, SETTINGS.key("usage_days")?)?,
        },
    })
}
