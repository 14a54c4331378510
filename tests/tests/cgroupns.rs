//! An agent in a cgroup namespace, as in a container: it filters by the host's root, or says what to mount.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::Path,
    process::Command,
};

use anyhow::{Context, Result};
use egress_agent::cgroup::{mount_point, own};
use egress_tests::{
    agent::{self, Agent},
    cgroup::Cgroup,
    dial::{Call, Dialer, Method},
    netns::Netns,
};

/// A command in a cgroup that is the root of its cgroup namespace, after a preparation in a mount namespace of its own.
fn contained(command: &Command, cgroup: &Cgroup, preparation: &str) -> Command {
    let mut contained = Command::new("unshare");
    contained.args(["--cgroup", "--mount", "sh", "-ec"]).arg(format!("{preparation}\nexec \"$@\"")).arg("sh");
    contained.arg(command.get_program()).args(command.get_args());
    let procs = File::options().write(true).open(cgroup.procs()).unwrap();
    let enter = move || Ok(rustix::io::write(&procs, b"0").map(drop)?);
    // SAFETY: between fork and exec the closure makes one system call on a descriptor that was opened before the fork.
    unsafe { contained.pre_exec(enter) };
    contained
}

fn run_command(policies: &Path, cgroup: &str) -> Command {
    agent::run_command(policies, Path::new(cgroup), &[]).unwrap()
}

/// Takes the host's hierarchy away and mounts what the namespace sees of it.
fn only_its_own() -> String {
    format!("umount -l {0}\nmount -t cgroup2 none {0}", mount_point().unwrap().display())
}

#[test]
fn with_the_hosts_root_it_filters_the_hosts_cgroups() {
    let (container, filtered) = (Cgroup::new().unwrap(), Cgroup::new().unwrap());
    let (policies, namespace) = (tempfile::tempdir().unwrap(), Netns::with_every_address_local().unwrap());
    // A part of the hierarchy on a shorter path is no reason to take it.
    let preparation = "mount -t cgroup2 none /mnt";
    let command = run_command(policies.path(), &filtered.name());
    let mut agent = Agent::spawn(contained(&command, &container, preparation)).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &filtered, &namespace).unwrap();
    let call = Call { method: Method::TcpConnect, mapped: false, to: "192.0.2.1:80".parse().unwrap() };
    assert!(dialer.is_refused(&call).unwrap());
    assert_eq!(agent.denial().unwrap()["cgroup"]["path"], filtered.name().as_str());
    let (status, _, log) = agent.stop().unwrap();
    assert_eq!(status.code(), Some(0), "{log:#?}");
}

#[test]
fn with_a_part_of_the_hierarchy_it_says_what_to_mount() {
    let (container, policies) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap());
    let command = run_command(policies.path(), "/");
    let mut agent = Agent::spawn(contained(&command, &container, &only_its_own())).unwrap();
    let status = agent.exit_status().unwrap();
    let log = agent.rest().unwrap().1.join("\n");
    assert_eq!(status.code(), Some(4), "{log}");
    let mount = mount_point().unwrap();
    assert!(log.contains(&format!("cgroup2 at {} is a container's own part", mount.display())), "{log}");
    assert!(log.contains("-v /sys/fs/cgroup:/host/cgroup:ro"), "{log}");
}

/// The path of the cgroup that a process takes for its own.
fn own_path(cgroup: &Cgroup, preparation: &str) -> Result<String> {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "--ignored", "--nocapture", "tells_its_own_cgroup"]);
    let output = contained(&command, cgroup, preparation).output()?;
    let text = String::from_utf8(output.stdout)?;
    let told = text.lines().find_map(|line| line.strip_prefix("own: ")).map(str::to_owned);
    told.with_context(|| format!("{text}{}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
#[ignore = "the other tests run it in a cgroup namespace"]
fn tells_its_own_cgroup() {
    if let Some(threads) = std::env::var_os("THREADS") {
        fs::write(threads, "0").unwrap();
    }
    let own = own(&mount_point().unwrap()).unwrap();
    assert_eq!(own.id, rustix::fs::fstat(&own.directory).unwrap().st_ino);
    println!("\nown: {}", own.path.display());
}

#[test]
fn its_own_cgroup_is_told_from_the_hosts_root() {
    let cgroup = Cgroup::new().unwrap();
    assert_eq!(own_path(&cgroup, "").unwrap(), cgroup.name());
}

#[test]
fn a_threaded_cgroup_is_its_own() {
    let cgroup = Cgroup::new().unwrap();
    let below = cgroup.path().join("threaded");
    fs::create_dir(&below).unwrap();
    fs::write(below.join("cgroup.type"), "threaded").unwrap();
    let told = own_path(&cgroup, &format!("export THREADS={}", below.join("cgroup.threads").display()));
    egress_tests::eventually("an empty cgroup", || fs::remove_dir(&below).ok()).unwrap();
    assert_eq!(told.unwrap(), format!("{}/threaded", cgroup.name()));
}
