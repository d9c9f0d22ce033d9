//! What the environment says where the file does not. It is put into the tree as if it were written there, so that it
//! meets the same checks.

use std::collections::BTreeSet;

use super::Environment;
use super::problem::{Origin, Problems};
use super::redis_url;
use super::resolve::NO_STATE;
use super::resolve_redis::PARTS;
use super::scalar;
use super::tree::{Entry, Node, Value};

/// Requests a minute and address when there is neither a file nor `REQUEST_RATE_LIMIT`.
const REQUEST_RATE_LIMIT: &str = "60";
/// The largest amount a variable may ask for.
const AMOUNT_MAX: u64 = 1_000_000_000;
/// Digits after the point of a refill rate.
const DECIMALS_MAX: usize = 6;

/// Completes a file's tree. Gives back the accepted keys that belong to nobody in particular.
pub(super) fn complete(
    root: &mut Node,
    env: Environment<'_>,
    named: &BTreeSet<String>,
    problems: &mut Problems,
) -> Vec<Node> {
    let mut from = Overlay { env, named, problems };
    from.set(root, "server", "listen", "TOLLGATE_LISTEN");
    from.set(root, "server", "admin_key", "TOLLGATE_ADMIN_KEY");
    if from.is_free(root, "models", &["TOLLGATE_UPSTREAM", "TOLLGATE_UPSTREAM_KEY"]) {
        from.upstream(root);
    }
    if from.is_free(
        root,
        "limits",
        &["REQUEST_RATE_LIMIT", "RATE_LIMITER_CAPACITY", "RATE_LIMITER_REFILL_RATE"],
    ) {
        let per_ip =
            from.get("REQUEST_RATE_LIMIT").map(|text| (Origin::Variable("REQUEST_RATE_LIMIT"), text));
        from.limits(root, per_ip);
    }
    from.redis(root);
    if from.is_free(root, "users", &["API_KEYS"]) { from.api_keys() } else { Vec::new() }
}

/// Builds the whole tree. `None`: the environment says nothing; the reason is among the problems then.
pub(super) fn build(env: Environment<'_>, problems: &mut Problems) -> Option<(Node, Vec<Node>)> {
    let named = BTreeSet::new();
    let mut from = Overlay { env, named: &named, problems };
    if from.get("TOLLGATE_UPSTREAM").is_none() {
        from.problems.error(
            Origin::Variable("TOLLGATE_UPSTREAM"),
            "",
            "no configuration file, and this variable is not set",
            "give a file with -c, or set TOLLGATE_UPSTREAM to the URL of a provider, or try `tollgate demo`",
        );
        return None;
    }
    let mut root = Node { at: Origin::Default, value: Value::Map(Vec::new()) };
    from.set(&mut root, "server", "listen", "TOLLGATE_LISTEN");
    from.set(&mut root, "server", "admin_key", "TOLLGATE_ADMIN_KEY");
    from.upstream(&mut root);
    let per_ip = match from.get("REQUEST_RATE_LIMIT") {
        Some(text) => (Origin::Variable("REQUEST_RATE_LIMIT"), text),
        None => (Origin::Default, REQUEST_RATE_LIMIT.to_owned()),
    };
    from.limits(&mut root, Some(per_ip));
    from.redis(&mut root);
    // Who has no file of ours is not given one.
    let nowhere = Node::text(Origin::Default, NO_STATE);
    merge(&mut root, "settings", map(Origin::Default, vec![("state", nowhere)]));
    let keys = from.api_keys();
    if from.get("API_KEYS").is_none() {
        // Nobody needs a key, so nobody from outside is let in unless asked for.
        insert(&mut root, "auth", Node::text(Origin::Default, "optional"));
        if from.get("TOLLGATE_LISTEN").is_none() {
            let listen =
                map(Origin::Default, vec![("listen", Node::text(Origin::Default, "127.0.0.1:8080"))]);
            merge(&mut root, "server", listen);
        }
    }
    Some((root, keys))
}

struct Overlay<'a> {
    env: Environment<'a>,
    /// Variables that the file mentions.
    named: &'a BTreeSet<String>,
    problems: &'a mut Problems,
}

