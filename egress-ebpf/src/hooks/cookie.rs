//! Tells the agent the cookie of a network namespace, on kernels that do not tell it otherwise (`SO_NETNS_COOKIE`, 5.14).
//!
//! It is attached to the agent's own cgroup for a moment.

use aya_ebpf::{
    btf_maps::Array,
    helpers::{bpf_get_current_pid_tgid, generated::bpf_get_netns_cookie},
    macros::{btf_map, cgroup_sock_addr},
    programs::SockAddrContext,
};

use crate::answer::PASS;

/// The thread that asks, as `bpf_get_current_pid_tgid` has it, and the answer.
#[btf_map]
static COOKIE: Array<u64, 2> = Array::new();

#[cgroup_sock_addr(connect4)]
fn tell_cookie(ctx: SockAddrContext) -> i32 {
    if COOKIE.get(0).is_some_and(|&asker| asker == bpf_get_current_pid_tgid())
        && let Some(answer) = COOKIE.get_ptr_mut(1)
    {
        // SAFETY: the helper takes a valid context; the pointer is into the map, whose elements outlive the program.
        unsafe { *answer = bpf_get_netns_cookie(ctx.sock_addr.cast()) };
    }
    PASS
}
