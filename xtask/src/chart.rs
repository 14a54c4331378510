//! `cargo xtask chart`: renders the Helm chart into plain manifests, and checks both, by Helm and by the schemas of Kubernetes.
//!
//! Helm comes as a package of Python and is kept below `target/tools`; what it is asked stands in `chart/helm.py`. No cluster is
//! reached.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use clap::Args;

use crate::{companions, process, step, workspace::Workspace};

#[derive(Args)]
pub struct Options {
    /// Write nothing: fail if a file is stale
    #[arg(long)]
    check: bool,
}

pub fn chart(workspace: &Workspace, options: &Options) -> Result<()> {
    let helm = ensure(workspace)?;
    process::run(Command::new(helm).arg(if options.check { "check" } else { "write" }), "the check of the chart")
}

/// Every package in one version, with the checksums of its files.
const REQUIREMENTS: &str = include_str!("chart/requirements.txt");

/// The program that renders and checks the chart, installed if it is not there yet.
pub fn ensure(workspace: &Workspace) -> Result<PathBuf> {
    let _lock = step::lock(workspace)?;
    let python = Python::find(workspace).context("Helm, which renders the chart, comes as a package of Python")?;
    let directory = workspace.target("tools/helm");
    step::once(
        &directory,
        &format!("1 {} {}\n{REQUIREMENTS}", python.program.display(), python.version),
        |directory| {
            eprintln!("xtask: installing Helm and the schemas of Kubernetes, 370 MB, into {}", directory.display());
            install(workspace, &python, &directory.join("packages"))?;
            write_launcher(&directory.join("bin"), &python.program)
        },
    )?;
    Ok(directory.join("bin/helm"))
}

/// Which Python, and where it is. What is installed for one is not for another.
struct Python {
    program: PathBuf,
    version: String,
}

impl Python {
    /// That on PATH; without one, Debian's.
    fn find(workspace: &Workspace) -> Result<Self> {
        const ASK: &str = "import sys; sys.version_info >= (3, 10) or sys.exit('3.10 or newer is needed'); \
             import ctypes, json, ssl, zipfile; print(sys.executable, '.'.join(map(str, sys.version_info[:3])))";
        let on_path = process::find("python3");
        let is_wrapped = on_path.is_none();
        let program = on_path.map_or_else(|| companions::python(workspace), Ok)?;
        let work = format!("asking {} for its modules", program.display());
        let answer = process::capture(Command::new(&program).args(["-c", ASK]), &work)?;
        let (real, version) = answer.trim().rsplit_once(' ').context("Python does not say where it is")?;
        // A version manager's stand-in on PATH may lead to another Python for another user.
        Ok(Self { program: if is_wrapped { program } else { real.into() }, version: version.to_owned() })
    }

    fn command(&self) -> Command {
        Command::new(&self.program)
    }

    /// Pip, as the Python has it, or as Debian ships it for new environments: the system's may lack it.
    fn pip(&self, workspace: &Workspace) -> Result<Command> {
        let mut command = self.command();
        if process::capture(self.command().args(["-m", "pip", "--version"]), "looking for pip").is_ok() {
            command.args(["-m", "pip"]);
        } else {
            command.arg(companions::pip(workspace)?.join("pip"));
        }
        Ok(command)
    }
}

/// Not an environment of its own (venv): Debian has that apart from Python.
fn install(workspace: &Workspace, python: &Python, packages: &Path) -> Result<()> {
    let mut pip = python.pip(workspace)?;
    pip.args(["install", "--quiet", "--disable-pip-version-check", "--no-compile", "--no-deps", "--require-hashes"])
        .args(["--only-binary", ":all:", "--requirement"])
        .arg(workspace.root().join("xtask/src/chart/requirements.txt"))
        .arg("--target")
        .arg(packages)
        .env("PIP_ROOT_USER_ACTION", "ignore");
    process::run_to_stderr(&mut pip, "installing Helm")
}

/// A script that knows where the packages and the workspace are from where it lies.
fn write_launcher(directory: &Path, python: &Path) -> Result<()> {
    let script = directory.join("helm");
    let text = format!(
        "#!/bin/sh\n\
         here=$(CDPATH= cd -- \"$(dirname -- \"$0\")\" && pwd)\n\
         root=$here/../../../..\n\
         PYTHONPATH=$here/../packages exec '{}' -B -S \"$root/xtask/src/chart/helm.py\" \"$root\" \"$@\"\n",
        python.display()
    );
    process::write_script(&script, &text)
}
