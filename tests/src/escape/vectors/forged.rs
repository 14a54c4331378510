//! Ways by a forged source: the process sends to its own host as if from the target, and the kernel, or a socket that
//! may answer whom it heard from, answers to the target. And ways by reports that the kernel sends for the process.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::escape::{
    Outcome, Place, Step, Vector,
    sys::{
        self, DATA, bind, connect, datagram, listen, near_index, number_option, option, send_to, settle, socket, stream,
    },
    target::{NEAR4, NEAR6, PORT, Target, at},
    vectors::raw::{checksum, ipv4, portless, udp},
};

const IPV6_FREEBIND: i32 = 78;
const IPV6_TRANSPARENT: i32 = 75;
const IP_FREEBIND: i32 = 15;
const IP_TRANSPARENT: i32 = 19;
/// Sets what is set anyway.
const NO_OPTION: (i32, i32) = (libc::SOL_SOCKET, libc::SO_REUSEADDR);
/// Where the process itself listens.
const OWN_PORT: u16 = 4001;
/// Where nobody listens.
const CLOSED_PORT: u16 = 4002;

pub const VECTORS: &[Vector] = &[
    Vector::new("answer of a UDP socket to a source forged by IPV6_FREEBIND", |target| {
        answer(at(target.v6()), own6(), (libc::IPPROTO_IPV6, IPV6_FREEBIND))
    }),
    Vector::new("answer of a UDP socket to a source forged by IP_TRANSPARENT", |target| {
        answer(at(target.v4()), own4(), (libc::IPPROTO_IP, IP_TRANSPARENT))
    })
    .root_only(),
    Vector::new("answer of a UDP socket to a source forged by a raw socket", raw_then_answer).root_only(),
    Vector::new("ICMPv6 error to a source forged by IPV6_FREEBIND", |target| {
        let socket = forging(at(target.v6()), libc::SOCK_DGRAM, (libc::IPPROTO_IPV6, IPV6_FREEBIND))?;
        send_to(&socket, DATA, 0, closed6())
    }),
    Vector::new("ICMPv6 error to a source forged by IP_FREEBIND on an IPv6 socket", |target| {
        let socket = forging(at(target.v6()), libc::SOCK_DGRAM, (libc::IPPROTO_IP, IP_FREEBIND))?;
        send_to(&socket, DATA, 0, closed6())
    }),
    Vector::new("ICMPv6 error to a source forged by IPV6_TRANSPARENT", |target| {
        let socket = forging(at(target.v6()), libc::SOCK_DGRAM, (libc::IPPROTO_IPV6, IPV6_TRANSPARENT))?;
        send_to(&socket, DATA, 0, closed6())
    })
    .root_only(),
    Vector::new("ICMPv6 error to a source forged by IPV6_PKTINFO", |target| {
        let socket = datagram(at(target.v6()))?;
        number_option(&socket, libc::IPPROTO_IPV6, IPV6_FREEBIND, 1)?;
        let source = [&target.v6().octets()[..], &[0; 4]].concat();
        let control = [(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &source[..])];
        sys::send_message(&socket, Some(&closed6().into()), &control)
    }),
    Vector::new("ICMPv6 echo reply to a source forged by IPV6_FREEBIND", |target| {
        let socket = socket(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6)?;
        number_option(&socket, libc::IPPROTO_IPV6, IPV6_FREEBIND, 1)?;
        bind(&socket, portless(target.v6().into()))?;
        send_to(&socket, &[128, 0, 0, 0, 0, 0, 0, 1], 0, portless(Ipv6Addr::LOCALHOST.into()))
    }),
    Vector::new("ICMP error to a source forged by IP_TRANSPARENT", |target| {
        let socket = forging(at(target.v4()), libc::SOCK_DGRAM, (libc::IPPROTO_IP, IP_TRANSPARENT))?;
        send_to(&socket, DATA, 0, SocketAddr::new(NEAR4.into(), CLOSED_PORT))
    })
    .root_only(),
    Vector::new("ICMP error to a source forged by a raw socket", |target| {
        raw(target, libc::IPPROTO_UDP, &closed_udp())
    })
    .root_only(),
    Vector::new("ICMP echo reply to a source forged by a raw socket", |target| {
        raw(target, libc::IPPROTO_ICMP, &echo())
    })
    .root_only(),
    Vector::new("TCP SYN-ACK to a source forged by IPV6_FREEBIND", |target| {
        let listener = stream(own6())?;
        bind(&listener, own6())?;
        listen(&listener)?;
        let socket = forging(at(target.v6()), libc::SOCK_STREAM, (libc::IPPROTO_IPV6, IPV6_FREEBIND))?;
        connect(&socket, own6())
    }),
    Vector::new("TCP reset to a source forged by IPV6_FREEBIND", |target| {
        let socket = forging(at(target.v6()), libc::SOCK_STREAM, (libc::IPPROTO_IPV6, IPV6_FREEBIND))?;
        connect(&socket, closed6())
    }),
    Vector::new("TCP SYN-ACK from an address of this host to a source forged by IPV6_FREEBIND", |target| {
        let own = SocketAddr::new(NEAR6.into(), OWN_PORT);
        let listener = stream(own)?;
        bind(&listener, own)?;
        listen(&listener)?;
        let socket = forging(at(target.v6()), libc::SOCK_STREAM, (libc::IPPROTO_IPV6, IPV6_FREEBIND))?;
        connect(&socket, own)
    }),
    Vector::new("ICMPv6 error from an address of this host to a source forged by IPV6_FREEBIND", |target| {
        let socket = forging(at(target.v6()), libc::SOCK_DGRAM, (libc::IPPROTO_IPV6, IPV6_FREEBIND))?;
        send_to(&socket, DATA, 0, SocketAddr::new(NEAR6.into(), CLOSED_PORT))
    }),
    Vector::new("TCP SYN-ACK to a source forged by IP_TRANSPARENT", |target| {
        let own = SocketAddr::new(NEAR4.into(), OWN_PORT);
        let listener = stream(own)?;
        bind(&listener, own)?;
        listen(&listener)?;
        let socket = forging(at(target.v4()), libc::SOCK_STREAM, (libc::IPPROTO_IP, IP_TRANSPARENT))?;
        connect(&socket, own)
    })
    .root_only(),
    Vector::new("where ip_nonlocal_bind is set: answer of a UDP socket to a forged source", |target| {
        answer(at(target.v6()), own6(), NO_OPTION)
    })
    .placed(Place::Elsewhere),
    Vector::new("where ip_nonlocal_bind is set: ICMPv6 error to a forged source", |target| {
        let socket = forging(at(target.v6()), libc::SOCK_DGRAM, NO_OPTION)?;
        send_to(&socket, DATA, 0, closed6())
    })
    .placed(Place::Elsewhere),
    Vector::new("where ip_nonlocal_bind is set: TCP SYN-ACK to a forged source", |target| {
        let listener = stream(own6())?;
        bind(&listener, own6())?;
        listen(&listener)?;
        connect(&forging(at(target.v6()), libc::SOCK_STREAM, NO_OPTION)?, own6())
    })
    .placed(Place::Elsewhere),
    Vector::new("where ip_nonlocal_bind is set: TCP SYN-ACK from this host to a forged source", |target| {
        let own = SocketAddr::new(NEAR6.into(), OWN_PORT);
        let listener = stream(own)?;
        bind(&listener, own)?;
        listen(&listener)?;
        connect(&forging(at(target.v6()), libc::SOCK_STREAM, NO_OPTION)?, own)
    })
    .placed(Place::Elsewhere),
    Vector::prepared("source bound before the filter by IPV6_FREEBIND, ICMPv6 error", Place::BeforeAttach, |target| {
        let socket = forging(at(target.v6()), libc::SOCK_DGRAM, (libc::IPPROTO_IPV6, IPV6_FREEBIND))?;
        Ok(Box::new(move || send_to(&socket, DATA, 0, closed6())))
    }),
    Vector::new("IGMP report of a membership", |target| {
        let request = [target.group4().octets(), [0; 4], near_index()?.to_ne_bytes()].concat();
        report(at(target.group4()), libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, &request)
    })
    .only_refused(),
    Vector::new("IGMP report of a membership for a source", |target| {
        let request = [target.friend_group4().octets(), NEAR4.octets(), target.v4().octets()];
        report(at(target.v4()), libc::IPPROTO_IP, libc::IP_ADD_SOURCE_MEMBERSHIP, &request.concat())
    })
    .only_refused(),
    Vector::new("MLD report of a membership", |target| {
        let request = [&target.group6().octets()[..], &near_index()?.to_ne_bytes()].concat();
        report(at(target.group6()), libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, &request)
    })
    .only_refused(),
];

