//! Cgroups for tests.

use std::{
    ffi::OsStr,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{eventually, unique_name};

/// A cgroup below the cgroup2 root, removed when dropped, with all below it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    below: String,
}

impl Cgroup {
    /// Makes one with a name of its own.
    pub fn new() -> Result<Self> {
        Self::with_suffix("")
    }

    /// Makes one whose name ends in `.slice`, so that units lie in it.
    pub fn slice() -> Result<Self> {
        Self::with_suffix(".slice")
    }

    fn with_suffix(suffix: &str) -> Result<Self> {
        let below = unique_name() + suffix;
        let path = egress_agent::cgroup::mount_point()?.join(&below);
        fs::create_dir(&path).with_context(|| format!("cannot create cgroup {}; tests need root", path.display()))?;
        Ok(Self { path, below })
    }

    /// Makes one below this one; its name may be any bytes.
    pub fn child(&self, name: impl AsRef<OsStr>) -> Result<Self> {
        let name = name.as_ref();
        let (path, below) = (self.path.join(name), format!("{}/{}", self.below, name.to_string_lossy()));
        fs::create_dir(&path).with_context(|| format!("cannot create cgroup {}", path.display()))?;
        Ok(Self { path, below })
    }

    /// Makes one at a path below this one, with those between that are not there; removing this one removes it.
    pub fn descendant(&self, path: &str) -> Result<Self> {
        let (full, below) = (self.path.join(path), format!("{}/{path}", self.below));
        fs::create_dir_all(&full).with_context(|| format!("cannot create cgroup {}", full.display()))?;
        Ok(Self { path: full, below })
    }

    /// Makes as many as there are levels, each below the one before it; the first is a child of this one.
    pub fn nested(&self, levels: usize) -> Result<Vec<Self>> {
        let mut chain: Vec<Self> = Vec::with_capacity(levels);
        for _ in 0..levels {
            chain.push(chain.last().unwrap_or(self).child("nested")?);
        }
        Ok(chain)
    }

    /// Lets threads of one process be in it and in its neighbours. Its parent becomes the domain of all of them, and
    /// must be one of the kernel's "domain" type, without controllers.
    pub fn make_threaded(&self) -> Result<()> {
        fs::write(self.path.join("cgroup.type"), "threaded")
            .with_context(|| format!("cannot make cgroup {} threaded", self.path.display()))
    }

    /// Moves a process into it, with all of its threads.
    pub fn take_process(&self, pid: u32) -> Result<()> {
        fs::write(self.procs(), pid.to_string())
            .with_context(|| format!("cannot move process {pid} to {}", self.path.display()))
    }

    /// Moves one thread into it; both this and the thread's own cgroup must be threaded, below the same domain, or be
    /// that domain.
    pub fn take_thread(&self, tid: u32) -> Result<()> {
        fs::write(self.path.join("cgroup.threads"), tid.to_string())
            .with_context(|| format!("cannot move thread {tid} to {}", self.path.display()))
    }

    /// Its id, which is the inode number of its directory.
    pub fn id(&self) -> Result<u64> {
        Ok(fs::metadata(&self.path)?.ino())
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
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => None,
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
        let removed = eventually("an empty cgroup", || match remove(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => None,
            done => Some(done),
        });
        if let Err(error) | Ok(Err(error)) = removed.map(|done| done.map_err(anyhow::Error::from)) {
            eprintln!("cannot remove cgroup {}: {error}", self.path.display());
        }
    }
}

/// Removes a cgroup and those below it. One that is gone is no failure: a parent may be dropped before its child.
fn remove(path: &Path) -> io::Result<()> {
    let unless_gone = |error: io::Error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) };
    let children = match fs::read_dir(path) {
        Ok(children) => children,
        Err(error) => return unless_gone(error),
    };
    for child in children {
        let child = child?;
        if child.file_type()?.is_dir() {
            remove(&child.path())?;
        }
    }
    fs::remove_dir(path).or_else(unless_gone)
}
