//! Ways over TCP and what stands on it.

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

use crate::escape::{
    Outcome, Place, Vector,
    sys::{
        Address, DATA, connect, established, near_index, number_option, option, send, send_to, settle, socket, stream,
    },
    target::{PORT, Target, at},
    yard::NEAR,
};

const AF_SMC: i32 = 43;

pub const VECTORS: &[Vector] = &[
    Vector::new("TCP connect, IPv4", |target| dial(at(target.v4()))),
    Vector::new("TCP connect, IPv6", |target| dial(at(target.v6()))),
    Vector::new("TCP connect, IPv4-mapped", |target| dial(at(target.mapped()))),
    Vector::new("TCP connect, NAT64", |target| dial(at(target.nat64()))),
    Vector::new("TCP connect after a connect to another peer", connect_again),
    Vector::new("TCP connect after AF_UNSPEC dissolved another connection", connect_after_dissolving),
    Vector::new("TCP connect with a zone", |target| {
        dial(SocketAddr::V6(std::net::SocketAddrV6::new(target.link_local(), PORT, 0, near_index()?)))
    }),
    Vector::new("TCP connect to port 0", |target| dial(SocketAddr::new(target.v4().into(), 0))).only_refused(),
    Vector::new("TCP connect from a bound interface", |target| from_interface(at(target.v4()))),
    Vector::new("TCP connect to 127.0.0.0/8 by SO_BINDTODEVICE", |target| from_interface(at(target.loopback())))
        .only_refused(),
    Vector::new("TCP connect to 0.0.0.0", |_| dial(at(Ipv4Addr::UNSPECIFIED))).stays_here(),
    Vector::new("TCP connect to ::", |_| dial(at(Ipv6Addr::UNSPECIFIED))).stays_here(),
    Vector::new("TCP connect to 0.0.0.0 by SO_BINDTODEVICE", |_| from_interface(at(Ipv4Addr::UNSPECIFIED)))
        .stays_here(),
    Vector::new("TCP connect to :: by SO_BINDTODEVICE", |_| from_interface(at(Ipv6Addr::UNSPECIFIED))).stays_here(),
    Vector::new("TCP Fast Open by sendto, IPv4", |target| fast_open(at(target.v4()))),
    Vector::new("TCP Fast Open by sendto, IPv6", |target| fast_open(at(target.v6()))),
    Vector::new("TCP Fast Open by sendto, IPv4-mapped", |target| fast_open(at(target.mapped()))),
    Vector::new("TCP Fast Open by sendto, AF_UNSPEC", fast_open_without_family),
    Vector::new("TCP Fast Open by TCP_FASTOPEN_CONNECT, IPv4", |target| lazy_fast_open(at(target.v4()))),
    Vector::new("TCP Fast Open by TCP_FASTOPEN_CONNECT, IPv6", |target| lazy_fast_open(at(target.v6()))),
    Vector::new("TCP_REPAIR connect", repaired).root_only(),
    Vector::new("MPTCP connect, IPv4", |target| multipath(at(target.v4()))).needs("CONFIG_MPTCP"),
    Vector::new("MPTCP connect, IPv6", |target| multipath(at(target.v6()))).needs("CONFIG_MPTCP_IPV6"),
    Vector::new("MPTCP connect, IPv4-mapped", |target| multipath(at(target.mapped()))).needs("CONFIG_MPTCP_IPV6"),
    Vector::new("MPTCP Fast Open by sendto", multipath_fast_open).needs("Linux 6.2 with CONFIG_MPTCP"),
    Vector::new("MPTCP subflow to an address that the peer announces", subflow)
        .placed(Place::Announced)
        .needs("Linux 5.10 with CONFIG_MPTCP"),
    Vector::new("SMC connect", |target| other(AF_SMC, 0, target)).needs("CONFIG_SMC"),
    Vector::new("SCTP connect", |target| other(libc::AF_INET, libc::IPPROTO_SCTP, target)).needs("CONFIG_IP_SCTP"),
    Vector::new("SCTP sendto", sctp_send).needs("CONFIG_IP_SCTP"),
    Vector::new("DCCP connect", dccp).needs("CONFIG_IP_DCCP"),
];

