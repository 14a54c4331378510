//! The sockets of a network namespace, as the kernel tells of them: `NETLINK_SOCK_DIAG`, see `sock_diag(7)`.
//!
//! What the kernel sends is read with care all the same: a message cut short ends the reading, and what is not understood is
//! passed over.

use std::{
    io,
    mem::MaybeUninit,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::OwnedFd,
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink, recv, send, socket_with, sockopt,
};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// `linux/netlink.h` and `linux/sock_diag.h`.
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `linux/inet_diag.h`.
const INET_DIAG_CGROUP_ID: u16 = 21;

/// `struct nlmsghdr`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    length: u32,
    kind: u16,
    flags: u16,
    sequence: u32,
    port: u32,
}

/// `struct inet_diag_sockid`: ports and addresses are in network byte order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct SocketId {
    source_port: u16,
    destination_port: u16,
    source: [u8; 16],
    destination: [u8; 16],
    interface: u32,
    cookie: [u32; 2],
}

/// `struct inet_diag_req_v2`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Query {
    family: u8,
    protocol: u8,
    extensions: u8,
    padding: u8,
    states: u32,
    id: SocketId,
}

/// `struct inet_diag_msg`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Message {
    family: u8,
    state: u8,
    timer: u8,
    retransmits: u8,
    id: SocketId,
    expires: u32,
    receive_queue: u32,
    send_queue: u32,
    uid: u32,
    inode: u32,
}

/// A kind of socket that can be asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A state of `net/tcp_states.h`; UDP has two of them.
pub mod state {
    /// Connected.
    pub const ESTABLISHED: u8 = 1;
    /// Its first packet is sent.
    pub const SYN_SENT: u8 = 2;
    /// The other end has closed.
    pub const CLOSE_WAIT: u8 = 8;
    /// Not connected.
    pub const CLOSE: u8 = 7;
    /// Waits for connections.
    pub const LISTEN: u8 = 10;
}

/// A socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// What it speaks.
    pub kind: Kind,
    /// See [`state`].
    pub state: u8,
    /// Its own address; IPv4 where it is IPv4-mapped.
    pub source: SocketAddr,
    /// Its peer's.
    pub destination: SocketAddr,
    /// Number of its file, as in `/proc/PID/fd`.
    pub inode: u32,
    /// In the initial user namespace.
    pub uid: u32,
    /// The cgroup it was made in, if the kernel tells (5.9).
    pub cgroup: Option<u64>,
    family: u8,
    id: SocketId,
}

/// A conversation with the kernel about the sockets of a network namespace.
#[derive(Debug)]
pub struct SockDiag(OwnedFd);

