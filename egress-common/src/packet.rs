//! Packets whose way differs from what their destination says. For the packet guard: no list of addresses, only what no
//! look-up of a destination can see.

use crate::{Address, Protocol};

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
    let mut offset = 40;
    for _ in 0..MOST_HEADERS {
        let unit = match next {
            ROUTING => return true,
            HOP_BY_HOP | DESTINATION_OPTIONS => 8,
            AUTHENTICATION => 4,
            FRAGMENT => 0,
            _ => return false,
        };
        let Some([following, length]) = packet.load(offset) else { return true };
        // Counted without the first eight bytes; in a fragment header the length is reserved.
        offset += 8 + u32::from(length) * unit;
        next = following;
    }
    true
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
