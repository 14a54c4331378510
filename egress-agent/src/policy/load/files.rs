//! Which files there are, and their bytes.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    ffi::OsString,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Component, Path, PathBuf},
};

use super::{LoadError, LoadOptions, MAX_FILE, MAX_TOTAL};
use crate::policy::code::Code;

/// Most symbolic links on the way to a file, as in Linux.
const MAX_LINKS: usize = 40;

/// A file to read.
pub(super) struct Found {
    pub path: PathBuf,
    /// The user named it; otherwise it was found in a directory.
    named: bool,
}

/// Why a file was not read.
pub(super) enum ReadError {
    /// Something to report.
    Finding(Code, String, &'static str),
    /// A file the user named cannot be read.
    Named(io::Error),
}

/// The files that the paths stand for, each once, in a fixed order, and the directories they depend on.
pub(super) fn find(paths: &[PathBuf], directories: &mut BTreeSet<PathBuf>) -> Result<Vec<Found>, LoadError> {
    let mut search = Search { directories, seen: HashSet::new(), found: Vec::new() };
    let mut paths = paths.to_vec();
    paths.sort();
    for path in paths {
        search.path(&path, true).map_err(|cause| LoadError::Unreadable { path, cause })?;
    }
    Ok(search.found)
}

struct Search<'a> {
    directories: &'a mut BTreeSet<PathBuf>,
    /// Device and inode of all that was visited, so that links end and nothing is read twice.
    seen: HashSet<(u64, u64)>,
    found: Vec<Found>,
}

impl Search<'_> {
    fn path(&mut self, path: &Path, named: bool) -> io::Result<()> {
        self.directories.extend(directories_of(path));
        let metadata = fs::metadata(path)?;
        if !self.seen.insert((metadata.dev(), metadata.ino())) {
            return Ok(());
        }
        if metadata.is_dir() {
            return self.directory(path);
        }
        self.found.push(Found { path: path.to_path_buf(), named });
        Ok(())
    }

    fn directory(&mut self, directory: &Path) -> io::Result<()> {
        self.directories.insert(fs::canonicalize(directory)?);
        let names: io::Result<Vec<OsString>> = fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect();
        let mut names = names?;
        names.sort();
        for name in names {
            let path = directory.join(&name);
            let is_hidden = name.as_encoded_bytes().starts_with(b".");
            let is_directory = fs::metadata(&path).is_ok_and(|metadata| metadata.is_dir());
            if is_hidden || !(is_directory || has_policy_extension(&path)) {
                continue;
            }
            if self.path(&path, false).is_err() {
                self.found.push(Found { path, named: false });
            }
        }
        Ok(())
    }
}

fn has_policy_extension(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
}

/// The directories whose entries decide what a path leads to: its own, and those of all links on the way.
fn directories_of(path: &Path) -> Vec<PathBuf> {
    let mut directories = Vec::new();
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
                directories.push(here.clone());
                if target.is_absolute() {
                    here = PathBuf::from("/");
                }
                for part in parts(&target).collect::<Vec<_>>().into_iter().rev() {
                    ahead.push_front(part);
                }
            }
            _ => here = next,
        }
    }
    directories.extend(here.parent().map(Path::to_path_buf));
    directories
}

fn parts(path: &Path) -> impl Iterator<Item = OsString> {
    path.components().filter_map(|component| match component {
        Component::Normal(part) => Some(part.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// The bytes of a file; `left` is what may still be read of all files.
pub(super) fn read(found: &Found, options: &LoadOptions, left: &mut u64) -> Result<Vec<u8>, ReadError> {
    let failed = |cause: io::Error| {
        if found.named {
            return ReadError::Named(cause);
        }
        let message = format!("cannot read this file: {cause}");
        ReadError::Finding(Code::Unreadable, message, "delete it, or make it readable")
    };
    let metadata = fs::metadata(&found.path).map_err(failed)?;
    if !metadata.is_file() && !found.named {
        let message = "this is not a file".to_owned();
        return Err(ReadError::Finding(Code::Unreadable, message, "policy directories hold files and directories"));
    }
    let file = File::open(&found.path).map_err(failed)?;
    if options.require_root_owned {
        only_root_writes(&found.path, &file.metadata().map_err(failed)?).map_err(failed)??;
    }
    let mut bytes = Vec::new();
    let most = MAX_FILE.min(*left);
    file.take(most + 1).read_to_end(&mut bytes).map_err(failed)?;
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

/// Whoever can write a file, or replace it in its directory, can open every destination.
fn only_root_writes(path: &Path, file: &Metadata) -> io::Result<Result<(), ReadError>> {
    let unsafe_path = |path: &Path| {
        let message = format!("others than root can change {}", path.display());
        Err(ReadError::Finding(Code::UnsafeOwner, message, "chown root:root, and chmod go-w"))
    };
    if is_writable_by_others(file) {
        return Ok(unsafe_path(path));
    }
    for directory in directories_of(path) {
        for directory in directory.ancestors() {
            let metadata = fs::metadata(directory)?;
            // In a sticky directory, as /tmp, others cannot replace what is root's, only add to it.
            let is_sticky = metadata.mode() & 0o1000 != 0 && metadata.uid() == 0;
            let holds_the_file = path.parent() == Some(directory);
            if is_writable_by_others(&metadata) && (holds_the_file || !is_sticky) {
                return Ok(unsafe_path(directory));
            }
        }
    }
    Ok(Ok(()))
}

fn is_writable_by_others(metadata: &Metadata) -> bool {
    let mode = metadata.mode();
    metadata.uid() != 0 || mode & 0o002 != 0 || (mode & 0o020 != 0 && metadata.gid() != 0)
}
