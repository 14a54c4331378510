//! Ways by `io_uring`, whose calls other threads make: its workers, or a thread of the kernel that polls.

use std::{
    net::SocketAddr,
    os::fd::{AsRawFd, OwnedFd},
};

use io_uring::{IoUring, opcode, squeue, types::Fd};

use crate::escape::{
    Outcome, Place, Step, Vector,
    sys::{Address, DATA, connect, datagram, header, send, send_to, stream},
    target::{Target, at},
    vectors::routed::{IPV6_RTHDR, SEGMENTS, route6},
};

const NEEDS: &str = "io_uring for everybody";
/// A polling thread sleeps after so many milliseconds.
const IDLE: u32 = 50;

pub const VECTORS: &[Vector] = &[
    Vector::new("io_uring connect, TCP", |target| dial(&mut plain()?, at(target.v4()), squeue::Flags::empty()))
        .needs(NEEDS),
    Vector::new("io_uring connect by a worker, TCP", |target| {
        dial(&mut plain()?, at(target.v4()), squeue::Flags::ASYNC)
    })
    .needs(NEEDS),
    Vector::new("io_uring connect by a worker, TCP, IPv6", |target| {
        dial(&mut plain()?, at(target.v6()), squeue::Flags::ASYNC)
    })
    .needs(NEEDS),
    Vector::new("io_uring connect by SQPOLL, TCP", |target| {
        dial(&mut polled()?, at(target.v4()), squeue::Flags::empty())
    })
    .needs(NEEDS),
    Vector::new("io_uring connect and send by a worker, UDP", |target| connected(&mut plain()?, at(target.v4())))
        .needs(NEEDS),
    Vector::new("io_uring connect and send by SQPOLL, UDP", |target| connected(&mut polled()?, at(target.v6())))
        .needs(NEEDS),
    Vector::new("io_uring sendmsg", |target| message(&mut plain()?, at(target.v4()), squeue::Flags::empty()))
        .needs(NEEDS),
    Vector::new("io_uring sendmsg by a worker", |target| message(&mut plain()?, at(target.v4()), squeue::Flags::ASYNC))
        .needs(NEEDS),
    Vector::new("io_uring sendmsg by SQPOLL", |target| {
        message(&mut polled()?, at(target.v4()), squeue::Flags::empty())
    })
    .needs(NEEDS),
    Vector::new("io_uring sendmsg by SQPOLL, IPv6", |target| {
        message(&mut polled()?, at(target.v6()), squeue::Flags::ASYNC)
    })
    .needs(NEEDS),
    Vector::new("io_uring send with an address", send_with_address).needs("Linux 6.0 with io_uring for everybody"),
    Vector::new("io_uring zero-copy send with an address", zero_copy).needs("Linux 6.0 with io_uring for everybody"),
    Vector::new("io_uring setsockopt of a routing header", routing_header)
        .needs("Linux 6.7 with io_uring for everybody"),
    Vector::new("io_uring socket and connect by SQPOLL", |target| made_by_ring(polled()?, at(target.v4())))
        .needs("Linux 5.19 with io_uring for everybody"),
    Vector::prepared("io_uring ring of another cgroup makes the socket by SQPOLL", Place::MovedIn, |target| {
        let (ring, to) = (polled()?, at(target.v4()));
        Ok(Box::new(move || made_by_ring(ring, to)))
    })
    .needs("Linux 5.19 with io_uring for everybody"),
];

fn failed(error: &std::io::Error) -> Step {
    Step::new("io_uring_setup", error)
}

fn plain() -> Outcome<IoUring> {
    IoUring::new(8).map_err(|error| failed(&error))
}

fn polled() -> Outcome<IoUring> {
    IoUring::builder().dontfork().setup_sqpoll(IDLE).build(8).map_err(|error| failed(&error))
}

/// Has one thing done and waits for its end.
fn submit(ring: &mut IoUring, call: &'static str, entry: &squeue::Entry) -> Outcome<i32> {
    // SAFETY: the callers keep what the entry points to until this returns, which is after its end.
    unsafe { ring.submission().push(entry) }.expect("the queue is empty");
    ring.submit_and_wait(1).map_err(|error| Step::new("io_uring_enter", &error))?;
    let result = ring.completion().next().ok_or(Step { call, errno: libc::EAGAIN })?.result();
    if result < 0 { Err(Step { call, errno: -result }) } else { Ok(result) }
}

