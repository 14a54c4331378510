//! Programs of somebody else on a cgroup: a few instructions each, written by hand and loaded by `bpf(2)` itself, so that
//! they share nothing with the agent's way of loading and attaching.
//!
//! Beside the agent's links stand the ways of older tools (`BPF_PROG_ATTACH`), some of which leave no room for others.

use std::{
    ffi::CString,
    fs::File,
    io,
    mem::size_of_val,
    net::SocketAddrV4,
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use crate::cgroup::Cgroup;

/// Where in the kernel a program runs; the numbers are those of `enum bpf_attach_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    /// `BPF_CGROUP_INET_INGRESS`.
    Ingress = 0,
    /// `BPF_CGROUP_INET_EGRESS`.
    Egress = 1,
    /// `BPF_CGROUP_INET4_CONNECT`.
    Connect4 = 10,
    /// `BPF_CGROUP_INET6_CONNECT`.
    Connect6 = 11,
    /// `BPF_CGROUP_UDP4_SENDMSG`.
    Sendmsg4 = 14,
    /// `BPF_CGROUP_UDP6_SENDMSG`.
    Sendmsg6 = 15,
}

/// How a program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// `BPF_LINK_CREATE`: beside others, as the agent does.
    Link,
    /// `BPF_PROG_ATTACH` with `BPF_F_ALLOW_MULTI`: beside others.
    Multi,
    /// `BPF_PROG_ATTACH` with `BPF_F_ALLOW_OVERRIDE`: alone on its cgroup, until a program below takes its place there.
    Override,
    /// `BPF_PROG_ATTACH` with no flag: alone on its cgroup and on everything below.
    Exclusive,
}

impl Hook {
    /// `enum bpf_prog_type` of `linux/bpf.h`.
    const fn program_type(self) -> u32 {
        const CGROUP_SKB: u32 = 8;
        match self {
            Self::Ingress | Self::Egress => CGROUP_SKB,
            Self::Connect4 | Self::Connect6 | Self::Sendmsg4 | Self::Sendmsg6 => BPF_PROG_TYPE_CGROUP_SOCK_ADDR,
        }
    }
}

impl How {
    /// The flags of `BPF_PROG_ATTACH`, if that is the way.
    const fn flags(self) -> Option<u32> {
        match self {
            Self::Link => None,
            Self::Multi => Some(BPF_F_ALLOW_MULTI),
            Self::Override => Some(BPF_F_ALLOW_OVERRIDE),
            Self::Exclusive => Some(0),
        }
    }
}

/// A program in the kernel, not attached yet.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    hook: Hook,
}

/// A program that runs on a cgroup until this is dropped.
#[derive(Debug)]
pub struct Attached {
    program: Program,
    cgroup: File,
    /// Of [`How::Link`].
    link: Option<OwnedFd>,
}

impl Program {
    /// Allows everything and changes nothing.
    pub fn pass(hook: Hook) -> io::Result<Self> {
        load(hook, &answer(1))
    }

    /// Refuses everything.
    pub fn refuse(hook: Hook) -> io::Result<Self> {
        load(hook, &answer(0))
    }

    /// Sends calls for one destination to another, as service proxies do, and allows everything.
    pub fn rewrite(hook: Hook, from: SocketAddrV4, to: SocketAddrV4) -> io::Result<Self> {
        let (ip, port) = in_context(from);
        let (new_ip, new_port) = in_context(to);
        let body = [
            load_field(2, USER_IP4),
            load_field(3, USER_PORT),
            // Offsets count from the next instruction; both lead to the answer.
            skip_unless(2, ip, 5),
            skip_unless(3, port, 4),
            set(2, new_ip),
            store_field(2, USER_IP4),
            set(3, new_port),
            store_field(3, USER_PORT),
        ];
        load(hook, &[&body[..], &answer(1)].concat())
    }

    /// Attaches it to a cgroup.
    pub fn attach(self, cgroup: &Cgroup, how: How) -> io::Result<Attached> {
        let cgroup = File::open(cgroup.path())?;
        let link = match how.flags() {
            None => Some(self.link(&cgroup)?),
            Some(flags) => {
                bpf(BPF_PROG_ATTACH, &self.request(&cgroup, flags))?;
                None
            }
        };
        Ok(Attached { program: self, cgroup, link })
    }

