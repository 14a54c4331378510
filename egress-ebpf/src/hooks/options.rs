//! `setsockopt`: options that send packets elsewhere than to their destination, or from an address that is somebody else's.

use aya_ebpf::{bindings::bpf_sockopt, macros::cgroup_sockopt, programs::SockoptContext};
use egress_common::{Address, Flow, Hook, Protocol, Verdict, decide_bypass, remembers_peers};

use crate::{
    answer::{PASS, answer_without_errno},
    events,
    rules::Maps,
    stats, workloads,
};

/// Levels and options of `linux/in.h` and `linux/in6.h`.
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
    let is_forging = match (option.level, option.optname) {
        (IPPROTO_IP, IP_OPTIONS) | (IPPROTO_IPV6, IPV6_RTHDR | IPV6_2292PKTOPTIONS) => false,
        // With a source that is not this host's, a socket sends itself datagrams that seem to come from elsewhere, which
        // it then may answer.
        (IPPROTO_IP, IP_FREEBIND | IP_TRANSPARENT) | (IPPROTO_IPV6, IPV6_FREEBIND | IPV6_TRANSPARENT) => true,
        _ => return PASS,
    };
    judge(option, is_forging)
}

#[inline(always)]
fn judge(option: &bpf_sockopt, is_forging: bool) -> i32 {
    let place = workloads::place_current();
    if is_forging && !remembers_peers(&Maps::WITHOUT_SOCKET, place) {
        return PASS;
    }
    let decision = decide_bypass(&Maps::WITHOUT_SOCKET, place);
    stats::count(&decision, Hook::Setsockopt);
    // SAFETY: the kernel gives every call the socket that it is about.
    let protocol = unsafe { (*option.__bindgen_anon_1.sk).protocol };
    let flow = Flow { place, protocol: Protocol::from_kernel(protocol), address: Address::UNSPECIFIED, port: 0 };
    match decision.verdict {
        Verdict::Allow => {}
        Verdict::Deny | Verdict::WouldDeny => events::report(Hook::Setsockopt, &flow, &decision),
    }
    answer_without_errno(decision.verdict)
}