fn connect_by(ring: &mut IoUring, socket: &OwnedFd, to: SocketAddr, flags: squeue::Flags) -> Outcome {
    let to = Address::from(to);
    let length = u32::try_from(to.0.len()).expect("addresses are short");
    let entry = opcode::Connect::new(Fd(socket.as_raw_fd()), to.0.as_ptr().cast(), length).build().flags(flags);
    match submit(ring, "connect", &entry) {
        Err(step) if step.errno == libc::EINPROGRESS => Ok(()),
        other => other.map(drop),
    }
}

fn dial(ring: &mut IoUring, to: SocketAddr, flags: squeue::Flags) -> Outcome {
    connect_by(ring, &stream(to)?, to, flags)
}

fn connected(ring: &mut IoUring, to: SocketAddr) -> Outcome {
    let socket = datagram(to)?;
    connect_by(ring, &socket, to, squeue::Flags::ASYNC)?;
    let length = u32::try_from(DATA.len()).expect("it is short");
    let entry = opcode::Send::new(Fd(socket.as_raw_fd()), DATA.as_ptr(), length).build().flags(squeue::Flags::ASYNC);
    submit(ring, "send", &entry).map(drop)
}

fn message(ring: &mut IoUring, to: SocketAddr, flags: squeue::Flags) -> Outcome {
    let (socket, to) = (datagram(to)?, Address::from(to));
    let mut part = libc::iovec { iov_base: DATA.as_ptr().cast_mut().cast(), iov_len: DATA.len() };
    let message = header(Some(&to), &[], &mut part);
    let entry = opcode::SendMsg::new(Fd(socket.as_raw_fd()), &raw const message).build().flags(flags);
    submit(ring, "sendmsg", &entry).map(drop)
}

fn send_with_address(target: Target) -> Outcome {
    let (socket, to) = (datagram(at(target.v4()))?, Address::from(at(target.v4())));
    let (length, to_length) = lengths(&to);
    let entry = opcode::Send::new(Fd(socket.as_raw_fd()), DATA.as_ptr(), length)
        .dest_addr(to.0.as_ptr().cast())
        .dest_addr_len(to_length)
        .build();
    submit(&mut plain()?, "send", &entry).map(drop)
}

fn zero_copy(target: Target) -> Outcome {
    let (socket, to) = (datagram(at(target.v4()))?, Address::from(at(target.v4())));
    let (length, to_length) = lengths(&to);
    let entry = opcode::SendZc::new(Fd(socket.as_raw_fd()), DATA.as_ptr(), length)
        .dest_addr(to.0.as_ptr().cast())
        .dest_addr_len(to_length)
        .build();
    submit(&mut plain()?, "send", &entry).map(drop)
}

fn routing_header(target: Target) -> Outcome {
    let socket = datagram(at(target.friend6()))?;
    let header = route6(SEGMENTS, target);
    let length = u32::try_from(header.len()).expect("it is short");
    let level = libc::IPPROTO_IPV6.cast_unsigned();
    let name = IPV6_RTHDR.cast_unsigned();
    let entry = opcode::SetSockOpt::new(Fd(socket.as_raw_fd()), level, name, header.as_ptr().cast(), length).build();
    submit(&mut plain()?, "setsockopt", &entry)?;
    send_to(&socket, DATA, 0, at(target.friend6()))
}

fn lengths(to: &Address) -> (u32, u32) {
    (u32::try_from(DATA.len()).expect("it is short"), u32::try_from(to.0.len()).expect("addresses are short"))
}

/// The socket is that of the thread that polls.
fn made_by_ring(mut ring: IoUring, to: SocketAddr) -> Outcome {
    use std::os::fd::FromRawFd;
    let entry = opcode::Socket::new(libc::AF_INET, libc::SOCK_DGRAM, 0).build();
    let fd = submit(&mut ring, "socket", &entry)?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    connect(&socket, to)?;
    send(&socket, DATA, 0)
}
