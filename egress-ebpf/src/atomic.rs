//! Numbers that several processors change at a time.

/// Adds to a number in one instruction (`BPF_XADD`), which does not tell what it was: kernels before 5.12 know no other. No atomic type
/// of the language is as modest.
#[inline(always)]
pub(crate) fn add(number: *mut u64, by: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: aligned, and of an element that outlives the program; every program changes it like this.
    unsafe {
        core::arch::asm!("lock *(u64 *)({number} + 0) += {by}", number = in(reg) number, by = in(reg) by);
    }
    // Where it is only looked at, not run.
    #[cfg(not(target_arch = "bpf"))]
    let _ = (number, by);
}
