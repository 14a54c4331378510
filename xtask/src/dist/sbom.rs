//! What is in the program, as `CycloneDX`: a file for the agent and one for the kernel programs that it carries, which are
//! built for another target.
//!
//! cargo-cyclonedx looks at all packages of a workspace, whose features it takes together, and writes a file into each. So
//! it gets a copy of the workspace that has no others.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::{TARGET, VERSION, copy, fresh, remove};
use crate::{install::Crate, process, toolchain, workspace::Workspace};

pub const TOOL: Crate<'_> = Crate::plain("cargo-cyclonedx", "0.5.9");

const PACKAGES: [(&str, &str); 2] = [("egress-agent", TARGET), ("egress-ebpf", toolchain::TARGET)];
/// What both depend on.
const SHARED: &str = "egress-common";

pub fn write(workspace: &Workspace, tool: &Path, directory: &Path, epoch: &str) -> Result<()> {
    let apart = workspace.target("dist-sbom");
    for (package, target) in PACKAGES {
        fresh(&apart)?;
        copy_with(workspace, &apart, package)?;
        list(workspace, tool, &apart, target, epoch)?;
        let text = read(&apart.join(package).join("sbom.json"))?;
        // Where the workspace lies on this machine is nobody's business.
        let text = text.replace(&format!("file://{}", apart.display()), "file://.");
        let file = directory.join(format!("{package}-{VERSION}.cdx.json"));
        fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    remove(&apart)
}

fn copy_with(workspace: &Workspace, apart: &Path, package: &str) -> Result<()> {
    for name in [package, SHARED, "Cargo.lock"] {
        copy(&workspace.root().join(name), &apart.join(name))?;
    }
    let manifest = with_members(&read(&workspace.root().join("Cargo.toml"))?, &[package, SHARED])?;
    let file = apart.join("Cargo.toml");
    fs::write(&file, manifest).with_context(|| format!("cannot write {}", file.display()))
}

/// The manifest of a workspace that has these members.
fn with_members(manifest: &str, members: &[&str]) -> Result<String> {
    let is_default = |line: &&str| line.starts_with("default-members = ");
    let is_members = |line: &str| line.starts_with("members = ");
    ensure!(manifest.lines().any(is_members), "Cargo.toml has no line `members = …`");
    let line = |line: &str| if is_members(line) { format!("members = {members:?}\n") } else { format!("{line}\n") };
    Ok(manifest.lines().filter(|line| !is_default(line)).map(line).collect())
}

fn list(workspace: &Workspace, tool: &Path, apart: &Path, target: &str, epoch: &str) -> Result<()> {
    let mut cyclonedx = workspace.cargo_from(Command::new(tool));
    cyclonedx
        .args(["cyclonedx", "--quiet", "--format", "json", "--spec-version", "1.5", "--all", "--no-build-deps"])
        .args(["--target", target, "--override-filename", "sbom"])
        .current_dir(apart)
        .env("SOURCE_DATE_EPOCH", epoch);
    process::run_to_stderr(&mut cyclonedx, "listing what is in the program")
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_copy_has_no_other_members() {
        let manifest = "[workspace]\nmembers = [\"a\", \"b\"]\ndefault-members = [\"b\"]\n\n[profile.dev]\n";
        let expected = "[workspace]\nmembers = [\"a\", \"c\"]\n\n[profile.dev]\n";
        assert_eq!(with_members(manifest, &["a", "c"]).unwrap(), expected);
        assert!(with_members("[package]\n", &["a"]).is_err());
    }
}
