//! Ways by sockets that are there before they are used: made or connected before the filter was attached, made in another
//! cgroup, passed, inherited; and ways by the cgroup and the namespaces of the process.

use std::{
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
    process::Command,
};

use anyhow::{Context, Result};

use crate::escape::{
    Outcome, Place, Rest, Step, Vector,
    sys::{
        self, Address, DATA, bind, check, check_size, connect, datagram, established, fork, send, send_to, socket_pair,
        stream, syscall,
    },
    target::{Target, at},
};

pub const VECTORS: &[Vector] = &[
    Vector::prepared("made before the filter, TCP connect", Place::BeforeAttach, made_stream),
    Vector::prepared("made before the filter, UDP sendto", Place::BeforeAttach, made_datagram),
    Vector::prepared("connected before the filter, TCP send", Place::BeforeAttach, |target| {
        let socket = standing(target)?;
        Ok(Box::new(move || send(&socket, DATA, 0)))
    }),
    Vector::prepared("connected before the filter, TCP splice", Place::BeforeAttach, |target| {
        let socket = standing(target)?;
        Ok(Box::new(move || splice(&socket)))
    }),
    Vector::prepared("connected before the filter, TCP vmsplice and splice", Place::BeforeAttach, |target| {
        let socket = standing(target)?;
        Ok(Box::new(move || vmsplice(&socket)))
    }),
    Vector::prepared("connected before the filter, TCP sendfile", Place::BeforeAttach, |target| {
        let socket = standing(target)?;
        Ok(Box::new(move || sendfile(&socket)))
    }),
    Vector::prepared("connected before the filter, UDP send", Place::BeforeAttach, |target| {
        let socket = datagram(at(target.v4()))?;
        connect(&socket, at(target.v4()))?;
        Ok(Box::new(move || send(&socket, DATA, 0)))
    }),
    Vector::prepared("connected before the filter, UDP send with IP_PKTINFO", Place::BeforeAttach, |target| {
        let socket = datagram(at(target.v4()))?;
        connect(&socket, at(target.v4()))?;
        let control = [0; 12];
        Ok(Box::new(move || sys::send_message(&socket, None, &[(libc::IPPROTO_IP, libc::IP_PKTINFO, &control)])))
    }),
    Vector::prepared("made in another cgroup, TCP connect", Place::MovedIn, made_stream),
    Vector::prepared("made in another cgroup, UDP sendto", Place::MovedIn, made_datagram),
    Vector::prepared("passed by SCM_RIGHTS from another cgroup, UDP sendto", Place::MovedIn, passed),
    Vector::prepared("taken by pidfd_getfd from another cgroup, UDP sendto", Place::MovedIn, taken)
        .needs("pidfd_getfd"),
    Vector::prepared("inherited across exec from another cgroup, UDP sendto", Place::MovedIn, inherited),
    Vector::prepared("vsock to a process in another cgroup that sends for it", Place::MovedIn, by_vsock)
        .needs("the module vsock_loopback"),
    Vector::prepared("made inside, used in another cgroup, TCP connect", Place::MovedOut, made_stream),
    Vector::prepared("made inside, used in another cgroup, UDP sendto", Place::MovedOut, made_datagram),
    Vector::new("in a cgroup below with a program of its own, TCP connect", dial).placed(Place::Nested),
    Vector::new("in a cgroup below with a program of its own, UDP sendto", send_one).placed(Place::Nested),
    Vector::new("in a threaded cgroup, TCP connect", dial).placed(Place::Threaded),
    Vector::new("in a threaded cgroup, UDP sendto", send_one).placed(Place::Threaded),
    Vector::new("in another network namespace, TCP connect", dial).placed(Place::Elsewhere),
    Vector::new("in another network namespace, UDP sendto", send_one).placed(Place::Elsewhere),
    Vector::new("in a user namespace of its own, TCP connect", |target| unshared(libc::CLONE_NEWUSER, target))
        .needs("user namespaces for everybody"),
    Vector::new("in a cgroup namespace of its own, TCP connect", |target| unshared(libc::CLONE_NEWCGROUP, target))
        .root_only(),
    Vector::new("by a child that moves itself to the root cgroup", moved_by_itself).root_only(),
];

