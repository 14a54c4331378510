//! What is on disk and not in force, and who else judges, is told: by `status`, in the log and by `reload --wait`.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use egress_tests::{
    agent::{Agent, Place, binary},
    eventually,
    world::{World, opening},
};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, unmount},
    process::Signal,
};
use serde_json::Value;

const ONE: &str = "192.0.2.1";
const TWO: &str = "192.0.2.2";
const THREE: &str = "192.0.2.3";

/// A policy of a name that opens only this address.
fn named(name: &str, address: &str) -> String {
    opening(&[address]).replace("name: p", &format!("name: {name}"))
}

fn path(world: &World, name: &str) -> PathBuf {
    world.policies.path().join(name)
}

/// A file that is open for writing, with something in it.
fn begun(path: &Path, text: &str) -> File {
    let mut file = File::create(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file
}

/// Writes to an open file now and then, so that it is never left alone for long.
struct Writer(Option<(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<File>)>);

impl Writer {
    fn new(mut file: File) -> Self {
        let (stop, stopped) = std::sync::mpsc::channel();
        let writing = std::thread::spawn(move || {
            while stopped
                .recv_timeout(Duration::from_millis(500))
                .is_err_and(|error| error.to_string().contains("timed"))
            {
                file.write_all(b"#\n").unwrap();
            }
            file
        });
        Self(Some((stop, writing)))
    }

    fn close(mut self) {
        let (stop, writing) = self.0.take().unwrap();
        drop(stop);
        drop(writing.join().unwrap());
    }
}

fn degraded(told: &Value, what: &str) -> bool {
    told["degraded"].as_array().unwrap().iter().any(|reason| reason.as_str().unwrap().contains(what))
}

/// Waits until the status says something of what is degraded.
fn told(place: &Place, what: &str) -> Value {
    let told = eventually("the status to tell", || {
        let (code, told) = place.status().unwrap();
        (code == Some(1) && degraded(&told, what)).then_some(told)
    });
    told.unwrap()
}

fn healthy(place: &Place) {
    let mut last = Value::Null;
    let is_healthy = eventually("a healthy status", || {
        let (code, told) = place.status().unwrap();
        last = told;
        (code == Some(0)).then_some(())
    });
    assert!(is_healthy.is_ok(), "{last:#}");
}

/// `reload --wait`: its exit status and what it says.
fn reload(place: &Place, more: &[&str]) -> (Option<i32>, String) {
    let output = place.output(&[&["reload", "--wait"], more].concat()).unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_file_that_is_being_written_holds_back_only_itself() {
    let mut world = World::opening(&[ONE]).unwrap();
    fs::write(path(&world, "held.yaml"), named("held", TWO)).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let writer = Writer::new(begun(&path(&world, "held.yaml"), &named("held", THREE)));
    // Others apply at once, and what the open file said before still counts.
    let asked = Instant::now();
    world.open_only(&["198.51.100.1"]).unwrap();
    agent.wait_for("policy applied generation=2 ").unwrap();
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    assert!(world.is_open("198.51.100.1").unwrap() && world.is_open(TWO).unwrap());
    assert!(!world.is_open(ONE).unwrap() && !world.is_open(THREE).unwrap());

    let status = told(&world.place, "the policy on disk is not in force");
    let pending = &status["policy"]["pending"];
    assert!(pending["file"].as_str().unwrap().ends_with("held.yaml"), "{status:#}");
    assert!(pending["since"].is_string() && pending["reason"].as_str().unwrap().contains("open for writing"));
    agent.wait_for("the policy on disk is not in force").unwrap();
    let (code, said) = reload(&world.place, &[]);
    assert!(code == Some(1) && said.contains("held.yaml") && said.contains("open for writing"), "{code:?} {said}");

    writer.close();
    agent.wait_for("policy applied generation=3 ").unwrap();
    assert!(world.is_open(THREE).unwrap() && !world.is_open(TWO).unwrap());
    healthy(&world.place);
    assert_eq!(reload(&world.place, &[]), (Some(0), "generation 3 is in force\n".to_owned()));
    let times = agent.log().iter().filter(|line| line.contains("the policy on disk is not in force")).count();
    assert_eq!(times, 1, "{:#?}", agent.log());
}

#[test]
fn a_new_file_that_is_being_written_is_left_out_after_a_while_and_said() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let writer = Writer::new(begun(&path(&world, "new.yaml"), &named("new", TWO)));
    world.open_only(&[THREE]).unwrap();
    let line = agent.wait_for("until it is closed, it is left out").unwrap();
    assert!(line.contains("WARN") && line.contains("new.yaml"), "{line}");
    agent.wait_for("policy applied generation=2 ").unwrap();
    assert!(world.is_open(THREE).unwrap() && !world.is_open(ONE).unwrap() && !world.is_open(TWO).unwrap());
    let status = told(&world.place, "new.yaml");
    assert!(status["policy"]["pending"]["file"].as_str().unwrap().ends_with("new.yaml"), "{status:#}");
    // Another change does not wait for it once more.
    let asked = Instant::now();
    world.open_only(&[ONE]).unwrap();
    agent.wait_for("policy applied generation=3 ").unwrap();
    assert!(asked.elapsed() < Duration::from_secs(4), "{:?}", asked.elapsed());
    writer.close();
    agent.wait_for("policy applied generation=4 ").unwrap();
    assert!(world.is_open(TWO).unwrap());
    healthy(&world.place);
}

#[test]
fn a_file_that_is_open_and_left_alone_is_read_as_it_stands() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let file = begun(&path(&world, "new.yaml"), &named("new", TWO));
    agent.signal(Signal::HUP).unwrap();
    agent.wait_for("policy applied generation=2 ").unwrap();
    assert!(world.is_open(TWO).unwrap());
    healthy(&world.place);
    drop(file);
}

