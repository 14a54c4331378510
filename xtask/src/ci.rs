//! `cargo xtask ci`: every check before a push, quick ones first.
//!
//! Advisories are not among them: they need a database from outside and change without a commit.

use std::{path::PathBuf, process::Command};

use anyhow::Result;

use crate::{build, docs as generated, install::Crate, process, test, toolchain::Toolchain, workspace::Workspace};

const DENY_VERSION: &str = "0.20.2";

pub fn ci(workspace: &Workspace) -> Result<()> {
    format(workspace)?;
    let toolchain = build::toolchain(workspace)?;
    build::build_with(workspace, &toolchain)?;
    clippy(workspace)?;
    clippy_kernel(workspace)?;
    warnings_kernel(workspace, &toolchain)?;
    docs(workspace)?;
    generated::check(workspace)?;
    deny(workspace)?;
    test::test(workspace, &[])
}

fn format(workspace: &Workspace) -> Result<()> {
    process::run(workspace.cargo().args(["fmt", "--all", "--check"]), "the format check (`cargo fmt --all` repairs it)")
}

fn clippy(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["clippy", "--workspace", "--exclude", "egress-ebpf", "--all-targets", "--", "-Dwarnings"]);
    process::run(&mut cargo, "clippy")
}

/// Clippy belongs to the host's rustc and cannot read another's `core`, so it sees the kernel programs as host code.
fn clippy_kernel(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["clippy", "--package", "egress-ebpf", "--", "-Dwarnings"]).env("CARGO_PROFILE_DEV_PANIC", "abort");
    process::run(&mut cargo, "clippy on the kernel programs")
}

fn warnings_kernel(workspace: &Workspace, toolchain: &Toolchain) -> Result<()> {
    let mut cargo = toolchain.cargo(workspace, "check", &["-Dwarnings"])?;
    process::run(&mut cargo, "checking the kernel programs")
}

fn docs(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["doc", "--workspace", "--exclude", "egress-ebpf", "--no-deps"]).env("RUSTDOCFLAGS", "-Dwarnings");
    process::run(&mut cargo, "building the documentation")
}

fn deny(workspace: &Workspace) -> Result<()> {
    let program = cargo_deny(workspace)?;
    let mut command = Command::new(program);
    command.current_dir(workspace.root()).args(["check", "bans", "licenses", "sources"]);
    process::run(&mut command, "cargo-deny")
}

/// The cargo-deny on PATH, or one that is built once below `target/tools`.
fn cargo_deny(workspace: &Workspace) -> Result<PathBuf> {
    if let Some(installed) = process::find("cargo-deny") {
        return Ok(installed);
    }
    Crate::plain("cargo-deny", DENY_VERSION).ensure(workspace)
}
