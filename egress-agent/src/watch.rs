//! Notices when policy files change: closed after writing, renamed, linked, or removed; never while they are being
//! written.
//!
//! Kubernetes swaps a symbolic link beside the files of a `ConfigMap`, which shows as a rename in their directory.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::inotify::{self, CreateFlags, Event, ReadFlags, Reader, WatchFlags},
    io::Errno,
};
use tokio::io::{Interest, unix::AsyncFd};

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
#[derive(Debug)]
pub struct Watch {
    inotify: AsyncFd<OwnedFd>,
    /// By inotify's watch descriptor.
    directories: BTreeMap<i32, PathBuf>,
}

impl Watch {
    /// Watches nothing yet. Must be called in a tokio runtime.
    pub fn new() -> io::Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: the registered value owns its descriptor, which is closed only when that value is dropped.
        let inotify = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?;
        Ok(Self { inotify, directories: BTreeMap::new() })
    }

    /// Watches these directories too. Tells whether one of them is new, in which case something may have changed in it
    /// unnoticed. A directory that is not there is left out; its parent tells when it comes.
    pub fn add<'a>(&mut self, directories: impl IntoIterator<Item = &'a Path>) -> io::Result<bool> {
        let mut is_new = false;
        for directory in directories {
            match inotify::add_watch(&self.inotify, directory, CHANGES | WatchFlags::ONLYDIR) {
                Ok(watch) => is_new |= self.directories.insert(watch, directory.to_owned()).is_none(),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(is_new)
    }

    /// Waits until something changed.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match ready.try_io(|inotify| drain(inotify, &mut self.directories)) {
                Ok(Ok(true)) => return Ok(()),
                Ok(Err(error)) => return Err(error),
                Ok(Ok(false)) | Err(_) => {}
            }
        }
    }
}

/// Reads all there is. Whether anything in it is a change.
fn drain(fd: impl AsFd, directories: &mut BTreeMap<i32, PathBuf>) -> io::Result<bool> {
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(fd, &mut buffer);
    let (mut changed, mut empty) = (false, true);
    loop {
        match reader.next() {
            Ok(event) => {
                changed |= is_change(&event, directories);
                if event.events().contains(ReadFlags::IGNORED) {
                    directories.remove(&event.wd());
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

/// A file that was just created is still being written and counts once it is closed. Directories and links are complete
/// at once, and no close follows.
fn is_change(event: &Event<'_>, directories: &BTreeMap<i32, PathBuf>) -> bool {
    if event.events() != ReadFlags::CREATE {
        return true;
    }
    let (Some(directory), Some(name)) = (directories.get(&event.wd()), event.file_name()) else { return true };
    let created = fs::symlink_metadata(directory.join(OsStr::from_bytes(name.to_bytes())));
    created.is_ok_and(|meta| !meta.is_file() || meta.nlink() > 1)
}
