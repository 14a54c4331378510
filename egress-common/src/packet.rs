//! Headers of packets: those whose way differs from what their destination says, for the packet guard, which has no list of
//! addresses, only what no look-up of a destination can see; and those that carry questions and answers of DNS.

use crate::{Address, LONGEST_MESSAGE, Protocol};

/// Bytes that somebody else wrote.
pub trait Bytes {
    /// Bytes at an offset; `None` if there are not so many.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

/// A packet that begins with its IP header.
pub trait Packet: Bytes {
    /// Whether it is on its way to another device than `lo`.
    fn leaves(&self) -> bool;
}

/// What the headers of a packet tell of its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Way {
    /// Where it says it goes.
    pub destination: Address,
    /// What it carries, first of all.
    pub protocol: Protocol,
    /// It goes by another host that it names itself, or under a loopback address to another machine or from a foreign
    /// source, or cannot be read.
    pub is_bypass: bool,
}

/// `IPOPT_EOL`, `IPOPT_NOOP`, `IPOPT_LSRR` and `IPOPT_SSRR` (RFC 791, 3.1).
const END_OF_OPTIONS: u8 = 0;
const NO_OPERATION: u8 = 1;
const LOOSE_ROUTE: u8 = 131;
const STRICT_ROUTE: u8 = 137;

/// Options end at most so many bytes after the start of the header: its length is counted in four bits, in words.
const LONGEST_HEADER: u32 = 60;

/// Reads an IPv4 header (RFC 791).
#[inline(always)]
pub fn way_v4<P: Packet>(packet: &P) -> Option<Way> {
    let [version_and_length] = packet.load(0)?;
    let [protocol] = packet.load(9)?;
    let address: [u8; 4] = packet.load(16)?;
    let destination = Address::from_network_v4(u32::from_ne_bytes(address));
    let length = u32::from(version_and_length & 0xf) * 4;
    let is_bypass = (address[0] == 127 && packet.leaves()) || (length != 20 && routes_v4(packet, length));
    Some(Way { destination, protocol: Protocol::from_kernel(protocol.into()), is_bypass })
}

/// Whether the options of an IPv4 header name hosts to go by, or cannot be read.
#[inline(always)]
fn routes_v4<P: Packet>(packet: &P, length: u32) -> bool {
    let mut offset = 20;
    for _ in 20..LONGEST_HEADER {
        if offset >= length {
            return false;
        }
        match packet.load(offset) {
            None | Some([LOOSE_ROUTE | STRICT_ROUTE]) => return true,
            Some([END_OF_OPTIONS]) => return false,
            Some([NO_OPERATION]) => offset += 1,
            Some([_]) => match packet.load(offset + 1) {
                Some([length @ 2..40]) => offset += u32::from(length),
                _ => return true,
            },
        }
    }
    offset < length
}

/// Numbers of IPv6 extension headers (RFC 8200, 4; authentication: RFC 4302).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION_OPTIONS: u8 = 60;

/// RFC 8200 knows seven places for extension headers; what has more is not read to its end.
const MOST_HEADERS: u32 = 8;

/// Reads an IPv6 header (RFC 8200).
#[inline(always)]
pub fn way_v6<P: Packet>(packet: &P) -> Option<Way> {
    let [next] = packet.load(6)?;
    let (source, destination) = (packet.load(8)?, packet.load(24)?);
    let (source, destination) = (Address::from_network_bytes(source), Address::from_network_bytes(destination));
    // IPv6 sends from any address that a socket is bound to, and answers to it.
    let is_no_loopback = destination.is_loopback_v6() && (packet.leaves() || !source.is_loopback_v6());
    let is_bypass = is_no_loopback || routes_v6(packet, next);
    Some(Way { destination, protocol: Protocol::from_kernel(next.into()), is_bypass })
}

