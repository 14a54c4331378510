//! What was decided is counted, and reported to the agent through the `EVENTS` ring buffer if it is a refusal.

use aya_ebpf::{
    btf_maps::RingBuf,
    helpers::{bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid},
    macros::btf_map,
    programs::SkBuffContext,
};
use egress_common::{
    COMM_LEN, Counter, Decision, Event, Flow, Hook, NameKey, Process, QueryEvent, SocketKind, Verdict,
};

use crate::{asked, clock, stats, workloads};

/// Bytes, a power of two; room for about 11,000 reports that the agent has not read yet, or 3,000 of questions.
const CAPACITY: usize = 1 << 20;

#[btf_map]
static EVENTS: RingBuf<Event, CAPACITY> = RingBuf::new();

/// What the current task asked for.
#[inline(always)]
pub(crate) fn record(hook: Hook, flow: &Flow, decision: &Decision) {
    if is_to_report(hook, decision) {
        write(&Event::new(clock::nanoseconds(), current(), hook, flow, decision));
    }
}

/// A socket that the current task asked for.
#[inline(always)]
pub(crate) fn record_socket(hook: Hook, kind: SocketKind, family: u32, flow: &Flow, decision: &Decision) {
    if is_to_report(hook, decision) {
        write(&Event::new(clock::nanoseconds(), current(), hook, flow, decision).of_socket(kind, family));
    }
}

/// A packet. Whoever runs meanwhile need not have sent it: of its sender only cgroup and user are known.
#[inline(always)]
pub(crate) fn record_packet(ctx: &SkBuffContext, flow: &Flow, decision: &Decision) {
    if is_to_report(Hook::Egress, decision) {
        write(&Event::new(clock::nanoseconds(), sender(ctx), Hook::Egress, flow, decision));
    }
}

/// A question to a server of DNS, with the name that it asks for unless it cannot be read.
#[inline(always)]
pub(crate) fn record_question(ctx: &SkBuffContext, flow: &Flow, decision: &Decision, name: *const NameKey) {
    if !is_to_report(Hook::Query, decision) {
        return;
    }
    let sender = match asked::questioner(ctx.skb.skb) {
        Some(questioner) => *questioner.process(),
        None => sender(ctx),
    };
    let event = Event::new(clock::nanoseconds(), sender, Hook::Query, flow, decision);
    // SAFETY: a slot that the caller has, or null.
    let Some(name) = (unsafe { name.as_ref() }) else { return write(&event) };
    let Some(mut record) = EVENTS.reserve_untyped::<QueryEvent>(0) else {
        return stats::add(Counter::EventsLost);
    };
    // SAFETY: the record is ours.
    unsafe { QueryEvent::write(record.as_mut_ptr(), event, name) };
    record.submit(0);
}

#[inline(always)]
fn sender(ctx: &SkBuffContext) -> Process {
    let (cgroup_id, uid) = (workloads::cgroup_of(ctx), ctx.get_socket_uid());
    Process { cgroup_id, pid: 0, tid: 0, uid, gid: 0, comm: [0; COMM_LEN] }
}

/// Counts a decision; tells whether the agent is to hear of it.
#[inline(always)]
fn is_to_report(hook: Hook, decision: &Decision) -> bool {
    stats::add(Counter::Answers(decision.verdict, decision.reason, hook));
    match decision.verdict {
        Verdict::Allow => false,
        Verdict::Deny | Verdict::WouldDeny => true,
    }
}

/// Writes one report; counts it as lost if there is no room.
#[inline(always)]
fn write(event: &Event) {
    if EVENTS.output(event, 0).is_err() {
        stats::add(Counter::EventsLost);
    }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "both helpers return two 32-bit ids in one number")]
pub(crate) fn current() -> Process {
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
