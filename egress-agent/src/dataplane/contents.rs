//! Fills what a scope's rules become in the kernel: a trie and an array of segments for each view.

use std::{io, thread, time::Duration};

use aya::maps::{Array, LpmTrie, MapData, MapError, lpm_trie::Key};
use egress_common::{Entries, Entry, RuleId, Segment, View, map};
use rustix::io::Errno;
use zerocopy::transmute;

use super::{DataplaneError, failed};
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

/// Fills the maps of a view, whose index is also that of its segments; `ids` are the kernel's for the table's rules.
pub(super) fn fill(view: View, table: &Table, ids: &[RuleId]) -> Result<Filled, DataplaneError> {
    let segments = if table.segments().is_empty() { None } else { Some(fill_segments(table, ids)?) };
    Ok(Filled { view, trie: fill_trie(view, table, ids)?, segments })
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

/// Fills a trie of the right size, in the order of the table, which is the fastest.
fn fill_trie(view: View, table: &Table, ids: &[RuleId]) -> Result<Trie, DataplaneError> {
    let size = u32::try_from(table.entries().len()).unwrap_or(u32::MAX);
    let slot = u16::try_from(view.index()).expect("there are fewer than 65,536 views: see MAX_SCOPES");
    let mut trie = Trie::create(size, NO_PREALLOC).map_err(|cause| failed(map::POLICY, "create", cause))?;
    let values: Vec<[u8; 16]> =
        table.values().iter().map(|&value| transmute!(in_slot(named_entry(value, ids), slot))).collect();
    for (prefix, value) in table.entries() {
        insert(&mut trie, prefix, values[value as usize])?;
    }
    Ok(trie)
}

fn insert(trie: &mut Trie, prefix: Prefix, value: [u8; 16]) -> Result<(), DataplaneError> {
    let address: [u8; 16] = transmute!(prefix.address());
    let key = Key::new(prefix.length().into(), address);
    patiently(|| trie.insert(&key, value, 0)).map_err(|cause| failed(map::POLICY, "fill", cause))
}

/// Elements come from a per-CPU cache that the kernel refills behind our back: when it runs dry, it says `ENOMEM` once and
/// has some a moment later.
pub(super) fn patiently(mut call: impl FnMut() -> Result<(), MapError>) -> Result<(), MapError> {
    const PATIENCE: u32 = 100;
    for _ in 0..PATIENCE {
        match call() {
            Err(MapError::SyscallError(error)) if is_passing(&error.io_error) => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result,
        }
    }
    call()
}

fn is_passing(error: &io::Error) -> bool {
    [Errno::NOMEM, Errno::AGAIN].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
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
