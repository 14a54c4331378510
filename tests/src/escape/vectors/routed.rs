//! Ways by packets that carry a route: the destination is one that may be reached, and the packet goes to another.

use std::{
    net::{Ipv4Addr, Ipv6Addr},
    os::fd::OwnedFd,
};

use crate::escape::{
    Outcome, Place, Vector,
    sys::{Address, DATA, connect, datagram, encode, number_option, option, send, send_message, send_to, stream},
    target::{Target, at},
};

const LOOSE: u8 = 131;
const STRICT: u8 = 137;
const IP_OPTIONS: i32 = 4;
const IP_RETOPTS: i32 = 7;
const IPV6_2292PKTOPTIONS: i32 = 6;
const IPV6_2292RTHDR: i32 = 5;
/// The option and the kind of control message.
pub const IPV6_RTHDR: i32 = 57;
const IPV6_HOPOPTS: i32 = 54;
const IPV6_RTHDRDSTOPTS: i32 = 55;
const IPV6_DSTOPTS: i32 = 59;
/// A header of options with nothing in it.
const PADDING: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
/// Needs `CONFIG_IPV6_MIP6`.
const MOBILE: u8 = 2;
/// Needs nothing.
pub const SEGMENTS: u8 = 4;
const MOBILITY: &str = "CONFIG_IPV6_MIP6";
const ANCILLARY: &str = "routing headers of type 4 as ancillary data";

