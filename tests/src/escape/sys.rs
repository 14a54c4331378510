//! The system calls of the vectors, one function each, with errors that name the call.
//!
//! They take what the kernel takes, also where it is nonsense: a library that checks its arguments cannot try a filter.

use std::{
    fs::File,
    io,
    mem::size_of,
    net::SocketAddr,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr,
    time::Duration,
};

use socket2::SockAddr;

use super::{Outcome, Step};

/// What is sent.
pub const DATA: &[u8] = b"out";

/// The bytes of a socket address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address(pub Vec<u8>);

impl<T: Into<SocketAddr>> From<T> for Address {
    fn from(address: T) -> Self {
        let address = SockAddr::from(address.into());
        // SAFETY: the pointer is to as many bytes as said, all of which are set.
        let bytes = unsafe { std::slice::from_raw_parts(address.as_ptr().cast(), address.len() as usize) };
        Self(bytes.to_vec())
    }
}

impl Address {
    /// The same address under the name of another family.
    #[must_use]
    pub fn with_family(mut self, family: i32) -> Self {
        let family = u16::try_from(family).expect("a family has 16 bits");
        self.0[..2].copy_from_slice(&family.to_ne_bytes());
        self
    }

    fn pointer(&self) -> *const libc::sockaddr {
        self.0.as_ptr().cast()
    }

    fn length(&self) -> libc::socklen_t {
        length(&self.0)
    }
}

/// A control message: level, kind and contents.
pub type Control<'a> = (i32, i32, &'a [u8]);

/// A socket of any kind.
pub fn socket(domain: i32, kind: i32, protocol: i32) -> Outcome<OwnedFd> {
    // SAFETY: no pointer is passed.
    let fd = check("socket", unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A TCP socket of the family of an address, which does not wait in `connect`.
pub fn stream(to: SocketAddr) -> Outcome<OwnedFd> {
    socket(domain(to), libc::SOCK_STREAM | libc::SOCK_NONBLOCK, 0)
}

/// A UDP socket of the family of an address.
pub fn datagram(to: SocketAddr) -> Outcome<OwnedFd> {
    socket(domain(to), libc::SOCK_DGRAM, 0)
}

/// The family of an address.
pub const fn domain(address: SocketAddr) -> i32 {
    if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }
}

/// Connects, or begins to.
pub fn connect(socket: &OwnedFd, to: impl Into<Address>) -> Outcome {
    let to = to.into();
    // SAFETY: the address lives through the call and is as long as said.
    let result = check("connect", unsafe { libc::connect(socket.as_raw_fd(), to.pointer(), to.length()) });
    match result {
        Err(step) if step.errno == libc::EINPROGRESS => Ok(()),
        other => other.map(drop),
    }
}

/// Waits until a connection stands.
pub fn established(socket: &OwnedFd) -> Outcome {
    let mut ready = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: `ready` is one record and lives through the call.
    match check("poll", unsafe { libc::poll(&raw mut ready, 1, 1000) })? {
        0 => Err(Step { call: "connect", errno: libc::ETIMEDOUT }),
        _ => pending_error(socket),
    }
}

fn pending_error(socket: &OwnedFd) -> Outcome {
    let mut errno = 0_i32;
    let mut size = libc::socklen_t::try_from(size_of::<i32>()).expect("four bytes");
    let value = (&raw mut errno).cast();
    // SAFETY: both pointers are to locals that live through the call; the first is to as many bytes as said.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_ERROR, value, &raw mut size) };
    check("getsockopt", result)?;
    if errno == 0 { Ok(()) } else { Err(Step { call: "connect", errno }) }
}

/// Binds to an address.
pub fn bind(socket: &OwnedFd, to: impl Into<Address>) -> Outcome {
    let to = to.into();
    // SAFETY: the address lives through the call and is as long as said.
    check("bind", unsafe { libc::bind(socket.as_raw_fd(), to.pointer(), to.length()) }).map(drop)
}

/// Listens.
pub fn listen(socket: &OwnedFd) -> Outcome {
    // SAFETY: no pointer is passed.
    check("listen", unsafe { libc::listen(socket.as_raw_fd(), 8) }).map(drop)
}

/// Takes the next connection.
pub fn accept(socket: &OwnedFd) -> Outcome<OwnedFd> {
    // SAFETY: no address is asked for.
    let fd = check("accept", unsafe { libc::accept(socket.as_raw_fd(), ptr::null_mut(), ptr::null_mut()) })?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends to where the socket is connected.
pub fn send(socket: &OwnedFd, data: &[u8], flags: i32) -> Outcome {
    // SAFETY: the data lives through the call and is as long as said.
    check_size("send", unsafe { libc::send(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags) })
}

/// Sends to an address.
pub fn send_to(socket: &OwnedFd, data: &[u8], flags: i32, to: impl Into<Address>) -> Outcome {
    let (to, bytes) = (to.into(), data.as_ptr().cast());
    // SAFETY: data and address live through the call and are as long as said.
    let sent = unsafe { libc::sendto(socket.as_raw_fd(), bytes, data.len(), flags, to.pointer(), to.length()) };
    match check_size("sendto", sent) {
        Err(step) if step.errno == libc::EINPROGRESS => Ok(()),
        other => other,
    }
}

/// Sends what comes next of a file.
pub fn send_file(socket: &OwnedFd, file: &File, length: usize) -> Outcome {
    // SAFETY: no offset is asked for.
    let sent = unsafe { libc::sendfile(socket.as_raw_fd(), file.as_raw_fd(), ptr::null_mut(), length) };
    check_size("sendfile", sent)
}

/// Receives a datagram and forgets it.
pub fn receive(socket: &OwnedFd) -> Outcome {
    let mut buffer = [0_u8; 64];
    // SAFETY: the buffer lives through the call and is as long as said.
    check_size("recv", unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) })
}

