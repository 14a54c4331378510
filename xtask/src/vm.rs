//! `cargo xtask vm`: the tests of the kernel programs under kernels of distributions, in QEMU.
//!
//! Everything is fetched below `target/vm` and nothing is installed: QEMU, a busybox, and the kernels' packages, whose signatures
//! apt checks. The root file system is an initramfs with the agent, the test programs and what those need, all of it at the
//! path that it has on this machine. Without hardware virtualisation a kernel boots in some seconds all the same.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{build, companions, debian::Debian, process, root, step, workspace::Workspace};

mod image;
mod report;

use image::Image;
use report::Outcome;

/// A kernel of Debian.
struct Kernel {
    /// As it is called here.
    name: &'static str,
    suite: &'static str,
    /// Whether the suite is one of security updates, which lie elsewhere on a mirror.
    is_security: bool,
}

const KERNELS: [Kernel; 4] = [
    Kernel { name: "5.10", suite: "bullseye-security", is_security: true },
    Kernel { name: "6.1", suite: "bookworm", is_security: false },
    Kernel { name: "6.12", suite: "trixie", is_security: false },
    Kernel { name: "7.3", suite: "trixie-backports", is_security: false },
];

/// What the ordinary test command runs: a kernel that is common and unlike today's, and what finds most there.
const ORDINARY: (&str, &[&str]) = ("6.1", &["sockets", "escape"]);

/// Test files that need nothing which is not in the image.
const TESTS: [&str; 5] = ["kernel", "sockets", "escape", "existing", "start"];

/// How long a kernel may take for all of it.
const PATIENCE: Duration = Duration::from_mins(15);

/// Runs the tests under these kernels, or under all of them. If each has run them at some time, it writes `docs/kernels.md`.
pub fn vm(workspace: &Workspace, names: &[OsString]) -> Result<()> {
    let kernels = select(names)?;
    prepare(workspace)?;
    let mut outcomes = BTreeMap::new();
    for kernel in &kernels {
        outcomes.insert(kernel.name, kernel.test(workspace, kernel.name, &TESTS)?);
    }
    let last = KERNELS.iter().map(|kernel| Ok((kernel.name, Outcome::read(&log(workspace, kernel.name))?)));
    if let Ok(last) = last.collect::<Result<Vec<_>>>() {
        report::write(workspace, &TESTS, &last)?;
    }
    conclude(&outcomes)
}

/// One kernel, for the ordinary test command. The agent and the tests are built already.
pub fn ordinary(workspace: &Workspace) -> Result<()> {
    let (name, tests) = ORDINARY;
    let kernel = KERNELS.iter().find(|kernel| kernel.name == name).context("it is one of the kernels")?;
    conclude(&BTreeMap::from([(name, kernel.test(workspace, "ordinary", tests)?)]))
}

fn select(names: &[OsString]) -> Result<Vec<&'static Kernel>> {
    let known = || KERNELS.map(|kernel| kernel.name).join(", ");
    let find = |name: &OsString| {
        let found = KERNELS.iter().find(|kernel| name == kernel.name);
        found.with_context(|| format!("no kernel {}: there are {}", name.display(), known()))
    };
    if names.is_empty() { Ok(KERNELS.iter().collect()) } else { names.iter().map(find).collect() }
}

/// Builds what runs in the machine.
fn prepare(workspace: &Workspace) -> Result<()> {
    root::ensure("reading what the tests left behind")?;
    companions::ensure(workspace)?;
    build::build(workspace)?;
    let mut cargo = workspace.cargo();
    process::run(cargo.args(["test", "--no-run", "--package", "egress-tests"]), "compiling the tests")
}

fn conclude(outcomes: &BTreeMap<&str, Outcome>) -> Result<()> {
    let failed: Vec<&str> = outcomes.iter().filter(|(_, outcome)| !outcome.is_good()).map(|(name, _)| *name).collect();
    if failed.is_empty() { Ok(()) } else { bail!("tests fail under {}", failed.join(", ")) }
}

impl Kernel {
    /// Runs tests; what they print is kept under `log_name`.
    fn test(&self, workspace: &Workspace, log_name: &str, tests: &[&str]) -> Result<Outcome> {
        ensure!(cfg!(target_arch = "x86_64"), "kernels are run on x86-64 only");
        let _lock = step::lock(workspace)?;
        let (qemu, busybox) = (fetch(workspace, "qemu-system-x86")?, fetch(workspace, "busybox-static")?);
        let kernel = self.fetch(workspace)?;
        let image = workspace.target("vm").join(format!("{log_name}.initramfs"));
        Image::new(workspace, &busybox, &kernel)?.with_tests(workspace, tests)?.write(&image)?;
        eprintln!("xtask: booting Linux {} with {}", self.name, tests.join(", "));
        let log = log(workspace, log_name);
        boot(&qemu, &kernel, &image, &log)?;
        let outcome = Outcome::read(&log)?;
        eprintln!("xtask: Linux {}: {outcome}; all of it is in {}", self.name, log.display());
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

/// Where what the tests print is kept.
fn log(workspace: &Workspace, name: &str) -> PathBuf {
    workspace.target("vm").join(format!("{name}.log"))
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

/// Runs a kernel until it powers off.
fn boot(qemu: &Path, kernel: &Path, image: &Path, log: &Path) -> Result<()> {
    let vmlinuz = image::find(kernel, |name| name.starts_with("vmlinuz-")).context("the packages have no kernel")?;
    let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|path| qemu.join(path));
    let mut command = Command::new(qemu.join("usr/bin/qemu-system-x86_64"));
    command.env("LD_LIBRARY_PATH", std::env::join_paths(libraries)?);
    for data in ["usr/share/qemu", "usr/share/seabios"] {
        command.arg("-L").arg(qemu.join(data));
    }
    command.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-serial", "stdio"]);
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"]);
    command.arg("-kernel").arg(vmlinuz).arg("-initrd").arg(image);
    command.args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1"]);
    let output = fs::File::create(log).with_context(|| format!("cannot create {}", log.display()))?;
    command.stdin(Stdio::null()).stdout(output);
    let mut machine = command.spawn().context("cannot start QEMU")?;
    let end = std::time::Instant::now() + PATIENCE;
    while machine.try_wait().context("cannot wait for QEMU")?.is_none() {
        if std::time::Instant::now() > end {
            machine.kill().and_then(|()| machine.wait()).context("cannot end QEMU")?;
            bail!(
                "the machine did not come to an end within {} minutes: see {}",
                PATIENCE.as_secs() / 60,
                log.display()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_chosen_by_name() {
        let names = |names: &[&str]| {
            let names: Vec<OsString> = names.iter().map(OsString::from).collect();
            select(&names).map(|kernels| kernels.iter().map(|kernel| kernel.name).collect::<Vec<_>>())
        };
        assert_eq!(names(&[]).unwrap().len(), KERNELS.len());
        assert_eq!(names(&["6.12", "5.10"]).unwrap(), ["6.12", "5.10"]);
        assert!(names(&["4.19"]).unwrap_err().to_string().contains("there are 5.10, 6.1"));
    }

    #[test]
    fn the_ordinary_tests_are_some_of_all() {
        assert!(ORDINARY.1.iter().all(|test| TESTS.contains(test)));
        assert!(KERNELS.iter().any(|kernel| kernel.name == ORDINARY.0));
    }
}
