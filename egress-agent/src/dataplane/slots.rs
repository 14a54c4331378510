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
    failed, sys,
};
use crate::pins::PinSet;

/// Calls that are made side by side.
const WRITERS: usize = 16;

/// Both maps, once for each writer.
pub(super) struct Slots {
    writers: Vec<Writer>,
    /// Views that have segments.
    segmented: BTreeSet<View>,
    /// Views that have a trie.
    filled: BTreeSet<View>,
}

struct Writer {
    policy: ArrayOfMaps<MapData, Trie>,
    segments: ArrayOfMaps<MapData, Segments>,
    /// The same maps, for calls that aya does not make.
    policy_data: MapData,
    segments_data: MapData,
}

impl Slots {
    /// Opens the maps of a set.
    pub(super) fn open(pins: &PinSet) -> Result<Self, DataplaneError> {
        let writers = (0..WRITERS).map(|_| Writer::open(pins)).collect::<Result<_, _>>()?;
        Ok(Self { writers, segmented: BTreeSet::new(), filled: BTreeSet::new() })
    }

    /// Puts contents where nothing points to yet.
    pub(super) fn put(&mut self, filled: &[Filled]) -> Result<(), DataplaneError> {
        self.filled.extend(filled.iter().map(|filled| filled.view));
        self.segmented.extend(filled.iter().filter(|filled| filled.segments.is_some()).map(|filled| filled.view));
        self.share(filled, Writer::put)
    }

    /// Empties the elements of scopes that nothing points to.
    pub(super) fn clear(&mut self, scopes: &BTreeSet<Scope>) -> Result<(), DataplaneError> {
        let views = || scopes.iter().flat_map(|scope| [scope.enforcing(), scope.with_audit()]);
        let tries = views().filter(|view| self.filled.remove(view)).map(|view| (map::POLICY, view)).collect::<Vec<_>>();
        let segments = views().filter(|view| self.segmented.remove(view)).map(|view| (map::SEGMENTS, view));
        let work: Vec<(&'static str, View)> = tries.into_iter().chain(segments.collect::<Vec<_>>()).collect();
        self.share(&work, |writer, &(name, view)| writer.clear(name, view))
    }

    /// Shares work among the writers.
    fn share<T: Sync>(
        &mut self,
        work: &[T],
        call: impl Fn(&mut Writer, &T) -> Result<(), DataplaneError> + Copy + Send,
    ) -> Result<(), DataplaneError> {
        let share = work.len().div_ceil(self.writers.len()).max(1);
        thread::scope(|threads| {
            let shares = self.writers.iter_mut().zip(work.chunks(share));
            let start =
                |(writer, share)| thread::Builder::new().spawn_scoped(threads, move || each(writer, share, call));
            let running: Vec<_> = shares.map(start).collect();
            running.into_iter().try_for_each(|thread| {
                let thread = thread.map_err(DataplaneError::NoThread)?;
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            })
        })
    }
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
        let data = |name| MapData::from_pin(pins.path().join(name)).map_err(|cause| failed(name, "open", cause));
        let open = |cause| failed(map::POLICY, "open", cause);
        Ok(Self {
            policy: Map::ArrayOfMaps(data(map::POLICY)?).try_into().map_err(open)?,
            segments: Map::ArrayOfMaps(data(map::SEGMENTS)?).try_into().map_err(open)?,
            policy_data: data(map::POLICY)?,
            segments_data: data(map::SEGMENTS)?,
        })
    }

    fn clear(&mut self, name: &'static str, view: View) -> Result<(), DataplaneError> {
        let data = if name == map::POLICY { &self.policy_data } else { &self.segments_data };
        sys::clear_inner(data.fd().as_fd(), view.index()).map_err(|cause| DataplaneError::Element {
            name,
            what: "empty an element of",
            cause,
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
