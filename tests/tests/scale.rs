//! Many policies and many cgroups: what a change takes, what is given back, and with how few descriptors it is done.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    ffi::OsString,
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use egress_tests::{
    agent::{Agent, Place, binary, run_command},
    cgroup::Cgroup,
    dial::Dialer,
    netns::Netns,
    program,
    world::tcp,
};
use serde_json::json;
use tempfile::TempDir;

/// A cgroup with many below it, and a policy for each.
struct Many {
    cgroups: Vec<Cgroup>,
    policies: TempDir,
    place: Place,
    // Dropped last.
    top: Cgroup,
}

impl Many {
    fn new(count: usize) -> Self {
        let (top, policies) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap());
        let cgroups = (0..count).map(|index| top.child(format!("c{index}")).unwrap()).collect();
        let many = Self { cgroups, policies, place: Place::new().unwrap(), top };
        (0..count).for_each(|index| many.write(index, 1));
        many
    }

    /// Writes the policy of a cgroup. It opens 192.0.2.`host`, and one address of its own, so that no two are alike.
    fn write(&self, index: usize, host: usize) {
        let (own, cgroup) = (format!("100.64.{}.{}", index / 256, index % 256), self.cgroups[index].name());
        let text = format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p{index} }}\nspec:\n  \
             workloads: [ {{ cgroup: {cgroup} }} ]\n  dns: {{ servers: None }}\n  \
             allow: [ {{ to: [ {{ cidr: 192.0.2.{host}/32 }}, {{ cidr: {own}/32 }} ] }} ]\n"
        );
        let next = self.policies.path().join(".next");
        fs::write(&next, text).unwrap();
        fs::rename(next, self.policies.path().join(format!("p{index}.yaml"))).unwrap();
    }

    fn start(&self) -> Agent {
        self.start_as(run_command(self.policies.path(), self.top.path(), &[]).unwrap())
    }

    fn start_as(&self, command: Command) -> Agent {
        let mut agent = Agent::spawn_in(Some(&self.place), command).unwrap();
        agent.wait_for("policy applied generation=1 ").unwrap();
        agent
    }

    /// How long it takes until another policy of one cgroup is in force.
    fn change(&self, index: usize, host: usize) -> Duration {
        self.write(index, host);
        let begun = Instant::now();
        self.place.reload().unwrap();
        begun.elapsed()
    }

    fn dialer(&self, index: usize, namespace: &Netns) -> Dialer {
        Dialer::start(program("dial").unwrap(), &self.cgroups[index], namespace).unwrap()
    }
}

/// With what systemd gives a service, as its limit that cannot be raised, too.
#[test]
fn four_thousand_scopes_take_no_more_descriptors_than_a_few() {
    const COUNT: usize = 4_090;
    let many = Many::new(COUNT);
    let plain = run_command(many.policies.path(), many.top.path(), &[]).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "ulimit -S -n 1024 && ulimit -H -n 1024 && exec \"$@\"", "sh"]).arg(binary().unwrap());
    command.args(plain.get_args());
    let mut agent = many.start_as(command);
    let namespace = Netns::with_every_address_local().unwrap();
    let mut dialer = many.dialer(COUNT - 1, &namespace);
    assert!(!dialer.is_refused(&tcp("192.0.2.1", 80)).unwrap() && dialer.is_refused(&tcp("192.0.2.2", 80)).unwrap());
    many.change(COUNT - 1, 2);
    assert!(dialer.is_refused(&tcp("192.0.2.1", 80)).unwrap() && !dialer.is_refused(&tcp("192.0.2.2", 80)).unwrap());
    let output = Command::new("sh")
        .args(["-c", "ulimit -S -n 256 && exec \"$0\" status --output json --pin-dir \"$1\""])
        .args([binary().unwrap(), many.place.pins()])
        .output()
        .unwrap();
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let policy = told["maps"].as_array().unwrap().iter().find(|map| map["name"] == "POLICY").unwrap();
    assert_eq!(policy["entries"], json!(COUNT + 1), "{policy}");
    assert!(agent.log().iter().all(|line| !line.contains("ERROR")), "{:?}", agent.log());
}

