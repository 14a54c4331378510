//! `cargo xtask run`: the demo, or the agent with the arguments given.
//!
//! The program takes the place of xtask: Ctrl-C reaches it alone and its exit code is the command's.

use std::{ffi::OsString, os::unix::process::CommandExt as _, path::Path, process::Command};

use anyhow::{Context as _, Result};

use crate::{
    build, companions, process,
    root::{self, Environment},
    workspace::Workspace,
};

pub fn run(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    if arguments.is_empty() { demo(workspace) } else { agent(workspace, arguments) }
}

fn demo(workspace: &Workspace) -> Result<()> {
    root::ensure("the demo")?;
    let toolchain = build::toolchain(workspace)?;
    let environment = companions::ensure(workspace)?;
    build::build_with(workspace, &toolchain)?;
    let mut cargo = workspace.cargo();
    process::run(cargo.args(["build", "--package", "egress-tests", "--bin", "demo"]), "building the demo")?;
    become_program(&workspace.target("debug/demo"), &environment, &[])
}

fn agent(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    root::ensure("egress-agent")?;
    build::build(workspace)?;
    become_program(&workspace.agent(), &Environment::new(), arguments)
}

fn become_program(program: &Path, environment: &Environment, arguments: &[OsString]) -> Result<()> {
    let mut command: Command = root::command(program.as_os_str(), environment);
    let error = command.args(arguments).exec();
    Err(error).with_context(|| format!("cannot start {}", program.display()))
}
