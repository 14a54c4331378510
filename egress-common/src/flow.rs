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
        /// `lsm_cgroup/socket_create`: sockets of other families than those of IP.
        SocketCreate = 9 => "socket_create",
        /// `cgroup/bind4`.
        Bind4 = 10 => "bind4",
        /// `cgroup/bind6`.
        Bind6 = 11 => "bind6",
        /// `cgroup_skb/ingress`: learns from answers of DNS, and judges nothing.
        Ingress = 12 => "ingress",
        /// `cgroup_skb/egress`: judges questions to servers of DNS.
        Query = 13 => "query",
    }
}

/// What a socket speaks: an IP protocol, by its number. Rules name ports of TCP and UDP.
///
/// No enum with a field, since the compiler leaves a field that a value does not have unwritten, and kernels before 6.3 refuse
/// programs that copy what was never written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct Protocol(u8);

/// `IPPROTO_MPTCP` of `linux/in.h`.
const IPPROTO_MPTCP: u32 = 262;

impl Protocol {
    /// TCP, and MPTCP, whose first subflow is TCP to the same destination.
    pub const TCP: Self = Self(6);
    /// UDP.
    pub const UDP: Self = Self(17);

    /// From `sk_protocol`, which is an IP protocol number or `IPPROTO_MPTCP`.
    #[inline(always)]
    pub const fn from_kernel(number: u32) -> Self {
        match number {
            IPPROTO_MPTCP => Self::TCP,
            #[expect(clippy::cast_possible_truncation, reason = "the range is checked")]
            other if other <= u8::MAX as u32 => Self(other as u8),
            _ => Self(u8::MAX),
        }
    }

    /// The IP protocol number.
    #[inline(always)]
    pub const fn number(self) -> u8 {
        self.0
    }

    /// Whether rules can name its destinations.
    #[inline(always)]
    pub const fn is_judged(self) -> bool {
        matches!(self, Self::TCP | Self::UDP)
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
    /// From its index.
    #[inline(always)]
    pub const fn new(index: u32) -> Self {
        Self(index)
    }

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
