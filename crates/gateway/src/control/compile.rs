//! Configuration and control data together: what holds for requests.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tollgate_limiter::Limit;

use super::records::{Ban, BanSubject, KeyRecord, UserRecord};
use super::time::Time;
use super::value::{Control, Record};
use crate::config::{self, Config, Key, Known, Own, Rule, User};
use crate::identity::Caller;

/// The name under which limits are counted and reported that a key has of its own. No rule of a file can have it.
pub const KEY_RULE: &str = "key:own";

/// The rules that hold, and what is wrong with those that cannot.
pub struct Merged {
    /// In the order of the file; what operators added comes last.
    pub rules: Vec<Rule>,
    /// Rules of operators that mean nothing under this configuration: name, and why.
    pub idle: Vec<(String, String)>,
}

/// The rules of the file with those over them that hold now.
pub fn merged(config: &Config, control: &Control) -> Merged {
    let mut merged = Merged { rules: config.rules.clone(), idle: Vec::new() };
    if control.limits.is_empty() {
        return merged;
    }
    let known = known(config, control);
    for (name, record) in control.limits.iter().filter(|(_, record)| record.value.holds()) {
        match config::over_rule(config, &known, name, &record.value.spec) {
            Ok(rule) => match merged.rules.iter_mut().find(|there| there.name == *name) {
                Some(there) => *there = rule,
                None => merged.rules.push(rule),
            },
            Err(problems) => {
                let why: Vec<String> = problems.iter().map(ToString::to_string).collect();
                merged.idle.push((name.clone(), why.join("\n")));
            }
        }
    }
    merged
}

/// Everything that rules, keys and users may refer to.
pub fn known(config: &Config, control: &Control) -> Known {
    let user = |(name, record): (&String, &Arc<Record<UserRecord>>)| User {
        name: name.clone(),
        team: record.value.team.clone(),
        ..no_user()
    };
    let added: Vec<User> = control.users.iter().map(user).collect();
    config::table_of_names(config, added.iter())
}

/// Every key by its hash: those of operators, and over them those of the file.
pub fn keys(config: &Config, control: &Control) -> HashMap<[u8; 32], Arc<Key>> {
    let mut keys = HashMap::with_capacity(config.keys.len() + control.keys.len());
    let models: HashMap<&str, &str> = config
        .models
        .iter()
        .flat_map(|model| model.aliases.iter().chain([&model.name]).map(|name| (&**name, &*model.name)))
        .collect();
    let users = users(config, control, &models);
    // Many keys have the same limits: they are read once.
    let mut limits: HashMap<&[String], Vec<Arc<Limit>>> = HashMap::new();
    let read = |quotas: &[String]| {
        // They were looked at when they were taken in.
        config::key_limits(KEY_RULE, config.settings.defaults, quotas).unwrap_or_default()
    };
    for (id, record) in control.keys.iter() {
        let quotas = record.value.limits.as_slice();
        let limits = match quotas {
            [] => Vec::new(),
            quotas => limits.entry(quotas).or_insert_with(|| read(quotas)).clone(),
        };
        let (key, previous) = key(&models, &users, limits, id, &record.value);
        if let Some(previous) = previous {
            keys.insert(previous.hash, Arc::new(previous));
        }
        keys.insert(key.hash, Arc::new(key));
    }
    // The file has the last word.
    keys.extend(config.keys.iter().map(|key| (key.hash, Arc::new(key.clone()))));
    keys
}

fn users<'a>(
    config: &'a Config,
    control: &'a Control,
    models: &HashMap<&str, &str>,
) -> HashMap<&'a str, Arc<User>> {
    let added = control.users.iter().map(|(name, record)| {
        let record = &record.value;
        let user = User {
            name: name.clone(),
            team: record.team.clone(),
            tier: record.tier.clone(),
            models: record.models.as_ref().map(|names| resolved(names, models)),
        };
        (name.as_str(), Arc::new(user))
    });
    let mut users: HashMap<&str, Arc<User>> = added.collect();
    users.extend(config.users.iter().map(|user| (user.name.as_str(), user.clone())));
    users
}

