//! Cgroups: where the cgroup2 hierarchy is mounted, which cgroup a path means, and which path an id has.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{OsStr, OsString},
    fs::{self, DirEntry, File},
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
        unix::{
            ffi::OsStrExt,
            fs::{DirEntryExt, MetadataExt},
        },
    },
    path::{Component, Path, PathBuf},
    time::{Duration, Instant},
};

use egress_common::MAX_LEVEL;
use rustix::{
    fs::{CWD, Mode, OFlags, statfs},
    io::Errno,
    thread::gettid,
};
use thiserror::Error;

use crate::mounts;

/// The type of the file system.
const CGROUP2: &str = "cgroup2";
/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
/// The inode of the hierarchy's root: the first that `kernfs_create_root` gives.
const ROOT_INODE: u64 = 1;

/// How a container gets the host's cgroups.
const HOST_MOUNT: &str = "for example with -v /sys/fs/cgroup:/host/cgroup:ro";

/// Why a cgroup could not be had.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// `/proc/self/mountinfo` cannot be read.
    #[error("cannot read /proc/self/mountinfo; is /proc mounted?")]
    MountInfo(#[source] io::Error),
    /// No cgroup2 hierarchy is mounted with its root.
    #[error(
        "no cgroup2 file system is mounted; mount one (mount -t cgroup2 none /sys/fs/cgroup), in a container the host's \
         ({HOST_MOUNT})"
    )]
    NotMounted,
    /// Only a part of the hierarchy is mounted, as in a container with a cgroup namespace of its own.
    #[error(
        "cgroup2 at {} is a container's own part of the hierarchy: mount the host's root beside it ({HOST_MOUNT})",
        .at.display()
    )]
    OnlyPart {
        /// Where that is mounted.
        at: PathBuf,
    },
    /// Neither the path nor the path below the mount is there.
    #[error("there is no cgroup {}: looked for {} and for {}", .given.display(), .given.display(), .below.display())]
    NotFound {
        /// As the user gave it.
        given: PathBuf,
        /// The same below the cgroup2 mount.
        below: PathBuf,
    },
    /// The path is something else.
    #[error("{} is not a cgroup of the cgroup2 hierarchy, which is mounted at {}", .path.display(), .mount.display())]
    NotCgroup2 {
        /// As the user gave it.
        path: PathBuf,
        /// Where cgroup2 is.
        mount: PathBuf,
    },
    /// The directory cannot be opened.
    #[error("cannot open cgroup {}", .path.display())]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// Where the cgroup2 hierarchy is mounted from its root: of several mounts, the one with the shortest path.
///
/// In a cgroup namespace the root of a mount in mountinfo is told from the namespace's own root, so `/` may be a part of the
/// hierarchy and `/../..` all of it. What tells is the inode: that of the hierarchy's root is 1.
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    root_among(mounts::of_type(CGROUP2).map_err(CgroupError::MountInfo)?, inode_on_cgroup2)
}

/// `inode` is `None` where another mount hides the mount point.
fn root_among(points: Vec<PathBuf>, inode: impl Fn(&Path) -> Option<u64>) -> Result<PathBuf, CgroupError> {
    let shortest = |points: Vec<PathBuf>| points.into_iter().min_by_key(|point| point.as_os_str().len());
    let seen = points.into_iter().filter(|point| inode(point).is_some());
    let (roots, parts) = seen.partition(|point| inode(point) == Some(ROOT_INODE));
    shortest(roots).ok_or_else(|| match shortest(parts) {
        Some(at) => CgroupError::OnlyPart { at },
        None => CgroupError::NotMounted,
    })
}

fn inode_on_cgroup2(path: &Path) -> Option<u64> {
    let meta = is_on_cgroup2(path).then(|| fs::metadata(path));
    meta?.ok().map(|meta| meta.ino())
}

/// A directory, by a path that system calls take however long its own is: cgroups can be nested as deep as their owner likes.
#[derive(Debug)]
pub(crate) struct Reached {
    path: PathBuf,
    /// What the path leads through.
    _directory: Option<OwnedFd>,
}

