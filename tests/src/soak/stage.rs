//! When the load goes on, pauses and ends.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Shared by all that make load.
#[derive(Debug, Default)]
pub struct Stage {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    is_over: bool,
    is_paused: bool,
    /// Workers that pause when they are asked to.
    workers: usize,
    /// Of these, those that do.
    resting: usize,
}

/// The load pauses while this is there.
pub struct Resting<'a>(&'a Stage);

/// One of the workers that pause.
pub struct Worker<'a>(&'a Stage);

impl Stage {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more worker that pauses when it is asked to.
    pub fn worker(&self) -> Worker<'_> {
        self.state().workers += 1;
        Worker(self)
    }

    /// Whether it is not over yet.
    pub fn goes_on(&self) -> bool {
        !self.state().is_over
    }

    /// Ends everything.
    pub fn stop(&self) {
        self.state().is_over = true;
        self.changed.notify_all();
    }

    /// Pauses the load, and waits until nothing is under way.
    pub fn rest(&self) -> Resting<'_> {
        let mut state = self.state();
        state.is_paused = true;
        while state.resting < state.workers && !state.is_over {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Resting(self)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.state().is_paused = false;
        self.0.changed.notify_all();
    }
}

impl Worker<'_> {
    /// To be asked before each piece of work: whether there is to be another. Waits while the load pauses.
    pub fn goes_on(&self) -> bool {
        let mut state = self.0.state();
        if state.is_paused && !state.is_over {
            state.resting += 1;
            self.0.changed.notify_all();
            while state.is_paused && !state.is_over {
                state = self.0.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.resting -= 1;
        }
        !state.is_over
    }
}

impl Drop for Worker<'_> {
    fn drop(&mut self) {
        self.0.state().workers -= 1;
        self.0.changed.notify_all();
    }
}
