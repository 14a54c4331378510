//! The ways out that are open and known. The list is exact: a way that is closed, or that nobody knew, fails the test.

use super::Who;

/// A way that is open.
#[derive(Debug, Clone, Copy)]
pub struct Documented {
    /// The names of vectors that begin so.
    pub vector: &'static str,
    /// By whom it can be gone.
    pub who: &'static [Who],
    /// The row of `GUARANTEES.md` that says so, or its beginning.
    pub row: &'static str,
    /// What would close it.
    pub layer: &'static str,
}

const ANYBODY: &[Who] = &[Who::Root, Who::User];
const ROOT: &[Who] = &[Who::Root];

const SOCKETS: &str = "raw, ping, UDP-Lite, SCTP and packet sockets";
const ROUTES: &str = "IPv6 routing headers, and for root IPv4 source routes, on an allowed destination";
const OUTSIDE: &str = "sockets made outside the filtered cgroup, or before it was filtered";
const OPEN_BEFORE: &str = "connections that were open when the filter was attached or a policy changed";
const CAPABLE: &str = "root in the workload with `CAP_SYS_ADMIN`, `CAP_BPF` or `CAP_NET_ADMIN`";
const FORGED: &str = "answers of the kernel to a packet with a forged source";
const REPORTS: &str = "reports of memberships in multicast groups";
const KERNEL: &str = "the kernel's own sockets";
const LOOPBACK: &str = "127.0.0.0/8 on a socket bound to another interface";

/// The ways.
pub const DOCUMENTED: &[Documented] = &[
    known("raw IPv4 socket", ROOT, SOCKETS, "sock_create"),
    known("raw IPv6 socket", ROOT, SOCKETS, "sock_create"),
    known("answer of a UDP socket to a source forged by a raw socket", &[], SOCKETS, "sock_create"),
    known("ICMP error to a source forged by a raw socket", ROOT, SOCKETS, "sock_create"),
    known("ICMP echo reply to a source forged by a raw socket", ROOT, SOCKETS, "sock_create"),
    known("ping socket, IPv4, connected", &[], SOCKETS, "sock_create"),
    known("ping socket", ANYBODY, SOCKETS, "sock_create"),
    known("packet socket", ROOT, SOCKETS, "lsm"),
    known("XDP socket", ROOT, SOCKETS, "lsm"),
    known("UDP-Lite connect and send", ANYBODY, SOCKETS, "sock_create"),
    known("LSRR", ROOT, ROUTES, "setsockopt, packet guard"),
    known("SSRR", ROOT, ROUTES, "setsockopt, packet guard"),
    known("routing header", ANYBODY, ROUTES, "setsockopt, packet guard"),
    known("ICMPv6 error to a source forged by IPV6_", ANYBODY, FORGED, "setsockopt, packet guard"),
    known(
        "ICMPv6 echo reply to a source forged by IPV6_FREEBIND",
        ANYBODY,
        FORGED,
        "sock_create, setsockopt, packet guard",
    ),
    known("TCP SYN-ACK to a source forged by IPV6_FREEBIND", ANYBODY, FORGED, "setsockopt, packet guard"),
    known("TCP reset to a source forged by IPV6_FREEBIND", ANYBODY, FORGED, "setsockopt, packet guard"),
    known(
        "TCP SYN-ACK from an address of this host to a source forged by IPV6_FREEBIND",
        ANYBODY,
        FORGED,
        "setsockopt",
    ),
    known(
        "ICMPv6 error from an address of this host to a source forged by IPV6_FREEBIND",
        ANYBODY,
        FORGED,
        "setsockopt",
    ),
    known("TCP SYN-ACK to a source forged by IP_TRANSPARENT", ROOT, FORGED, "setsockopt"),
    known("ICMP error to a source forged by IP_TRANSPARENT", ROOT, FORGED, "setsockopt"),
    known("io_uring setsockopt of a routing header", ANYBODY, ROUTES, "setsockopt, packet guard"),
    known("IGMP report", ANYBODY, REPORTS, "setsockopt"),
    known("MLD report", ANYBODY, REPORTS, "setsockopt"),
    known("TCP connect to 127.0.0.0/8", ANYBODY, LOOPBACK, "packet guard"),
    known("UDP to 127.0.0.0/8", ANYBODY, LOOPBACK, "packet guard"),
    known("UDP to ::1 by SO_BINDTODEVICE", ANYBODY, LOOPBACK, "packet guard"),
    known("UDP to ::ffff:127.0.0.0/104", ANYBODY, LOOPBACK, "packet guard"),
    known("connected before the filter", ANYBODY, OPEN_BEFORE, "existing: Terminate"),
    known("made in another cgroup", ANYBODY, OUTSIDE, "lsm"),
    known("passed by SCM_RIGHTS", ANYBODY, OUTSIDE, "lsm"),
    known("taken by pidfd_getfd", ANYBODY, OUTSIDE, "lsm"),
    known("vsock to a process", ANYBODY, SOCKETS, "lsm"),
    known("PPPoE socket", ANYBODY, SOCKETS, "lsm"),
    known("RDS", ANYBODY, KERNEL, "lsm"),
    known("inherited across exec", ANYBODY, OUTSIDE, "lsm"),
    known("VXLAN tunnel", ROOT, CAPABLE, "none"),
    known("by a child that moves itself", ROOT, CAPABLE, "none"),
];

const fn known(vector: &'static str, who: &'static [Who], row: &'static str, layer: &'static str) -> Documented {
    Documented { vector, who, row, layer }
}

/// Whether a leak is known, and where it is documented.
pub fn documented(vector: &str, who: Who) -> Option<&'static Documented> {
    let named = DOCUMENTED.iter().find(|known| vector.starts_with(known.vector));
    named.filter(|known| known.who.contains(&who))
}

/// Vectors that are closed by refusing the socket or the option, whatever the destination: there an allowed destination
/// is refused, too.
const CLOSED_AS_A_WHOLE: &[&str] = &["UDP-Lite sendto", "ping socket, IPv4, connected"];

/// Whether a vector is refused for allowed destinations, too.
pub fn costs(vector: &str) -> bool {
    CLOSED_AS_A_WHOLE.iter().any(|name| vector.starts_with(name))
}
