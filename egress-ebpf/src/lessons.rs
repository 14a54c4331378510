//! Learns from answers of DNS.

use core::ptr;

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_load_bytes};
use egress_common::{Arrived, Bytes, Checksum, LONGEST_MESSAGE, Lesson, MOST_AT_ONCE, NameId, Record, Response};

use crate::{
    asked,
    messages::{self, NO_SLOT, ROOM, Scratched, give_back, known_name, load_message, take_slot},
    names,
    packet::Skb,
    stats::answered,
};

/// As many records as fit a message: the shortest has 11 bytes.
const MOST_RECORDS: u32 = 400;
/// Pieces that one segment is taken in. Two for each message, and a resolver gathers few.
const MOST_PIECES: u32 = 64;

/// Learns from a datagram that a resolver sent to a workload.
#[inline(always)]
pub(crate) fn hear_datagram(skb: Skb, arrived: &Arrived, workload: u64) {
    let Some(header) = skb.load::<8>(arrived.transport) else { return answered(Lesson::Malformed) };
    let [.., high, low, _, _] = header;
    let length = u32::from(u16::from_be_bytes([high, low])).wrapping_sub(8);
    if length > u32::from(u16::MAX) {
        return answered(Lesson::Malformed);
    }
    if length > LONGEST_MESSAGE {
        return answered(Lesson::TooLong);
    }
    let slot = take_slot();
    if slot == NO_SLOT {
        return answered(Lesson::Interrupted);
    }
    let sum = arrived.sum.number();
    if load_message(skb.0, arrived.transport + 8, length, slot) != 0 {
        answered(Lesson::Malformed);
    } else if is_summed(slot, u64::from_ne_bytes(header), length, sum) == 0 {
        answered(Lesson::Checksum);
    } else {
        learn(slot, length, workload);
    }
    give_back(slot);
}

/// Whether the checksum of a datagram is right: 1, else 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_summed(slot: u32, header: u64, length: u32, sum: u64) -> u32 {
    let Some(message) = Scratched::of(slot, length) else { return 0 };
    Checksum::from_number(sum).is_right(header.to_ne_bytes(), &message, length).into()
}

/// Learns from a segment that a resolver sent. `false` if it is to be dropped.
#[inline(always)]
pub(crate) fn hear_segment(skb: Skb, arrived: &Arrived, workload: u64) -> bool {
    receive_segment(skb.0, arrived.transport, workload) != HELD_BACK
}

/// The segment is to be dropped. No number that the compiler could take for the answer itself, of which the verifier would know
/// nothing.
const HELD_BACK: u32 = 53;
/// As above.
const NOT_COPIED: u32 = 54;

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn receive_segment(skb: *mut __sk_buff, transport: u32, workload: u64) -> u32 {
    use egress_common::Arrival::{Early, Lost, Next, Old};
    const SYN: u8 = 2;
    const PASS: u32 = 0;
    let packet = Skb(skb);
    let Some(sequence) = packet.load::<4>(transport + 4) else { return PASS };
    let Some([offset, flags]) = packet.load::<2>(transport + 12) else { return PASS };
    let data = transport + u32::from(offset >> 4) * 4;
    let length = packet.len().saturating_sub(data);
    let Some(stream) = asked::stream(skb) else { return PASS };
    let known = match stream.arrive(u32::from_be_bytes(sequence), flags & SYN != 0, length) {
        Next(known) => known,
        Early => return HELD_BACK,
        Lost => {
            answered(Lesson::Lost);
            return PASS;
        }
        Old => return PASS,
    };
    let (mut at, mut left) = (data + known, length - known);
    for _ in 0..MOST_PIECES {
        if left == 0 {
            return PASS;
        }
        let taken = take_piece(skb, at, left, workload);
        if taken == 0 || taken > left {
            break;
        }
        at += taken;
        left -= taken;
    }
    if left > 0
        && let Some(stream) = asked::stream(skb)
    {
        stream.lose();
        answered(Lesson::Lost);
    }
    PASS
}