/// Whether the extension headers of an IPv6 packet name hosts to go by, or cannot be read.
#[inline(always)]
fn routes_v6<P: Packet>(packet: &P, mut next: u8) -> bool {
    let mut offset = V6_HEADER;
    for _ in 0..MOST_HEADERS {
        let unit = match next {
            ROUTING => return true,
            _ => match unit_of(next) {
                Some(unit) => unit,
                None => return false,
            },
        };
        let Some([following, length]) = packet.load(offset) else { return true };
        offset += FIRST_UNIT + u32::from(length) * unit;
        next = following;
    }
    true
}

/// Bytes of the header of IPv6.
const V6_HEADER: u32 = 40;
/// Bytes of an extension header that its length does not count.
const FIRST_UNIT: u32 = 8;

/// How many bytes the length of an extension header counts in; `None` if it is none. In a fragment header the length is reserved.
#[inline(always)]
const fn unit_of(header: u8) -> Option<u32> {
    match header {
        ROUTING | HOP_BY_HOP | DESTINATION_OPTIONS => Some(8),
        AUTHENTICATION => Some(4),
        FRAGMENT => Some(0),
        _ => None,
    }
}

/// A packet on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sent {
    /// Where it goes.
    pub destination: Address,
    /// What it carries.
    pub protocol: Protocol,
    /// Where the header of that begins.
    pub transport: u32,
    /// It is a part of a packet. The kernel cuts packets only later, so somebody else made it.
    pub is_part: bool,
}

/// Reads an IPv4 packet; `None` if that cannot be done.
#[inline(always)]
pub fn sent_v4<B: Bytes>(packet: &B) -> Option<Sent> {
    let [version_and_length, .., part_high, part, _, protocol] = packet.load::<10>(0)?;
    // More parts follow, or this is not the first (RFC 791, 3.1).
    let is_part = part_high & 0x3f | part != 0;
    let destination = Address::from_network_v4(u32::from_ne_bytes(packet.load(16)?));
    let protocol = Protocol::from_kernel(protocol.into());
    Some(Sent { destination, protocol, transport: u32::from(version_and_length & 0xf) * 4, is_part })
}

/// Reads an IPv6 packet, behind whatever extension headers; `None` if that cannot be done.
#[inline(always)]
pub fn sent_v6<B: Bytes>(packet: &B) -> Option<Sent> {
    let [mut next] = packet.load(6)?;
    let destination = Address::from_network_bytes(packet.load(24)?);
    let (mut offset, mut is_part) = (V6_HEADER, false);
    for _ in 0..MOST_HEADERS {
        let Some(unit) = unit_of(next) else {
            return Some(Sent {
                destination,
                protocol: Protocol::from_kernel(next.into()),
                transport: offset,
                is_part,
            });
        };
        is_part |= next == FRAGMENT;
        let [following, length] = packet.load(offset)?;
        offset += FIRST_UNIT + u32::from(length) * unit;
        next = following;
    }
    None
}

/// The port of servers of DNS.
pub const DNS_PORT: u16 = 53;

/// A packet that came from port 53.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrived {
    /// Who sent it, as it says.
    pub source: Address,
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Where the header of that begins.
    pub transport: u32,
    /// Over the addresses and the protocol: see [`Checksum`].
    pub sum: Checksum,
}

/// Reads an IPv4 packet. `None` if it did not come from port 53 of TCP or UDP, which is seen first.
#[inline(always)]
pub fn answer_v4<B: Bytes>(packet: &B) -> Option<Arrived> {
    let [version_and_length, .., protocol] = packet.load::<10>(0)?;
    let (protocol, transport) = from_dns(packet, protocol, u32::from(version_and_length & 0xf) * 4)?;
    let addresses: [u8; 8] = packet.load(12)?;
    let [a, b, c, d, ..] = addresses;
    let source = Address::from_network_v4(u32::from_ne_bytes([a, b, c, d]));
    Some(Arrived { source, protocol, transport, sum: Checksum::new(protocol).with(addresses) })
}

/// Reads an IPv6 packet. `None` if it did not come from port 53 of TCP or UDP, or has extension headers, which no answer has.
#[inline(always)]
pub fn answer_v6<B: Bytes>(packet: &B) -> Option<Arrived> {
    let [next] = packet.load(6)?;
    let (protocol, transport) = from_dns(packet, next, V6_HEADER)?;
    let (source, destination): ([u8; 16], [u8; 16]) = (packet.load(8)?, packet.load(24)?);
    let sum = Checksum::new(protocol).with(source).with(destination);
    Some(Arrived { source: Address::from_network_bytes(source), protocol, transport, sum })
}

