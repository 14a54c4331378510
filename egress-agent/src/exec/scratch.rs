//! The cgroup of one command and the pins of its rules: found by one name, made and removed together.
//!
//! Whoever makes or sweeps has the claim on the directory above all pins, so that nothing half-made is taken for a
//! leftover. Each command then has the claim on its own pins for as long as its `exec` lives.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::time::{ClockId, clock_gettime};

use super::ExecError;
use crate::{
    cgroup::{self, CgroupPaths, directories},
    dataplane::pinned,
    pins::{self, PinDirectory, PinError},
    run::chain,
};

/// What all of them are named after.
const PREFIX: &str = "egress-exec-";

/// How long another start may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long processes that end with the command may take.
const GRACE: Duration = Duration::from_millis(200);
/// How soon to look again.
const SOON: Duration = Duration::from_millis(5);

/// A cgroup with its pins.
pub(super) struct Scratch {
    pins: PinDirectory,
    cgroup: PathBuf,
}

impl Scratch {
    /// Sweeps, then makes a new one for a command of a user.
    pub(super) fn make(base: &Path, mount: &Path, uid: u32) -> Result<Self, ExecError> {
        let _turn = wait_for_turn(base)?;
        sweep_below(base, mount);
        let now = clock_gettime(ClockId::Boottime);
        let name = format!("{PREFIX}{}-{:x}-{:x}", std::process::id(), now.tv_sec, now.tv_nsec);
        // Before the cgroup, so that whatever is left is found.
        let pins = PinDirectory::claim(&base.join(&name))?;
        match make_cgroup(mount, &name, uid) {
            Ok(cgroup) => Ok(Self { pins, cgroup }),
            Err(error) => {
                pins.remove()?;
                Err(error)
            }
        }
    }

    pub(super) const fn pins(&self) -> &PinDirectory {
        &self.pins
    }

    /// Its directory.
    pub(super) fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Removes all of it, unless there are processes left; how many. The cgroup goes first: once it is gone, nobody can
    /// join it any more.
    pub(super) fn end(self) -> Result<usize, PinError> {
        match vanishes(&self.cgroup, GRACE) {
            Ok(true) => {}
            Ok(false) => return Ok(processes(&self.cgroup).max(1)),
            Err(cause) => return Err(pins::failed("remove", &self.cgroup)(cause)),
        }
        self.pins.sets()?.iter().try_for_each(|set| pinned::remove(set))?;
        self.pins.remove()?;
        Ok(0)
    }
}

/// The claim on the directory above all pins, which others have for a moment only.
fn wait_for_turn(base: &Path) -> Result<PinDirectory, PinError> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match PinDirectory::claim(base) {
            Err(PinError::Claimed { .. }) if Instant::now() < deadline => thread::sleep(SOON),
            claimed => return claimed,
        }
    }
}

/// Removes what commands left behind whose `exec` was killed, or that outlived it, and that have ended since. Where
/// another start does that already, it is left to that one.
pub(crate) fn sweep(base: &Path, mount: &Path) {
    if !base.is_dir() {
        return;
    }
    match PinDirectory::claim(base) {
        Ok(_turn) => sweep_below(base, mount),
        Err(PinError::Claimed { .. }) => {}
        Err(error) => tracing::warn!(error = %chain(&error), "cannot look for what commands left behind"),
    }
}

/// Nothing that fails here weakens what is in force.
fn sweep_below(base: &Path, mount: &Path) {
    let is_ours =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(PREFIX.as_bytes()));
    let entries = fs::read_dir(base).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths = CgroupPaths::new(mount.to_owned());
    for pins in entries.filter(is_ours).filter(|path| !pins::is_claimed(path)) {
        let path = pins.display();
        match sweep_one(&pins, mount, &mut paths) {
            Ok(true) => tracing::info!(pins = %path, "removed what an ended command left behind"),
            Ok(false) => tracing::info!(pins = %path, "processes of an earlier command go on, and so do its rules"),
            Err(error) => {
                tracing::warn!(error = %chain(&error), pins = %path, "cannot remove what a command left behind");
            }
        }
    }
}

/// Whether it is gone. What cannot be found although the kernel says that it is there stays.
fn sweep_one(pins: &Path, mount: &Path, paths: &mut CgroupPaths) -> Result<bool, PinError> {
    let Some(cgroups) = cgroups(pins, mount, paths) else { return Ok(false) };
    for cgroup in cgroups {
        if !vanishes(&cgroup, Duration::ZERO).map_err(pins::failed("remove", &cgroup))? {
            return Ok(false);
        }
    }
    pins::remove_all(pins)?;
    Ok(true)
}