impl std::ops::Deref for Reached {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.path
    }
}

/// Reaches a directory. What is too long for one system call (`PATH_MAX`), with a name appended, is opened piece by piece.
pub(crate) fn reach(directory: &Path) -> io::Result<Reached> {
    const MAX_PATH: usize = 4096 - 256;
    const MAX_NAMES: usize = 8;
    if directory.as_os_str().len() <= MAX_PATH {
        return Ok(Reached { path: directory.to_owned(), _directory: None });
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut reached = rustix::fs::openat(CWD, "/", flags, Mode::empty())?;
    let names: Vec<&OsStr> = below(directory).iter().collect();
    for names in names.chunks(MAX_NAMES) {
        reached = rustix::fs::openat(&reached, names.iter().collect::<PathBuf>(), flags, Mode::empty())?;
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", reached.as_raw_fd()));
    Ok(Reached { path, _directory: Some(reached) })
}

/// Whether an error says that a cgroup is gone.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    let gone = [Errno::NOENT, Errno::NOTDIR, Errno::NODEV];
    gone.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// An open cgroup to attach to.
#[derive(Debug)]
pub struct Cgroup {
    /// The open directory.
    pub directory: File,
    /// The inode number of the directory.
    pub id: u64,
    /// Its path from the root of the hierarchy, with a leading slash.
    pub path: PathBuf,
}

impl Cgroup {
    /// Whether it is the root of the hierarchy.
    pub fn is_root(&self) -> bool {
        self.path == Path::new("/")
    }

    /// Opens the cgroup at a path below the mount.
    pub(crate) fn at(mount: &Path, path: &Path) -> io::Result<Self> {
        let directory = File::open(&*reach(&mount.join(path))?)?;
        let id = directory.metadata()?.ino();
        Ok(Self { directory, id, path: Path::new("/").join(path) })
    }

    /// Opens the cgroup a user means: a directory of the cgroup2 file system, or a path below its mount. A directory of
    /// another file system hides no cgroup of the same name; `/`, which is one, means the mount itself.
    pub fn open(given: &Path, mount: &Path) -> Result<Self, CgroupError> {
        let below = mount.join(below(given));
        let directories = || [given, &below].into_iter().filter(|path| path.is_dir());
        if directories().next().is_none() {
            return Err(CgroupError::NotFound { given: given.to_owned(), below });
        }
        let not_cgroup2 = || CgroupError::NotCgroup2 { path: given.to_owned(), mount: mount.to_owned() };
        let path = directories().find(|path| is_on_cgroup2(path)).ok_or_else(not_cgroup2)?;
        let open = |cause| CgroupError::Open { path: path.to_owned(), cause };
        let directory = File::open(path).map_err(open)?;
        let canonical = fs::canonicalize(path).map_err(open)?;
        let below = canonical.strip_prefix(mount).map_err(|_| not_cgroup2())?;
        let id = directory.metadata().map_err(open)?.ino();
        Ok(Self { directory, id, path: Path::new("/").join(below) })
    }
}

/// The cgroup of the calling thread.
///
/// `/proc` tells it from the root of the cgroup namespace, so the cgroup of that name below the mount may be another: it
/// counts only if it holds the thread. Threads are listed in their own cgroup also where it is a threaded one, in which
/// `cgroup.procs` cannot be read. Numbers of another pid namespace are listed as 0, so none is mistaken for ours.
pub fn own(mount: &Path) -> Option<Cgroup> {
    let thread = gettid().as_raw_nonzero().to_string();
    let holds = |directory: &PathBuf| {
        let threads = fs::read_to_string(directory.join("cgroup.threads"));
        threads.is_ok_and(|threads| threads.lines().any(|line| line == thread))
    };
    let told = fs::read("/proc/thread-self/cgroup").ok().and_then(|cgroups| cgroup2_path(&cgroups));
    let told = told.map(|below| mount.join(below)).filter(holds);
    let directory = told.or_else(|| directories(mount).find(holds))?;
    Cgroup::open(&directory, mount).ok()
}

/// The path in a `cgroup` file of `/proc`, relative to the root of the cgroup namespace; `None` where it leads out of that.
fn cgroup2_path(cgroups: &[u8]) -> Option<PathBuf> {
    let path = cgroups.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
    let path = Path::new(OsStr::from_bytes(path));
    let is_below = path.components().all(|component| matches!(component, Component::Normal(_)));
    is_below.then(|| path.to_owned())
}

/// Every directory of a mount. What goes away meanwhile is no longer there to be listed.
pub(crate) fn directories(mount: &Path) -> impl Iterator<Item = PathBuf> {
    found_below(mount).map(|found| found.directory)
}

/// A cgroup that was found.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) directory: PathBuf,
    pub(crate) id: u64,
    /// The id of the one above it, unless the search began here.
    pub(crate) parent: Option<u64>,
}

/// A cgroup and every one below it, each after the one above it. What goes away meanwhile is no longer there to be found.
pub(crate) fn found_below(top: &Path) -> impl Iterator<Item = Found> {
    let mut todo = vec![(top.to_owned(), None)];
    std::iter::from_fn(move || {
        loop {
            let (directory, parent) = todo.pop()?;
            let Ok(id) = reach(&directory).and_then(|path| fs::metadata(&*path)).map(|meta| meta.ino()) else {
                continue;
            };
            todo.extend(children(&directory).into_iter().flatten().map(|name| (directory.join(name), Some(id))));
            return Some(Found { directory, id, parent });
        }
    })
}

/// The names of the cgroups directly below one. What goes away meanwhile is no longer there to be listed.
pub(crate) fn children(directory: &Path) -> io::Result<impl Iterator<Item = OsString>> {
    Ok(directory_entries(&reach(directory)?)?.map(|entry| entry.file_name()))
}

fn directory_entries(directory: &Path) -> io::Result<impl Iterator<Item = DirEntry> + use<>> {
    let entries = fs::read_dir(directory)?.flatten();
    Ok(entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())))
}

