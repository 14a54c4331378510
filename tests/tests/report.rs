//! Reports never stand in the way of enforcement.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use egress_tests::{
    agent::{Agent, Place, binary, run_command},
    cgroup::Cgroup,
    dial::{Call, Dialer, Method, Timed},
    netns::Netns,
};
use rustix::{io::Errno, pipe::fcntl_setpipe_size};

const ENTRY: &str = "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: a }\n\
                     spec: { hosts: [a.example.com], addresses: [192.0.2.1], ports: [{ number: 80, name: http }] }\n";

fn call(method: Method) -> Call {
    Call { method, mapped: false, to: "192.0.2.1:80".parse().unwrap() }
}

#[test]
fn a_reader_that_stalls_delays_no_change_of_policy() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let place = Place::new().unwrap();
    let mut command = run_command(policies.path(), cgroup.path(), &[]).unwrap();
    place.tell(&mut command);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut agent = command.spawn().unwrap();
    let (mut stdout, stderr) = (agent.stdout.take().unwrap(), agent.stderr.take().unwrap());
    fcntl_setpipe_size(&stdout, 4096).unwrap();
    let mut log = BufReader::new(stderr).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("policy applied generation=1 ")));

    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
    for _ in 0..1_000 {
        assert!(dialer.is_refused(&call(Method::UdpConnect)).unwrap());
    }
    fs::write(policies.path().join("a.yaml"), ENTRY).unwrap();
    assert!(log.any(|line| line.contains("policy applied generation=2 ")));
    assert!(!dialer.is_refused(&call(Method::TcpConnect)).unwrap());

    // Nothing is lost: all of it waited in the ring buffer.
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text.lines().count()
    });
    let pid = rustix::process::Pid::from_raw(i32::try_from(agent.id()).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(agent.wait().unwrap().code(), Some(0));
    assert_eq!(reader.join().unwrap(), 1_000);
}

#[test]
fn every_kind_of_call_is_reported_with_its_hook() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
    let (v4, v6) = ("192.0.2.1:80", "[2001:db8::1]:80");
    for (method, mapped, to, hook, protocol) in [
        (Method::TcpConnect, false, v4, "connect4", "TCP"),
        (Method::TcpConnect, true, v4, "connect6", "TCP"),
        (Method::TcpConnect, false, v6, "connect6", "TCP"),
        (Method::UdpConnect, false, v4, "connect4", "UDP"),
        (Method::UdpSend, false, v4, "sendmsg4", "UDP"),
        (Method::UdpSend, false, v6, "sendmsg6", "UDP"),
    ] {
        let call = Call { method, mapped, to: to.parse().unwrap() };
        assert_eq!(dialer.call(&call).unwrap(), Errno::PERM.raw_os_error(), "{call}");
        let denial = agent.denial().unwrap();
        assert_eq!((&denial["hook"], &denial["protocol"]), (&hook.into(), &protocol.into()), "{denial}");
        assert_eq!(denial["errno"], "EPERM");
        assert_eq!(denial["process"]["exe"], env!("CARGO_BIN_EXE_dial"));
        assert_eq!(denial["process"]["ppid"], std::process::id());
        assert_eq!(denial["cgroup"]["path"], cgroup.name());
        assert!(denial["time"].as_str().unwrap().ends_with('Z'));
    }
    agent.stop().unwrap();
}

/// Bytes that are no text, in a program's name and in a cgroup's, must not silence the reports.
#[test]
fn names_that_are_not_text_are_reported() {
    use std::{ffi::OsStr, os::unix::ffi::OsStrExt};
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let odd = directory.path().join(OsStr::from_bytes(b"dial\xff"));
    fs::copy(env!("CARGO_BIN_EXE_dial"), &odd).unwrap();
    for _ in 0..2 {
        let mut dialer = Dialer::start(&odd, &cgroup, &namespace).unwrap();
        assert!(dialer.is_refused(&call(Method::UdpConnect)).unwrap());
        let denial = agent.denial().unwrap();
        assert!(denial["process"]["exe"].as_str().unwrap().ends_with("dial\\xff"), "{denial}");
    }
}

#[test]
fn a_full_disk_is_no_end_of_reports() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" > /dev/full", "sh"]).arg(binary().unwrap());
    command.arg("run").arg("--policies").arg(policies.path()).arg("--cgroup").arg(cgroup.path());
    let mut agent = Agent::spawn(command).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
    for lost in 1..=3 {
        assert!(dialer.is_refused(&call(Method::UdpConnect)).unwrap());
        agent.wait_for(&format!("lost={lost}")).unwrap();
    }
    assert_eq!(agent.stop().unwrap().0.code(), Some(0));
}

#[test]
fn denials_without_room_are_counted_and_told() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let place = Place::new().unwrap();
    let mut command = run_command(policies.path(), cgroup.path(), &[]).unwrap();
    place.tell(&mut command);
    let mut agent = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(agent.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(log.any(|line| line.contains("policy applied generation=1 ")));
    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
    dialer.time(Timed::Connect, &call(Method::UdpConnect), 30_000).unwrap();
    assert!(log.any(|line| line.contains("denials were not reported") && line.contains("WARN")));
    agent.kill().unwrap();
    agent.wait().unwrap();
}

/// In a pid namespace of its own the agent sees other processes under the numbers that the kernel reports.
#[test]
fn another_process_of_the_same_number_is_not_blamed() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let policies = tempfile::tempdir().unwrap();
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount-proc"]).arg(binary().unwrap());
    command
        .arg("run")
        .arg("--policies")
        .arg(policies.path())
        .arg("--cgroup")
        .arg(cgroup.path())
        .args(["--output", "json"]);
    let mut agent = Agent::spawn(command).unwrap();
    agent.wait_for("not in the host's pid namespace").unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
    assert!(dialer.is_refused(&call(Method::UdpConnect)).unwrap());
    let denial = agent.denial().unwrap();
    assert_eq!(denial["process"]["comm"], "dial");
    assert!(denial["process"].get("exe").is_none() && denial["process"].get("ppid").is_none(), "{denial}");
}