/// The cgroups that programs are attached to, as the kernel knows them; `None` if one is not found. Before anything was
/// attached the command was not started, and the cgroup is found by its name, which others could have given to theirs.
fn cgroups(pins: &Path, mount: &Path, paths: &mut CgroupPaths) -> Option<Vec<PathBuf>> {
    let sets = fs::read_dir(pins).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut ids: Vec<u64> = sets.flat_map(|set| pinned::attached(&set)).map(|(_, id)| id).collect();
    ids.dedup();
    if ids.is_empty() {
        let is_it = |path: &PathBuf| path.file_name() == pins.file_name() && is_roots(path).unwrap_or(false);
        return Some(directories(mount).filter(is_it).collect());
    }
    ids.into_iter().map(|id| paths.path(id).map(|path| mount.join(cgroup::below(path)))).collect()
}

/// Makes a cgroup below this process's own, so that whoever filters that judges the command too; where that cannot be,
/// below the nearest one above it where it can.
fn make_cgroup(mount: &Path, name: &str, uid: u32) -> Result<PathBuf, ExecError> {
    let unknown = || {
        tracing::warn!("this process's own cgroup is not known: the command's is made below the root");
        PathBuf::from("/")
    };
    let own = cgroup::own(mount).map_or_else(unknown, |own| own.path);
    let above: Vec<PathBuf> = cgroup::below(&own).ancestors().map(|path| mount.join(path)).collect();
    let mut failure = None;
    for parent in &above {
        let made = if keeps(parent, mount, uid) {
            make_below(parent, name)
        } else {
            Err(io::Error::other("the user of the command may move processes there"))
        };
        match made {
            Ok(cgroup) => return Ok(cgroup),
            Err(error) => {
                let below = parent.display();
                tracing::warn!(%below, %error, "no cgroup for the command here, but above: what filters here does not judge it");
                failure = Some((parent.clone(), error));
            }
        }
    }
    let (below, cause) = failure.unwrap_or_else(|| (mount.to_owned(), io::ErrorKind::NotFound.into()));
    Err(ExecError::Cgroup { below, cause })
}

/// Whether a user cannot leave what is below a cgroup. To move a process takes permission for where it goes and for what
/// both places have in common, so all that is above must belong to root. A service manager hands cgroups over to users.
fn keeps(parent: &Path, mount: &Path, uid: u32) -> bool {
    uid == 0
        || parent.ancestors().take_while(|path| path.starts_with(mount)).all(|path| is_roots(path).unwrap_or(false))
}

/// Whether only root moves processes into a cgroup.
fn is_roots(cgroup: &Path) -> io::Result<bool> {
    let meta = fs::metadata(cgroup.join("cgroup.procs"))?;
    Ok(meta.uid() == 0 && meta.mode() & 0o022 == 0)
}

/// Below a threaded cgroup there are only cgroups that no process can join.
fn make_below(parent: &Path, name: &str) -> io::Result<PathBuf> {
    let cgroup = parent.join(name);
    DirBuilder::new().mode(0o755).create(&cgroup)?;
    let kind = fs::read_to_string(cgroup.join("cgroup.type"));
    if kind.as_ref().is_ok_and(|kind| kind.trim() == "domain") {
        return Ok(cgroup);
    }
    fs::remove_dir(&cgroup)?;
    Err(io::Error::other(format!("its type would be {:?}", kind?.trim())))
}

/// Whether a cgroup is gone, with all below it, within a time. A process that just ended holds it for a moment.
fn vanishes(cgroup: &Path, patience: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let removed = if is_populated(cgroup) { Err(io::ErrorKind::ResourceBusy.into()) } else { remove(cgroup) };
        match removed {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
            removed => return removed.map(|()| true),
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(SOON);
    }
}

fn is_populated(cgroup: &Path) -> bool {
    fs::read_to_string(cgroup.join("cgroup.events"))
        .is_ok_and(|events| events.lines().any(|line| line == "populated 1"))
}

/// Removes a cgroup, those below it first. One that is gone is no failure.
fn remove(cgroup: &Path) -> io::Result<()> {
    let mut below: Vec<PathBuf> = directories(cgroup).collect();
    // Parents are listed before their children.
    below.reverse();
    below.iter().try_for_each(|path| match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    })
}

/// How many processes a cgroup has, with all below it.
fn processes(cgroup: &Path) -> usize {
    let count = |path: PathBuf| fs::read_to_string(path.join("cgroup.procs")).map_or(0, |procs| procs.lines().count());
    directories(cgroup).map(count).sum()
}
