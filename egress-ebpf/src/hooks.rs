//! The hooks: each reads a destination, asks, records, and answers.
//!
//! A hook runs for the sockets made in the attached cgroup or below; the acting task is the current one.
//! Context fields: `include/uapi/linux/bpf.h`, `struct bpf_sock_addr`.

#![expect(clippy::needless_pass_by_value, reason = "the macro calls each program with its context by value")]

use aya_ebpf::{bindings::bpf_sock_addr, macros::cgroup_sock_addr, programs::SockAddrContext};
use aya_log_ebpf::debug;
use egress_common::{Address, Flow, Hook, Protocol, Reason, Verdict, decide};

use crate::{answer::answer, events, rules::Maps, stats, workloads};

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    answer(judge(&ctx, Hook::Connect4, address_v4(&ctx)))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    answer(judge(&ctx, Hook::Connect6, address_v6(&ctx)))
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    answer(judge_datagram(&ctx, Hook::Sendmsg4, address_v4(&ctx)))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    answer(judge_datagram(&ctx, Hook::Sendmsg6, address_v6(&ctx)))
}

/// A datagram on a connected socket that carries `IP_PKTINFO` or the like arrives without a destination of its own:
/// address and port are zero, and it goes where `connect` was allowed to. A caller who names port 0 never gets here
/// (`udp_sendmsg` refuses it first).
#[inline(always)]
fn judge_datagram(ctx: &SockAddrContext, hook: Hook, address: Address) -> Verdict {
    if address.is_unspecified() && port(ctx) == 0 { Verdict::Allow } else { judge(ctx, hook, address) }
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, hook: Hook, address: Address) -> Verdict {
    let protocol = Protocol::from_kernel(fields(ctx).protocol);
    let flow = Flow { place: workloads::place_current(), protocol, address, port: port(ctx) };
    let decision = decide(&Maps, &flow);
    stats::count(&decision, hook);
    match decision.verdict {
        Verdict::Allow => {}
        Verdict::Deny | Verdict::WouldDeny => events::report(hook, &flow, &decision),
    }
    if let Reason::Fault = decision.reason {
        debug!(ctx, "no rules could be read for hook {}: refused", hook.code());
    }
    decision.verdict
}

#[inline(always)]
fn fields(ctx: &SockAddrContext) -> &bpf_sock_addr {
    // SAFETY: the kernel passes a valid context that lives as long as the program runs; the verifier checks each access.
    unsafe { &*ctx.sock_addr }
}

/// The destination port. The field holds 16 bits in network byte order.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the upper half is always zero")]
fn port(ctx: &SockAddrContext) -> u16 {
    u16::from_be(fields(ctx).user_port as u16)
}

/// The family comes from the hook, never from `user_family`: `sendto` with `AF_UNSPEC` leaves 0 there beside a real
/// address.
#[inline(always)]
fn address_v4(ctx: &SockAddrContext) -> Address {
    Address::from_network_v4(fields(ctx).user_ip4)
}

#[inline(always)]
fn address_v6(ctx: &SockAddrContext) -> Address {
    let [a, b, c, d] = &fields(ctx).user_ip6;
    // SAFETY: as in `fields`. Volatile, because the verifier takes only reads of one word from the context and the
    // compiler would join them.
    let words = unsafe { [read(a), read(b), read(c), read(d)] };
    Address::from_network_words(words)
}

/// Reads one word of the context as it stands.
///
/// # Safety
///
/// `word` points into a valid context.
#[inline(always)]
unsafe fn read(word: *const u32) -> u32 {
    // SAFETY: the caller's.
    unsafe { core::ptr::read_volatile(word) }
}
