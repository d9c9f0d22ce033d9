//! How many requests one provider is busy with.

use std::sync::Arc;

/// How many requests are under way: each has a part in one count.
#[derive(Debug, Default)]
pub struct InFlight(Arc<()>);

impl InFlight {
    /// One more, until what this gives is dropped.
    pub fn begin(&self) -> Flight {
        Flight { _counted: self.0.clone() }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        Arc::strong_count(&self.0) as u64 - 1
    }
}

/// One of them.
#[derive(Debug)]
pub struct Flight {
    _counted: Arc<()>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flights_are_counted_while_they_last() {
        let in_flight = InFlight::default();
        assert_eq!(in_flight.count(), 0);
        let (one, two) = (in_flight.begin(), in_flight.begin());
        assert_eq!(in_flight.count(), 2);
        drop(one);
        assert_eq!(in_flight.count(), 1);
        drop(two);
        assert_eq!(in_flight.count(), 0);
    }
}
