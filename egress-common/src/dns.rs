//! Messages of DNS (RFC 1035), as far as names are learnt from them, or judged: what is asked, and which addresses are the answer.
//!
//! The question decides: whatever aliases lead from it to an address, the address is an answer for the name that was asked. What
//! is malformed, or longer than anything real, is never learnt from; what stood before it in the same message may have been.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, Bytes};

/// Bytes of the key of a trie of names: as many as the kernel allows (`LPM_DATA_SIZE_MAX` of `kernel/bpf/lpm_trie.c`).
pub const KEY_BYTES: usize = 256;
/// Keeps an index within a key.
const LAST_BYTE: u32 = 255;
/// Labels of a name have a length of one byte and at least one byte: at most so many fit (RFC 1035, 2.3.4).
const MOST_LABELS: u32 = 128;
/// A name has at most so many bytes in a message, its last one included.
const LONGEST_NAME: u32 = 255;
const HEADER: u32 = 12;

/// A name as the key of a longest-prefix match: in lower case, backwards, byte by byte.
///
/// `www.example.com` is `moc.elpmaxe.www` and a zero byte. A pattern for all names below `example.com` is the prefix
/// `moc.elpmaxe.`, so one look-up finds the closest pattern, however deep it lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NameKey {
    /// In bits, host byte order, as `struct bpf_lpm_trie_key` has it.
    length: u32,
    bytes: [u8; KEY_BYTES],
}

impl NameKey {
    /// A key of no name.
    pub const EMPTY: Self = Self { length: 0, bytes: [0; KEY_BYTES] };

    /// The key of a name, or of the names that end with it; `None` if it is none that DNS can ask for by letters, digits, `-` and
    /// `_`.
    pub fn of(name: &str, end: NameEnd) -> Option<Self> {
        let name = name.as_bytes();
        let is_label = |label: &[u8]| (1..=63).contains(&label.len()) && label.iter().all(|&byte| is_of_name(byte));
        if name.len() + 2 > LONGEST_NAME as usize || !name.split(|&byte| byte == b'.').all(is_label) {
            return None;
        }
        let mut key = Self::EMPTY;
        let last = match end {
            NameEnd::Exact => Some(0),
            NameEnd::Below => Some(b'.'),
            NameEnd::Ending => None,
        };
        let backwards = name.iter().rev().map(u8::to_ascii_lowercase).chain(last);
        for (to, from) in key.bytes.iter_mut().zip(backwards) {
            *to = from;
            key.length += 8;
        }
        Some(key)
    }

    /// From its bytes; `None` if they are too many.
    pub fn from_bytes_of_name(name: &[u8]) -> Option<Self> {
        let mut key = Self::EMPTY;
        key.bytes.get_mut(..name.len())?.copy_from_slice(name);
        key.length = u32::try_from(name.len()).ok()? * 8;
        Some(key)
    }

    /// The bytes of the name, last first, without what ends it.
    pub fn backwards(&self) -> &[u8] {
        let name = self.as_bytes_of_name();
        name.strip_suffix(&[0]).unwrap_or(name)
    }

    /// The bytes that count.
    pub fn as_bytes_of_name(&self) -> &[u8] {
        &self.bytes[..(self.length as usize / 8).min(KEY_BYTES)]
    }
}

const _: () = assert!(size_of::<NameKey>() == 4 + KEY_BYTES && LAST_BYTE as usize == KEY_BYTES - 1);

/// Which names a key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameEnd {
    /// This one.
    Exact,
    /// Those below it: `*.example.com`.
    Below,
    /// Those that end with it, be it within a label: `*example.com`.
    Ending,
}

/// The one question of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Bytes of the name that is asked for, its last one included.
    pub name: u32,
}

/// What stands before the records of a response to one question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Response {
    /// What was asked.
    pub question: Question,
    /// Records of the answer section.
    pub answers: u16,
}

impl Response {
    /// Reads the header and looks how long the question's name is. `None` if it is no response, tells of an error, or has not
    /// exactly one question.
    ///
    /// A truncated response counts: what it has is as true as if it were whole.
    #[inline(always)]
    pub fn read<M: Message>(message: &M) -> Option<Self> {
        let [_, _, flags, codes, questions_high, questions, answers @ ..] = message.load::<8>(0)?;
        // `QR`, and `OPCODE` a standard query; `RCODE` no error.
        let is_answer = (flags & 0xf8, codes & 0x0f) == (0x80, 0);
        if !is_answer || questions_high != 0 || questions != 1 {
            return None;
        }
        let question = Question::read(message)?;
        Some(Self { question, answers: u16::from_be_bytes(answers) })
    }
}

