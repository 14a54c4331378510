//! Messages of DNS in a stream of TCP (RFC 1035, 4.2.2): two bytes of length before each.
//!
//! A segment is looked at before the kernel knows whether it is in order. What comes too early is held back, that is, dropped,
//! and its sender sends it again; what comes twice is read once.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::Bytes;

/// Bytes of the longest message that is looked at.
pub const LONGEST_MESSAGE: u32 = 4094;
/// Bytes of the length before a message.
const PREFIX: u32 = 2;
/// Most bytes that are taken from a segment at a time.
pub const MOST_AT_ONCE: u32 = 2048;
/// Bytes of a message and of what is before it, a power of two.
const ROOM: usize = 4096;
/// Segments in a row that may be held back.
const MOST_HELD_BACK: u32 = 64;

/// Waits for the first packet of the other side.
const OPENING: u32 = 0;
/// What comes next is known.
const OPEN: u32 = 1;
/// Nothing more is learnt from it.
const LOST: u32 = 2;

/// What is known of the stream that one socket receives. All zeros is one that is being opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C, align(8))]
pub struct Stream {
    /// The sequence number of the next byte.
    next: u32,
    phase: u32,
    /// Bytes of the message that were taken, its length included.
    have: u32,
    /// Bytes that it has altogether; of no meaning before its length is known.
    want: u32,
    held_back: u32,
    reserved: u32,
    bytes: [u8; ROOM + MOST_AT_ONCE as usize],
}

// See `Peers`.
const _: () = assert!(size_of::<Stream>() == 6168);

/// What is done with a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// It has nothing new.
    Old,
    /// So many bytes of it are known already; the others come next.
    Next(u32),
    /// Something is missing before it: it is dropped.
    Early,
    /// Too much was missing, too often.
    Lost,
}

/// What is done with the next bytes of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// So many.
    pub count: u32,
    /// They are copied to this place of the stream's own bytes, if at all.
    pub to: Option<u32>,
}

impl Stream {
    /// As if it were new: the socket is about to be connected.
    #[inline(always)]
    pub const fn reset(&mut self) {
        (self.phase, self.have, self.held_back) = (OPENING, 0, 0);
    }

    /// Looks where a segment of `length` bytes lies that begins at `sequence`. `opens` is that of the first, with its flag `SYN`.
    #[inline(always)]
    pub fn arrive(&mut self, sequence: u32, opens: bool, length: u32) -> Arrival {
        let mut sequence = sequence;
        if opens {
            sequence = sequence.wrapping_add(1);
            if self.phase == OPENING {
                self.phase = OPEN;
                self.next = sequence;
            }
        }
        if self.phase != OPEN || length == 0 {
            return Arrival::Old;
        }
        let known = self.next.wrapping_sub(sequence);
        if known >> 31 != 0 {
            self.held_back += 1;
            if self.held_back > MOST_HELD_BACK {
                self.phase = LOST;
                return Arrival::Lost;
            }
            return Arrival::Early;
        }
        self.held_back = 0;
        if known >= length {
            return Arrival::Old;
        }
        self.next = sequence.wrapping_add(length);
        Arrival::Next(known)
    }

    /// What is done with the next of `available` bytes, at least one.
    #[inline(always)]
    pub const fn step(&self, available: u32) -> Step {
        if self.have < PREFIX {
            let missing = PREFIX - self.have;
            let count = if available < missing { available } else { missing };
            return Step { count, to: Some(self.have) };
        }
        let missing = self.want - self.have;
        let count = if available < missing { available } else { missing };
        if self.want > PREFIX + LONGEST_MESSAGE {
            return Step { count, to: None };
        }
        let count = if count < MOST_AT_ONCE { count } else { MOST_AT_ONCE };
        Step { count, to: Some(self.have) }
    }

    /// After `count` bytes were taken: the length of the message if that was its end.
    #[inline(always)]
    pub fn took(&mut self, count: u32) -> Option<u32> {
        self.have += count;
        if self.have < PREFIX {
            return None;
        }
        if self.have == PREFIX && count > 0 {
            let [high, low, ..] = self.bytes;
            self.want = PREFIX + u32::from(u16::from_be_bytes([high, low]));
        }
        if self.have < self.want {
            return None;
        }
        self.have = 0;
        Some(self.want - PREFIX)
    }

    /// Nothing more is learnt from it.
    #[inline(always)]
    pub fn lose(&mut self) {
        self.phase = LOST;
    }

    /// Its bytes: the last message with its length before it, after [`Stream::took`] told of its end.
    #[inline(always)]
    pub const fn bytes_mut(&mut self) -> &mut [u8; ROOM + MOST_AT_ONCE as usize] {
        &mut self.bytes
    }
}

/// What some bytes of a stream begin with, where messages are looked at only as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framed {
    /// A message of so many bytes, after the two of its length.
    Whole(u32),
    /// A part of one, of which more may follow.
    Part,
    /// One that is longer than is looked at.
    TooLong,
}

