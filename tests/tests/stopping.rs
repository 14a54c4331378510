//! Nobody behind a socket of the agent's stops it, and it ends when it is asked to, whatever it is doing.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fmt::Write as _,
    fs, io,
    net::UdpSocket,
    os::unix::{net::UnixDatagram, process::CommandExt},
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use egress_tests::{PATIENCE, agent::Agent, eventually, world::World};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

const ONE: &str = "192.0.2.1";
const TWO: &str = "192.0.2.2";

/// What the issue names is one second; the rest is for a machine that is busy.
const SOON: Duration = Duration::from_millis(1900);

/// Takes seconds to be put in force, by an agent that is not optimized.
fn large() -> String {
    let mut text =
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: large }\nspec:\n  allow:\n"
            .to_owned();
    for index in 0..300_000_u32 {
        let _ = writeln!(text, "  - to: [{{ cidr: 10.{}.{}.{} }}]", index >> 16, index >> 8 & 255, index & 255);
    }
    text
}

fn degraded(status: &Value, what: &str) -> bool {
    status["degraded"].as_array().unwrap().iter().any(|reason| reason.as_str().unwrap().contains(what))
}

/// A service manager that reads only when it is told to.
struct Manager {
    socket: UnixDatagram,
    directory: tempfile::TempDir,
}

impl Manager {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = UnixDatagram::bind(directory.path().join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { socket, directory }
    }

    fn start(&self, world: &World) -> Agent {
        let mut command = world.command(&[]).unwrap();
        command.env("NOTIFY_SOCKET", self.path());
        let mut agent = Agent::spawn_in(Some(&world.place), command).unwrap();
        agent.wait_for("policy applied generation=1 ").unwrap();
        agent
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("notify")
    }

    /// Reads until it is told something.
    fn reads(&self, what: &str) {
        let deadline = Instant::now() + PATIENCE;
        let mut buffer = [0; 4096];
        while Instant::now() < deadline {
            let length = self.socket.recv(&mut buffer).unwrap();
            if String::from_utf8_lossy(&buffer[..length]).contains(what) {
                return;
            }
        }
        panic!("the service manager was not told {what}");
    }
}

#[test]
fn a_service_manager_that_does_not_read_stops_nothing() {
    let mut world = World::opening(&[ONE]).unwrap();
    let manager = Manager::new();
    let mut agent = manager.start(&world);
    for generation in 2..16 {
        let (open, closed) = if generation % 2 == 0 { (TWO, ONE) } else { (ONE, TWO) };
        world.open_only(&[open]).unwrap();
        agent.wait_for(&format!("policy applied generation={generation} ")).unwrap();
        assert!(world.is_open(open).unwrap() && !world.is_open(closed).unwrap());
    }
    assert_eq!(world.place.reload().unwrap(), 15);
    let told = eventually("the status to tell", || {
        let (code, told) = world.place.status().unwrap();
        degraded(&told, "has not read its notifications").then_some((code, told))
    });
    let (code, told) = told.unwrap();
    assert_eq!(code, Some(1), "{told:#}");

    manager.reads("READY=1\nSTATUS=generation 15");
    eventually("a healthy status", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
}

#[test]
fn an_agent_whose_service_manager_does_not_read_ends_when_it_is_asked() {
    let world = World::opening(&[ONE]).unwrap();
    let manager = Manager::new();
    let agent = manager.start(&world);
    // Until there is no room, which is from the sixth change on, if not before.
    for generation in 2..12 {
        world.open_only(&[if generation % 2 == 0 { TWO } else { ONE }]).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }
    ends_soon(agent);
}

fn ends_soon(mut agent: Agent) {
    let asked = Instant::now();
    agent.signal(Signal::TERM).unwrap();
    let status = agent.exit_status().unwrap();
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
    assert_eq!(status.code(), Some(0));
}

#[test]
fn status_is_answered_and_sigterm_obeyed_while_a_large_policy_is_put_in_force() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    fs::write(world.policies.path().join("large.yaml"), large()).unwrap();
    let told = eventually("a change that is under way", || {
        let (_, told) = world.place.status().unwrap();
        told["policy"]["changing_since"].is_string().then_some(told)
    });
    let told = told.unwrap();
    assert!(told["agent"]["since"].is_string() && !degraded(&told, "does not answer"), "{told:#}");
    assert_eq!(told["policy"]["generation"], 1);
    ends_soon(agent);
}

/// For process 1 of a container signals have no default; there the agent waits for the addresses of a name.
#[test]
fn an_agent_that_starts_as_process_1_ends_when_it_is_asked() {
    let world = World::opening(&[ONE]).unwrap();
    let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    let entry = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: named }\nspec: { hosts: [n.example.com], \
                 resolution: DNS, ports: [{ number: 80, name: http }] }\n";
    fs::write(world.policies.path().join("named.yaml"), entry).unwrap();
    let run = world.command(&["--resolve-wait", "50"]).unwrap();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child"]).arg(run.get_program()).args(run.get_args());
    world.place.tell(&mut command);
    command.env("EGRESS_RESOLVER", silent.local_addr().unwrap().to_string());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    let mut unshare = command.spawn().unwrap();
    silent.recv(&mut [0; 512]).unwrap();
    let children = format!("/proc/{0}/task/{0}/children", unshare.id());
    let agent: i32 = fs::read_to_string(children).unwrap().trim().parse().unwrap();
    let asked = Instant::now();
    kill_process(Pid::from_raw(agent).unwrap(), Signal::TERM).unwrap();
    let ended = eventually("the agent's end", || unshare.try_wait().transpose());
    if ended.is_err() {
        kill_process(Pid::from_raw(agent).unwrap(), Signal::KILL).unwrap();
    }
    assert_eq!(ended.unwrap().unwrap().code(), Some(0));
    assert!(asked.elapsed() < SOON, "{:?}", asked.elapsed());
}

/// Stops one thread of a process for as long as it lives, and no other.
struct Halted(libc::pid_t);

impl Halted {
    fn new(thread: u32) -> Self {
        let thread = libc::pid_t::try_from(thread).unwrap();
        // SAFETY: the calls take numbers; nothing of the memory of either process is touched.
        unsafe {
            assert_eq!(libc::ptrace(libc::PTRACE_SEIZE, thread, 0, 0), 0, "{}", io::Error::last_os_error());
            assert_eq!(libc::ptrace(libc::PTRACE_INTERRUPT, thread, 0, 0), 0, "{}", io::Error::last_os_error());
            assert_eq!(libc::waitpid(thread, std::ptr::null_mut(), libc::__WALL), thread);
        }
        Self(thread)
    }
}

impl Drop for Halted {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { libc::ptrace(libc::PTRACE_DETACH, self.0, 0, 0) };
    }
}

#[test]
fn an_agent_that_answers_and_follows_nothing_is_no_healthy_one() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    assert_eq!(world.place.status().unwrap().0, Some(0));
    let halted = Halted::new(agent.pid());
    let told = eventually("the status to tell", || {
        let (code, told) = world.place.status().unwrap();
        (code != Some(0)).then_some(told)
    });
    let told = told.unwrap();
    assert!(degraded(&told, "has followed nothing for"), "{told:#}");
    assert!(!world.place.probe("Live").unwrap().0);
    drop(halted);
    eventually("a healthy status", || (world.place.status().unwrap().0 == Some(0)).then_some(())).unwrap();
    assert!(world.place.probe("Live").unwrap().0);
}
