//! The agent beside programs of somebody else: who runs first, what is judged then, and where there is no room for two.
//!
//! The kernel asks every program of a socket's cgroups, the innermost cgroup first, on one cgroup in the order in which
//! they were attached, and each sees the destination that the one before it left. One refusal is enough.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, File},
    net::{SocketAddr, SocketAddrV4, TcpListener, UdpSocket},
    os::fd::AsFd,
    path::Path,
    time::Duration,
};

use egress_tests::{
    actor::{Actor, Outcome},
    agent::{Agent, run_command},
    cgroup::Cgroup,
    foreign::{Hook, How, Program},
    netns::Netns,
};
use rustix::{
    io::Errno,
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tempfile::TempDir;

const REFUSED: Outcome = Err(Errno::PERM);

/// The destination that processes dial, as the address of a service is.
fn service() -> SocketAddrV4 {
    "192.0.2.1:80".parse().unwrap()
}

/// Where a foreign program sends them.
fn backend() -> SocketAddrV4 {
    "192.0.2.2:8080".parse().unwrap()
}

/// A policy directory that opens one destination.
fn open_only(to: SocketAddrV4) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("policy.yaml"), policy(to)).unwrap();
    directory
}

fn policy(to: SocketAddrV4) -> String {
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\n\
         spec: {{ allow: [{{ to: [{{ cidr: {}/32 }}], ports: [{{ port: {}, protocol: Any }}] }}] }}\n",
        to.ip(),
        to.port()
    )
}

/// Sends TCP and UDP for the service to the backend.
fn rewrite_in(cgroup: &Cgroup, how: How) -> impl Sized {
    BOTH.map(|hook| Program::rewrite(hook, service(), backend()).unwrap().attach(cgroup, how).unwrap())
}

const BOTH: [Hook; 2] = [Hook::Connect4, Hook::Sendmsg4];

/// The backend's sockets, which show where a call went.
struct Backend {
    tcp: TcpListener,
    udp: UdpSocket,
}

impl Backend {
    fn new(namespace: &Netns) -> Self {
        let file = File::open(Path::new("/run/netns").join(namespace.name())).unwrap();
        // Sockets stay in the network namespace of the thread that made them.
        let made = std::thread::spawn(move || {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            Self { tcp: TcpListener::bind(backend()).unwrap(), udp: UdpSocket::bind(backend()).unwrap() }
        });
        let made = made.join().unwrap();
        made.tcp.set_nonblocking(true).unwrap();
        made.udp.set_nonblocking(true).unwrap();
        made
    }

    /// Whether a TCP connection and a datagram came since the last time. Both are there when the caller's call returns.
    fn was_called(&self) -> [bool; 2] {
        [self.tcp.accept().is_ok(), self.udp.recv(&mut [0; 8]).is_ok()]
    }
}

/// TCP and UDP to the service.
fn dial(actor: &mut Actor) -> [Outcome; 2] {
    [actor.dial_tcp(service().into()).unwrap(), actor.send_udp(service().into()).unwrap()]
}

/// The destinations of the next two denials.
fn denied(agent: &mut Agent) -> [SocketAddr; 2] {
    [agent.denial().unwrap(), agent.denial().unwrap()].map(|denial| {
        let destination = &denial["destination"];
        format!("{}:{}", destination["address"].as_str().unwrap(), destination["port"]).parse().unwrap()
    })
}

/// Both calls arrive where `judged` is what the policy opens, and are refused with its name where it opens the other.
#[track_caller]
fn judges(judged: SocketAddrV4, agent: &mut Agent, policies: &TempDir, actor: &mut Actor, there: &Backend) {
    let other = if judged == service() { backend() } else { service() };
    assert_eq!(dial(actor), [Ok(()); 2], "the policy opens {judged}");
    assert_eq!(there.was_called(), [true; 2]);
    fs::write(policies.path().join("policy.yaml"), policy(other)).unwrap();
    agent.wait_for("policy applied generation=2 ").unwrap();
    assert_eq!(dial(actor), [REFUSED; 2], "the policy opens {other}");
    assert_eq!(denied(agent), [judged.into(); 2]);
    assert_eq!(there.was_called(), [false; 2]);
}