    fn link(&self, cgroup: &File) -> io::Result<OwnedFd> {
        let request = LinkCreate {
            program: self.fd.as_raw_fd(),
            target: cgroup.as_raw_fd(),
            attach_type: self.hook as u32,
            flags: 0,
        };
        let fd = bpf(BPF_LINK_CREATE, &request)?;
        // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }

    fn request(&self, cgroup: &File, flags: u32) -> ProgramAttach {
        let (target, program) = (cgroup.as_raw_fd(), self.fd.as_raw_fd());
        ProgramAttach { target, program, attach_type: self.hook as u32, flags, replaced: 0 }
    }
}

impl Attached {
    /// Pins the link, which is then there for whoever opens it. It still ends when this is dropped.
    pub fn pin(&self, path: &Path) -> io::Result<()> {
        let link = self.link.as_ref().ok_or(io::ErrorKind::Unsupported)?;
        let path = CString::new(path.as_os_str().as_bytes())?;
        bpf(BPF_OBJ_PIN, &ObjectPin { path: path.as_ptr() as u64, object: link.as_raw_fd(), flags: 0 }).map(drop)
    }
}

/// A map of one kind that somebody else uses for something, pinned.
pub fn pin_array(path: &Path, value_size: u32, entries: u32) -> io::Result<()> {
    const BPF_MAP_TYPE_ARRAY: u32 = 2;
    let map = bpf(BPF_MAP_CREATE, &MapCreate { kind: BPF_MAP_TYPE_ARRAY, key_size: 4, value_size, entries })?;
    // SAFETY: the call succeeded, so `map` is a new descriptor that nobody else owns.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    let path = CString::new(path.as_os_str().as_bytes())?;
    bpf(BPF_OBJ_PIN, &ObjectPin { path: path.as_ptr() as u64, object: map.as_raw_fd(), flags: 0 }).map(drop)
}

impl Drop for Attached {
    fn drop(&mut self) {
        // To close a link is not enough: a process that another test is just starting may hold a copy until it calls exec.
        let detached = match &self.link {
            Some(link) => bpf(BPF_LINK_DETACH, &LinkDetach { link: link.as_raw_fd() }),
            None => bpf(BPF_PROG_DETACH, &self.program.request(&self.cgroup, 0)),
        };
        if let Err(error) = detached {
            eprintln!("cannot detach a program from {:?}: {error}", self.cgroup);
        }
    }
}

/// Commands of `bpf(2)`, its flags and a program type, from `linux/bpf.h`.
const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_PROG_ATTACH: libc::c_int = 8;
const BPF_PROG_DETACH: libc::c_int = 9;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_DETACH: libc::c_int = 34;
const BPF_F_ALLOW_OVERRIDE: u32 = 1;
const BPF_F_ALLOW_MULTI: u32 = 2;
const BPF_PROG_TYPE_CGROUP_SOCK_ADDR: u32 = 18;

/// Offsets in `struct bpf_sock_addr`.
const USER_IP4: i16 = 4;
const USER_PORT: i16 = 24;

/// `struct bpf_insn`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Instruction {
    code: u8,
    /// The destination in the low half, the source in the high half.
    registers: u8,
    offset: i16,
    value: i32,
}

/// `*(u32 *)(context + offset)` into a register. The context is in register 1.
const fn load_field(register: u8, offset: i16) -> Instruction {
    Instruction { code: 0x61, registers: 1 << 4 | register, offset, value: 0 }
}

/// A register into `*(u32 *)(context + offset)`.
const fn store_field(register: u8, offset: i16) -> Instruction {
    Instruction { code: 0x63, registers: register << 4 | 1, offset, value: 0 }
}

/// Jumps where the lower half of a register is not the value.
const fn skip_unless(register: u8, value: u32, offset: i16) -> Instruction {
    Instruction { code: 0x56, registers: register, offset, value: value.cast_signed() }
}

/// Sets the lower half of a register, and clears the upper.
const fn set(register: u8, value: u32) -> Instruction {
    Instruction { code: 0xb4, registers: register, offset: 0, value: value.cast_signed() }
}

/// Ends with an answer in register 0.
const fn answer(value: u32) -> [Instruction; 2] {
    [set(0, value), Instruction { code: 0x95, registers: 0, offset: 0, value: 0 }]
}

/// An address as `user_ip4` and `user_port` hold it: the bytes in network order.
fn in_context(address: SocketAddrV4) -> (u32, u32) {
    (u32::from_ne_bytes(address.ip().octets()), address.port().to_be().into())
}

/// The beginning of `union bpf_attr` for `BPF_PROG_LOAD`; the kernel takes the rest as zero.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach_type: u32,
}

/// The same for `BPF_PROG_ATTACH` and `BPF_PROG_DETACH`.
#[repr(C)]
struct ProgramAttach {
    target: RawFd,
    program: RawFd,
    attach_type: u32,
    flags: u32,
    replaced: RawFd,
}

/// The same for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    program: RawFd,
    target: RawFd,
    attach_type: u32,
    flags: u32,
}

/// The same for `BPF_LINK_DETACH`.
#[repr(C)]
struct LinkDetach {
    link: RawFd,
}

/// The same for `BPF_OBJ_PIN`.
#[repr(C)]
struct ObjectPin {
    path: u64,
    object: RawFd,
    flags: u32,
}

/// The same for `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    kind: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
}

/// What the kernel reads as `union bpf_attr`: plain numbers, without a gap, and every address in it is of memory that
/// lives during the call.
trait Request {}

impl Request for ProgramLoad {}
impl Request for ProgramAttach {}
impl Request for LinkCreate {}
impl Request for LinkDetach {}
impl Request for ObjectPin {}
impl Request for MapCreate {}

fn load(hook: Hook, instructions: &[Instruction]) -> io::Result<Program> {
    let license = c"GPL";
    let request = ProgramLoad {
        program_type: hook.program_type(),
        count: u32::try_from(instructions.len()).expect("the programs are a few instructions long"),
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: *b"foreign\0\0\0\0\0\0\0\0\0",
        interface: 0,
        expected_attach_type: hook as u32,
    };
    let fd = bpf(BPF_PROG_LOAD, &request)?;
    // SAFETY: the call succeeded, so `fd` is a new descriptor that nobody else owns.
    Ok(Program { fd: unsafe { OwnedFd::from_raw_fd(fd) }, hook })
}

/// The result of `bpf(2)`: a descriptor, or 0.
fn bpf<R: Request>(command: libc::c_int, request: &R) -> io::Result<RawFd> {
    // Programs and maps count as locked memory on some kernels.
    egress_agent::privileges::prepare();
    // SAFETY: the kernel reads `size_of_val(request)` bytes, all initialised, and what they point to, which lives during
    // the call (see `Request`); none of the commands used here writes to our memory.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(request), size_of_val(request)) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(RawFd::try_from(result).expect("a descriptor is an int"))
}