pub const VECTORS: &[Vector] = &[
    Vector::new("LSRR by IP_OPTIONS before connect, TCP", |target| tcp4(target, LOOSE)).root_only(),
    Vector::new("LSRR by IP_OPTIONS before connect, UDP", |target| udp4(target, LOOSE)).root_only(),
    Vector::new("LSRR by IP_OPTIONS after connect, UDP", |target| {
        let socket = datagram(at(target.friend4()))?;
        connect(&socket, at(target.friend4()))?;
        option(&socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(LOOSE, target))?;
        send(&socket, DATA, 0)
    })
    .root_only(),
    Vector::new("LSRR by IP_OPTIONS, sendto", |target| {
        let socket = datagram(at(target.friend4()))?;
        option(&socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(LOOSE, target))?;
        send_to(&socket, DATA, 0, at(target.friend4()))
    })
    .root_only(),
    Vector::new("SSRR by IP_OPTIONS before connect, TCP", |target| tcp4(target, STRICT)).root_only(),
    Vector::new("SSRR by IP_OPTIONS before connect, UDP", |target| udp4(target, STRICT)).root_only(),
    Vector::new("LSRR by IP_RETOPTS", |target| by_message4(target, LOOSE)).root_only(),
    Vector::new("SSRR by IP_RETOPTS", |target| by_message4(target, STRICT)).root_only(),
    Vector::new("LSRR by IP_RETOPTS, connected", |target| {
        let socket = datagram(at(target.friend4()))?;
        connect(&socket, at(target.friend4()))?;
        send_message(&socket, None, &[(libc::IPPROTO_IP, IP_RETOPTS, &route4(LOOSE, target))])
    })
    .root_only(),
    Vector::new("LSRR by IP_OPTIONS on an IPv6 socket, sendto", |target| {
        let to = at(target.friend4().to_ipv6_mapped());
        let socket = datagram(to)?;
        option(&socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(LOOSE, target))?;
        send_to(&socket, DATA, 0, to)
    })
    .root_only(),
    Vector::new("LSRR to the loopback, TCP", |target| {
        let to = at(Ipv4Addr::LOCALHOST);
        let socket = stream(to)?;
        option(&socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(LOOSE, target))?;
        connect(&socket, to)
    })
    .root_only(),
    Vector::new("routing header 4 by IPV6_RTHDR before connect, TCP", |target| tcp6(target, SEGMENTS)),
    Vector::new("routing header 4 by IPV6_RTHDR before connect, UDP", |target| udp6(target, SEGMENTS)),
    Vector::new("routing header 4 by IPV6_RTHDR after connect, UDP", |target| after6(target, SEGMENTS)),
    Vector::new("routing header 4 by IPV6_RTHDR, sendto", |target| aside6(target, SEGMENTS)),
    Vector::new("routing header 4 by IPV6_2292PKTOPTIONS", |target| by_packet_options(target, SEGMENTS))
        .needs(ANCILLARY),
    Vector::new("routing header 4 by ancillary IPV6_RTHDR", |target| by_message6(target, IPV6_RTHDR, SEGMENTS))
        .needs(ANCILLARY),
    Vector::new("routing header 4 by ancillary IPV6_2292RTHDR", |target| by_message6(target, IPV6_2292RTHDR, SEGMENTS))
        .needs(ANCILLARY),
    Vector::new("routing header 4 by ancillary IPV6_RTHDR, connected", |target| connected6(target, SEGMENTS))
        .needs(ANCILLARY),
    Vector::new("routing header 4 to ::1", |target| {
        let to = at(Ipv6Addr::LOCALHOST);
        let socket = datagram(to)?;
        option(&socket, libc::IPPROTO_IPV6, IPV6_RTHDR, &route6(SEGMENTS, target))?;
        send_to(&socket, DATA, 0, to)
    }),
    Vector::new("routing header 2 by IPV6_RTHDR before connect, TCP", |target| tcp6(target, MOBILE)).needs(MOBILITY),
    Vector::new("routing header 2 by IPV6_RTHDR before connect, UDP", |target| udp6(target, MOBILE)).needs(MOBILITY),
    Vector::new("routing header 2 by IPV6_RTHDR after connect, UDP", |target| after6(target, MOBILE)).needs(MOBILITY),
    Vector::new("routing header 2 by IPV6_2292PKTOPTIONS", |target| by_packet_options(target, MOBILE)).needs(MOBILITY),
    Vector::new("routing header 2 by ancillary IPV6_2292RTHDR", |target| by_message6(target, IPV6_2292RTHDR, MOBILE))
        .needs(MOBILITY),
    Vector::new("routing header 2 by ancillary IPV6_RTHDR, connected", |target| connected6(target, MOBILE))
        .needs(MOBILITY),
    Vector::new("routing header 2 by ancillary IPV6_RTHDR", |target| by_message6(target, IPV6_RTHDR, MOBILE))
        .needs(MOBILITY),
    Vector::new("routing header 2 by IPV6_FLOWLABEL_MGR", by_flow_label).needs(MOBILITY),
    Vector::prepared("routing header 4 set before the filter, UDP sendto", Place::BeforeAttach, |target| {
        let socket = datagram(at(target.friend6()))?;
        set_route6(&socket, target, SEGMENTS)?;
        Ok(Box::new(move || send_to(&socket, DATA, 0, at(target.friend6()))))
    }),
    Vector::prepared("routing header 4 set before the filter, TCP connect", Place::BeforeAttach, |target| {
        let socket = stream(at(target.friend6()))?;
        set_route6(&socket, target, SEGMENTS)?;
        Ok(Box::new(move || connect(&socket, at(target.friend6()))))
    }),
    Vector::prepared("routing header 4 set before the filter behind other options", Place::BeforeAttach, |target| {
        let socket = datagram(at(target.friend6()))?;
        for name in [IPV6_HOPOPTS, IPV6_RTHDRDSTOPTS, IPV6_DSTOPTS] {
            option(&socket, libc::IPPROTO_IPV6, name, &PADDING)?;
        }
        set_route6(&socket, target, SEGMENTS)?;
        Ok(Box::new(move || send_to(&socket, DATA, 0, at(target.friend6()))))
    })
    .root_only(),
    Vector::prepared("LSRR set before the filter, TCP connect", Place::BeforeAttach, |target| {
        let socket = stream(at(target.friend4()))?;
        option(&socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(LOOSE, target))?;
        Ok(Box::new(move || connect(&socket, at(target.friend4()))))
    })
    .root_only(),
    Vector::prepared("LSRR set before the filter, UDP sendto", Place::BeforeAttach, |target| {
        let socket = datagram(at(target.friend4()))?;
        option(&socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(LOOSE, target))?;
        Ok(Box::new(move || send_to(&socket, DATA, 0, at(target.friend4()))))
    })
    .root_only(),
];

