//! `cargo xtask build`: the BPF object, then the agent that carries it.
//!
//! Not a build script: `egress-agent/build.rs` only embeds what this leaves in `target/bpf/egress-ebpf.o`.

use std::{fs, path::Path};

use anyhow::{Context as _, Result};

use crate::{
    process, step,
    toolchain::{TARGET, Toolchain},
    workspace::Workspace,
};

pub fn build(workspace: &Workspace) -> Result<()> {
    build_with(workspace, &toolchain(workspace)?)
}

/// A BPF toolchain, ready; no other xtask works on it meanwhile.
pub fn toolchain(workspace: &Workspace) -> Result<Toolchain> {
    let _lock = step::lock(workspace)?;
    Toolchain::ensure(workspace)
}

pub fn build_with(workspace: &Workspace, toolchain: &Toolchain) -> Result<()> {
    object(workspace, toolchain)?;
    let mut cargo = workspace.cargo();
    process::run(cargo.args(["build", "--release", "--package", "egress-agent"]), "building the agent")
}

/// The kernel programs alone.
pub fn object(workspace: &Workspace, toolchain: &Toolchain) -> Result<()> {
    process::run(&mut toolchain.cargo(workspace, "build", &[])?, "building the kernel programs")?;
    let built = workspace.target("bpf").join(TARGET).join("release/egress-ebpf");
    replace_if_changed(&built, &workspace.bpf_object())
}

/// Leaves the time stamp of an unchanged file alone, so that cargo does not rebuild what embeds it.
fn replace_if_changed(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let fresh = to.with_extension("new");
    fs::write(&fresh, bytes).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, to).with_context(|| format!("cannot replace {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unchanged_object_keeps_its_time_stamp() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("built"), directory.path().join("object.o"));
        fs::write(&from, "one").unwrap();
        replace_if_changed(&from, &to).unwrap();
        let before = fs::metadata(&to).unwrap().modified().unwrap();
        replace_if_changed(&from, &to).unwrap();
        assert_eq!(fs::metadata(&to).unwrap().modified().unwrap(), before);
        fs::write(&from, "two").unwrap();
        replace_if_changed(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "two");
    }
}
