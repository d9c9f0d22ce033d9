//! Moments as operators read and write them.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A moment to the second: `2027-01-01T12:00:00Z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time(u64);

impl Time {
    /// By the clock of this machine.
    pub fn now() -> Self {
        SystemTime::now().into()
    }

    /// The first whole second after so long a wait from now.
    pub fn after(wait: Duration) -> Self {
        let end = SystemTime::now().checked_add(wait).unwrap_or(UNIX_EPOCH);
        let since = end.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(since.as_secs() + u64::from(since.subsec_nanos() > 0))
    }

    /// Since 1970.
    pub fn unix_seconds(self) -> u64 {
        self.0
    }

    /// How long until then.
    pub fn wait(self) -> Duration {
        SystemTime::from(self).duration_since(SystemTime::now()).unwrap_or_default()
    }

    /// Whether it lies in the past, or is this moment.
    pub fn has_come(self) -> bool {
        SystemTime::from(self) <= SystemTime::now()
    }
}

impl From<SystemTime> for Time {
    fn from(time: SystemTime) -> Self {
        Self(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs())
    }
}

impl From<Time> for SystemTime {
    fn from(time: Time) -> Self {
        UNIX_EPOCH.checked_add(Duration::from_secs(time.0)).unwrap_or(UNIX_EPOCH)
    }
}

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = i64::try_from(self.0).unwrap_or(i64::MAX);
        let shown = jiff::Timestamp::from_second(seconds).unwrap_or(jiff::Timestamp::MAX);
        // Whole seconds whatever the latest moment has.
        write!(f, "{shown:.0}")
    }
}

impl Serialize for Time {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Time {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        crate::config::date(&text).map(Self::from).map_err(D::Error::custom)
    }
}

/// A moment to the millisecond: `2027-01-01T12:00:00.250Z`.
pub fn precise(time: SystemTime) -> String {
    let shown = jiff::Timestamp::try_from(time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{shown:.3}")
}