/// Looks at the first of `left` bytes that begin at `at`.
#[inline(always)]
pub fn framed<B: Bytes>(bytes: &B, at: u32, left: u32) -> Framed {
    let Some(length) = bytes.load::<2>(at) else { return Framed::Part };
    let length = u32::from(u16::from_be_bytes(length));
    if length > LONGEST_MESSAGE {
        Framed::TooLong
    } else if left < PREFIX + length {
        Framed::Part
    } else {
        Framed::Whole(length)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{vec, vec::Vec};

    use proptest::prelude::*;
    use zerocopy::FromZeros as _;

    use super::*;

    /// Every message of some bytes that come next; `None` for one that is too long.
    fn take(stream: &mut Stream, mut bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
        let mut messages = vec![];
        while !bytes.is_empty() {
            let Step { count, to } = stream.step(u32::try_from(bytes.len()).unwrap());
            assert!(count > 0 && count <= u32::try_from(bytes.len()).unwrap());
            let (taken, rest) = bytes.split_at(count as usize);
            if let Some(to) = to {
                assert!((to as usize) < ROOM && count <= MOST_AT_ONCE);
                stream.bytes_mut()[to as usize..][..taken.len()].copy_from_slice(taken);
            }
            bytes = rest;
            if let Some(length) = stream.took(count) {
                let message = (length <= LONGEST_MESSAGE).then(|| stream.bytes_mut()[2..][..length as usize].to_vec());
                messages.push(message);
            }
        }
        messages
    }

    fn framed_bytes(messages: &[Vec<u8>]) -> Vec<u8> {
        messages.iter().flat_map(|m| [&u16::try_from(m.len()).unwrap().to_be_bytes()[..], m].concat()).collect()
    }

    fn opened(sequence: u32) -> Stream {
        let mut stream = Stream::new_zeroed();
        assert_eq!(stream.arrive(sequence.wrapping_sub(1), true, 0), Arrival::Old);
        stream
    }

    #[test]
    fn what_begins_before_it_was_opened_is_let_be() {
        let mut stream = Stream::new_zeroed();
        assert_eq!(stream.arrive(5, false, 9), Arrival::Old);
        let mut stream = opened(100);
        assert_eq!(stream.arrive(100, false, 9), Arrival::Next(0));
        // Somebody who guesses that it is about to be opened comes too late.
        assert_eq!(stream.arrive(7000, true, 0), Arrival::Old);
        assert_eq!(stream.arrive(109, false, 1), Arrival::Next(0));
    }

    struct Sent(Vec<u8>);

    impl Bytes for Sent {
        fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            self.0.get(offset as usize..)?.first_chunk().copied()
        }
    }

    #[test]
    fn a_message_is_whole_only_when_its_last_byte_is_there() {
        for length in [0, 1, 40, 4094] {
            let bytes = Sent([&[7, 7, 7][..], &framed_bytes(&[vec![9; length]])].concat());
            let all = u32::try_from(length).unwrap() + PREFIX;
            assert_eq!(framed(&bytes, 3, all), Framed::Whole(all - PREFIX));
            assert_eq!(framed(&bytes, 3, all + 1), Framed::Whole(all - PREFIX));
            assert_eq!(framed(&bytes, 3, all - 1), Framed::Part);
        }
        assert_eq!(framed(&Sent(vec![0]), 0, 1), Framed::Part);
        assert_eq!(framed(&Sent(vec![0x0f, 0xff]), 0, 2), Framed::TooLong);
    }

    #[test]
    fn data_may_come_with_the_first_segment() {
        let mut stream = Stream::new_zeroed();
        assert_eq!(stream.arrive(u32::MAX, true, 4), Arrival::Next(0));
        assert_eq!(stream.arrive(4, false, 1), Arrival::Next(0));
    }

    #[test]
    fn a_stream_with_a_gap_that_stays_is_given_up() {
        let mut stream = opened(0);
        for _ in 0..MOST_HELD_BACK {
            assert_eq!(stream.arrive(10, false, 1), Arrival::Early);
        }
        assert_eq!(stream.arrive(10, false, 1), Arrival::Lost);
        assert_eq!(stream.arrive(0, false, 1), Arrival::Old);
    }

    proptest! {
        /// Whatever the segments, doubled, overlapping, out of order: every message is read once, in order.
        #[test]
        fn messages_are_read_however_they_are_cut(
            messages in prop::collection::vec(prop_oneof![0..40_usize, 4000..4200_usize, Just(65_535)], 1..6),
            cuts in prop::collection::vec((0..9000_usize, 1..3000_usize), 0..40),
            start: u32,
        ) {
            let messages: Vec<Vec<u8>> = messages.iter().enumerate().map(|(i, &length)| {
                (0..length).map(|j| u8::try_from((i * 7 + j) % 251).unwrap()).collect()
            }).collect();
            let bytes = framed_bytes(&messages);
            let (mut stream, mut heard, mut reached) = (opened(start), vec![], 0);
            let mut send = |from: usize, to: usize, reached: &mut usize| {
                let sequence = start.wrapping_add(u32::try_from(from).unwrap());
                match stream.arrive(sequence, false, u32::try_from(to - from).unwrap()) {
                    Arrival::Next(known) => {
                        assert_eq!(from + known as usize, *reached);
                        heard.extend(take(&mut stream, &bytes[from + known as usize..to]));
                        *reached = to;
                    }
                    Arrival::Early => assert!(from > *reached),
                    Arrival::Old => assert!(to <= *reached),
                    Arrival::Lost => panic!("lost"),
                }
            };
            for (from, length) in cuts {
                let from = from.min(bytes.len() - 1);
                send(from, (from + length).min(bytes.len()), &mut reached);
            }
            while reached < bytes.len() {
                let (from, to) = (reached, (reached + 1400).min(bytes.len()));
                send(from, to, &mut reached);
            }
            let expected: Vec<Option<Vec<u8>>> =
                messages.into_iter().map(|m| (m.len() <= LONGEST_MESSAGE as usize).then_some(m)).collect();
            prop_assert_eq!(heard, expected);
        }
    }
}
