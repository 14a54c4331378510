//! `existing: Terminate`: connections that are open when a policy comes to refuse them.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::Read as _,
    net::{SocketAddr, TcpListener, TcpStream},
    time::Duration,
};

use egress_agent::sock_diag::{Kind, SockDiag, state};
use egress_tests::{
    actor::{Actor, On, Who},
    agent::Agent,
    cgroup::Cgroup,
    dial::{Call, Method},
    dnsmasq::Dnsmasq,
    eventually,
    netns::Netns,
};
use tempfile::TempDir;

const ONE: &str = "192.0.2.1:80";
const TWO: &str = "192.0.2.2:80";

/// A cgroup with two processes, in a network namespace that is not the agent's, each with a TCP connection to a server of its
/// own outside the cgroup.
struct Scene {
    actors: [Actor; 2],
    servers: [TcpStream; 2],
    policies: TempDir,
    namespace: Netns,
    cgroup: Cgroup,
}

impl Scene {
    fn new() -> Self {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let [(one, at_one), (two, at_two)] = [ONE, TWO].map(|to| {
            let listener = namespace.run(|| TcpListener::bind(to).unwrap()).unwrap();
            let mut actor = Actor::start(&namespace, &cgroup, None).unwrap();
            actor.make_socket().unwrap();
            actor.dial_with_made_socket(address(to)).unwrap().unwrap();
            (actor, listener.accept().unwrap().0)
        });
        let policies = tempfile::tempdir().unwrap();
        Self { actors: [one, two], servers: [at_one, at_two], policies, namespace, cgroup }
    }

    fn write(&self, spec: &str) {
        let text = format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec: {{ {spec} }}\n"
        );
        fs::write(self.policies.path().join("policy.yaml"), text).unwrap();
    }

    fn start(&self, spec: &str) -> Agent {
        self.write(spec);
        Agent::start(self.policies.path(), &self.cgroup, &["--no-dns"]).unwrap()
    }

    fn change(&self, agent: &mut Agent, spec: &str, generation: u32) {
        self.write(spec);
        agent.wait_for(&format!("policy applied generation={generation} ")).unwrap();
    }

    /// Whether each of the TCP connections is still there, seen from its server.
    fn alive(&mut self) -> [bool; 2] {
        self.servers.each_mut().map(is_alive)
    }
}

fn is_alive(stream: &mut TcpStream) -> bool {
    stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
    matches!(stream.read(&mut [0; 8]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

const OPEN_BOTH: &str = "allow: [{ to: [{ cidr: 192.0.2.0/24 }] }]";
const OPEN_TWO: &str = "allow: [{ to: [{ cidr: 192.0.2.2/32 }] }]";

#[test]
fn what_a_policy_comes_to_refuse_is_ended_and_what_it_allows_lives() {
    let mut scene = Scene::new();
    let mut agent = scene.start(&format!("existing: Terminate, {OPEN_BOTH}"));
    assert_eq!(scene.alive(), [true, true]);
    scene.change(&mut agent, &format!("existing: Terminate, {OPEN_TWO}"), 2);
    let line = agent.wait_for("connection terminated").unwrap();
    assert!(line.contains("destination=192.0.2.1:80") && line.contains("rule=\"default\""), "{line}");
    assert_eq!(scene.alive(), [false, true]);
}

#[test]
fn what_was_open_before_the_agent_is_ended_at_its_start() {
    let mut scene = Scene::new();
    let mut agent = scene.start("existing: Terminate, deny: [{ to: [{ cidr: 192.0.2.1/32 }] }], defaultAction: Allow");
    // It is told before the agent is ready.
    let log = agent.log().join("\n");
    assert!(log.contains("connection terminated") && log.contains("EgressPolicy/default/p deny[0]"), "{log}");
    assert_eq!(scene.alive(), [false, true]);
}

#[test]
fn connections_are_kept_where_no_enforcing_policy_says_otherwise() {
    let mut scene = Scene::new();
    let mut agent = scene.start("existing: Terminate, defaultAction: Allow");
    for (spec, generation) in [("defaultAction: Deny", 2), ("mode: Audit, existing: Terminate", 3)] {
        scene.change(&mut agent, spec, generation);
        assert_eq!(scene.alive(), [true, true], "{spec}");
    }
    // It is not that nothing can end them.
    scene.change(&mut agent, "existing: Terminate", 4);
    agent.wait_for("connections that the policy refuses were terminated").unwrap();
    assert_eq!(scene.alive(), [false, false]);
}

#[test]
fn a_connected_udp_socket_is_no_longer_connected() {
    let mut scene = Scene::new();
    for (actor, to) in scene.actors.iter_mut().zip(["203.0.113.1:53", "[2001:db8::1]:53"]) {
        let call = Call { method: Method::UdpConnect, mapped: false, to: address(to) };
        actor.call(Who::Main, On::Made, &call).unwrap().unwrap();
    }
    let connected = |scene: &Scene| {
        let find = || SockDiag::open().unwrap().sockets(Kind::Udp, &[state::ESTABLISHED]).unwrap();
        scene.namespace.run(find).unwrap().len()
    };
    assert_eq!(connected(&scene), 2);
    let _agent = scene.start(&format!("existing: Terminate, {OPEN_BOTH}"));
    eventually("the end of both", || (connected(&scene) == 0).then_some(())).unwrap();
    assert_eq!(scene.alive(), [true, true]);
}

#[test]
fn what_a_server_accepted_stays() {
    let mut scene = Scene::new();
    let _server = Dnsmasq::start_in(&scene.namespace, Some(&scene.cgroup), "192.0.2.7", "", &[]).unwrap();
    let mut client = scene.namespace.run(|| TcpStream::connect("192.0.2.7:53").unwrap()).unwrap();
    let _agent = scene.start("existing: Terminate");
    assert_eq!(scene.alive(), [false, false]);
    assert!(is_alive(&mut client));
}

#[test]
fn a_policy_that_comes_to_ask_for_it_is_refused_until_the_agent_starts_again() {
    let mut scene = Scene::new();
    let mut agent = scene.start(OPEN_TWO);
    scene.write(&format!("existing: Terminate, {OPEN_TWO}"));
    let line = agent.wait_for("the last good policy stays in force").unwrap();
    assert!(line.contains("start the agent again"), "{line}");
    assert_eq!(scene.alive(), [true, true]);
}
