//! Limits of the system are raised, or told by their name, and what they cost passes.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    process::{Child, Stdio},
};

use egress_agent::control::socket;
use egress_tests::{
    agent::{Agent, Place, binary},
    cgroup::Cgroup,
    eventually,
    netns::Netns,
    world::World,
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tempfile::TempDir;

const ONE: &str = "192.0.2.1";

fn pid(agent: &Agent) -> Pid {
    Pid::from_raw(i32::try_from(agent.pid()).unwrap()).unwrap()
}

/// The limits of open files of a process, as `/proc` tells them.
fn open_files(limits: &str) -> (String, String) {
    let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let mut words = line.split_whitespace().skip(3).map(str::to_owned);
    (words.next().unwrap(), words.next().unwrap())
}

/// Has a command start with few descriptors, and a higher hard limit.
fn with_few_descriptors(mut command: std::process::Command) -> std::process::Command {
    use std::os::unix::process::CommandExt;
    let few = || {
        let limit = Rlimit { current: Some(1024), maximum: Some(4096) };
        Ok(rustix::process::setrlimit(Resource::Nofile, limit)?)
    };
    // SAFETY: between fork and exec the closure makes one system call.
    unsafe { command.pre_exec(few) };
    command
}

#[test]
fn the_agent_takes_as_many_descriptors_as_it_may() {
    let world = World::opening(&[ONE]).unwrap();
    let mut agent = Agent::spawn_in(Some(&world.place), with_few_descriptors(world.command(&[]).unwrap())).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
    assert_eq!(open_files(&limits), ("4096".to_owned(), "4096".to_owned()));
}

#[test]
fn a_command_has_the_limits_of_whoever_started_it() {
    let host = Host::new();
    let mut command = with_few_descriptors(host.exec(&["cat", "/proc/self/limits"]));
    let ended = command.output().unwrap();
    let limits = String::from_utf8(ended.stdout).unwrap();
    assert_eq!(open_files(&limits), ("1024".to_owned(), "4096".to_owned()));
}

#[test]
fn an_agent_without_descriptors_answers_again_once_it_has_some() {
    let world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let limits = fs::read_to_string(format!("/proc/{}/limits", agent.pid())).unwrap();
    let maximum = open_files(&limits).1.parse().ok();
    prlimit(Some(pid(&agent)), Resource::Nofile, Rlimit { current: Some(3), maximum }).unwrap();
    let socket = socket(&world.place.run_directory(), &world.place.pins());
    let mut waiting: Vec<UnixStream> = (0..8).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let line = agent.wait_for("cannot accept clients").unwrap();
    assert!(line.contains("WARN"), "{line}");
    for client in &mut waiting {
        client.write_all(b"{\"command\":\"status\"}\n").unwrap();
    }
    prlimit(Some(pid(&agent)), Resource::Nofile, Rlimit { current: maximum, maximum }).unwrap();
    for client in waiting {
        let mut answer = String::new();
        BufReader::new(client).read_line(&mut answer).unwrap();
        assert!(answer.contains("\"since\""), "{answer}");
    }
    eventually("a healthy status", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
    let told = agent.log().iter().filter(|line| line.contains("cannot accept clients")).count();
    assert_eq!(told, 1);
}

#[test]
fn clients_that_say_nothing_take_only_so_many_descriptors() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    let descriptors = || fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    let before = descriptors();
    let socket = socket(&world.place.run_directory(), &world.place.pins());
    let silent: Vec<UnixStream> = (0..300).map(|_| UnixStream::connect(&socket).unwrap()).collect();
    let more = eventually("clients", || Some(descriptors() - before).filter(|&more| more >= 60)).unwrap();
    assert!(more <= 70, "{more}");
    drop(silent);
    eventually("a healthy status", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
}

/// Where commands are run.
struct Host {
    place: Place,
    namespace: Netns,
    cgroup: Cgroup,
    files: TempDir,
}

impl Host {
    fn new() -> Self {
        let (place, namespace) = (Place::new().unwrap(), Netns::with_every_address_local().unwrap());
        Self { place, namespace, cgroup: Cgroup::new().unwrap(), files: tempfile::tempdir().unwrap() }
    }

    fn exec(&self, command: &[&str]) -> std::process::Command {
        let mut exec = self.namespace.command(binary().unwrap(), Some(&self.cgroup)).unwrap();
        self.place.tell(&mut exec);
        exec.arg("exec").arg("--policies").arg(self.policy()).arg("--").args(command);
        exec.env_remove("SUDO_UID").env_remove("SUDO_GID");
        exec.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        exec
    }

    fn policy(&self) -> PathBuf {
        let path = self.files.path().join("p.yaml");
        if !path.exists() {
            fs::write(&path, egress_tests::world::opening(&[ONE])).unwrap();
        }
        path
    }
}

/// A command that waits for its end, and has begun.
fn waiting(host: &Host) -> Child {
    let mut child = host.exec(&["sh", "-c", "echo begun; cat"]).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    if line != "begun\n" {
        let ended = child.wait_with_output().unwrap();
        panic!("{}", String::from_utf8_lossy(&ended.stderr));
    }
    child
}

#[test]
fn sixty_commands_run_at_a_time_without_a_queue_of_inotify() {
    let host = Host::new();
    let mut running: Vec<Child> = Vec::new();
    for _ in 0..64 {
        running.push(waiting(&host));
    }
    let last = running.last().unwrap();
    let descriptors = fs::read_dir(format!("/proc/{}/fd", last.id())).unwrap();
    let targets = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
    let queues = targets.filter(|target| target.to_string_lossy().contains("inotify")).count();
    assert_eq!(queues, 0);
    for mut child in running {
        drop(child.stdin.take());
        assert!(child.wait().unwrap().success());
    }
}
