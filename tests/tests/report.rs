//! Reports never stand in the way of enforcement.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::{Command, Stdio},
};

use egress_tests::{
    agent::{Agent, binary},
    cgroup::Cgroup,
    dial::{Call, Dialer, Method},
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
    let mut command = Command::new(binary().unwrap());
    command.arg("run").arg("--policies").arg(policies.path()).arg("--cgroup").arg(cgroup.path());
    command.args(["--output", "json"]).stdout(Stdio::piped()).stderr(Stdio::piped());
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