#[inline(always)]
fn from_dns<B: Bytes>(packet: &B, protocol: u8, transport: u32) -> Option<(Protocol, u32)> {
    let protocol = Protocol::from_kernel(protocol.into());
    if !protocol.is_judged() {
        return None;
    }
    let port: [u8; 2] = packet.load(transport)?;
    (u16::from_be_bytes(port) == DNS_PORT).then_some((protocol, transport))
}

/// A checksum in the making: ones' complement, which works in any byte order as long as it is the same (RFC 1071).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Checksum(u64);

impl Checksum {
    /// Of a pseudo header with nothing but the protocol.
    #[inline(always)]
    const fn new(protocol: Protocol) -> Self {
        Self((protocol.number() as u16).to_be() as u64)
    }

    /// From [`Checksum::number`].
    #[inline(always)]
    pub const fn from_number(number: u64) -> Self {
        Self(number)
    }

    /// As a number.
    #[inline(always)]
    pub const fn number(self) -> u64 {
        self.0
    }

    /// With some words of 16 bits.
    #[inline(always)]
    #[must_use]
    pub fn with<const N: usize>(self, bytes: [u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2)) };
        let mut sum = self.0;
        let mut index = 0;
        while index < N {
            sum += u64::from(u16::from_ne_bytes([bytes[index], bytes[index + 1]]));
            index += 2;
        }
        Self(sum)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "after folding, nothing is above 16 bits")]
    const fn folded(self) -> u16 {
        let sum = (self.0 & 0xffff) + ((self.0 >> 16) & 0xffff) + ((self.0 >> 32) & 0xffff) + (self.0 >> 48);
        let sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }

    /// Whether a datagram of `length` bytes after its header `header` is as it was sent; `self` is over its addresses and its
    /// protocol. One that has not left this machine, or a bridge in it, is not summed yet (`CHECKSUM_PARTIAL` of
    /// `linux/skbuff.h`): its field is the sum of its pseudo header.
    #[inline(always)]
    pub fn is_right<B: Bytes>(self, header: [u8; 8], payload: &B, length: u32) -> bool {
        let [.., size_high, size_low, sum_high, sum_low] = header;
        let pseudo = self.with([size_high, size_low]);
        if [sum_high, sum_low] == [0; 2] || u16::from_ne_bytes([sum_high, sum_low]) == pseudo.folded() {
            return true;
        }
        let mut sum = pseudo.with(header);
        for index in 0..LONGEST_MESSAGE / 4 {
            let Some(word) = payload.load::<4>(index * 4) else { break };
            sum.0 += u64::from(u32::from_ne_bytes(word));
        }
        let rest = length & !3;
        if length & 2 != 0
            && let Some(word) = payload.load::<2>(rest)
        {
            sum = sum.with(word);
        }
        if length & 1 != 0
            && let Some([byte]) = payload.load::<1>(length - 1)
        {
            sum = sum.with([byte, 0]);
        }
        sum.folded() == u16::MAX
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::net::IpAddr;
    use std::{vec, vec::Vec};

    use proptest::prelude::*;

    use super::*;

    struct Sent {
        bytes: Vec<u8>,
        leaves: bool,
    }

    impl Bytes for Sent {
        fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
            self.bytes.get(offset as usize..)?.first_chunk().copied()
        }
    }

    impl Packet for Sent {
        fn leaves(&self) -> bool {
            self.leaves
        }
    }

    fn v4(destination: [u8; 4], options: &[u8]) -> Sent {
        let mut bytes = vec![0; 20];
        bytes[0] = 0x40 | u8::try_from((20 + options.len()) / 4).unwrap();
        bytes[16..20].copy_from_slice(&destination);
        bytes.extend(options);
        bytes.extend([0xff; 8]);
        Sent { bytes, leaves: true }
    }

    fn v6(destination: &str, next: u8, headers: &[u8]) -> Sent {
        let mut bytes = vec![0; 40];
        bytes[0] = 0x60;
        bytes[6] = next;
        let address: core::net::Ipv6Addr = destination.parse().unwrap();
        bytes[24..40].copy_from_slice(&address.octets());
        bytes.extend(headers);
        Sent { bytes, leaves: true }
    }

    #[track_caller]
    fn is_bypass(way: Option<Way>) -> bool {
        way.unwrap().is_bypass
    }

    #[test]
    fn an_ordinary_packet_goes_where_it_says() {
        let way = way_v4(&v4([192, 0, 2, 1], &[])).unwrap();
        assert_eq!((way.destination.to_ip(), way.is_bypass), ("192.0.2.1".parse::<IpAddr>().unwrap(), false));
        let way = way_v6(&v6("2001:db8::5", 6, &[0; 20])).unwrap();
        assert_eq!((way.destination.to_ip(), way.is_bypass), ("2001:db8::5".parse::<IpAddr>().unwrap(), false));
    }

    #[test]
    fn source_routes_are_found_wherever_they_stand() {
        let route = [LOOSE_ROUTE, 7, 4, 10, 0, 0, 1];
        assert!(is_bypass(way_v4(&v4([192, 0, 2, 1], &[&route[..], &[0]].concat()))));
        assert!(is_bypass(way_v4(&v4([192, 0, 2, 1], &[&[1][..], &[STRICT_ROUTE, 7, 4, 10, 0, 0, 1]].concat()))));
        // Behind a record route and a router alert.
        let behind = [&[7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 1][..], &[148, 4, 0, 0], &route, &[0]].concat();
        assert!(is_bypass(way_v4(&v4([192, 0, 2, 1], &behind))));
    }

    #[test]
    fn options_that_do_not_route_may_stand() {
        for options in
            [&[148, 4, 0, 0][..], &[1, 1, 1, 1], &[7, 7, 4, 0, 0, 0, 0, 0], &[0, LOOSE_ROUTE, 0, 0], &[1; 40]]
        {
            assert!(!is_bypass(way_v4(&v4([192, 0, 2, 1], options))), "{options:?}");
        }
    }

    #[test]
    fn options_without_a_length_are_refused() {
        for options in [&[68, 0, 0, 0][..], &[68, 1, 0, 0], &[1, 1, 1, 68]] {
            let packet = v4([192, 0, 2, 1], options);
            let cut = Sent { bytes: packet.bytes[..20 + options.len()].to_vec(), ..packet };
            assert!(is_bypass(way_v4(&cut)), "{options:?}");
        }
    }

    #[test]
    fn what_a_packet_carries_is_found_behind_headers() {
        let carried =
            |sent: Option<super::Sent>| sent.map(|sent| (sent.protocol.number(), sent.transport, sent.is_part));
        let mut packet = v4([192, 0, 2, 1], &[1, 1, 1, 1]);
        packet.bytes[9] = 17;
        assert_eq!(sent_v4(&packet).unwrap().destination.to_ip(), "192.0.2.1".parse::<IpAddr>().unwrap());
        assert_eq!(carried(sent_v4(&packet)), Some((17, 24, false)));
        // Not to be cut, and the first, the second and a later part of one that is.
        for (flags, low, is_part) in [(0x40, 0, false), (0x20, 0, true), (0x20, 1, true), (0x01, 0, true)] {
            (packet.bytes[6], packet.bytes[7]) = (flags, low);
            assert_eq!(sent_v4(&packet).unwrap().is_part, is_part, "{flags} {low}");
        }
        let other = |next| [next, 0, 0, 0, 0, 0, 0, 0];
        let behind = |headers: &[u8]| carried(sent_v6(&v6("2001:db8::5", DESTINATION_OPTIONS, headers)));
        assert_eq!(behind(&other(17)), Some((17, 48, false)));
        assert_eq!(behind(&[other(ROUTING), other(AUTHENTICATION), other(6)].concat()), Some((6, 64, false)));
        assert_eq!(behind(&[other(FRAGMENT), other(17)].concat()), Some((17, 56, true)));
        assert_eq!(behind(&other(DESTINATION_OPTIONS).repeat(8)), None);
        assert_eq!(behind(&[17]), None);
        assert_eq!(carried(sent_v6(&v6("2001:db8::5", 58, &[]))), Some((58, 40, false)));
    }

    #[test]
    fn routing_headers_are_found_behind_others() {
        let other = |next| [next, 0, 0, 0, 0, 0, 0, 0];
        assert!(is_bypass(way_v6(&v6("2001:db8::5", ROUTING, &other(6)))));
        for first in [HOP_BY_HOP, DESTINATION_OPTIONS, FRAGMENT] {
            assert!(is_bypass(way_v6(&v6("2001:db8::5", first, &other(ROUTING)))), "{first}");
            assert!(!is_bypass(way_v6(&v6("2001:db8::5", first, &other(17)))), "{first}");
        }
        // A longer one, and one that counts in words.
        let longer = [&[ROUTING, 1][..], &[0; 14]].concat();
        assert!(is_bypass(way_v6(&v6("2001:db8::5", DESTINATION_OPTIONS, &longer))));
        let authentication = [&[DESTINATION_OPTIONS, 1][..], &[0; 10], &other(ROUTING)].concat();
        assert!(is_bypass(way_v6(&v6("2001:db8::5", AUTHENTICATION, &authentication))));
        // A fragment header has no length.
        assert!(is_bypass(way_v6(&v6("2001:db8::5", FRAGMENT, &[&[60, 9][..], &[0; 6], &other(ROUTING)].concat()))));
    }

    #[test]
    fn more_headers_than_there_are_places_are_refused() {
        let many: Vec<u8> = core::iter::repeat_n([DESTINATION_OPTIONS, 0, 0, 0, 0, 0, 0, 0], 9).flatten().collect();
        assert!(is_bypass(way_v6(&v6("2001:db8::5", DESTINATION_OPTIONS, &many))));
        assert!(is_bypass(way_v6(&v6("2001:db8::5", DESTINATION_OPTIONS, &[]))));
    }

    #[test]
    fn loopback_addresses_stay_on_the_loopback_device() {
        assert!(is_bypass(way_v4(&v4([127, 8, 0, 1], &[]))));
        assert!(!is_bypass(way_v4(&Sent { leaves: false, ..v4([127, 8, 0, 1], &[]) })));
        let from = |source: core::net::Ipv6Addr, leaves| {
            let mut packet = Sent { leaves, ..v6("::1", 17, &[]) };
            packet.bytes[8..24].copy_from_slice(&source.octets());
            is_bypass(way_v6(&packet))
        };
        assert!(from(core::net::Ipv6Addr::LOCALHOST, true) && !from(core::net::Ipv6Addr::LOCALHOST, false));
        // What comes from elsewhere does not come here by the loopback device.
        assert!(from("2001:db8::bad".parse().unwrap(), false));
    }

    fn udp_v4(source: [u8; 4], from: u16, payload: &[u8]) -> Vec<u8> {
        let length = u16::try_from(payload.len() + 8).unwrap();
        let ip = [&[0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0][..], &source, &[10, 0, 0, 9]].concat();
        let udp = [&from.to_be_bytes()[..], &[0x30, 0x39], &length.to_be_bytes(), &[0, 0]].concat();
        [&ip[..], &udp, payload].concat()
    }

    /// The slow, obvious sum of RFC 768: words in network byte order.
    fn sum(packet: &[u8]) -> u16 {
        let udp = &packet[20..];
        let mut bytes = [&packet[12..20], &[0, 17], &udp[4..6], udp].concat();
        bytes.resize(bytes.len().next_multiple_of(2), 0);
        let mut sum: u32 = bytes.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !u16::try_from(sum).unwrap()
    }

    fn is_right(packet: &[u8]) -> bool {
        let arrived = answer_v4(&Sent { bytes: packet.to_vec(), leaves: true }).unwrap();
        let payload = Sent { bytes: packet[28..].to_vec(), leaves: true };
        let length = u32::try_from(packet.len() - 28).unwrap();
        arrived.sum.is_right(packet[20..28].try_into().unwrap(), &payload, length)
    }

    #[test]
    fn what_comes_from_port_53_is_seen() {
        let answer = |bytes: &[u8]| answer_v4(&Sent { bytes: bytes.to_vec(), leaves: false });
        let packet = udp_v4([192, 0, 2, 53], 53, b"hello");
        let arrived = answer(&packet).unwrap();
        assert_eq!((arrived.source.to_ip(), arrived.protocol), ("192.0.2.53".parse().unwrap(), Protocol::UDP));
        assert_eq!(arrived.transport, 20);
        assert!(answer(&udp_v4([192, 0, 2, 53], 54, b"hello")).is_none());
        let mut other = packet.clone();
        other[9] = 132;
        assert!(answer(&other).is_none());
        for cut in 0..22 {
            assert!(answer(&packet[..cut]).is_none(), "{cut}");
        }
        let v6 = [&[0x60, 0, 0, 0, 0, 20, 6, 64][..], &[7; 16], &[8; 16], &[0, 53, 1, 1]].concat();
        let arrived = answer_v6(&Sent { bytes: v6, leaves: false }).unwrap();
        assert_eq!((arrived.source, arrived.protocol), (Address::from_network_bytes([7; 16]), Protocol::TCP));
        assert_eq!(arrived.transport, 40);
    }

    #[test]
    fn a_datagram_that_has_not_been_summed_is_right() {
        let mut packet = udp_v4([192, 0, 2, 53], 53, b"hello");
        assert!(is_right(&packet), "without a sum");
        let pseudo = u32::from(u16::MAX) & [0xc000, 0x0235, 0x0a00, 9, 17, 13].iter().sum::<u32>();
        packet[26..28].copy_from_slice(&u16::try_from(pseudo).unwrap().to_be_bytes());
        assert!(is_right(&packet));
        packet[27] ^= 1;
        assert!(!is_right(&packet));
    }

    proptest! {
        #[test]
        fn a_checksum_is_right_or_wrong(payload in prop::collection::vec(any::<u8>(), 0..300), bit: prop::sample::Index) {
            let mut packet = udp_v4([192, 0, 2, 53], 53, &payload);
            let sum = sum(&packet);
            prop_assume!(sum != 0);
            packet[26..28].copy_from_slice(&sum.to_be_bytes());
            prop_assert!(is_right(&packet));
            if let Some(bit) = (!payload.is_empty()).then(|| bit.index(payload.len() * 8)) {
                packet[28 + bit / 8] ^= 1 << (bit % 8);
                prop_assert!(!is_right(&packet));
            }
        }
    }

    proptest! {
        /// Hostile bytes are read within bounds, and a packet cut short is never taken for a whole one that routes.
        #[test]
        fn any_bytes_can_be_read(bytes in prop::collection::vec(any::<u8>(), 0..200), leaves: bool) {
            let packet = Sent { bytes, leaves };
            prop_assert_eq!(way_v4(&packet).is_some(), packet.bytes.len() >= 20);
            prop_assert_eq!(way_v6(&packet).is_some(), packet.bytes.len() >= 40);
        }

        /// Whatever else stands before it, a source route is found.
        #[test]
        fn a_source_route_cannot_hide(before in prop::collection::vec((2_u8..6, 140_u8..200), 0..5), strict: bool) {
            let mut options: Vec<u8> = Vec::new();
            for (length, kind) in before {
                let kind = if kind == STRICT_ROUTE { 148 } else { kind };
                options.extend([kind, length]);
                options.extend(core::iter::repeat_n(0, usize::from(length) - 2));
            }
            options.extend([if strict { STRICT_ROUTE } else { LOOSE_ROUTE }, 7, 4, 10, 0, 0, 1]);
            options.resize(options.len().next_multiple_of(4), 0);
            prop_assert!(is_bypass(way_v4(&v4([192, 0, 2, 1], &options))));
        }
    }
}
