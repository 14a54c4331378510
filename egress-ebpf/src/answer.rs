//! The only place that knows what a `cgroup/sock_addr` program returns.

use egress_common::Verdict;

/// `connect()` or `sendmsg()` fails with `EPERM`.
const REFUSE: i32 = 0;
/// It goes on.
const PASS: i32 = 1;

/// What the kernel is told.
pub(crate) const fn answer(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Allow | Verdict::WouldDeny => PASS,
        Verdict::Deny => REFUSE,
    }
}