impl Overlay<'_> {
    /// A variable that is set and not empty.
    fn get(&self, variable: &str) -> Option<String> {
        (self.env)(variable).filter(|value| !value.is_empty())
    }

    /// Whether the file leaves a key out. If not, the variables lose.
    fn is_free(&mut self, root: &Node, key: &str, variables: &[&'static str]) -> bool {
        match root.get(key) {
            Some(entry) if !matches!(entry.value.value, Value::Null) => {
                let (at, path) = (entry.at, key.to_owned());
                variables.iter().for_each(|variable| self.loses(variable, &path, at));
                false
            }
            _ => true,
        }
    }

    fn loses(&mut self, variable: &'static str, path: &str, to: Origin) {
        if self.get(variable).is_some() && !self.named.contains(variable) {
            let message = format!("has no effect: the file says `{path}` at {}", self.problems.place(to));
            let help = format!("unset it, or write ${{{variable}}} in the file");
            self.problems.warning(Origin::Variable(variable), "", message, help);
        }
    }

    /// One value of a section.
    fn set(&mut self, root: &mut Node, section: &str, key: &'static str, variable: &'static str) {
        let Some(value) = self.get(variable) else { return };
        match root.get(section).and_then(|entry| entry.value.get(key)) {
            Some(entry) => self.loses(variable, &format!("{section}.{key}"), entry.at),
            None => {
                let at = Origin::Variable(variable);
                merge(root, section, map(at, vec![(key, Node::text(at, value))]));
            }
        }
    }

    fn upstream(&mut self, root: &mut Node) {
        let Some(url) = self.get("TOLLGATE_UPSTREAM") else {
            if self.get("TOLLGATE_UPSTREAM_KEY").is_some() {
                let at = Origin::Variable("TOLLGATE_UPSTREAM_KEY");
                self.problems.warning(at, "", "has no effect without TOLLGATE_UPSTREAM", "");
            }
            return;
        };
        let at = Origin::Variable("TOLLGATE_UPSTREAM");
        let mut provider = vec![("type", Node::text(at, "openai")), ("url", Node::text(at, url))];
        if let Some(key) = self.get("TOLLGATE_UPSTREAM_KEY") {
            provider.push(("key", Node::text(Origin::Variable("TOLLGATE_UPSTREAM_KEY"), key)));
        }
        let providers = list(at, vec![map(at, provider)]);
        let model = map(at, vec![("name", Node::text(at, "*")), ("providers", providers)]);
        insert(root, "models", list(at, vec![model]));
    }

    fn limits(&mut self, root: &mut Node, per_ip: Option<(Origin, String)>) {
        let mut rules = Vec::new();
        if let Some((at, text)) = per_ip {
            match scalar::integer(&text, 1, AMOUNT_MAX) {
                Ok(amount) => rules.push(rule(at, "ip", "ip", format!("{amount}/minute"), None)),
                Err(fault) => {
                    let message = format!("{} {}", super::problem::quoted(&text), fault.what);
                    self.problems.error(at, "", message, fault.help);
                }
            }
        }
        if let Some(quota) = self.bucket() {
            let at = Origin::Variable("RATE_LIMITER_CAPACITY");
            rules.push(rule(at, "api-key", "api_key", quota, Some("token_bucket")));
        }
        if !rules.is_empty() {
            insert(root, "limits", list(Origin::Default, rules));
        }
    }

    /// `RATE_LIMITER_CAPACITY` and `RATE_LIMITER_REFILL_RATE` as one quota.
    fn bucket(&mut self) -> Option<String> {
        const CAPACITY: &str = "RATE_LIMITER_CAPACITY";
        const REFILL: &str = "RATE_LIMITER_REFILL_RATE";
        let (capacity, refill) = match (self.get(CAPACITY), self.get(REFILL)) {
            (Some(capacity), Some(refill)) => (capacity, refill),
            (None, None) => return None,
            (capacity, _) => {
                let (missing, other) =
                    if capacity.is_none() { (CAPACITY, REFILL) } else { (REFILL, CAPACITY) };
                let message = format!("is not set, but {other} is");
                self.problems.error(Origin::Variable(missing), "", message, "a token bucket needs both");
                return None;
            }
        };
        let burst = scalar::integer(&capacity, 1, AMOUNT_MAX);
        if let Err(fault) = &burst {
            let message = format!("{} {}", super::problem::quoted(&capacity), fault.what);
            self.problems.error(Origin::Variable(CAPACITY), "", message, fault.help.clone());
        }
        let rate = per_second(&refill);
        if rate.is_none() {
            let message = format!("{} is not a number of requests a second", super::problem::quoted(&refill));
            let help =
                format!("allowed: above 0, up to {AMOUNT_MAX}, at most {DECIMALS_MAX} decimals: 5 or 0.5");
            self.problems.error(Origin::Variable(REFILL), "", message, help);
        }
        let (amount, seconds) = rate?;
        let burst = burst.ok()?;
        Some(format!("{amount}/{seconds} seconds burst {burst}"))
    }

    /// `API_KEYS`, comma separated.
    fn api_keys(&mut self) -> Vec<Node> {
        const KEYS: &str = "API_KEYS";
        let Some(text) = self.get(KEYS) else {
            return Vec::new();
        };
        let mut keys = Vec::new();
        for (index, key) in text.split(',').map(str::trim).enumerate() {
            match scalar::key_hash(key) {
                Ok(_) => keys.push(Node::text(Origin::Variable(KEYS), key)),
                Err(fault) => {
                    let message = format!("key {} {}", index + 1, fault.what);
                    self.problems.error(Origin::Variable(KEYS), "", message, fault.help);
                }
            }
        }
        keys
    }

    /// `dependencies.redis`: by `REDIS_URL`, or by `REDIS_ADDR`, `REDIS_PASSWORD` and `REDIS_DB`. A password and a
    /// database also complete a `host` of the file.
    fn redis(&mut self, root: &mut Node) {
        const URL: &str = "REDIS_URL";
        const ADDR: &str = "REDIS_ADDR";
        const REST: [(&str, &str); 2] = [("password", "REDIS_PASSWORD"), ("db", "REDIS_DB")];
        let there = root.get("dependencies").and_then(|entry| entry.value.get("redis"));
        let given = |key: &str| Some((key.to_owned(), there?.value.get(key)?.at));
        let (url, host) = (given("url"), given("host"));
        let part = PARTS.iter().find_map(|key| given(key));
        if let Some((key, at)) = &url {
            return [URL, ADDR, REST[0].1, REST[1].1]
                .into_iter()
                .for_each(|variable| self.loses_redis(variable, key, *at));
        }
        if let Some((key, at)) = &part {
            self.loses_redis(URL, key, *at);
        } else if let Some(text) = self.get(URL) {
            put(root, "url", Node::text(Origin::Variable(URL), text));
            return [ADDR, REST[0].1, REST[1].1]
                .into_iter()
                .for_each(|variable| self.idle(variable, "REDIS_URL is set"));
        }
        let complete = REST.map(|(key, variable)| (key, variable, given(key)));
        match (&host, self.get(ADDR)) {
            (Some((key, at)), _) => self.loses_redis(ADDR, key, *at),
            (None, Some(text)) => {
                let port = given("port");
                self.address(root, &text, port.is_none());
            }
            (None, None) => {
                return REST.iter().for_each(|(_, variable)| self.idle(variable, "REDIS_ADDR is not set"));
            }
        }
        for (key, variable, given) in complete {
            match (given, self.get(variable)) {
                (Some((key, at)), _) => self.loses_redis(variable, &key, at),
                (None, Some(text)) => put(root, key, Node::text(Origin::Variable(variable), text)),
                (None, None) => {}
            }
        }
    }

    /// `REDIS_ADDR`: host and port.
    fn address(&mut self, root: &mut Node, text: &str, takes_port: bool) {
        let at = Origin::Variable("REDIS_ADDR");
        match redis_url::host_and_port(text) {
            Ok((host, port)) => {
                put(root, "host", Node::text(at, host));
                if let (Some(port), true) = (port, takes_port) {
                    put(root, "port", Node::text(at, port.to_string()));
                }
            }
            Err(fault) => {
                self.problems.error(
                    at,
                    "",
                    format!("{} {}", super::problem::quoted(text), fault.what),
                    fault.help,
                );
                // What is wrong is said; nothing more of it is looked for.
                put(root, "host", Node { at, value: Value::Faulty });
            }
        }
    }

    fn loses_redis(&mut self, variable: &'static str, key: &str, to: Origin) {
        self.loses(variable, &format!("dependencies.redis.{key}"), to);
    }

    /// A variable without effect, because of another one.
    fn idle(&mut self, variable: &'static str, because: &str) {
        if self.get(variable).is_some() && !self.named.contains(variable) {
            self.problems.warning(Origin::Variable(variable), "", format!("has no effect: {because}"), "");
        }
    }
}

