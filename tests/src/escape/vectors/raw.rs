//! Ways over sockets of other kinds: raw, ping, packet, and those of other protocols.

use std::{net::Ipv4Addr, os::fd::OwnedFd};

use crate::escape::{
    Outcome, Step, Vector,
    netlink::{self, Route},
    sys::{Address, DATA, connect, near_index, number_option, option, send, send_message, send_to, socket},
    target::{NEAR4, NEAR6, PORT, Target, at},
    yard::NEAR,
};

/// A protocol number that nobody has.
const NO_PROTOCOL: i32 = 253;
const AF_RXRPC: i32 = 33;
const IPPROTO_L2TP: i32 = 115;

pub const VECTORS: &[Vector] = &[
    Vector::new("raw IPv4 socket, sendto", |target| {
        send_to(&raw4(NO_PROTOCOL)?, DATA, 0, portless(target.v4().into()))
    })
    .root_only(),
    Vector::new("raw IPv4 socket, connect and send", |target| {
        let socket = raw4(NO_PROTOCOL)?;
        connect(&socket, portless(target.v4().into()))?;
        send(&socket, DATA, 0)
    })
    .root_only(),
    Vector::new("raw IPv4 socket that forges UDP", |target| {
        send_to(&raw4(libc::IPPROTO_UDP)?, &udp(), 0, portless(target.v4().into()))
    })
    .root_only(),
    Vector::new("raw IPv4 socket with IP_HDRINCL", |target| {
        let socket = raw4(libc::IPPROTO_RAW)?;
        send_to(&socket, &ipv4(NEAR4, target.v4(), libc::IPPROTO_UDP, &udp()), 0, portless(target.v4().into()))
    })
    .root_only(),
    Vector::new("raw IPv4 socket with IP_HDRINCL, header and address differ", |target| {
        let socket = raw4(NO_PROTOCOL)?;
        number_option(&socket, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
        let packet = ipv4(NEAR4, target.v4(), libc::IPPROTO_UDP, &udp());
        send_to(&socket, &packet, 0, portless(target.friend4().into()))
    })
    .root_only(),
    Vector::new("raw IPv6 socket, sendto", |target| {
        send_to(&raw6(NO_PROTOCOL)?, DATA, 0, portless(target.v6().into()))
    })
    .root_only(),
    Vector::new("raw IPv6 socket with IPV6_HDRINCL", |target| {
        let socket = raw6(libc::IPPROTO_RAW)?;
        send_to(&socket, &ipv6(target), 0, portless(target.v6().into()))
    })
    .root_only(),
    Vector::new("ping socket, IPv4", |target| ping4(portless(target.v4().into()))),
    Vector::new("ping socket, IPv4, connected", |target| {
        let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?;
        connect(&socket, portless(target.v4().into()))?;
        send(&socket, &echo(8), 0)
    }),
    Vector::new("ping socket, IPv6", |target| {
        let socket = socket(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_ICMPV6)?;
        send_to(&socket, &echo(128), 0, portless(target.v6().into()))
    }),
    Vector::new("packet socket, SOCK_DGRAM", |target| {
        let socket = socket(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
        send_to(&socket, &ipv4(NEAR4, target.v4(), libc::IPPROTO_UDP, &udp()), 0, link_address()?)
    })
    .root_only(),
    Vector::new("packet socket, SOCK_RAW", |target| {
        let socket = socket(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
        let frame = [&[2; 12][..], &[8, 0], &ipv4(NEAR4, target.v4(), libc::IPPROTO_UDP, &udp())].concat();
        send_to(&socket, &frame, 0, link_address()?)
    })
    .root_only(),
    Vector::new("L2TP-IP socket", |target| {
        let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, IPPROTO_L2TP)?;
        send_to(&socket, DATA, 0, portless(target.v4().into()))
    })
    .needs("CONFIG_L2TP_IP"),
    Vector::new("PPPoE socket", pppoe).needs("CONFIG_PPPOE"),
    Vector::new("RxRPC call", rxrpc).needs("CONFIG_AF_RXRPC"),
    Vector::new("RDS datagram", rds).needs("CONFIG_RDS_TCP"),
    Vector::new("VXLAN tunnel whose remote is the target", tunnel).root_only().needs("CONFIG_VXLAN"),
];

fn raw4(protocol: i32) -> Outcome<OwnedFd> {
    socket(libc::AF_INET, libc::SOCK_RAW, protocol)
}

fn raw6(protocol: i32) -> Outcome<OwnedFd> {
    socket(libc::AF_INET6, libc::SOCK_RAW, protocol)
}

/// Raw sockets want port 0 where the kernel takes it for a protocol.
pub fn portless(address: std::net::IpAddr) -> Address {
    std::net::SocketAddr::new(address, 0).into()
}

fn ping4(to: Address) -> Outcome {
    send_to(&socket(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP)?, &echo(8), 0, to)
}

/// An echo request; the kernel sets its number and its checksum.
fn echo(kind: u8) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 0, 1][..], DATA].concat()
}

