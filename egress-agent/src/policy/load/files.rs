//! Which files there are, and their bytes.

use std::{
    collections::{BTreeMap, HashSet, VecDeque},
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::{Component, Path, PathBuf},
    time::{Duration, SystemTime},
};

use super::{LoadError, LoadOptions, MAX_FILE, MAX_TOTAL, Watched};
use crate::{policy::code::Code, text::printable_bytes};

/// Most symbolic links on the way to a file, as in Linux.
const MAX_LINKS: usize = 40;

/// What tells that a file or directory is another, or was changed, without reading it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Of a file, or of a directory, of which matters only which it is: its files have stamps of their own.
    fn new(metadata: &Metadata) -> Self {
        let (device, inode) = (metadata.dev(), metadata.ino());
        if metadata.is_dir() {
            return Self { device, inode, ..Self::default() };
        }
        let modified = (metadata.mtime(), metadata.mtime_nsec());
        let changed = (metadata.ctime(), metadata.ctime_nsec());
        Self { device, inode, size: metadata.size(), modified, changed }
    }

    /// Of what is there, or of nothing.
    pub(super) fn of(path: &Path) -> Self {
        fs::metadata(path).map_or(Self::default(), |metadata| Self::new(&metadata))
    }
}

/// For how long a file that is open for writing must have been left alone to be read as it stands.
const SETTLED: Duration = Duration::from_secs(5);

/// Whether a file that is open for writing says what it is to say, as far as can be told: it has not changed for a while. One
/// that is empty was only just begun, however long ago.
fn is_settled(metadata: &Metadata) -> bool {
    let (seconds, nanos) = (metadata.ctime(), metadata.ctime_nsec());
    let since_epoch = u64::try_from(seconds).ok().zip(u32::try_from(nanos).ok());
    let changed = since_epoch.map(|(seconds, nanos)| SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos));
    // A time that is yet to come tells nothing.
    let age = changed.and_then(|changed| changed.elapsed().ok());
    metadata.len() > 0 && age.is_some_and(|age| age >= SETTLED)
}

/// Whether a file is being written, and not to be read yet. One that cannot be opened tells nothing, and that is told by
/// reading it.
pub(super) fn is_unfinished(path: &Path) -> bool {
    File::open(path).is_ok_and(|file| is_being_written(&file) && !file.metadata().is_ok_and(|meta| is_settled(&meta)))
}

/// A file to read.
pub(super) struct Found {
    pub path: PathBuf,
    /// The user named it; otherwise it was found in a directory.
    named: bool,
    /// Why it is not known what it is.
    error: Option<io::Error>,
}

impl Found {
    /// A file that the user named.
    pub(super) const fn named(path: PathBuf) -> Self {
        Self { path, named: true, error: None }
    }
}

/// Why a file was not read.
pub(super) enum ReadError {
    /// Something to report.
    Finding(Code, String, &'static str),
    /// A file the user named cannot be read.
    Named(io::Error),
    /// It is open for writing, and was changed a moment ago: it may be half written.
    BeingWritten,
    /// It was removed after its directory was listed; another may have come in its place. A link that leads nowhere is not gone.
    Gone,
}

/// `F_SETSIG` of `asm-generic/fcntl.h`.
const F_SETSIG: libc::c_int = 10;

/// Whether anybody has the file open for writing: only then is a lease for reading refused with `EAGAIN`
/// (`fcntl(2)`, `F_SETLEASE`). File systems without leases do not tell.
fn is_being_written(file: &File) -> bool {
    let fd = file.as_raw_fd();
    // SAFETY: plain system calls on a descriptor that is open. A writer that comes while the lease is held waits until it
    // is given back on the next line; the signal that tells of it is one that is ignored by default.
    unsafe {
        libc::fcntl(fd, F_SETSIG, libc::SIGURG);
        let refused = libc::fcntl(fd, libc::F_SETLEASE, libc::F_RDLCK) == -1
            && io::Error::last_os_error().kind() == io::ErrorKind::WouldBlock;
        libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK);
        refused
    }
}

/// The files that the paths stand for, each once, in a fixed order, and what they depend on.
pub(super) fn find(paths: &[PathBuf], watched: &mut Watched) -> Result<Vec<Found>, LoadError> {
    search(paths, &mut Search { watched: Some(watched), ..Search::default() })
}

/// The stamps of the files that the paths stand for, and of the directories that hold them.
pub(super) fn stamps(paths: &[PathBuf]) -> BTreeMap<PathBuf, Stamp> {
    let mut stamping = Search::default();
    // What cannot be found has the stamp of nothing; reading it gives the error.
    let _ = search(paths, &mut stamping);
    stamping.stamps
}

fn search(paths: &[PathBuf], search: &mut Search<'_>) -> Result<Vec<Found>, LoadError> {
    let mut paths = paths.to_vec();
    paths.sort();
    for path in paths {
        search.path(&path, true).map_err(|cause| {
            search.stamps.insert(path.clone(), Stamp::default());
            LoadError::Unreadable { path, cause }
        })?;
    }
    Ok(std::mem::take(&mut search.found))
}

#[derive(Default)]
struct Search<'a> {
    /// Where it is noted what the files depend on, if anybody wants to know.
    watched: Option<&'a mut Watched>,
    /// Device and inode of all that was visited, so that links end and nothing is read twice.
    seen: HashSet<(u64, u64)>,
    stamps: BTreeMap<PathBuf, Stamp>,
    found: Vec<Found>,
}

