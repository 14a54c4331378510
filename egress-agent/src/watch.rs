//! Notices when policy files change: closed after writing, renamed, linked, or removed; never while they are being
//! written.
//!
//! Kubernetes swaps a symbolic link beside the files of a `ConfigMap`, which shows as a rename in their directory.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, Metadata},
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    event::{EventfdFlags, eventfd},
    fs::inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::{
    Interest,
    unix::{AsyncFd, AsyncFdReadyGuard},
};

use crate::policy::load::Watched;

/// What of a directory is of interest.
const CHANGES: WatchFlags = WatchFlags::CLOSE_WRITE
    .union(WatchFlags::CREATE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ATTRIB);

/// Watches directories.
#[derive(Debug, Default)]
pub struct Watch {
    inotify: Inotify,
    places: Places,
}

#[derive(Debug, Default)]
struct Places {
    /// By inotify's watch descriptor. Directories that no longer matter stay here, and their events concern nothing.
    directories: BTreeMap<i32, PathBuf>,
    watched: Watched,
}

impl Watch {
    /// Watches these places from now on. Must be called in a tokio runtime. A directory that is not there is left out; its parent tells when it comes.
    pub fn set(&mut self, watched: Watched) -> io::Result<()> {
        for directory in watched.directories() {
            match self.inotify.watch(directory, CHANGES | WatchFlags::ONLYDIR) {
                Ok(watch) => drop(self.places.directories.insert(watch, directory.to_owned())),
                Err(error) if is_absent(&error) => {}
                Err(error) => return Err(error),
            }
        }
        self.places.watched = watched;
        Ok(())
    }

    /// Waits until something changed.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match ready.try_io(|inotify| drain(inotify, &mut self.places)) {
                Ok(Ok(true)) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(false)) | Err(_) => {}
            }
        }
    }
}

/// Whether there is no directory that could be watched.
fn is_absent(error: &io::Error) -> bool {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied};
    matches!(error.kind(), NotFound | NotADirectory | PermissionDenied)
}

/// A queue of events, made with the first watch: a user may have few of them (`fs.inotify.max_user_instances`).
#[derive(Debug, Default)]
pub(crate) struct Inotify(Option<AsyncFd<OwnedFd>>);

impl Inotify {
    /// Watches a directory; the error names the limit that is reached. Must be called in a tokio runtime.
    pub(crate) fn watch(&mut self, directory: &Path, changes: WatchFlags) -> io::Result<i32> {
        let queue = match &mut self.0 {
            Some(queue) => queue,
            none => none.insert(queue()?),
        };
        inotify::add_watch(queue, directory, changes).map_err(limited)
    }

    /// Waits for events; for ever, where nothing is watched.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        match &self.0 {
            Some(queue) => queue.readable().await,
            None => std::future::pending().await,
        }
    }
}

fn queue() -> io::Result<AsyncFd<OwnedFd>> {
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).map_err(limited)?;
    // SAFETY: the registered value owns its descriptor, which is closed only when that value is dropped.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

/// An error that names what is to be raised, of kind [`io::ErrorKind::QuotaExceeded`]. Of descriptors and of queues the kernel says
/// the same.
fn limited(errno: Errno) -> io::Error {
    let limit = match errno {
        Errno::NOSPC => "no inotify watch is left: raise fs.inotify.max_user_watches",
        Errno::MFILE if eventfd(0, EventfdFlags::CLOEXEC).is_ok() => {
            "no inotify instance is left: raise fs.inotify.max_user_instances"
        }
        Errno::MFILE => "no descriptor is left: raise the limit of open files (LimitNOFILE=, ulimit -n)",
        errno => return errno.into(),
    };
    io::Error::new(io::ErrorKind::QuotaExceeded, limit)
}

/// Reads all there is. Whether anything in it is a change.
fn drain(fd: impl AsFd, places: &mut Places) -> io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(fd, &mut buffer);
    let (mut changed, mut empty) = (false, true);
    loop {
        match reader.next() {
            Ok(event) => {
                changed |= places.is_change(&event);
                if event.events().contains(ReadFlags::IGNORED) {
                    places.directories.remove(&event.wd());
                }
            }
            // Nothing at all: the descriptor was not ready after all.
            Err(Errno::AGAIN) if empty => return Err(io::ErrorKind::WouldBlock.into()),
            Err(Errno::AGAIN) => return Ok(changed),
            Err(errno) => return Err(errno.into()),
        }
        empty = false;
    }
}

impl Places {
    /// A file that was just created is still being written and counts once it is closed. Directories and links are
    /// complete at once, and no close follows.
    fn is_change(&self, event: &Event<'_>) -> bool {
        let (Some(directory), Some(name)) = (self.directories.get(&event.wd()), event.file_name()) else { return true };
        let name = OsStr::from_bytes(name.to_bytes());
        if !self.watched.concerns(directory, name) {
            return false;
        }
        let is_complete = |meta: Metadata| !meta.is_file() || meta.nlink() > 1;
        event.events() != ReadFlags::CREATE || fs::symlink_metadata(directory.join(name)).is_ok_and(is_complete)
    }
}
