//! What tells one history of a server from another: counters of the same epoch may have been cleared since they were
//! seen, those of another one were lost.
//!
//! A number is written down on the server, in a key that lives as long as any counter. FLUSHALL and a restart without
//! persistence take it with them; who comes first writes another one. A server that takes over from another one may have
//! it, too, so what tells the runs of servers apart is added to it: that comes from the connection.
//!
//! The epoch is the upper part of a counter's life, which every decision reads anyway. So only a counter that is not
//! there makes a script read the key: what is there was not lost. Reading it for each decision would cost the server some
//! percent more, for nothing.

use super::cluster;

/// How many slots there are names for.
const SLOTS: usize = 16_384;
/// Epochs are numbered up to here, from 1; 0 is unknown. See `EPOCHS` in state.lua.
const EPOCHS: u32 = 2_097_151;
/// A life is its epoch times this, and what the caller gave it. See `LIVES` in state.lua.
const LIVES_BITS: u32 = 32;

/// The epoch that a counter was born in. 0: nobody knows.
pub(crate) const fn epoch_of(life: u64) -> u64 {
    life >> LIVES_BITS
}

/// A life in an epoch.
pub(super) const fn life_in(epoch: u64, life: u64) -> u64 {
    epoch << LIVES_BITS | life
}

/// What tells the runs of servers apart, of the id that a server gives to each of its own: 40 hexadecimal digits.
pub(super) fn term(run_id: &str) -> u32 {
    leading(run_id) % EPOCHS
}

/// What an id of 40 hexadecimal digits begins with; 0, if it is none.
pub(super) fn leading(id: &str) -> u32 {
    id.get(..8).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or(0)
}

/// Where epochs are written down.
pub(super) enum Epochs {
    /// In one key of the server.
    Server(String),
    /// In a key of each slot, because a script may only meet keys of one.
    Slots {
        prefix: String,
        /// Of each slot, a number whose digits are in it.
        tags: Vec<u32>,
    },
}

impl Epochs {
    pub(super) fn of_server(prefix: &str) -> Epochs {
        Epochs::Server(format!("{prefix}:ctl:epoch"))
    }

    pub(super) fn of_slots(prefix: &str) -> Epochs {
        let (mut tags, mut left) = (vec![u32::MAX; SLOTS], SLOTS);
        for number in 0.. {
            let tag = &mut tags[usize::from(cluster::slot(&number.to_string()))];
            if *tag == u32::MAX {
                *tag = number;
                left -= 1;
            }
            if left == 0 {
                break;
            }
        }
        Epochs::Slots { prefix: prefix.to_string(), tags }
    }

    /// The key for scripts about counters beside this one.
    pub(super) fn key(&self, beside: &str) -> String {
        match self {
            Epochs::Server(key) => key.clone(),
            Epochs::Slots { prefix, tags } => {
                format!("{prefix}:{{{}}}:ctl:epoch", tags[usize::from(cluster::slot(beside))])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Epochs, epoch_of, life_in, term};
    use crate::redis::cluster::slot;

    #[test]
    fn the_key_is_where_the_counters_are() {
        let (server, slots) = (Epochs::of_server("p"), Epochs::of_slots("p"));
        for number in 0..10_000 {
            let counter = format!("p:{{user{number}}}:rl:user:user{number}");
            assert_eq!(slot(&slots.key(&counter)), slot(&counter));
            assert_eq!(server.key(&counter), "p:ctl:epoch");
        }
    }

    #[test]
    fn a_life_tells_its_epoch() {
        assert_eq!(epoch_of(life_in(2_097_151, u64::from(u32::MAX))), 2_097_151);
        assert!(life_in(2_097_151, u64::from(u32::MAX)) < 1 << 53);
        assert_eq!(epoch_of(7), 0);
        assert_eq!(term("000000ff00112233445566778899aabbccddeeff"), 255);
        assert_eq!((term(""), term("no id at all")), (0, 0));
    }
}
