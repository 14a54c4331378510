//! A running agent follows its policy files, and keeps the last good rules where it cannot.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, File},
    io::Write,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use egress_tests::{
    agent::{Agent, Place},
    cgroup::Cgroup,
    dial::{Call, Dialer, Method},
    eventually,
    netns::Netns,
};
use rustix::process::Signal;
use tempfile::TempDir;

/// An agent with a policy directory, and a filtered process that dials.
struct World {
    dialer: Dialer,
    agent: Agent,
    _namespace: Netns,
    _cgroup: Cgroup,
    directory: TempDir,
}

fn entry(address: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: a }}\n\
         spec: {{ hosts: [a.example.com], addresses: [{address}], ports: [{{ number: 80, name: http }}] }}\n"
    )
}

impl World {
    /// With a policy directory that `fill` prepares; the agent reads what `fill` gives.
    fn new(fill: impl FnOnce(&Path) -> PathBuf) -> Self {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let directory = tempfile::tempdir().unwrap();
        let policies = fill(directory.path());
        let agent = Agent::start(&policies, &cgroup, &[]).unwrap();
        let dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
        Self { dialer, agent, _namespace: namespace, _cgroup: cgroup, directory }
    }

    /// With one file that opens `192.0.2.1:80`.
    fn with_one_file() -> Self {
        let fill = |directory: &Path| {
            fs::write(directory.join("a.yaml"), entry("192.0.2.1")).unwrap();
            directory.to_owned()
        };
        Self::new(fill)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn is_open(&mut self, address: &str) -> bool {
        let to = format!("{address}:80").parse().unwrap();
        !self.dialer.is_refused(&Call { method: Method::TcpConnect, mapped: false, to }).unwrap()
    }

    #[track_caller]
    fn expect_open(&mut self, address: &str, other: &str) {
        assert!(self.is_open(address), "{address} is refused");
        assert!(!self.is_open(other), "{other} is open");
    }

    fn applied(&mut self, generation: u64) {
        self.agent.wait_for(&format!("policy applied generation={generation} ")).unwrap();
    }
}

const ONE: &str = "192.0.2.1";
const TWO: &str = "192.0.2.2";

#[test]
fn a_file_is_read_when_it_is_closed_and_not_before() {
    let mut world = World::with_one_file();
    let mut file = File::create(world.path("b.yaml")).unwrap();
    file.write_all(entry(TWO).replace("name: a", "name: b").as_bytes()).unwrap();
    file.flush().unwrap();
    // Whatever else makes the agent read, it leaves the open file alone.
    world.agent.signal(Signal::HUP).unwrap();
    let line = world.agent.wait_for("is open for writing").unwrap();
    assert!(line.contains("b.yaml") && line.contains("INFO"), "{line}");
    world.expect_open(ONE, TWO);
    drop(file);
    world.applied(2);
    assert!(world.is_open(TWO));
}

#[test]
fn a_deny_list_that_is_being_rewritten_stays_in_force() {
    let mut world = World::new(|directory| {
        let deny = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: deny }\n\
                    spec: { deny: [{ to: [{ cidr: 192.0.2.1/32 }] }], defaultAction: Allow }\n";
        fs::write(directory.join("deny.yaml"), deny).unwrap();
        directory.to_owned()
    });
    world.expect_open(TWO, ONE);
    let file = File::create(world.path("deny.yaml")).unwrap();
    fs::write(world.path("other.yaml"), entry(TWO)).unwrap();
    world.agent.wait_for("is open for writing").unwrap();
    world.expect_open(TWO, ONE);
    drop(file);
    world.applied(2);
}

#[test]
fn directories_that_come_one_after_the_other_are_all_followed() {
    let mut world = World::with_one_file();
    for round in 0..20 {
        let (outer, inner) = (world.path(&format!("d{round}")), world.path(&format!("d{round}/inner")));
        fs::create_dir(&outer).unwrap();
        std::thread::sleep(Duration::from_millis(90 + round * 2));
        fs::create_dir(&inner).unwrap();
    }
    // Every one of them is watched: a file in any is noticed.
    for round in 0..20 {
        let text = entry(&format!("198.51.100.{round}")).replace("name: a", &format!("name: n{round}"));
        fs::write(world.path(&format!("d{round}/inner/x.yaml")), text).unwrap();
        world.agent.wait_for(&format!("documents={} ", round + 2)).unwrap();
    }
}

