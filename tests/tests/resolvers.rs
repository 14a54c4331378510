//! Names that are learnt from servers and by clients that people use.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, TcpStream},
    process::{Child, Command, Output, Stdio},
};

use egress_tests::{
    agent::{Agent, Place, run_command},
    asker::{Asker, Transport},
    cgroup::Cgroup,
    companion,
    dnsmasq::Dnsmasq,
    eventually,
    netns::Netns,
};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;

const DNSMASQ: &str = "127.0.0.9";
const UNBOUND: &str = "127.0.0.10";

/// A name with more addresses than a datagram takes that glibc asks for, and one with an alias before it.
const MANY: u32 = 120;

/// Unbound, with answers that a test decides; ended when dropped.
struct Unbound {
    child: Child,
    _directory: TempDir,
}

impl Unbound {
    fn start(namespace: &Netns, data: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (config, path) = (directory.path().join("unbound.conf"), directory.path().display());
        let text = format!(
            "server:\n  interface: {UNBOUND}\n  do-daemonize: no\n  username: \"\"\n  chroot: \"\"\n  directory: \"{path}\"\n  \
             pidfile: \"\"\n  use-syslog: no\n  logfile: \"{path}/log\"\n  access-control: 0.0.0.0/0 allow\n  module-config: iterator\n  \
             local-zone: example.com. static\n{data}remote-control:\n  control-enable: no\n"
        );
        fs::write(&config, text).unwrap();
        let mut command = namespace.command(companion("unbound/scripts/unbound").unwrap(), None).unwrap();
        let command = command.arg("-c").arg(&config).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let unbound = Self { child: command.spawn().unwrap(), _directory: directory };
        let connect = || TcpStream::connect((UNBOUND, 53)).ok();
        eventually("unbound", || namespace.run(connect).unwrap()).unwrap();
        unbound
    }
}

impl Drop for Unbound {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A namespace with both servers, which say the same, and a filtered cgroup.
struct World {
    asker: Asker,
    agent: Agent,
    _place: Place,
    _dnsmasq: Dnsmasq,
    _unbound: Unbound,
    namespace: Netns,
    cgroup: Cgroup,
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        let namespace = Netns::new().unwrap();
        for route in ["198.18.0.0/15", "100.64.0.0/10", "203.0.113.0/24"] {
            namespace.ip(&["route", "add", "local", route, "dev", "lo"]).unwrap();
        }
        let many: Vec<String> = (0..MANY).map(|index| format!("198.19.0.{index}")).collect();
        let mut data = String::new();
        for address in &many {
            writeln!(data, "  local-data: \"many.example.com. 1 IN A {address}\"").unwrap();
        }
        for round in 0..4_000 {
            let address = Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + round);
            let name = address.to_string().replace('.', "-");
            writeln!(data, "  local-data: \"{name}.example.com. 1 IN A {address}\"").unwrap();
        }
        let unbound = Unbound::start(&namespace, &data);
        let mut hosts = String::from("203.0.113.7 other.org\n198.18.0.1 two.example.com\n198.18.0.2 two.example.com\n");
        for address in &many {
            writeln!(hosts, "{address} many.example.com").unwrap();
        }
        hosts.push_str("198.18.0.9 target.example.net\n");
        let options =
            ["--synth-domain=example.com,100.64.0.0/10", "--cname=alias.example.com,target.example.net", "--local=//"];
        let dnsmasq = Dnsmasq::start(&namespace, DNSMASQ, &hosts, &options).unwrap();
        let (cgroup, directory) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap());
        fs::write(
            directory.path().join("policy.yaml"),
            format!(
                "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec:\n  \
                 dns: {{ servers: [{DNSMASQ}, {UNBOUND}] }}\n  \
                 allow: [ {{ to: [ {{ host: '*.example.com' }} ], ports: [ {{ port: 443 }} ] }} ]\n"
            ),
        )
        .unwrap();
        let place = Place::new().unwrap();
        let run = run_command(directory.path(), cgroup.path(), &["--name-quota", "100000"]).unwrap();
        let mut command = namespace.command(run.get_program(), None).unwrap();
        command.args(run.get_args());
        let mut agent = Agent::spawn_in(Some(&place), command).unwrap();
        agent.wait_for("policy applied generation=1 ").unwrap();
        let asker = Asker::start(&namespace, &cgroup).unwrap();
        Self { asker, agent, _place: place, _dnsmasq: dnsmasq, _unbound: unbound, namespace, cgroup, directory }
    }

    fn ask(&mut self, transport: Transport, server: &str, name: &str) -> Vec<IpAddr> {
        self.asker.ask(transport, server.parse().unwrap(), name).unwrap()
    }

    fn is_open(&mut self, address: &str) -> bool {
        !self.asker.is_refused(format!("{address}:443").parse().unwrap()).unwrap()
    }

    /// A program in the cgroup, whose C library asks a server.
    fn command(&self, program: &str, server: &str) -> Command {
        let resolv_conf = self.directory.path().join(format!("resolv-{server}"));
        fs::write(&resolv_conf, format!("nameserver {server}\noptions timeout:5\n")).unwrap();
        let mut command = self.namespace.command(program, Some(&self.cgroup)).unwrap();
        egress_tests::netns::with_file_over(&mut command, &resolv_conf, "/etc/resolv.conf");
        command
    }

    /// What Python prints: how each address of a name answers.
    fn python(&self, server: &str, name: &str) -> String {
        const SCRIPT: &str = "
import socket, sys
found = socket.getaddrinfo(sys.argv[1], 443, type=socket.SOCK_STREAM)
answers = []
for family, kind, protocol, _, address in found:
    with socket.socket(family, kind, protocol) as s:
        answers.append(s.connect_ex(address))
print(len(answers), sorted(set(answers)))
";
        said(&self.command("python3", server).args(["-c", SCRIPT, name]).output().unwrap())
    }
}

