//! The question: who wants to reach what.

use crate::{Address, Place, coded_enum};

coded_enum! {
    /// A kernel hook, and the name of its program.
    pub enum Hook {
        /// `cgroup/connect4`.
        Connect4 = 0 => "connect4",
        /// `cgroup/connect6`.
        Connect6 = 1 => "connect6",
        /// `cgroup/sendmsg4`.
        Sendmsg4 = 2 => "sendmsg4",
        /// `cgroup/sendmsg6`.
        Sendmsg6 = 3 => "sendmsg6",
        /// `cgroup/sock_create`.
        SockCreate = 4 => "sock_create",
        /// `cgroup/setsockopt`.
        Setsockopt = 5 => "setsockopt",
        /// `cgroup/recvmsg4`: remembers, and judges nothing.
        Recvmsg4 = 6 => "recvmsg4",
        /// `cgroup/recvmsg6`: remembers, and judges nothing.
        Recvmsg6 = 7 => "recvmsg6",
        /// `cgroup_skb/egress`: the packet guard.
        Egress = 8 => "egress",
    }
}

/// What a socket speaks, as far as rules can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP, and MPTCP, whose first subflow is TCP to the same destination.
    Tcp,
    /// UDP.
    Udp,
    /// Any other IP protocol, by its number: no port rule speaks of it.
    Other(u8),
}

/// `IPPROTO_TCP`, `IPPROTO_UDP` and `IPPROTO_MPTCP` of `linux/in.h`.
const IPPROTO_TCP: u32 = 6;
const IPPROTO_UDP: u32 = 17;
const IPPROTO_MPTCP: u32 = 262;

impl Protocol {
    /// From `sk_protocol`, which is an IP protocol number or `IPPROTO_MPTCP`.
    #[inline(always)]
    pub const fn from_kernel(number: u32) -> Self {
        match number {
            IPPROTO_TCP | IPPROTO_MPTCP => Self::Tcp,
            IPPROTO_UDP => Self::Udp,
            #[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
            other if other <= u8::MAX as u32 => Self::Other(other as u8),
            _ => Self::Other(u8::MAX),
        }
    }

    /// The IP protocol number.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "both constants fit")]
    pub const fn number(self) -> u8 {
        match self {
            Self::Tcp => IPPROTO_TCP as u8,
            Self::Udp => IPPROTO_UDP as u8,
            Self::Other(number) => number,
        }
    }
}

/// One distinct set of policies; workloads that share it share its rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope(u32);

impl Scope {
    /// A scope by its number, below [`crate::MAX_SCOPES`].
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    /// Its number.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self.0
    }

    /// The view that decides what happens: enforcing policies only.
    #[inline(always)]
    pub const fn enforcing(self) -> View {
        View(self.0 * 2)
    }

    /// The view that Audit policies have a part in; there only if one selects the scope.
    #[inline(always)]
    pub const fn with_audit(self) -> View {
        View(self.0 * 2 + 1)
    }
}

/// The index of a trie in the `POLICY` map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct View(u32);

impl View {
    /// Index into the `POLICY` map.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self.0
    }
}

/// A destination that a workload wants to reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Flow {
    /// Whose rules apply.
    pub place: Place,
    /// What the socket speaks.
    pub protocol: Protocol,
    /// Where to, as the workload gave it.
    pub address: Address,
    /// Destination port, in host byte order.
    pub port: u16,
}