#[test]
fn an_agent_starts_though_a_file_is_open_for_writing() {
    let mut world = World::opening(&[ONE]).unwrap();
    let file = begun(&path(&world, "new.yaml"), &named("new", TWO));
    let mut agent = world.start(&[]).unwrap();
    assert!(world.is_open(TWO).unwrap());
    agent.stop().unwrap();
    drop(file);

    let writer = Writer::new(begun(&path(&world, "new.yaml"), &named("new", TWO)));
    agent = world.start(&[]).unwrap();
    assert!(world.is_open(ONE).unwrap() && !world.is_open(TWO).unwrap());
    told(&world.place, "new.yaml");
    writer.close();
    agent.wait_for("policy applied generation=2 ").unwrap();
    assert!(world.is_open(TWO).unwrap());
}

/// A file system, unmounted when dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn over(directory: &Path) -> Self {
        mount("tmpfs", directory, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        Self(directory.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Err(error) = unmount(&self.0, UnmountFlags::DETACH) {
            eprintln!("cannot unmount {}: {error}", self.0.display());
        }
    }
}

#[test]
fn a_file_system_that_is_mounted_over_the_policies_is_noticed() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let mounted = Mounted::over(world.policies.path());
    agent.wait_for("policy applied generation=2 documents=0 ").unwrap();
    assert!(!world.is_open(ONE).unwrap());
    world.open_only(&[TWO]).unwrap();
    agent.wait_for("policy applied generation=3 ").unwrap();
    assert!(world.is_open(TWO).unwrap());
    drop(mounted);
    agent.wait_for("policy applied generation=4 ").unwrap();
    assert!(world.is_open(ONE).unwrap() && !world.is_open(TWO).unwrap());
    healthy(&world.place);
}

#[test]
fn whoever_waits_for_a_reload_waits_no_longer_than_asked() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    agent.signal(Signal::STOP).unwrap();
    let (code, said) = reload(&world.place, &["--timeout", "1"]);
    assert!(code == Some(1) && said.contains("after 1 s"), "{code:?} {said}");
    agent.signal(Signal::CONT).unwrap();
    assert_eq!(reload(&world.place, &[]).0, Some(0));
}

