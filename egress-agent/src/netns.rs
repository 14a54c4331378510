//! Network namespaces: entered, and told apart as kernel programs tell them, by cookie.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    net::UdpSocket,
    os::{
        fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    thread,
};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `SO_NETNS_COOKIE` of `asm-generic/socket.h` (Linux 5.14).
const SO_NETNS_COOKIE: libc::c_int = 71;

/// The cookie of the network namespace of the calling thread. Kernels before 5.14 do not tell: `Unsupported`.
pub(crate) fn own_cookie() -> io::Result<u64> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    let (mut cookie, mut length) = (0_u64, libc::socklen_t::try_from(size_of::<u64>()).unwrap_or(8));
    // SAFETY: the kernel writes at most `length` bytes to the cookie, which is that long, and the length itself.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => match io::Error::last_os_error() {
            error if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Err(io::ErrorKind::Unsupported.into()),
            error => Err(error),
        },
    }
}

/// `NS_GET_USERNS` of `linux/nsfs.h`.
const NS_GET_USERNS: libc::Ioctl = 0xb701;
/// The inode number of the initial user namespace, `PROC_USER_INIT_INO` of `linux/proc_ns.h`.
const PROC_USER_INIT_INO: u64 = 0xEFFF_FFFD;

/// A network namespace, and a process in it.
#[derive(Debug)]
pub(crate) struct Namespace {
    file: File,
    pub(crate) pid: u32,
}

impl Namespace {
    /// That of a process, and its number, which no other has as long as this value is there.
    pub(crate) fn of(pid: u32) -> io::Result<(u64, Self)> {
        let file = File::open(format!("/proc/{pid}/ns/net"))?;
        Ok((file.metadata()?.ino(), Self { file, pid }))
    }

    /// Works on a thread that enters it, unless it is this one's anyway.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        let own = fs::metadata("/proc/thread-self/ns/net")?.ino();
        if self.file.metadata()?.ino() == own {
            return work();
        }
        let enter = || {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        };
        let done =
            thread::scope(|threads| Ok::<_, io::Error>(thread::Builder::new().spawn_scoped(threads, enter)?.join()))?;
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Whether it was made by the initial user namespace: not by whoever made a user namespace to be root in.
    fn is_of_the_host(&self) -> io::Result<bool> {
        // SAFETY: the call takes a descriptor that is open, and gives another.
        let owner = unsafe { libc::ioctl(self.file.as_raw_fd(), NS_GET_USERNS) };
        if owner < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
        let owner = File::from(unsafe { OwnedFd::from_raw_fd(owner) });
        Ok(owner.metadata()?.ino() == PROC_USER_INIT_INO)
    }

    /// Its cookie, if resolvers can be believed in it.
    fn trusted(&self) -> io::Result<Option<u64>> {
        if self.is_of_the_host()? { self.inside(own_cookie).map(Some) } else { Ok(None) }
    }
}

/// The network namespaces of pods, each held while a process is in it, so that no other gets its number.
#[derive(Debug, Default)]
pub(crate) struct PodNamespaces(BTreeMap<u64, (Namespace, Option<u64>)>);

impl PodNamespaces {
    /// Looks where processes are: the cookies of namespaces that came and in which resolvers can be believed, and of those
    /// that went.
    pub(crate) fn follow(&mut self, pids: impl Iterator<Item = u32>) -> (Vec<u64>, Vec<u64>) {
        let mut before = std::mem::take(&mut self.0);
        let mut came = Vec::new();
        for pid in pids {
            // A process that is gone has no namespace.
            let Ok((number, namespace)) = Namespace::of(pid) else { continue };
            if self.0.contains_key(&number) {
                continue;
            }
            let known = before.remove(&number).unwrap_or_else(|| {
                let cookie = namespace.trusted().unwrap_or_else(|error| {
                    tracing::warn!(%error, pid, "names are not learnt in the network namespace of a pod");
                    None
                });
                came.extend(cookie);
                (namespace, cookie)
            });
            self.0.insert(number, known);
        }
        (came, before.into_values().filter_map(|(_, cookie)| cookie).collect())
    }
}
