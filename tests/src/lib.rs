//! What the tests and the demo stand on: cgroups, network namespaces, the agent as a process, a database server, a
//! DNS server, and a slow, obvious reference for the decision.
//!
//! Nothing here is mocked. Everything that is created has a name of its own and is removed when its value is dropped,
//! also when a test fails. No packet leaves the machine: traffic stays in network namespaces made here.

#![expect(clippy::missing_panics_doc, reason = "a test that cannot go on may panic anywhere")]

pub mod actor;
pub mod agent;
pub mod alternation;
pub mod asker;
pub mod bpffs;
pub mod cgroup;
pub mod container;
pub mod dial;
pub mod dnsmasq;
pub mod escape;
pub mod fake_kube;
pub mod flood;
pub mod foreign;
pub mod fuzz_targets;
pub mod generate;
pub mod hammer;
pub mod kube;
pub mod mariadb;
pub mod netns;
pub mod pages;
pub mod reference;
pub mod resolving;
pub mod scenario;
pub mod soak;
pub mod world;

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

/// A name that no other test of this or another process uses.
pub fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("egress-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Where `cargo xtask` put the companions it unpacked.
pub fn companion(path: &str) -> Result<PathBuf> {
    let root = std::env::var_os("EGRESS_COMPANIONS").context("EGRESS_COMPANIONS is not set: run `cargo xtask test`")?;
    let path = Path::new(&root).join(path);
    if !path.exists() {
        bail!("{} is missing: run `cargo xtask test`, which unpacks it", path.display());
    }
    Ok(path)
}

/// A program of this package, which cargo puts beside the directory of the tests, or beside the programs.
pub fn program(name: &str) -> Result<PathBuf> {
    let mut directory = std::env::current_exe()?;
    directory.pop();
    if directory.ends_with("deps") {
        directory.pop();
    }
    let program = directory.join(name);
    if !program.exists() {
        bail!("{} is missing: cargo builds it for the tests of this package", program.display());
    }
    Ok(program)
}

/// Whether the running kernel is older than a version.
pub fn kernel_is_before(major: u32, minor: u32) -> bool {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse::<u32>().ok());
    numbers.next().zip(numbers.next()).is_some_and(|version| version < (major, minor))
}

/// Whether the running kernel asks BPF programs as a security module, as it tells in `securityfs`.
pub fn bpf_is_a_security_module() -> bool {
    let modules = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    modules.trim().split(',').any(|module| module == "bpf")
}

/// How long anything may take before a test gives up on it.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Asks again until there is an answer, for what tells nobody when it is ready.
pub fn eventually<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> Result<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(answer) = ask() {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("gave up after {} s waiting for {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
