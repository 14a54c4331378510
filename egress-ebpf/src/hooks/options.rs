//! `setsockopt`: options that send packets elsewhere than to their destination, or from an address that is somebody else's.

use aya_ebpf::{macros::cgroup_sockopt, programs::SockoptContext};
use egress_common::{Address, Flow, Hook, Protocol, decide_bypass};

use crate::{
    answer::{PASS, answer_without_errno},
    events,
    rules::Maps,
    workloads,
};

/// Levels and options of `linux/in.h` and `linux/in6.h`, and a family of `linux/socket.h`.
const AF_INET6: u32 = 10;
const IPPROTO_IP: i32 = 0;
const IP_OPTIONS: i32 = 4;
const IP_FREEBIND: i32 = 15;
const IP_TRANSPARENT: i32 = 19;
const IPPROTO_IPV6: i32 = 41;
const IPV6_2292PKTOPTIONS: i32 = 6;
const IPV6_RTHDR: i32 = 57;
const IPV6_TRANSPARENT: i32 = 75;
const IPV6_FREEBIND: i32 = 78;

/// Longer values are never copied for programs, and the kernel takes a program that leaves their length in place for one
/// that wrote beyond (`__cgroup_bpf_run_filter_setsockopt` of `kernel/bpf/cgroup.c`). A page is at least this long.
const COPIED: i32 = 4096;

#[cgroup_sockopt(setsockopt)]
fn setsockopt(ctx: SockoptContext) -> i32 {
    // SAFETY: the kernel passes a valid context that lives as long as the program runs, to this program alone.
    let option = unsafe { &mut *ctx.sockopt };
    if option.optlen > COPIED {
        // Zero stands for the value as the caller gave it.
        option.optlen = 0;
    }
    // SAFETY: the kernel gives every call the socket that it is about.
    let (family, protocol) = unsafe {
        let socket = option.__bindgen_anon_1.sk;
        ((*socket).family, (*socket).protocol)
    };
    let is_bypass = match (option.level, option.optname) {
        // Hosts to go by; or a source that is not this host's, with which a socket sends itself what seems to come from
        // elsewhere, and the kernel answers it, or the socket may.
        (IPPROTO_IP, IP_OPTIONS | IP_TRANSPARENT)
        | (IPPROTO_IPV6, IPV6_RTHDR | IPV6_2292PKTOPTIONS | IPV6_FREEBIND | IPV6_TRANSPARENT) => true,
        // IPv4 sends nothing from a foreign address by this alone (`ip_route_output_key_hash_rcu`).
        (IPPROTO_IP, IP_FREEBIND) => family == AF_INET6,
        _ => false,
    };
    if is_bypass { judge(protocol) } else { PASS }
}

#[inline(always)]
fn judge(protocol: u32) -> i32 {
    let place = workloads::place_current();
    let decision = decide_bypass(&Maps::WITHOUT_SOCKET, place);
    let flow = Flow { place, protocol: Protocol::from_kernel(protocol), address: Address::UNSPECIFIED, port: 0 };
    events::record(Hook::Setsockopt, &flow, &decision);
    answer_without_errno(decision.verdict)
}
