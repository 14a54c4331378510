//! Reports to the agent, through the `EVENTS` ring buffer.

use aya_ebpf::{
    btf_maps::RingBuf,
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::bpf_ktime_get_boot_ns,
    },
    macros::btf_map,
};
use egress_common::{COMM_LEN, Counter, Decision, Event, Flow, Hook, Process};

use crate::stats;

/// Bytes, a power of two; room for about 11,000 reports that the agent has not read yet.
const CAPACITY: usize = 1 << 20;

#[btf_map]
static EVENTS: RingBuf<Event, CAPACITY> = RingBuf::new();

/// Writes one report; counts it as lost if there is no room.
#[inline(always)]
pub(crate) fn report(hook: Hook, flow: &Flow, decision: &Decision) {
    // SAFETY: the helper takes no arguments and only returns a number.
    let time = unsafe { bpf_ktime_get_boot_ns() };
    let event = Event::new(time, current(), hook, flow, decision);
    if EVENTS.output(event, 0).is_err() {
        stats::add(Counter::EventsLost);
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "both helpers return two 32-bit ids in one number")]
fn current() -> Process {
    let (ids, owner) = (bpf_get_current_pid_tgid(), bpf_get_current_uid_gid());
    // SAFETY: the helper takes no arguments and only returns a number.
    let cgroup_id = unsafe { bpf_get_current_cgroup_id() };
    Process {
        cgroup_id,
        pid: (ids >> 32) as u32,
        tid: ids as u32,
        uid: owner as u32,
        gid: (owner >> 32) as u32,
        // The helper fails only for a buffer of length 0.
        comm: bpf_get_current_comm().unwrap_or([0; COMM_LEN]),
    }
}
