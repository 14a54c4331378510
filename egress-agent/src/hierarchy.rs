//! The cgroups at and below the attach point, as far as policies look into them.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ffi::{OsStr, OsString},
    fs, io,
    mem::{MaybeUninit, take},
    os::{
        fd::AsFd,
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use egress_common::MAX_LEVEL;
use rustix::{
    fs::inotify::{ReadFlags, Reader, WatchFlags},
    io::Errno,
};

use crate::{
    cgroup::{below, children, is_gone, reach},
    scopes::Node,
    watch::Inotify,
};

/// Cgroups that come and go. The parents of those that are known are watched.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::ONLYDIR);

/// What is known of the cgroups at and below the attach point.
#[derive(Debug)]
pub(crate) struct Hierarchy {
    mount: PathBuf,
    /// Below the mount; empty is the root.
    top: PathBuf,
    /// By path below the mount, so that parents come before children.
    known: BTreeMap<PathBuf, u64>,
    /// Cgroups of the deepest level that is known, which are to be looked into and have cgroups below them.
    too_deep: BTreeSet<PathBuf>,
    /// Cgroups that are to be looked into and cannot be watched, each with the limit that is reached.
    unwatched: BTreeMap<PathBuf, String>,
    /// What is always known, if it is there: the agent's own cgroup.
    always: Option<PathBuf>,
    inotify: Inotify,
    watches: HashMap<i32, PathBuf>,
}

/// Cgroups came or went.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    /// Cgroups that came or went, or both.
    cgroups: Vec<PathBuf>,
    /// Some changes were not noticed.
    missed: bool,
}

impl Hierarchy {
    /// Of the cgroup `top`, a path below the mount; nothing is known yet.
    pub(crate) fn new(mount: &Path, top: &Path, always: Option<&Path>) -> Self {
        let top = below(top).to_owned();
        let always = always.map(below).filter(|path| path.starts_with(&top)).map(Path::to_owned);
        let (known, too_deep, unwatched, watches) = Default::default();
        Self { mount: mount.to_owned(), top, known, too_deep, unwatched, always, inotify: Inotify::default(), watches }
    }