impl SockDiag {
    /// About those of the calling thread's network namespace.
    pub fn open() -> io::Result<Self> {
        let socket =
            socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::SOCK_DIAG))?;
        // The kernel answers at once or not at all; nothing here may wait for ever.
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(std::time::Duration::from_secs(5)))?;
        Ok(Self(socket))
    }

    /// Every socket of both families that is in one of these states.
    pub fn sockets(&self, kind: Kind, states: &[u8]) -> io::Result<Vec<Socket>> {
        let states = states.iter().fold(0, |bits, state| bits | 1 << state);
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let query = Query { states, ..Query::about(kind, u8::try_from(family).unwrap_or(0)) };
            self.ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &query)?;
            while self.read(|bytes| read(bytes, kind, &mut sockets))? == Progress::More {}
        }
        Ok(sockets)
    }

    /// Ends a socket, as `ss --kill` does: TCP is reset, UDP is no longer connected; whoever waits on it gets `ECONNABORTED`.
    /// Needs `CAP_NET_ADMIN` over the network namespace. `EOPNOTSUPP` if the kernel was built without `INET_DIAG_DESTROY`,
    /// `ENOENT` if the socket is gone.
    pub fn destroy(&self, socket: &Socket) -> io::Result<()> {
        let query = Query { states: u32::MAX, id: socket.id, ..Query::about(socket.kind, socket.family) };
        self.ask(SOCK_DESTROY, NLM_F_ACK, &query)?;
        while self.read(|bytes| read(bytes, socket.kind, &mut Vec::new()))? == Progress::More {}
        Ok(())
    }

    fn ask(&self, kind: u16, flags: u16, query: &Query) -> io::Result<()> {
        let length = size_of::<Header>() + size_of::<Query>();
        let length = u32::try_from(length).expect("it is 72 bytes long");
        let header = Header { length, kind, flags: NLM_F_REQUEST | flags, sequence: 1, port: 0 };
        let message = [header.as_bytes(), query.as_bytes()].concat();
        Ok(send(&self.0, &message, SendFlags::empty()).map(drop)?)
    }

    fn read<T>(&self, read: impl FnOnce(&[u8]) -> io::Result<T>) -> io::Result<T> {
        /// The kernel sends at most 32 KiB at a time (`NLMSG_GOODSIZE`, `netlink_dump`).
        const ROOM: usize = 64 << 10;
        let mut buffer = vec![MaybeUninit::<u8>::uninit(); ROOM];
        let ((received, _), _) = recv(&self.0, buffer.as_mut_slice(), RecvFlags::empty())?;
        read(received)
    }
}

impl Query {
    fn about(kind: Kind, family: u8) -> Self {
        let protocol = match kind {
            Kind::Tcp => libc::IPPROTO_TCP,
            Kind::Udp => libc::IPPROTO_UDP,
        };
        let id = SocketId {
            source_port: 0,
            destination_port: 0,
            source: [0; 16],
            destination: [0; 16],
            interface: 0,
            // `INET_DIAG_NOCOOKIE`.
            cookie: [u32::MAX; 2],
        };
        Self { family, protocol: u8::try_from(protocol).unwrap_or(0), extensions: 0, padding: 0, states: 0, id }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    /// The kernel has more to say.
    More,
    Done,
}

/// Reads what came in one piece: netlink messages one after the other, each padded to four bytes.
fn read(mut bytes: &[u8], kind: Kind, sockets: &mut Vec<Socket>) -> io::Result<Progress> {
    let cut_short = || io::Error::new(io::ErrorKind::InvalidData, "a netlink message was cut short");
    while !bytes.is_empty() {
        let (header, _) = Header::read_from_prefix(bytes).map_err(|_| cut_short())?;
        let length = header.length as usize;
        let payload = bytes.get(size_of::<Header>()..length).ok_or_else(cut_short)?;
        match header.kind {
            NLMSG_DONE => return Ok(Progress::Done),
            NLMSG_ERROR => {
                let (error, _) = i32::read_from_prefix(payload).map_err(|_| cut_short())?;
                return if error == 0 { Ok(Progress::Done) } else { Err(io::Error::from_raw_os_error(-error)) };
            }
            SOCK_DIAG_BY_FAMILY => sockets.extend(Socket::read(payload, kind)),
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(Progress::More)
}

impl Socket {
    /// `None` if it is not understood.
    fn read(payload: &[u8], kind: Kind) -> Option<Self> {
        let (message, attributes) = Message::read_from_prefix(payload).ok()?;
        let Message { family, state, id, uid, inode, .. } = message;
        let address = |bytes: [u8; 16], port: u16| {
            let ip = match i32::from(family) {
                libc::AF_INET => IpAddr::from(Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3])),
                libc::AF_INET6 => IpAddr::from(Ipv6Addr::from(bytes)).to_canonical(),
                _ => return None,
            };
            Some(SocketAddr::new(ip, u16::from_be(port)))
        };
        let (source, destination) =
            (address(id.source, id.source_port)?, address(id.destination, id.destination_port)?);
        let cgroup = attribute(attributes, INET_DIAG_CGROUP_ID).and_then(|value| u64::read_from_bytes(value).ok());
        Some(Self { kind, state, source, destination, inode, uid, cgroup, family, id })
    }
}

/// The value of an attribute (`struct rtattr`) among those after a message.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    const HEADER: usize = 4;
    loop {
        let ([length, kind], _) = <[u16; 2]>::read_from_prefix(bytes).ok()?;
        let length = usize::from(length);
        let value = bytes.get(HEADER..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream, UdpSocket};

    use proptest::prelude::*;

    use super::*;

    /// One socket and the end, as the kernel sends them.
    fn answer() -> Vec<u8> {
        let id = SocketId {
            source_port: 5000_u16.to_be(),
            destination_port: 443_u16.to_be(),
            source: Ipv4Addr::new(192, 0, 2, 1).to_ipv6_mapped().octets(),
            destination: Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 5).octets(),
            interface: 0,
            cookie: [1, 2],
        };
        let message = Message {
            family: 10,
            state: 1,
            timer: 0,
            retransmits: 0,
            id,
            expires: 0,
            receive_queue: 0,
            send_queue: 0,
            uid: 33,
            inode: 77,
        };
        let attributes =
            [[5_u16, 8].as_bytes(), &[1, 0, 0, 0], [12_u16, INET_DIAG_CGROUP_ID].as_bytes(), 4242_u64.as_bytes()]
                .concat();
        let length = u32::try_from(size_of::<Header>() + size_of::<Message>() + attributes.len()).unwrap();
        let header = Header { length, kind: SOCK_DIAG_BY_FAMILY, flags: 2, sequence: 1, port: 0 };
        let done = Header { length: 20, kind: NLMSG_DONE, flags: 2, sequence: 1, port: 0 };
        [header.as_bytes(), message.as_bytes(), &attributes, done.as_bytes(), &[0; 4]].concat()
    }

