//! The container image: its root file system is run as the pod of a DaemonSet is, and filters other containers.
//!
//! `cargo xtask image` builds what is run here. The agent sees the host's processes, has a read-only root, four capabilities, the
//! host's cgroup2 root for reading and a bpf file system; its network, mounts and cgroup namespace are its own. Workloads
//! are containers beside it, below the same cgroup.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use egress_agent::{cgroup::mount_point, privileges::START};
use egress_tests::{
    PATIENCE,
    agent::Agent,
    bpffs::Bpffs,
    cgroup::Cgroup,
    companion,
    container::{Container, Mount, Pids, Spec, runtime_default},
    dial::Dialer,
    mariadb::{Answer, answer, client},
    netns::Netns,
    scenario::{SERVER, Scenario},
    world::{opening, tcp},
};
use serde_json::Value;
use tempfile::TempDir;

const CAPABILITIES: [&str; 4] = ["CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON", "CAP_SYS_PTRACE"];
const HOST_CGROUP: &str = "/host/cgroup";
const PINS: &str = "/host/bpf";
const RUN: &str = "/run/egress";
const POLICIES: &str = "/etc/egress/policies";

/// The root file system of the image.
fn image() -> Result<PathBuf> {
    std::env::var_os("EGRESS_IMAGE_ROOT")
        .map(PathBuf::from)
        .context("EGRESS_IMAGE_ROOT is not set: run `cargo xtask image`")
}

/// The agent's container, filtering a cgroup.
fn agent(bpffs: &Bpffs, policies: &Path, filtered: &Cgroup) -> Result<Spec> {
    let args = ["/egress-agent", "run", "--policies", POLICIES, "--cgroup", &filtered.name(), "--output", "json"];
    Ok(Spec {
        root: Some(image()?),
        args: args.map(str::to_owned).to_vec(),
        // An engine would mount a resolv.conf.
        variables: BTreeMap::from([
            ("EGRESS_RESOLVER".to_owned(), "127.0.0.1:1".to_owned()),
            ("EGRESS_PIN_DIR".to_owned(), format!("{PINS}/egress")),
        ]),
        capabilities: CAPABILITIES.to_vec(),
        mounts: BTreeMap::from([
            (HOST_CGROUP.into(), Mount::ReadOnly(mount_point()?)),
            (PINS.into(), Mount::Writable(bpffs.path().to_owned())),
            (RUN.into(), Mount::Memory),
            (POLICIES.into(), Mount::ReadOnly(policies.to_owned())),
        ]),
        pids: Pids::Host,
        ..Spec::default()
    })
}

/// A line of `/proc/PID/status`.
fn status(pid: u32, name: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t")).unwrap().to_owned()
}

/// A client in a container of its own asks for the ratings.
fn ask(scenario: &Scenario) -> Answer {
    let command = client(Command::new(companion("mariadb/bin/mariadb").unwrap()), SERVER);
    let spec = Spec::of_this_host(&command, &companion("mariadb").unwrap(), &scenario.workload).unwrap();
    let container = Container::new(&spec, &scenario.cgroup).unwrap();
    answer(&container.command().unwrap().output().unwrap())
}