/// The path of a cgroup without its leading slash, as it is below a mount of the hierarchy.
pub(crate) fn below(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn is_on_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|system| u64::try_from(system.f_type) == Ok(CGROUP2_SUPER_MAGIC))
}

/// The path of a cgroup by its id alone, without looking through the hierarchy. Takes `CAP_DAC_READ_SEARCH`; `None` without
/// it, and where the cgroup is gone.
fn by_handle(mount: &Path, id: u64) -> Option<PathBuf> {
    /// `struct file_handle` with the handle of a file of kernfs (`FILEID_KERNFS` of `linux/exportfs.h`).
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        id: [u8; 8],
    }
    let directory = File::open(mount).ok()?;
    let mut handle = Handle { bytes: 8, kind: 0xfe, id: id.to_ne_bytes() };
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    let (at, handle) = (directory.as_raw_fd(), &raw mut handle);
    // SAFETY: the kernel reads the handle, which is as long as it says, and writes nothing there.
    let opened = unsafe { libc::syscall(libc::SYS_open_by_handle_at, at, handle, flags) };
    let opened = RawFd::try_from(opened).ok().filter(|fd| *fd >= 0)?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    let opened = unsafe { OwnedFd::from_raw_fd(opened) };
    let path = fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd())).ok()?;
    let is_it = fs::metadata(&path).is_ok_and(|meta| meta.ino() == id);
    is_it.then(|| path.strip_prefix(mount).map(|below| Path::new("/").join(below)).ok())?
}

/// Finds the path of a cgroup by its id, which is the inode number of its directory.
#[derive(Debug)]
pub struct CgroupPaths {
    mount: PathBuf,
    known: HashMap<u64, PathBuf>,
    /// Bytes of what is known.
    bytes: usize,
    /// Those that were looked for and are gone; no other cgroup gets their ids.
    gone: HashSet<u64>,
    /// How long the whole hierarchy may be walked, and from when on it may be again; without a bound, as often as asked.
    patience: Option<Duration>,
    next_walk: Option<Instant>,
}

