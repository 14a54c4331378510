//! Cgroups of any name and any depth: names of cgroups are bytes, paths may be longer than a system call takes, and whoever
//! has a cgroup may nest others in it.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    ffi::OsStr,
    fs,
    net::IpAddr,
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::PathBuf,
};

use egress_tests::{
    agent::Place,
    asker::{Asker, Transport},
    cgroup::Cgroup,
    eventually,
    foreign::{Hook, How, Program},
    resolving::{FAR, NEAR, SIX, World},
    world,
};
use rustix::{
    fs::{AtFlags, CWD, Mode, OFlags, mkdirat, openat, unlinkat},
    process::Signal,
};
use serde_json::{Value, json};

/// What no server may hear.
const SECRET: &str = "aqbacgl5.evil.net";

/// A policy that lets cgroups of a pattern ask for names of one wildcard alone, and learn them.
fn named(pattern: &str) -> String {
    format!(
        "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: q }}\nspec:\n  \
         workloads: [ {{ cgroup: '{pattern}' }} ]\n  loopback: None\n  \
         dns: {{ servers: [{NEAR}, {FAR}, '{SIX}'], queries: Named }}\n  \
         allow: [ {{ to: [ {{ host: '*.example.com' }} ], ports: [ {{ port: 443 }} ] }} ]\n"
    )
}

fn below(world: &World, pattern: &str) -> String {
    named(&format!("{}/{pattern}", world.cgroup.name()))
}

/// Whether a question is refused by the filter.
fn is_refused(asker: &mut Asker, name: &str) -> bool {
    asker.ask(Transport::Udp, NEAR.parse().unwrap(), name).is_err_and(|error| error.to_string().contains("os error 1"))
}

/// Whether only names of the wildcard may be asked for, and are learnt.
fn holds(world: &World, asker: &mut Asker, address: &str) {
    let placed = || asker.ask(Transport::Udp, NEAR.parse().unwrap(), "198-18-99-99.example.com").ok();
    eventually("a cgroup that is placed", placed).unwrap();
    assert!(is_refused(asker, SECRET) && !world.has_heard(b"aqbacgl5"));
    let to = format!("{address}:443").parse().unwrap();
    assert!(asker.is_refused(to).unwrap());
    let name = format!("{}.example.com", address.replace('.', "-"));
    let found = asker.ask(Transport::Udp, NEAR.parse().unwrap(), &name).unwrap();
    assert_eq!(found, [address.parse::<IpAddr>().unwrap()]);
    assert!(!asker.is_refused(to).unwrap(), "{name} is not learnt");
}

/// What `status` tells of a cgroup that it names by a word.
fn hooks_of(place: &Place, word: &str) -> Vec<Value> {
    let (code, told) = place.status().unwrap();
    assert_eq!((code, &told["degraded"]), (Some(0), &json!([])), "{told}");
    let attached = told["attached"].as_array().unwrap().iter();
    let of_cgroup = attached.filter(|attached| attached["cgroup"].as_str().unwrap().contains(word));
    of_cgroup.flat_map(|attached| attached["hooks"].as_array().unwrap().clone()).collect()
}

#[test]
fn questions_are_judged_and_names_learnt_in_a_cgroup_of_any_name() {
    let mut world = World::new("");
    world.write(&below(&world, "*"));
    let names: [(&[u8], &str); 5] = [
        (b"\xff\xfe", "\\xff\\xfe"),
        (b"a\tc\x1b[31m", "a\\u{9}c\\u{1b}[31m"),
        (b" \xc3\xa9\xc3", " \u{e9}\\xc3"),
        (&[b'n'; 255], "nnnnnnnn"),
        (&[0xfe; 255], "\\xfe\\xfe\\xfe"),
    ];
    for (index, (name, told)) in names.into_iter().enumerate() {
        let cgroup = world.cgroup.child(OsStr::from_bytes(name)).unwrap();
        let mut asker = Asker::start(&world.near, &cgroup).unwrap();
        holds(&world, &mut asker, &format!("198.18.7.{index}"));
        let is_it = |denial: &Value| denial["hook"] == "connect4" && denial["reason"] == "no_rule";
        let denial = std::iter::repeat_with(|| world.agent().denial().unwrap()).find(is_it).unwrap();
        assert_eq!(denial["cgroup"]["id"], json!(cgroup.id().unwrap()), "{denial}");
        assert!(denial["cgroup"]["path"].as_str().unwrap().starts_with(&world.cgroup.name()), "{denial}");
        let hooks = hooks_of(&world.place, told);
        assert!(hooks.contains(&json!("query")) && hooks.contains(&json!("ingress")), "{told}: {hooks:?}");
        let (_, status) = world.place.status().unwrap();
        let placed: Vec<&Value> = status["scopes"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|scope| scope["cgroups"].as_array().unwrap())
            .collect();
        assert!(placed.iter().any(|path| path.as_str().unwrap().contains(told)), "{told}: {placed:?}");
    }
}

