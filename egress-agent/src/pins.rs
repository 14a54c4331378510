//! The pin directory: where the maps of a running agent can be found, and the claim that one agent has on it.

use std::{
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{FlockOperation, flock, statfs},
    io::Errno,
};
use thiserror::Error;

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Why a pin directory could not be had.
#[derive(Debug, Error)]
pub enum PinError {
    /// Another agent has it.
    #[error("another agent{} uses {}", by_pid(*.pid), .path.display())]
    Claimed {
        /// The directory.
        path: PathBuf,
        /// The other agent, if its `META` map tells.
        pid: Option<u32>,
    },
    /// It cannot hold pins.
    #[error("{} is not on a bpf file system: mount one (mount -t bpf bpf /sys/fs/bpf) and name a directory on it", .0.display())]
    NotBpffs(PathBuf),
    /// Others than root could hold the claim, or put pins there.
    #[error("{} must be a directory of root that nobody else may enter: chown root:root and chmod 700", .0.display())]
    NotPrivate(PathBuf),
    /// A call failed.
    #[error("cannot {what} {}", .path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

fn by_pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

/// A claimed pin directory. What was pinned in it is removed when dropped.
#[derive(Debug)]
pub struct PinDirectory {
    path: PathBuf,
    pinned: Vec<PathBuf>,
    /// Holds the claim: the lock ends with the process, however it ends.
    _lock: File,
}

impl PinDirectory {
    /// Makes the directory if need be, and claims it.
    pub fn claim(path: &Path, holder: impl FnOnce(&Path) -> Option<u32>) -> Result<Self, PinError> {
        let failed = |what| move |cause| PinError::Io { what, path: path.to_owned(), cause };
        let parent = path.ancestors().find(|path| path.is_dir()).unwrap_or(path);
        let system = statfs(parent).map_err(|errno| failed("look at")(errno.into()))?;
        if u64::try_from(system.f_type) != Ok(BPF_FS_MAGIC) {
            return Err(PinError::NotBpffs(path.to_owned()));
        }
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make pin directory"))?;
        let directory = File::open(path).map_err(failed("open pin directory"))?;
        let meta = directory.metadata().map_err(failed("look at"))?;
        // Whoever can open the directory can lock it, and keep an agent from starting.
        if meta.uid() != 0 || meta.mode() & 0o077 != 0 {
            return Err(PinError::NotPrivate(path.to_owned()));
        }
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), pinned: Vec::new(), _lock: directory }),
            Err(Errno::WOULDBLOCK) => Err(PinError::Claimed { path: path.to_owned(), pid: holder(path) }),
            Err(errno) => Err(failed("lock pin directory")(errno.into())),
        }
    }

    /// The place for a pin. What an agent that was killed left there is removed.
    pub fn place(&mut self, name: &str) -> Result<PathBuf, PinError> {
        let path = self.path.join(name);
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                return Err(PinError::Io { what: "remove the old pin", path, cause });
            }
            _ => {}
        }
        self.pinned.push(path.clone());
        Ok(path)
    }
}

impl Drop for PinDirectory {
    fn drop(&mut self) {
        for path in &self.pinned {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(%error, path = %path.display(), "cannot remove a pin");
            }
        }
    }
}
