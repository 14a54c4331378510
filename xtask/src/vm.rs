//! `cargo xtask vm`: the tests of the kernel programs under kernels of distributions, in QEMU.
//!
//! Everything is fetched below `target/vm` and nothing is installed: QEMU, a busybox, and the kernels' packages, whose signatures
//! apt checks. The root file system is an initramfs with the agent, the test programs and what those need, all of it at the
//! path that it has on this machine. Without hardware virtualisation a kernel boots in some seconds all the same.
//!
//! Tests that need systemd run in a machine of their own, whose first process is a systemd of Debian's.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{build, companions, debian::Debian, dist, root, step, test, workspace::Workspace};

mod image;
mod machine;
mod report;

use image::{Image, Tests};
use machine::Machine;
use report::Outcome;

/// What to run, and under which kernels.
#[derive(clap::Args)]
pub struct Options {
    /// Kernels, such as 5.10: those of --list
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Only this file of the tests, instead of all of --list; can be given again
    #[arg(long = "test", value_name = "FILE")]
    tests: Vec<String>,
    /// Say which kernels and test files there are, and do nothing else
    #[arg(long)]
    list: bool,
    /// Arguments for the test programs, such as the name of a test
    #[arg(last = true, value_name = "ARGS")]
    arguments: Vec<OsString>,
}

/// A kernel of Debian.
struct Kernel {
    /// As it is called here.
    name: &'static str,
    suite: &'static str,
    /// Whether the suite is one of security updates, which lie elsewhere on a mirror.
    is_security: bool,
    /// The release whose systemd runs on it: the kernel's own, if a mirror still has it.
    systemd: &'static str,
}

const KERNELS: [Kernel; 4] = [
    Kernel { name: "5.10", suite: "bullseye-security", is_security: true, systemd: "bookworm" },
    Kernel { name: "6.1", suite: "bookworm", is_security: false, systemd: "bookworm" },
    Kernel { name: "6.12", suite: "trixie", is_security: false, systemd: "trixie" },
    Kernel { name: "7.3", suite: "trixie-backports", is_security: false, systemd: "trixie" },
];

/// What the ordinary test command runs: a kernel that is common and unlike today's, and what finds most there.
const ORDINARY: (&str, &[&str]) = ("6.1", &["sockets", "escape"]);

/// Test files that need nothing which is not in the image.
const TESTS: [&str; 15] = [
    "features",
    "kernel",
    "sockets",
    "peers",
    "escape",
    "existing",
    "start",
    "pinned",
    "reload",
    "workloads",
    "exec",
    "beside",
    "learning",
    "queries",
    "systemd",
];

/// Those of them that need systemd as the first process.
const WITH_SYSTEMD: [&str; 1] = ["systemd"];

/// How long one test file may take.
const PATIENCE: Duration = Duration::from_mins(6);

/// Runs the tests under these kernels, or under all of them. If each has run them at some time, it writes `docs/kernels.md`.
pub fn vm(workspace: &Workspace, options: &Options) -> Result<()> {
    if options.list {
        return list();
    }
    let kernels = select(&options.kernels, &KERNELS, |kernel| kernel.name, "kernel")?;
    let tests = select(&options.tests, &TESTS, |test| test, "test file")?;
    let tests: Vec<&str> = tests.into_iter().copied().collect();
    prepare(workspace, &tests)?;
    let is_all = options.tests.is_empty() && options.arguments.is_empty();
    let mut outcomes = BTreeMap::new();
    for kernel in &kernels {
        let log = if is_all { kernel.name.to_owned() } else { format!("{}-some", kernel.name) };
        let wanted = Wanted { files: &tests, arguments: &options.arguments, ..Wanted::default() };
        outcomes.insert(kernel.name, kernel.test(workspace, &log, &wanted)?);
    }
    if is_all {
        report(workspace)?;
    }
    conclude(&outcomes)
}

/// One kernel, for the ordinary test command. The agent and the tests are built already.
pub fn ordinary(workspace: &Workspace) -> Result<()> {
    let (name, files) = ORDINARY;
    let kernel = KERNELS.iter().find(|kernel| kernel.name == name).context("it is one of the kernels")?;
    let wanted = Wanted { files, ..Wanted::default() };
    conclude(&BTreeMap::from([(name, kernel.test(workspace, "ordinary", &wanted)?)]))
}

/// Runs the soak for so many minutes under these kernels.
pub fn soak(workspace: &Workspace, kernels: &[String], minutes: u64) -> Result<()> {
    const FILES: [&str; 1] = ["soak"];
    let kernels = select(kernels, &KERNELS, |kernel| kernel.name, "kernel")?;
    prepare(workspace, &FILES)?;
    let wanted = Wanted {
        files: &FILES,
        arguments: &["--nocapture".into()],
        variables: &[("EGRESS_SOAK_MINUTES", minutes.to_string().into())],
        // It sets up and ends in minutes of its own.
        patience: Duration::from_mins(minutes) + PATIENCE,
    };
    let mut outcomes = BTreeMap::new();
    for kernel in kernels {
        let log = format!("{}-soak", kernel.name);
        outcomes.insert(kernel.name, kernel.test(workspace, &log, &wanted)?);
        eprintln!("{}", soak_table(&Init::Plain.log(workspace, &log))?);
    }
    conclude(&outcomes)
}

