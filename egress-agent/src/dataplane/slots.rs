//! The elements of `POLICY` and `SEGMENTS`: where the contents of scopes are put, and cleared.
//!
//! Each call waits for a grace period of the kernel, some milliseconds. Many are made side by side, since those who wait
//! at the same time wait for the same one.

use std::{collections::BTreeSet, os::fd::AsFd, panic::resume_unwind, thread};

use aya::maps::{ArrayOfMaps, Map, MapData};
use egress_common::{Scope, View, map};

use super::{
    DataplaneError,
    contents::{Filled, Segments, Trie},
    failed, open, sys,
};
use crate::pins::PinSet;

/// Calls that are made side by side.
const WRITERS: usize = 16;

/// Both maps, once for each writer.
pub(super) struct Slots {
    writers: Vec<Writer>,
    /// The same maps, for calls that aya does not make.
    policy: MapData,
    segments: MapData,
    /// Views that have segments.
    segmented: BTreeSet<View>,
    /// Views that have a trie.
    filled: BTreeSet<View>,
}

struct Writer {
    policy: ArrayOfMaps<MapData, Trie>,
    segments: ArrayOfMaps<MapData, Segments>,
}

impl Slots {
    /// Opens the maps of a set.
    pub(super) fn open(pins: &PinSet) -> Result<Self, DataplaneError> {
        let writers = (0..WRITERS).map(|_| Writer::open(pins)).collect::<Result<_, _>>()?;
        let (policy, segments) = (open(pins.path(), map::POLICY)?, open(pins.path(), map::SEGMENTS)?);
        Ok(Self { writers, policy, segments, segmented: BTreeSet::new(), filled: BTreeSet::new() })
    }

    /// Puts contents where nothing points to yet.
    pub(super) fn put(&mut self, filled: &[Filled]) -> Result<(), DataplaneError> {
        self.filled.extend(filled.iter().map(|filled| filled.view));
        self.segmented.extend(filled.iter().filter(|filled| filled.segments.is_some()).map(|filled| filled.view));
        share(&mut self.writers, filled, Writer::put)
    }

    /// Empties the elements of scopes that nothing points to.
    pub(super) fn clear(&mut self, scopes: &BTreeSet<Scope>) -> Result<(), DataplaneError> {
        let views = || scopes.iter().flat_map(|scope| [scope.enforcing(), scope.with_audit()]);
        let (policy, segments) = (&self.policy, &self.segments);
        let tries = views().filter(|view| self.filled.remove(view)).map(|view| (map::POLICY, policy, view));
        let arrays = views().filter(|view| self.segmented.remove(view)).map(|view| (map::SEGMENTS, segments, view));
        let work: Vec<(&'static str, &MapData, View)> = tries.chain(arrays).collect();
        share(&mut self.writers, &work, |_, &(name, map, view)| {
            let failed = |cause| DataplaneError::Element { name, what: "empty an element of", cause };
            sys::clear_inner(map.fd().as_fd(), view.index()).map_err(failed)
        })
    }
}

/// Shares work among writers.
fn share<T: Sync>(
    writers: &mut [Writer],
    work: &[T],
    call: impl Fn(&mut Writer, &T) -> Result<(), DataplaneError> + Copy + Send,
) -> Result<(), DataplaneError> {
    let share = work.len().div_ceil(writers.len()).max(1);
    thread::scope(|threads| {
        let shares = writers.iter_mut().zip(work.chunks(share));
        let start = |(writer, share)| thread::Builder::new().spawn_scoped(threads, move || each(writer, share, call));
        let running: Vec<_> = shares.map(start).collect();
        running.into_iter().try_for_each(|thread| {
            let thread = thread.map_err(DataplaneError::NoThread)?;
            thread.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    })
}

fn each<T>(
    writer: &mut Writer,
    work: &[T],
    call: impl Fn(&mut Writer, &T) -> Result<(), DataplaneError>,
) -> Result<(), DataplaneError> {
    work.iter().try_for_each(|one| call(writer, one))
}

impl Writer {
    fn open(pins: &PinSet) -> Result<Self, DataplaneError> {
        let as_array = |cause| failed(map::POLICY, "open", cause);
        Ok(Self {
            policy: Map::ArrayOfMaps(open(pins.path(), map::POLICY)?).try_into().map_err(as_array)?,
            segments: Map::ArrayOfMaps(open(pins.path(), map::SEGMENTS)?).try_into().map_err(as_array)?,
        })
    }

    fn put(&mut self, filled: &Filled) -> Result<(), DataplaneError> {
        let index = filled.view.index();
        if let Some(segments) = &filled.segments {
            let put = |cause| failed(map::SEGMENTS, "set an element of", cause);
            self.segments.set(index, segments, 0).map_err(put)?;
        }
        self.policy.set(index, &filled.trie, 0).map_err(|cause| failed(map::POLICY, "set an element of", cause))
    }
}
