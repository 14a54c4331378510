//! Reads messages of DNS and learns from them.
//!
//! A message is copied to a place of the processor's own, the `SCRATCH` map, and read there, in functions that are verified
//! once. Where programs can be preempted, another may come in between and take the place: each message has a token of its own,
//! and nothing is learnt from a place that has another's.

use core::ptr;

use aya_ebpf::{
    bindings::__sk_buff,
    btf_maps::PerCpuArray,
    helpers::generated::{bpf_get_prandom_u32, bpf_skb_load_bytes},
    macros::btf_map,
};
use egress_common::{
    Arrived, Bytes, Checksum, Counter, EndOfName, LONGEST_MESSAGE, Lesson, MOST_AT_ONCE, Message, NameId, NameKey,
    Record, Response, end_of_name,
};

use crate::{asked, names, packet::Skb, stats};

/// Bytes of a message and of the length before it, a power of two.
const ROOM: u32 = 4096;
/// Bytes of the length, which messages in datagrams leave unused.
const PREFIX: u32 = 2;
/// The longest field that is read at a time, and then some.
const SLACK: u32 = 24;
/// As many records as fit a message: the shortest has 11 bytes.
const MOST_RECORDS: u32 = 400;
/// Pieces that one segment is taken in. Two for each message, and a resolver gathers few.
const MOST_PIECES: u32 = 64;

#[repr(C, align(8))]
struct Scratch {
    /// The token of the message.
    owner: u64,
    /// What was asked.
    key: NameKey,
    reserved: u32,
    bytes: [u8; (ROOM + SLACK) as usize],
}

#[btf_map]
static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// A message in [`SCRATCH`].
struct Scratched {
    scratch: *mut Scratch,
    length: u32,
}

impl Scratched {
    #[inline(always)]
    fn of(length: u32) -> Option<Self> {
        Some(Self { scratch: SCRATCH.get_ptr_mut(0)?, length })
    }

    #[inline(always)]
    fn is_of(&self, token: u64) -> bool {
        // SAFETY: a pointer to this processor's element, which outlives the program.
        unsafe { ptr::read_volatile(&raw const (*self.scratch).owner) == token }
    }
}

impl Bytes for Scratched {
    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        #[expect(clippy::cast_possible_truncation, reason = "fields are short")]
        let end = offset
            + const {
                assert!(N <= SLACK as usize);
                N as u32
            };
        if end > self.length {
            return None;
        }
        let at = ((offset + PREFIX) & (ROOM - 1)) as usize;
        // SAFETY: a pointer to this processor's element, which outlives the program; `at` is below `ROOM`, and there are
        // `SLACK` bytes behind that.
        Some(unsafe { ptr::read((&raw const (*self.scratch).bytes).cast::<u8>().add(at).cast::<[u8; N]>()) })
    }
}

impl Message for Scratched {
    #[inline(always)]
    fn end_of_name(&self, offset: u32) -> EndOfName {
        EndOfName::from_number(find_end_of_name(offset, self.length))
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_end_of_name(offset: u32, length: u32) -> u32 {
    let Some(message) = Scratched::of(length) else { return 0 };
    end_of_name(&message, offset).number()
}

#[inline(always)]
fn ignore(lesson: Lesson) {
    stats::add(Counter::Answered(lesson));
}

#[inline(always)]
fn token() -> u64 {
    // SAFETY: the helper takes no arguments and only returns a number.
    let random = || u64::from(unsafe { bpf_get_prandom_u32() });
    random() << 32 | random()
}

/// Learns from a datagram that a resolver sent to a workload.
#[inline(always)]
pub(crate) fn hear_datagram(skb: Skb, arrived: &Arrived, workload: u64) {
    let Some(header) = skb.load::<8>(arrived.transport) else { return ignore(Lesson::Malformed) };
    let [.., high, low, _, _] = header;
    let length = u32::from(u16::from_be_bytes([high, low])).wrapping_sub(8);
    if length > u32::from(u16::MAX) {
        return ignore(Lesson::Malformed);
    }
    if length > LONGEST_MESSAGE {
        return ignore(Lesson::TooLong);
    }
    let token = token();
    if load_datagram(skb.0, arrived.transport + 8, length, token) != 0 {
        return ignore(Lesson::Malformed);
    }
    let sum = arrived.sum.number();
    if is_summed(u64::from_ne_bytes(header), length, sum) == 0 {
        return ignore(Lesson::Checksum);
    }
    learn(length, workload, token);
}

/// Copies a message of 1 to [`LONGEST_MESSAGE`] bytes; 0 if that went well.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn load_datagram(skb: *mut __sk_buff, at: u32, length: u32, token: u64) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 1 };
    // Whatever the caller says, the verifier sees that it fits.
    let length = (length.wrapping_sub(1) & (ROOM - 1)) + 1;
    // SAFETY: a pointer to this processor's element, which outlives the program; `ROOM` bytes after the prefix are its own.
    unsafe {
        ptr::write_volatile(&raw mut (*scratch).owner, token);
        let to = (&raw mut (*scratch).bytes).cast::<u8>().add(PREFIX as usize);
        u32::from(bpf_skb_load_bytes(skb.cast(), at, to.cast(), length) != 0)
    }
}

/// Whether the checksum of a datagram is right: 1, else 0.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_summed(header: u64, length: u32, sum: u64) -> u32 {
    let Some(message) = Scratched::of(length) else { return 0 };
    Checksum::from_number(sum).is_right(header.to_ne_bytes(), &message, length).into()
}