const fn own6() -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), OWN_PORT)
}

const fn own4() -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), OWN_PORT)
}

const fn closed6() -> SocketAddr {
    SocketAddr::new(std::net::IpAddr::V6(Ipv6Addr::LOCALHOST), CLOSED_PORT)
}

/// A socket whose own address is that of another host.
fn forging(source: SocketAddr, kind: i32, (level, name): (i32, i32)) -> Outcome<std::os::fd::OwnedFd> {
    let socket = socket(sys::domain(source), kind | libc::SOCK_NONBLOCK, 0)?;
    number_option(&socket, level, name, 1)?;
    bind(&socket, source)?;
    Ok(socket)
}

/// A server that was made to hear from the target answers it.
fn answer(target: SocketAddr, own: SocketAddr, option: (i32, i32)) -> Outcome {
    let server = datagram(own)?;
    let unspecified = if own.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    bind(&server, SocketAddr::new(unspecified, OWN_PORT))?;
    send_to(&forging(target, libc::SOCK_DGRAM, option)?, DATA, 0, own)?;
    heard(&server, target)
}

fn heard(server: &std::os::fd::OwnedFd, target: SocketAddr) -> Outcome {
    let from = sys::receive_from(server)?;
    if from != target {
        return Err(Step { call: "recvfrom", errno: libc::EADDRNOTAVAIL });
    }
    send_to(server, DATA, 0, target)
}

fn raw_then_answer(target: Target) -> Outcome {
    let server = datagram(own4())?;
    bind(&server, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), PORT))?;
    raw(target, libc::IPPROTO_UDP, &udp())?;
    heard(&server, at(target.v4()))
}

/// A packet to this host as if from the target. The kernel never answers from a loopback address of IPv4.
fn raw(target: Target, protocol: i32, payload: &[u8]) -> Outcome {
    let socket = socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let packet = ipv4(target.v4(), NEAR4, protocol, payload);
    send_to(&socket, &packet, 0, portless(NEAR4.into()))
}

fn closed_udp() -> Vec<u8> {
    let mut datagram = udp();
    datagram[2..4].copy_from_slice(&CLOSED_PORT.to_be_bytes());
    datagram
}

fn echo() -> Vec<u8> {
    let mut request = vec![8, 0, 0, 0, 0, 1, 0, 1];
    let sum = checksum(&request).to_be_bytes();
    request[2..4].copy_from_slice(&sum);
    request
}

/// The kernel tells routers of it a few milliseconds later.
fn report(of: SocketAddr, level: i32, name: i32, request: &[u8]) -> Outcome {
    let socket = datagram(of)?;
    option(&socket, level, name, request)?;
    settle();
    Ok(())
}