/// The lines of the console between those that begin and end a test file.
fn soak_table(log: &Path) -> Result<String> {
    let bytes = std::fs::read(log).with_context(|| format!("cannot read {}", log.display()))?;
    let text = String::from_utf8_lossy(&bytes);
    let lines =
        text.lines().skip_while(|line| !line.starts_with("=== RUN")).take_while(|line| !line.starts_with("=== EXIT"));
    Ok(lines.collect::<Vec<_>>().join("\n"))
}

#[expect(clippy::unnecessary_wraps, reason = "it is a command like the others")]
fn list() -> Result<()> {
    println!("kernels: {}", KERNELS.map(|kernel| kernel.name).join(", "));
    println!("tests: {}", TESTS.join(", "));
    Ok(())
}

/// Those of all that are named, or all.
fn select<'a, T>(names: &[String], all: &'a [T], name_of: fn(&T) -> &str, what: &str) -> Result<Vec<&'a T>> {
    let find = |name: &String| {
        let known = || all.iter().map(name_of).collect::<Vec<_>>().join(", ");
        all.iter().find(|one| name_of(one) == name).with_context(|| format!("no {what} {name}: there are {}", known()))
    };
    if names.is_empty() { Ok(all.iter().collect()) } else { names.iter().map(find).collect() }
}

/// Builds what runs in the machine. Where there is systemd, the Debian package is installed.
fn prepare(workspace: &Workspace, tests: &[&'static str]) -> Result<()> {
    root::ensure("reading what the tests left behind")?;
    companions::ensure(workspace)?;
    build::build(workspace)?;
    if !Init::Systemd.select(tests).is_empty() {
        dist::dist(workspace)?;
    }
    let selection: Vec<OsString> = tests.iter().flat_map(|test| ["--test", test]).map(OsString::from).collect();
    test::compile(workspace, &selection)
}

/// Writes the documentation, once all kernels have run.
fn report(workspace: &Workspace) -> Result<()> {
    let mut outcomes = Vec::new();
    for kernel in &KERNELS {
        let logs = [Init::Plain, Init::Systemd].map(|init| init.log(workspace, kernel.name));
        let read = |log: &PathBuf| if log.exists() { Outcome::read(log) } else { Ok(Outcome::default()) };
        let outcome = Outcome::joined(logs.iter().map(read).collect::<Result<_>>()?);
        if !outcome.is_complete() {
            eprintln!("xtask: docs/kernels.md stays as it is until Linux {} has run to its end, too", kernel.name);
            return Ok(());
        }
        outcomes.push((kernel.name, outcome));
    }
    report::write(workspace, &TESTS, &outcomes)
}

fn conclude(outcomes: &BTreeMap<&str, Outcome>) -> Result<()> {
    let failed: Vec<&str> = outcomes.iter().filter(|(_, outcome)| !outcome.is_good()).map(|(name, _)| *name).collect();
    if failed.is_empty() { Ok(()) } else { bail!("tests fail under {}", failed.join(", ")) }
}

/// What to run under a kernel.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    files: &'a [&'static str],
    /// For each test program.
    arguments: &'a [OsString],
    variables: &'a [(&'static str, OsString)],
    /// How long one test file may take.
    patience: Duration,
}

impl Default for Wanted<'_> {
    fn default() -> Self {
        Self { files: &[], arguments: &[], variables: &[], patience: PATIENCE }
    }
}

/// What a machine has as its first process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Init {
    /// A script.
    Plain,
    Systemd,
}

