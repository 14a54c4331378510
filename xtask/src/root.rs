//! Running something as root: directly, or through sudo when the user is not root.
//!
//! Only what needs the kernel's consent goes through here; builds always belong to the user.

use std::{
    env,
    ffi::{OsStr, OsString},
    process::Command,
};

use anyhow::{Result, bail};

use crate::process;

/// Variables that a child gets besides those it inherits.
pub type Environment = Vec<(&'static str, OsString)>;

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Asks for the password before long work, so that nobody waits for a prompt in its middle.
pub fn ensure(work: &str) -> Result<()> {
    if is_root() {
        return Ok(());
    }
    if process::find("sudo").is_none() {
        bail!("{work} needs root and there is no sudo: run this as root or install sudo");
    }
    process::run(Command::new("sudo").arg("--validate"), &format!("{work} needs root, and sudo"))
}

/// `program` as root with `environment`.
pub fn command(program: &OsStr, environment: &Environment) -> Command {
    if is_root() {
        let mut command = Command::new(program);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        return command;
    }
    let mut line = sudo(environment).into_iter();
    let mut command = Command::new(line.next().expect("the line starts with sudo"));
    command.args(line).arg(program);
    command
}

/// The words before a program's name that make it run as root with `environment`; sudo itself would drop both that
/// and PATH.
pub fn sudo(environment: &Environment) -> Vec<OsString> {
    let path = environment.iter().find(|(name, _)| *name == "PATH").map(|(_, value)| value.clone());
    let path = path.or_else(|| env::var_os("PATH")).unwrap_or_default();
    let others = environment.iter().filter(|(name, _)| *name != "PATH");
    let variables = others.map(|(name, value)| assignment(name, value)).chain([assignment("PATH", &path)]);
    let preserve = "--preserve-env=CARGO_MANIFEST_DIR,RUST_BACKTRACE,RUST_LOG,CI";
    ["sudo", preserve, "env"].map(OsString::from).into_iter().chain(variables).collect()
}

fn assignment(name: &str, value: &OsStr) -> OsString {
    let mut word = OsString::from(format!("{name}="));
    word.push(value);
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sudo_carries_the_environment_and_one_path() {
        let environment = vec![("EGRESS_AGENT", "/w/agent".into()), ("PATH", "/w/bin:/bin".into())];
        let line = sudo(&environment);
        assert_eq!(line[0], "sudo");
        assert_eq!(line[2..], ["env", "EGRESS_AGENT=/w/agent", "PATH=/w/bin:/bin"].map(OsString::from));
    }
}