/// Most cgroups that are remembered where that is bounded, and most bytes of their paths.
const MAX_KNOWN: usize = 1 << 15;
const MAX_KNOWN_BYTES: usize = 4 << 20;
/// A walk of the hierarchy takes no longer than this, where that is bounded, and there is one a second.
const MAX_WALK: Duration = Duration::from_millis(100);
const WALK_AGAIN: Duration = Duration::from_secs(1);

impl CgroupPaths {
    /// Paths below a cgroup2 mount.
    pub fn new(mount: PathBuf) -> Self {
        Self { mount, known: HashMap::new(), bytes: 0, gone: HashSet::new(), patience: None, next_walk: None }
    }

    /// The same for whoever must not be held up, however many cgroups there are, and however many come and go: what would
    /// take longer, or more memory, is not known.
    #[must_use]
    pub fn bounded(self) -> Self {
        Self { patience: Some(MAX_WALK), ..self }
    }

    /// The path from the root of the hierarchy. `None` if the cgroup is gone, or is not known.
    pub fn path(&mut self, id: u64) -> Option<&Path> {
        if !self.known.contains_key(&id)
            && let Some(path) = by_handle(&self.mount, id)
        {
            self.insert(id, path);
        }
        if !self.known.contains_key(&id) && !self.gone.contains(&id) && self.may_walk() && self.walk() {
            // A cgroup that is gone is not looked for again.
            if !self.known.contains_key(&id) {
                self.gone.insert(id);
            }
        }
        self.known.get(&id).map(PathBuf::as_path)
    }

    /// Whether the path is known without looking.
    pub fn knows(&self, id: u64) -> bool {
        self.known.contains_key(&id)
    }

    /// Learns the path of a cgroup from what `/proc` tells of a process that was in it, which saves a walk.
    pub fn learn(&mut self, id: u64, told: &[u8]) {
        let Some(path) = cgroup2_path(told) else { return };
        if fs::metadata(self.mount.join(&path)).is_ok_and(|meta| meta.ino() == id) {
            self.insert(id, Path::new("/").join(path));
        }
    }

    /// The ids of the cgroups above one at a path, the nearest first, of those that can be placed.
    pub fn above(&self, path: &Path) -> Vec<u64> {
        let id = |above: &Path| fs::metadata(self.mount.join(below(above))).ok().map(|meta| meta.ino());
        let depth = path.components().count().saturating_sub(1);
        let too_deep = depth.saturating_sub(1).saturating_sub(MAX_LEVEL.into());
        path.ancestors().skip(1 + too_deep).filter_map(id).collect()
    }

    fn may_walk(&self) -> bool {
        self.patience.is_none() || self.next_walk.is_none_or(|at| Instant::now() >= at)
    }

    /// Learns every cgroup there is, those nearest to the root first, and forgets the others. Whether these are all.
    fn walk(&mut self) -> bool {
        let until = self.patience.map(|patience| Instant::now() + patience);
        let before = std::mem::take(&mut self.known);
        self.bytes = 0;
        self.gone.clear();
        let mut is_whole = inode(&self.mount).is_some_and(|id| self.insert(id, PathBuf::from("/")));
        let mut todo = VecDeque::from([PathBuf::from("/")]);
        while let Some(path) = todo.pop_front() {
            if until.is_some_and(|until| Instant::now() > until) {
                is_whole = false;
                break;
            }
            for entry in directory_entries(&self.mount.join(below(&path))).into_iter().flatten() {
                let child = path.join(entry.file_name());
                is_whole &= self.insert(entry.ino(), child.clone());
                if is_whole && has_children(&self.mount.join(below(&child))) {
                    todo.push_back(child);
                }
            }
        }
        if !is_whole {
            for (id, path) in before {
                if !self.known.contains_key(&id) {
                    self.insert(id, path);
                }
            }
        }
        self.next_walk = Some(Instant::now() + WALK_AGAIN);
        is_whole
    }

