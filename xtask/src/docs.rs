//! `cargo xtask docs`: writes the schemas, the CRD and the reference pages.
//!
//! What stands in them is the business of the program `reference` in the tests crate; xtask only builds and starts it.

use anyhow::Result;

use crate::{build, process, workspace::Workspace};

pub fn docs(workspace: &Workspace) -> Result<()> {
    build::build(workspace)?;
    reference(workspace, &[], "writing the generated files")
}

/// Fails where a file says something else than the program would write. The agent is built.
pub fn check(workspace: &Workspace) -> Result<()> {
    reference(workspace, &["--", "--check"], "the check of generated files")
}

fn reference(workspace: &Workspace, arguments: &[&str], work: &str) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--package", "egress-tests", "--bin", "reference"]).args(arguments);
    process::run(&mut cargo, work)
}
