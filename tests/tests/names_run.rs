//! Policies that name hosts, with the real agent, a real DNS server, and connections.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{fs, path::Path};

use egress_tests::{
    agent::{Agent, Place, run_command},
    cgroup::Cgroup,
    dial::{Call, Dialer, Method},
    dnsmasq::Dnsmasq,
    eventually,
    netns::Netns,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const RESOLVER: &str = "127.0.0.9";
const OPTIONS: &[&str] = &["--local=/example.com/", "--local-ttl=1"];

/// A namespace in which every address answers, with a DNS server, an agent that asks it, and a policy of one name.
struct World {
    dialer: Dialer,
    agent: Agent,
    server: Option<Dnsmasq>,
    place: Place,
    namespace: Netns,
    policies: TempDir,
    _cgroup: Cgroup,
}

fn document(host: &str) -> String {
    let resolution = if host.contains('*') { "NONE" } else { "DNS" };
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: api }}\n\
         spec: {{ hosts: [{host}], ports: [{{ number: 443, name: https, protocol: HTTPS }}], resolution: {resolution} }}\n"
    )
}

impl World {
    fn new(answers: Option<&str>, host: &str) -> Self {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let server = answers.map(|answers| Dnsmasq::start(&namespace, RESOLVER, answers, OPTIONS).unwrap());
        let policies = tempfile::tempdir().unwrap();
        fs::write(policies.path().join("api.yaml"), document(host)).unwrap();
        let place = Place::new().unwrap();
        let mut agent = Agent::spawn_in(Some(&place), command(&namespace, policies.path(), &cgroup)).unwrap();
        agent.wait_for("policy applied generation=1 ").unwrap();
        let dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
        Self { dialer, agent, server, place, namespace, policies, _cgroup: cgroup }
    }

    /// Replaces the policy, and waits until the log says something.
    fn write(&mut self, policy: &str, words: &str) {
        let new = self.policies.path().join(".new");
        fs::write(&new, policy).unwrap();
        fs::rename(new, self.policies.path().join("api.yaml")).unwrap();
        self.agent.wait_for(words).unwrap();
    }

    fn is_open(&mut self, address: &str) -> bool {
        let to = format!("{address}:443").parse().unwrap();
        !self.dialer.is_refused(&Call { method: Method::TcpConnect, mapped: false, to }).unwrap()
    }

    fn becomes(&mut self, address: &str, open: bool) {
        eventually("another answer", || (self.is_open(address) == open).then_some(())).unwrap();
    }

    fn status(&self) -> Value {
        self.place.status().unwrap().1
    }
}

/// The agent in the namespace of its server.
fn command(namespace: &Netns, policies: &Path, cgroup: &Cgroup) -> std::process::Command {
    let mut more =
        vec!["--resolver", RESOLVER, "--resolve-wait", "1", "--name-floor", "1", "--name-grace", "1", "--no-loopback"];
    more.extend(["--memory-limit", "1"]);
    let run = run_command(policies, cgroup.path(), &more).unwrap();
    let mut command = namespace.command(run.get_program(), None).unwrap();
    command.args(run.get_args());
    command
}

#[test]
fn a_name_opens_its_addresses_and_follows_them() {
    let mut world = World::new(Some("192.0.2.1 api.example.com\n2001:db8::1 api.example.com\n"), "api.example.com");
    assert!(world.is_open("192.0.2.1") && world.is_open("[2001:db8::1]"));
    assert!(!world.is_open("192.0.2.2"));
    let status = world.status();
    assert_eq!(status["names"]["resolved"][0]["addresses"], json!(["192.0.2.1", "2001:db8::1"]));
    world.server.as_ref().unwrap().say("192.0.2.2 api.example.com\n").unwrap();
    world.becomes("192.0.2.2", true);
    // Kept for the grace, then closed.
    world.becomes("192.0.2.1", false);
    assert!(world.is_open("192.0.2.2"));
}

#[test]
fn a_denial_tells_the_name_of_its_address() {
    let mut world = World::new(Some("192.0.2.1 api.example.com\n"), "api.example.com");
    let to = "192.0.2.1:80".parse().unwrap();
    let call = Call { method: Method::TcpConnect, mapped: false, to };
    assert!(world.dialer.is_refused(&call).unwrap());
    assert_eq!(
        world.agent.denial().unwrap()["destination"],
        json!({ "address": "192.0.2.1", "port": 80, "host": "api.example.com" })
    );
}

#[test]
fn a_server_that_is_not_there_delays_the_start_for_a_stated_time_and_no_longer() {
    let mut world = World::new(None, "api.example.com");
    assert!(world.agent.log().iter().any(|line| line.contains("WARN") && line.contains("resolved")));
    assert!(!world.is_open("192.0.2.1"));
    world.server = Some(Dnsmasq::start(&world.namespace, RESOLVER, "192.0.2.1 api.example.com\n", OPTIONS).unwrap());
    world.becomes("192.0.2.1", true);
}

#[test]
fn a_server_that_dies_closes_nothing() {
    let mut world = World::new(Some("192.0.2.1 api.example.com\n"), "api.example.com");
    world.server = None;
    eventually("a failed question", || {
        let error = world.status()["names"]["resolved"][0]["error"].clone();
        (error != Value::Null).then_some(())
    })
    .unwrap();
    assert!(world.is_open("192.0.2.1"));
}

/// Too large a policy is refused as a whole, after its names were asked for.
#[test]
fn after_a_policy_that_was_not_put_in_force_the_names_before_are_asked_for_again() {
    let mut world = World::new(Some("192.0.2.1 api.example.com\n192.0.2.2 other.example.com\n"), "api.example.com");
    let addresses: Vec<String> = (0..10_000_u32).map(|index| format!("10.{}.{}.1", index >> 8, index & 255)).collect();
    let large = document("large.example.com").replace("name: api", "name: large");
    let large = large.replace("hosts:", &format!("addresses: [{}], hosts:", addresses.join(", ")));
    world.write(&format!("{}---\n{large}", document("other.example.com")), "the last good policy stays in force");
    assert!(world.is_open("192.0.2.1") && !world.is_open("192.0.2.2"));
    let more = document("api.example.com").replace("ports: [", "ports: [{ number: 80, name: http, protocol: TCP }, ");
    world.write(&more, "policy applied generation=2 ");
    assert!(world.is_open("192.0.2.1"));
    world.server.as_ref().unwrap().say("192.0.2.3 api.example.com\n").unwrap();
    world.becomes("192.0.2.3", true);
}

#[test]
fn wildcards_are_listed() {
    let world = World::new(Some(""), "'*.example.com'");
    assert_eq!(
        world.status()["names"]["wildcards"],
        json!([{ "host": "*.example.com", "document": "ServiceEntry/default/api" }])
    );
}