#[test]
fn a_directory_that_is_replaced_further_up_is_followed() {
    let mut world = World::new(|directory| {
        for (version, address) in [("current", ONE), ("next", TWO)] {
            fs::create_dir_all(directory.join(version).join("conf/policies")).unwrap();
            fs::write(directory.join(version).join("conf/policies/a.yaml"), entry(address)).unwrap();
        }
        directory.join("current/conf/policies")
    });
    fs::rename(world.path("current"), world.path("old")).unwrap();
    fs::rename(world.path("next"), world.path("current")).unwrap();
    world.applied(2);
    world.expect_open(TWO, ONE);
}

#[test]
fn a_mended_policy_does_not_wait_for_the_next_try() {
    let mut world = World::with_one_file();
    fs::write(world.path("a.yaml"), "kind: [").unwrap();
    world.agent.wait_for("the last good policy stays in force").unwrap();
    let mended = std::time::Instant::now();
    fs::write(world.path("a.yaml"), entry(TWO)).unwrap();
    world.applied(2);
    assert!(mended.elapsed() < Duration::from_secs(3), "{:?}", mended.elapsed());
}

#[test]
fn a_cgroup_that_is_made_anew_is_filtered_again() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let (policies, place) = (tempfile::tempdir().unwrap(), Place::new().unwrap());
    let mut agent = Agent::start_in(&place, policies.path(), &cgroup, &[]).unwrap();
    for _ in 0..3 {
        cgroup.make_anew().unwrap();
        agent.wait_for("attached again").unwrap();
        let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
        let call = Call { method: Method::TcpConnect, mapped: false, to: format!("{ONE}:80").parse().unwrap() };
        assert!(dialer.is_refused(&call).unwrap());
        agent.denial().unwrap();
    }
    drop(cgroup);
    // A restart would not bring it back: the agent lives, and enforces nothing.
    eventually("nothing to be filtered", || (!place.probe("Ready").unwrap().0).then_some(())).unwrap();
    assert!(place.probe("Live").unwrap().0);
}

#[test]
fn an_invalid_file_leaves_the_last_good_rules_in_force() {
    let mut world = World::with_one_file();
    fs::write(world.path("a.yaml"), "kind: [").unwrap();
    let line = world.agent.wait_for("the last good policy stays in force").unwrap();
    assert!(line.contains("ERROR"), "{line}");
    assert!(world.agent.log().iter().any(|line| line.contains("ERROR") && line.contains("a.yaml")));
    world.expect_open(ONE, TWO);
    fs::write(world.path("a.yaml"), entry(TWO)).unwrap();
    world.applied(2);
    world.expect_open(TWO, ONE);
}

#[test]
fn one_invalid_file_holds_back_the_good_ones_beside_it() {
    let mut world = World::with_one_file();
    fs::write(world.path(".b"), entry(TWO).replace("name: a", "name: b")).unwrap();
    fs::write(world.path("c.yaml"), "spec: 1").unwrap();
    world.agent.wait_for("the last good policy stays in force").unwrap();
    fs::rename(world.path(".b"), world.path("b.yaml")).unwrap();
    world.agent.wait_for("the last good policy stays in force").unwrap();
    world.expect_open(ONE, TWO);
}

#[test]
fn a_directory_that_goes_away_leaves_its_rules_and_is_read_when_it_comes_back() {
    let mut world = World::new(|directory| {
        let policies = directory.join("policies");
        fs::create_dir(&policies).unwrap();
        fs::write(policies.join("a.yaml"), entry(ONE)).unwrap();
        policies
    });
    let (policies, aside) = (world.path("policies"), world.path("aside"));
    fs::rename(&policies, &aside).unwrap();
    world.agent.wait_for("the last good policy stays in force").unwrap();
    world.expect_open(ONE, TWO);
    fs::write(aside.join("a.yaml"), entry(TWO)).unwrap();
    fs::rename(&aside, &policies).unwrap();
    world.applied(2);
    world.expect_open(TWO, ONE);
}

