//! The `META` map: written by the agent, for whoever inspects the maps and for what the programs need to know of them.

use aya_ebpf::{btf_maps::Array, macros::btf_map};
use egress_common::Meta;

#[btf_map]
static META: Array<Meta, 1> = Array::new();

/// The deepest level at which a cgroup is placed.
#[inline(always)]
pub(crate) fn deepest() -> u8 {
    META.get(0).map_or(0, Meta::deepest)
}