/// A source route with one stop. The packet goes there first; where it is said to go stands behind.
fn route4(kind: u8, target: Target) -> Vec<u8> {
    let no_operation = 1;
    [&[no_operation, kind, 7, 4][..], &target.v4().octets()].concat()
}

fn tcp4(target: Target, kind: u8) -> Outcome {
    with_route4(&stream(at(target.friend4()))?, target, kind)
}

fn udp4(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend4()))?;
    with_route4(&socket, target, kind)?;
    send(&socket, DATA, 0)
}

fn with_route4(socket: &OwnedFd, target: Target, kind: u8) -> Outcome {
    option(socket, libc::IPPROTO_IP, IP_OPTIONS, &route4(kind, target))?;
    connect(socket, at(target.friend4()))
}

fn by_message4(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend4()))?;
    let control = [(libc::IPPROTO_IP, IP_RETOPTS, &route4(kind, target)[..])];
    send_message(&socket, Some(&at(target.friend4()).into()), &control)
}

/// A routing header whose first stop is the target.
pub fn route6(kind: u8, target: Target) -> Vec<u8> {
    let target = target.v6().octets();
    match kind {
        MOBILE => [&[0, 2, MOBILE, 1, 0, 0, 0, 0][..], &target].concat(),
        // The kernel writes the last stop, which is the first of the list.
        _ => [&[0, 4, SEGMENTS, 1, 1, 0, 0, 0][..], &[0; 16], &target].concat(),
    }
}

fn set_route6(socket: &OwnedFd, target: Target, kind: u8) -> Outcome {
    option(socket, libc::IPPROTO_IPV6, IPV6_RTHDR, &route6(kind, target))
}

fn tcp6(target: Target, kind: u8) -> Outcome {
    let socket = stream(at(target.friend6()))?;
    set_route6(&socket, target, kind)?;
    connect(&socket, at(target.friend6()))
}

fn udp6(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    set_route6(&socket, target, kind)?;
    connect(&socket, at(target.friend6()))?;
    send(&socket, DATA, 0)
}

fn after6(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    connect(&socket, at(target.friend6()))?;
    set_route6(&socket, target, kind)?;
    send(&socket, DATA, 0)
}

fn aside6(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    set_route6(&socket, target, kind)?;
    send_to(&socket, DATA, 0, at(target.friend6()))
}

fn by_message6(target: Target, name: i32, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    let control = [(libc::IPPROTO_IPV6, name, &route6(kind, target)[..])];
    send_message(&socket, Some(&at(target.friend6()).into()), &control)
}

fn connected6(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    connect(&socket, at(target.friend6()))?;
    send_message(&socket, None, &[(libc::IPPROTO_IPV6, IPV6_RTHDR, &route6(kind, target))])
}

fn by_packet_options(target: Target, kind: u8) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    let header = [(libc::IPPROTO_IPV6, IPV6_2292RTHDR, &route6(kind, target)[..])];
    option(&socket, libc::IPPROTO_IPV6, IPV6_2292PKTOPTIONS, &encode(&header))?;
    send_to(&socket, DATA, 0, at(target.friend6()))
}

/// A flow label carries options for the packets that carry the label.
fn by_flow_label(target: Target) -> Outcome {
    const IPV6_FLOWLABEL_MGR: i32 = 32;
    const IPV6_FLOWINFO_SEND: i32 = 33;
    const EXCLUSIVE: u8 = 1;
    let label = u32::from(target.number()).to_be_bytes();
    // A `struct in6_flowlabel_req` that gets the label, creating it.
    let mut request = [&target.friend6().octets()[..], &label, &[0, EXCLUSIVE]].concat();
    request.extend(1_u16.to_ne_bytes());
    request.resize(32, 0);
    request.extend(encode(&[(libc::IPPROTO_IPV6, IPV6_2292RTHDR, &route6(MOBILE, target))]));
    let socket = datagram(at(target.friend6()))?;
    option(&socket, libc::IPPROTO_IPV6, IPV6_FLOWLABEL_MGR, &request)?;
    number_option(&socket, libc::IPPROTO_IPV6, IPV6_FLOWINFO_SEND, 1)?;
    let mut to = Address::from(at(target.friend6()));
    to.0[4..8].copy_from_slice(&label);
    send_to(&socket, DATA, 0, to)
}