/// Learns from a segment that a resolver sent. `false` if it is to be dropped.
#[inline(always)]
pub(crate) fn hear_segment(skb: Skb, arrived: &Arrived) -> bool {
    receive_segment(skb.0, arrived.transport) != HELD_BACK
}

/// The segment is to be dropped. No number that the compiler could take for the answer itself, of which the verifier would know
/// nothing.
const HELD_BACK: u32 = 53;

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn receive_segment(skb: *mut __sk_buff, transport: u32) -> u32 {
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
            ignore(Lesson::Lost);
            return PASS;
        }
        Old => return PASS,
    };
    let (mut at, mut left) = (data + known, length - known);
    for _ in 0..MOST_PIECES {
        if left == 0 {
            return PASS;
        }
        let taken = take_piece(skb, at, left);
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
        ignore(Lesson::Lost);
    }
    PASS
}

/// Takes some of `left` bytes, and learns from the message that ends with them; tells how many, or 0 if that failed.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn take_piece(skb: *mut __sk_buff, at: u32, left: u32) -> u32 {
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
        Some(length) if length > LONGEST_MESSAGE => ignore(Lesson::TooLong),
        Some(length) => {
            let token = token();
            let workload = copy_out(skb, token);
            learn(length, workload, token);
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

/// Copies the message of a stream to where it is read; tells for whom it is.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_ptr_alignment, reason = "both are aligned to eight bytes")]
extern "C" fn copy_out(skb: *mut __sk_buff, token: u64) -> u64 {
    let Some(stream) = asked::stream(skb) else { return 0 };
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 0 };
    let from = stream.bytes_mut().as_ptr().cast::<u64>();
    // SAFETY: both have `ROOM` bytes, and begin where numbers of eight bytes may: the storage of sockets, and this
    // processor's element. Both outlive the program.
    unsafe {
        ptr::write_volatile(&raw mut (*scratch).owner, token);
        let to = (&raw mut (*scratch).bytes).cast::<u64>();
        for index in 0..(ROOM / 8) as usize {
            ptr::write_volatile(to.add(index), ptr::read_volatile(from.add(index)));
        }
    }
    asked::asker(skb)
}

/// Learns every address that a message gives for what was asked.
#[unsafe(no_mangle)]
#[inline(never)]
#[expect(clippy::cast_possible_truncation, reason = "the number is taken apart as it was put together")]
extern "C" fn learn(length: u32, workload: u64, token: u64) -> u32 {
    let question = read_question(length);
    let (mut answers, mut at) = ((question >> 32) as u32, question as u32);
    let name = if answers == 0 { 0 } else { known_name() };
    for _ in 0..MOST_RECORDS {
        if answers == 0 {
            return 0;
        }
        at = learn_record(at, length, name, workload, token);
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
extern "C" fn read_question(length: u32) -> u64 {
    let Some(message) = Scratched::of(length) else { return 0 };
    let Some(response) = Response::read(&message) else {
        let is_error = message.load::<1>(3).is_some_and(|[codes]| codes & 0x0f != 0);
        if !is_error {
            ignore(Lesson::Malformed);
        }
        return 0;
    };
    let write = |index, ends| {
        let ends = write_byte(length, response.name, index, ends);
        (ends != 0).then_some(ends)
    };
    if !response.write_key_by(write) {
        return 0;
    }
    // SAFETY: a pointer to this processor's element, which outlives the program.
    unsafe { (*message.scratch).key.end(response.name) };
    u64::from(response.answers) << 32 | u64::from(response.records_at())
}

/// [`NameKey::write_byte`]; 0 if there is no such byte in a name of a host.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn write_byte(length: u32, name: u32, index: u32, label_ends: u32) -> u32 {
    let Some(message) = Scratched::of(length) else { return 0 };
    // SAFETY: a pointer to this processor's element, which outlives the program.
    let key = unsafe { &mut (*message.scratch).key };
    key.write_byte(&message, name, index, label_ends).unwrap_or(0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn known_name() -> u32 {
    let Some(scratch) = SCRATCH.get_ptr_mut(0) else { return 0 };
    // SAFETY: a pointer to this processor's element, which outlives the program.
    match names::id(unsafe { &(*scratch).key }) {
        Some(name) => name.number(),
        None => 0,
    }
}

/// Learns the address of one record, for a name that policies know if that is not 0; tells where the next begins, or 0 if nothing more is to be learnt.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn learn_record(at: u32, length: u32, name: u32, workload: u64, token: u64) -> u32 {
    let Some(message) = Scratched::of(length) else { return 0 };
    let Some(record) = Record::read(&message, at) else {
        ignore(Lesson::Malformed);
        return 0;
    };
    // What was read up to here is of this message, or is not believed.
    if !message.is_of(token) {
        ignore(Lesson::Interrupted);
        return 0;
    }
    let Some(address) = record.address else { return record.next };
    if let Some(name) = NameId::new(name) {
        names::learn(workload, address, name, record.ttl);
    }
    // SAFETY: a pointer to this processor's element, which outlives the program.
    names::tell(workload, address, unsafe { &(*message.scratch).key });
    record.next
}
