//! Whether the kernel still knows in which cgroup a socket was made.
//!
//! On Linux 5.10 (before 5.10.226) to 5.14 a socket has room for its cgroup or for a class or priority of cgroup v1, not for
//! both: once `net_cls` or `net_prio` is used anywhere, new sockets belong to the root of cgroup2, and no program below it
//! sees them (fixed by commit 8520e224f547). That cannot be seen from a version alone, since distributions carry the fix
//! back; but the kernel tells the cgroup of a socket that is made here.

use std::{
    fmt, io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::AsFd as _,
};

use rustix::fs::fstat;

use crate::{
    cgroup::Cgroup,
    dataplane::kernel_version,
    sock_diag::{Kind, SockDiag, state},
};

/// What a probe found.
#[derive(Debug)]
pub enum Matching {
    /// Sockets belong to the cgroup in which they are made.
    Works,
    /// They do not.
    Stopped,
    /// It could not be found out.
    Unknown(Why),
}

/// Why nothing could be found out.
#[derive(Debug)]
pub enum Why {
    /// The agent is in the root cgroup, to which sockets belong in either case.
    InRoot,
    /// The kernel does not tell.
    NotTold(io::Error),
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InRoot => f.write_str("the agent runs in the root cgroup"),
            Self::NotTold(error) => write!(f, "the kernel does not tell the cgroups of sockets: {error}"),
        }
    }
}

/// What is wrong where matching has stopped, and what helps.
pub const STOPPED: &str = "this kernel (before 5.15 / 5.10.226) has stopped matching sockets to cgroups because net_cls or \
                           net_prio is in use: nothing below the root is filtered; update the kernel, or attach to `/`";

/// Whether it can happen on the running kernel at all.
pub fn is_possible() -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    kernel_version(&release).is_none_or(|version| version < (5, 15))
}

/// Probes now and then while an agent runs.
#[derive(Debug, Default)]
pub(crate) struct Vigil {
    looks: u32,
    is_stopped: bool,
}

impl Vigil {
    /// Probes each tenth time it is called.
    pub(crate) fn look(&mut self, own: Option<&Cgroup>) {
        const EACH: u32 = 10;
        self.looks += 1;
        if !self.looks.is_multiple_of(EACH) {
            return;
        }
        let before = self.is_stopped;
        match probe(own) {
            Matching::Stopped => self.is_stopped = true,
            Matching::Works => self.is_stopped = false,
            Matching::Unknown(_) => return,
        }
        match (before, self.is_stopped) {
            (_, true) => tracing::error!("{STOPPED}"),
            (true, false) => {
                tracing::warn!("sockets belong to their cgroups again: what is below the root is filtered");
            }
            (false, false) => {}
        }
    }

    /// Whether nothing is filtered.
    pub(crate) const fn is_stopped(&self) -> bool {
        self.is_stopped
    }
}

/// Makes a socket and asks the kernel to which cgroup it belongs; `own` is the calling thread's.
pub fn probe(own: Option<&Cgroup>) -> Matching {
    let Some(own) = own.filter(|own| !own.is_root()) else { return Matching::Unknown(Why::InRoot) };
    match cgroup_of_a_socket() {
        Ok(found) if found == own.id => Matching::Works,
        Ok(_) => Matching::Stopped,
        Err(error) => Matching::Unknown(Why::NotTold(error)),
    }
}

fn cgroup_of_a_socket() -> io::Result<u64> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let inode = fstat(socket.as_fd())?.st_ino;
    let sockets = SockDiag::open()?.sockets(Kind::Udp, &[state::CLOSE])?;
    let own = sockets.into_iter().find(|found| u64::from(found.inode) == inode);
    own.and_then(|own| own.cgroup).ok_or_else(|| io::ErrorKind::NotFound.into())
}