#[test]
fn a_destination_that_a_child_rewrote_is_judged() {
    for how in [How::Link, How::Multi, How::Override, How::Exclusive] {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let child = cgroup.child("child").unwrap();
        let policies = open_only(backend());
        let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
        // Whoever wants the child for itself does not get rid of the agent above.
        let _rewrite = rewrite_in(&child, how);
        let mut actor = Actor::start(&namespace, &child, None).unwrap();
        judges(backend(), &mut agent, &policies, &mut actor, &Backend::new(&namespace));
    }
}

#[test]
fn a_destination_that_an_ancestor_rewrites_is_judged_before() {
    for how in [How::Link, How::Multi] {
        let (outer, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let cgroup = outer.child("inner").unwrap();
        let _rewrite = rewrite_in(&outer, how);
        let policies = open_only(service());
        let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
        let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
        judges(service(), &mut agent, &policies, &mut actor, &Backend::new(&namespace));
    }
}

#[test]
fn on_one_cgroup_the_program_attached_first_runs_first() {
    for how in [How::Link, How::Multi] {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
        let there = Backend::new(&namespace);

        let policies = open_only(backend());
        let rewrite = rewrite_in(&cgroup, how);
        let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
        judges(backend(), &mut agent, &policies, &mut actor, &there);
        drop((agent, rewrite));

        let policies = open_only(service());
        let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
        let rewrite = rewrite_in(&cgroup, how);
        judges(service(), &mut agent, &policies, &mut actor, &there);

        // An agent that starts again is the last in the row: another destination is judged.
        agent.stop().unwrap();
        let policies = open_only(backend());
        let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
        judges(backend(), &mut agent, &policies, &mut actor, &there);
        drop(rewrite);
    }
}

#[test]
fn one_refusal_is_enough_whoever_runs_first() {
    let (outer, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let cgroup = outer.child("inner").unwrap();
    let child = cgroup.child("child").unwrap();
    let policies = open_only(backend());
    let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
    let mut actor = Actor::start(&namespace, &child, None).unwrap();
    let _backend = Backend::new(&namespace);
    let mut dial = |to: SocketAddrV4| [actor.dial_tcp(to.into()).unwrap(), actor.send_udp(to.into()).unwrap()];
    for place in [&outer, &cgroup, &child] {
        let pass = BOTH.map(|hook| Program::pass(hook).unwrap().attach(place, How::Link).unwrap());
        assert_eq!(dial(backend()), [Ok(()); 2]);
        assert_eq!(dial(service()), [REFUSED; 2]);
        assert_eq!(denied(&mut agent), [service().into(); 2]);
        drop(pass);

        let refuse = BOTH.map(|hook| Program::refuse(hook).unwrap().attach(place, How::Link).unwrap());
        assert_eq!(dial(backend()), [REFUSED; 2]);
        assert!(agent.is_silent_for(Duration::from_millis(50)), "the agent reports what others refused");
        // It reports its own refusals, also of what another refused before.
        assert_eq!(dial(service()), [REFUSED; 2]);
        assert_eq!(denied(&mut agent), [service().into(); 2]);
        drop(refuse);
        assert_eq!(dial(backend()), [Ok(()); 2]);
    }
}

/// The start fails: the kernel leaves no room for the hook.
#[track_caller]
fn does_not_start(cgroup: &Cgroup, hook: &str) {
    let policies = open_only(backend());
    let mut agent = Agent::spawn(run_command(policies.path(), cgroup.path(), &[]).unwrap()).unwrap();
    let status = agent.exit_status().unwrap();
    let log = agent.rest().unwrap().1.join("\n");
    assert_eq!(status.code(), Some(4), "{log}");
    let attach = format!("cannot attach {hook} to cgroup {}", cgroup.name());
    let said = |line: &str| line.contains("ERROR") && line.contains(&attach) && line.contains("not permitted");
    assert!(log.lines().any(said), "{log}");
    assert!(!log.contains("policy applied"), "{log}");
}

#[test]
fn below_a_program_that_wants_to_be_alone_the_agent_does_not_start() {
    for (hook, name) in [(Hook::Connect4, "connect4"), (Hook::Sendmsg4, "sendmsg4")] {
        let outer = Cgroup::new().unwrap();
        let inner = outer.child("inner").unwrap();
        let cgroup = inner.child("inmost").unwrap();
        let alone = Program::pass(hook).unwrap().attach(&outer, How::Exclusive).unwrap();
        does_not_start(&cgroup, name);
        drop(alone);
        Agent::start(open_only(backend()).path(), &cgroup, &[]).unwrap();
    }
}

#[test]
fn beside_a_program_that_is_alone_on_its_cgroup_the_agent_does_not_start() {
    for how in [How::Exclusive, How::Override] {
        let cgroup = Cgroup::new().unwrap();
        let alone = Program::pass(Hook::Connect4).unwrap().attach(&cgroup, how).unwrap();
        does_not_start(&cgroup, "connect4");
        drop(alone);
        Agent::start(open_only(backend()).path(), &cgroup, &[]).unwrap();
    }
}

/// `BPF_F_ALLOW_OVERRIDE`: a program below takes the place of the one above, which is not asked there any more.
#[test]
fn below_a_program_that_may_be_overridden_the_agent_takes_its_place() {
    let (outer, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let [cgroup, sibling] = ["inner", "sibling"].map(|name| outer.child(name).unwrap());
    let _refuse = BOTH.map(|hook| Program::refuse(hook).unwrap().attach(&outer, How::Override).unwrap());
    let _backend = Backend::new(&namespace);
    let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
    let mut other = Actor::start(&namespace, &sibling, None).unwrap();
    let to = backend().into();
    assert_eq!(actor.dial_tcp(to).unwrap(), REFUSED);
    let policies = open_only(backend());
    let agent = Agent::start(policies.path(), &cgroup, &["--detach-on-exit"]).unwrap();
    assert_eq!((actor.dial_tcp(to).unwrap(), actor.send_udp(to).unwrap()), (Ok(()), Ok(())));
    assert_eq!((other.dial_tcp(to).unwrap(), other.send_udp(to).unwrap()), (REFUSED, REFUSED));
    agent.stop().unwrap();
    assert_eq!((actor.dial_tcp(to).unwrap(), actor.send_udp(to).unwrap()), (REFUSED, REFUSED));
}

/// The agent was first: whatever is attached above it later has to bear it, but a start after that finds the door shut.
#[test]
fn a_program_that_comes_later_does_not_stop_the_filter() {
    for how in [How::Exclusive, How::Override] {
        let (outer, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let cgroup = outer.child("inner").unwrap();
        let mut agent = Agent::start(open_only(backend()).path(), &cgroup, &[]).unwrap();
        let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
        let same = Program::pass(Hook::Connect4).unwrap().attach(&cgroup, how).unwrap_err();
        assert_eq!(Errno::from_io_error(&same), Some(Errno::PERM));

        let _rewrite = rewrite_in(&outer, how);
        let there = Backend::new(&namespace);
        assert_eq!(dial(&mut actor), [REFUSED; 2]);
        assert_eq!(denied(&mut agent), [service().into(); 2]);
        assert_eq!(there.was_called(), [false; 2]);
        agent.stop().unwrap();
        if how == How::Exclusive {
            does_not_start(&cgroup, "connect4");
        } else {
            Agent::start(open_only(backend()).path(), &cgroup, &[]).unwrap();
        }
    }
}
