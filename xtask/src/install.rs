//! Programs that come as crates: built once, below `target/`, in exactly one version.
//!
//! Not `cargo install` for the user: nothing reaches PATH.

use std::{ffi::OsString, fs, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{process, workspace::Workspace};

pub struct Crate<'a> {
    pub name: &'a str,
    pub version: &'a str,
    /// What the build may be told besides, as arguments and variables.
    pub arguments: &'a [&'a str],
    pub variables: &'a [(&'a str, OsString)],
}

impl Crate<'_> {
    /// Leaves the program in `directory/bin`. What an interrupted build completed is used by the next.
    pub fn install(&self, workspace: &Workspace, directory: &Path) -> Result<()> {
        let build = workspace.target("tools/build").join(self.name);
        let mut cargo: Command = workspace.cargo();
        cargo
            .args(["install", self.name, "--version", self.version, "--locked", "--no-track"])
            .args(self.arguments)
            .arg("--root")
            .arg(directory)
            .arg("--target-dir")
            .arg(&build)
            .envs(self.variables.iter().map(|(name, value)| (name, value)));
        process::run_to_stderr(&mut cargo, &format!("building {}", self.name))?;
        fs::remove_dir_all(&build).with_context(|| format!("cannot remove {}", build.display()))
    }
}
