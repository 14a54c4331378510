//! Whether the kernel asks BPF programs as a security module.

use std::{fs, path::PathBuf};

use crate::mounts;

/// `CONFIG_BPF_LSM` is not enough: BPF must also be among the modules that are active (`lsm=` of the kernel's command line, or
/// `CONFIG_LSM`). Elsewhere programs are loaded and attached all the same, and never run. `None` where it cannot be told.
pub(super) fn is_active() -> Option<bool> {
    listed_by_the_kernel().or_else(|| listed_in_securityfs(mounts::of_type("securityfs").ok()?))
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

/// Reads what older kernels tell only where `securityfs` is mounted. `AppArmor`'s profile of containers hides it below `/sys`: what
/// is mounted elsewhere is as good.
fn listed_in_securityfs(mounts: Vec<PathBuf>) -> Option<bool> {
    let listed = mounts.into_iter().find_map(|mount| fs::read_to_string(mount.join("lsm")).ok())?;
    Some(listed.trim().split(',').any(|name| name == "bpf"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_that_cannot_be_read_hides_no_other() {
        let (hidden, seen) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mounts = || vec![hidden.path().to_owned(), seen.path().to_owned()];
        assert_eq!(listed_in_securityfs(mounts()), None);
        for (listed, is_active) in [("capability,bpf\n", true), ("lockdown,bpfx", false)] {
            fs::write(seen.path().join("lsm"), listed).unwrap();
            assert_eq!(listed_in_securityfs(mounts()), Some(is_active), "{listed}");
        }
    }
}