fn dial(target: Target) -> Outcome {
    connect(&stream(at(target.v4()))?, at(target.v4()))
}

fn send_one(target: Target) -> Outcome {
    send_to(&datagram(at(target.v4()))?, DATA, 0, at(target.v4()))
}

fn made_stream(target: Target) -> Outcome<Rest> {
    let (socket, to) = (stream(at(target.v4()))?, at(target.v4()));
    Ok(Box::new(move || connect(&socket, to)))
}

fn made_datagram(target: Target) -> Outcome<Rest> {
    let (socket, to) = (datagram(at(target.v4()))?, at(target.v4()));
    Ok(Box::new(move || send_to(&socket, DATA, 0, to)))
}

/// A TCP connection that stands.
fn standing(target: Target) -> Outcome<OwnedFd> {
    let socket = stream(at(target.v4()))?;
    connect(&socket, at(target.v4()))?;
    established(&socket)?;
    Ok(socket)
}

fn pipe() -> Outcome<[OwnedFd; 2]> {
    let mut fds = [0; 2];
    // SAFETY: `fds` has room for two descriptors and lives through the call.
    check("pipe2", unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) })?;
    // SAFETY: the call succeeded, so both are new descriptors that nobody else owns.
    Ok(fds.map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }))
}

fn splice(socket: &OwnedFd) -> Outcome {
    let [from, into] = pipe()?;
    let written = File::from(into).write_all(DATA);
    written.map_err(|error| Step::new("write", &error))?;
    move_pages(&from, socket)
}

fn vmsplice(socket: &OwnedFd) -> Outcome {
    let [from, into] = pipe()?;
    let part = libc::iovec { iov_base: DATA.as_ptr().cast_mut().cast(), iov_len: DATA.len() };
    // SAFETY: `part` points to static bytes and lives through the call.
    check_size("vmsplice", unsafe { libc::vmsplice(into.as_raw_fd(), &raw const part, 1, 0) })?;
    move_pages(&from, socket)
}

fn move_pages(from: &OwnedFd, socket: &OwnedFd) -> Outcome {
    let (from, into) = (from.as_raw_fd(), socket.as_raw_fd());
    // SAFETY: no offset is passed.
    let moved = unsafe { libc::splice(from, std::ptr::null_mut(), into, std::ptr::null_mut(), DATA.len(), 0) };
    check_size("splice", moved)
}

fn sendfile(socket: &OwnedFd) -> Outcome {
    let file = File::open("/proc/self/exe").map_err(|error| Step::new("open", &error))?;
    sys::send_file(socket, &file, 64)
}

/// Waits until it is killed, which it is with its parent.
fn wait_forever() {
    loop {
        // SAFETY: no pointer is passed.
        unsafe { libc::pause() };
    }
}

/// A process that stays in the other cgroup passes a socket on.
fn passed(target: Target) -> Outcome<Rest> {
    let ([mine, other], to) = (socket_pair()?, at(target.v4()));
    fork(|| {
        let passed = datagram(to).and_then(|socket| {
            let fd = socket.as_raw_fd().to_ne_bytes();
            sys::send_message(&other, None, &[(libc::SOL_SOCKET, libc::SCM_RIGHTS, &fd)])
        });
        if passed.is_ok() {
            wait_forever();
        }
    })?;
    Ok(Box::new(move || send_to(&sys::receive_descriptor(&mine)?, DATA, 0, to)))
}

/// A process that stays in the other cgroup has a socket that is taken from it.
fn taken(target: Target) -> Outcome<Rest> {
    let (socket, to) = (datagram(at(target.v4()))?, at(target.v4()));
    let [mine, other] = socket_pair()?;
    let (number, pid) = (socket.as_raw_fd(), fork(wait_forever)?);
    // Only the other process has it from here on.
    drop((socket, mine, other));
    Ok(Box::new(move || {
        let pidfd = syscall("pidfd_open", libc::SYS_pidfd_open, [unsigned(pid), 0, 0, 0])?;
        let fd = syscall("pidfd_getfd", libc::SYS_pidfd_getfd, [unsigned(pidfd), unsigned(number), 0, 0])?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        send_to(&unsafe { OwnedFd::from_raw_fd(fd) }, DATA, 0, to)
    }))
}

