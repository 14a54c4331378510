//! Flags, the environment and a file of settings, as `run` of the built agent takes them.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
    path::Path,
    process::Command,
};

use egress_tests::{
    agent::{Agent, binary},
    cgroup::Cgroup,
};
use tempfile::TempDir;

/// A file of settings, and an empty policy directory that it names.
struct Settings {
    directory: TempDir,
}

impl Settings {
    fn new(more: &str) -> Self {
        let settings = Self { directory: tempfile::tempdir().unwrap() };
        fs::create_dir(settings.policies()).unwrap();
        let text = format!("policies: {}\noutput: json\n{more}", settings.policies().display());
        fs::write(settings.file(), text).unwrap();
        settings
    }

    fn policies(&self) -> std::path::PathBuf {
        self.directory.path().join("policies")
    }

    fn file(&self) -> std::path::PathBuf {
        self.directory.path().join("agent.yaml")
    }

    /// `run` with the file, some variables and some flags.
    fn run(&self, variables: &[(&str, &str)], flags: &[&str]) -> Command {
        let mut command = Command::new(binary().unwrap());
        command.arg("run").args(flags).env("EGRESS_CONFIG", self.file()).envs(variables.iter().copied());
        command
    }
}

/// What a command that ends by itself says, with its exit status.
fn ends(mut command: Command, status: i32) -> String {
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{said}");
    assert!(output.stdout.is_empty(), "{:?}", output.stdout);
    said
}

#[track_caller]
fn says(command: Command, status: i32, words: &str) {
    let said = ends(command, status);
    assert!(said.contains(words), "{words:?} in\n{said}");
}

#[test]
fn a_file_is_all_an_agent_needs() {
    let cgroup = Cgroup::new().unwrap();
    let settings = Settings::new(&format!("cgroup: {}\n", cgroup.path().display()));
    let mut agent = Agent::spawn(settings.run(&[], &[])).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    agent.stop().unwrap();
}

#[test]
fn flags_are_stronger_than_the_environment_and_that_than_the_file() {
    let settings = Settings::new("cgroup: /no/file\n");
    let variable = [("EGRESS_CGROUP", "/no/variable")];
    says(settings.run(&[], &[]), 2, "there is no cgroup /no/file:");
    says(settings.run(&variable, &[]), 2, "there is no cgroup /no/variable:");
    says(settings.run(&variable, &["--cgroup", "/no/flag"]), 2, "there is no cgroup /no/flag:");
}

#[test]
fn a_switch_in_the_environment_is_on_or_off_and_nothing_else() {
    let settings = Settings::new("cgroup: /no/cgroup\nallow-writable-policies: true\n");
    fs::write(settings.policies().join("a.yaml"), "").unwrap();
    fs::set_permissions(settings.policies(), Permissions::from_mode(0o777)).unwrap();
    let with = |value| settings.run(&[("EGRESS_ALLOW_WRITABLE_POLICIES", value)], &[]);
    for on in ["true", "1", "yes", "ON"] {
        says(with(on), 2, "there is no cgroup");
    }
    for off in ["false", "0", "no", "Off"] {
        says(with(off), 1, "others than root");
    }
    for neither in ["flase", "", "2"] {
        says(with(neither), 2, "--allow-writable-policies");
    }
    // The file alone.
    says(settings.run(&[], &[]), 2, "there is no cgroup");
}

#[test]
fn several_paths_in_one_variable_are_separated_and_in_a_flag_they_are_one() {
    let settings = Settings::new("cgroup: /no/cgroup\n");
    let policies = settings.policies().display().to_string();
    let with = |paths: &str, flags: &[&str]| settings.run(&[("EGRESS_POLICIES", paths)], flags);
    says(with(&format!("{policies}:/no/policies:"), &[]), 1, "cannot read /no/policies:");
    says(with(&format!(":{policies}"), &[]), 2, "there is no cgroup");
    says(with(":", &[]), 2, "--policies <PATH>");
    says(with("/none", &["--policies", "/no:policies"]), 1, "cannot read /no:policies");
}

#[test]
fn a_mistake_in_the_file_is_a_usage_error_that_names_its_place() {
    let settings = Settings::new("cgruop: /a\n");
    let file = settings.file().display().to_string();
    says(
        settings.run(&[], &[]),
        2,
        &format!("error: {file}:3:1: cgruop: unknown setting `cgruop`; did you mean `cgroup`?"),
    );
    fs::set_permissions(settings.file(), Permissions::from_mode(0o664)).unwrap();
    std::os::unix::fs::chown(settings.file(), None, Some(65_534)).unwrap();
    says(settings.run(&[], &[]), 2, &format!("cannot use {file}: others than root can change"));
    let missing = settings.run(&[], &["--config", "/no/agent.yaml"]);
    says(missing, 2, "error: cannot read /no/agent.yaml: No such file");
    // Commands that do not run an agent do not care.
    let mut check = Command::new(binary().unwrap());
    check.arg("check").arg(Path::new("/dev/null")).env("EGRESS_CONFIG", settings.file());
    assert!(check.output().unwrap().status.success());
}