    /// Whether there was room.
    fn insert(&mut self, id: u64, path: PathBuf) -> bool {
        let size = path.as_os_str().len() + size_of::<(u64, PathBuf)>();
        let is_full = self.known.len() >= MAX_KNOWN || self.bytes + size > MAX_KNOWN_BYTES;
        if is_full && self.patience.is_some() {
            return false;
        }
        self.bytes += size;
        if let Some(before) = self.known.insert(id, path) {
            self.bytes -= before.as_os_str().len() + size_of::<(u64, PathBuf)>();
        }
        true
    }
}

fn inode(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().map(|meta| meta.ino())
}

/// Whether a cgroup has some below it: a directory has a link from each of those in it, one from where it is, and its own.
fn has_children(directory: &Path) -> bool {
    fs::metadata(directory).is_ok_and(|meta| meta.nlink() > 2)
}

/// The processes in a cgroup; of a threaded one, the threads, which alone are told.
pub(crate) fn tasks(directory: &Path) -> Vec<u32> {
    let Ok(directory) = reach(directory) else { return Vec::new() };
    let read = |name| fs::read_to_string(directory.join(name));
    let tasks = read("cgroup.procs").or_else(|_| read("cgroup.threads")).unwrap_or_default();
    tasks.lines().filter_map(|pid| pid.parse().ok()).collect()
}

/// The systemd unit that a cgroup belongs to: the first component of its path that is not a slice, if that is a service,
/// scope or the like. What stands below it was made by the unit itself, which could take another unit's name there.
pub fn unit(path: &Path) -> Option<&OsStr> {
    const UNIT_TYPES: [&[u8]; 5] = [b"service", b"scope", b"socket", b"mount", b"swap"];
    let mut components = path.iter().filter(|&component| component != "/");
    let name = components.find(|name| unit_type(name) != Some(b"slice"))?;
    unit_type(name).is_some_and(|kind| UNIT_TYPES.contains(&kind)).then_some(name)
}

fn unit_type(name: &OsStr) -> Option<&[u8]> {
    let name = name.as_bytes();
    let dot = name.iter().rposition(|&byte| byte == b'.')?;
    Some(&name[dot + 1..])
}

