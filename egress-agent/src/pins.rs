//! The pin directory: what stays in force while no agent runs, and the claim that one agent has on it.
//!
//! Each start pins a set of its own in a directory of its own, named `new-PID` while it is made and `set-N` once all of it
//! is in force. Whatever is named otherwise is not ours and is left alone.

use std::{
    collections::BTreeSet,
    fs::{self, DirBuilder, File},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
};

use aya::maps::Map;
use rustix::{
    fs::{FlockOperation, flock, statfs},
    io::Errno,
    mount::{MountFlags, mount},
};
use thiserror::Error;

use crate::{
    cgroup::{self, CgroupPaths},
    dataplane::pinned,
    text::printable_bytes,
};

/// `BPF_FS_MAGIC` of `linux/magic.h`.
const BPF_FS_MAGIC: u64 = 0xcafe_4a11;

/// Where bpf file systems are mounted by convention.
const BPFFS: &str = "/sys/fs/bpf";

/// Why a pin directory could not be had.
#[derive(Debug, Error)]
pub enum PinError {
    /// Another agent has it.
    #[error("another agent{} uses {}", by_pid(*.pid), .path.display())]
    Claimed {
        /// The directory.
        path: PathBuf,
        /// The other agent, if its set tells.
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
    /// A map or link could not be pinned.
    #[error("cannot pin {}", .path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        cause: aya::pin::PinError,
    },
}

fn by_pid(pid: Option<u32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}

pub(crate) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PinError + use<> {
    let path = path.to_owned();
    move |cause| PinError::Io { what, path, cause }
}

/// A claimed pin directory.
#[derive(Debug)]
pub struct PinDirectory {
    path: PathBuf,
    /// Holds the claim: the lock ends with the process, however it ends.
    _lock: File,
}

impl PinDirectory {
    /// Makes the directory if need be, and claims it.
    pub fn claim(path: &Path) -> Result<Self, PinError> {
        if !is_on_bpffs(path)? {
            return Err(PinError::NotBpffs(path.to_owned()));
        }
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make pin directory", path))?;
        let directory = open_private(path)?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: directory }),
            Err(Errno::WOULDBLOCK) => Err(PinError::Claimed { path: path.to_owned(), pid: holder(path) }),
            Err(errno) => Err(failed("lock pin directory", path)(errno.into())),
        }
    }

    /// Begins a set, after removing what agents that were killed left half-made.
    pub fn begin(&self) -> Result<PinSet, PinError> {
        for half_made in directories(&self.path, "new-")? {
            tracing::info!(pins = %half_made.display(), "removing what a start left half-made");
            pinned::remove(&half_made)?;
        }
        let path = self.path.join(format!("new-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&path).map_err(failed("make", &path))?;
        Ok(PinSet { directory: self.path.clone(), path, is_complete: false })
    }

    /// Every complete set, the oldest first.
    pub fn sets(&self) -> Result<Vec<PathBuf>, PinError> {
        sets(&self.path)
    }

    /// Removes the directory itself, once it is empty.
    pub fn remove(self) -> Result<(), PinError> {
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
            result => result.map_err(failed("remove", &self.path)),
        }
    }
}

/// Whoever can open the directory can lock it, and keep an agent from starting.
fn open_private(path: &Path) -> Result<File, PinError> {
    let is_shared = |meta: &fs::Metadata| meta.uid() != 0 || meta.mode() & 0o077 != 0;
    // That of another user cannot even be opened without `CAP_DAC_OVERRIDE`, so this is asked first, and last.
    if path.metadata().is_ok_and(|meta| is_shared(&meta)) {
        return Err(PinError::NotPrivate(path.to_owned()));
    }
    let directory = File::open(path).map_err(failed("open pin directory", path))?;
    if is_shared(&directory.metadata().map_err(failed("look at", path))?) {
        return Err(PinError::NotPrivate(path.to_owned()));
    }
    Ok(directory)
}

/// Mounts the conventional bpf file system if pins are to lie there and it is missing.
pub fn mount_bpffs(pin_directory: &Path) {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    if pin_directory.starts_with(BPFFS) && is_on_bpffs(pin_directory).is_ok_and(|is_there| !is_there) {
        match mount("bpf", BPFFS, "bpf", flags, None) {
            Ok(()) => tracing::info!("mounted a bpf file system at {BPFFS}"),
            Err(error) => tracing::warn!(%error, "cannot mount a bpf file system at {BPFFS}"),
        }
    }
}

/// Whether a path, or what there is of it, is on a bpf file system.
pub fn is_on_bpffs(path: &Path) -> Result<bool, PinError> {
    let existing = path.ancestors().find(|path| path.is_dir()).unwrap_or(path);
    let system = statfs(existing).map_err(|errno| failed("look at", existing)(errno.into()))?;
    Ok(u64::try_from(system.f_type) == Ok(BPF_FS_MAGIC))
}