impl Search<'_> {
    fn path(&mut self, path: &Path, named: bool) -> io::Result<()> {
        if let Some(watched) = &mut self.watched {
            for (directory, name) in places_of(path) {
                watched.add_name(directory, name);
            }
        }
        let metadata = fs::metadata(path)?;
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        self.stamps.insert(path.to_owned(), Stamp::new(&metadata));
        if metadata.is_dir() {
            return self.directory(path);
        }
        self.found.push(Found { path: path.to_path_buf(), named, error: None });
        Ok(())
    }

    fn directory(&mut self, directory: &Path) -> io::Result<()> {
        if let Some(watched) = &mut self.watched {
            watched.add_all(fs::canonicalize(directory)?);
        }
        let names: io::Result<Vec<OsString>> = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect();
        let mut names = names?;
        names.sort();
        for name in names {
            let path = directory.join(&name);
            let is_hidden = name.as_encoded_bytes().starts_with(b".");
            let is_directory = || fs::metadata(&path).is_ok_and(|metadata| metadata.is_dir());
            if is_hidden || !(has_policy_extension(&path) || is_directory()) {
                continue;
            }
            if let Err(error) = self.path(&path, false) {
                self.stamps.insert(path.clone(), Stamp::default());
                self.found.push(Found { path, named: false, error: Some(error) });
            }
        }
        Ok(())
    }
}

fn has_policy_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

/// The entries of directories that decide what a path leads to: one for each step of the way, links included.
pub(super) fn places_of(path: &Path) -> Vec<(PathBuf, OsString)> {
    let mut places = Vec::new();
    let mut here = PathBuf::from("/");
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut ahead: VecDeque<OsString> = parts(&absolute).collect();
    let mut links = 0;
    while let Some(part) = ahead.pop_front() {
        if part == ".." {
            here.pop();
            continue;
        }
        let next = here.join(&part);
        match fs::read_link(&next) {
            Ok(target) if links < MAX_LINKS => {
                links += 1;
                places.push((here.clone(), part));
                if target.is_absolute() {
                    here = PathBuf::from("/");
                }
                for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
                    ahead.push_front(part);
                }
            }
            _ => {
                places.push((here.clone(), part));
                here = next;
            }
        }
    }
    places
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// The bytes of a file; `left` is what may still be read of all files.
pub(super) fn read(found: &mut Found, options: &LoadOptions, left: &mut u64) -> Result<Vec<u8>, ReadError> {
    let unknown = found.error.take();
    let found = &*found;
    let failed = |cause: io::Error| {
        if found.named {
            return ReadError::Named(cause);
        }
        if cause.kind() == io::ErrorKind::NotFound && !found.path.is_symlink() {
            return ReadError::Gone;
        }
        let message = format!("cannot read this file: {cause}");
        ReadError::Finding(Code::Unreadable, message, "delete it, or make it readable")
    };
    if let Some(error) = unknown {
        return Err(failed(error));
    }
    let metadata = fs::metadata(&found.path).map_err(failed)?;
    // A pipe may be named where it is read once, as in `check <(helm template …)`.
    if !metadata.is_file() && (!found.named || options.follow) {
        let message = "this is not a file".to_owned();
        return Err(ReadError::Finding(Code::Unreadable, message, "policy directories hold files and directories"));
    }
    let file = File::open(&found.path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if options.follow && is_being_written(&file) && !is_settled(&metadata) {
        return Err(ReadError::BeingWritten);
    }
    if options.require_root_owned {
        only_root_writes(found, &metadata).map_err(failed)??;
    }
    let mut bytes = Vec::new();
    let most = MAX_FILE.min(*left);
    (&file).take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
    // A writer may have come after the first look: what was read may be half of what it writes.
    if options.follow && Stamp::new(&metadata) != Stamp::new(&file.metadata().map_err(failed)?) {
        return Err(ReadError::BeingWritten);
    }
    let length = bytes.len() as u64;
    if length > most {
        let message = if most < MAX_FILE {
            format!("all files together are larger than {} MiB", MAX_TOTAL >> 20)
        } else {
            format!("the file is larger than {} MiB", MAX_FILE >> 20)
        };
        return Err(ReadError::Finding(Code::FileTooLarge, message, "merge prefixes, or leave files out"));
    }
    *left -= length;
    Ok(bytes)
}

/// Whoever can write a file, replace it, or put one beside it, can open every destination.
fn only_root_writes(found: &Found, file: &Metadata) -> io::Result<Result<(), ReadError>> {
    if is_writable_by_others(file) {
        return Ok(Err(unsafe_owner(&found.path)));
    }
    let holder = fs::canonicalize(&found.path)?.parent().map(Path::to_path_buf);
    for (directory, _) in places_of(&found.path) {
        for directory in directory.ancestors() {
            let metadata = fs::metadata(directory)?;
            // In a sticky directory, as /tmp, others cannot replace what is root's, only add to it.
            let is_sticky = metadata.mode() & 0o1000 != 0 && metadata.uid() == 0;
            let only_adds = is_sticky && (found.named || holder.as_deref() != Some(directory));
            if is_writable_by_others(&metadata) && !only_adds {
                return Ok(Err(unsafe_owner(directory)));
            }
        }
    }
    Ok(Ok(()))
}

fn unsafe_owner(path: &Path) -> ReadError {
    let message = format!("others than root can change {}", printable_bytes(path));
    ReadError::Finding(Code::UnsafeOwner, message, "chown root:root, and chmod go-w")
}

fn is_writable_by_others(metadata: &Metadata) -> bool {
    let mode = metadata.mode();
    metadata.uid() != 0 || mode & 0o002 != 0 || (mode & 0o020 != 0 && metadata.gid() != 0)
}
