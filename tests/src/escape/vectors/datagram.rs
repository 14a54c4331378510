//! Ways over UDP.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::OwnedFd,
};

use crate::escape::{
    Outcome, Vector,
    sys::{
        Address, DATA, connect, datagram, domain, near_index, number_option, option, send, send_message, send_to,
        send_two_messages, socket,
    },
    target::{NETWORK4, PORT, Target, at},
    yard::NEAR,
};

pub const VECTORS: &[Vector] = &[
    Vector::new("UDP connect and send, IPv4", |target| connected(at(target.v4()))),
    Vector::new("UDP connect and send, IPv6", |target| connected(at(target.v6()))),
    Vector::new("UDP connect and send, IPv4-mapped", |target| connected(at(target.mapped()))),
    Vector::new("UDP connect and send, NAT64", |target| connected(at(target.nat64()))),
    Vector::new("UDP connect and send, IPv4 address on an IPv6 socket", |target| {
        let socket = datagram(at(target.v6()))?;
        connect(&socket, at(target.v4()))?;
        send(&socket, DATA, 0)
    }),
    Vector::new("UDP sendto, IPv4", |target| sent(at(target.v4()))),
    Vector::new("UDP sendto, IPv6", |target| sent(at(target.v6()))),
    Vector::new("UDP sendto, IPv4-mapped", |target| sent(at(target.mapped()))),
    Vector::new("UDP sendto, NAT64", |target| sent(at(target.nat64()))),
    Vector::new("UDP sendto, IPv4 address on an IPv6 socket", |target| {
        send_to(&datagram(at(target.v6()))?, DATA, 0, at(target.v4()))
    }),
    Vector::new("UDP sendto, AF_UNSPEC", |target| {
        let to = Address::from(at(target.v4())).with_family(libc::AF_UNSPEC);
        send_to(&datagram(at(target.v4()))?, DATA, 0, to)
    }),
    Vector::new("UDP sendto with an address longer than it needs", long_address),
    Vector::new("UDP sendmsg, IPv4", |target| message(at(target.v4()))),
    Vector::new("UDP sendmsg, IPv6", |target| message(at(target.v6()))),
    Vector::new("UDP sendmmsg, first to another peer", |target| {
        let to = [at(target.friend4()), at(target.v4())].map(Address::from);
        send_two_messages(&datagram(at(target.v4()))?, &to)
    }),
    Vector::new("UDP sendto another peer than the connected one, IPv4", |target| {
        aside(at(target.friend4()), at(target.v4()))
    }),
    Vector::new("UDP sendto another peer than the connected one, IPv6", |target| {
        aside(at(target.friend6()), at(target.v6()))
    }),
    Vector::new("UDP sendto another peer than the connected one, AF_UNSPEC", |target| {
        let socket = datagram(at(target.v4()))?;
        connect(&socket, at(target.friend4()))?;
        send_to(&socket, DATA, 0, Address::from(at(target.v4())).with_family(libc::AF_UNSPEC))
    }),
    Vector::new("UDP connect to another peer and again, IPv4", |target| again(at(target.friend4()), at(target.v4()))),
    Vector::new("UDP connect to another peer and again, IPv6", |target| again(at(target.friend6()), at(target.v6()))),
    Vector::new("UDP connect after AF_UNSPEC dissolved another connection", after_dissolving),
    Vector::new("UDP connected, sends with IP_PKTINFO", |target| with_interface(at(target.v4()))),
    Vector::new("UDP connected, sends with IPV6_PKTINFO", with_interface6),
    Vector::new("UDP sendmsg with IP_PKTINFO", |target| {
        let information = packet_information(near_index()?, Ipv4Addr::UNSPECIFIED);
        let control = [(libc::IPPROTO_IP, libc::IP_PKTINFO, &information[..])];
        send_message(&datagram(at(target.v4()))?, Some(&at(target.v4()).into()), &control)
    }),
    Vector::new("UDP corked by MSG_MORE, flushed to another peer", |target| {
        let socket = datagram(at(target.v4()))?;
        send_to(&socket, DATA, libc::MSG_MORE, at(target.v4()))?;
        send_to(&socket, DATA, 0, at(target.friend4()))
    }),
    Vector::new("UDP corked by UDP_CORK, flushed by the option", |target| corked(at(target.v4()))),
    Vector::new("UDP corked by UDP_CORK, flushed by the option, IPv6", |target| corked(at(target.v6()))),
    Vector::new("UDP corked by MSG_MORE on an IPv6 socket, changes family", |target| {
        let socket = datagram(at(target.v6()))?;
        send_to(&socket, DATA, libc::MSG_MORE, at(target.mapped()))?;
        send_to(&socket, DATA, 0, at(target.friend6()))
    }),
    Vector::new("UDP corked for another peer, then connected", corked_then_connected),
    Vector::new("UDP sendto port 0 of a connected socket", |target| {
        let to = SocketAddr::new(target.v4().into(), 0);
        connected(to)
    })
    .only_refused(),
    Vector::new("UDP sendto with a zone", |target| {
        sent(SocketAddrV6::new(target.link_local(), PORT, 0, near_index()?).into())
    }),
    Vector::new("UDP connect and send with a zone", |target| {
        connected(SocketAddrV6::new(target.link_local(), PORT, 0, near_index()?).into())
    }),
    Vector::new("UDP sendto a multicast group, IPv4", |target| sent(at(target.group4()))),
    Vector::new("UDP connect and send to a multicast group, IPv4", |target| connected(at(target.group4()))),
    Vector::new("UDP sendto a multicast group, IPv6", |target| {
        sent(SocketAddrV6::new(target.group6(), PORT, 0, near_index()?).into())
    }),
    Vector::new("UDP connect and send to a multicast group, IPv6", |target| {
        connected(SocketAddrV6::new(target.group6(), PORT, 0, near_index()?).into())
    }),
    Vector::new("UDP broadcast to every host", |target| broadcast(target, Ipv4Addr::BROADCAST)).only_refused(),
    Vector::new("UDP broadcast to the network", |target| broadcast(target, NETWORK4)).only_refused(),
    Vector::new("UDP to 127.0.0.0/8 by SO_BINDTODEVICE", |target| {
        let socket = datagram(at(target.loopback()))?;
        option(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, NEAR.as_bytes())?;
        send_to(&socket, DATA, 0, at(target.loopback()))
    })
    .only_refused(),
    Vector::new("UDP to 127.0.0.0/8 by IP_UNICAST_IF", |target| {
        let socket = datagram(at(target.loopback()))?;
        option(&socket, libc::IPPROTO_IP, libc::IP_UNICAST_IF, &near_index()?.to_be_bytes())?;
        send_to(&socket, DATA, 0, at(target.loopback()))
    })
    .only_refused(),
    Vector::new("UDP to 127.0.0.0/8 by IP_PKTINFO", |target| {
        let information = packet_information(near_index()?, Ipv4Addr::UNSPECIFIED);
        let control = [(libc::IPPROTO_IP, libc::IP_PKTINFO, &information[..])];
        send_message(&datagram(at(target.loopback()))?, Some(&at(target.loopback()).into()), &control)
    })
    .only_refused(),
    Vector::new("UDP to ::ffff:127.0.0.0/104 by SO_BINDTODEVICE", |target| {
        let to = at(target.loopback().to_ipv6_mapped());
        let socket = datagram(to)?;
        option(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, NEAR.as_bytes())?;
        send_to(&socket, DATA, 0, to)
    })
    .only_refused(),
    Vector::new("UDP to ::1 by SO_BINDTODEVICE", |target| {
        let to = at(Ipv6Addr::LOCALHOST);
        let socket = datagram(to)?;
        option(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, NEAR.as_bytes())?;
        send_to(&socket, &target.v6().octets(), 0, to)
    })
    .only_refused(),
    Vector::new("UDP connect after IPV6_ADDRFORM", |target| {
        let socket = datagram(at(target.v6()))?;
        connect(&socket, at(target.friend4().to_ipv6_mapped()))?;
        number_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_ADDRFORM, libc::AF_INET)?;
        connect(&socket, at(target.v4()))?;
        send(&socket, DATA, 0)
    }),
    Vector::new("UDP sendto after IPV6_ADDRFORM", |target| {
        let socket = datagram(at(target.v6()))?;
        connect(&socket, at(target.friend4().to_ipv6_mapped()))?;
        number_option(&socket, libc::IPPROTO_IPV6, libc::IPV6_ADDRFORM, libc::AF_INET)?;
        send_to(&socket, DATA, 0, at(target.v4()))
    }),
    Vector::new("UDP to 0.0.0.0", |_| sent(at(Ipv4Addr::UNSPECIFIED))).stays_here(),
    Vector::new("UDP to ::", |_| sent(at(Ipv6Addr::UNSPECIFIED))).stays_here(),
    Vector::new("UDP-Lite sendto, IPv4", |target| lite(at(target.v4()))).needs("UDP-Lite, which Linux 7 lacks"),
    Vector::new("UDP-Lite sendto, IPv6", |target| lite(at(target.v6()))).needs("UDP-Lite, which Linux 7 lacks"),
    Vector::new("UDP-Lite connect and send, IPv4", |target| lite_connected(at(target.v4())))
        .needs("UDP-Lite, which Linux 7 lacks"),
    Vector::new("UDP-Lite connect and send, IPv6", |target| lite_connected(at(target.v6())))
        .needs("UDP-Lite, which Linux 7 lacks"),
];

