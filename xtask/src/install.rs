//! Programs that come as crates: built once, below `target/`, in exactly one version.
//!
//! Not `cargo install` for the user: nothing reaches PATH.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use crate::{process, step, workspace::Workspace};

pub struct Crate<'a> {
    pub name: &'a str,
    pub version: &'a str,
    /// What the build may be told besides, as arguments and variables.
    pub arguments: &'a [&'a str],
    pub variables: &'a [(&'a str, OsString)],
}

impl<'a> Crate<'a> {
    /// A program that is built as it comes.
    pub const fn plain(name: &'a str, version: &'a str) -> Self {
        Self { name, version, arguments: &[], variables: &[] }
    }

    /// The program, built below `target/tools` if it is not there yet.
    pub fn ensure(&self, workspace: &Workspace) -> Result<PathBuf> {
        let Self { name, version, .. } = self;
        let _lock = step::lock(workspace)?;
        let directory = workspace.target("tools").join(name);
        step::once(&directory, version, |directory| {
            eprintln!("xtask: building {name} {version}, which takes minutes");
            self.install(workspace, directory)
        })?;
        Ok(directory.join("bin").join(name))
    }

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
