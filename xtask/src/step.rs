//! Work that is done once: a directory with a stamp that says by which recipe it was made.
//!
//! Not a build system: a step does not look at its inputs. Whoever changes what a step does changes its recipe.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::workspace::Workspace;

const STAMP: &str = ".done";

/// Makes `directory` with `work`, unless it was finished by the same recipe before. What an interrupted or older run
/// left is removed first.
pub fn once(directory: &Path, recipe: &str, work: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if is_done(directory, recipe) {
        return Ok(());
    }
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot remove {}", directory.display()))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot create {}", directory.display()))?;
    work(directory)?;
    let stamp = directory.join(STAMP);
    fs::write(&stamp, recipe).with_context(|| format!("cannot write {}", stamp.display()))
}

pub fn is_done(directory: &Path, recipe: &str) -> bool {
    fs::read_to_string(directory.join(STAMP)).is_ok_and(|stamp| stamp == recipe)
}

/// Keeps other xtasks of this workspace from working on the same steps until the file is dropped.
pub fn lock(workspace: &Workspace) -> Result<File> {
    let path: PathBuf = workspace.target(".xtask-lock");
    let file = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(TryLockError::WouldBlock) => eprintln!("xtask: waiting for another xtask in this workspace"),
        Err(TryLockError::Error(error)) => return Err(error).context(format!("cannot lock {}", path.display())),
    }
    file.lock().with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finished_step_is_not_repeated() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("step");
        once(&directory, "1", |made| Ok(fs::write(made.join("file"), "")?)).unwrap();
        once(&directory, "1", |_| panic!("repeated")).unwrap();
        assert!(directory.join("file").exists());
    }

    #[test]
    fn an_interrupted_step_starts_from_an_empty_directory() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("step");
        let interrupted = once(&directory, "1", |made| {
            fs::write(made.join("half"), "")?;
            anyhow::bail!("interrupted")
        });
        assert!(interrupted.is_err() && !is_done(&directory, "1"));
        once(&directory, "1", |made| {
            assert!(!made.join("half").exists());
            Ok(())
        })
        .unwrap();
        assert!(is_done(&directory, "1"));
    }

    #[test]
    fn another_recipe_makes_the_directory_anew() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("step");
        once(&directory, "1", |made| Ok(fs::write(made.join("old"), "")?)).unwrap();
        once(&directory, "2", |_| Ok(())).unwrap();
        assert!(!directory.join("old").exists() && is_done(&directory, "2"));
    }
}