/// A decimal number of units a second as whole units in whole seconds: 0.5 is 1 in 2.
fn per_second(text: &str) -> Option<(u64, u64)> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let decimals = decimals.trim_end_matches('0');
    let is_digits = |part: &str| part.bytes().all(|b| b.is_ascii_digit());
    if whole.is_empty()
        || whole.len() > 10
        || decimals.len() > DECIMALS_MAX
        || !is_digits(whole)
        || !is_digits(decimals)
    {
        return None;
    }
    let seconds = 10_u64.pow(u32::try_from(decimals.len()).ok()?);
    let amount = format!("{whole}{decimals}").parse::<u64>().ok()?;
    if amount == 0 || amount > AMOUNT_MAX.checked_mul(seconds)? {
        return None;
    }
    let (mut a, mut b) = (amount, seconds);
    while b > 0 {
        (a, b) = (b, a % b);
    }
    Some((amount / a, seconds / a))
}

fn rule(at: Origin, name: &str, per: &str, limit: String, strategy: Option<&str>) -> Node {
    let mut keys =
        vec![("name", Node::text(at, name)), ("per", Node::text(at, per)), ("limit", Node::text(at, limit))];
    keys.extend(strategy.map(|strategy| ("strategy", Node::text(at, strategy))));
    map(at, keys)
}

