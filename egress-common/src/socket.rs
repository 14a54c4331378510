//! What kinds of socket there are, as far as a policy can name them.

use crate::{Protocol, coded_enum};

coded_enum! {
    /// A kind of socket that can send something off the host.
    pub enum SocketKind {
        /// TCP and MPTCP: rules judge their destinations.
        Tcp = 0 => "TCP",
        /// UDP: rules judge its destinations.
        Udp = 1 => "UDP",
        /// Ping sockets: ICMP echo requests, whose kernel side is neither raw nor privileged.
        Icmp = 2 => "ICMP",
        /// SCTP.
        Sctp = 3 => "SCTP",
        /// UDP-Lite.
        UdpLite = 4 => "UDPLITE",
        /// Raw sockets of any protocol of IP.
        Raw = 5 => "RAW",
        /// Anything else.
        Other = 6 => "other",
        /// `AF_PACKET`: whole frames, on any interface.
        Packet = 7 => "PACKET",
        /// `AF_VSOCK`: between a virtual machine and its host.
        Vsock = 8 => "VSOCK",
    }
}

/// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_RAW` and `SOCK_SEQPACKET` of `linux/net.h`.
const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const SOCK_RAW: u32 = 3;
const SOCK_SEQPACKET: u32 = 5;

/// Families of `linux/socket.h`.
mod family {
    pub(super) const UNSPEC: u32 = 0;
    pub(super) const UNIX: u32 = 1;
    pub(super) const INET: u32 = 2;
    pub(super) const INET6: u32 = 10;
    pub(super) const KEY: u32 = 15;
    pub(super) const NETLINK: u32 = 16;
    pub(super) const PACKET: u32 = 17;
    pub(super) const ALG: u32 = 38;
    pub(super) const VSOCK: u32 = 40;
    pub(super) const KCM: u32 = 41;
    pub(super) const SMC: u32 = 43;
}

impl SocketKind {
    /// From the family, where it says enough. `None` if it is a family of IP, one whose sockets stay on the host, or one that
    /// sends by a TCP connection, which is judged as such (`net/smc`, `net/kcm`).
    #[inline(always)]
    pub const fn of_family(family: u32) -> Option<Self> {
        match family {
            family::PACKET => Some(Self::Packet),
            family::VSOCK => Some(Self::Vsock),
            other => {
                if is_judged_or_stays(other) {
                    None
                } else {
                    Some(Self::Other)
                }
            }
        }
    }

    /// Of `AF_INET` and `AF_INET6`, from `sk_type` and the protocol.
    #[inline(always)]
    pub const fn new(kernel_type: u32, protocol: Protocol) -> Self {
        match (kernel_type, Self::of(protocol)) {
            (SOCK_RAW, _) => Self::Raw,
            (SOCK_STREAM, kind @ (Self::Tcp | Self::Sctp))
            | (SOCK_SEQPACKET, kind @ Self::Sctp)
            | (SOCK_DGRAM, kind @ (Self::Udp | Self::Icmp | Self::UdpLite)) => kind,
            _ => Self::Other,
        }
    }

    /// What a socket of a protocol is, if it is not raw.
    #[inline(always)]
    pub const fn of(protocol: Protocol) -> Self {
        match protocol.number() {
            // `IPPROTO_TCP` and so on of `linux/in.h`.
            6 => Self::Tcp,
            17 => Self::Udp,
            1 | 58 => Self::Icmp,
            132 => Self::Sctp,
            136 => Self::UdpLite,
            _ => Self::Other,
        }
    }
}

#[inline(always)]
const fn is_judged_or_stays(family: u32) -> bool {
    let is_judged = matches!(family, family::UNSPEC | family::INET | family::INET6 | family::KCM | family::SMC);
    is_judged || matches!(family, family::UNIX | family::KEY | family::NETLINK | family::ALG)
}

/// A set of [`SocketKind`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketKinds(u16);

impl SocketKinds {
    /// From a layout's field.
    #[inline(always)]
    pub const fn from_field(field: u16) -> Self {
        Self(field)
    }

    /// As a layout's field: one bit for each.
    pub const fn field(self) -> u16 {
        self.0
    }

    /// With one more.
    #[must_use]
    pub const fn with(self, kind: SocketKind) -> Self {
        Self(self.0 | 1 << kind.code())
    }

    /// Whether a kind is one of these.
    #[inline(always)]
    pub const fn contains(self, kind: SocketKind) -> bool {
        self.0 & (1 << kind.code()) != 0
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn only_what_the_hooks_see_the_destinations_of_counts_as_tcp_or_udp() {
        let kind = |kernel_type, protocol| SocketKind::new(kernel_type, Protocol::from_kernel(protocol));
        assert_eq!(kind(SOCK_STREAM, 6), SocketKind::Tcp);
        assert_eq!(kind(SOCK_STREAM, 262), SocketKind::Tcp);
        assert_eq!(kind(SOCK_DGRAM, 17), SocketKind::Udp);
        for (kernel_type, protocol) in [(SOCK_RAW, 6), (SOCK_RAW, 17), (SOCK_RAW, 255), (SOCK_RAW, 1)] {
            assert_eq!(kind(kernel_type, protocol), SocketKind::Raw);
        }
        // UDP over a stream, SMC, L2TP over IP, DCCP, and what is to come.
        for (kernel_type, protocol) in [(SOCK_STREAM, 17), (SOCK_STREAM, 256), (SOCK_DGRAM, 115), (6, 33), (9, 6)] {
            assert_eq!(kind(kernel_type, protocol), SocketKind::Other, "{kernel_type} {protocol}");
        }
        assert_eq!(kind(SOCK_DGRAM, 1), SocketKind::Icmp);
        assert_eq!(kind(SOCK_DGRAM, 58), SocketKind::Icmp);
        assert_eq!(kind(SOCK_SEQPACKET, 132), SocketKind::Sctp);
        assert_eq!(kind(SOCK_DGRAM, 136), SocketKind::UdpLite);
    }

    #[test]
    fn other_families_are_ways_off_the_host_unless_they_are_known_to_be_none() {
        assert_eq!(SocketKind::of_family(17), Some(SocketKind::Packet));
        assert_eq!(SocketKind::of_family(40), Some(SocketKind::Vsock));
        let passes: std::vec::Vec<u32> = (0..=256).filter(|&family| SocketKind::of_family(family).is_none()).collect();
        assert_eq!(passes, [0, 1, 2, 10, 15, 16, 38, 41, 43]);
        // AF_RDS, AF_PPPOX, AF_TIPC, AF_RXRPC, AF_XDP.
        for family in [21, 24, 30, 33, 44] {
            assert_eq!(SocketKind::of_family(family), Some(SocketKind::Other), "{family}");
        }
    }

    #[test]
    fn a_set_holds_what_was_put_in() {
        let set = SocketKinds::default().with(SocketKind::Raw).with(SocketKind::Icmp);
        for &kind in SocketKind::ALL {
            let is_in = matches!(kind, SocketKind::Raw | SocketKind::Icmp);
            assert_eq!(SocketKinds::from_field(set.field()).contains(kind), is_in, "{kind:?}");
        }
    }
}
