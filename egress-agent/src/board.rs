//! What the event loop said of itself last, for whoever asks while it is busy.
//!
//! The loop posts after each change and on each pulse; the control thread reads. Neither waits for the other.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::status::{self, FromAgent, Pending};

/// How long the loop may be silent before it counts as stuck, and another policy on disk than in force before it counts as
/// wrong.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

const IN_FORCE_SOON: &str = "it is being put in force";

/// How `status` and the log tell that the policy on disk is not the one in force.
pub(crate) fn not_in_force(pending: &Pending) -> String {
    format!("the policy on disk is not in force since {}: {}", pending.since, pending.reason)
}

/// What was said last.
#[derive(Debug)]
pub(crate) struct Board(Mutex<Posted>);

#[derive(Debug)]
struct Posted {
    told: FromAgent,
    /// When the loop was seen last.
    seen: Instant,
    /// Since when it works on a change, and which.
    changing: Option<(SystemTime, Instant, Changing)>,
}

/// What is being put in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Changing {
    /// Policies.
    Policies,
    /// Addresses of names alone.
    Names,
}

impl Board {
    pub(crate) fn new(told: FromAgent) -> Self {
        Self(Mutex::new(Posted { told, seen: Instant::now(), changing: None }))
    }

    /// Says something else from now on.
    pub(crate) fn post(&self, told: FromAgent) {
        let mut posted = self.posted();
        (posted.told, posted.seen) = (told, Instant::now());
    }

    /// The loop lives, and has nothing else to say.
    pub(crate) fn stamp(&self) {
        self.posted().seen = Instant::now();
    }

    /// The loop works on a change.
    pub(crate) fn begin(&self, what: Changing) {
        self.posted().changing = Some((SystemTime::now(), Instant::now(), what));
    }

    /// It does no longer.
    pub(crate) fn end(&self) {
        self.posted().changing = None;
    }

    /// Whether it does.
    pub(crate) fn is_changing(&self) -> bool {
        self.posted().changing.is_some()
    }

    /// What to answer now.
    pub(crate) fn told(&self) -> FromAgent {
        let (mut told, seen, changing) = {
            let posted = self.posted();
            (posted.told.clone(), posted.seen, posted.changing)
        };
        if let Some((since, begun, what)) = changing {
            told.changing_since = Some(status::time(since));
            if what == Changing::Policies && told.pending.is_none() && begun.elapsed() > PATIENCE {
                let pending = Pending { since: status::time(since), reason: IN_FORCE_SOON.to_owned(), file: None };
                told.degraded.push(not_in_force(&pending));
                told.pending = Some(pending);
            }
        }
        let silent = seen.elapsed();
        if silent > PATIENCE {
            told.silent = Some(silent.as_secs());
        }
        told
    }

    /// What is there is whole, also where whoever held the lock panicked.
    fn posted(&self) -> MutexGuard<'_, Posted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
