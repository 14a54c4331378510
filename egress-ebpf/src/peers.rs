//! Whom each socket has heard from, in the `PEERS` storage of sockets.

use aya_ebpf::{
    btf_maps::SkStorage, helpers::generated::bpf_ktime_get_boot_ns, macros::btf_map, programs::SockAddrContext,
};
use egress_common::{Address, Flow, Peers};

#[btf_map]
static PEERS: SkStorage<Peers> = SkStorage::new();

/// Whether the socket has heard from the destination lately.
#[inline(always)]
pub(crate) fn has(ctx: &SockAddrContext, flow: &Flow) -> bool {
    // SAFETY: the kernel passes a valid context with its socket, whose storage outlives the program. The socket is locked
    // while these hooks run (`BPF_CGROUP_RUN_SA_PROG_LOCK` of `linux/bpf-cgroup.h`), so nobody else writes.
    match unsafe { PEERS.get_ptr_mut(ctx).as_ref() } {
        Some(peers) => peers.has(flow.address, flow.port, now()),
        None => false,
    }
}

/// Remembers the peer of a datagram. A socket without memory for it is one that has not heard.
#[inline(always)]
pub(crate) fn remember(ctx: &SockAddrContext, address: Address, port: u16) {
    // SAFETY: as in `has`.
    if let Some(peers) = unsafe { PEERS.get_or_insert_ptr_mut(ctx, None).as_mut() } {
        peers.remember(address, port, now());
    }
}

/// Seconds since boot.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "136 years")]
fn now() -> u32 {
    // SAFETY: the helper takes no arguments and only returns a number.
    (unsafe { bpf_ktime_get_boot_ns() } / 1_000_000_000) as u32
}
