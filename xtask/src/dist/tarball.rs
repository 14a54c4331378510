//! The tarball: the tree below one directory, as bytes that depend on the tree alone.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result};

use super::{VERSION, names};
use crate::process;

/// The directory that everything in it lies in.
pub fn top() -> String {
    format!("egress-agent-{VERSION}-x86_64-linux")
}

pub fn name() -> String {
    format!("{}.tar.gz", top())
}

/// Packs a tree below a directory of this name, compressed.
pub fn pack(tree: &Path, file: &Path, top: &str, epoch: &str) -> Result<()> {
    let parent = tree.parent().context("the tree lies in a directory")?;
    let own = tree.file_name().context("the tree has a name")?.to_string_lossy();
    let mut tar = tar(file, epoch);
    tar.arg("--use-compress-program=gzip --best --no-name")
        .arg(format!("--transform=s,^{own},{top},"))
        .arg("--directory")
        .arg(parent)
        .arg(&*own);
    process::run(&mut tar, "packing the tarball")
}

/// Packs what is in a tree, uncompressed.
pub fn pack_contents(tree: &Path, file: &Path, epoch: &str) -> Result<()> {
    let mut tar = tar(file, epoch);
    tar.arg("--directory").arg(tree).args(names(tree)?);
    process::run(&mut tar, "packing an archive")
}

/// GNU tar that packs sorted, of root, everything readable by all and writable by nobody else, as old as `epoch` says.
fn tar(file: &Path, epoch: &str) -> Command {
    let mut tar = Command::new("tar");
    tar.args(["--create", "--format=gnu", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .arg("--mode=u=rwX,go=rX")
        .arg(format!("--mtime=@{epoch}"))
        .arg("--file")
        .arg(file)
        .env("LC_ALL", "C");
    tar
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn the_same_tree_gives_the_same_bytes_whenever_and_with_whatever_mask_it_was_made() {
        let directory = tempfile::tempdir().unwrap();
        let pack_files = |tree: &str, names: [&str; 2], mode: u32| {
            let tree = directory.path().join(tree);
            fs::create_dir(&tree).unwrap();
            for name in names {
                fs::write(tree.join(name), name).unwrap();
                fs::set_permissions(tree.join(name), fs::Permissions::from_mode(mode)).unwrap();
            }
            let file = tree.with_extension("tar.gz");
            pack(&tree, &file, "top-1", "1000000000").unwrap();
            file
        };
        let (one, other) = (pack_files("one", ["b", "a"], 0o664), pack_files("other", ["a", "b"], 0o600));
        assert_eq!(fs::read(&one).unwrap(), fs::read(other).unwrap());
        let mut tar = Command::new("tar");
        tar.args(["--list", "--verbose", "--numeric-owner", "--utc", "--file"]).arg(one).env("LC_ALL", "C");
        let listed = process::capture(&mut tar, "listing").unwrap();
        let lines: Vec<Vec<&str>> = listed.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[1], ["-rw-r--r--", "0/0", "1", "2001-09-09", "01:46", "top-1/a"]);
        let names: Vec<&str> = lines.iter().map(|line| line[5]).collect();
        assert_eq!(names, ["top-1/", "top-1/a", "top-1/b"]);
    }
}
