//! What people who run a Redis want to know of it.

use std::fmt;
use std::time::{Duration, Instant};

/// How the servers of a store belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Topology {
    /// One server, or one address that means one.
    Single,
    /// A master that sentinels name.
    Sentinel,
    /// Several masters, each with its part of the keys.
    Cluster,
}

impl Topology {
    /// `single`, `sentinel`, `cluster`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Topology::Single => "single",
            Topology::Sentinel => "sentinel",
            Topology::Cluster => "cluster",
        }
    }
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How a store is connected, as this process sees it: nothing is asked.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Status {
    /// Whether there is a connection that answers; of a cluster, one to each master.
    pub connected: bool,
    /// How the servers belong together.
    pub topology: Topology,
    /// Of the master, or of all of them with commas between: `10.0.0.1:6379`. Where none is known, what was asked
    /// for. Never with a password.
    pub address: String,
    /// Connections to each server: one for every runtime that [joined](super::RedisStore::join_runtime), and one.
    pub lanes: usize,
    /// Since when it is connected, or is not.
    pub since: Instant,
    /// Why it is not connected, when that is known.
    pub problem: Option<String>,
    /// The version that the server tells, if it does: `7.0.15`.
    pub version: Option<String>,
    /// The role that the server had when it was connected, if it tells: `master`.
    pub role: Option<String>,
}

/// What `INFO` says; many rented servers say only a part of it. Of a cluster, the masters together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerInfo {
    /// `7.0.15`; of a cluster, the first master's.
    pub version: Option<String>,
    /// `master`.
    pub role: Option<String>,
    /// Bytes in use.
    pub used_memory: Option<u64>,
    /// Bytes that may be used; 0 is no bound.
    pub maxmemory: Option<u64>,
    /// What happens there: `noeviction`. Of a cluster whose masters differ, one that evicts.
    pub maxmemory_policy: Option<String>,
    /// Keys that were evicted since the server started.
    pub evicted_keys: Option<u64>,
    /// Connections of clients.
    pub connected_clients: Option<u64>,
    /// Replicas that are connected.
    pub replicas: Option<u64>,
    /// How long ago the replica that lags most was last heard of. `None` without replicas.
    pub replication_lag: Option<Duration>,
}

impl ServerInfo {
    /// Whether counters may vanish before their time: the server evicts keys when its memory is full.
    pub fn evicts(&self) -> bool {
        self.maxmemory_policy.as_ref().is_some_and(|policy| policy != "noeviction")
    }

    /// Reads the answer to `INFO`.
    pub(super) fn parse(text: &str) -> ServerInfo {
        let mut info = ServerInfo::default();
        for line in text.lines() {
            let Some((name, value)) = line.trim().split_once(':') else {
                continue;
            };
            let number = || value.parse().ok();
            match name {
                "redis_version" => info.version = Some(value.to_string()),
                "role" => info.role = Some(value.to_string()),
                "used_memory" => info.used_memory = number(),
                "maxmemory" => info.maxmemory = number(),
                "maxmemory_policy" => info.maxmemory_policy = Some(value.to_string()),
                "evicted_keys" => info.evicted_keys = number(),
                "connected_clients" => info.connected_clients = number(),
                "connected_slaves" => info.replicas = number(),
                // slave0:ip=10.0.0.2,port=6379,state=online,offset=42,lag=1
                _ if name.strip_prefix("slave").is_some_and(|n| n.parse::<u32>().is_ok()) => {
                    let lag = value.split(',').find_map(|part| part.strip_prefix("lag=")?.parse().ok());
                    info.replication_lag = info.replication_lag.max(lag.map(Duration::from_secs));
                }
                _ => {}
            }
        }
        info
    }

    /// Both together.
    pub(super) fn and(self, other: ServerInfo) -> ServerInfo {
        let sum = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a.saturating_add(b)).or(a).or(b);
        let policy = if self.evicts() {
            self.maxmemory_policy
        } else {
            other.maxmemory_policy.or(self.maxmemory_policy)
        };
        ServerInfo {
            version: self.version.or(other.version),
            role: self.role.or(other.role),
            used_memory: sum(self.used_memory, other.used_memory),
            maxmemory: sum(self.maxmemory, other.maxmemory),
            maxmemory_policy: policy,
            evicted_keys: sum(self.evicted_keys, other.evicted_keys),
            connected_clients: sum(self.connected_clients, other.connected_clients),
            replicas: sum(self.replicas, other.replicas),
            replication_lag: self.replication_lag.max(other.replication_lag),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ServerInfo;
    use std::time::Duration;

    #[test]
    fn info_is_read_as_far_as_it_goes() {
        let text = "# Memory\r\nused_memory:1000\r\nmaxmemory_policy:allkeys-lru\r\nevicted_keys:7\r\n\
                    role:master\r\nconnected_slaves:2\r\nslave0:ip=::1,port=1,state=online,offset=9,lag=0\r\n\
                    slave1:ip=h,port=2,state=online,offset=9,lag=3\r\nslave_priority:100\r\nnonsense\r\n";
        let info = ServerInfo::parse(text);
        assert_eq!((info.used_memory, info.evicted_keys, info.replicas), (Some(1_000), Some(7), Some(2)));
        assert_eq!(info.replication_lag, Some(Duration::from_secs(3)));
        assert!(info.evicts() && info.connected_clients.is_none());
        assert_eq!(ServerInfo::parse(""), ServerInfo::default());
        let calm = ServerInfo::parse("used_memory:1\r\nmaxmemory_policy:noeviction\r\n");
        assert!(!calm.evicts() && calm.clone().and(info.clone()).evicts());
        let both = info.and(calm);
        assert!(both.evicts());
        assert_eq!(both.used_memory, Some(1_001));
    }
}
