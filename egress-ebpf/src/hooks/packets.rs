//! The packet guard: packets that would go elsewhere than their destination says, whatever put that into them.
//!
//! It has no list of addresses: a destination is judged once, by `connect` or `sendmsg`. It finds what those cannot see,
//! such as a routing header in the ancillary data of a `sendmsg`, and asks only then who the packet belongs to.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use egress_common::{Flow, Way, decide_bypass, way_v4, way_v6};

use crate::{
    answer::{PASS, REFUSE, answer_without_errno},
    events,
    packet::{IPV4, IPV6, Skb},
    rules::Maps,
    workloads,
};

#[cgroup_skb(egress)]
fn egress(ctx: SkBuffContext) -> i32 {
    let packet = Skb(ctx.skb.skb);
    let way = match packet.protocol() {
        IPV4 => way_v4(&packet),
        IPV6 => way_v6(&packet),
        // Nothing else gets here.
        _ => return PASS,
    };
    match way {
        Some(Way { is_bypass: false, .. }) => PASS,
        Some(Way { destination, protocol, .. }) => {
            let place = workloads::place_of(&ctx, None);
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
