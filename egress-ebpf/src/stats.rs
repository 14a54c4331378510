//! Counters, in the per-CPU `STATS` map.

use aya_ebpf::{btf_maps::PerCpuArray, macros::btf_map};
use egress_common::{Counter, Lesson};

#[btf_map]
static STATS: PerCpuArray<u64, { Counter::COUNT as usize }> = PerCpuArray::new();

/// Counts what became of an answer of DNS.
#[inline(always)]
pub(crate) fn answered(lesson: Lesson) {
    add(Counter::Answered(lesson));
}

/// Adds one.
#[inline(always)]
pub(crate) fn add(counter: Counter) {
    if let Some(value) = STATS.get_ptr_mut(counter.index()) {
        // SAFETY: the pointer is to this CPU's element, which outlives the program; a task that is preempted here can
        // lose one count to another on the same CPU, never more.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}
