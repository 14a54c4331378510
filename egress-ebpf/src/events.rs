//! What was decided is counted, and reported to the agent through the `EVENTS` ring buffer if it is a refusal.
//!
//! While less than half of the ring is in use, everybody writes. Then each workload has a share of a second, counted in the
//! `SHARES` map: one that refuses at full speed takes what is left from itself, not from its neighbours. What is not written
//! is counted, and whose it was.

use aya_ebpf::{
    bindings::BPF_RB_AVAIL_DATA,
    btf_maps::{LruHashMap, RingBuf},
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_uid_gid,
        generated::bpf_ringbuf_query,
    },
    macros::btf_map,
    programs::SkBuffContext,
};
use egress_common::{
    COMM_LEN, Counter, Decision, Event, Flow, Hook, Lineage, MAX_SHARES, NameKey, Process, QueryEvent, Share,
    SocketKind, Verdict,
};

use crate::{asked, clock, stats, workloads};

/// Bytes, a power of two; room for about 18,000 reports that the agent has not read yet, or 5,000 of questions.
const CAPACITY: usize = 1 << 21;

#[btf_map]
static EVENTS: RingBuf<Event, CAPACITY> = RingBuf::new();

#[btf_map]
static SHARES: LruHashMap<u64, Share, { MAX_SHARES as usize }> = LruHashMap::new();

/// What of the ring is in use when the shares of a level begin to count, the deepest level first, and how many records of a
/// second are a share there. A workload that stands higher in the hierarchy holds others, or makes cgroups as it likes:
/// whatever it makes, it leaves the last quarter to the others.
const SHARES_OF: [(u64, u32); 3] =
    [(CAPACITY as u64 / 2, 512), (CAPACITY as u64 / 8 * 5, 1024), (CAPACITY as u64 / 4 * 3, 2048)];

/// What the current task asked for.
#[inline(always)]
pub(crate) fn record(hook: Hook, flow: &Flow, decision: &Decision) {
    if is_to_report(hook, decision) {
        let lineage = workloads::current_lineage();
        write(lineage, || Event::new(clock::nanoseconds(), current(), lineage, hook, flow, decision));
    }
}

/// A socket that the current task asked for.
#[inline(always)]
pub(crate) fn record_socket(hook: Hook, kind: SocketKind, family: u32, flow: &Flow, decision: &Decision) {
    if is_to_report(hook, decision) {
        let lineage = workloads::current_lineage();
        write(lineage, || {
            Event::new(clock::nanoseconds(), current(), lineage, hook, flow, decision).of_socket(kind, family)
        });
    }
}

/// A packet. Whoever runs meanwhile need not have sent it: of its sender only cgroup and user are known.
#[inline(always)]
pub(crate) fn record_packet(ctx: &SkBuffContext, flow: &Flow, decision: &Decision) {
    if is_to_report(Hook::Egress, decision) {
        let lineage = workloads::lineage_of(ctx);
        write(lineage, || Event::new(clock::nanoseconds(), sender(ctx), lineage, Hook::Egress, flow, decision));
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
    let lineage = workloads::lineage_of(ctx);
    let event = || Event::new(clock::nanoseconds(), sender, lineage, Hook::Query, flow, decision);
    // SAFETY: a slot that the caller has, or null.
    let Some(name) = (unsafe { name.as_ref() }) else { return write(lineage, event) };
    if !may_write(lineage) {
        return;
    }
    let Some(mut record) = EVENTS.reserve_untyped::<QueryEvent>(0) else { return lose(lineage.workload()) };
    // SAFETY: the record is ours.
    unsafe { QueryEvent::write(record.as_mut_ptr(), event(), name) };
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

/// Writes one report, to where it is to stand: the stack of a program is small. Counts it as lost if there is no room.
#[inline(always)]
fn write(lineage: Lineage, event: impl FnOnce() -> Event) {
    if !may_write(lineage) {
        return;
    }
    match EVENTS.reserve_untyped::<Event>(0) {
        Some(mut record) => {
            record.write(event());
            record.submit(0);
        }
        None => lose(lineage.workload()),
    }
}

/// Whether there is room for a record, or for one of this workload; where there is none, the record is counted as lost.
#[inline(always)]
fn may_write(lineage: Lineage) -> bool {
    let [first, second, third] = lineage.ids();
    has_room(first, second, third) != 0
}

/// Verified once as a function of its own, which has a stack of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn has_room(first: u64, second: u64, third: u64) -> u32 {
    // SAFETY: the helper takes a ring buffer and a number, and returns a number.
    let used = unsafe { bpf_ringbuf_query((&raw const EVENTS).cast_mut().cast(), BPF_RB_AVAIL_DATA.into()) };
    let [deepest, middle, highest] = SHARES_OF;
    if used <= deepest.0 {
        return 1;
    }
    let now = clock::seconds();
    let is_shared = takes(third, now, deepest.1)
        && (used <= middle.0 || second == third || takes(second, now, middle.1))
        && (used <= highest.0 || first == second || takes(first, now, highest.1));
    if !is_shared {
        lose(third);
    }
    is_shared.into()
}

/// Whether the share of a cgroup has room for one more record, which is then taken. Two processors that count at once may
/// count one: the share is not exact, and need not be.
#[inline(always)]
fn takes(cgroup: u64, second: u32, most: u32) -> bool {
    let Some(share) = SHARES.get_ptr_mut(cgroup) else {
        // Where there is no room to count, the ring has some.
        let _ = SHARES.insert(cgroup, Share::new(second, 1, 0), 0);
        return true;
    };
    // SAFETY: a pointer into the map, whose elements outlive the program.
    match unsafe { share.read() }.take(second, most) {
        Some(taken) => {
            // SAFETY: as above.
            unsafe { share.write(taken) };
            true
        }
        None => false,
    }
}

/// Counts a record that is not written, and whose it was.
#[inline(always)]
fn lose(workload: u64) {
    stats::add(Counter::EventsLost);
    match SHARES.get_ptr_mut(workload) {
        // SAFETY: as in `takes`.
        Some(share) => unsafe { share.write(share.read().with_loss()) },
        // Where there is no room, the sum of all tells.
        None => drop(SHARES.insert(workload, Share::new(0, 0, 1), 0)),
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