fn said(output: &Output) -> String {
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout.clone()).unwrap().trim().to_owned()
}

#[test]
fn no_first_connection_is_refused_whichever_server_answers() {
    let mut world = World::new();
    for (server, transport, rounds) in [
        (DNSMASQ, Transport::Udp, 8_000),
        (DNSMASQ, Transport::Tcp, 2_000),
        (UNBOUND, Transport::Sendto, 4_000),
        (UNBOUND, Transport::Tcp, 2_000),
    ] {
        let refused = world.asker.race(rounds, transport, server.parse().unwrap(), "example.com", 443).unwrap();
        assert_eq!(refused, 0, "{server} {transport:?}");
    }
}

#[test]
fn long_answers_and_aliases_are_learnt() {
    let mut world = World::new();
    for (server, transport) in [(DNSMASQ, Transport::Tcp), (UNBOUND, Transport::Tcp), (UNBOUND, Transport::Udp)] {
        let found = world.ask(transport, server, "many.example.com");
        assert_eq!(found.len(), usize::try_from(MANY).unwrap(), "{server} {transport:?}");
        assert!(found.iter().all(|address| world.is_open(&address.to_string())), "{server} {transport:?}");
    }
    assert_eq!(world.ask(Transport::Udp, DNSMASQ, "alias.example.com"), ["198.18.0.9".parse::<IpAddr>().unwrap()]);
    assert!(world.is_open("198.18.0.9"));
}

/// `ECONNREFUSED`: nobody listens, and nobody refuses.
#[test]
fn programs_reach_what_their_c_library_resolves() {
    let world = World::new();
    for server in [DNSMASQ, UNBOUND] {
        assert_eq!(world.python(server, "100-64-3-1.example.com"), "1 [111]", "{server}");
        // By TCP, as the answer is too long for the datagram that glibc asks for.
        assert_eq!(world.python(server, "many.example.com"), format!("{MANY} [111]"), "{server}");
    }
}

#[test]
fn dig_teaches_what_it_is_told() {
    let mut world = World::new();
    let dig = companion("dig/scripts/dig").unwrap();
    for (index, options) in (0..).zip([&[][..], &["+tcp"], &["+noedns"], &["+dnssec"], &["+tcp", "+keepopen"]]) {
        let name = format!("100-64-4-{index}.example.com");
        let mut command = world.command(dig.to_str().unwrap(), DNSMASQ);
        let output = command.args([&format!("@{DNSMASQ}"), "+short", &name]).args(options).output().unwrap();
        assert_eq!(said(&output), format!("100.64.4.{index}"));
        assert!(world.is_open(&format!("100.64.4.{index}")), "{options:?}");
    }
}

#[test]
fn a_denial_tells_what_was_asked_for() {
    let mut world = World::new();
    world.ask(Transport::Udp, DNSMASQ, "OTHER.org");
    assert!(!world.is_open("203.0.113.7"));
    let destination = json!({ "address": "203.0.113.7", "port": 443, "host": "other.org" });
    assert_eq!(world.agent.denial().unwrap()["destination"], destination);
}

#[test]
fn the_c_library_that_sorts_addresses_is_told_from_who_means_it() {
    let mut world = World::new();
    // What is reported at a time is gathered: here, all of it.
    world.agent.signal(Signal::STOP).unwrap();
    assert_eq!(world.python(DNSMASQ, "two.example.com"), "2 [111]");
    // Another refusal ends what is gathered.
    assert!(!world.is_open("203.0.113.9"));
    world.agent.signal(Signal::CONT).unwrap();
    let first = world.agent.denial().unwrap();
    assert_eq!(
        (&first["note"], &first["count"], &first["protocol"]),
        (&json!("address_sorting"), &json!(2), &json!("UDP"))
    );
    assert_eq!(first["destination"]["host"], "two.example.com");
    let second = world.agent.denial().unwrap();
    assert_eq!((&second["note"], &second["protocol"]), (&json!(null), &json!("TCP")));
}
