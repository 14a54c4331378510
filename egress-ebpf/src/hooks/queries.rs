//! What is sent to servers of DNS: each question is judged by the name that it asks for, where a policy says so.
//!
//! To port 53, and by sockets that have asked there: a rule of the host may lead them to another port.

use aya_ebpf::{macros::cgroup_skb, programs::SkBuffContext};
use egress_common::{DNS_PORT, Place, Protocol, Queries, Sent, queries};

use crate::{
    answer::{PASS, REFUSE},
    asked,
    packet::Skb,
    questions::{self, PART, judge_datagram, judge_segment, judge_unreadable, passes},
    rules::Maps,
    workloads,
};

#[cgroup_skb(egress)]
fn query(ctx: SkBuffContext) -> i32 {
    let packet = Skb(ctx.skb.skb);
    let Some(sent) = questions::sent(packet) else { return unreadable(&ctx) };
    if !sent.protocol.is_judged() {
        return PASS;
    }
    let Some(port) = questions::port(packet, &sent) else { return unreadable(&ctx) };
    let questioner = asked::questioner(packet.0);
    let uid = match &questioner {
        Some(questioner) => Some(questioner.process().uid),
        None if port == DNS_PORT => None,
        None => return PASS,
    };
    // Who has the socket made may have become another user since.
    let place = workloads::place_of(&ctx, uid);
    match queries(&Maps::WITHOUT_SOCKET, place) {
        Queries::Any => PASS,
        Queries::Reported => {
            // Where nothing is refused, nothing is held back, and after a part of a message it is not known where the next begins.
            if let Some(questioner) = questioner
                && !questioner.is_lost()
                && judge(packet, &sent, place, true) == PART
            {
                questioner.lose();
            }
            PASS
        }
        Queries::Named => {
            let is_whole = questioner.is_some_and(|questioner| questioner.is_judged());
            if passes(judge(packet, &sent, place, is_whole)) { PASS } else { REFUSE }
        }
    }
}

/// See [`judge_segment`] for whether a stream is whole.
#[inline(always)]
fn judge(packet: Skb, sent: &Sent, place: Place, is_whole: bool) -> u32 {
    let (skb, place) = (packet.0, place.pack());
    if sent.is_part {
        judge_unreadable(skb, place)
    } else if sent.protocol == Protocol::TCP {
        judge_segment(skb, sent.transport, place, is_whole.into())
    } else {
        judge_datagram(skb, sent.transport, place)
    }
}

/// Nobody can tell whether it is a question.
#[inline(always)]
fn unreadable(ctx: &SkBuffContext) -> i32 {
    match queries(&Maps::WITHOUT_SOCKET, workloads::place_of(ctx, None)) {
        Queries::Any | Queries::Reported => PASS,
        Queries::Named => REFUSE,
    }
}
