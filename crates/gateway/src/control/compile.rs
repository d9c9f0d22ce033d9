//! Configuration and control data together: what holds for requests.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use tollgate_limiter::Limit;

use super::records::{Ban, BanSubject, KeyRecord, UserRecord};
use super::time::Time;
use super::value::{Control, Record};
use crate::config::{self, Config, Key, Known, Own, User};
use crate::identity::Caller;

/// The name under which limits are counted and reported that a key has of its own. No rule of a file can have it.
pub const KEY_RULE: &str = "key:own";

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

/// Every key that is known.
pub struct Keys {
    /// By hash.
    pub by_hash: HashMap<[u8; 32], Arc<Key>, foldhash::fast::RandomState>,
    /// Ids of keys of operators in whose place the file has one, and what holds then.
    pub displaced: BTreeMap<String, &'static str>,
}

/// Every key: those of operators, and over them those of the file. A key of the file that operators have revoked stays so;
/// and of two keys with one id only that of the file is accepted, or they would share limits and bans.
pub fn keys(config: &Config, control: &Control) -> Keys {
    let mut keys = HashMap::with_capacity_and_hasher(
        config.keys.len() + control.keys.len(),
        foldhash::fast::RandomState::default(),
    );
    let mut displaced = BTreeMap::new();
    let of_file: HashMap<&str, &Key> = config.keys.iter().map(|key| (key.id.as_str(), key)).collect();
    keys.extend(config.keys.iter().map(|key| (key.hash, Arc::new(key.clone()))));
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
        if let Some(theirs) = of_file.get(id.as_str()) {
            let revoked = record.value.revoked.is_some();
            let what = match theirs.hash == record.value.hash {
                _ if revoked => "it is in the file too, and stays revoked",
                true => "it is in the file too, which says what holds for it",
                false => "another key with its id is in the file: it is refused",
            };
            displaced.insert(id.clone(), what);
            if revoked {
                keys.insert(theirs.hash, Arc::new(Key { revoked, ..(*theirs).clone() }));
            }
            continue;
        }
        let quotas = record.value.limits.as_slice();
        let limits = match quotas {
            [] => Vec::new(),
            quotas => limits.entry(quotas).or_insert_with(|| read(quotas)).clone(),
        };
        let (key, previous) = key(&models, &users, limits, id, &record.value);
        // A key that was rotated has no longer the id that its hash would give: the file has the last word.
        for key in previous.into_iter().chain([key]) {
            keys.entry(key.hash).or_insert_with(|| Arc::new(key));
        }
    }
    Keys { by_hash: keys, displaced }
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