impl Question {
    /// Reads the question of a query. `None` if it is none: something else, not exactly one question, records other than
    /// additional ones, or not all there.
    ///
    /// Additional records (EDNS, signatures) are for the server that is asked, which does not pass them on.
    #[inline(always)]
    pub fn of_query<M: Message>(message: &M) -> Option<Self> {
        let [_, _, flags, _, questions_high, questions, answers_high, answers, authorities_high, authorities] =
            message.load::<10>(0)?;
        // `QR`, and `OPCODE` a standard query.
        let is_query = flags & 0xf8 == 0 && questions_high == 0 && questions == 1;
        if !is_query || answers_high | answers | authorities_high | authorities != 0 {
            return None;
        }
        let question = Self::read(message)?;
        // A name that is asked for nothing in no class is half a question.
        message.load::<1>(question.end() - 1)?;
        Some(question)
    }

    /// Looks how long the name is.
    #[inline(always)]
    fn read<M: Message>(message: &M) -> Option<Self> {
        let end = message.end_of_name(HEADER);
        let name = end.offset()? - HEADER;
        // There is nothing before the question that it could point to, and the root has no address.
        let is_name = !end.is_compressed() && name > 1;
        is_name.then_some(Self { name })
    }

    /// Where records begin: after the name, its type and its class.
    #[inline(always)]
    pub const fn end(&self) -> u32 {
        HEADER + self.name + 4
    }

    /// Writes the name as a key. `false` if it has a byte that no host name has: patterns have none such,
    /// and a dot within a label must not pass for one between labels.
    #[inline(always)]
    pub fn write_key<M: Bytes>(&self, message: &M, key: &mut NameKey) -> bool {
        self.write_key_by(|index, label_ends| key.write_byte(message, self.name, index, label_ends)) && {
            key.end(self.name);
            true
        }
    }

    /// The same, byte by byte, by [`NameKey::write_byte`]; [`NameKey::end`] is still to be called.
    #[inline(always)]
    pub fn write_key_by(&self, mut write_byte: impl FnMut(u32, u32) -> Option<u32>) -> bool {
        let mut label_ends = 0;
        for index in 0..LONGEST_NAME - 1 {
            if index + 1 >= self.name {
                return true;
            }
            match write_byte(index, label_ends) {
                Some(ends) => label_ends = ends,
                None => return false,
            }
        }
        true
    }
}

impl NameKey {
    /// Writes the byte at an index of a name of `name` bytes to where it belongs. Tells where the label that it is in ends, given
    /// where the one before did; `None` if no host name has it.
    #[inline(always)]
    pub fn write_byte<M: Bytes>(&mut self, message: &M, name: u32, index: u32, label_ends: u32) -> Option<u32> {
        let [byte] = message.load::<1>(HEADER + index)?;
        let is_length = index == label_ends;
        if !is_length && !is_of_name(byte) {
            return None;
        }
        // Without its first length and its last byte, `\3www\7example\3com\0` is as long as `www.example.com`.
        if index > 0 {
            let at = (name.wrapping_sub(2).wrapping_sub(index) & LAST_BYTE) as usize;
            self.bytes[at] = if is_length { b'.' } else { byte.to_ascii_lowercase() };
        }
        Some(if is_length { index + 1 + u32::from(byte) } else { label_ends })
    }

    /// Ends the key of a name of `name` bytes.
    #[inline(always)]
    pub fn end(&mut self, name: u32) {
        let length = name.wrapping_sub(2) & LAST_BYTE;
        self.bytes[length as usize] = 0;
        self.length = (length + 1) * 8;
    }
}

/// Letters, digits, `-` and `_`: what names of hosts and services are made of.
#[inline(always)]
const fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_'
}

/// A message of DNS.
pub trait Message: Bytes {
    /// [`end_of_name`] of this message.
    fn end_of_name(&self, offset: u32) -> EndOfName;
}

/// Where a name ends, and whether it goes on elsewhere. In one number, as the kernel's functions return it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndOfName(u32);

impl EndOfName {
    /// There is no name.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    const fn new(offset: u32, is_compressed: bool) -> Self {
        Self(offset << 1 | is_compressed as u32)
    }

    /// From [`EndOfName::number`].
    #[inline(always)]
    pub const fn from_number(number: u32) -> Self {
        Self(number)
    }

    /// As a number; 0 if there is no name.
    #[inline(always)]
    pub const fn number(self) -> u32 {
        self.0
    }

    /// What comes after it; `None` if there is no name.
    #[inline(always)]
    const fn offset(self) -> Option<u32> {
        if self.0 == 0 { None } else { Some(self.0 >> 1) }
    }

    #[inline(always)]
    const fn is_compressed(self) -> bool {
        self.0 & 1 != 0
    }
}

