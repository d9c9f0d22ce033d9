//! What happens now, worked out once a second for everybody who listens, and not at all while nobody does.

mod figures;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinHandle;
use tokio::time::MissedTickBehavior;

use self::figures::Sample;
use crate::Gateway;

/// How many may listen at once.
pub const LISTENERS_MAX: usize = 32;
/// How often figures are told.
const EVERY: Duration = Duration::from_secs(1);
/// How long other instances are waited for.
const PATIENCE: Duration = Duration::from_millis(500);

/// Figures of one second: JSON.
pub type Figures = Arc<str>;

/// Who listens, and what they are told.
pub struct Live {
    places: Arc<Semaphore>,
    told: watch::Sender<Figures>,
    /// Works the figures out while somebody wants them.
    teller: Mutex<Option<JoinHandle<()>>>,
}

impl Default for Live {
    fn default() -> Self {
        let places = Arc::new(Semaphore::new(LISTENERS_MAX));
        Self { places, told: watch::Sender::new(Figures::from("")), teller: Mutex::default() }
    }
}

/// A place among those who listen; given back when dropped.
#[derive(Debug)]
pub struct Place {
    _permit: OwnedSemaphorePermit,
}

impl Live {
    /// A place, if one is free.
    pub fn enter(&self) -> Option<Place> {
        self.places.clone().try_acquire_owned().ok().map(|permit| Place { _permit: permit })
    }

    /// Waits until nobody listens any more.
    pub async fn left(&self) {
        // Never closed, so this fails never; as many permits as a semaphore of a few can have.
        drop(self.places.acquire_many(LISTENERS_MAX as u32).await);
    }

    /// The figures of every second from now on, the first within about a second.
    pub fn figures(&self, gateway: &Arc<Gateway>) -> watch::Receiver<Figures> {
        let mut teller = self.teller.lock().unwrap_or_else(PoisonError::into_inner);
        // Subscribed under the lock: a teller that finds nobody ends under it.
        let figures = self.told.subscribe();
        if teller.as_ref().is_none_or(JoinHandle::is_finished) {
            *teller = Some(tokio::spawn(tell(gateway.clone())));
        }
        figures
    }

    /// Whether somebody wants figures; if not, whoever asks is the teller no more.
    fn is_wanted(&self) -> bool {
        let mut teller = self.teller.lock().unwrap_or_else(PoisonError::into_inner);
        let wanted = self.told.receiver_count() > 0;
        if !wanted {
            *teller = None;
        }
        wanted
    }
}

/// Tells figures every second until nobody wants them.
async fn tell(gateway: Arc<Gateway>) {
    let mut before = Sample::take(&gateway, PATIENCE).await;
    let mut seconds = tokio::time::interval(EVERY);
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // An interval begins at once.
    seconds.tick().await;
    loop {
        seconds.tick().await;
        if !gateway.live.is_wanted() {
            return;
        }
        let now = Sample::take(&gateway, PATIENCE).await;
        let figures = figures::between(&gateway, &before, &now);
        gateway.live.told.send_replace(figures.to_string().into());
        before = now;
    }
}
