//! `cargo xtask dist`: what is handed to hosts, in `target/dist`: a tarball, a Debian package, the lists of what is in the
//! program, and the checksums of all.
//!
//! Nothing is released or signed here. Everything is packed twice and compared: the same program gives the same bytes.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::{build, process, step, workspace::Workspace};

pub mod binary;
pub mod package;
mod sbom;
pub mod tarball;

/// What the packages are for. Static linking needs it to be named, and cargo then keeps build scripts apart.
const TARGET: &str = "x86_64-unknown-linux-gnu";
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

pub fn dist(workspace: &Workspace) -> Result<()> {
    ensure!(process::find("dpkg-deb").is_some(), "dpkg-deb is needed to check the Debian package");
    let epoch = epoch(workspace)?;
    let tools = Tools { deb: package::TOOL.ensure(workspace)?, cyclonedx: sbom::TOOL.ensure(workspace)? };
    let toolchain = build::toolchain(workspace)?;
    let _lock = step::lock(workspace)?;
    build::object(workspace, &toolchain)?;
    let program = binary::build(workspace)?;
    stage(workspace, &program)?;
    let packing = Packing { workspace, tools, epoch };
    packing.reproducibly(&workspace.target("dist"), &workspace.target("dist-again"))?;
    package::check(workspace, &workspace.target("dist").join(package::name()), &program)?;
    list(&workspace.target("dist"))
}

struct Tools {
    deb: PathBuf,
    cyclonedx: PathBuf,
}

/// What packing depends on, beside the tree.
struct Packing<'a> {
    workspace: &'a Workspace,
    tools: Tools,
    epoch: String,
}

impl Packing<'_> {
    fn reproducibly(&self, directory: &Path, again: &Path) -> Result<()> {
        let sums = self.pack(directory)?;
        let sums_again = self.pack(again)?;
        ensure!(sums == sums_again, "packing twice gave different bytes:\n{sums}{sums_again}");
        remove(again)
    }

    /// Fills the directory anew; the checksums of what is in it.
    fn pack(&self, directory: &Path) -> Result<String> {
        fresh(directory)?;
        tarball::pack(&tree(self.workspace), &directory.join(tarball::name()), &tarball::top(), &self.epoch)?;
        package::pack(self.workspace, &self.tools.deb, directory, &self.epoch)?;
        sbom::write(self.workspace, &self.tools.cyclonedx, directory, &self.epoch)?;
        sums(directory)
    }
}

/// When the sources were last changed, in seconds: the only time that enters a package.
pub fn epoch(workspace: &Workspace) -> Result<String> {
    if let Ok(given) = env::var("SOURCE_DATE_EPOCH") {
        ensure!(given.parse::<u32>().is_ok(), "SOURCE_DATE_EPOCH is {given:?}, and should be a number of seconds");
        return Ok(given);
    }
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%ct"]).current_dir(workspace.root());
    let printed = process::capture(&mut git, "looking up the last commit (SOURCE_DATE_EPOCH can be set instead)")?;
    Ok(printed.trim().to_owned())
}

/// An installation as the tarball has it; the Debian package takes its files from here, too.
fn tree(workspace: &Workspace) -> PathBuf {
    workspace.target("dist-tree")
}

/// What is in the tree beside the program and what is made from it.
const SHIPPED: [(&str, &str); 14] = [
    ("deploy/systemd/egress-agent.service", "lib/systemd/system/egress-agent.service"),
    ("deploy/debian/agent.yaml", "etc/egress/agent.yaml"),
    ("deploy/debian/policies/README", "etc/egress/policies/README"),
    ("deploy/crds", "deploy/crds"),
    ("deploy/helm", "deploy/helm"),
    ("deploy/kubernetes", "deploy/kubernetes"),
    ("policies", "policies"),
    ("docs", "docs"),
    ("ARCHITECTURE.md", "ARCHITECTURE.md"),
    ("CHANGELOG.md", "CHANGELOG.md"),
    ("GUARANTEES.md", "GUARANTEES.md"),
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-MIT", "LICENSE-MIT"),
    ("README.md", "README.md"),
];

fn stage(workspace: &Workspace, program: &Path) -> Result<()> {
    let tree = tree(workspace);
    fresh(&tree)?;
    copy(program, &tree.join("bin/egress-agent"))?;
    for (from, to) in SHIPPED {
        copy(&workspace.root().join(from), &tree.join(to))?;
    }
    let mut cargo = workspace.cargo();
    cargo.args(["run", "--quiet", "--package", "egress-tests", "--bin", "manual"]).arg(tree.join("share"));
    process::run(&mut cargo, "writing the manual pages and completions")
}

/// A file, or a directory with all that is in it.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        let entries = fs::read_dir(from).with_context(|| format!("cannot read {}", from.display()))?;
        return entries.into_iter().try_for_each(|entry| {
            let name = entry.with_context(|| format!("cannot read {}", from.display()))?.file_name();
            copy(&from.join(&name), &to.join(&name))
        });
    }
    fs::create_dir_all(to.parent().unwrap_or(to))
        .and_then(|()| fs::copy(from, to).map(drop))
        .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

pub fn fresh(directory: &Path) -> Result<()> {
    remove(directory)?;
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))
}

pub fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", directory.display()))
        }
        _ => Ok(()),
    }
}

/// The names in a directory, sorted.
fn names(directory: &Path) -> Result<Vec<String>> {
    let read = || fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect::<std::io::Result<Vec<_>>>();
    let names = read().with_context(|| format!("cannot read {}", directory.display()))?;
    let mut names = names.iter().map(|name| name.to_string_lossy().into_owned()).collect::<Vec<_>>();
    names.sort();
    Ok(names)
}

const SUMS: &str = "SHA256SUMS";

/// Writes the checksums of all that is in the directory, as `sha256sum --check` reads them.
fn sums(directory: &Path) -> Result<String> {
    let mut command = Command::new("sha256sum");
    command.args(names(directory)?).current_dir(directory);
    let sums = process::capture(&mut command, "computing checksums")?;
    let file = directory.join(SUMS);
    fs::write(&file, &sums).with_context(|| format!("cannot write {}", file.display()))?;
    Ok(sums)
}

fn list(directory: &Path) -> Result<()> {
    for name in names(directory)? {
        let file = directory.join(name);
        let bytes = fs::metadata(&file).with_context(|| format!("cannot read {}", file.display()))?.len();
        println!("{} ({} kB)", file.display(), bytes.div_ceil(1000));
    }
    Ok(())
}
