//! The cgroups at and below the attach point, as far as policies look into them.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    fs, io,
    mem::MaybeUninit,
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
    cgroup::{below, children},
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
        let (known, watches) = (BTreeMap::new(), HashMap::new());
        Self { mount: mount.to_owned(), top, known, always, inotify: Inotify::default(), watches }
    }

    /// The known cgroups, the top first and parents before children.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let node = |(path, &id): (&PathBuf, _)| Node { id, path: path.to_string_lossy().into_owned() };
        self.known.iter().map(node).collect()
    }

    /// Looks at everything again, in a tokio runtime: the top, and the children of all that `looks_below` wants looked into. If that fails,
    /// what was known stays known.
    pub(crate) fn look(&mut self, looks_below: &dyn Fn(&str) -> bool) -> io::Result<()> {
        let before = std::mem::take(&mut self.known);
        self.visit(self.top.clone(), looks_below).inspect_err(|_| self.known = before)
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
    pub(crate) fn update(&mut self, changed: Changed, looks_below: &dyn Fn(&str) -> bool) -> io::Result<()> {
        if changed.missed {
            return self.look(looks_below);
        }
        for cgroup in changed.cgroups {
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
        }
    }

    /// Learns a cgroup and what is to be known below it. It is watched before it is read, so that no child is missed.
    fn visit(&mut self, path: PathBuf, looks_below: &dyn Fn(&str) -> bool) -> io::Result<()> {
        let mut todo = vec![path];
        while let Some(path) = todo.pop() {
            let directory = self.mount.join(&path);
            let looks = looks_below(&path.to_string_lossy());
            if looks && !self.watch(&directory, &path)? {
                continue;
            }
            // A cgroup that goes away while we look is no longer there to be learnt.
            let Ok(meta) = fs::metadata(&directory) else { continue };
            if path.components().count() < usize::from(MAX_LEVEL) {
                let leads_to_always =
                    |name: &OsString| self.always.as_ref().is_some_and(|always| always.starts_with(path.join(name)));
                let wanted = children(&directory).filter(|name| looks || leads_to_always(name));
                todo.extend(wanted.map(|name| path.join(name)));
            }
            self.known.insert(path, meta.ino());
        }
        Ok(())
    }

    /// Whether it is there to be watched.
    fn watch(&mut self, directory: &Path, path: &Path) -> io::Result<bool> {
        match self.inotify.watch(directory, CHANGES) {
            Ok(watch) => {
                self.watches.insert(watch, path.to_owned());
                Ok(true)
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(error) => Err(error),
        }
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
