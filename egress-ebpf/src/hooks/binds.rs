//! `bind`: port 53 is not for everybody where a resolver of this host is believed.
//!
//! Whoever has the port, at whatever address, can answer under the address of that resolver (`IP_PKTINFO`). Those that resolve for
//! the whole host may have it.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use egress_common::{Address, DNS_PORT, Flow, Hook, decide_dns_service};

use crate::{
    answer::{PASS, answer},
    asked,
    context::{address_v4, address_v6, port, protocol},
    events, meta,
    rules::Maps,
    workloads,
};

#[cgroup_sock_addr(bind4)]
fn bind4(ctx: SockAddrContext) -> i32 {
    if takes_dns(&ctx) { judge(&ctx, Hook::Bind4, address_v4(&ctx)) } else { PASS }
}

#[cgroup_sock_addr(bind6)]
fn bind6(ctx: SockAddrContext) -> i32 {
    if takes_dns(&ctx) { judge(&ctx, Hook::Bind6, address_v6(&ctx)) } else { PASS }
}

#[inline(always)]
fn takes_dns(ctx: &SockAddrContext) -> bool {
    port(ctx) == DNS_PORT && meta::guards_dns() && asked::is_in_known_netns(ctx)
}

#[inline(always)]
fn judge(ctx: &SockAddrContext, hook: Hook, address: Address) -> i32 {
    let place = workloads::place_current();
    let decision = decide_dns_service(&Maps::WITHOUT_SOCKET, place);
    events::record(hook, &Flow { place, protocol: protocol(ctx), address, port: DNS_PORT }, &decision);
    answer(&decision)
}