fn list(at: Origin, items: Vec<Node>) -> Node {
    Node { at, value: Value::List(items) }
}

fn map(at: Origin, keys: Vec<(&str, Node)>) -> Node {
    let entry = |(key, value): (&str, Node)| Entry { key: key.to_owned(), at, value };
    Node { at, value: Value::Map(keys.into_iter().map(entry).collect()) }
}

/// Puts a key into `dependencies.redis`, and both sections where they are missing.
fn put(root: &mut Node, key: &str, value: Node) {
    let at = value.at;
    let mut node = root;
    for section in ["dependencies", "redis"] {
        let Value::Map(entries) = &mut node.value else { return };
        let index = match entries.iter().position(|entry| entry.key == section) {
            Some(index) => index,
            None => {
                entries.push(Entry { key: section.to_owned(), at, value: map(at, Vec::new()) });
                entries.len() - 1
            }
        };
        node = &mut entries[index].value;
        if matches!(node.value, Value::Null) {
            *node = map(at, Vec::new());
        }
    }
    insert(node, key, value);
}

/// Puts a key into a map in place of what is there. What is no map was reported already and stays.
fn insert(root: &mut Node, key: &str, value: Node) {
    if let Value::Map(entries) = &mut root.value {
        entries.retain(|entry| entry.key != key);
        entries.push(Entry { key: key.to_owned(), at: value.at, value });
    }
}

/// Adds the keys of a map to a section, which is made when it is not there.
fn merge(root: &mut Node, section: &str, more: Node) {
    let Value::Map(entries) = &mut root.value else {
        return;
    };
    match entries.iter_mut().find(|entry| entry.key == section).map(|entry| &mut entry.value.value) {
        Some(Value::Map(there)) => {
            if let Value::Map(more) = more.value {
                there.extend(more);
            }
        }
        Some(there @ Value::Null) => *there = more.value,
        Some(_) => {}
        None => entries.push(Entry { key: section.to_owned(), at: more.at, value: more }),
    }
}
