//! Cgroups: where the cgroup2 hierarchy is mounted, which cgroup a path means, and which path an id has.

use std::{
    collections::HashMap,
    ffi::OsString,
    fs::{self, File},
    io,
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::MetadataExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::statfs;
use thiserror::Error;

/// `CGROUP2_SUPER_MAGIC` of `linux/magic.h`.
const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;

/// Why a cgroup could not be had.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// `/proc/self/mountinfo` cannot be read.
    #[error("cannot read /proc/self/mountinfo; is /proc mounted?")]
    MountInfo(#[source] io::Error),
    /// No cgroup2 hierarchy is mounted with its root.
    #[error(
        "no cgroup2 file system is mounted from its root; mount one (mount -t cgroup2 none /sys/fs/cgroup), in a \
         container mount the host's"
    )]
    NotMounted,
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
pub fn mount_point() -> Result<PathBuf, CgroupError> {
    let mounts = fs::read("/proc/self/mountinfo").map_err(CgroupError::MountInfo)?;
    mount_point_in(&mounts).ok_or(CgroupError::NotMounted)
}

/// Fields of a line, by `proc_pid_mountinfo(5)`: 4 is the root of the mount, 5 the mount point; the type of the file
/// system follows a lone `-`.
fn mount_point_in(mounts: &[u8]) -> Option<PathBuf> {
    let of_line = |line: &[u8]| {
        let mut fields = line.split(|&byte| byte == b' ');
        let root = fields.nth(3)?;
        let point = fields.next()?;
        let kind = fields.skip_while(|&field| field != b"-").nth(1)?;
        (kind == b"cgroup2" && root == b"/").then(|| unescape(point))
    };
    mounts.split(|&byte| byte == b'\n').filter_map(of_line).min_by_key(|path| path.as_os_str().len())
}

/// Blanks and backslashes stand as three octal digits in mountinfo.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
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
    /// Opens the cgroup a user means: a directory of the cgroup2 file system, or a path below its mount. A directory of
    /// another file system hides no cgroup of the same name; `/`, which is one, means the mount itself.
    pub fn open(given: &Path, mount: &Path) -> Result<Self, CgroupError> {
        let below = mount.join(given.strip_prefix("/").unwrap_or(given));
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

fn is_on_cgroup2(path: &Path) -> bool {
    statfs(path).is_ok_and(|system| u64::try_from(system.f_type) == Ok(CGROUP2_SUPER_MAGIC))
}

/// Finds the path of a cgroup by its id, which is the inode number of its directory.
#[derive(Debug)]
pub struct CgroupPaths {
    mount: PathBuf,
    /// `None` for those that were gone.
    known: HashMap<u64, Option<PathBuf>>,
}

impl CgroupPaths {
    /// Paths below a cgroup2 mount.
    pub fn new(mount: PathBuf) -> Self {
        Self { mount, known: HashMap::new() }
    }

    /// The path from the root of the hierarchy. `pid` is a process that was in the cgroup: its own entry in `/proc`
    /// saves a walk over the whole tree. `None` if the cgroup was gone before it was looked for.
    pub fn path(&mut self, id: u64, pid: Option<u32>) -> Option<&Path> {
        if !self.known.contains_key(&id) {
            match pid.and_then(|pid| self.of_process(id, pid)) {
                Some(path) => drop(self.known.insert(id, Some(path))),
                None => self.walk(),
            }
            // A cgroup that is gone is not looked for again.
            self.known.entry(id).or_insert(None);
        }
        self.known.get(&id)?.as_deref()
    }

    fn of_process(&self, id: u64, pid: u32) -> Option<PathBuf> {
        let cgroups = fs::read(format!("/proc/{pid}/cgroup")).ok()?;
        let path = cgroups.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(b"0::/"))?;
        let path = Path::new(std::ffi::OsStr::from_bytes(path));
        let is_it = fs::metadata(self.mount.join(path)).is_ok_and(|meta| meta.ino() == id);
        is_it.then(|| Path::new("/").join(path))
    }

    /// Learns every cgroup there is, and forgets the others.
    fn walk(&mut self) {
        let mut known = HashMap::new();
        let mut todo = vec![self.mount.clone()];
        while let Some(directory) = todo.pop() {
            // A cgroup that goes away while we look is no longer there to be learnt.
            let Ok(meta) = fs::metadata(&directory) else { continue };
            let Ok(entries) = fs::read_dir(&directory) else { continue };
            let children = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            todo.extend(children.map(|entry| entry.path()));
            let below = directory.strip_prefix(&self.mount).unwrap_or(&directory);
            known.insert(meta.ino(), Some(Path::new("/").join(below)));
        }
        self.known = known;
    }
}

/// The systemd unit that a cgroup belongs to: the innermost component of its path that is a service, scope or the like.
pub fn unit(path: &Path) -> Option<&str> {
    const UNIT_TYPES: [&str; 5] = ["service", "scope", "socket", "mount", "swap"];
    let components = path.iter().rev().filter_map(|component| component.to_str());
    components.into_iter().find(|name| name.rsplit_once('.').is_some_and(|(_, kind)| UNIT_TYPES.contains(&kind)))
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

    #[test]
    fn the_cgroup2_root_is_found_among_cgroup_v1_mounts() {
        let mounts = b"\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
40 31 0:38 /below /short rw,relatime - cgroup2 cgroup2 rw
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 master:1 - cgroup2 cgroup2 rw
42 31 0:38 / /a/longer/path/than/the/other/one rw,relatime - cgroup2 cgroup2 rw
";
        assert_eq!(mount_point_in(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(mount_point_in(b"40 31 0:38 /below /x rw - cgroup2 cgroup2 rw\n"), None);
        assert_eq!(mount_point_in(b"\n40 31\n"), None);
    }

    #[test]
    fn blanks_in_a_mount_point_are_unescaped() {
        assert_eq!(mount_point_in(b"1 2 0:3 / /a\\040b rw - cgroup2 x rw"), Some("/a b".into()));
        assert_eq!(unescape(b"\\9"), PathBuf::from("\\9"));
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
        assert_eq!(unit(Path::new("/system.slice/nginx.service/worker")), Some("nginx.service"));
        assert_eq!(unit(Path::new("/kubepods/burstable")), None);
    }
}
