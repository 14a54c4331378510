//! The packet guard: packets that would go elsewhere than their destination says, whatever put that into them.
//!
//! It has no list of addresses: a destination is judged once, by `connect` or `sendmsg`. It finds what those cannot see,
//! such as a routing header in the ancillary data of a `sendmsg`, and asks only then who the packet belongs to.

use aya_ebpf::{bindings::__sk_buff, macros::cgroup_skb, programs::SkBuffContext};
use egress_common::{Bytes, Flow, Packet, Way, decide_bypass, way_v4, way_v6};

use crate::{
    answer::{PASS, REFUSE, answer_without_errno},
    events,
    rules::Maps,
    workloads,
};

/// `ETH_P_IP` and `ETH_P_IPV6` of `linux/if_ether.h`, in network byte order as the field is.
const IPV4: u32 = 0x0800_u16.to_be() as u32;
const IPV6: u32 = 0x86DD_u16.to_be() as u32;
/// `LOOPBACK_IFINDEX` of `linux/net.h`: the same in every network namespace.
const LOOPBACK: u32 = 1;

#[cgroup_skb(egress)]
fn egress(ctx: SkBuffContext) -> i32 {
    let packet = Sent(ctx.skb.skb);
    // SAFETY: the kernel passes a valid context that lives as long as the program runs; the verifier checks each access.
    let way = match unsafe { (*packet.0).protocol } {
        IPV4 => way_v4(&packet),
        IPV6 => way_v6(&packet),
        // Nothing else gets here.
        _ => return PASS,
    };
    match way {
        Some(Way { is_bypass: false, .. }) => PASS,
        Some(Way { destination, protocol, .. }) => {
            let place = workloads::place_of(&ctx);
            judge(&ctx, &Flow { place, protocol, address: destination, port: 0 })
        }
        None => REFUSE,
    }
}

#[inline(always)]
fn judge(ctx: &SkBuffContext, flow: &Flow) -> i32 {
    let decision = decide_bypass(&Maps::WITHOUT_SOCKET, flow.place);
    events::record_packet(ctx, flow, &decision);
    answer_without_errno(decision.verdict)
}

/// A packet on its way out; its first byte is that of the IP header.
struct Sent(*mut __sk_buff);

impl Bytes for Sent {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        aya_ebpf::programs::sk_buff::SkBuff::new(self.0).load(offset as usize).ok()
    }
}

impl Packet for Sent {
    #[inline(always)]
    fn leaves(&self) -> bool {
        // SAFETY: as in `egress`.
        unsafe { (*self.0).ifindex != LOOPBACK }
    }
}