fn connected(to: SocketAddr) -> Outcome {
    let socket = datagram(to)?;
    connect(&socket, to)?;
    send(&socket, DATA, 0)
}

fn sent(to: SocketAddr) -> Outcome {
    send_to(&datagram(to)?, DATA, 0, to)
}

fn long_address(target: Target) -> Outcome {
    let mut to = Address::from(at(target.v4()));
    to.0.resize(128, 0);
    send_to(&datagram(at(target.v4()))?, DATA, 0, to)
}

fn message(to: SocketAddr) -> Outcome {
    send_message(&datagram(to)?, Some(&to.into()), &[])
}

fn aside(friend: SocketAddr, to: SocketAddr) -> Outcome {
    let socket = datagram(to)?;
    connect(&socket, friend)?;
    send_to(&socket, DATA, 0, to)
}

fn again(friend: SocketAddr, to: SocketAddr) -> Outcome {
    let socket = datagram(to)?;
    connect(&socket, friend)?;
    connect(&socket, to)?;
    send(&socket, DATA, 0)
}

fn after_dissolving(target: Target) -> Outcome {
    let socket = datagram(at(target.v4()))?;
    connect(&socket, at(target.friend4()))?;
    connect(&socket, Address::from(at(target.v4())).with_family(libc::AF_UNSPEC))?;
    connect(&socket, at(target.v4()))?;
    send(&socket, DATA, 0)
}

