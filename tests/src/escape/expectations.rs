//! The ways out that are open and known. The list is exact: a way that is closed, or that nobody knew, fails the test.

use super::Who;
use crate::{bpf_is_a_security_module, kernel_is_before};

/// A way that is open.
#[derive(Debug, Clone, Copy)]
pub struct Documented {
    /// The names of vectors that begin so.
    pub vector: &'static str,
    /// By whom it can be gone.
    pub who: &'static [Who],
    /// Where it is open.
    pub on: Kernels,
    /// The row of `GUARANTEES.md` that says so, or its beginning.
    pub row: &'static str,
    /// What would close it.
    pub layer: &'static str,
}

/// The kernels under which a way is open.
#[derive(Debug, Clone, Copy)]
pub enum Kernels {
    /// All.
    All,
    /// Those without `setsockopt` programs that know the caller's cgroup. What is sent to the loopback is the packet guard's.
    Before6_1,
    /// Those of which BPF is no security module.
    WithoutLsm,
}

impl Kernels {
    fn include_the_running_one(self) -> bool {
        match self {
            Self::All => true,
            Self::Before6_1 => kernel_is_before(6, 1),
            Self::WithoutLsm => !bpf_is_a_security_module(),
        }
    }
}

const ANYBODY: &[Who] = &[Who::Root, Who::User];
const ROOT: &[Who] = &[Who::Root];

const FAMILIES: &str = "sockets of other families than those of IP";
const OUTSIDE: &str = "sockets made outside the filtered cgroup, or before it was filtered";
const OPEN_BEFORE: &str = "connections that were open when the filter was attached or a policy changed";
const CAPABLE: &str = "root in the workload with `CAP_SYS_ADMIN`, `CAP_BPF` or `CAP_NET_ADMIN`";
const FORGED: &str = "answers to a packet with a forged source";
const REPORTS: &str = "reports of memberships in multicast groups";

/// The ways.
pub const DOCUMENTED: &[Documented] = &[
    known("VXLAN tunnel", ROOT, CAPABLE, "none"),
    known("where ip_nonlocal_bind is set: TCP SYN-ACK from this host", ANYBODY, FORGED, "none"),
    known("IGMP report", ANYBODY, REPORTS, "setsockopt"),
    known("MLD report", ANYBODY, REPORTS, "setsockopt"),
    known("connected before the filter", ANYBODY, OPEN_BEFORE, "existing: Terminate"),
    known("made in another cgroup", ANYBODY, OUTSIDE, "none"),
    known("passed by SCM_RIGHTS", ANYBODY, OUTSIDE, "none"),
    known("taken by pidfd_getfd", ANYBODY, OUTSIDE, "none"),
    known("inherited across exec", ANYBODY, OUTSIDE, "none"),
    known("by a child that moves itself", ROOT, CAPABLE, "none"),
    known("answer of a UDP socket to a source forged by IP_TRANSPARENT", ROOT, FORGED, "setsockopt")
        .on(Kernels::Before6_1),
    known("ICMP error to a source forged by IP_TRANSPARENT", ROOT, FORGED, "setsockopt").on(Kernels::Before6_1),
    known("TCP SYN-ACK to a source forged by IP_TRANSPARENT", ROOT, FORGED, "setsockopt").on(Kernels::Before6_1),
    known("TCP SYN-ACK from an address of this host", ANYBODY, FORGED, "setsockopt").on(Kernels::Before6_1),
    known("ICMPv6 error from an address of this host", ANYBODY, FORGED, "setsockopt").on(Kernels::Before6_1),
    known("packet socket", ROOT, FAMILIES, "socket_create").on(Kernels::WithoutLsm),
    known("XDP socket", ROOT, FAMILIES, "socket_create").on(Kernels::WithoutLsm),
    known("PPPoE socket", ANYBODY, FAMILIES, "socket_create").on(Kernels::WithoutLsm),
    known("vsock to a process", ANYBODY, FAMILIES, "socket_create").on(Kernels::WithoutLsm),
    known("RDS", ANYBODY, FAMILIES, "socket_create").on(Kernels::WithoutLsm),
];

const fn known(vector: &'static str, who: &'static [Who], row: &'static str, layer: &'static str) -> Documented {
    Documented { vector, who, on: Kernels::All, row, layer }
}

impl Documented {
    const fn on(self, on: Kernels) -> Self {
        Self { on, ..self }
    }
}

/// Whether a leak is known, and where it is documented.
pub fn documented(vector: &str, who: Who) -> Option<&'static Documented> {
    let named = DOCUMENTED.iter().filter(|known| known.on.include_the_running_one());
    named.filter(|known| known.who.contains(&who)).find(|known| vector.starts_with(known.vector))
}

/// A way that is closed by another layer than the hooks for `connect` and `sendmsg`.
#[derive(Debug, Clone, Copy)]
pub struct Closed {
    /// The names of vectors that begin so.
    pub vector: &'static str,
    /// What closes it. It does not ask for the destination: an allowed one is refused, too.
    pub layer: &'static str,
}

/// Those ways.
pub const CLOSED: &[Closed] = &[
    closed("source bound before the filter", "packet guard"),
    closed("where ip_nonlocal_bind is set", "packet guard"),
    closed("raw IPv", "sock_create"),
    closed("ping socket", "sock_create"),
    closed("UDP-Lite", "sock_create"),
    closed("SCTP", "sock_create"),
    closed("DCCP", "sock_create"),
    closed("L2TP-IP", "sock_create"),
    closed("packet socket", "socket_create"),
    closed("XDP socket", "socket_create"),
    closed("PPPoE socket", "socket_create"),
    closed("vsock to a process", "socket_create"),
    closed("RDS", "socket_create"),
    closed("answer of a UDP socket to a source forged by a raw socket", "sock_create"),
    closed("ICMP error to a source forged by a raw socket", "sock_create"),
    closed("ICMP echo reply to a source forged by a raw socket", "sock_create"),
    closed("ICMPv6 echo reply", "sock_create"),
    closed("io_uring setsockopt of a routing header", "setsockopt"),
    closed("answer of a UDP socket to a source forged", "setsockopt"),
    closed("ICMPv6 error", "setsockopt"),
    closed("ICMP error", "setsockopt"),
    closed("TCP SYN-ACK", "setsockopt"),
    closed("TCP reset", "setsockopt"),
    closed("LSRR by IP_RETOPTS", "packet guard"),
    closed("SSRR by IP_RETOPTS", "packet guard"),
    closed("LSRR set before the filter", "packet guard"),
    closed("LSRR", "setsockopt"),
    closed("SSRR", "setsockopt"),
    closed("routing header 4 set before the filter", "packet guard"),
    closed("routing header 4 by ancillary", "packet guard"),
    closed("routing header 2 by ancillary", "packet guard"),
    closed("routing header 2 by IPV6_FLOWLABEL_MGR", "packet guard"),
    closed("routing header", "setsockopt"),
    closed("TCP connect to 127.0.0.0/8", "packet guard"),
    closed("UDP to 127.0.0.0/8", "packet guard"),
    closed("UDP to ::ffff:127.0.0.0/104", "packet guard"),
    closed("UDP to ::1", "packet guard"),
];

const fn closed(vector: &'static str, layer: &'static str) -> Closed {
    Closed { vector, layer }
}

/// The layer that closes a vector whatever its destination, if one does.
pub fn closed_as_a_whole(vector: &str) -> Option<&'static Closed> {
    let is_open = |vector: &str| documented(vector, Who::Root).is_some();
    CLOSED.iter().find(|way| vector.starts_with(way.vector)).filter(|_| !is_open(vector))
}
