//! What the event loop said of itself last, for whoever asks while it is busy.
//!
//! The loop posts after each change and on each pulse; the control thread reads. Neither waits for the other.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use crate::status::{self, FromAgent};

/// How long the loop may be silent before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(5);

/// What was said last.
#[derive(Debug)]
pub(crate) struct Board(Mutex<Posted>);

#[derive(Debug)]
struct Posted {
    told: FromAgent,
    /// When the loop was seen last.
    seen: Instant,
    /// Since when it works on a change.
    changing: Option<SystemTime>,
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
    pub(crate) fn begin(&self) {
        self.posted().changing = Some(SystemTime::now());
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
        told.changing_since = changing.map(status::time);
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