/// Sends with control messages, to an address if there is one.
pub fn send_message(socket: &OwnedFd, to: Option<&Address>, controls: &[Control<'_>]) -> Outcome {
    send_with_controls(socket, DATA, to, controls)
}

/// The same of other data.
pub fn send_with_controls(socket: &OwnedFd, data: &[u8], to: Option<&Address>, controls: &[Control<'_>]) -> Outcome {
    let control = encode(controls);
    let mut part = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let message = header(to, &control, &mut part);
    // SAFETY: everything that the message points to lives through the call and is as long as said.
    check_size("sendmsg", unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, 0) })
}

/// Sends two messages in one call, each to an address of its own.
pub fn send_two_messages(socket: &OwnedFd, to: &[Address; 2]) -> Outcome {
    let mut part = libc::iovec { iov_base: DATA.as_ptr().cast_mut().cast(), iov_len: DATA.len() };
    let mut messages = to.each_ref().map(|to| libc::mmsghdr { msg_hdr: header(Some(to), &[], &mut part), msg_len: 0 });
    // SAFETY: everything that the messages point to lives through the call and is as long as said.
    match check("sendmmsg", unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), 2, 0) })? {
        2 => Ok(()),
        // The kernel tells the error of a later message at the next call only.
        _ => send_message(socket, Some(&to[1]), &[]),
    }
}

/// The header of a message. Its pointers are to the arguments.
pub fn header(to: Option<&Address>, control: &[u8], part: &mut libc::iovec) -> libc::msghdr {
    // SAFETY: a message header of zeros is a valid one.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    if let Some(to) = to {
        message.msg_name = to.0.as_ptr().cast_mut().cast();
        message.msg_namelen = to.length();
    }
    if !control.is_empty() {
        message.msg_control = control.as_ptr().cast_mut().cast();
        message.msg_controllen = control.len() as _;
    }
    message.msg_iov = part;
    message.msg_iovlen = 1;
    message
}

