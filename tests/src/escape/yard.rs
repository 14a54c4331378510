//! Two network namespaces and what is between them: the near one, in which a prisoner stands, and the far one, which
//! answers for every address and writes down whatever arrives.
//!
//! What arrives is seen on the interface itself, so no protocol is too strange to be noticed. Interfaces do not look for
//! their neighbours, so a packet leaves at once or never.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, Ipv6Addr, UdpSocket},
    os::fd::{AsFd, OwnedFd},
};

use anyhow::{Context, Result};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    netlink::{self, Route},
    sniffer::Sniffer,
    target::{FAR4, NEAR4, NEAR6, PORT, Target},
};

/// The interface of the near namespace.
pub const NEAR: &str = "near";
const FAR: &str = "far";
/// The port at which nobody listens, for marks.
const MARK_PORT: u16 = 9;

/// A network namespace that lives as long as this, or a process in it.
#[derive(Debug)]
pub struct Namespace(OwnedFd);

/// The two namespaces, and one more near one.
#[derive(Debug)]
pub struct Yard {
    /// Where prisoners stand.
    pub near: Namespace,
    /// Another near one, with an interface of its own to the far one. There IPv6 sockets may be bound to addresses that
    /// are somebody else's, as on hosts that take addresses over from others.
    pub elsewhere: Namespace,
    far: Namespace,
    sniffers: [Sniffer; 2],
    _listeners: Vec<Socket>,
    _datagrams: UdpSocket,
}

impl Namespace {
    fn new() -> Result<Self> {
        let make = || {
            // SAFETY: the thread is new and ends here; nothing of the process but its network namespace is unshared.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
            let file = File::open("/proc/thread-self/ns/net")?;
            let loopback = netlink::index("lo")?;
            netlink::set_up(loopback)?;
            Ok::<_, io::Error>(Self(file.into()))
        };
        on_a_thread(make).context("cannot make a network namespace; tests need root")
    }

    /// Does something on a thread in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_a_thread(|| {
            move_into_link_name_space(self.0.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        })
    }

    /// Its descriptor.
    pub fn fd(&self) -> &OwnedFd {
        &self.0
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| match scope.spawn(work).join() {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

impl Yard {
    /// Makes one.
    pub fn new() -> Result<Self> {
        let (near, elsewhere, far) = (Namespace::new()?, Namespace::new()?, Namespace::new()?);
        near.run(|| netlink::pair(NEAR, FAR, &far.0))??;
        elsewhere.run(|| netlink::pair(NEAR, "far2", &far.0))??;
        let (listeners, datagrams, sniffers) = far.run(furnish_far).context("the far namespace")??;
        for namespace in [&near, &elsewhere] {
            namespace.run(furnish_near).context("the near namespace")??;
        }
        elsewhere
            .run(|| fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1"))?
            .context("net.ipv6.ip_nonlocal_bind")?;
        Ok(Self { near, elsewhere, far, sniffers, _listeners: listeners, _datagrams: datagrams })
    }

    /// Has the far namespace tell its MPTCP peers of an address; what the kernel says if it cannot.
    pub fn announce(&self, target: Target) -> Result<io::Result<()>> {
        let announce = || netlink::accept_announcements().and_then(|()| netlink::announce(target.v4().into()));
        Ok(self.far.run(announce)?.and(self.near.run(netlink::accept_announcements)?))
    }

    /// Every frame that has arrived since the last time. What a process in the near namespace sent before the call is
    /// among them: a mark sent after it has arrived, too.
    pub fn arrived(&mut self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        for (namespace, sniffer) in [&self.near, &self.elsewhere].into_iter().zip(&mut self.sniffers) {
            let mark = namespace.run(send_mark).context("cannot send a mark")??;
            frames.extend(sniffer.until(&mark)?);
        }
        Ok(frames)
    }
}

fn furnish_near() -> Result<()> {
    let index = netlink::index(NEAR)?;
    netlink::set_up(index)?;
    netlink::address(index, NEAR4.into(), 24)?;
    netlink::address(index, NEAR6.into(), 64)?;
    let loopback = netlink::index("lo")?;
    netlink::route(Ipv4Addr::UNSPECIFIED.into(), 0, Route::Out(index), loopback)?;
    netlink::route(Ipv6Addr::UNSPECIFIED.into(), 0, Route::Out(index), loopback)?;
    // Everybody may have a ping socket, as on common distributions.
    fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647")?;
    Ok(())
}

type Far = (Vec<Socket>, UdpSocket, [Sniffer; 2]);

fn furnish_far() -> Result<Far> {
    let (index, loopback) = (netlink::index(FAR)?, netlink::index("lo")?);
    let index2 = netlink::index("far2")?;
    for index in [index, index2] {
        netlink::set_up(index)?;
    }
    netlink::route(Ipv4Addr::UNSPECIFIED.into(), 0, Route::Here, loopback)?;
    netlink::route(Ipv6Addr::UNSPECIFIED.into(), 0, Route::Here, loopback)?;
    netlink::route(NEAR4.into(), 32, Route::Out(index), loopback)?;
    netlink::route(NEAR6.into(), 128, Route::Out(index), loopback)?;
    let datagrams = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    Ok((listeners()?, datagrams, [Sniffer::new(index)?, Sniffer::new(index2)?]))
}

/// Accepts connections to every address; also MPTCP where the kernel has it.
fn listeners() -> Result<Vec<Socket>> {
    let mptcp = Socket::new(Domain::IPV6, Type::STREAM, Some(Protocol::from(libc::IPPROTO_MPTCP)));
    let socket = mptcp.or_else(|_| Socket::new(Domain::IPV6, Type::STREAM, None))?;
    socket.set_only_v6(false)?;
    socket.bind(&std::net::SocketAddr::from((Ipv6Addr::UNSPECIFIED, PORT)).into())?;
    socket.listen(4096)?;
    Ok(vec![socket])
}

/// Sends a datagram that no other is like.
fn send_mark() -> io::Result<Vec<u8>> {
    let mark = format!("mark of {}", crate::unique_name()).into_bytes();
    UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(&mark, (FAR4, MARK_PORT))?;
    Ok(mark)
}