/// Runs the scenario between containers.
fn scenario(seccomp: Option<&Value>) {
    let bpffs = Bpffs::new().unwrap();
    let start = |policies: &Path, cgroup: &Cgroup| {
        let spec = Spec { seccomp: seccomp.cloned(), ..agent(&bpffs, policies, cgroup)? };
        Agent::contained(Container::new(&spec, cgroup)?)
    };
    let mut scenario = Scenario::start_with(start).unwrap();
    let pid = scenario.agent.container().unwrap().pid().unwrap();
    let permitted = u64::from_str_radix(&status(pid, "CapPrm"), 16).unwrap();
    assert_eq!(permitted & !START.bits(), 0, "more than it needs: {permitted:x}");
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), if seccomp.is_some() { "2" } else { "0" });

    let refused = ask(&scenario);
    let (said, denial) = scenario.refused(refused).unwrap();
    assert!(said.contains("Operation not permitted") || said.contains("(1)"), "{said}");
    assert_eq!((&denial["verdict"], &denial["reason"]), (&"deny".into(), &"no_rule".into()));
    assert_eq!((&denial["destination"]["address"], &denial["destination"]["port"]), (&SERVER.into(), &3306.into()));
    assert_eq!(denial["process"]["comm"], "mariadb");

    scenario.add_policy(2).unwrap();
    let Answer::Ratings(ratings) = ask(&scenario) else { panic!("the policy did not open the database") };
    assert_eq!(ratings, "5\n4");
    let output = scenario.agent.container().unwrap().exec(&["/egress-agent", "status", "--output", "json"]).unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let status: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&status["enforcing"], &status["agent"]["running"]), (&true.into(), &true.into()), "{status:#}");
    assert_eq!(status["attached"][0]["cgroup"], scenario.cgroup.name());
    assert_eq!(status["policy"]["generation"], 2);

    scenario.remove_policy(3).unwrap();
    let refused = ask(&scenario);
    scenario.refused(refused).unwrap();

    let (status, denials, log) = scenario.agent.stop().unwrap();
    assert_eq!((status.code(), denials.len()), (Some(0), 0), "{log:#?}");
    assert!(!log.iter().any(|line| line.contains(" WARN ") || line.contains(" ERROR ")), "{log:#?}");
}

#[test]
#[ignore = "needs what `cargo xtask image` builds"]
fn the_image_is_the_program_alone() {
    let entries: Vec<_> = fs::read_dir(image().unwrap()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(entries, ["egress-agent"]);
}

#[test]
#[ignore = "needs what `cargo xtask image` builds"]
fn a_policy_file_opens_the_database_for_another_container_and_its_removal_closes_it() {
    scenario(None);
}

#[test]
#[ignore = "needs what `cargo xtask image` builds"]
fn the_system_calls_that_containerd_allows_by_default_are_enough() {
    scenario(Some(&runtime_default().unwrap()));
}

const OPEN: &str = "192.0.2.1";
const CLOSED: &str = "203.0.113.9";

/// A container that is filtered, in which each destination answers at once.
struct Workload {
    // In the order in which they are to go.
    dialer: Dialer,
    container: Container,
    _network: Netns,
}

impl Workload {
    fn start(cgroup: &Cgroup) -> Self {
        let network = Netns::with_every_address_local().unwrap();
        let dial = Path::new(env!("CARGO_BIN_EXE_dial"));
        let spec = Spec::of_this_host(&Command::new(dial), dial.parent().unwrap(), &network).unwrap();
        let container = Container::new(&spec, cgroup).unwrap();
        let dialer = Dialer::spawn(container.command().unwrap()).unwrap();
        Self { dialer, container, _network: network }
    }

    fn is_refused(&mut self, address: &str) -> bool {
        self.dialer.is_refused(&tcp(address, 80)).unwrap()
    }
}

/// What agents come and go in.
struct Node {
    bpffs: Bpffs,
    policies: TempDir,
    cgroup: Cgroup,
}

impl Node {
    fn new() -> Self {
        let policies = tempfile::tempdir().unwrap();
        fs::write(policies.path().join("policy.yaml"), opening(&[OPEN])).unwrap();
        Self { bpffs: Bpffs::new().unwrap(), policies, cgroup: Cgroup::new().unwrap() }
    }

    fn spec(&self) -> Spec {
        agent(&self.bpffs, self.policies.path(), &self.cgroup).unwrap()
    }

    fn start(&self) -> Agent {
        Agent::contained(Container::new(&self.spec(), &self.cgroup).unwrap()).unwrap()
    }

    /// The exit status of an agent that ends by itself, and its log.
    fn outcome(&self, spec: &Spec) -> (Option<i32>, String) {
        let mut agent = Agent::spawn_contained(Container::new(spec, &self.cgroup).unwrap()).unwrap();
        let status = agent.exit_status().unwrap();
        (status.code(), agent.rest().unwrap().1.join("\n"))
    }

    /// The same of one that is told to end as soon as its policy is in force.
    fn log(&self, spec: &Spec) -> String {
        let (status, _, log) = Agent::contained(Container::new(spec, &self.cgroup).unwrap()).unwrap().stop().unwrap();
        assert_eq!(status.code(), Some(0), "{log:#?}");
        log.join("\n")
    }
}

#[test]
#[ignore = "needs what `cargo xtask image` builds"]
fn killed_in_its_container_its_rules_stay_until_the_next_container_has_taken_over() {
    let node = Node::new();
    let mut workload = Workload::start(&node.cgroup);
    assert!(!workload.is_refused(CLOSED), "nothing is filtered yet");
    let mut first = node.start();
    assert!(workload.is_refused(CLOSED));
    let denial = first.denial().unwrap();
    // It takes the host's processes and CAP_SYS_PTRACE to see which program that was.
    assert!(denial["process"]["exe"].as_str().is_some_and(|exe| exe.ends_with("/dial")), "{denial:#}");
    assert_eq!(denial["cgroup"]["path"], workload.container.cgroup());
    assert_eq!(denial["container_id"], workload.container.id());
    let stop = AtomicBool::new(false);
    let (calls, status) = thread::scope(|scope| {
        let dialing = scope.spawn(|| {
            let (mut calls, begun) = (0_u32, Instant::now());
            // If this test fails elsewhere, nobody stops it.
            while !stop.load(Ordering::Relaxed) && begun.elapsed() < PATIENCE {
                assert!(workload.is_refused(CLOSED), "a gap after {calls} calls");
                assert!(!workload.is_refused(OPEN), "refused after {calls} calls");
                calls += 2;
            }
            calls
        });
        let pid = first.container().unwrap().pid().unwrap();
        first.container().unwrap().kill().unwrap();
        // As a shell tells of a signal.
        assert_eq!(first.exit_status().unwrap().code(), Some(128 + 9));
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "the agent's process is gone");
        drop(first);
        // Nobody is there but the rules.
        thread::sleep(Duration::from_millis(200));
        let next = node.start();
        thread::sleep(Duration::from_millis(200));
        let status = next.container().unwrap().exec(&["/egress-agent", "status"]).unwrap();
        stop.store(true, Ordering::Relaxed);
        (dialing.join().unwrap(), status)
    });
    assert_eq!(status.status.code(), Some(0), "{status:?}");
    println!("{calls} calls while one agent was killed and the next took over");
    assert!(calls > 1000, "{calls} calls show little");
    assert_eq!(fs::read_dir(node.bpffs.path().join("egress")).unwrap().count(), 1, "one set is left");
}

