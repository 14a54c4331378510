//! What kinds of socket there are, as far as a policy can name them.

use crate::{Protocol, coded_enum};

coded_enum! {
    /// A kind of socket of `AF_INET` or `AF_INET6`.
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
        /// Raw sockets of any protocol.
        Raw = 5 => "RAW",
        /// Anything else.
        Other = 6 => "other",
    }
}

/// `SOCK_STREAM`, `SOCK_DGRAM`, `SOCK_RAW` and `SOCK_SEQPACKET` of `linux/net.h`.
const SOCK_STREAM: u32 = 1;
const SOCK_DGRAM: u32 = 2;
const SOCK_RAW: u32 = 3;
const SOCK_SEQPACKET: u32 = 5;

impl SocketKind {
    /// From `sk_type` and the protocol.
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

/// A set of [`SocketKind`]s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SocketKinds(u8);

impl SocketKinds {
    /// From a layout's field.
    #[inline(always)]
    pub const fn from_field(field: u8) -> Self {
        Self(field)
    }

    /// As a layout's field: one bit for each.
    pub const fn field(self) -> u8 {
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
    fn a_set_holds_what_was_put_in() {
        let set = SocketKinds::default().with(SocketKind::Raw).with(SocketKind::Icmp);
        for &kind in SocketKind::ALL {
            let is_in = matches!(kind, SocketKind::Raw | SocketKind::Icmp);
            assert_eq!(SocketKinds::from_field(set.field()).contains(kind), is_in, "{kind:?}");
        }
    }
}
