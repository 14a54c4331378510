//! The programs: loaded, and attached to cgroups.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsFd as _, OwnedFd},
};

use aya::{
    Btf, Ebpf,
    maps::Array,
    programs::{Program, ProgramError, ProgramType},
    sys::{BpfHelper, is_helper_supported},
};
use egress_common::Hook;
use rustix::{
    process::{Pid, getpid},
    thread::gettid,
};

use super::{DataplaneError, error::is_eperm, failed, lsm, sys};
use crate::cgroup::Cgroup;

/// Whether packets are looked at, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum PacketGuard {
    /// Each packet is: those with a source route, an IPv6 routing header, or a loopback address on a wire are refused.
    On,
    /// None is.
    Off,
}

/// The programs that are to run.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    /// In the order in which they are attached.
    pub(super) loaded: Vec<Hook>,
    /// What this kernel refused, and can be done without.
    pub(super) refused: Vec<Hook>,
}

impl Hooks {
    /// Loads the programs.
    pub(super) fn load(ebpf: &mut Ebpf, guard: PacketGuard) -> Result<Self, DataplaneError> {
        let mut hooks = Self::default();
        let is_wanted = |hook: &Hook| match hook {
            Hook::Egress => guard == PacketGuard::On,
            Hook::SocketCreate => lsm::is_active().unwrap_or_else(|| {
                tracing::info!(
                    "it cannot be told whether BPF is a security module, so packet and vsock sockets are not refused: \
                     mount securityfs, or allow lsm_list_modules(2)"
                );
                false
            }),
            _ => true,
        };
        for &hook in Hook::ALL.iter().filter(|&hook| is_wanted(hook)) {
            if !has_helpers(hook) {
                hooks.refused.push(hook);
                continue;
            }
            let Err(cause) = load(program(ebpf, hook)?, hook) else {
                hooks.loaded.push(hook);
                continue;
            };
            match (without(hook), refused(hook, cause)) {
                (Without::Degraded, DataplaneError::Program { cause, .. }) => {
                    tracing::debug!(hook = hook.as_str(), error = %cause, "this kernel refuses a program");
                    hooks.refused.push(hook);
                }
                (Without::Expected, error) => {
                    tracing::debug!(hook = hook.as_str(), %error, "this kernel takes no such programs");
                }
                (_, error) => return Err(error),
            }
        }
        Ok(hooks)
    }
}

/// Whether the kernel has what a program calls and older ones lack. Its verifier would find out as well, at length.
fn has_helpers(hook: Hook) -> bool {
    let helper = BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id;
    hook != Hook::Setsockopt || is_helper_supported(ProgramType::CgroupSockopt, helper).unwrap_or(true)
}

/// What it means that a kernel refuses a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    /// The rules are not enforced: nothing starts.
    Nothing,
    /// There are ways around that the documentation names: a warning, and `status` tells.
    Degraded,
    /// Nobody counts on it, because few kernels take it: `status` tells that it is not there.
    Expected,
}

const fn without(hook: Hook) -> Without {
    match hook {
        Hook::Setsockopt | Hook::Egress | Hook::Bind4 | Hook::Bind6 | Hook::Ingress | Hook::Query => Without::Degraded,
        Hook::SocketCreate => Without::Expected,
        Hook::Connect4
        | Hook::Connect6
        | Hook::Sendmsg4
        | Hook::Sendmsg6
        | Hook::SockCreate
        | Hook::Recvmsg4
        | Hook::Recvmsg6 => Without::Nothing,
    }
}

/// Without `CAP_PERFMON`, it is the verifier that refuses, and says so in its log.
fn refused(hook: Hook, cause: ProgramError) -> DataplaneError {
    let lacks_privilege = is_eperm(&cause) || cause.to_string().contains("prohibited for !root");
    if lacks_privilege { DataplaneError::Privilege } else { DataplaneError::Program { hook: hook.as_str(), cause } }
}

