//! The Debian package, by cargo-deb; `egress-agent/Cargo.toml` says what is in it, `deploy/debian` holds its scripts.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};

use super::{TARGET, VERSION, fresh, names, remove};
use crate::{install::Crate, process, workspace::Workspace};

pub const TOOL: Crate<'_> = Crate::plain("cargo-deb", "3.8.0");

pub fn name() -> String {
    format!("egress-agent_{VERSION}-1_amd64.deb")
}

pub fn pack(workspace: &Workspace, tool: &Path, directory: &Path, epoch: &str) -> Result<()> {
    let mut deb = workspace.cargo_from(Command::new(tool));
    deb.args(["--quiet", "--no-build", "--no-strip", "--no-dbgsym", "--locked", "--package", "egress-agent"])
        .args(["--target", TARGET, "--output"])
        .arg(directory.join(name()))
        .env("SOURCE_DATE_EPOCH", epoch);
    process::run_to_stderr(&mut deb, "packing the Debian package")
}

/// The same package under a version before, to be upgraded.
pub fn write_older(workspace: &Workspace, package: &Path, older: &Path) -> Result<()> {
    let root = workspace.target("dist-older");
    fresh(&root)?;
    let mut unpack = Command::new("dpkg-deb");
    process::run_to_stderr(unpack.arg("--raw-extract").args([package, &root]), "unpacking the Debian package")?;
    let control = root.join("DEBIAN/control");
    let text = String::from_utf8(read(&control)?).context("control is not UTF-8")?;
    let text = text.replace(&format!("\nVersion: {VERSION}-1\n"), "\nVersion: 0.0.1-1\n");
    fs::write(&control, text).with_context(|| format!("cannot write {}", control.display()))?;
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "--build"]).args([&root, older]);
    process::run_to_stderr(&mut build, "packing an older Debian package")?;
    remove(&root)
}

/// Files without which a package is not complete.
const FILES: [&str; 10] = [
    "usr/lib/systemd/system/egress-agent.service",
    "etc/egress/agent.yaml",
    "etc/egress/policies/README",
    "usr/share/man/man1/egress-agent.1.gz",
    "usr/share/man/man1/egress-agent-run.1.gz",
    "usr/share/bash-completion/completions/egress-agent",
    "usr/share/zsh/vendor-completions/_egress-agent",
    "usr/share/fish/vendor_completions.d/egress-agent.fish",
    "usr/share/doc/egress-agent/copyright",
    "usr/share/doc/egress-agent/changelog.gz",
];
const SETTINGS: [&str; 2] = ["/etc/egress/agent.yaml", "/etc/egress/policies/README"];
const SCRIPTS: [&str; 3] = ["postinst", "postrm", "prerm"];

/// Looks at a package as dpkg does before it is handed to anybody.
pub fn check(workspace: &Workspace, package: &Path, program: &Path) -> Result<()> {
    let mut list = Command::new("dpkg-deb");
    let listed = process::capture(list.arg("--contents").arg(package), "listing the Debian package")?;
    let unsafe_lines: Vec<&str> = listed.lines().filter(|line| !is_of_root_alone(line)).collect();
    ensure!(unsafe_lines.is_empty(), "others than root may write:\n{}", unsafe_lines.join("\n"));
    let root = workspace.target("dist-unpacked");
    fresh(&root)?;
    let mut unpack = Command::new("dpkg-deb");
    process::run_to_stderr(unpack.arg("--raw-extract").args([package, &root]), "unpacking the Debian package")?;
    check_files(&root, program)?;
    check_control(&root.join("DEBIAN"))?;
    remove(&root)
}

/// Of a line of `dpkg-deb --contents`, which starts as one of `ls -l`.
fn is_of_root_alone(line: &str) -> bool {
    let mut words = line.split_whitespace();
    let (mode, owner) = (words.next().unwrap_or_default(), words.next());
    let is_writable = |at| mode.as_bytes().get(at).is_none_or(|&letter| letter == b'w');
    matches!(owner, Some("root/root" | "0/0")) && !is_writable(5) && !is_writable(8)
}

fn check_files(root: &Path, program: &Path) -> Result<()> {
    let missing: Vec<&str> = FILES.into_iter().filter(|file| !root.join(file).is_file()).collect();
    ensure!(missing.is_empty(), "the Debian package lacks {}", missing.join(", "));
    ensure!(read(&root.join("usr/bin/egress-agent"))? == read(program)?, "the Debian package has another program");
    let policies = names(&root.join("etc/egress/policies"))?;
    ensure!(policies == ["README"], "as installed there is no policy, and not {}", policies.join(", "));
    Ok(())
}

fn check_control(control: &Path) -> Result<()> {
    let settings = String::from_utf8(read(&control.join("conffiles"))?).context("conffiles is not UTF-8")?;
    ensure!(settings.lines().eq(SETTINGS), "the Debian package takes for settings: {settings}");
    SCRIPTS.into_iter().try_for_each(|script| {
        let mut shell = Command::new("sh");
        process::run(shell.arg("-n").arg(control.join(script)), &format!("the check of {script}"))
    })
}

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_than_root_may_write_is_noticed() {
        assert!(is_of_root_alone("-rw-r--r-- root/root      1061 2026-11-24 18:58 ./etc/egress/agent.yaml"));
        assert!(is_of_root_alone("drwxr-xr-x 0/0               0 2026-11-24 18:58 ./usr/"));
        for line in [
            "-rw-rw-r-- root/root 1 2026-11-24 18:58 ./f",
            "-rw-r--rw- root/root 1 2026-11-24 18:58 ./f",
            "-rw-r--r-- 1000/1000 1 2026-11-24 18:58 ./f",
            "",
        ] {
            assert!(!is_of_root_alone(line), "{line}");
        }
    }
}