/// Where a name ends that begins at an offset.
#[inline(always)]
pub fn end_of_name<M: Bytes>(message: &M, mut offset: u32) -> EndOfName {
    let longest = offset + LONGEST_NAME;
    for _ in 0..MOST_LABELS {
        let Some([length]) = message.load::<1>(offset) else { return EndOfName::NONE };
        match length {
            0 => return EndOfName::new(offset + 1, false),
            // A pointer (RFC 1035, 4.1.4) is two bytes, and the end.
            0xc0.. => return EndOfName::new(offset + 2, true),
            1..=63 => offset += 1 + u32::from(length),
            // Reserved (RFC 6891, 5).
            _ => return EndOfName::NONE,
        }
        if offset >= longest {
            return EndOfName::NONE;
        }
    }
    EndOfName::NONE
}

/// A record of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// The address that it gives, if it gives one.
    pub address: Option<Address>,
    /// For how many seconds.
    pub ttl: u32,
    /// Where the next one begins.
    pub next: u32,
}

/// Types and the class of `INTERNET` (RFC 1035, 3.2; RFC 3596).
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;

impl Record {
    /// Reads the record at an offset; `None` if it is malformed or not all there.
    #[inline(always)]
    pub fn read<M: Message>(message: &M, offset: u32) -> Option<Self> {
        let fields = message.end_of_name(offset).offset()?;
        let [kind_high, kind, class_high, class, ttl @ .., length_high, length] = message.load::<10>(fields)?;
        let [kind, class] = [[kind_high, kind], [class_high, class]].map(u16::from_be_bytes);
        let length = u16::from_be_bytes([length_high, length]);
        let data = fields + 10;
        let address = match (class, kind, length) {
            (CLASS_IN, TYPE_A, 4) => Some(Address::from_network_v4(u32::from_ne_bytes(message.load::<4>(data)?))),
            (CLASS_IN, TYPE_AAAA, 16) => Some(Address::from_network_bytes(message.load::<16>(data)?)),
            (CLASS_IN, TYPE_A | TYPE_AAAA, _) => return None,
            _ => None,
        };
        Some(Self { address, ttl: ttl_of(ttl), next: data + u32::from(length) })
    }
}