fn program(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut Program, DataplaneError> {
    ebpf.program_mut(hook.as_str()).ok_or(DataplaneError::Missing { what: "program", name: hook.as_str() })
}

fn load(program: &mut Program, hook: Hook) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockopt(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        // The program has the name of its hook.
        Program::LsmCgroup(program) => program.load(hook.as_str(), &Btf::from_sys_fs()?),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// Attaches a program to a cgroup, until the link is closed and no pin holds it.
pub(super) fn attach(ebpf: &mut Ebpf, hook: Hook, cgroup: &Cgroup) -> Result<OwnedFd, DataplaneError> {
    let program = program(ebpf, hook)?.fd().and_then(|program| Ok(program.as_fd().try_clone_to_owned()?));
    let program = program.map_err(|cause| DataplaneError::Program { hook: hook.as_str(), cause })?;
    sys::attach(program.as_fd(), cgroup.directory.as_fd(), attach_type(hook))
        .map_err(|cause| not_attached(hook, cgroup, cause))
}

/// The cookie of the calling thread's network namespace, from a program that is attached to its cgroup meanwhile.
pub(super) fn ask_cookie(ebpf: &mut Ebpf, own: &Cgroup) -> Result<u64, DataplaneError> {
    const PROGRAM: &str = "tell_cookie";
    const MAP: &str = "COOKIE";
    let missing = |what| move || DataplaneError::Missing { what, name: PROGRAM };
    let refused = |cause| DataplaneError::Program { hook: PROGRAM, cause };
    let program = ebpf.program_mut(PROGRAM).ok_or_else(missing("program"))?;
    load(program, Hook::Connect4).map_err(refused)?;
    let program = program.fd().map_err(refused)?.as_fd().try_clone_to_owned().map_err(DataplaneError::NoCookie)?;
    let map = ebpf.map_mut(MAP).ok_or_else(missing("map"))?;
    let failed = |what| move |cause| failed(MAP, what, cause);
    let mut answer = Array::<_, u64>::try_from(map).map_err(failed("open"))?;
    let id = |id: Pid| u64::try_from(id.as_raw_nonzero().get()).unwrap_or(0);
    answer.set(0, id(getpid()) << 32 | id(gettid()), 0).map_err(failed("write"))?;
    let link = sys::attach(program.as_fd(), own.directory.as_fd(), attach_type(Hook::Connect4));
    let _link = link.map_err(|cause| not_attached(Hook::Connect4, own, cause))?;
    UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect("127.0.0.1:53")).map_err(DataplaneError::NoCookie)?;
    match answer.get(&1, 0).map_err(failed("read"))? {
        // The ids are those of the initial pid namespace, and this process is not in it.
        0 => Err(DataplaneError::NoCookie(io::ErrorKind::Unsupported.into())),
        cookie => Ok(cookie),
    }
}

/// `enum bpf_attach_type` of `linux/bpf.h`.
pub(super) const fn attach_type(hook: Hook) -> u32 {
    match hook {
        Hook::Ingress => 0,
        Hook::Egress | Hook::Query => 1,
        Hook::SockCreate => 2,
        Hook::Bind4 => 8,
        Hook::Bind6 => 9,
        Hook::Connect4 => 10,
        Hook::Connect6 => 11,
        Hook::Sendmsg4 => 14,
        Hook::Sendmsg6 => 15,
        Hook::Recvmsg4 => 19,
        Hook::Recvmsg6 => 20,
        Hook::Setsockopt => 22,
        Hook::SocketCreate => 43,
    }
}

/// The kernel says `EPERM` where it would have to keep a program that wants to be alone from running.
fn not_attached(hook: Hook, cgroup: &Cgroup, cause: io::Error) -> DataplaneError {
    let (hook, cgroup) = (hook.as_str(), cgroup.path.clone());
    if is_eperm(&cause) {
        DataplaneError::NoRoom { hook, cgroup }
    } else {
        DataplaneError::Attach { hook, cgroup, cause }
    }
}
