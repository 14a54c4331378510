//! The cgroups at and below the attach point, as far as policies look into them.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{OsStr, OsString},
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use egress_common::MAX_LEVEL;
use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

use crate::scopes::Node;

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
    inotify: AsyncFd<OwnedFd>,
    watches: HashMap<i32, PathBuf>,
}

/// What was noticed.
#[derive(Debug, Default)]
struct Noticed {
    /// Cgroups that came or went, or both.
    cgroups: Vec<PathBuf>,
    /// Some changes were not noticed.
    missed: bool,
}

impl Hierarchy {
    /// Of the cgroup `top`, a path below the mount; nothing is known yet. Must be called in a tokio runtime.
    pub(crate) fn new(mount: &Path, top: &Path, always: Option<PathBuf>) -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: the registered value owns its descriptor, which is closed only when that value is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        let top = top.strip_prefix("/").unwrap_or(top).to_owned();
        let always = always.map(|path| path.strip_prefix("/").map(Path::to_owned).unwrap_or(path));
        let always = always.filter(|path| path.starts_with(&top));
        Ok(Self { mount: mount.to_owned(), top, known: BTreeMap::new(), always, inotify, watches: HashMap::new() })
    }

    /// The known cgroups, the top first and parents before children.
    pub(crate) fn nodes(&self) -> Vec<Node> {
        let node = |(path, &id): (&PathBuf, _)| Node { id, path: path.to_string_lossy().into_owned() };
        self.known.iter().map(node).collect()
    }

    /// Looks at everything again: the top, and the children of all that `looks_below` wants looked into. If that fails,
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
            match ready.try_io(|inotify| drain(inotify, watches)) {
                Ok(Ok(noticed)) if noticed.missed || !noticed.cgroups.is_empty() => return Ok(Changed(noticed)),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }

    /// Looks again at what changed.
    pub(crate) fn update(&mut self, changed: Changed, looks_below: &dyn Fn(&str) -> bool) -> io::Result<()> {
        if changed.0.missed {
            return self.look(looks_below);
        }
        for cgroup in changed.0.cgroups {
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
                todo.extend(
                    children(&directory)
                        .into_iter()
                        .filter(|name| looks || leads_to_always(name))
                        .map(|name| path.join(name)),
                );
            }
            self.known.insert(path, meta.ino());
        }
        Ok(())
    }

    /// Whether it is there to be watched.
    fn watch(&mut self, directory: &Path, path: &Path) -> io::Result<bool> {
        match inotify::add_watch(&self.inotify, directory, CHANGES) {
            Ok(watch) => {
                self.watches.insert(watch, path.to_owned());
                Ok(true)
            }
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }
}

/// Cgroups came or went.
#[derive(Debug)]
pub(crate) struct Changed(Noticed);

fn children(directory: &Path) -> Vec<OsString> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let is_cgroup = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries.flatten().filter(is_cgroup).map(|entry| entry.file_name()).collect()
}

/// Reads all there is.
fn drain(fd: impl AsFd, watches: &mut HashMap<i32, PathBuf>) -> io::Result<Noticed> {
    let mut buffer = [MaybeUninit::uninit(); 16 * 1024];
    let mut reader = Reader::new(fd, &mut buffer);
    let mut noticed = Noticed::default();
    loop {
        match reader.next() {
            Ok(event) if event.events().contains(ReadFlags::QUEUE_OVERFLOW) => noticed.missed = true,
            Ok(event) if event.events().contains(ReadFlags::IGNORED) => drop(watches.remove(&event.wd())),
            Ok(event) => {
                let parent = watches.get(&event.wd());
                let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
                noticed.cgroups.extend(parent.zip(name).map(|(parent, name)| parent.join(name)));
            }
            Err(Errno::AGAIN) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    noticed.cgroups.sort();
    noticed.cgroups.dedup();
    if noticed.cgroups.is_empty() && !noticed.missed {
        // Nothing of interest; the descriptor is asked again.
        return Err(io::ErrorKind::WouldBlock.into());
    }
    Ok(noticed)
}