/// The agent that has a directory: the one that makes a set, or that made the newest.
pub fn holder(path: &Path) -> Option<u32> {
    let making = directories(path, "new-").ok()?.pop().and_then(|path| number(&path, "new-"));
    let made = || pinned::meta(sets(path).ok()?.last()?).ok().map(|meta| meta.pid());
    making.and_then(|pid| u32::try_from(pid).ok()).or_else(made)
}

/// Whether an agent has a claim on a directory.
pub fn is_claimed(path: &Path) -> bool {
    File::open(path).is_ok_and(|directory| {
        flock(&directory, FlockOperation::NonBlockingLockShared).is_err_and(|errno| errno == Errno::WOULDBLOCK)
    })
}

/// Removes every set of a pin directory, half-made ones too, and the directory. What was removed, a line for each.
pub fn remove_all(path: &Path) -> Result<Vec<String>, PinError> {
    if !is_on_bpffs(path)? || !path.is_dir() {
        return Ok(Vec::new());
    }
    let pins = PinDirectory::claim(path)?;
    let mut paths = cgroup::mount_point().ok().map(CgroupPaths::new);
    let mut removed = Vec::new();
    for set in directories(path, "new-")?.into_iter().chain(sets(path)?) {
        let mut attached = pinned::attached(&set);
        attached.dedup_by_key(|(_, id)| *id);
        pinned::remove(&set)?;
        for (_, id) in attached {
            let cgroup = paths.as_mut().and_then(|paths| paths.path(id)).map(printable_bytes);
            removed.push(format!("cgroup {} is no longer filtered", cgroup.unwrap_or_else(|| id.to_string())));
        }
        removed.push(format!("removed {}", printable_bytes(&set)));
    }
    pins.remove()?;
    Ok(removed)
}

/// Every complete set of a pin directory, the oldest first; none if it is not there.
pub fn sets(path: &Path) -> Result<Vec<PathBuf>, PinError> {
    directories(path, "set-")
}

/// The ids of the programs of every set of a pin directory, half-made ones too.
pub fn programs(path: &Path) -> BTreeSet<u32> {
    let sets = ["new-", "set-"].into_iter().flat_map(|kind| directories(path, kind).unwrap_or_default());
    sets.flat_map(|set| pinned::programs(&set).collect::<Vec<_>>()).collect()
}

/// The directories of a kind, in the order of their numbers. What has such a name and is no directory is not ours.
fn directories(path: &Path, kind: &str) -> Result<Vec<PathBuf>, PinError> {
    let mut paths = numbered(path, kind)?;
    paths.retain(|path| path.symlink_metadata().is_ok_and(|meta| meta.is_dir()));
    Ok(paths)
}

/// Whatever is named as those of a kind, in the order of the numbers.
fn numbered(path: &Path, kind: &str) -> Result<Vec<PathBuf>, PinError> {
    let entries = match fs::read_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("list", path))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed("list", path))?.path();
        found.extend(number(&path, kind).map(|number| (number, path)));
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn number(path: &Path, kind: &str) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix(kind)?.parse().ok()
}

/// The pins of one start. Removed when dropped, unless it is complete.
#[derive(Debug)]
pub struct PinSet {
    directory: PathBuf,
    path: PathBuf,
    is_complete: bool,
}

impl PinSet {
    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is there: file systems can be unmounted.
    pub fn is_there(&self) -> bool {
        self.path.is_dir()
    }

    /// Pins a map under its name.
    pub fn pin_map(&mut self, name: &str, map: &Map) -> Result<(), PinError> {
        let path = self.path.join(name);
        map.pin(&path).map_err(|cause| PinError::Pin { path, cause })
    }

    /// Where the link of a hook is pinned: under its name, in place of one to a cgroup that is gone.
    pub fn room_for(&mut self, hook: &str) -> Result<PathBuf, PinError> {
        let path = self.path.join(hook);
        match fs::remove_file(&path) {
            Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(failed("remove the old pin", &path)(cause)),
            _ => Ok(path),
        }
    }

    /// The set is complete and outlives the agent.
    pub fn commit(&mut self) -> Result<(), PinError> {
        let newest = numbered(&self.directory, "set-")?.last().and_then(|path| number(path, "set-")).unwrap_or(0);
        let path = self.directory.join(format!("set-{}", newest + 1));
        fs::rename(&self.path, &path).map_err(failed("rename", &self.path))?;
        self.path = path;
        self.is_complete = true;
        Ok(())
    }
}

impl Drop for PinSet {
    fn drop(&mut self) {
        if !self.is_complete
            && let Err(error) = pinned::remove(&self.path)
        {
            tracing::warn!(%error, "a half-made set of pins stays; the next start removes it");
        }
    }
}
