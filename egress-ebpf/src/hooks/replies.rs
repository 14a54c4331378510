//! `recvmsg`: whom a socket of UDP has heard from may be answered.

use aya_ebpf::{macros::cgroup_sock_addr, programs::SockAddrContext};
use egress_common::{Address, remembers_peers};

use crate::{
    answer::PASS,
    context::{address_v4, address_v6, port},
    peers,
    rules::Maps,
    workloads,
};

#[cgroup_sock_addr(recvmsg4)]
fn recvmsg4(ctx: SockAddrContext) -> i32 {
    remember(&ctx, address_v4(&ctx))
}

#[cgroup_sock_addr(recvmsg6)]
fn recvmsg6(ctx: SockAddrContext) -> i32 {
    remember(&ctx, address_v6(&ctx))
}

/// The kernel takes no other answer than to pass.
#[inline(always)]
fn remember(ctx: &SockAddrContext, address: Address) -> i32 {
    if remembers_peers(&Maps::of(ctx), workloads::place_current()) {
        peers::remember(ctx, address, port(ctx));
    }
    PASS
}
