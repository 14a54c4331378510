//! What this machine has for compiling to BPF. Looks, and changes nothing.

use std::{env, fs, path::Path, path::PathBuf, process::Command};

use super::{TARGET, private};
use crate::{debian, process, workspace::Workspace};

/// All that the choice depends on.
pub struct Survey {
    pub given_rustc: Option<PathBuf>,
    pub given_linker: Option<PathBuf>,
    pub path_linker: Option<PathBuf>,
    pub nightly: Nightly,
    pub rustc_with_target: Option<PathBuf>,
    pub private: Private,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Nightly {
    Complete,
    WithoutSource,
    Missing,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Private {
    Ready,
    Possible,
    Impossible,
}

pub fn survey(workspace: &Workspace) -> Survey {
    Survey {
        given_rustc: variable("EGRESS_BPF_RUSTC"),
        given_linker: variable("EGRESS_BPF_LINKER"),
        path_linker: process::find("bpf-linker"),
        nightly: nightly(),
        rustc_with_target: rustc_with_target(),
        private: private_toolchain(workspace),
    }
}

fn variable(name: &str) -> Option<PathBuf> {
    env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// Asks `rustup which`, not `rustup run`, which may start a download.
fn nightly() -> Nightly {
    let mut command = Command::new("rustup");
    command.args(["which", "--toolchain", "nightly", "rustc"]).env("RUSTUP_AUTO_INSTALL", "0");
    let Ok(rustc) = process::capture(&mut command, "rustup which") else { return Nightly::Missing };
    let Some(sysroot) = Path::new(rustc.trim()).ancestors().nth(2) else { return Nightly::Missing };
    if sysroot.join("lib/rustlib/src/rust/library/Cargo.lock").exists() {
        Nightly::Complete
    } else {
        Nightly::WithoutSource
    }
}

fn rustc_with_target() -> Option<PathBuf> {
    let installed = [process::find("rustc"), Some(PathBuf::from("/usr/bin/rustc"))];
    installed.into_iter().flatten().find(|rustc| has_target(rustc))
}

fn has_target(rustc: &Path) -> bool {
    let mut command = Command::new(rustc);
    command.args(["--print", "target-libdir", "--target", TARGET]);
    process::capture(&mut command, "rustc --print").is_ok_and(|directory| has_core(Path::new(directory.trim())))
}

fn has_core(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return false };
    entries.flatten().any(|entry| entry.file_name().to_string_lossy().starts_with("libcore-"))
}

fn private_toolchain(workspace: &Workspace) -> Private {
    if private::is_ready(workspace) {
        Private::Ready
    } else if debian::is_available() {
        Private::Possible
    } else {
        Private::Impossible
    }
}
