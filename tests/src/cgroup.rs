//! Cgroups for tests.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{eventually, unique_name};

/// A cgroup below the cgroup2 root, removed when dropped.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    below: String,
}

impl Cgroup {
    /// Makes one with a name of its own.
    pub fn new() -> Result<Self> {
        let below = unique_name();
        let path = egress_agent::cgroup::mount_point()?.join(&below);
        fs::create_dir(&path).with_context(|| format!("cannot create cgroup {}; tests need root", path.display()))?;
        Ok(Self { path, below })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path from the root of the hierarchy, with a leading slash.
    pub fn name(&self) -> String {
        format!("/{}", self.below)
    }

    /// Removes it and makes another of the same name, as systemd does when it restarts a unit.
    pub fn make_anew(&self) -> Result<()> {
        eventually("an empty cgroup", || match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => None,
            done => Some(done),
        })??;
        Ok(fs::create_dir(&self.path)?)
    }

    /// The file that takes process ids.
    pub fn procs(&self) -> PathBuf {
        self.path.join("cgroup.procs")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that just ended still holds its cgroup for a moment.
        let removed = eventually("an empty cgroup", || match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => None,
            done => Some(done),
        });
        if let Err(error) | Ok(Err(error)) = removed.map(|done| done.map_err(anyhow::Error::from)) {
            eprintln!("cannot remove cgroup {}: {error}", self.path.display());
        }
    }
}
