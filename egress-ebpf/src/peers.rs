//! Whom each socket has heard from, in the `PEERS` storage of sockets.

use aya_ebpf::{btf_maps::SkStorage, macros::btf_map, programs::SockAddrContext};
use egress_common::{Address, Flow, Peers};

use crate::clock;

#[btf_map]
static PEERS: SkStorage<Peers> = SkStorage::new();

/// Whether the socket has heard from the destination lately.
#[inline(always)]
pub(crate) fn has(ctx: &SockAddrContext, flow: &Flow) -> bool {
    // SAFETY: the kernel passes a valid context with its socket, whose storage outlives the program. The socket is locked
    // while these hooks run (`BPF_CGROUP_RUN_SA_PROG_LOCK` of `linux/bpf-cgroup.h`), so nobody else writes.
    match unsafe { PEERS.get_ptr_mut(ctx).as_ref() } {
        Some(peers) => peers.has(flow.address, flow.port, clock::seconds()),
        None => false,
    }
}

/// Remembers the peer of a datagram. A socket without memory for it is one that has not heard.
#[inline(always)]
pub(crate) fn remember(ctx: &SockAddrContext, address: Address, port: u16) {
    // SAFETY: as in `has`.
    if let Some(peers) = unsafe { PEERS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        peers.remember(address, port, clock::seconds());
    }
}
