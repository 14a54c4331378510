//! A packet, as a `cgroup_skb` program sees it: its first byte is that of the IP header.

use aya_ebpf::{bindings::__sk_buff, programs::sk_buff::SkBuff};
use egress_common::{Bytes, Packet};

/// `ETH_P_IP` and `ETH_P_IPV6` of `linux/if_ether.h`, in network byte order as the field is.
pub(crate) const IPV4: u32 = 0x0800_u16.to_be() as u32;
pub(crate) const IPV6: u32 = 0x86DD_u16.to_be() as u32;
/// `LOOPBACK_IFINDEX` of `linux/net.h`: the same in every network namespace.
const LOOPBACK: u32 = 1;

/// A valid context, which lives as long as the program runs; the verifier checks each access.
#[derive(Clone, Copy)]
pub(crate) struct Skb(pub(crate) *mut __sk_buff);

impl Skb {
    /// The protocol of the network layer, in network byte order.
    #[inline(always)]
    pub(crate) fn protocol(self) -> u32 {
        // SAFETY: see the type.
        unsafe { (*self.0).protocol }
    }

    /// How many bytes it has.
    #[inline(always)]
    pub(crate) fn len(self) -> u32 {
        // SAFETY: see the type.
        unsafe { (*self.0).len }
    }

    /// Whether it becomes several packets, each with a header, after this one was looked at.
    #[inline(always)]
    pub(crate) fn is_cut_later(self) -> bool {
        // SAFETY: see the type.
        unsafe { (*self.0).gso_size != 0 }
    }

    /// Whether the first bytes, so many, are the kernel's own, which nobody changes any more.
    #[inline(always)]
    pub(crate) fn has_copy_up_to(self, end: u32) -> bool {
        // SAFETY: see the type; both are addresses, of which no byte is read.
        let (first, last) = unsafe { ((*self.0).data as usize, (*self.0).data_end as usize) };
        first + end as usize <= last
    }

    /// Whether it is on its way to, or came from, `lo`.
    #[inline(always)]
    pub(crate) fn is_on_loopback(self) -> bool {
        // SAFETY: see the type.
        unsafe { (*self.0).ifindex == LOOPBACK }
    }
}

impl Bytes for Skb {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        SkBuff::new(self.0).load(offset as usize).ok()
    }
}

impl Packet for Skb {
    #[inline(always)]
    fn leaves(&self) -> bool {
        !self.is_on_loopback()
    }
}