/// Control messages as the kernel reads them.
pub fn encode(controls: &[Control<'_>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (level, kind, contents) in controls {
        bytes.extend((contents.len() + 16).to_ne_bytes());
        bytes.extend(level.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(*contents);
        bytes.resize(bytes.len().next_multiple_of(8), 0);
    }
    bytes
}

/// Sets a socket option.
pub fn option(socket: &OwnedFd, level: i32, name: i32, value: &[u8]) -> Outcome {
    let bytes = value.as_ptr().cast();
    // SAFETY: the value lives through the call and is as long as said.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, bytes, length(value)) };
    check("setsockopt", result).map(drop)
}

/// Sets a socket option that is a number.
pub fn number_option(socket: &OwnedFd, level: i32, name: i32, value: i32) -> Outcome {
    option(socket, level, name, &value.to_ne_bytes())
}

/// The index of the interface to the far namespace.
pub fn near_index() -> Outcome<u32> {
    super::netlink::index(super::yard::NEAR).map_err(|error| Step::new("if_nametoindex", &error))
}

/// Waits for what the kernel does by itself and tells nobody.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(100));
}

/// The result of a call that returns a number, or an error.
pub fn check(call: &'static str, result: i32) -> Outcome<i32> {
    if result < 0 { Err(Step::new(call, &io::Error::last_os_error())) } else { Ok(result) }
}

/// The same for calls that return a size.
pub fn check_size(call: &'static str, result: isize) -> Outcome {
    if result < 0 { Err(Step::new(call, &io::Error::last_os_error())) } else { Ok(()) }
}

/// A system call without a wrapper.
pub fn syscall(call: &'static str, number: i64, arguments: [usize; 4]) -> Outcome<i32> {
    // SAFETY: the callers pass numbers, and pointers to what lives through the call.
    let result = unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2], arguments[3]) };
    check(call, i32::try_from(result).expect("these calls return small numbers"))
}

/// A process that does something and ends.
pub fn fork(child: impl FnOnce()) -> Outcome<i32> {
    // SAFETY: this process has one thread, so the child may do whatever its parent may.
    let pid = check("fork", unsafe { libc::fork() })?;
    if pid == 0 {
        // SAFETY: no pointer is passed; the child ends with its parent.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        child();
        // SAFETY: it ends the child at once, and nothing after it is needed.
        unsafe { libc::_exit(0) };
    }
    Ok(pid)
}

/// Two sockets, connected to each other.
pub fn socket_pair() -> Outcome<[OwnedFd; 2]> {
    let mut fds = [0; 2];
    let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
    // SAFETY: `fds` has room for two descriptors and lives through the call.
    check("socketpair", unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so both are new descriptors that nobody else owns.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn length(bytes: &[u8]) -> libc::socklen_t {
    libc::socklen_t::try_from(bytes.len()).expect("what is passed is short")
}

/// Receives a descriptor by a Unix socket.
pub fn receive_descriptor(socket: &OwnedFd) -> Outcome<OwnedFd> {
    let mut contents = [0_u8; 16];
    let mut control = [0_u64; 8];
    let mut part = libc::iovec { iov_base: contents.as_mut_ptr().cast(), iov_len: contents.len() };
    let mut message = header(None, &[], &mut part);
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of::<[u64; 8]>() as _;
    // SAFETY: everything that the message points to lives through the call and is as long as said.
    check_size("recvmsg", unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) })?;
    // The descriptor stands behind the header of the control message, which has 16 bytes.
    let fd = i32::from_ne_bytes(control[2].to_ne_bytes()[..4].try_into().expect("four bytes"));
    if message.msg_controllen == 0 {
        return Err(Step { call: "recvmsg", errno: libc::ENOENT });
    }
    // SAFETY: the kernel passed a new descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Receives a datagram; who sent it.
pub fn receive_from(socket: &OwnedFd) -> Outcome<SocketAddr> {
    let mut buffer = [0_u8; 64];
    // SAFETY: the kernel writes an address, and tells how long it is; the buffer is as long as said.
    let received = unsafe {
        SockAddr::try_init(|address, length| {
            let buffer_start = buffer.as_mut_ptr().cast();
            match libc::recvfrom(socket.as_raw_fd(), buffer_start, buffer.len(), 0, address.cast(), length) {
                -1 => Err(io::Error::last_os_error()),
                size => Ok(size),
            }
        })
    };
    let (_, from) = received.map_err(|error| Step::new("recvfrom", &error))?;
    from.as_socket().ok_or(Step { call: "recvfrom", errno: libc::EAFNOSUPPORT })
}