/// A UDP datagram without a checksum.
pub fn udp() -> Vec<u8> {
    let length = u16::try_from(8 + DATA.len()).expect("it is short");
    let fields = [PORT, PORT, length, 0].map(u16::to_be_bytes).concat();
    [&fields[..], DATA].concat()
}

/// An IPv4 packet with its checksum.
pub fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, protocol: i32, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).expect("it is short");
    let protocol = u8::try_from(protocol).expect("a protocol of IPv4 has 8 bits");
    let mut header = vec![0x45, 0];
    header.extend(length.to_be_bytes());
    header.extend([0, 0, 0, 0, 64, protocol, 0, 0]);
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum = checksum(&header).to_be_bytes();
    header[10..12].copy_from_slice(&sum);
    [&header[..], payload].concat()
}

/// The checksum of the internet protocols.
pub fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0)
}

/// An IPv6 packet without a header after its own.
fn ipv6(target: Target) -> Vec<u8> {
    let length = u16::try_from(DATA.len()).expect("it is short");
    let none = 59;
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([none, 64]);
    packet.extend(NEAR6.octets());
    packet.extend(target.v6().octets());
    packet.extend(DATA);
    packet
}

/// A `struct sockaddr_ll` of the interface to the far namespace.
fn link_address() -> Outcome<Address> {
    let mut bytes = Vec::new();
    bytes.extend(u16::try_from(libc::AF_PACKET).expect("a family has 16 bits").to_ne_bytes());
    bytes.extend(u16::try_from(libc::ETH_P_IP).expect("a protocol has 16 bits").to_be_bytes());
    bytes.extend(near_index()?.to_ne_bytes());
    bytes.extend([0, 0, 0, 6, 2, 2, 2, 2, 2, 2, 0, 0]);
    Ok(Address(bytes))
}

/// Sends frames to a hardware address; they carry the target's address as their contents.
fn pppoe(target: Target) -> Outcome {
    const AF_PPPOX: u16 = 24;
    let socket = socket(AF_PPPOX.into(), libc::SOCK_STREAM, 0)?;
    let mut peer = AF_PPPOX.to_ne_bytes().to_vec();
    peer.extend([0; 4]);
    peer.extend(target.number().to_be_bytes());
    peer.extend([2, 2, 2, 2, 2, 2]);
    peer.extend(NEAR.as_bytes());
    peer.resize(30, 0);
    connect(&socket, Address(peer))?;
    send(&socket, &target.v4().octets(), 0)
}

/// A socket of the kernel's own carries the call.
fn rxrpc(target: Target) -> Outcome {
    const SOL_RXRPC: i32 = 272;
    const RXRPC_USER_CALL_ID: i32 = 1;
    const SERVICE: u16 = 1;
    let socket = socket(AF_RXRPC, libc::SOCK_DGRAM, libc::AF_INET)?;
    let transport = Address::from(at(target.v4()));
    let mut to = Vec::new();
    to.extend(u16::try_from(AF_RXRPC).expect("a family has 16 bits").to_ne_bytes());
    to.extend(SERVICE.to_ne_bytes());
    to.extend(u16::try_from(libc::SOCK_DGRAM).expect("a kind has 16 bits").to_ne_bytes());
    to.extend(16_u16.to_ne_bytes());
    to.extend(&transport.0);
    to.resize(36, 0);
    let id = 1_u64.to_ne_bytes();
    send_message(&socket, Some(&Address(to)), &[(SOL_RXRPC, RXRPC_USER_CALL_ID, &id)])?;
    crate::escape::sys::settle();
    Ok(())
}

/// The kernel connects by itself, from no cgroup.
fn rds(target: Target) -> Outcome {
    const SOL_RDS: i32 = 276;
    const SO_RDS_TRANSPORT: i32 = 8;
    const RDS_TRANS_TCP: i32 = 2;
    let socket = socket(libc::AF_RDS, libc::SOCK_SEQPACKET, 0)?;
    number_option(&socket, SOL_RDS, SO_RDS_TRANSPORT, RDS_TRANS_TCP)?;
    crate::escape::sys::bind(&socket, at(NEAR4))?;
    send_to(&socket, DATA, 0, at(target.v4()))?;
    crate::escape::sys::settle();
    Ok(())
}

/// What an allowed address is sent goes to the remote of the tunnel, in a packet of the kernel's own.
fn tunnel(target: Target) -> Outcome {
    let (id, failed) = (std::process::id(), |error: std::io::Error| Step::new("rtnetlink", &error));
    let name = format!("tunnel{id}");
    netlink::tunnel(&name, id, target.v4()).map_err(failed)?;
    let index = netlink::index(&name).map_err(failed)?;
    netlink::set_up(index).map_err(failed)?;
    netlink::route(target.friend4().into(), 32, Route::Out(index), index).map_err(failed)?;
    let socket = crate::escape::sys::datagram(at(target.friend4()))?;
    option(&socket, libc::SOL_SOCKET, libc::SO_BROADCAST, &1_i32.to_ne_bytes())?;
    send_to(&socket, DATA, 0, at(target.friend4()))?;
    netlink::remove(index).map_err(failed)
}