/// It is refused what it does while nobody could judge it, holds nobody else up, and is judged as soon as that is possible.
#[test]
fn where_a_hook_cannot_be_attached_nothing_is_open_and_status_tells() {
    let mut world = World::new("");
    world.write(&below(&world, "*"));
    world.agent().signal(Signal::STOP).unwrap();
    let taken = world.cgroup.child("taken").unwrap();
    let alone = Program::pass(Hook::Egress).unwrap().attach(&taken, How::Exclusive).unwrap();
    let free = world.cgroup.child("free").unwrap();
    world.agent().signal(Signal::CONT).unwrap();
    let degraded = eventually("a status that tells", || {
        let told = world.place.status().ok()?.1["degraded"].as_array()?.clone();
        told.iter().any(|line| line.as_str().is_some_and(|line| line.contains("query is not attached"))).then_some(told)
    });
    let line = degraded.unwrap()[0].as_str().unwrap().to_owned();
    assert!(line.contains(&format!("{}/taken", world.cgroup.name())) && line.contains("not permitted"), "{line}");
    assert_eq!(world.place.status().unwrap().0, Some(1));
    let mut asker = Asker::start(&world.near, &taken).unwrap();
    assert!(is_refused(&mut asker, SECRET) && is_refused(&mut asker, "198-18-0-1.example.com"));
    holds(&world, &mut Asker::start(&world.near, &free).unwrap(), "198.18.0.2");
    // Policies can be changed all the same.
    world.write(&below(&world, "*").replace("443", "444"));
    world.write(&below(&world, "*"));
    drop(alone);
    eventually("the hook", || world.place.status().ok()?.1["degraded"].as_array()?.is_empty().then_some(())).unwrap();
    holds(&world, &mut asker, "198.18.0.3");
}

#[test]
fn a_policy_whose_hook_cannot_be_attached_is_not_put_in_force() {
    let mut world = World::new("");
    let taken = world.cgroup.child("taken").unwrap();
    let alone = Program::pass(Hook::Egress).unwrap().attach(&taken, How::Exclusive).unwrap();
    let policies = world.policies.path().join("policy.yaml");
    let before = fs::read_to_string(&policies).unwrap();
    fs::write(&policies, format!("{before}{}", below(&world, "taken"))).unwrap();
    let refused = world.place.reload().unwrap_err().to_string();
    assert!(refused.contains("query") && refused.contains("taken"), "{refused}");
    let (status, _, _) = world.agent.take().unwrap().stop().unwrap();
    assert!(status.success());
    let mut agent = egress_tests::agent::Agent::spawn_in(
        Some(&world.place),
        egress_tests::agent::run_command(world.policies.path(), world.cgroup.path(), &[]).unwrap(),
    )
    .unwrap();
    assert_eq!(agent.exit_status().unwrap().code(), Some(4));
    let log = agent.rest().unwrap().1.join("\n");
    assert!(log.contains("query") && log.contains("taken"), "{log}");
    drop(alone);
    world.start(&[]);
    holds(&world, &mut Asker::start(&world.near, &taken).unwrap(), "198.18.0.4");
}

/// Cgroups, each below the one before it, made and removed without their paths.
struct Nested(Vec<(OwnedFd, Vec<u8>)>);

impl Nested {
    /// The first is a child of a cgroup.
    fn below(cgroup: &Cgroup, names: &[Vec<u8>]) -> Self {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut parent = openat(CWD, cgroup.path(), flags, Mode::empty()).unwrap();
        let mut made = Vec::new();
        for name in names {
            mkdirat(&parent, OsStr::from_bytes(name), Mode::from(0o755)).unwrap();
            let next = openat(&parent, OsStr::from_bytes(name), flags, Mode::empty()).unwrap();
            made.push((std::mem::replace(&mut parent, next), name.clone()));
        }
        made.push((parent, Vec::new()));
        Self(made)
    }

    /// Moves a process into the one at a level below the cgroup.
    fn take(&self, level: usize, pid: u32) {
        let procs = PathBuf::from(format!("/proc/self/fd/{}/cgroup.procs", self.0[level].0.as_raw_fd()));
        fs::write(procs, pid.to_string()).unwrap();
    }
}

impl Drop for Nested {
    fn drop(&mut self) {
        for (parent, name) in self.0.iter().rev().filter(|(_, name)| !name.is_empty()) {
            let removed =
                eventually("an empty cgroup", || unlinkat(parent, OsStr::from_bytes(name), AtFlags::REMOVEDIR).ok());
            if let Err(error) = removed {
                // Those above are not empty either.
                return eprintln!("cannot remove a nested cgroup: {error}");
            }
        }
    }
}