#[test]
#[ignore = "needs what `cargo xtask image` builds"]
fn without_a_mount_or_a_capability_it_says_what_is_missing() {
    let node = Node::new();
    let without = |mount: &str| {
        let mut spec = node.spec();
        spec.mounts.remove(Path::new(mount)).unwrap();
        spec
    };
    for (mount, says) in [
        (HOST_CGROUP, "no cgroup2 file system is mounted"),
        (PINS, "/host/bpf/egress is not on a bpf file system"),
        (POLICIES, "/etc/egress/policies"),
    ] {
        let (status, log) = node.outcome(&without(mount));
        assert!(matches!(status, Some(1 | 4)) && log.contains(says), "{mount}: {status:?} {log}");
    }
    assert!(node.log(&without(RUN)).contains("no control socket"));
    for capability in &CAPABILITIES[..3] {
        let mut spec = node.spec();
        spec.capabilities.retain(|held| held != capability);
        let (status, log) = node.outcome(&spec);
        assert_eq!(status, Some(4), "{capability}: {log}");
        assert!(log.contains("CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"), "{capability}: {log}");
    }
    let mut spec = node.spec();
    spec.capabilities.retain(|&held| held != "CAP_SYS_PTRACE");
    node.log(&spec);
    let log = node.log(&Spec { pids: Pids::Own, ..node.spec() });
    assert!(log.contains("not in the host's pid namespace"), "{log}");
}
