//! Whether the kernel asks BPF programs as a security module.

use std::fs;

/// `CONFIG_BPF_LSM` is not enough: BPF must also be among the modules that are active (`lsm=` of the kernel's command line, or
/// `CONFIG_LSM`). Elsewhere programs are loaded and attached all the same, and never run.
pub(super) fn is_active() -> bool {
    listed_by_the_kernel().unwrap_or_else(listed_in_securityfs)
}

/// Asks `lsm_list_modules(2)`, which Linux has since 6.8.
fn listed_by_the_kernel() -> Option<bool> {
    /// Of `asm-generic/unistd.h`.
    const SYS_LSM_LIST_MODULES: libc::c_long = 461;
    /// Of `linux/lsm.h`.
    const LSM_ID_BPF: u64 = 109;
    let mut ids = [0_u64; 64];
    let mut size = u32::try_from(size_of_val(&ids)).expect("it is small");
    // SAFETY: the kernel writes at most `size` bytes of ids, and their size; both live through the call.
    let count = unsafe { libc::syscall(SYS_LSM_LIST_MODULES, ids.as_mut_ptr(), &raw mut size, 0) };
    let count = usize::try_from(count).ok()?;
    Some(ids.iter().take(count).any(|&id| id == LSM_ID_BPF))
}

/// Reads what older kernels tell only where `securityfs` is mounted.
fn listed_in_securityfs() -> bool {
    let listed = fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    listed.trim().split(',').any(|name| name == "bpf")
}
