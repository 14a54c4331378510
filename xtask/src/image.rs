//! `cargo xtask image`: the container image, in `target/image`: the root file system that `deploy/container/Dockerfile`
//! describes, and an archive of it that podman, docker and containerd load. Then the test of it, in containers of runc.
//!
//! No engine is needed: the few instructions that the Dockerfile has are followed here, and any other is refused.

use std::{
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use crate::{build, companions, dist, root, step, test, workspace::Workspace};

mod dockerfile;
mod oci;

use dockerfile::Dockerfile;

pub fn image(workspace: &Workspace) -> Result<()> {
    root::ensure("the test of the image, which runs containers")?;
    let toolchain = build::toolchain(workspace)?;
    let environment = companions::ensure_with_runc(workspace)?;
    build::object(workspace, &toolchain)?;
    let archive = make(workspace)?;
    println!("{} ({} kB)", archive.display(), fs::metadata(&archive)?.len().div_ceil(1000));
    let root = ("EGRESS_IMAGE_ROOT", root_directory(workspace).into());
    let environment: root::Environment = environment.into_iter().chain([root]).collect();
    let words = |line: &str| line.split(' ').map(OsString::from).collect::<Vec<_>>();
    test::some(
        workspace,
        &environment,
        &words("--package egress-tests --test container"),
        &words("-- --include-ignored"),
    )
}

/// Builds the program, lays out the root file system and packs it.
fn make(workspace: &Workspace) -> Result<PathBuf> {
    let epoch = dist::epoch(workspace)?;
    let _lock = step::lock(workspace)?;
    let program = dist::binary::build(workspace)?;
    let file = workspace.root().join("deploy/container/Dockerfile");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let dockerfile = Dockerfile::parse(&text, dist::VERSION).with_context(|| file.display().to_string())?;
    let root = root_directory(workspace);
    lay_out(&dockerfile, program.parent().context("a program lies in a directory")?, &root)?;
    let archive = workspace.target("image").join(format!("egress-agent-{}.oci.tar", dist::VERSION));
    let image = oci::Image { dockerfile: &dockerfile, name: "egress-agent", version: dist::VERSION, epoch: &epoch };
    reproducibly(&image, &root, &archive, &workspace.target("image-again"))?;
    Ok(archive)
}

fn root_directory(workspace: &Workspace) -> PathBuf {
    workspace.target("image/rootfs")
}

/// What `COPY` takes from the build context.
fn lay_out(dockerfile: &Dockerfile, context: &Path, root: &Path) -> Result<()> {
    dist::fresh(root)?;
    dockerfile.copies.iter().try_for_each(|(from, to)| dist::copy(&context.join(from), &root.join(to)))
}

fn reproducibly(image: &oci::Image<'_>, root: &Path, archive: &Path, again: &Path) -> Result<()> {
    let pack = |directory: &Path| {
        let layout = directory.join("layout");
        dist::fresh(&layout)?;
        let file = directory.join("image.tar");
        image.pack(root, &layout, &file)?;
        fs::read(&file).with_context(|| format!("cannot read {}", file.display()))
    };
    let bytes = pack(&again.join("one"))?;
    ensure!(bytes == pack(&again.join("two"))?, "packing the image twice gave different bytes");
    fs::write(archive, bytes).with_context(|| format!("cannot write {}", archive.display()))?;
    dist::remove(again)
}
