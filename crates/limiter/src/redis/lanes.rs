//! Connections for what waits for replicas: a server answers nothing else on one that waits.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use ::redis::RedisConnectionInfo;

use super::address::Servers;
use super::connection::Way;
use super::node::Ground;

/// How many there are at most.
const LANES: usize = 4;

/// Each is made when it is needed first.
pub(super) struct Lanes {
    servers: Servers,
    sentinel_login: RedisConnectionInfo,
    lanes: [Lane; LANES],
}

#[derive(Default)]
struct Lane {
    way: Mutex<Option<Arc<Way>>>,
    /// How many use it now.
    users: AtomicUsize,
}

/// The right to use a lane, given up when dropped.
pub(super) struct Place<'l> {
    pub(super) way: Arc<Way>,
    users: &'l AtomicUsize,
}

impl Lanes {
    pub(super) fn new(servers: Servers, sentinel_login: RedisConnectionInfo) -> Lanes {
        Lanes { servers, sentinel_login, lanes: Default::default() }
    }

    /// The one that the fewest use.
    pub(super) fn idlest(&self, ground: &Arc<Ground>) -> Place<'_> {
        let [first, others @ ..] = &self.lanes;
        let users = |lane: &Lane| lane.users.load(Ordering::Relaxed);
        let fewer = |best, lane| if users(lane) < users(best) { lane } else { best };
        let Lane { way, users } = others.iter().fold(first, fewer);
        users.fetch_add(1, Ordering::Relaxed);
        let mut made = way.lock().unwrap_or_else(PoisonError::into_inner);
        let make = || Arc::new(Way::new(ground, self.servers.clone(), &self.sentinel_login));
        Place { way: Arc::clone(made.get_or_insert_with(make)), users }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.users.fetch_sub(1, Ordering::Relaxed);
    }
}