/// Other filters that a status tells of.
fn others(told: &Value) -> &Vec<Value> {
    told["others"].as_array().unwrap()
}

#[test]
fn a_set_of_rules_that_another_agent_left_is_told() {
    let mut world = World::opening(&[ONE]).unwrap();
    let (place, narrow) = (Place::new().unwrap(), tempfile::tempdir().unwrap());
    fs::write(narrow.path().join("p.yaml"), opening(&[TWO])).unwrap();
    let first = Agent::start_in(&place, narrow.path(), &world.cgroup, &[]).unwrap();
    let pid = first.pid();
    first.kill().unwrap();
    let mut agent = world.start(&["--default", "Audit"]).unwrap();
    assert!(!world.is_open(ONE).unwrap());
    let line = agent.log().iter().find(|line| line.contains("another filter judges")).cloned();
    assert!(
        line.is_some_and(|line| line.contains("WARN") && line.contains(&format!("pid {pid}"))),
        "{:#?}",
        agent.log()
    );

    let (code, status) = world.place.status().unwrap();
    assert!(code == Some(1) && degraded(&status, "another filter judges"), "{code:?} {status:#}");
    let other = &others(&status)[0];
    assert_eq!((&other["pid"], &other["generation"]), (&pid.into(), &1.into()), "{status:#}");
    assert_eq!(other["cgroup"], world.cgroup.name());
    assert!(other["hooks"].as_array().unwrap().contains(&"connect4".into()), "{status:#}");
    let text = world.place.output(&["status", "--output", "text"]).unwrap();
    assert!(String::from_utf8(text.stdout).unwrap().contains(&format!("pid {pid}")));
    let (code, said) = reload(&world.place, &[]);
    assert!(code == Some(0) && said.contains("another filter judges"), "{code:?} {said}");

    assert_eq!(place.output(&["detach"]).unwrap().status.code(), Some(0));
    healthy(&world.place);
    assert!(world.is_open(ONE).unwrap());
    agent.wait_for("no other filter judges").unwrap();
}

#[test]
fn a_second_agent_is_noticed_by_the_first() {
    let world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    healthy(&world.place);
    let place = Place::new().unwrap();
    let _second = Agent::start_in(&place, world.policies.path(), &world.cgroup, &[]).unwrap();
    agent.wait_for("another filter judges").unwrap();
    told(&world.place, "another filter judges");
    told(&place, "another filter judges");
}

#[test]
fn a_command_below_a_daemon_is_told_who_else_judges_it() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    let exec = |args: &[&str]| {
        let mut command = world.namespace.command(binary().unwrap(), Some(&world.cgroup)).unwrap();
        world.place.tell(&mut command);
        command.arg("exec").args(args).env_remove("SUDO_UID").env_remove("SUDO_GID");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    };
    let mut child = exec(&["--default", "Allow", "--", "cat"]);
    // The daemon's own view: below it is no other's business.
    assert_eq!(world.place.status().unwrap().0, Some(0));
    drop(child.stdin.take());
    let ended = child.wait_with_output().unwrap();
    let said = String::from_utf8(ended.stderr).unwrap();
    let lines: Vec<&str> = said.lines().filter(|line| line.contains("another filter judges")).collect();
    assert_eq!(lines.len(), 1, "{said}");
    assert!(lines[0].contains(&format!("pid {}", agent.pid())) && lines[0].contains(&world.cgroup.name()), "{said}");

    let mut child = exec(&["--output", "json", "--", env!("CARGO_BIN_EXE_dial")]);
    let mut calls = child.stdin.take().unwrap();
    writeln!(calls, "tcp plain {TWO}:80").unwrap();
    drop(calls);
    let said = String::from_utf8(child.wait_with_output().unwrap().stderr).unwrap();
    let summary =
        said.lines().find_map(|line| serde_json::from_str::<Value>(line).ok().filter(|told| told["type"] == "summary"));
    let summary = summary.unwrap_or_else(|| panic!("{said}"));
    assert_eq!(summary["filters"][0]["pid"], agent.pid(), "{summary:#}");
}