/// What does not depend on the machine: a change of one is little beside the start that puts all of them in force.
#[test]
fn a_change_of_one_policy_of_a_thousand_costs_what_changed() {
    let many = Many::new(1_000);
    let begun = Instant::now();
    let _agent = many.start();
    let start = begun.elapsed();
    let mut took: Vec<Duration> = (0..5).map(|round| many.change(round * 150, 2 + round)).collect();
    took.sort();
    println!("start {start:?}, one changed {took:?}");
    assert!(took[2] * 4 < start, "the change of one policy takes {:?}, and the start {start:?}", took[2]);
    let namespace = Netns::with_every_address_local().unwrap();
    let mut dialer = many.dialer(150, &namespace);
    assert!(dialer.is_refused(&tcp("192.0.2.1", 80)).unwrap() && !dialer.is_refused(&tcp("192.0.2.3", 80)).unwrap());
}

/// Kilobytes of memory that a process has.
fn resident(agent: &Agent) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", agent.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn prefixes(count: u32) -> String {
    let mut text = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: p }\nspec:\n  dns: { servers: None }\n  \
                    allow:\n  - to:\n"
        .to_owned();
    for index in 0..count {
        let [_, a, b, c] = (index * 2).to_be_bytes();
        writeln!(text, "    - {{ cidr: {}.{a}.{b}.{c}/32 }}", 11 + index / (1 << 23)).unwrap();
    }
    text
}

/// The memory of the agent with few prefixes, with many, and with few again.
fn resident_around(count: u32) -> [u64; 3] {
    let (top, policies, place) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap(), Place::new().unwrap());
    let write = |count| {
        let texts: Vec<String> = (0..count).step_by(50_000).map(|_| prefixes(50_000.min(count))).collect();
        for entry in fs::read_dir(policies.path()).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        for (index, text) in (0_u32..).zip(texts) {
            let text = text
                .replace("name: p }", &format!("name: p{index} }}"))
                .replace("cidr: 11.", &format!("cidr: {}.", 11 + index));
            fs::write(policies.path().join(format!("p{index}.yaml")), text).unwrap();
        }
    };
    write(10);
    let agent = Agent::start_in(&place, policies.path(), &top, &["--memory-limit", "1000"]).unwrap();
    let before = resident(&agent);
    write(count);
    place.reload().unwrap();
    let during = resident(&agent);
    write(10);
    place.reload().unwrap();
    [before, during, resident(&agent)]
}

#[test]
fn the_memory_of_prefixes_that_are_gone_is_given_back() {
    let [before, during, after] = resident_around(300_000);
    println!("{before} kB, with 300,000 prefixes {during} kB, without {after} kB");
    assert!(after < before + 16_384, "{before} kB, with 300,000 prefixes {during} kB, without {after} kB");
}

/// Beside another build, whose path `EGRESS_BASELINE` is.
#[test]
#[ignore = "takes minutes; for the figures of docs/measurements.md"]
fn figures() {
    let count = std::env::var("EGRESS_COUNT").map_or(2_000, |count| count.parse().unwrap());
    let many = Many::new(count);
    let baseline = std::env::var_os("EGRESS_BASELINE").map(PathBuf::from);
    for binary in [Some(binary().unwrap()), baseline].into_iter().flatten() {
        let mut command = Command::new(&binary);
        command.args(run_command(many.policies.path(), many.top.path(), &[]).unwrap().get_args().map(OsString::from));
        let begun = Instant::now();
        let agent = many.start_as(command);
        let start = begun.elapsed();
        let took: Vec<Duration> = (0..5).map(|round| many.change(round, 2 + round)).collect();
        let begun = Instant::now();
        let come = many.top.child(format!("new-{}", begun.elapsed().as_nanos())).unwrap();
        println!(
            "{}: {count} x {count}: start {start:?}, one changed {took:?}, {} kB",
            shown(&binary),
            resident(&agent)
        );
        drop((come, agent));
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
