//! `cargo xtask test`: build, then every test of the workspace except on the BPF target, where none can run.
//!
//! Tests are compiled as the user and run as root, since a kernel test loads programs and makes namespaces.

use std::{
    ffi::{OsStr, OsString},
    time::Instant,
};

use anyhow::{Context as _, Result};

use crate::{
    build, chart, companions, process,
    root::{self, Environment},
    vm,
    workspace::Workspace,
};

pub fn test(workspace: &Workspace, arguments: &[OsString]) -> Result<()> {
    root::ensure("testing with the kernel")?;
    let mut phases = Phases::default();
    let (toolchain, environment) =
        phases.time("setup", || Ok((build::toolchain(workspace)?, environment(workspace)?)))?;
    phases.time("build", || build::build_with(workspace, &toolchain))?;
    let (selection, rest) = split(arguments);
    phases.time("compile tests", || compile(workspace, selection))?;
    let tested = phases.time("run tests", || run(workspace, &environment, selection, rest));
    // Some tests alone are for the running kernel.
    let elsewhere =
        if arguments.is_empty() { phases.time("another kernel", || vm::ordinary(workspace)) } else { Ok(()) };
    phases.report();
    tested.and(elsewhere)
}

/// The tests that cargo's arguments select, with those that follow for the test programs.
pub fn some(workspace: &Workspace, environment: &Environment, selection: &[OsString], rest: &[OsString]) -> Result<()> {
    compile(workspace, selection)?;
    run(workspace, environment, selection, rest)
}

/// The variables that lead tests to what they run.
fn environment(workspace: &Workspace) -> Result<Environment> {
    let mut environment = companions::ensure(workspace)?;
    environment.push(("EGRESS_HELM", chart::ensure(workspace)?.into()));
    Ok(environment)
}

/// Compiles the tests that cargo's arguments select, with the features that all of them have.
pub fn compile(workspace: &Workspace, selection: &[OsString]) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["test", "--no-run"]).args(packages(selection)).args(selection);
    process::run(&mut cargo, "compiling the tests")
}

fn run(workspace: &Workspace, environment: &Environment, selection: &[OsString], rest: &[OsString]) -> Result<()> {
    let words = ["test", "--no-fail-fast"].iter().chain(packages(selection)).map(OsString::from);
    let words: Vec<_> = words.chain(selection.iter().cloned()).chain(rest.iter().cloned()).collect();
    cargo(workspace, environment, &words, "testing")
}

/// Cargo, with what it starts as root.
pub fn cargo(workspace: &Workspace, environment: &Environment, words: &[OsString], work: &str) -> Result<()> {
    let mut cargo = workspace.cargo();
    if root::is_root() {
        cargo.envs(environment.iter().map(|(name, value)| (name, value)));
    } else {
        cargo.arg("--config").arg(runner(&root::sudo(environment))?);
    }
    process::run(cargo.args(words), work)
}

/// Cargo's own arguments, and from `--` on those of the test programs.
fn split(arguments: &[OsString]) -> (&[OsString], &[OsString]) {
    let end = arguments.iter().position(|argument| argument == "--").unwrap_or(arguments.len());
    arguments.split_at(end)
}

/// The whole workspace, unless the arguments name packages.
fn packages(selection: &[OsString]) -> &'static [&'static str] {
    if selection.iter().any(|argument| names_a_package(argument)) {
        &[]
    } else {
        &["--workspace", "--exclude", "egress-ebpf"]
    }
}

fn names_a_package(argument: &OsStr) -> bool {
    let argument = argument.to_string_lossy();
    argument.starts_with("-p") || argument == "--package" || argument.starts_with("--package=")
}

/// The setting that makes cargo start each test program with `line` before it.
fn runner(line: &[OsString]) -> Result<String> {
    let words = line.iter().map(|word| Ok(quote(word.to_str().context("a path is not UTF-8")?)));
    Ok(format!("target.'cfg(unix)'.runner=[{}]", words.collect::<Result<Vec<_>>>()?.join(",")))
}

/// A basic string of TOML.
fn quote(word: &str) -> String {
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// What took how long.
#[derive(Default)]
struct Phases(Vec<(&'static str, f64)>);

impl Phases {
    fn time<T>(&mut self, name: &'static str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        let result = work();
        self.0.push((name, start.elapsed().as_secs_f64()));
        result
    }

    fn report(&self) {
        let phases: Vec<_> = self.0.iter().map(|(name, seconds)| format!("{name} {seconds:.1} s")).collect();
        eprintln!("xtask: {}", phases.join(", "));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        line.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_whole_workspace_is_tested_unless_a_package_is_named() {
        assert_eq!(packages(&words("some_name")), ["--workspace", "--exclude", "egress-ebpf"]);
        for named in ["-p egress-tests", "-pegress-tests", "--package egress-tests", "--package=egress-tests"] {
            assert!(packages(&words(named)).is_empty(), "{named}");
        }
    }

    #[test]
    fn arguments_of_the_test_programs_follow_two_dashes() {
        let arguments = words("-p xtask -- --nocapture");
        assert_eq!(split(&arguments), (&words("-p xtask")[..], &words("-- --nocapture")[..]));
    }

    #[test]
    fn the_runner_is_one_setting_with_quoted_words() {
        let line = ["sudo", "env", "PATH=/a \"b\"\\c"].map(OsString::from);
        assert_eq!(runner(&line).unwrap(), r#"target.'cfg(unix)'.runner=["sudo","env","PATH=/a \"b\"\\c"]"#);
    }
}
