//! Time since boot, suspended time included (`CLOCK_BOOTTIME`).

use aya_ebpf::helpers::generated::bpf_ktime_get_boot_ns;

#[inline(always)]
pub(crate) fn nanoseconds() -> u64 {
    // SAFETY: the helper takes no arguments and only returns a number.
    unsafe { bpf_ktime_get_boot_ns() }
}

#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "136 years")]
pub(crate) fn seconds() -> u32 {
    (nanoseconds() / 1_000_000_000) as u32
}