fn open_for(name: &str, workloads: &str, address: &str) -> String {
    format!(
        "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {name} }}\nspec:\n  \
         workloads: [ {{ cgroup: '{workloads}' }} ]\n  dns: {{ servers: None }}\n  allow: [ {{ to: [ {{ cidr: {address}/32 }} ] }} ]\n"
    )
}

#[test]
fn what_is_nested_too_deep_to_be_told_apart_is_refused_and_told() {
    const FIRST: &str = "192.0.2.1";
    const SECOND: &str = "192.0.2.2";
    let mut world = world::World::opening(&[FIRST]).unwrap();
    let top = world.cgroup.name();
    let all = world::opening(&[FIRST]);
    world.write(&format!("{all}{}", open_for("x", &format!("{top}/**/x"), SECOND))).unwrap();
    let mut agent = world.start(&[]).unwrap();
    // The cgroup is of level 1.
    let names: Vec<Vec<u8>> =
        (1..=70).map(|level| if level == 50 || level == 66 { b"x".to_vec() } else { b"n".to_vec() }).collect();
    let nested = Nested::below(&world.cgroup, &names[..40]);
    nested.take(40, world.dialer.pid());
    eventually("a cgroup that is placed", || world.is_open(FIRST).unwrap().then_some(())).unwrap();
    assert!(!world.is_open(SECOND).unwrap());
    drop_into(&world, nested);
    let nested = Nested::below(&world.cgroup, &names);
    // An ancestor is of the name that the policy selects.
    nested.take(55, world.dialer.pid());
    eventually("a cgroup that is placed", || world.is_open(SECOND).unwrap().then_some(())).unwrap();
    drop_into(&world, nested);
    let names: Vec<Vec<u8>> = (1..=70).map(|level| if level == 66 { b"x".to_vec() } else { b"n".to_vec() }).collect();
    let nested = Nested::below(&world.cgroup, &names);
    nested.take(64, world.dialer.pid());
    agent.wait_for("cgroups deeper than level 63 are refused").unwrap();
    assert!(!world.is_open(FIRST).unwrap());
    nested.take(70, world.dialer.pid());
    assert!(!world.is_open(FIRST).unwrap() && !world.is_open(SECOND).unwrap());
    // While the agent is busy, its status is up to a second old.
    let tells = |told: &Value| {
        let degraded = told["degraded"][0].as_str().unwrap_or_default();
        degraded.contains("deeper than level 63") && degraded.contains(&top)
    };
    let status = || Some(world.place.status().unwrap()).filter(|(code, told)| *code == Some(1) && tells(told));
    eventually("a status that tells of it", status).unwrap();
    // Where no policy tells them apart, they are judged as what is above them.
    world.write(&format!("{all}{}", open_for("x", &format!("{top}/**"), SECOND))).unwrap();
    world.place.reload().unwrap();
    assert!(world.is_open(FIRST).unwrap() && world.is_open(SECOND).unwrap());
    eventually("a status that is well", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
    drop_into(&world, nested);
}

/// Moves the process back, so that nested cgroups can be removed.
fn drop_into(world: &world::World, nested: Nested) {
    world.cgroup.take_process(world.dialer.pid()).unwrap();
    drop(nested);
}

/// Names of 255 bytes make a path longer than `PATH_MAX` at the seventeenth level.
#[test]
fn a_path_that_is_too_long_for_a_system_call_holds_no_policy_up() {
    const FIRST: &str = "192.0.2.1";
    const SECOND: &str = "192.0.2.2";
    let mut world = world::World::opening(&[FIRST]).unwrap();
    let top = world.cgroup.name();
    let policies =
        |address: &str| format!("{}{}", world::opening(&[FIRST]), open_for("x", &format!("{top}/**/x"), address));
    world.write(&policies(FIRST)).unwrap();
    let _agent = world.start(&[]).unwrap();
    let mut names = vec![vec![0xfe; 255]; 30];
    names.push(b"x".to_vec());
    let nested = Nested::below(&world.cgroup, &names);
    nested.take(31, world.dialer.pid());
    eventually("a cgroup that is placed", || world.is_open(FIRST).unwrap().then_some(())).unwrap();
    assert!(!world.is_open(SECOND).unwrap());
    world.write(&policies(SECOND)).unwrap();
    world.place.reload().unwrap();
    assert!(world.is_open(SECOND).unwrap());
    let (code, told) = world.place.status().unwrap();
    assert_eq!(code, Some(0), "{told}");
    drop_into(&world, nested);
}
