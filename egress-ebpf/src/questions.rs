//! Judges questions to servers of DNS.
//!
//! What cannot be read as one question for a name is judged as one for a name that nobody knows. Each step is verified once, as a
//! function of its own: inline, its branches would be verified for every message of a segment.

use aya_ebpf::{bindings::__sk_buff, programs::SkBuffContext};
use egress_common::{
    Bytes as _, DNS_PORT, Decision, Flow, Framed, LONGEST_MESSAGE, NameId, Place, Question, Reason, Sent, Verdict,
    decide_query, framed, sent_v4, sent_v6,
};

use crate::{
    events,
    messages::{self, NO_SLOT, Scratched, give_back, known_name, load_message, take_slot},
    packet::{IPV4, IPV6, Skb},
    rules::Maps,
};

/// Bytes of the header of UDP.
const UDP_HEADER: u32 = 8;
/// Most messages in one segment.
const MOST_MESSAGES: u32 = 64;

// Answers of the functions here. None is 0 or 1, which the compiler could take for all that a function returns.
/// It may pass.
pub(crate) const PASSES: u32 = 11;
/// It is refused, as no policy knows the name.
const REFUSED: u32 = 12;
/// It passes, and would be refused if an Audit policy enforced.
const REPORTED: u32 = 13;
/// It is refused, as it is not known whose rules apply.
const UNPLACED: u32 = 14;
/// It is refused, as it could not be judged.
const FAULT: u32 = 15;
/// It is a part of a message that is not all there.
pub(crate) const PART: u32 = 16;

/// Whether a packet may go on its way; [`PART`] is for the caller to judge.
pub(crate) const fn passes(answer: u32) -> bool {
    matches!(answer, PASSES | REPORTED)
}

/// Reads the headers of a packet.
#[inline(always)]
pub(crate) fn sent(packet: Skb) -> Option<Sent> {
    match packet.protocol() {
        IPV4 => sent_v4(&packet),
        IPV6 => sent_v6(&packet),
        _ => None,
    }
}

/// Where a packet of TCP or UDP goes: its port, which a part of a packet has not, or which does not help to read it.
#[inline(always)]
pub(crate) fn port(packet: Skb, sent: &Sent) -> Option<u16> {
    if sent.is_part { Some(DNS_PORT) } else { packet.load(sent.transport + 2).map(u16::from_be_bytes) }
}

/// Judges what cannot be read.
#[inline(always)]
pub(crate) fn judge_unreadable(skb: *mut __sk_buff, place: u32) -> u32 {
    report(skb, judge_question(place, 0), NO_SLOT)
}

/// Judges a datagram.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge_datagram(skb: *mut __sk_buff, transport: u32, place: u32) -> u32 {
    let packet = Skb(skb);
    let (at, end) = (transport + UDP_HEADER, packet.len());
    let length = match packet.load::<2>(transport + 4) {
        Some(length) => u32::from(u16::from_be_bytes(length)).wrapping_sub(UDP_HEADER),
        None => 0,
    };
    let is_whole = length.wrapping_sub(1) < LONGEST_MESSAGE && at + length == end;
    // Of several that are cut apart only later (`UDP_SEGMENT`), only the first would be read; and what is not the kernel's own
    // copy may change afterwards (`MSG_ZEROCOPY`, `sendfile`).
    if is_whole && !packet.is_cut_later() && packet.has_copy_up_to(end) {
        judge_message(skb, at, length, place)
    } else {
        judge_unreadable(skb, place)
    }
}