fn dial(to: SocketAddr) -> Outcome {
    connect(&stream(to)?, to)
}

fn connect_again(target: Target) -> Outcome {
    let socket = stream(at(target.v4()))?;
    connect(&socket, at(target.friend4()))?;
    established(&socket)?;
    connect(&socket, Address::from(at(target.v4())).with_family(libc::AF_UNSPEC))?;
    connect(&socket, at(target.v4()))
}

fn connect_after_dissolving(target: Target) -> Outcome {
    let socket = stream(at(target.v6()))?;
    connect(&socket, at(target.friend6()))?;
    established(&socket)?;
    connect(&socket, Address::from(at(Ipv4Addr::UNSPECIFIED)).with_family(libc::AF_UNSPEC))?;
    connect(&socket, at(target.v6()))
}

/// Anybody may bind a socket to an interface that is bound to none yet.
fn from_interface(to: SocketAddr) -> Outcome {
    let socket = stream(to)?;
    option(&socket, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, NEAR.as_bytes())?;
    connect(&socket, to)
}

fn fast_open(to: SocketAddr) -> Outcome {
    send_to(&stream(to)?, DATA, libc::MSG_FASTOPEN, to)
}

fn fast_open_without_family(target: Target) -> Outcome {
    let socket = stream(at(target.v4()))?;
    let to = Address::from(at(target.v4()));
    // The kernel dissolves instead of connecting, then knows no peer: the second call is what could lead out.
    let first = send_to(&socket, DATA, libc::MSG_FASTOPEN, to.clone().with_family(libc::AF_UNSPEC));
    first.or_else(|_| send_to(&socket, DATA, libc::MSG_FASTOPEN, to))
}

fn lazy_fast_open(to: SocketAddr) -> Outcome {
    let socket = stream(to)?;
    number_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
    connect(&socket, to)?;
    // Without a cookie from an earlier connection the first call has sent the SYN already.
    match send(&socket, DATA, 0) {
        Err(step) if step.errno == libc::EINPROGRESS || step.errno == libc::EAGAIN => Ok(()),
        other => other,
    }
}

/// A connection that is declared to stand sends without a handshake.
fn repaired(target: Target) -> Outcome {
    let to = at(target.v4());
    let socket = stream(to)?;
    number_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 1)?;
    connect(&socket, to)?;
    number_option(&socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, 0)?;
    send(&socket, DATA, 0)
}

fn mptcp(to: SocketAddr) -> Outcome<OwnedFd> {
    let domain = crate::escape::sys::domain(to);
    socket(domain, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, libc::IPPROTO_MPTCP)
}

fn multipath(to: SocketAddr) -> Outcome {
    connect(&mptcp(to)?, to)
}

fn multipath_fast_open(target: Target) -> Outcome {
    let to = at(target.v4());
    send_to(&mptcp(to)?, DATA, libc::MSG_FASTOPEN, to)
}

/// The kernel opens further connections by itself.
fn subflow(target: Target) -> Outcome {
    let to = at(target.friend4());
    let socket = mptcp(to)?;
    connect(&socket, to)?;
    established(&socket)?;
    send(&socket, DATA, 0)?;
    settle();
    send(&socket, DATA, 0)?;
    settle();
    Ok(())
}

fn other(domain: i32, protocol: i32, target: Target) -> Outcome {
    let socket = socket(domain, libc::SOCK_STREAM | libc::SOCK_NONBLOCK, protocol)?;
    connect(&socket, at(target.v4()))
}

fn sctp_send(target: Target) -> Outcome {
    let socket = socket(libc::AF_INET, libc::SOCK_SEQPACKET | libc::SOCK_NONBLOCK, libc::IPPROTO_SCTP)?;
    send_to(&socket, DATA, 0, at(target.v4()))
}

fn dccp(target: Target) -> Outcome {
    const SOL_DCCP: i32 = 269;
    const DCCP_SOCKOPT_SERVICE: i32 = 2;
    let socket = socket(libc::AF_INET, libc::SOCK_DCCP | libc::SOCK_NONBLOCK, libc::IPPROTO_DCCP)?;
    number_option(&socket, SOL_DCCP, DCCP_SOCKOPT_SERVICE, 1)?;
    connect(&socket, at(target.v4()))
}
