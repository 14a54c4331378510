//! The `META` map: written by the agent, for whoever inspects the maps and for what the programs need to know of them.

use aya_ebpf::{btf_maps::Array, macros::btf_map};
use egress_common::{Lifetime, Meta};

#[btf_map]
static META: Array<Meta, 1> = Array::new();

/// The deepest level at which a cgroup is placed.
#[inline(always)]
pub(crate) fn deepest() -> u8 {
    META.get(0).map_or(0, Meta::deepest)
}

/// The level of the cgroup that the programs are attached to.
#[inline(always)]
pub(crate) fn level() -> u8 {
    META.get(0).map_or(0, Meta::level)
}

/// For how long answers of DNS hold.
#[inline(always)]
pub(crate) fn lifetime() -> Lifetime {
    META.get(0).map_or(Lifetime { floor: 0, grace: 0 }, Meta::lifetime)
}

/// How many addresses each workload may have learnt.
#[inline(always)]
pub(crate) fn quota() -> u32 {
    META.get(0).map_or(0, Meta::quota)
}

/// Whether port 53 is kept for those who may serve it.
#[inline(always)]
pub(crate) fn guards_dns() -> bool {
    META.get(0).is_some_and(Meta::guards_dns)
}

/// How many addresses each workload always finds room for.
#[inline(always)]
pub(crate) fn guaranteed() -> u32 {
    META.get(0).map_or(0, Meta::guaranteed)
}
