//! A BPF toolchain below `target/toolchain`: Debian's rustc with its prebuilt `core` for BPF, unpacked and not
//! installed, and a bpf-linker built against the LLVM library that this rustc uses.
//!
//! Both lie behind short scripts that find their libraries relative to themselves, so the workspace may be moved.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    debian::{self, Debian},
    install::Crate,
    step,
    workspace::Workspace,
};

/// Whoever changes what [`unpack`] leaves changes this.
const RECIPE: &str = "debian rustc 1";

const LINKER_VERSION: &str = "0.13.0";

pub fn is_ready(workspace: &Workspace) -> bool {
    step::is_done(&directory(workspace, "rustc"), RECIPE)
        && step::is_done(&directory(workspace, "bpf-linker"), &linker_recipe())
}

/// The rustc and the linker, fetched and built if need be.
pub fn ensure(workspace: &Workspace) -> Result<(PathBuf, PathBuf)> {
    let (rustc, linker) = (directory(workspace, "rustc"), directory(workspace, "bpf-linker"));
    step::once(&rustc, RECIPE, |directory| unpack(workspace, directory))?;
    step::once(&linker, &linker_recipe(), |directory| build_linker(workspace, &rustc, directory))?;
    Ok((rustc.join("rustc"), linker.join("bpf-linker")))
}

fn directory(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target("toolchain").join(name)
}

fn linker_recipe() -> String {
    format!("bpf-linker {LINKER_VERSION} for {RECIPE}")
}

fn unpack(workspace: &Workspace, directory: &Path) -> Result<()> {
    let debian = Debian::open(workspace)?;
    let standard = dependency(&debian, "libstd-rust-web-dev", "libstd-rust-web-")?;
    let llvm = dependency(&debian, &standard, "libllvm")?;
    let named = ["rustc-web", "libstd-rust-web-dev", "libstd-rust-web-dev-bpf", &standard, &llvm];
    let archives = debian.plan(&named, &[&llvm]).context("Debian's rustc with a BPF target is not to be had")?;
    debian.unpack(&archives, directory)?;
    expose_llvm(directory)?;
    debian::write_wrapper(&directory.join("rustc"), directory, "exec \"$root/usr/bin/rustc\" \"$@\"")
}

/// The one dependency of `package` whose name, which carries a version, starts with `prefix`.
fn dependency(debian: &Debian, package: &str, prefix: &str) -> Result<String> {
    let depends = debian.depends(package).with_context(|| format!("apt's sources have no {package}"))?;
    let found = depends.into_iter().find(|name| name.starts_with(prefix));
    found.with_context(|| format!("{package} depends on no {prefix}*"))
}

/// Makes an LLVM prefix of the runtime library alone: `llvm/lib` with the library's name for linkers and for loaders.
fn expose_llvm(directory: &Path) -> Result<()> {
    let library = llvm_library(directory)?;
    let name = library.file_name().context("a library has a name")?;
    let prefix = directory.join("llvm/lib");
    fs::create_dir_all(&prefix).with_context(|| format!("cannot create {}", prefix.display()))?;
    let relative = Path::new("../..").join(library.strip_prefix(directory)?);
    for link in [name, "libLLVM.so".as_ref()] {
        symlink(&relative, prefix.join(link)).with_context(|| format!("cannot link {}", library.display()))?;
    }
    Ok(())
}

fn llvm_library(directory: &Path) -> Result<PathBuf> {
    for libraries in debian::library_directories(directory)? {
        for entry in fs::read_dir(&libraries).with_context(|| format!("cannot read {}", libraries.display()))? {
            let path = entry?.path();
            if llvm_version(&path).is_some() {
                return Ok(path);
            }
        }
    }
    bail!("{} has no libLLVM: remove it and start again", directory.display())
}

/// The major version in `libLLVM.so.22.1`.
fn llvm_version(library: &Path) -> Option<u32> {
    let version = library.file_name()?.to_str()?.strip_prefix("libLLVM.so.")?;
    version.split('.').next()?.parse().ok()
}

fn build_linker(workspace: &Workspace, rustc: &Path, directory: &Path) -> Result<()> {
    let llvm = llvm_version(&llvm_library(rustc)?).context("libLLVM has no version")?;
    eprintln!("xtask: building bpf-linker {LINKER_VERSION} for LLVM {llvm}, which takes about a minute");
    let linker = Crate {
        name: "bpf-linker",
        version: LINKER_VERSION,
        arguments: &["--no-default-features", "--features", &format!("llvm-{llvm}")],
        variables: &[
            ("LLVM_PREFIX", rustc.join("llvm").into()),
            // The linker's time goes into LLVM: more optimisation here would only make its build longer.
            ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1".into()),
        ],
    };
    linker.install(workspace, directory)?;
    debian::write_wrapper(&directory.join("bpf-linker"), rustc, "exec \"$here/bin/bpf-linker\" \"$@\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_version_is_in_the_name_of_the_library() {
        assert_eq!(llvm_version(Path::new("usr/lib/x86_64-linux-gnu/libLLVM.so.22.1")), Some(22));
        assert_eq!(llvm_version(Path::new("usr/lib/x86_64-linux-gnu/libLLVM-22.so")), None);
    }

    #[test]
    fn llvm_is_exposed_under_both_names() {
        let directory = tempfile::tempdir().unwrap();
        let libraries = directory.path().join("usr/lib/x86_64-linux-gnu");
        fs::create_dir_all(&libraries).unwrap();
        fs::write(libraries.join("libLLVM.so.22.1"), "library").unwrap();
        expose_llvm(directory.path()).unwrap();
        for name in ["libLLVM.so", "libLLVM.so.22.1"] {
            assert_eq!(fs::read_to_string(directory.path().join("llvm/lib").join(name)).unwrap(), "library");
        }
    }
}