fn unsigned(number: i32) -> usize {
    usize::try_from(number).expect("ids and descriptors are not negative")
}

fn inherited(target: Target) -> Outcome<Rest> {
    let (socket, to) = (datagram(at(target.v4()))?, at(target.v4()));
    // SAFETY: no pointer is passed.
    check("fcntl", unsafe { libc::fcntl(socket.as_raw_fd(), libc::F_SETFD, 0) })?;
    Ok(Box::new(move || {
        let mut command = Command::new("/proc/self/exe");
        command.args(["use", &socket.as_raw_fd().to_string(), &to.to_string()]);
        let status = command.status().map_err(|error| Step::new("execve", &error))?;
        if status.success() { Ok(()) } else { Err(Step { call: "sendto", errno: status.code().unwrap_or(libc::EIO) }) }
    }))
}

/// What runs after the exec: sends by a descriptor that is there already, and ends with the error number.
pub fn use_inherited(arguments: &[String]) -> Result<()> {
    let [fd, to] = arguments else { anyhow::bail!("two arguments") };
    let (fd, to): (RawFd, SocketAddr) = (fd.parse()?, to.parse()?);
    // SAFETY: whoever started this program left the descriptor open for it.
    let socket = unsafe { BorrowedFd::borrow_raw(fd) }.try_clone_to_owned().context("nothing was inherited")?;
    if let Err(step) = send_to(&socket, DATA, 0, to) {
        std::process::exit(step.errno);
    }
    Ok(())
}

/// Without this module the address of this machine is that of its hypervisor, which is not to be spoken to.
const LOOPBACK_OF_VSOCK: &str = "/sys/module/vsock_loopback";

/// Whoever listens outside does what it is told. The frames themselves cannot be seen by the far namespace.
fn by_vsock(target: Target) -> Outcome<Rest> {
    fs::metadata(LOOPBACK_OF_VSOCK).map_err(|error| Step::new("stat", &error))?;
    let listener = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
    bind(&listener, vsock_address(target, u32::MAX))?;
    sys::listen(&listener)?;
    fork(|| {
        if let Ok(peer) = sys::accept(&listener) {
            // A failure shows: nothing arrives.
            let _ = send_one(target).and_then(|()| send(&peer, DATA, 0));
            wait_forever();
        }
    })?;
    Ok(Box::new(move || {
        let socket = sys::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)?;
        connect(&socket, vsock_address(target, 1))?;
        sys::receive(&socket)
    }))
}

/// A `struct sockaddr_vm` with a port for each attempt.
fn vsock_address(target: Target, host: u32) -> Address {
    let mut bytes = u16::try_from(libc::AF_VSOCK).expect("a family has 16 bits").to_ne_bytes().to_vec();
    bytes.extend([0; 2]);
    bytes.extend((0x1_0000 + u32::from(target.number())).to_ne_bytes());
    bytes.extend(host.to_ne_bytes());
    bytes.resize(16, 0);
    Address(bytes)
}

fn unshared(namespace: i32, target: Target) -> Outcome {
    // SAFETY: this process has one thread, and no file descriptor table is unshared.
    check("unshare", unsafe { libc::unshare(namespace) })?;
    dial(target)
}

/// Who may write to the hierarchy of cgroups can leave.
fn moved_by_itself(target: Target) -> Outcome {
    let mount = egress_agent::cgroup::mount_point();
    let root = mount.map_err(|_| Step { call: "mountinfo", errno: libc::ENOENT })?;
    fs::write(root.join("cgroup.procs"), "0").map_err(|error| Step::new("write", &error))?;
    dial(target)
}