fn key(
    models: &HashMap<&str, &str>,
    users: &HashMap<&str, Arc<User>>,
    limits: Vec<Arc<Limit>>,
    id: &str,
    record: &KeyRecord,
) -> (Key, Option<Key>) {
    // Limits of a user that is gone still hold for its keys together.
    let user = record.user.as_ref().map(|name| {
        let known = users.get(name.as_str()).cloned();
        known.unwrap_or_else(|| Arc::new(User { name: name.clone(), ..no_user() }))
    });
    let key = Key {
        hash: record.hash,
        id: id.to_owned(),
        name: record.name.clone(),
        expires: record.expires.map(Into::into),
        revoked: record.revoked.is_some(),
        user,
        own: Own {
            team: record.team.clone(),
            tier: record.tier.clone(),
            models: record.models.as_ref().map(|names| resolved(names, models)),
            limits,
        },
    };
    let previous = record.previous.as_ref().filter(|previous| !previous.until.has_come()).map(|previous| {
        let until = record.expires.map_or(previous.until, |end| end.min(previous.until));
        Key { hash: previous.hash, expires: Some(until.into()), ..key.clone() }
    });
    (key, previous)
}

/// Resolved names; one that is none any more allows nothing.
fn resolved(names: &[String], models: &HashMap<&str, &str>) -> Vec<String> {
    names.iter().map(|name| models.get(name.as_str()).map_or(name.clone(), |&name| name.to_owned())).collect()
}

fn no_user() -> User {
    User { name: String::new(), team: None, tier: None, models: None }
}

/// The bans that may hold, by whom they are about. Without any, a request pays for four comparisons.
#[derive(Default)]
pub struct Bans {
    networks: HashMap<IpNet, Ban>,
    /// Lengths of the prefixes among `networks`, each once.
    lengths: Vec<(u8, bool)>,
    keys: HashMap<String, Ban>,
    users: HashMap<String, Ban>,
    sessions: HashMap<String, Ban>,
}

impl Bans {
    /// Those of the control data.
    pub fn of(control: &Control) -> Self {
        let mut bans = Self::default();
        for ban in control.bans.values().map(|record| &record.value) {
            let ban = ban.clone();
            match &ban.subject {
                BanSubject::Network(network) => {
                    let length = (network.prefix_len(), network.addr().is_ipv4());
                    if !bans.lengths.contains(&length) {
                        bans.lengths.push(length);
                    }
                    bans.networks.insert(*network, ban);
                }
                BanSubject::ApiKey(id) => drop(bans.keys.insert(id.clone(), ban)),
                BanSubject::User(name) => drop(bans.users.insert(name.clone(), ban)),
                BanSubject::Session(hash) => drop(bans.sessions.insert(hash.clone(), ban)),
            }
        }
        bans
    }

    /// The ban that holds for a caller now.
    pub fn on(&self, caller: &Caller) -> Option<&Ban> {
        let of_key = || self.keys.get(caller.key.as_ref()?.id.as_str());
        let of_user = || self.users.get(caller.user()?);
        // Who somebody is in a session costs a hash.
        let of_session = || self.sessions.get(&(!self.sessions.is_empty()).then(|| caller.session())?);
        let holds = |ban: &&Ban| !ban.until.is_some_and(Time::has_come);
        let network = self.on_network(caller.address);
        network
            .or_else(|| of_key().filter(holds))
            .or_else(|| of_user().filter(holds))
            .or_else(|| of_session().filter(holds))
    }

    fn on_network(&self, address: IpAddr) -> Option<&Ban> {
        let lengths = self.lengths.iter().filter(|(_, of_v4)| *of_v4 == address.is_ipv4());
        let mut networks = lengths.filter_map(|&(length, _)| Some(IpNet::new(address, length).ok()?.trunc()));
        networks.find_map(|network| {
            self.networks.get(&network).filter(|ban| !ban.until.is_some_and(Time::has_come))
        })
    }
}
