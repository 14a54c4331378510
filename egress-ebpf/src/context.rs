//! What a `cgroup/sock_addr` program is told: `include/uapi/linux/bpf.h`, `struct bpf_sock_addr`.

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use egress_common::{Address, Protocol};

/// What the socket speaks.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> Protocol {
    Protocol::from_kernel(fields(ctx).protocol)
}

/// The peer's port. The field holds 16 bits in network byte order.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the upper half is always zero")]
pub(crate) fn port(ctx: &SockAddrContext) -> u16 {
    u16::from_be(fields(ctx).user_port as u16)
}

/// The family comes from the hook, never from `user_family`: `sendto` with `AF_UNSPEC` leaves 0 there beside a real
/// address.
#[inline(always)]
pub(crate) fn address_v4(ctx: &SockAddrContext) -> Address {
    Address::from_network_v4(fields(ctx).user_ip4)
}

/// See [`address_v4`].
#[inline(always)]
pub(crate) fn address_v6(ctx: &SockAddrContext) -> Address {
    let [a, b, c, d] = &fields(ctx).user_ip6;
    // SAFETY: as in `fields`. Volatile, because the verifier takes only reads of one word from the context and the
    // compiler would join them.
    let words = unsafe { [read(a), read(b), read(c), read(d)] };
    Address::from_network_words(words)
}

/// An address as two numbers: functions that are verified by themselves take no more than five.
#[inline(always)]
pub(crate) fn halves(address: Address) -> (u64, u64) {
    let [a, b, c, d] = address.network_words();
    (u64::from(a) << 32 | u64::from(b), u64::from(c) << 32 | u64::from(d))
}

/// What [`halves`] took apart.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "each number is taken apart as it was put together")]
pub(crate) const fn joined(high: u64, low: u64) -> Address {
    Address::from_network_words([(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32])
}

#[inline(always)]
fn fields(ctx: &SockAddrContext) -> &bpf_sock_addr {
    // SAFETY: the kernel passes a valid context that lives as long as the program runs; the verifier checks each access.
    unsafe { &*ctx.sock_addr }
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
