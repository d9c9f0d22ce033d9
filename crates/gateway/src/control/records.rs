//! What is kept: one kind of record each for keys, users, bans, limits and drains. As JSON, so that another version of the
//! program can read what this one wrote: what it does not know it passes over.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

use super::time::Time;
use super::value::{Control, Kind, Table};
use crate::config;
use crate::identity::counted;

/// A kind of record.
pub trait Stored: Serialize + DeserializeOwned {
    /// Which.
    const KIND: Kind;
    /// All of them.
    fn table(control: &Control) -> &Table<Self>
    where
        Self: Sized;
    /// The same, to be changed.
    fn table_mut(control: &mut Control) -> &mut Table<Self>
    where
        Self: Sized;
    /// As operators and the audit see it: without what nobody needs to know.
    fn shown(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }
}

/// A key that the admin API made or took in. Its id is that of the record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct KeyRecord {
    /// SHA-256 of the key, 64 hex digits.
    #[serde(with = "hex")]
    pub hash: [u8; 32],
    /// What people call it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Whose it is: a user of the file or of the control data.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// In place of the user's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// In place of the user's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// The only models it may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// Quotas of its own: `60/minute`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub limits: Vec<String>,
    /// Whatever its owner wants to remember.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
    /// When it was made or taken in.
    pub created: Time,
    /// Refused from then on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<Time>,
    /// Refused since then.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revoked: Option<Time>,
    /// What it was before it was rotated, accepted for a while.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub previous: Option<Previous>,
}

/// The key that another one took the place of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Previous {
    /// SHA-256 of the old key.
    #[serde(with = "hex")]
    pub hash: [u8; 32],
    /// Refused from then on.
    pub until: Time,
}

impl Stored for KeyRecord {
    const KIND: Kind = Kind::Key;
    fn table(control: &Control) -> &Table<Self> {
        &control.keys
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.keys
    }
    fn shown(&self) -> Value {
        let mut shown = serde_json::to_value(self).unwrap_or_default();
        if let Some(fields) = shown.as_object_mut() {
            fields.remove("hash");
            if let Some(previous) = fields.get_mut("previous").and_then(Value::as_object_mut) {
                previous.remove("hash");
            }
        }
        shown
    }
}

/// Who may call. Its name is the id of the record.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct UserRecord {
    /// Free text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub team: Option<String>,
    /// A name in `tiers`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
    /// The only models it may use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub models: Option<Vec<String>>,
    /// Whatever operators want to remember.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metadata: BTreeMap<String, String>,
}

impl Stored for UserRecord {
    const KIND: Kind = Kind::User;
    fn table(control: &Control) -> &Table<Self> {
        &control.users
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.users
    }
}

/// Who is let in no more.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ban {
    /// Whom it is about.
    pub subject: BanSubject,
    /// Told to who is banned.
    pub reason: String,
    /// Over from then on; `None`: for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub until: Option<Time>,
    /// When it was set.
    pub created: Time,
}

impl Ban {
    /// For who is banned.
    pub fn sentence(&self) -> String {
        let until = self.until.map(|end| format!(" until {end}")).unwrap_or_default();
        format!("You are banned{until}: {}", self.reason)
    }
}

impl Stored for Ban {
    const KIND: Kind = Kind::Ban;
    fn table(control: &Control) -> &Table<Self> {
        &control.bans
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.bans
    }
}

/// Whom a ban is about, written `ip:192.0.2.1`, `network:192.0.2.0/24`, `api_key:ID`, `user:NAME`, `session:HASH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BanSubject {
    /// Addresses; one IPv6 address is its /64, as it is counted.
    Network(IpNet),
    /// A key, by its id.
    ApiKey(String),
    /// A user, by name.
    User(String),
    /// Address and `User-Agent`, hashed.
    Session(String),
}

impl BanSubject {
    /// Reads one.
    ///
    /// # Errors
    /// What is wrong, and what is allowed.
    pub fn parse(text: &str) -> Result<Self, String> {
        const HELP: &str =
            "write ip:192.0.2.1, network:192.0.2.0/24, api_key:ID, user:NAME or session:16 hex digits";
        let (scope, value) = text.split_once(':').ok_or_else(|| format!("is no subject; {HELP}"))?;
        match scope {
            "ip" | "network" => match (config::network(value)?, value.parse::<IpAddr>()) {
                (_, Ok(address @ IpAddr::V6(_))) if address.to_canonical() == address => {
                    let all_of_it = IpNet::new(counted(address), 64).map_err(|error| error.to_string())?;
                    Ok(Self::Network(all_of_it))
                }
                (_, Ok(address)) => Ok(Self::Network(address.to_canonical().into())),
                (network, Err(_)) => Ok(Self::Network(network)),
            },
            "api_key" => config::name(value).map(Self::ApiKey),
            "user" => config::name(value).map(Self::User),
            "session" if value.len() == 16 && value.bytes().all(|b| b.is_ascii_hexdigit()) => {
                Ok(Self::Session(value.to_ascii_lowercase()))
            }
            _ => Err(format!("is no subject; {HELP}")),
        }
    }
}

impl fmt::Display for BanSubject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) if network.prefix_len() == network.max_prefix_len() => {
                write!(f, "ip:{}", network.addr())
            }
            Self::Network(network) => write!(f, "network:{network}"),
            Self::ApiKey(id) => write!(f, "api_key:{id}"),
            Self::User(name) => write!(f, "user:{name}"),
            Self::Session(hash) => write!(f, "session:{hash}"),
        }
    }
}

impl Serialize for BanSubject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for BanSubject {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

/// A rule over those of the file. Its name is the id of the record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LimitOverride {
    /// As an entry of `limits`, without the name: what it means is worked out anew with each configuration.
    pub spec: Value,
    /// Over from then on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires: Option<Time>,
    /// When it was set.
    pub created: Time,
}

impl Stored for LimitOverride {
    const KIND: Kind = Kind::Limit;
    fn table(control: &Control) -> &Table<Self> {
        &control.limits
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.limits
    }
}

impl LimitOverride {
    /// Whether it holds now.
    pub fn holds(&self) -> bool {
        !self.expires.is_some_and(Time::has_come)
    }
}

/// A provider that gets no new requests. The id of the record is `MODEL/PROVIDER`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Drain {
    /// Why, for other operators.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Since when.
    pub created: Time,
}

impl Stored for Drain {
    const KIND: Kind = Kind::Drain;
    fn table(control: &Control) -> &Table<Self> {
        &control.drains
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.drains
    }
}

/// A subject whose counters were cleared. The id of the record is the subject; what it says is when. Instances forget what
/// they remember of it when they learn of a later version.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Clear {
    /// When.
    pub created: Time,
}

impl Stored for Clear {
    const KIND: Kind = Kind::Clear;
    fn table(control: &Control) -> &Table<Self> {
        &control.clears
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.clears
    }
}

/// A hash as 64 hex digits.
mod hex {
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        let text: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        crate::config::sha256(&format!("sha256:{text}")).map_err(D::Error::custom)
    }
}
