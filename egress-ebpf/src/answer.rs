//! The only place that knows what the programs return.

use aya_ebpf::helpers::generated::bpf_set_retval;
use egress_common::{Decision, Refusal, Verdict};

/// The call fails, with `EPERM` if nothing else is said.
pub(crate) const REFUSE: i32 = 0;
/// It goes on.
pub(crate) const PASS: i32 = 1;

/// Whether the kernel has `bpf_set_retval` (5.18); set by the agent before the programs are loaded, so that on others the
/// code that calls it is never looked at.
#[unsafe(no_mangle)]
static CAN_SET_RETVAL: u8 = 0;

/// What the kernel is told of a decision.
#[inline(always)]
pub(crate) fn answer(decision: &Decision) -> i32 {
    match decision.verdict {
        Verdict::Allow | Verdict::WouldDeny => PASS,
        Verdict::Deny => {
            refuse_with(decision.refusal);
            REFUSE
        }
    }
}

/// What the kernel is told where a refusal is always `EPERM`.
pub(crate) const fn answer_without_errno(verdict: Verdict) -> i32 {
    match verdict {
        Verdict::Allow | Verdict::WouldDeny => PASS,
        Verdict::Deny => REFUSE,
    }
}

#[inline(always)]
fn refuse_with(refusal: Refusal) {
    // SAFETY: the static is read as it stands in the loaded program, which may differ from what was compiled.
    let can = unsafe { core::ptr::read_volatile(&raw const CAN_SET_RETVAL) } != 0;
    if can && refusal != Refusal::Eperm {
        // SAFETY: the helper takes a number. It fails for none of ours; the call would then fail with `EPERM`.
        unsafe { bpf_set_retval(-refusal.errno()) };
    }
}