/// Takes some of `left` bytes, and learns from the message that ends with them; tells how many, or 0 if that failed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_piece(skb: *mut __sk_buff, at: u32, left: u32, workload: u64) -> u32 {
    let Some(stream) = asked::stream(skb) else { return 0 };
    let step = stream.step(left);
    let is_copied = match step.to {
        Some(to) => copy_in(skb, at, to, step.count) == 0,
        None => true,
    };
    if !is_copied {
        return 0;
    }
    match stream.took(step.count) {
        Some(length) if length > LONGEST_MESSAGE => answered(Lesson::TooLong),
        Some(length) => {
            let slot = take_slot();
            if slot == NO_SLOT {
                answered(Lesson::Interrupted);
            } else {
                if copy_out(skb, slot) == 0 {
                    learn(slot, length, workload);
                }
                give_back(slot);
            }
        }
        None => {}
    }
    step.count
}

/// Copies 1 to [`MOST_AT_ONCE`] bytes of a packet to a place of its stream; 0 if that went well.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn copy_in(skb: *mut __sk_buff, at: u32, to: u32, count: u32) -> u32 {
    let Some(stream) = asked::stream(skb) else { return 1 };
    // Whatever the caller says, the verifier sees that it fits.
    let count = (count.wrapping_sub(1) & (MOST_AT_ONCE - 1)) + 1;
    let to = (to & (ROOM - 1)) as usize;
    // SAFETY: below `ROOM` there begin at least `MOST_AT_ONCE` bytes of the stream's own.
    unsafe {
        let to = stream.bytes_mut().as_mut_ptr().add(to);
        u32::from(bpf_skb_load_bytes(skb.cast(), at, to.cast(), count) != 0)
    }
}

/// Copies the message of a stream to where it is read; 0 if that went well.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_ptr_alignment, reason = "it is aligned to eight bytes")]
extern "C" fn copy_out(skb: *mut __sk_buff, slot: u32) -> u32 {
    let Some(stream) = asked::stream(skb) else { return NOT_COPIED };
    let Some(to) = messages::place(slot) else { return NOT_COPIED };
    let from = stream.bytes_mut().as_ptr().cast::<u64>();
    // SAFETY: both have `ROOM` bytes, and begin where numbers of eight bytes may: the storage of sockets, and this
    // processor's element. Both outlive the program.
    unsafe {
        for index in 0..(ROOM / 8) as usize {
            ptr::write_volatile(to.add(index), ptr::read_volatile(from.add(index)));
        }
    }
    0
}

/// Learns every address that a message gives for what was asked.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the number is taken apart as it was put together")]
extern "C" fn learn(slot: u32, length: u32, workload: u64) -> u32 {
    let question = read_question(slot, length);
    let (mut answers, mut at) = ((question >> 32) as u32, question as u32);
    let name = if answers == 0 { 0 } else { known_name(slot) };
    for _ in 0..MOST_RECORDS {
        if answers == 0 {
            return 0;
        }
        at = learn_record(slot, at, length, name, workload);
        if at == 0 {
            return 0;
        }
        answers -= 1;
    }
    0
}

/// Reads what was asked: the number of records, and where they begin. No records where there is nothing to learn.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn read_question(slot: u32, length: u32) -> u64 {
    let Some(message) = Scratched::of(slot, length) else { return 0 };
    let Some(response) = Response::read(&message) else {
        let is_error = message.load::<1>(3).is_some_and(|[codes]| codes & 0x0f != 0);
        if !is_error {
            answered(Lesson::Malformed);
        }
        return 0;
    };
    if !messages::write_key(&message, response.question) {
        return 0;
    }
    u64::from(response.answers) << 32 | u64::from(response.question.end())
}

/// Learns the address of one record, for a name that policies know if that is not 0; tells where the next begins, or 0 if nothing more is to be learnt.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn learn_record(slot: u32, at: u32, length: u32, name: u32, workload: u64) -> u32 {
    let Some(message) = Scratched::of(slot, length) else { return 0 };
    let Some(record) = Record::read(&message, at) else {
        answered(Lesson::Malformed);
        return 0;
    };
    let Some(address) = record.address else { return record.next };
    if let Some(name) = NameId::new(name) {
        names::learn(workload, address, name, record.ttl);
    }
    names::tell(workload, address, message.key());
    record.next
}
