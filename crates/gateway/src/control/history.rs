//! What operators made of a limit, version by version, so that they can see it and go back.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::records::{LimitOverride, Stored};
use super::time::Time;
use super::value::{Author, Change, Control, Kind, Table};

/// Versions kept of one limit.
const VERSIONS_MAX: usize = 50;
/// Bytes of JSON kept of one limit; its latest version is kept whatever its size.
const BYTES_MAX: usize = 64 << 10;
/// Limits whose versions are kept; then the one that was changed longest ago is forgotten.
const HISTORIES_MAX: usize = 2_000;

/// The last versions of one limit. Its name is the id of the record; it stays when the limit is deleted.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct History {
    /// What was before the first of `versions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    base: Option<LimitOverride>,
    /// The oldest first.
    versions: Vec<Version>,
}

/// One change of a limit.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Version {
    /// Of the control data: that of the record in the audit.
    pub version: u64,
    /// When.
    pub time: Time,
    /// Who.
    pub actor: String,
    /// Where from.
    pub address: IpAddr,
    /// `put`, `delete`, `rollback`.
    pub action: String,
    /// What it became; `None`: the file's rule holds again, if there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<LimitOverride>,
}

impl Stored for History {
    const KIND: Kind = Kind::History;
    fn table(control: &Control) -> &Table<Self> {
        &control.histories
    }
    fn table_mut(control: &mut Control) -> &mut Table<Self> {
        &mut control.histories
    }
}

impl History {
    /// Each version with what was before it, the latest first.
    pub fn latest_first(&self) -> impl Iterator<Item = (&Version, Option<&LimitOverride>)> {
        self.versions.iter().enumerate().rev().map(|(place, version)| {
            let before = match place.checked_sub(1) {
                Some(place) => self.versions[place].after.as_ref(),
                None => self.base.as_ref(),
            };
            (version, before)
        })
    }

    /// The version of this number.
    pub fn version(&self, number: u64) -> Option<&Version> {
        self.versions.iter().find(|version| version.version == number)
    }

    fn push(&mut self, version: Version) {
        self.versions.push(version);
        let bytes = |version: &Version| serde_json::to_string(version).map_or(0, |json| json.len());
        let mut room = BYTES_MAX;
        let fits = |version: &&Version| {
            room = room.saturating_sub(bytes(version));
            room > 0
        };
        let kept = self.versions.iter().rev().take(VERSIONS_MAX).take_while(fits).count().max(1);
        if let Some(last) = self.versions.drain(..self.versions.len() - kept).next_back() {
            self.base = last.after;
        }
    }
}

/// Adds to a change of a limit what its history is to tell.
pub fn remember(
    change: &mut Change,
    now: &Control,
    author: &Author,
    (name, action): (&str, &str),
    after: Option<LimitOverride>,
) {
    let before =
        || History { base: now.limits.get(name).map(|over| over.value.clone()), versions: Vec::new() };
    let mut history = now.histories.get(name).map_or_else(before, |history| history.value.clone());
    history.push(Version {
        version: now.version + 1,
        time: Time::now(),
        actor: author.name.clone(),
        address: author.address,
        action: action.to_owned(),
        after,
    });
    if !now.histories.contains_key(name) && now.histories.len() >= HISTORIES_MAX {
        let oldest = now
            .histories
            .iter()
            .min_by_key(|(name, history)| (now.limits.contains_key(name.as_str()), history.version));
        oldest.into_iter().for_each(|(name, _)| change.forget::<History>(name));
    }
    change.put_unnoted(name, &history);
}
