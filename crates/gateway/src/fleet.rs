//! This instance among the others: what it tells of itself about once a second, and what all of them say together.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::Gateway;
use crate::control::{About, Time, Unavailable};
use crate::limits::Limits;
use crate::rates::{Rate, Totals};

/// How often it tells.
const TELL_EVERY: Duration = Duration::from_millis(900);
/// Of how many subjects one instance tells.
const RATES_MAX: usize = 1_000;

/// Which one this is.
#[derive(Clone, Debug)]
pub struct Instance {
    name: String,
    started: Time,
    since: Instant,
}

impl Instance {
    /// A new one: named after the host, with a number that no other has.
    pub fn new() -> Self {
        let host = rustix::system::uname();
        let host = host.nodename().to_string_lossy();
        let name = format!("{host}-{:08x}", fastrand::u32(..));
        Self { name, started: Time::now(), since: Instant::now() }
    }

    /// Unlike that of any other.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When it started.
    pub fn started(&self) -> Time {
        self.started
    }

    /// How long ago that was.
    pub fn uptime(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Default for Instance {
    fn default() -> Self {
        Self::new()
    }
}

/// Tells of itself until the process ends. A Redis that is away is told when it is back.
pub async fn run(gateway: Arc<Gateway>) {
    loop {
        tokio::time::sleep(TELL_EVERY).await;
        gateway.limits.measure(&gateway.store_latency).await;
        // Who follows the control data says when it cannot be reached.
        let _ = tell(&gateway).await;
    }
}

/// Tells now; gives back the totals of the fleet, or `None` where there is no fleet.
///
/// # Errors
/// When Redis does not answer.
pub async fn tell(gateway: &Gateway) -> Result<Option<Totals>, Unavailable> {
    let own = gateway.rates.totals();
    gateway.control.publish(&about(gateway), &gateway.rates.fullest(RATES_MAX), own).await
}

/// Totals and fullest limits.
pub struct Told {
    /// Of the fleet; of this instance, where there is no other that is heard.
    pub totals: Totals,
    /// Of each subject its fullest limit.
    pub rates: Vec<Rate>,
    /// Whether all of it is of the fleet.
    pub of_fleet: bool,
}

/// Totals and fullest limits of the fleet; those of this instance while the others cannot be heard.
pub async fn rates(gateway: &Gateway) -> Told {
    if gateway.limits.is_degraded() {
        return own(gateway);
    }
    let Ok(Some(totals)) = tell(gateway).await else { return own(gateway) };
    match gateway.control.rates().await {
        Ok(said) => Told { totals, rates: together(said), of_fleet: true },
        Err(_) => Told { totals, ..own(gateway) },
    }
}

/// What this instance says without asking anybody.
pub fn own(gateway: &Gateway) -> Told {
    let (totals, rates) = (gateway.rates.totals(), gateway.rates.fullest(RATES_MAX));
    Told { totals, rates, of_fleet: false }
}

/// Every instance that is heard of; this one at least.
pub async fn instances(gateway: &Gateway) -> Vec<About> {
    let own = || vec![about(gateway)];
    if gateway.limits.is_degraded() || !matches!(tell(gateway).await, Ok(Some(_))) {
        return own();
    }
    let mut said = gateway.control.instances().await.unwrap_or_else(|_| own());
    said.sort_unstable_by(|one, other| one.name.cmp(&other.name));
    said
}

/// What is known of this one.
pub fn about(gateway: &Gateway) -> About {
    let now = gateway.snapshot.load();
    let store = match &gateway.limits {
        Limits::Memory(_) => "memory",
        Limits::Redis(_) if gateway.limits.is_degraded() => "degraded",
        Limits::Redis(_) => "shared",
    };
    About {
        name: gateway.instance.name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        config_hash: now.config_hash.clone(),
        control_version: now.control.version,
        started: gateway.instance.started,
        store: store.to_owned(),
        seen: Time::now(),
    }
}

/// One rate of each subject: of the same limit what was said last, else the fuller one.
fn together(said: Vec<Vec<Rate>>) -> Vec<Rate> {
    let mut found: HashMap<String, Rate> = HashMap::new();
    for rate in said.into_iter().flatten() {
        match found.entry(rate.subject.clone()) {
            Entry::Vacant(place) => drop(place.insert(rate)),
            Entry::Occupied(mut there) => {
                let before = there.get();
                let better = match before.rule == rate.rule {
                    true => before.said < rate.said,
                    false => before.fullness() < rate.fullness(),
                };
                if better {
                    there.insert(rate);
                }
            }
        }
    }
    found.into_values().collect()
}
