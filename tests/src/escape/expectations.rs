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
const LOOPBACK: &str = "127.0.0.0/8 on a socket bound to another interface";

/// The ways.
pub const DOCUMENTED: &[Documented] = &[];

/// Whether a leak is known, and where it is documented.
pub fn documented(vector: &str, who: Who) -> Option<&'static Documented> {
    DOCUMENTED.iter().find(|known| vector.starts_with(known.vector) && known.who.contains(&who))
}

/// Vectors that are closed by refusing the socket or the option, whatever the destination: there an allowed destination
/// is refused, too.
const CLOSED_AS_A_WHOLE: &[&str] = &[];

/// Whether a vector is refused for allowed destinations, too.
pub fn costs(vector: &str) -> bool {
    CLOSED_AS_A_WHOLE.iter().any(|name| vector.starts_with(name))
}
