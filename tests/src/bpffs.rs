//! A bpf file system for tests.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tempfile::TempDir;

/// A bpf file system mounted on a directory of its own, unmounted when dropped.
#[derive(Debug)]
pub struct Bpffs {
    directory: TempDir,
}

impl Bpffs {
    /// Mounts one.
    pub fn new() -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("egress-bpffs-").tempdir()?;
        mount("bpf", directory.path(), "bpf", MountFlags::empty(), None).context("cannot mount a bpf file system")?;
        Ok(Self { directory })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The names of what is pinned in a directory of it, sorted.
    pub fn pins(&self, directory: &Path) -> Result<Vec<PathBuf>> {
        let mut pins: Vec<PathBuf> =
            std::fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name().into())).collect::<Result<_>>()?;
        pins.sort();
        Ok(pins)
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(error) = unmount(self.path(), UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", self.path().display());
        }
    }
}
