//! Starting other programs: each failure becomes one sentence that names the work, not the command line.

use std::{
    env,
    ffi::OsStr,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result, bail};

/// Runs `command` with its output shown; `work` completes the sentence "… failed".
pub fn run(command: &mut Command, work: &str) -> Result<()> {
    check(command.status(), command, work)
}

/// Runs `command`, whose standard output is talk and not data.
pub fn run_to_stderr(command: &mut Command, work: &str) -> Result<()> {
    run(command.stdin(Stdio::null()).stdout(io::stderr()), work)
}

/// Runs `command` and returns what it printed on standard output.
pub fn capture(command: &mut Command, work: &str) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| cannot_start(command))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{work} failed ({}): {}", output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{work}: the output is not UTF-8"))
}

/// The program called `name` on PATH.
pub fn find(name: &str) -> Option<PathBuf> {
    find_in(name, &env::var_os("PATH")?)
}

fn find_in(name: &str, path: &OsStr) -> Option<PathBuf> {
    env::split_paths(path).map(|directory| directory.join(name)).find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    file.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

fn check(status: io::Result<ExitStatus>, command: &Command, work: &str) -> Result<()> {
    let status = status.with_context(|| cannot_start(command))?;
    if !status.success() {
        bail!("{work} failed ({status})");
    }
    Ok(())
}

fn cannot_start(command: &Command) -> String {
    format!("cannot start {}", command.get_program().display())
}

/// Writes a program that is a script, and makes the directory that it lies in.
pub fn write_script(script: &Path, text: &str) -> Result<()> {
    let directory = script.parent().context("a script lies in a directory")?;
    fs::create_dir_all(directory)
        .and_then(|()| fs::write(script, text))
        .and_then(|()| fs::set_permissions(script, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot write {}", script.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_work_and_what_the_program_said() {
        let error = capture(Command::new("sh").args(["-c", "echo no disk >&2; exit 3"]), "unpacking").unwrap_err();
        assert_eq!(error.to_string(), "unpacking failed (exit status: 3): no disk");
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&mut Command::new("/nowhere/tool"), "unpacking").unwrap_err();
        assert_eq!(error.to_string(), "cannot start /nowhere/tool");
    }

    #[test]
    fn only_an_executable_file_is_a_program() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("tool");
        fs::write(&file, "").unwrap();
        assert_eq!(find_in("tool", directory.path().as_os_str()), None);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find_in("tool", directory.path().as_os_str()), Some(file));
    }
}