/// Judges a segment; [`PART`] if it ends within a message.
///
/// Each has to hold whole messages, so that each is judged by itself, also when it is sent again. The kernel keeps what is
/// not sent, and tries again when there is more: a message that is written in pieces leaves in one.
///
/// That a message begins where a segment does holds as long as everything before was judged, too: `is_whole` is not 0 if it was.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn judge_segment(skb: *mut __sk_buff, transport: u32, place: u32, is_whole: u32) -> u32 {
    const URG: u8 = 0x20;
    let packet = Skb(skb);
    let Some([offset, flags]) = packet.load::<2>(transport + 12) else { return FAULT };
    let (mut at, end) = (transport + u32::from(offset >> 4) * 4, packet.len());
    if at >= end {
        return PASSES;
    }
    // A byte that is urgent is read apart from the others, which then say something else.
    if is_whole == 0 || flags & URG != 0 {
        return judge_unreadable(skb, place);
    }
    let mut answer = PASSES;
    for _ in 0..MOST_MESSAGES {
        match framed(&packet, at, end - at) {
            Framed::Whole(length) if length > 0 => {
                match judge_message(skb, at + 2, length, place) {
                    PASSES => {}
                    REPORTED => answer = REPORTED,
                    refused => return refused,
                }
                at += 2 + length;
            }
            Framed::Part => return PART,
            Framed::Whole(_) | Framed::TooLong => break,
        }
        if at >= end {
            return answer;
        }
    }
    judge_unreadable(skb, place)
}

/// Judges a message of 1 to [`LONGEST_MESSAGE`] bytes.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "numbers of names have 32 bits")]
extern "C" fn judge_message(skb: *mut __sk_buff, at: u32, length: u32, place: u32) -> u32 {
    let slot = take_slot();
    if slot == NO_SLOT {
        return report(skb, FAULT, NO_SLOT);
    }
    let answer = match asked_name(skb, at, length, slot) {
        UNREADABLE => judge_unreadable(skb, place),
        name => report(skb, judge_question(place, name as u32), slot),
    };
    give_back(slot);
    answer
}

/// What cannot be read asks for no name: above all numbers of names.
const UNREADABLE: u64 = 1 << 32;

/// Reads what a message asks for: the number of the closest name or pattern that policies know, or 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn asked_name(skb: *mut __sk_buff, at: u32, length: u32, slot: u32) -> u64 {
    if load_message(skb, at, length, slot) != 0 {
        return UNREADABLE;
    }
    let Some(message) = Scratched::of(slot, length) else { return UNREADABLE };
    match Question::of_query(&message) {
        Some(question) if messages::write_key(&message, question) => known_name(slot).into(),
        _ => UNREADABLE,
    }
}

/// [`decide_query`], for a name that policies know if that is not 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn judge_question(place: u32, name: u32) -> u32 {
    let decision = decide_query(&Maps::WITHOUT_SOCKET, Place::unpack(place), NameId::new(name));
    match (decision.verdict, decision.reason) {
        (Verdict::Allow, _) => PASSES,
        (Verdict::WouldDeny, _) => REPORTED,
        (Verdict::Deny, Reason::DnsQuery) => REFUSED,
        (Verdict::Deny, Reason::UnknownWorkload) => UNPLACED,
        (Verdict::Deny, _) => FAULT,
    }
}

/// Reports what was answered to the message in a slot, or to what cannot be read; tells the same again.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn report(skb: *mut __sk_buff, answer: u32, slot: u32) -> u32 {
    let decision = match answer {
        PASSES => Decision::new(Verdict::Allow, Reason::NoRule),
        REFUSED => Decision::new(Verdict::Deny, Reason::DnsQuery),
        REPORTED => Decision::new(Verdict::WouldDeny, Reason::DnsQuery),
        UNPLACED => Decision::UNKNOWN_WORKLOAD,
        _ => Decision::FAULT,
    };
    let packet = Skb(skb);
    if let Some(sent) = sent(packet)
        && let Some(port) = port(packet, &sent)
    {
        // Whose rules applied is no part of a report, and the compiler passes nothing on that is not read.
        let flow = Flow { place: Place::Unknown, protocol: sent.protocol, address: sent.destination, port };
        let name = match Scratched::of(slot, 0) {
            Some(message) => &raw const *message.key(),
            None => core::ptr::null(),
        };
        events::record_question(&SkBuffContext::new(skb), &flow, &decision, name);
    }
    answer
}