/// A `struct in_pktinfo`.
fn packet_information(index: u32, source: Ipv4Addr) -> Vec<u8> {
    [index.to_ne_bytes(), source.octets(), [0; 4]].concat()
}

/// The kernel asks the hook for `sendmsg` here, with an address of zeros.
fn with_interface(to: SocketAddr) -> Outcome {
    let socket = datagram(to)?;
    connect(&socket, to)?;
    let information = packet_information(near_index()?, Ipv4Addr::UNSPECIFIED);
    send_message(&socket, None, &[(libc::IPPROTO_IP, libc::IP_PKTINFO, &information)])
}

fn with_interface6(target: Target) -> Outcome {
    let socket = datagram(at(target.v6()))?;
    connect(&socket, at(target.v6()))?;
    let information = [&[0; 16][..], &near_index()?.to_ne_bytes()].concat();
    send_message(&socket, None, &[(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &information)])
}

fn corked(to: SocketAddr) -> Outcome {
    let socket = datagram(to)?;
    number_option(&socket, libc::IPPROTO_UDP, libc::UDP_CORK, 1)?;
    send_to(&socket, DATA, 0, to)?;
    number_option(&socket, libc::IPPROTO_UDP, libc::UDP_CORK, 0)
}

/// The kernel sends what was corked to the peer it was corked for, and the rest to the new one.
fn corked_then_connected(target: Target) -> Outcome {
    let socket = datagram(at(target.v4()))?;
    send_to(&socket, DATA, libc::MSG_MORE, at(target.friend4()))?;
    connect(&socket, at(target.v4()))?;
    send(&socket, DATA, 0)?;
    send(&socket, DATA, 0)
}

/// The address is that of nobody: the datagram carries the target's as its contents.
fn broadcast(target: Target, to: Ipv4Addr) -> Outcome {
    let socket = datagram(at(to))?;
    number_option(&socket, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
    send_to(&socket, &target.v4().octets(), 0, at(to))
}

fn lite_socket(to: SocketAddr) -> Outcome<OwnedFd> {
    socket(domain(to), libc::SOCK_DGRAM, libc::IPPROTO_UDPLITE)
}

fn lite(to: SocketAddr) -> Outcome {
    send_to(&lite_socket(to)?, DATA, 0, to)
}

fn lite_connected(to: SocketAddr) -> Outcome {
    let socket = lite_socket(to)?;
    connect(&socket, to)?;
    send(&socket, DATA, 0)
}
