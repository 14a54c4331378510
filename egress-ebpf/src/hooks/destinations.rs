//! `connect` and `sendmsg`: where a socket wants to go.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use aya_log_ebpf::debug;
use egress_common::{Address, Decision, Flow, Hook, Protocol, Queries, Reason, Verdict, decide};

use crate::{
    answer::{PASS, answer},
    asked,
    context::{address_v4, address_v6, port, protocol},
    events,
    rules::Maps,
    workloads,
};

#[cgroup_sock_addr(connect4)]
fn connect4(ctx: SockAddrContext) -> i32 {
    answer(&judge(&ctx, Hook::Connect4, address_v4(&ctx)))
}

#[cgroup_sock_addr(connect6)]
fn connect6(ctx: SockAddrContext) -> i32 {
    answer(&judge(&ctx, Hook::Connect6, address_v6(&ctx)))
}

#[cgroup_sock_addr(sendmsg4)]
fn sendmsg4(ctx: SockAddrContext) -> i32 {
    judge_datagram(&ctx, Hook::Sendmsg4, address_v4(&ctx))
}

#[cgroup_sock_addr(sendmsg6)]
fn sendmsg6(ctx: SockAddrContext) -> i32 {
    judge_datagram(&ctx, Hook::Sendmsg6, address_v6(&ctx))
}

/// A datagram on a connected socket that carries `IP_PKTINFO` or the like arrives without a destination of its own:
/// address and port are zero, and it goes where `connect` was allowed to. A caller who names port 0 never gets here
/// (`udp_sendmsg` refuses it first).
#[inline(always)]
fn judge_datagram(ctx: &SockAddrContext, hook: Hook, address: Address) -> i32 {
    if address.is_unspecified() && port(ctx) == 0 { PASS } else { answer(&judge(ctx, hook, address)) }
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, hook: Hook, address: Address) -> Decision {
    let flow = Flow { place: workloads::place_current(), protocol: protocol(ctx), address, port: port(ctx) };
    let mut decision = decide(&Maps::of(ctx), &flow);
    if let Verdict::Allow | Verdict::WouldDeny = decision.verdict {
        asked::mark(ctx, &flow);
        match asked::question(ctx, &flow) {
            Ok(Queries::Named) if connects(hook) && flow.protocol == Protocol::TCP => asked::give_up_soon(ctx),
            Ok(_) => {}
            Err(()) => decision = Decision::FAULT,
        }
    }
    events::record(hook, &flow, &decision);
    if let Reason::Fault = decision.reason {
        debug!(ctx, "no rules could be read for hook {}: refused", hook.code());
    }
    decision
}

#[inline(always)]
const fn connects(hook: Hook) -> bool {
    matches!(hook, Hook::Connect4 | Hook::Connect6)
}
