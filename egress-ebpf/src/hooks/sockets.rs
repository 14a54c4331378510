//! `socket`: sockets whose destinations no hook sees are refused.

use aya_ebpf::{
    macros::{cgroup_sock, lsm_cgroup},
    programs::{LsmContext, SockContext},
};
use egress_common::{Address, Flow, Hook, Protocol, SocketKind, decide_socket};

use crate::{
    answer::{PASS, answer_without_errno},
    events,
    rules::Maps,
    workloads,
};

/// The kernel asks for `AF_INET` and `AF_INET6` only, and not for sockets of its own (`inet_create` of `net/ipv4/af_inet.c`).
#[cgroup_sock(sock_create)]
fn sock_create(ctx: SockContext) -> i32 {
    // SAFETY: the kernel passes a valid context that lives as long as the program runs; the verifier checks each access.
    let (family, kernel_type, protocol) = unsafe { ((*ctx.sock).family, (*ctx.sock).type_, (*ctx.sock).protocol) };
    let protocol = Protocol::from_kernel(protocol);
    match SocketKind::new(kernel_type, protocol) {
        SocketKind::Tcp | SocketKind::Udp => PASS,
        kind => judge(Hook::SockCreate, kind, family, protocol),
    }
}

/// The other families. Where the kernel has BPF among its security modules, it asks for every socket, and tells which are its
/// own (`security_socket_create`).
#[lsm_cgroup(hook = "socket_create")]
fn socket_create(ctx: LsmContext) -> i32 {
    let (family, is_kernels): (u32, i32) = (ctx.arg(0), ctx.arg(3));
    match SocketKind::of_family(family) {
        Some(kind) if is_kernels == 0 => judge(Hook::SocketCreate, kind, family, Protocol::from_kernel(0)),
        Some(_) | None => PASS,
    }
}

#[inline(always)]
fn judge(hook: Hook, kind: SocketKind, family: u32, protocol: Protocol) -> i32 {
    let flow = Flow { place: workloads::place_current(), protocol, address: Address::UNSPECIFIED, port: 0 };
    let decision = decide_socket(&Maps::WITHOUT_SOCKET, flow.place, kind);
    events::record_socket(hook, kind, family, &flow, &decision);
    answer_without_errno(decision.verdict)
}