/// The container that a cgroup belongs to: 64 hexadecimal digits, as containerd, CRI-O, Docker and Podman name it, alone
/// or between `runtime-` and `.scope`.
pub fn container_id(path: &Path) -> Option<&str> {
    path.iter().rev().filter_map(|component| component.to_str()).find_map(|name| {
        let name = name.strip_suffix(".scope").unwrap_or(name);
        let id = name.rsplit_once('-').map_or(name, |(_, id)| id);
        (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: &[u8] = b"\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
40 31 0:38 /below /short rw,relatime - cgroup2 cgroup2 rw
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw
42 31 0:38 / /a/longer/path/than/the/other/one rw,relatime - cgroup2 cgroup2 rw
";

    /// The mounts of a container that has its own part of the hierarchy and the host's root.
    const CONTAINER: &[u8] = b"\
58 48 0:38 / /sys/fs/cgroup ro,relatime - cgroup2 cgroup2 rw
65 44 0:38 /../../.. /host/cgroup ro,relatime - cgroup2 cgroup2 rw
66 44 0:38 /../../../system.slice /x rw,relatime - cgroup2 cgroup2 rw
";

    /// The mount that is chosen, where `roots` have the inode of the root and `hidden` cannot be seen.
    fn chosen(mounts: &[u8], roots: &[&str], hidden: &[&str]) -> Result<PathBuf, CgroupError> {
        let is_one = |path: &Path, of: &[&str]| of.iter().any(|one| path == Path::new(one));
        root_among(mounts::parse(mounts, CGROUP2), |path| {
            (!is_one(path, hidden)).then(|| if is_one(path, roots) { ROOT_INODE } else { 4711 })
        })
    }

    #[test]
    fn the_cgroup2_root_is_found_among_cgroup_v1_mounts() {
        let (near, far) = ("/sys/fs/cgroup/unified", "/a/longer/path/than/the/other/one");
        assert_eq!(chosen(HOST, &[near, far], &[]).unwrap(), Path::new(near));
        assert_eq!(chosen(HOST, &[near, far], &[near]).unwrap(), Path::new(far));
        assert!(matches!(chosen(b"\n40 31\n", &[], &[]), Err(CgroupError::NotMounted)));
        assert!(matches!(chosen(HOST, &[near], &[near, far, "/short"]), Err(CgroupError::NotMounted)));
    }

    #[test]
    fn the_hosts_root_is_told_from_the_part_of_a_container() {
        assert_eq!(chosen(CONTAINER, &["/host/cgroup"], &[]).unwrap(), Path::new("/host/cgroup"));
        let error = chosen(CONTAINER, &[], &["/x"]).unwrap_err().to_string();
        assert!(error.contains("cgroup2 at /host/cgroup is a container's own part"), "{error}");
    }

    #[test]
    fn a_path_that_leads_out_of_the_namespace_names_no_cgroup() {
        assert_eq!(cgroup2_path(b"4:cpu:/x\n0::/a/b\n"), Some("a/b".into()));
        assert_eq!(cgroup2_path(b"0::/\n"), Some("".into()));
        assert_eq!(cgroup2_path(b"0::/../a\n"), None);
        assert_eq!(cgroup2_path(b"4:cpu:/x\n"), None);
    }

    #[test]
    fn the_own_cgroup_holds_the_calling_thread() {
        let mount = mount_point().unwrap();
        let own = own(&mount).unwrap();
        let threads = fs::read_to_string(mount.join(below(&own.path)).join("cgroup.threads")).unwrap();
        assert!(threads.lines().any(|line| line == gettid().as_raw_nonzero().to_string()), "{own:?}");
    }

    #[test]
    fn a_directory_elsewhere_does_not_hide_the_cgroup_of_its_name() {
        let mount = mount_point().unwrap();
        // `/` is a directory of another file system, as any of a cgroup's name in the working directory may be.
        assert_eq!(Cgroup::open(Path::new("/"), &mount).unwrap().path, Path::new("/"));
        assert_eq!(Cgroup::open(&mount, &mount).unwrap().path, Path::new("/"));
        let open = |path: &str| Cgroup::open(Path::new(path), &mount);
        assert!(matches!(open("/proc/self"), Err(CgroupError::NotCgroup2 { .. })));
        assert!(matches!(open("/no/such/cgroup"), Err(CgroupError::NotFound { .. })));
    }

    #[test]
    fn unit_and_container_come_from_the_path() {
        let id = "0123456789abcdef".repeat(4);
        let pod = format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope");
        assert_eq!(container_id(Path::new(&pod)), Some(id.as_str()));
        assert_eq!(container_id(Path::new(&format!("/docker/{id}/child"))), Some(id.as_str()));
        assert_eq!(container_id(Path::new("/system.slice/nginx.service")), None);
        assert_eq!(unit(Path::new(&pod)), Some(OsStr::new(&format!("cri-containerd-{id}.scope"))));
    }

    #[test]
    fn a_unit_is_the_first_that_is_no_slice() {
        let check =
            |path: &str, expected: Option<&str>| assert_eq!(unit(Path::new(path)), expected.map(OsStr::new), "{path}");
        check("/system.slice/nginx.service/worker", Some("nginx.service"));
        check("/system.slice/nginx.service/sshd.service", Some("nginx.service"));
        check("/user.slice/user-1000.slice/user@1000.service/app.slice/foo.service", Some("user@1000.service"));
        check("/init.scope", Some("init.scope"));
        check("/kubepods.slice/a.slice/cri-containerd-X.scope", Some("cri-containerd-X.scope"));
        check("/docker/x/sshd.service", None);
        check("/system.slice/worker/sshd.service", None);
        check("/kubepods/burstable", None);
        check("/system.slice", None);
        check("/", None);
        let bytes = |bytes: &'static [u8]| OsStr::from_bytes(bytes);
        assert_eq!(unit(Path::new(bytes(b"/\xff.slice/a\xfe.service/x"))), Some(bytes(b"a\xfe.service")));
        assert_eq!(unit(Path::new(bytes(b"/\xff/sshd.service"))), None);
    }
}
