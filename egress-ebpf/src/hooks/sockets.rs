//! `socket`: sockets whose destinations no hook sees are refused.
//!
//! The kernel asks for `AF_INET` and `AF_INET6` only, and not for sockets of its own (`inet_create` of `net/ipv4/af_inet.c`).

use aya_ebpf::{macros::cgroup_sock, programs::SockContext};
use egress_common::{Address, Flow, Hook, Protocol, SocketKind, decide_socket};

use crate::{
    answer::{PASS, answer_without_errno},
    events,
    rules::Maps,
    workloads,
};

#[cgroup_sock(sock_create)]
fn sock_create(ctx: SockContext) -> i32 {
    // SAFETY: the kernel passes a valid context that lives as long as the program runs; the verifier checks each access.
    let (kernel_type, protocol) = unsafe { ((*ctx.sock).type_, (*ctx.sock).protocol) };
    let protocol = Protocol::from_kernel(protocol);
    let kind = SocketKind::new(kernel_type, protocol);
    if let SocketKind::Tcp | SocketKind::Udp = kind {
        return PASS;
    }
    let flow = Flow { place: workloads::place_current(), protocol, address: Address::UNSPECIFIED, port: 0 };
    let decision = decide_socket(&Maps::WITHOUT_SOCKET, flow.place, kind);
    events::record_socket(Hook::SockCreate, kind, &flow, &decision);
    answer_without_errno(decision.verdict)
}
