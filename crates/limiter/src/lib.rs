//! Rate limits, exact in memory: one definition of each algorithm, and stores that execute it.
//!
//! A [`Limit`] is a rule's one [`Quota`], counted by an [`Algorithm`], per a [`Scope`]. A request meets several: it
//! makes one [`Charge`] of each, and the store takes all of them or none. What was taken is a [`Reservation`], settled
//! when it is known what the request really used.
//!
//! ```
//! use std::{borrow::Cow, sync::Arc};
//! use tollgate_limiter::{Algorithm, Charge, Decision, Dimension, Limit, MemoryStore, Scope, SystemClock};
//!
//! let store = MemoryStore::new(SystemClock);
//! let per_user = Scope::of([Dimension::User]);
//! let limit = Limit::new("free", "10k tokens/minute".parse()?, Algorithm::TokenBucket, per_user)?;
//! let alice = per_user.subject(|_| Cow::Borrowed("alice"));
//! match store.reserve(vec![Charge::estimate(Arc::new(limit), alice, 700)]) {
//!     Decision::Granted(reservation) => { reservation.settle(&[512]); }
//!     Decision::Denied(denial) => println!("try again: {:?}", denial.retry()),
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # The map
//! - [`quota`]: units, windows, algorithms and their notation; the gate that keeps numbers exact
//! - [`spec`]: the definition of every algorithm. Pure: no clock, no lock, no float
//! - [`scope`]: what limits are per, and whose counter a request meets
//! - [`mod@limit`]: a limit, and one request's charge
//! - [`reservation`]: what a store answers
//! - [`memory`]: the store of one process
//! - [`store`]: what every store can be asked, and how it fails
//! - `redis` (feature `redis`): the store that many processes share
//! - `resilient` (feature `redis`): what happens while that one does not answer
//! - [`clock`]: where its time comes from
//!
//! Without features it depends on nothing. With `tower` there is a layer for axum and its kin; with
//! `persist` a store in memory survives a restart.

/// A [`Quota`] that the compiler reads: a wrong one is an error where it stands, not when the program starts.
///
/// ```
/// use tollgate_limiter::{Quota, limit};
///
/// const FREE: Quota = limit!("3/minute");
/// assert_eq!(FREE, "3/minute".parse()?);
/// # Ok::<(), tollgate_limiter::QuotaError>(())
/// ```
/// ```compile_fail
/// tollgate_limiter::limit!("3/fortnight"); // unknown window
/// ```
/// ```compile_fail
/// tollgate_limiter::limit!("0/minute"); // nothing would ever be allowed
/// ```
#[macro_export]
macro_rules! limit {
    ($text:literal) => {
        const { $crate::Quota::literal($text) }
    };
}

pub mod clock;
#[cfg(feature = "redis")]
mod denials;
pub mod limit;
pub mod memory;
mod names;
pub mod quota;
#[cfg(feature = "redis")]
pub mod redis;
pub mod reservation;
#[cfg(feature = "redis")]
pub mod resilient;
pub mod scope;
pub mod spec;
pub mod store;
#[cfg(feature = "tower")]
pub mod tower;

pub use clock::{Clock, ManualClock, Millis, SystemClock};
pub use limit::{Charge, Limit, LimitError, WhenDown};
#[cfg(feature = "persist")]
pub use memory::persist::PersistError;
pub use memory::{Budgets, MemoryStore, Occupancy};
pub use names::UnknownName;
pub use quota::{Algorithm, Cost, Quota, QuotaError, Span, Unit, Window};
#[cfg(feature = "redis-tls")]
pub use redis::Tls;
#[cfg(feature = "redis")]
pub use redis::{RedisOptions, RedisStore, ServerInfo, Status, Topology};
pub use reservation::{Decision, Denial, Reservation, Standing};
#[cfg(feature = "redis")]
pub use resilient::{Circuit, ResilientOptions, ResilientStore};
pub use scope::{Dimension, Scope, Subject, SubjectError};
pub use spec::{Correction, LEASE, Retry};
pub use store::{Answer, CHARGES_MAX, Place, Source, Store, StoreError};

/// The README's code is compiled, too.
#[cfg(all(doctest, feature = "tower"))]
#[doc = include_str!("../README.md")]
struct Readme;