    /// The known cgroups, the top first and parents before children.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let node = |(path, &id): (&PathBuf, _)| Node { id, path: path.clone() };
        self.known.iter().map(node).collect()
    }

    /// Cgroups of level [`MAX_LEVEL`] that have cgroups below them which policies may select, and which are not known.
    pub(crate) const fn too_deep(&self) -> &BTreeSet<PathBuf> {
        &self.too_deep
    }

    /// Cgroups below which others may come that nothing tells of, each with the limit that is reached: those that come are found
    /// when everything is looked at again.
    pub(crate) const fn unwatched(&self) -> &BTreeMap<PathBuf, String> {
        &self.unwatched
    }

    /// Looks at everything again, in a tokio runtime: the top, and the children of all that `looks_below` wants looked into. If that fails,
    /// what was known stays known.
    pub(crate) fn look(&mut self, looks_below: &mut dyn FnMut(&Path) -> bool) -> io::Result<()> {
        let before = (take(&mut self.known), take(&mut self.too_deep), take(&mut self.unwatched));
        self.visit(self.top.clone(), looks_below).inspect_err(|_| (self.known, self.too_deep, self.unwatched) = before)
    }

    /// Waits until cgroups came or went.
    pub(crate) async fn changed(&mut self) -> io::Result<Changed> {
        loop {
            let mut ready = self.inotify.readable().await?;
            let watches = &mut self.watches;
            // An error here is that it was not ready after all.
            if let Ok(changed) = ready.try_io(|inotify| drain(inotify, watches)) {
                return changed;
            }
        }
    }

    /// Looks again at what changed.
    pub(crate) fn update(&mut self, changed: Changed, looks_below: &mut dyn FnMut(&Path) -> bool) -> io::Result<()> {
        if changed.missed {
            return self.look(looks_below);
        }
        let deepest = usize::from(MAX_LEVEL);
        let parents: BTreeSet<&Path> = changed.cgroups.iter().filter_map(|cgroup| cgroup.parent()).collect();
        for parent in parents.into_iter().filter(|parent| parent.iter().count() == deepest) {
            self.look_for_too_deep(parent)?;
        }
        for cgroup in changed.cgroups.into_iter().filter(|cgroup| cgroup.iter().count() <= deepest) {
            self.forget(&cgroup);
            self.visit(cgroup, looks_below)?;
        }
        Ok(())
    }

    /// Forgets a cgroup and all below it.
    fn forget(&mut self, path: &Path) {
        let below: Vec<PathBuf> = self
            .known
            .range(path.to_owned()..)
            .map(|(known, _)| known)
            .take_while(|known| known.starts_with(path))
            .cloned()
            .collect();
        for path in below {
            self.known.remove(&path);
            self.too_deep.remove(&path);
            self.unwatched.remove(&path);
        }
    }

    /// Learns a cgroup and what is to be known below it. It is watched before it is read, so that no child is missed.
    fn visit(&mut self, path: PathBuf, looks_below: &mut dyn FnMut(&Path) -> bool) -> io::Result<()> {
        let mut todo = vec![path];
        while let Some(path) = todo.pop() {
            let looks = looks_below(&path);
            if looks && !self.watch(&path)? {
                continue;
            }
            // A cgroup that goes away while we look is no longer there to be learnt.
            let Some(id) = unless_gone(reach(&self.mount.join(&path)).and_then(|path| fs::metadata(&*path)))? else {
                continue;
            };
            if path.iter().count() == usize::from(MAX_LEVEL) {
                if looks {
                    self.look_for_too_deep(&path)?;
                }
            } else if looks {
                todo.extend(self.names_below(&path)?.into_iter().map(|name| path.join(name)));
            } else {
                todo.extend(self.next_to_always(&path));
            }
            self.known.insert(path, id.ino());
        }
        Ok(())
    }

    fn names_below(&self, path: &Path) -> io::Result<Vec<OsString>> {
        Ok(unless_gone(children(&self.mount.join(path)).map(Iterator::collect))?.unwrap_or_default())
    }

    /// The next cgroup on the way to the one that is always known.
    fn next_to_always(&self, path: &Path) -> Option<PathBuf> {
        let next = self.always.as_ref()?.strip_prefix(path).ok()?.iter().next()?;
        Some(path.join(next))
    }

    /// Whether there is anything below a cgroup of the deepest level.
    fn look_for_too_deep(&mut self, path: &Path) -> io::Result<()> {
        if self.names_below(path)?.is_empty() {
            self.too_deep.remove(path);
        } else {
            self.too_deep.insert(path.to_owned());
        }
        Ok(())
    }

    /// Whether it is there to be watched. Where a limit of inotify is reached, it is remembered as unwatched: a workload that
    /// makes cgroups until then must not hold up the policies of others.
    fn watch(&mut self, path: &Path) -> io::Result<bool> {
        let Some(directory) = unless_gone(reach(&self.mount.join(path)))? else { return Ok(false) };
        match self.inotify.watch(&directory, CHANGES) {
            Ok(watch) => {
                self.watches.insert(watch, path.to_owned());
                Ok(true)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => {
                self.unwatched.insert(path.to_owned(), error.to_string());
                Ok(true)
            }
            Err(error) => Err(error),
        }
    }
}

/// `None` for a cgroup that is gone.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(error) if is_gone(&error) => Ok(None),
        result => result.map(Some),
    }
}

/// Reads all there is; an error if nothing of it is of interest.
fn drain(fd: impl AsFd, watches: &mut HashMap<i32, PathBuf>) -> io::Result<Changed> {
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    let mut reader = Reader::new(fd, &mut buffer);
    let mut changed = Changed::default();
    loop {
        match reader.next() {
            Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => changed.missed = true,
            Ok(event) if event.events().contains(ReadFlags::IGNORED) => drop(watches.remove(&event.wd())),
            Ok(event) => {
                let parent = watches.get(&event.wd());
                let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                changed.cgroups.extend(parent.zip(name).map(|(parent, name)| parent.join(name)));
            }
            Err(Errno::AGAIN) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    changed.cgroups.sort();
    changed.cgroups.dedup();
    if changed.cgroups.is_empty() && !changed.missed { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(changed) }
}