#[test]
fn an_empty_directory_is_a_policy_that_opens_nothing() {
    let mut world = World::with_one_file();
    fs::remove_file(world.path("a.yaml")).unwrap();
    world.applied(2);
    assert!(!world.is_open(ONE));
}

#[test]
fn a_file_in_a_new_directory_is_found() {
    let mut world = World::with_one_file();
    fs::create_dir(world.path("more")).unwrap();
    world.agent.wait_for("policy unchanged generation=1").unwrap();
    fs::write(world.path("more/b.yml"), entry(TWO).replace("name: a", "name: b")).unwrap();
    world.applied(2);
    assert!(world.is_open(ONE) && world.is_open(TWO));
}

#[test]
fn a_link_to_a_file_counts_at_once() {
    let mut world = World::with_one_file();
    let elsewhere = tempfile::tempdir().unwrap();
    fs::write(elsewhere.path().join("b"), entry(TWO).replace("name: a", "name: b")).unwrap();
    symlink(elsewhere.path().join("b"), world.path("b.yaml")).unwrap();
    world.applied(2);
    assert!(world.is_open(TWO));
    fs::remove_file(world.path("b.yaml")).unwrap();
    world.applied(3);
    fs::write(world.path("aside"), entry(TWO).replace("name: a", "name: b")).unwrap();
    fs::hard_link(world.path("aside"), world.path("b.yaml")).unwrap();
    world.applied(4);
    assert!(world.is_open(TWO));
}

/// The layout of a mounted `ConfigMap`: files are links through `..data`, which is swapped by a rename.
#[test]
fn the_swap_of_a_config_map_is_followed() {
    let mut world = World::new(|directory| {
        fs::create_dir(directory.join("..1")).unwrap();
        fs::write(directory.join("..1/a.yaml"), entry(ONE)).unwrap();
        symlink("..1", directory.join("..data")).unwrap();
        symlink("..data/a.yaml", directory.join("a.yaml")).unwrap();
        directory.to_owned()
    });
    world.expect_open(ONE, TWO);
    for (generation, address) in [(2, TWO), (3, ONE)] {
        let version = format!("..{generation}");
        fs::create_dir(world.path(&version)).unwrap();
        fs::write(world.path(&version).join("a.yaml"), entry(address)).unwrap();
        symlink(&version, world.path("..data_tmp")).unwrap();
        fs::rename(world.path("..data_tmp"), world.path("..data")).unwrap();
        world.applied(generation);
        world.expect_open(address, if address == ONE { TWO } else { ONE });
    }
}

#[test]
fn what_happens_beside_the_policy_directory_does_not_matter() {
    let mut world = World::new(|directory| {
        fs::create_dir(directory.join("policies")).unwrap();
        directory.join("policies")
    });
    fs::write(world.path("other.yaml"), entry(ONE)).unwrap();
    fs::write(world.path("policies/a.yaml"), entry(TWO)).unwrap();
    world.applied(2);
    assert!(!world.agent.log().iter().any(|line| line.contains("policy unchanged")), "{:#?}", world.agent.log());
    world.expect_open(TWO, ONE);
}

#[test]
fn sighup_reads_the_policy_again() {
    let mut world = World::with_one_file();
    world.agent.signal(Signal::HUP).unwrap();
    world.agent.wait_for("policy unchanged generation=1").unwrap();
}

#[test]
fn changes_that_come_together_are_applied_together() {
    let mut world = World::with_one_file();
    for index in 0..20 {
        let text = entry(&format!("198.51.100.{index}")).replace("name: a", &format!("name: n{index}"));
        fs::write(world.path(&format!("{index}.yaml")), text).unwrap();
    }
    let line = world.agent.wait_for("policy applied generation=2 ").unwrap();
    assert!(line.contains("documents=21"), "{line}");
}
