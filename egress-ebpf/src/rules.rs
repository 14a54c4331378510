//! The policy maps. Nobody else sees them.
//!
//! What they hold of a scope is put there by the agent before anything names that scope, and never changes while anything
//! does. A decision is placed once, so it sees one policy from beginning to end.

use aya_ebpf::{
    bindings::BPF_F_INNER_MAP,
    btf_maps::{Array, ArrayOfMaps, LpmTrie, lpm_trie::Key},
    macros::btf_map,
    programs::SockAddrContext,
};
use egress_common::{
    Address, Entry, Flow, MAX_SCOPES, NameId, PrefixKey, Protocol, RuleId, Rules, Segment, SegmentList, Settings, View,
    find_segment,
};
use zerocopy::transmute;

use crate::{names, peers};

// Values of inner maps are described as arrays: where a struct is described, kernels from 5.15 to 6.2 look for timers in it,
// and take no other map in its place but one that was described the same way (`bpf_map_meta_equal`).

/// An [`Entry`], in words.
type EntryWords = [u32; 4];
/// A [`Segment`], in words.
type SegmentWords = [u32; 3];

/// Inner arrays differ in length, which the kernel allows for arrays with this flag (5.10).
const ANY_LENGTH: usize = BPF_F_INNER_MAP as usize;

#[btf_map]
static POLICY: ArrayOfMaps<LpmTrie<Address, EntryWords, 1>, { 2 * MAX_SCOPES as usize }> = ArrayOfMaps::new();

#[btf_map]
static SEGMENTS: ArrayOfMaps<Array<SegmentWords, 1, ANY_LENGTH>, { 2 * MAX_SCOPES as usize }> = ArrayOfMaps::new();

#[btf_map]
static VIEWS: Array<Settings, { 2 * MAX_SCOPES as usize }> = Array::new();

/// The rules in the kernel's maps, for a socket.
pub(crate) struct Maps<'a> {
    socket: Option<&'a SockAddrContext>,
}

impl Maps<'static> {
    /// For what has no destination that could have been heard from.
    pub(crate) const WITHOUT_SOCKET: Self = Self { socket: None };
}

impl<'a> Maps<'a> {
    /// For a socket that wants to reach a destination.
    #[inline(always)]
    pub(crate) const fn of(socket: &'a SockAddrContext) -> Self {
        Self { socket: Some(socket) }
    }
}

impl Rules for Maps<'_> {
    #[inline(always)]
    fn entry(&self, view: View, address: Address) -> Option<Entry> {
        let key = PrefixKey::host(address);
        // SAFETY: both are `repr(C)` with a `u32` length before 16 bytes of address, and `Key` asks for no alignment.
        let key = unsafe { &*(&raw const key).cast::<Key<Address>>() };
        let words: EntryWords = *POLICY.get(view.index())?.get(key)?;
        Some(transmute!(words))
    }

    #[inline(always)]
    fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment> {
        let slot = list.slot.into();
        let index = search_segments(slot, list.first, list.count, protocol.number().into(), port.into());
        segment(slot, list.first.wrapping_add(index))
    }

    #[inline(always)]
    fn settings(&self, view: View) -> Option<Settings> {
        match VIEWS.get(view.index()) {
            Some(settings) if settings.is_there() => Some(*settings),
            Some(_) | None => None,
        }
    }

    #[inline(always)]
    fn is_reply(&self, flow: &Flow) -> bool {
        match self.socket {
            Some(socket) => peers::has(socket, flow),
            None => false,
        }
    }

    #[inline(always)]
    fn rule_by_name(&self, view: View, flow: &Flow) -> Option<RuleId> {
        names::allows(view, flow)
    }

    #[inline(always)]
    fn named(&self, view: View, name: NameId) -> Option<Entry> {
        self.entry(view, name.address())
    }
}

#[inline(always)]
fn segment(slot: u32, index: u32) -> Option<Segment> {
    let words: SegmentWords = *SEGMENTS.get_value(slot, &index)?;
    Some(transmute!(words))
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
