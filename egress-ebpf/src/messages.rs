//! Where messages of DNS are read.
//!
//! A message is copied to a slot of the processor's own, in the `SCRATCH` map, and read there, in functions that are verified once.
//! Where programs can be preempted, another may come in between: each has a slot to itself as long as it reads.

use core::{
    ptr,
    sync::atomic::{Ordering, compiler_fence},
};

use aya_ebpf::{bindings::__sk_buff, btf_maps::PerCpuArray, helpers::generated::bpf_skb_load_bytes, macros::btf_map};
use egress_common::{Bytes, EndOfName, Message, NameKey, Question, end_of_name};

use crate::{atomic, names};

/// Bytes of a message and of the length before it, a power of two.
pub(crate) const ROOM: u32 = 4096;
/// Bytes of the length, which messages in datagrams leave unused.
const PREFIX: u32 = 2;
/// The longest field that is read at a time, and then some.
const SLACK: u32 = 24;

#[repr(C, align(8))]
struct Scratch {
    /// How many have the slot, or are about to see that another has.
    users: u64,
    /// What is asked.
    key: NameKey,
    reserved: u32,
    bytes: [u8; (ROOM + SLACK) as usize],
}

/// As many as may read at the same time on one processor.
const SLOTS: u32 = 4;

#[btf_map]
static SCRATCH: PerCpuArray<Scratch, { SLOTS as usize }> = PerCpuArray::new();

/// All slots are taken.
pub(crate) const NO_SLOT: u32 = 99;

/// Takes a slot, which is to be given back by [`give_back`]; [`NO_SLOT`] if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn take_slot() -> u32 {
    for slot in 0..SLOTS {
        let Some(scratch) = SCRATCH.get_ptr_mut(slot) else { return NO_SLOT };
        // SAFETY: a pointer to this processor's element, which outlives the program.
        let users = unsafe { &raw mut (*scratch).users };
        atomic::add(users, 1);
        // Whoever sees itself alone here had added itself before anybody else looks: one at most.
        // SAFETY: as above.
        if unsafe { ptr::read_volatile(users) } == 1 {
            compiler_fence(Ordering::SeqCst);
            return slot;
        }
        atomic::add(users, u64::MAX);
    }
    NO_SLOT
}

/// Gives a slot back.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn give_back(slot: u32) -> u32 {
    compiler_fence(Ordering::SeqCst);
    if let Some(scratch) = SCRATCH.get_ptr_mut(slot) {
        // SAFETY: as in `take_slot`.
        atomic::add(unsafe { &raw mut (*scratch).users }, u64::MAX);
    }
    0
}

/// A message in a slot of [`SCRATCH`].
pub(crate) struct Scratched {
    scratch: *mut Scratch,
    slot: u32,
    length: u32,
}

impl Scratched {
    #[inline(always)]
    pub(crate) fn of(slot: u32, length: u32) -> Option<Self> {
        Some(Self { scratch: SCRATCH.get_ptr_mut(slot)?, slot, length })
    }

    /// What is asked.
    #[inline(always)]
    pub(crate) fn key(&self) -> &NameKey {
        // SAFETY: of this processor's element, which outlives the program, and whose slot is the caller's.
        unsafe { &(*self.scratch).key }
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
        EndOfName::from_number(find_end_of_name(self.slot, offset, self.length))
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn find_end_of_name(slot: u32, offset: u32, length: u32) -> u32 {
    let Some(message) = Scratched::of(slot, length) else { return 0 };
    end_of_name(&message, offset).number()
}

/// Where a message and the two bytes of its length before it are to be copied to.
#[inline(always)]
pub(crate) fn place(slot: u32) -> Option<*mut u64> {
    // SAFETY: a pointer to this processor's element, which outlives the program.
    Some(unsafe { (&raw mut (*SCRATCH.get_ptr_mut(slot)?).bytes).cast() })
}

/// Copies a message of 1 to [`egress_common::LONGEST_MESSAGE`] bytes of a packet; 0 if that went well.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn load_message(skb: *mut __sk_buff, at: u32, length: u32, slot: u32) -> u32 {
    let Some(place) = place(slot) else { return 1 };
    // Whatever the caller says, the verifier sees that it fits.
    let length = (length.wrapping_sub(1) & (ROOM - 1)) + 1;
    // SAFETY: `ROOM` bytes after the prefix are the slot's own.
    unsafe {
        let to = place.cast::<u8>().add(PREFIX as usize);
        u32::from(bpf_skb_load_bytes(skb.cast(), at, to.cast(), length) != 0)
    }
}

/// Writes what is asked as the key of a message; `false` if it is no name of a host.
#[inline(always)]
pub(crate) fn write_key(message: &Scratched, question: Question) -> bool {
    let write = |index, ends| {
        let ends = write_byte(message.slot, message.length, question.name, index, ends);
        (ends != 0).then_some(ends)
    };
    if !question.write_key_by(write) {
        return false;
    }
    // SAFETY: a pointer to this processor's element, which outlives the program.
    unsafe { (*message.scratch).key.end(question.name) };
    true
}

/// [`NameKey::write_byte`]; 0 if there is no such byte in a name of a host.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn write_byte(slot: u32, length: u32, name: u32, index: u32, label_ends: u32) -> u32 {
    let Some(message) = Scratched::of(slot, length) else { return 0 };
    // SAFETY: a pointer to this processor's element, which outlives the program.
    let key = unsafe { &mut (*message.scratch).key };
    key.write_byte(&message, name, index, label_ends).unwrap_or(0)
}

/// The closest name or pattern that policies know, to the key of a message; 0 if there is none.
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn known_name(slot: u32) -> u32 {
    let Some(message) = Scratched::of(slot, 0) else { return 0 };
    match names::id(message.key()) {
        Some(name) => name.number(),
        None => 0,
    }
}