    #[test]
    fn an_answer_is_read() {
        let mut sockets = Vec::new();
        assert_eq!(read(&answer(), Kind::Tcp, &mut sockets).unwrap(), Progress::Done);
        let [socket] = &sockets[..] else { panic!("{sockets:?}") };
        assert_eq!((socket.source, socket.inode), ("192.0.2.1:5000".parse().unwrap(), 77));
        assert_eq!((socket.destination, socket.cgroup), ("[2001:db8::5]:443".parse().unwrap(), Some(4242)));
    }

    #[test]
    fn an_answer_cut_short_is_no_answer() {
        let answer = answer();
        for length in 0..answer.len() {
            let mut sockets = Vec::new();
            let result = read(&answer[..length], Kind::Tcp, &mut sockets);
            assert!(!matches!(result, Ok(Progress::Done)) || length >= answer.len() - 4, "{length}");
        }
    }

    proptest! {
        #[test]
        fn whatever_comes_is_read_to_an_end(mut bytes in prop::collection::vec(any::<u8>(), 0..200), length in 0_u32..220) {
            // Most of what is random is refused at once, so the first header is made likely.
            if bytes.len() >= 16 {
                bytes[..4].copy_from_slice(&length.to_ne_bytes());
                bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
            }
            let mut sockets = Vec::new();
            drop(read(&bytes, Kind::Udp, &mut sockets));
            prop_assert!(sockets.len() <= 1 + bytes.len() / size_of::<Message>());
        }
    }

    #[test]
    fn the_kernel_tells_of_sockets_of_both_kinds() {
        let diag = SockDiag::open().unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let found = diag.sockets(Kind::Udp, &[state::CLOSE]).unwrap();
        assert!(found.iter().any(|socket| socket.source == udp.local_addr().unwrap()));
        let listener = TcpListener::bind("[::1]:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let found = diag.sockets(Kind::Tcp, &[state::ESTABLISHED]).unwrap();
        let own = found.iter().find(|socket| socket.source == stream.local_addr().unwrap()).unwrap();
        assert_eq!(own.destination, stream.peer_addr().unwrap());
        assert!(own.cgroup.is_some());
    }
}
