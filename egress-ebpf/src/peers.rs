//! Whom each socket has heard from, in a storage of sockets that every agent on the host adopts from the one before.

use aya_ebpf::{bindings::bpf_sock_addr, btf_maps::SkStorage, macros::btf_map, programs::SockAddrContext};
use egress_common::{Address, Flow, Peers};

use crate::{
    clock,
    context::{halves, joined},
};

/// Named as `map::PEERS`.
#[btf_map]
static PEERS_2: SkStorage<Peers> = SkStorage::new();

/// Whether the socket has heard from the destination lately.
#[inline(always)]
pub(crate) fn has(ctx: &SockAddrContext, flow: &Flow) -> bool {
    let (high, low) = halves(flow.address);
    has_heard(ctx.sock_addr, high, low, flow.port.into()) != 0
}

/// Remembers the peer of a datagram. A socket without memory for it is one that has not heard.
#[inline(always)]
pub(crate) fn remember(ctx: &SockAddrContext, address: Address, port: u16) {
    let (high, low) = halves(address);
    hear(ctx.sock_addr, high, low, port.into());
}

/// Both walk the table in a function that the verifier looks at once. Of 5.10 it takes no pointers but the context.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the caller widened it from 16 bits")]
extern "C" fn has_heard(ctx: *mut bpf_sock_addr, high: u64, low: u64, port: u32) -> u32 {
    // SAFETY: the kernel passes a valid context with its socket, whose storage outlives the program. The socket is locked
    // while these hooks run (`BPF_CGROUP_RUN_SA_PROG_LOCK` of `linux/bpf-cgroup.h`), so no other program writes.
    match unsafe { PEERS_2.get_ptr_mut(&SockAddrContext { sock_addr: ctx }).as_ref() } {
        Some(peers) => peers.has(joined(high, low), port as u16, clock::seconds()).into(),
        None => 0,
    }
}

/// See [`has_heard`].
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the caller widened it from 16 bits")]
extern "C" fn hear(ctx: *mut bpf_sock_addr, high: u64, low: u64, port: u32) -> u32 {
    // SAFETY: as in `has_heard`.
    if let Some(peers) = unsafe { PEERS_2.get_or_insert_ptr_mut(&SockAddrContext { sock_addr: ctx }, None).as_mut() } {
        peers.remember(joined(high, low), port as u16, clock::seconds());
    }
    0
}
