//! Fills what a scope's rules become in the kernel: a trie and an array of segments for each view.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd},
    thread,
    time::Duration,
};

use aya::maps::{Array, LpmTrie, Map, MapData, MapError};
use egress_common::{Action, Address, Entries, Entry, NameId, PrefixKey, RuleId, Segment, View, map};
use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes, transmute};

use super::{DataplaneError, failed, names::NameIds, sys};
use crate::{
    prefix::Prefix,
    ruleset::{Table, in_slot},
};

/// A trie of the `POLICY` map, in bytes: see [`egress_common::PrefixKey`] and [`Entry`].
pub(super) type Trie = LpmTrie<MapData, [u8; 16], [u8; 16]>;
/// An array of the `SEGMENTS` map, in bytes: see [`Segment`].
pub(super) type Segments = Array<MapData, [u8; 12]>;

/// `BPF_F_NO_PREALLOC` and `BPF_F_INNER_MAP` of `linux/bpf.h`.
pub(super) const NO_PREALLOC: u32 = 1;
const INNER_MAP: u32 = 1 << 12;

/// The contents of one view, complete.
pub(super) struct Filled {
    pub(super) view: View,
    pub(super) trie: Trie,
    /// There only if a value of the trie points to them.
    pub(super) segments: Option<Segments>,
}

/// Fills the maps of a view, whose index is also that of its segments; `ids` are the kernel's for the table's rules, and `names`
/// those for all names.
pub(super) fn fill(view: View, table: &Table, ids: &[RuleId], names: &NameIds) -> Result<Filled, DataplaneError> {
    let segments = if table.segments().is_empty() { None } else { Some(fill_segments(table, ids)?) };
    Ok(Filled { view, trie: fill_trie(view, table, ids, &names.values(table))?, segments })
}

fn fill_segments(table: &Table, ids: &[RuleId]) -> Result<Segments, DataplaneError> {
    let entries = u32::try_from(table.segments().len()).unwrap_or(u32::MAX);
    let mut array = Segments::create(entries, INNER_MAP).map_err(|cause| failed(map::SEGMENTS, "create", cause))?;
    for (index, segment) in (0..).zip(table.segments()) {
        let bytes: [u8; 12] = transmute!(named(*segment, ids));
        array.set(index, bytes, 0).map_err(|cause| failed(map::SEGMENTS, "fill", cause))?;
    }
    Ok(array)
}

/// How many prefixes go to the kernel in one call.
const BATCH: usize = 4096;

/// The addresses of names. Nothing is inherited into it, as every destination there is refused.
const OF_NAMES: u8 = 64;
const OF_NAMES_ROOT: Address = Address::from_bits(0x0100 << 112);

/// Fills a trie of the right size, in the order of the table, which is the fastest.
fn fill_trie(view: View, table: &Table, ids: &[RuleId], names: &[(NameId, u32)]) -> Result<Trie, DataplaneError> {
    let is_of_names =
        |prefix: Prefix| prefix.length() >= OF_NAMES && Address::from_bits(prefix.bits()).is_discard_only();
    let entries: Vec<(Prefix, u32)> = table.entries().filter(|&(prefix, _)| !is_of_names(prefix)).collect();
    let size = u32::try_from(entries.len() + 1 + names.len()).unwrap_or(u32::MAX);
    let slot = u16::try_from(view.index()).expect("there are fewer than 65,536 views: see MAX_SCOPES");
    let element = |what| move |cause| DataplaneError::Element { name: map::POLICY, what, cause };
    let trie = sys::create_trie::<PrefixKey, Entry>(size).map_err(element("create"))?;
    let values: Vec<Entry> = table.values().iter().map(|&value| in_slot(named_entry(value, ids), slot)).collect();
    let (root, nothing) = (PrefixKey::new(OF_NAMES_ROOT, OF_NAMES), Entry::new(Entries::None, Action::Deny));
    insert(trie.as_fd(), &[root], &[nothing]).map_err(element("fill"))?;
    for batch in names.chunks(BATCH) {
        let keys: Vec<PrefixKey> = batch.iter().map(|(name, _)| PrefixKey::host(name.address())).collect();
        let values: Vec<Entry> = batch.iter().map(|&(_, value)| values[value as usize]).collect();
        insert(trie.as_fd(), &keys, &values).map_err(element("fill"))?;
    }
    for batch in entries.chunks(BATCH) {
        let keys: Vec<PrefixKey> = batch.iter().map(|(prefix, _)| prefix.key()).collect();
        let values: Vec<Entry> = batch.iter().map(|&(_, value)| values[value as usize]).collect();
        insert(trie.as_fd(), &keys, &values).map_err(element("fill"))?;
    }
    let open = |cause| failed(map::POLICY, "open", cause);
    Map::LpmTrie(MapData::from_fd(trie).map_err(open)?).try_into().map_err(open)
}

/// Inserts elements in one call; one by one where the kernel's tries do not take many at a time (before 5.19).
pub(super) fn insert<K: IntoBytes + Immutable, V: IntoBytes + Immutable>(
    trie: BorrowedFd<'_>,
    keys: &[K],
    values: &[V],
) -> io::Result<()> {
    /// Of `linux/errno.h`, which no libc knows.
    const ENOTSUPP: i32 = 524;
    let mut taken = 0;
    let inserted = patiently(|| {
        let (more, result) = sys::update_batch(trie, &keys[taken..], &values[taken..]);
        taken += more;
        result
    });
    match inserted {
        Err(error) if error.raw_os_error() == Some(ENOTSUPP) => {
            keys.iter().zip(values).try_for_each(|(key, value)| patiently(|| sys::update(trie, key, value)))
        }
        result => result,
    }
}

/// Elements come from a per-CPU cache that the kernel refills behind our back: when it runs dry, it says `ENOMEM` once and
/// has some a moment later.
pub(super) fn patiently<E: Passing>(mut call: impl FnMut() -> Result<(), E>) -> Result<(), E> {
    const PATIENCE: u32 = 100;
    for _ in 0..PATIENCE {
        match call() {
            Err(error) if error.is_passing() => thread::sleep(Duration::from_millis(1)),
            result => return result,
        }
    }
    call()
}

/// An error that may be gone a moment later.
pub(super) trait Passing {
    fn is_passing(&self) -> bool;
}

impl Passing for io::Error {
    fn is_passing(&self) -> bool {
        [Errno::NOMEM, Errno::AGAIN].iter().any(|errno| self.raw_os_error() == Some(errno.raw_os_error()))
    }
}

impl Passing for MapError {
    fn is_passing(&self) -> bool {
        matches!(self, Self::SyscallError(error) if error.io_error.is_passing())
    }
}

/// A value of a ruleset with its rule in the kernel's numbering.
fn named_entry(entry: Entry, ids: &[RuleId]) -> Entry {
    match (entry.entries(), entry.default_action()) {
        (Ok(Entries::EveryPort(action, rule)), Ok(default)) => {
            Entry::new(Entries::EveryPort(action, kernel_id(rule, ids)), default)
        }
        (Ok(Entries::Range(segment)), Ok(default)) => Entry::new(Entries::Range(named(segment, ids)), default),
        _ => entry,
    }
}

fn named(segment: Segment, ids: &[RuleId]) -> Segment {
    match segment.rule() {
        Some(rule) => segment.with_rule(kernel_id(rule, ids)),
        None => segment,
    }
}

fn kernel_id(rule: RuleId, ids: &[RuleId]) -> RuleId {
    ids[rule.0.get() as usize - 1]
}