/// A value with the highest bit set counts as zero (RFC 2181, 8).
#[inline(always)]
const fn ttl_of(bytes: [u8; 4]) -> u32 {
    let ttl = u32::from_be_bytes(bytes);
    if ttl >> 31 == 0 { ttl } else { 0 }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::IpAddr;
    use std::{string::String, vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    struct Datagram(Vec<u8>);

    impl Bytes for Datagram {
        fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            self.0.get(offset as usize..)?.first_chunk().copied()
        }
    }

    impl Message for Datagram {
        fn end_of_name(&self, offset: u32) -> EndOfName {
            end_of_name(self, offset)
        }
    }

    fn wire(labels: &[&[u8]]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for label in labels {
            bytes.push(u8::try_from(label.len()).unwrap());
            bytes.extend(*label);
        }
        bytes.push(0);
        bytes
    }

    fn name(text: &str) -> Vec<u8> {
        wire(&text.split('.').map(str::as_bytes).collect::<Vec<_>>())
    }

    /// A response with a question, and records as they are written.
    fn response(question: &[u8], records: &[Vec<u8>]) -> Datagram {
        let count = u8::try_from(records.len()).unwrap();
        let header = [0x12, 0x34, 0x81, 0x80, 0, 1, 0, count, 0, 0, 0, 0];
        Datagram([&header[..], question, &[0, 1, 0, 1], &records.concat()].concat())
    }

    /// A record of a name that is a pointer to the question.
    fn record(kind: u16, class: u16, ttl: u32, data: &[u8]) -> Vec<u8> {
        let length = u16::try_from(data.len()).unwrap();
        [&[0xc0, 12][..], &kind.to_be_bytes(), &class.to_be_bytes(), &ttl.to_be_bytes(), &length.to_be_bytes(), data]
            .concat()
    }

    /// All addresses of a response, with how long they hold, up to what is malformed.
    fn addresses(message: &Datagram) -> Vec<(IpAddr, u32)> {
        let Some(response) = Response::read(message) else { return vec![] };
        let (mut found, mut offset) = (vec![], response.question.end());
        for _ in 0..response.answers {
            let Some(record) = Record::read(message, offset) else { break };
            found.extend(record.address.map(|address| (address.to_ip(), record.ttl)));
            offset = record.next;
        }
        found
    }

    fn key(message: &Datagram) -> Option<NameKey> {
        let (response, mut key) = (Response::read(message)?, NameKey::EMPTY);
        response.question.write_key(message, &mut key).then_some(key)
    }

    #[test]
    fn the_key_of_a_name_is_that_of_the_question_for_it() {
        for text in ["www.example.com", "a", "xn--bcher-kva.example", "_sip._udp.example.org"] {
            let asked = key(&response(&name(text), &[])).unwrap();
            assert!(asked == NameKey::of(text, NameEnd::Exact).unwrap(), "{text}: {:?}", asked.as_bytes_of_name());
        }
        let asked = key(&response(&name("WwW.eXample.COM"), &[])).unwrap();
        assert_eq!(asked.as_bytes_of_name(), b"moc.elpmaxe.www\0");
        assert_eq!(NameKey::of("example.com", NameEnd::Below).unwrap().as_bytes_of_name(), b"moc.elpmaxe.");
        let longest =
            [&"a".repeat(63), &"b".repeat(63), &"c".repeat(63), &"d".repeat(61)].map(String::as_str).join(".");
        assert_eq!(longest.len(), 253);
        assert!(key(&response(&name(&longest), &[])).unwrap() == NameKey::of(&longest, NameEnd::Exact).unwrap());
    }

    #[test]
    fn what_is_no_name_of_a_host_has_no_key() {
        for labels in [
            &[&b"a.b"[..], b"com"][..],
            &[b"a\0b", b"com"],
            &[b"a b", b"com"],
            &[b"*", b"example", b"com"],
            &[b"\xc3\xa9"],
        ] {
            assert!(key(&response(&wire(labels), &[])).is_none(), "{labels:?}");
        }
        let too_long = ["a", "b", "c", "d"].map(|label| label.repeat(63)).join(".");
        for text in ["", ".", "a..b", "a.", "a b", "*.example.com", "é", &"a".repeat(64), &too_long] {
            assert!(NameKey::of(text, NameEnd::Exact).is_none(), "{text}");
        }
        // The root.
        assert!(Response::read(&response(&[0], &[])).is_none());
    }

    /// A query for a name, with what comes after its type and class.
    fn query(question: &[u8], rest: &[u8]) -> Datagram {
        Datagram([&[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], question, &[0, 1, 0, 1], rest].concat())
    }

    #[test]
    fn a_query_asks_for_one_name() {
        let asked = |message: &Datagram| {
            let (question, mut key) = (Question::of_query(message)?, NameKey::EMPTY);
            question.write_key(message, &mut key).then_some(key)
        };
        let good = query(&name("WWW.example.com"), &[]);
        assert!(asked(&good) == NameKey::of("www.example.com", NameEnd::Exact));
        // With EDNS, with checking disabled, without recursion.
        for (at, value) in [(11, 1), (3, 0x10), (2, 0)] {
            let mut bytes = good.0.clone();
            bytes[at] = value;
            assert!(asked(&Datagram(bytes)).is_some(), "{at} {value}");
        }
        // A response, an update, no question, two, 256, an answer, and an authority.
        for (at, value) in [(2, 0x81), (2, 0x28), (5, 0), (5, 2), (4, 1), (7, 1), (6, 1), (9, 1), (8, 1)] {
            let mut bytes = good.0.clone();
            bytes[at] = value;
            assert!(Question::of_query(&Datagram(bytes)).is_none(), "{at} {value}");
        }
        for end in 0..good.0.len() {
            assert!(Question::of_query(&Datagram(good.0[..end].to_vec())).is_none(), "{end}");
        }
        for question in [&[0][..], &[0xc0, 12], &[1, b'a', 0xc0, 12], &[64, b'a', 0], &[0x41, b'a', 0]] {
            assert!(asked(&query(question, &[0; 64])).is_none(), "{question:?}");
        }
    }

    #[test]
    fn addresses_of_both_families_are_read_and_whatever_else_stands_between_them() {
        let message = response(
            &name("www.example.com"),
            &[
                record(5, 1, 60, &name("edge.example.net")),
                record(1, 1, 300, &[192, 0, 2, 1]),
                record(28, 1, 7, &[0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]),
                // Of another class, and a signature.
                record(1, 3, 300, &[192, 0, 2, 2]),
                record(46, 1, 300, &[0; 90]),
                record(1, 1, 0x8000_0001, &[192, 0, 2, 3]),
            ],
        );
        let expected = [("192.0.2.1", 300), ("2001:db8::5", 7), ("192.0.2.3", 0)];
        assert_eq!(addresses(&message), expected.map(|(address, ttl)| (address.parse().unwrap(), ttl)));
    }

    #[test]
    fn what_is_no_answer_to_one_question_teaches_nothing() {
        let good = response(&name("a.example"), &[record(1, 1, 60, &[192, 0, 2, 1])]);
        assert_eq!(addresses(&good).len(), 1);
        // A query, another operation, an error, no question, two, and 256.
        for (at, value) in [(2, 0x01), (2, 0x91), (3, 0x83), (5, 0), (5, 2), (4, 1)] {
            let mut bytes = good.0.clone();
            bytes[at] = value;
            assert_eq!(addresses(&Datagram(bytes)), [], "{at} {value}");
        }
        // Truncated is not wrong.
        let mut bytes = good.0;
        bytes[2] |= 0x02;
        assert_eq!(addresses(&Datagram(bytes)).len(), 1);
    }

    #[test]
    fn from_what_is_malformed_nothing_more_is_learnt() {
        let first = record(1, 1, 60, &[192, 0, 2, 1]);
        for second in [
            record(1, 1, 60, &[192, 0, 2]),
            record(28, 1, 60, &[192, 0, 2, 2]),
            [&[0x80][..], &record(1, 1, 60, &[192, 0, 2, 2])].concat(),
        ] {
            let message = response(&name("a.example"), &[first.clone(), second, first.clone()]);
            assert_eq!(addresses(&message).len(), 1);
        }
        // The end of a message that was cut, wherever that was.
        let whole = response(&name("a.example"), &[first.clone(), first]).0;
        for cut in whole.len() - 16..whole.len() {
            assert_eq!(addresses(&Datagram(whole[..cut].to_vec())).len(), 1, "{cut}");
        }
        // A question that is a pointer, and one that never ends.
        assert!(Response::read(&response(&[0xc0, 12], &[])).is_none());
        assert!(Response::read(&response(&[1, b'a', 0xc0, 0], &[])).is_none());
        assert!(Response::read(&response(&[1, b'a'].repeat(128), &[])).is_none());
    }

    proptest! {
        /// Hostile bytes are read within bounds, and nothing is found outside of them.
        #[test]
        fn any_bytes_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let message = Datagram(bytes);
            if let Some(found) = Response::read(&message) {
                prop_assert!(found.question.end() as usize <= message.0.len() + 4);
                let mut key = NameKey::EMPTY;
                if found.question.write_key(&message, &mut key) {
                    let name = key.as_bytes_of_name();
                    prop_assert_eq!(name.iter().position(|&byte| byte == 0), Some(name.len() - 1));
                }
            }
            addresses(&message);
            if let Some(record) = Record::read(&message, 0) {
                prop_assert!(record.next > 10);
            }
        }

        /// Two names have the same key only if they are the same name.
        #[test]
        fn a_key_is_of_one_name(labels in prop::collection::vec("[a-zA-Z0-9_.-]{1,8}", 1..5)) {
            let labels: Vec<&[u8]> = labels.iter().map(String::as_bytes).collect();
            let has_dot = labels.iter().any(|label| label.contains(&b'.'));
            let asked = key(&response(&wire(&labels), &[]));
            prop_assert_eq!(asked.is_none(), has_dot);
            if let Some(asked) = asked {
                let text = String::from_utf8(labels.join(&b"."[..])).unwrap();
                prop_assert!(Some(asked) == NameKey::of(&text, NameEnd::Exact));
            }
        }

        /// A name lies below another exactly where the key of the pattern is the beginning of its own.
        #[test]
        fn a_pattern_is_a_prefix(name in "[a-c]{1,2}(\\.[a-c]{1,2}){0,3}", above in "[a-c]{1,2}(\\.[a-c]{1,2}){0,2}") {
            let (key, pattern) = (NameKey::of(&name, NameEnd::Exact).unwrap(), NameKey::of(&above, NameEnd::Below).unwrap());
            let is_below = name.strip_suffix(&above).is_some_and(|rest| rest.ends_with('.'));
            prop_assert_eq!(key.as_bytes_of_name().starts_with(pattern.as_bytes_of_name()), is_below);
        }
    }
}
