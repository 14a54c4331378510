//! What is received: answers of DNS teach names before the application sees them.
//!
//! Nothing is refused here. A segment of a stream that comes before its turn is dropped, so that it is sent again in order.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use egress_common::{Arrived, Lesson, Protocol, answer_v4, answer_v6};

use crate::{
    answer::{PASS, REFUSE},
    asked, lessons,
    packet::{IPV4, IPV6, Skb},
    stats,
};

#[cgroup_skb(ingress)]
fn ingress(ctx: SkBuffContext) -> i32 {
    let packet = Skb(ctx.skb.skb);
    let arrived = match packet.protocol() {
        IPV4 => answer_v4(&packet),
        IPV6 => answer_v6(&packet),
        _ => None,
    };
    match arrived {
        Some(arrived) => hear(packet, &arrived),
        None => PASS,
    }
}

#[inline(always)]
fn hear(packet: Skb, arrived: &Arrived) -> i32 {
    // From `lo`, nobody but this host itself can have sent it: see the hooks of `bind`.
    let is_from_where_it_says = arrived.source.is_loopback() == packet.is_on_loopback();
    let asker = if is_from_where_it_says { asked::by(packet.0, arrived.source) } else { None };
    match (asker, arrived.protocol) {
        (None, _) => stats::answered(Lesson::Unasked),
        (Some(workload), Protocol::TCP) => {
            return if lessons::hear_segment(packet, arrived, workload) { PASS } else { REFUSE };
        }
        (Some(workload), _) => lessons::hear_datagram(packet, arrived, workload),
    }
    PASS
}
