//! The policy maps. Nobody else sees them.
//!
//! Both are arrays of maps: what an element points to is filled by the agent before it is put there, and never changes
//! afterwards. A decision reads the pointer to its trie once, so it sees one policy from beginning to end.

use aya_ebpf::{
    bindings::BPF_F_INNER_MAP,
    btf_maps::{Array, ArrayOfMaps, LpmTrie, lpm_trie::Key},
    macros::btf_map,
};
use egress_common::{Address, Entry, MAX_SCOPES, PrefixKey, Protocol, Rules, Segment, SegmentList, View, find_segment};

/// Inner arrays differ in length, which the kernel allows for arrays with this flag (5.10).
const ANY_LENGTH: usize = BPF_F_INNER_MAP as usize;

#[btf_map]
static POLICY: ArrayOfMaps<LpmTrie<Address, Entry, 1>, { 2 * MAX_SCOPES as usize }> = ArrayOfMaps::new();

#[btf_map]
static SEGMENTS: ArrayOfMaps<Array<Segment, 1, ANY_LENGTH>, { 4 * MAX_SCOPES as usize }> = ArrayOfMaps::new();

/// The rules in the kernel's maps.
pub(crate) struct Maps;

impl Rules for Maps {
    #[inline(always)]
    fn entry(&self, view: View, address: Address) -> Option<Entry> {
        let key = PrefixKey::host(address);
        // SAFETY: both are `repr(C)` with a `u32` length before 16 bytes of address, and `Key` asks for no alignment.
        let key = unsafe { &*(&raw const key).cast::<Key<Address>>() };
        POLICY.get(view.index())?.get(key).copied()
    }

    #[inline(always)]
    fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment> {
        let slot = list.slot.into();
        let index = search_segments(slot, list.first, list.count, protocol.number().into(), port.into());
        segment(slot, list.first.wrapping_add(index))
    }
}

#[inline(always)]
fn segment(slot: u32, index: u32) -> Option<Segment> {
    SEGMENTS.get_value(slot, &index).copied()
}

/// [`find_segment`] in a list, verified once as a function of its own: inline in each hook, its branches would be
/// verified for every path that leads there. A search that fails gives an index that no array has.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn search_segments(slot: u32, first: u32, count: u32, protocol: u32, port: u32) -> u32 {
    #[expect(clippy::cast_possible_truncation, reason = "the caller widened it from 16 bits")]
    let port = port as u16;
    find_segment(count, Protocol::from_kernel(protocol), port, |index| segment(slot, first.wrapping_add(index)))
        .unwrap_or(u32::MAX)
}