impl Init {
    /// Those of the test files that want this one.
    fn select(self, files: &[&'static str]) -> Vec<&'static str> {
        let is_wanted = |file: &&&str| WITH_SYSTEMD.contains(file) == (self == Self::Systemd);
        files.iter().filter(is_wanted).copied().collect()
    }

    /// Where what the tests print is kept.
    fn log(self, workspace: &Workspace, name: &str) -> PathBuf {
        let suffix = if self == Self::Systemd { "-systemd" } else { "" };
        workspace.target("vm").join(format!("{name}{suffix}.log"))
    }
}

impl Kernel {
    /// Runs tests; what they print is kept under `log_name`.
    fn test(&self, workspace: &Workspace, log_name: &str, wanted: &Wanted<'_>) -> Result<Outcome> {
        ensure!(cfg!(target_arch = "x86_64"), "kernels are run on x86-64 only");
        let mut outcomes = Vec::new();
        for init in [Init::Plain, Init::Systemd] {
            let files = init.select(wanted.files);
            if !files.is_empty() {
                let Wanted { arguments, variables, patience, .. } = *wanted;
                let tests = Tests { files, are_ignored: init == Init::Systemd, arguments, variables, patience };
                outcomes.push(self.boot(workspace, init, &init.log(workspace, log_name), &tests)?);
            }
        }
        Ok(Outcome::joined(outcomes))
    }

    fn boot(&self, workspace: &Workspace, init: Init, log: &Path, tests: &Tests<'_>) -> Result<Outcome> {
        let lock = step::lock(workspace)?;
        let (qemu, busybox) = (fetch(workspace, "qemu-system-x86")?, fetch(workspace, "busybox-static")?);
        let kernel = self.fetch(workspace)?;
        let initramfs = log.with_extension("initramfs");
        let mut image = Image::new(workspace, &busybox, &kernel)?.with_tests(workspace, tests)?;
        if init == Init::Systemd {
            image = image.with_systemd(workspace, &fetch_systemd(workspace, self.systemd)?)?;
            let package = workspace.target("dist").join(dist::package::name());
            let older = log.with_extension("older.deb");
            dist::package::write_older(workspace, &package, &older)?;
            image = image.with_packages(&older, &package);
        }
        image.write(&initramfs)?;
        // The machine has its own copy of everything.
        drop(lock);
        eprintln!("xtask: booting Linux {} with {}", self.name, tests.files.join(", "));
        let start = Instant::now();
        let machine = Machine { qemu: &qemu, kernel: &kernel, initramfs: &initramfs, log, patience: tests.longest() };
        machine.run()?;
        let outcome = Outcome::read(log)?;
        let seconds = start.elapsed().as_secs();
        eprintln!("xtask: Linux {}: {outcome}, in {seconds} s; all of it is in {}", self.name, log.display());
        Ok(outcome)
    }

    /// The packages of the kernel, unpacked.
    fn fetch(&self, workspace: &Workspace) -> Result<PathBuf> {
        let directory = workspace.target("vm").join(self.name);
        step::once(&directory, "kernel 1", |directory| {
            let archive = Debian::mirror(if self.is_security { "debian-security" } else { "debian" })?;
            let debian = Debian::suite(&directory.join("apt"), &archive, self.suite)?;
            let image = debian.depends("linux-image-cloud-amd64")?;
            let image =
                image.into_iter().find(|name| name.starts_with("linux-image-")).context("it depends on an image")?;
            // From 7.0 on that one is split.
            let parts = debian.depends(&image)?;
            let is_part = |name: &&String| name.starts_with("linux-binary-") || name.starts_with("linux-modules-");
            let names: Vec<&str> =
                [&image].into_iter().chain(parts.iter().filter(is_part)).map(String::as_str).collect();
            debian.unpack(&debian.archives(&names)?, directory)
        })
        .with_context(|| format!("cannot fetch Linux {}", self.name))?;
        Ok(directory)
    }
}

/// A package with what it needs beyond what the system has, unpacked.
fn fetch(workspace: &Workspace, package: &str) -> Result<PathBuf> {
    let directory = workspace.target("vm").join(package);
    step::once(&directory, "1", |directory| {
        let debian = Debian::open(workspace)?;
        debian.unpack(&debian.plan(&[package], &[package])?, directory)
    })
    .with_context(|| format!("cannot fetch {package}"))?;
    Ok(directory)
}

/// The systemd of a release, unpacked, with everything that it needs, the library with which it carries out settings by BPF, and
/// what installs packages.
fn fetch_systemd(workspace: &Workspace, suite: &str) -> Result<PathBuf> {
    let directory = workspace.target("vm").join(format!("systemd-{suite}"));
    step::once(&directory, "4", |directory| {
        let debian = Debian::suite(&directory.join("apt"), &Debian::mirror("debian")?, suite)?;
        debian.unpack(
            &debian.plan(&[], &["systemd", "libbpf1", "dpkg", "init-system-helpers", "libc-bin", "perl-base"])?,
            &directory.join("root"),
        )
    })
    .with_context(|| format!("cannot fetch the systemd of {suite}"))?;
    Ok(directory.join("root"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_name() {
        let names = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
            let kernels = select(&names, &KERNELS, |kernel| kernel.name, "kernel");
            kernels.map(|kernels| kernels.iter().map(|kernel| kernel.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), KERNELS.len());
        assert_eq!(names(&["6.12", "5.10"]).unwrap(), ["6.12", "5.10"]);
        assert!(names(&["4.19"]).unwrap_err().to_string().contains("no kernel 4.19: there are 5.10, 6.1"));
    }

    #[test]
    fn the_ordinary_tests_are_some_of_all() {
        assert!(ORDINARY.1.iter().all(|test| TESTS.contains(test)));
        assert!(KERNELS.iter().any(|kernel| kernel.name == ORDINARY.0));
    }

    #[test]
    fn each_test_file_runs_in_one_kind_of_machine() {
        assert_eq!(Init::Systemd.select(&TESTS), WITH_SYSTEMD);
        assert_eq!(Init::Plain.select(&TESTS).len(), TESTS.len() - WITH_SYSTEMD.len());
    }
}
