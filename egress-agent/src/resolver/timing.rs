//! When a name is asked again.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::Duration,
};

use tokio::time::Instant;

/// No name goes unasked for longer, give or take the jitter, whatever its records allow.
const CEILING: Duration = Duration::from_hours(1);
/// A name that fails is not asked less often than this.
const PATIENCE: Duration = Duration::from_mins(5);
/// Below this, asking would be all that the agent does.
const LEAST: Duration = Duration::from_millis(10);

/// Delays, spread so that names that were asked together are not asked together for ever.
#[derive(Debug)]
pub(super) struct Timing {
    floor: Duration,
    grace: Duration,
    random: RandomState,
    drawn: u64,
}

impl Timing {
    pub(super) fn new(floor: Duration, grace: Duration) -> Self {
        Self { floor: floor.max(LEAST), grace, random: RandomState::new(), drawn: 0 }
    }

    /// The least time between two questions for one name.
    pub(super) const fn floor(&self) -> Duration {
        self.floor
    }

    /// When an address is given up that leaves the answer now.
    pub(super) fn leaving(&self, now: Instant) -> Instant {
        now + self.grace
    }

    /// How long an answer is relied on: it is asked for again before it ends.
    pub(super) fn after_answer(&mut self, ttl: Duration) -> Duration {
        self.spread((ttl * 9 / 10).clamp(self.floor, CEILING.max(self.floor)))
    }

    /// How long nothing is asked after so many failures in a row.
    pub(super) fn after_failures(&mut self, failures: u32) -> Duration {
        let doubled = 2_u32.saturating_pow(failures.saturating_sub(1));
        self.spread(self.floor.saturating_mul(doubled).min(PATIENCE.max(self.floor)))
    }

    /// A tenth more or less, and never less than the floor: what is at the floor gets up to a fifth more.
    fn spread(&mut self, delay: Duration) -> Duration {
        self.drawn += 1;
        let thousandths = (self.random.hash_one(self.drawn) % 1001) as u32;
        (delay * 9 / 10).max(self.floor) + delay / 5000 * thousandths
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    proptest! {
        #[test]
        fn an_answer_is_asked_for_again_before_it_ends_and_not_before_the_floor(
            ttl in 0_u64..1_000_000, floor in 0_u64..10_000,
        ) {
            let (ttl, floor) = (Duration::from_secs(ttl), Duration::from_millis(floor).max(LEAST));
            let delay = Timing::new(floor, SECOND).after_answer(ttl);
            prop_assert!(delay >= floor && delay <= CEILING * 11 / 10, "{delay:?}");
            prop_assert!(delay <= ttl.max(floor * 6 / 5), "{delay:?}");
            prop_assert!(delay >= (ttl * 8 / 10).min(CEILING * 9 / 10), "{delay:?}");
        }

        #[test]
        fn failures_are_further_and_further_apart(failures in 0_u32..100) {
            let delay = Timing::new(SECOND, SECOND).after_failures(failures);
            let expected = PATIENCE.min(SECOND * 2_u32.saturating_pow(failures.saturating_sub(1)));
            prop_assert!(delay >= SECOND.max(expected * 9 / 10) && delay <= expected * 6 / 5, "{delay:?}");
        }
    }

    #[test]
    fn names_that_are_asked_together_drift_apart() {
        let mut timing = Timing::new(5 * SECOND, SECOND);
        for ttl in [0, 60, 1_000_000] {
            let mut delays: Vec<Duration> = (0..3000).map(|_| timing.after_answer(ttl * SECOND)).collect();
            delays.sort();
            let (first, last) = (delays[0], delays[2999]);
            assert!(last > first * 7 / 6, "from {first:?} to {last:?}");
            delays.dedup();
            assert!(delays.len() > 800, "{} different delays", delays.len());
        }
    }

    #[test]
    fn a_floor_above_every_limit_stands() {
        let mut timing = Timing::new(2 * CEILING, SECOND);
        assert!(timing.after_answer(SECOND) >= 2 * CEILING);
        assert!(timing.after_failures(9) >= 2 * CEILING);
    }
}
