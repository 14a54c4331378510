//! Names that are learnt from servers and by clients that people use.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fmt::Write as _,
    fs,
    net::{IpAddr, Ipv4Addr, TcpStream},
    path::{Path, PathBuf},
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

/// A policy that allows names, and more of `dns`; and a search domain, which may be asked for and opens nothing.
fn policy(more: &str) -> String {
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec:\n  \
         dns: {{ servers: [{DNSMASQ}, {UNBOUND}]{more} }}\n  \
         allow: [ {{ to: [ {{ host: '*.example.com' }} ], ports: [ {{ port: 443 }} ] }} ]\n---\n\
         apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: search }}\nspec: {{ hosts: [ '*.search.test' ], \
         addresses: [ 192.0.2.1/32 ], ports: [ {{ number: 9, name: none, protocol: TCP }} ], resolution: NONE }}\n"
    )
}

/// A namespace with both servers, which say the same, and a filtered cgroup.
struct World {
    asker: Asker,
    agent: Agent,
    place: Place,
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
        fs::write(directory.path().join("policy.yaml"), policy("")).unwrap();
        let place = Place::new().unwrap();
        let run = run_command(directory.path(), cgroup.path(), &["--name-quota", "100000"]).unwrap();
        let mut command = namespace.command(run.get_program(), None).unwrap();
        command.args(run.get_args());
        let mut agent = Agent::spawn_in(Some(&place), command).unwrap();
        agent.wait_for("policy applied generation=1 ").unwrap();
        let asker = Asker::start(&namespace, &cgroup).unwrap();
        Self { asker, agent, place, _dnsmasq: dnsmasq, _unbound: unbound, namespace, cgroup, directory }
    }

    fn ask(&mut self, transport: Transport, server: &str, name: &str) -> Vec<IpAddr> {
        self.asker.ask(transport, server.parse().unwrap(), name).unwrap()
    }

    fn is_open(&mut self, address: &str) -> bool {
        !self.asker.is_refused(format!("{address}:443").parse().unwrap()).unwrap()
    }

    /// Replaces the policy.
    fn write(&self, more: &str) {
        fs::write(self.directory.path().join("policy.yaml"), policy(more)).unwrap();
        self.place.reload().unwrap();
    }

    /// A program in the cgroup, whose C library asks a server.
    fn command(&self, program: &str, server: &str) -> Command {
        self.command_with(program, server, "options timeout:5\n")
    }

    /// The same, with more in its `resolv.conf`.
    fn command_with(&self, program: &str, server: &str, more: &str) -> Command {
        let resolv_conf = tempfile::NamedTempFile::new_in(self.directory.path()).unwrap().into_temp_path();
        let resolv_conf = resolv_conf.keep().unwrap();
        fs::write(&resolv_conf, format!("nameserver {server}\n{more}")).unwrap();
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

/// A program of the C library musl, which asks in its own way: resolves a name, and prints how
/// many addresses it has and what connecting to the last returned. It asks for IPv4 alone, as it takes the refusal of dnsmasq to
/// answer for IPv6 for no answer.
fn musl_client(directory: &Path) -> PathBuf {
    const SOURCE: &str = "
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <sys/socket.h>

int main(int argc, char **argv) {
    struct addrinfo hints = { .ai_family = AF_INET, .ai_socktype = SOCK_STREAM }, *found, *one;
    int failed = getaddrinfo(argv[1], \"443\", &hints, &found), count = 0, last = 0;
    if (failed) return printf(\"%s\", gai_strerror(failed)), 1;
    for (one = found; one; one = one->ai_next, count++) {
        int s = socket(one->ai_family, SOCK_STREAM, 0);
        last = connect(s, one->ai_addr, one->ai_addrlen) ? errno : 0;
    }
    printf(\"%d [%d]\", count, last);
}
";
    let (source, program) = (directory.join("client.c"), directory.join("client"));
    fs::write(&source, SOURCE).unwrap();
    let musl = |path: &str| companion(&format!("musl/usr/{path}")).unwrap();
    let library = |name: &str| musl(&format!("lib/x86_64-linux-musl/{name}"));
    let mut command = Command::new("cc");
    command.args(["-static", "-nostdinc", "-nostdlib", "-isystem"]).arg(musl("include/x86_64-linux-musl"));
    command.args(["crt1.o", "crti.o"].map(library)).arg(&source).arg(library("libc.a")).arg("-lgcc");
    said(&command.arg(library("crtn.o")).arg("-o").arg(&program).output().unwrap());
    program
}

#[test]
fn programs_of_musl_reach_what_it_resolves() {
    let world = World::new();
    let client = musl_client(world.directory.path());
    for server in [DNSMASQ, UNBOUND] {
        let run = |name: &str| {
            let mut command = world.command(client.to_str().unwrap(), server);
            command.arg(name).output().unwrap()
        };
        assert_eq!(said(&run("100-64-3-2.example.com")), "1 [111]", "{server}");
    }
    // As many as a datagram has: by TCP it asks only since 1.2.4.
    let mut command = world.command(client.to_str().unwrap(), DNSMASQ);
    let many = said(&command.arg("many.example.com").output().unwrap());
    assert!(many.ends_with(" [111]") && !many.starts_with("1 "), "{many}");
    world.write(", queries: Named");
    let run = |name: &str| {
        let mut command = world.command_with(client.to_str().unwrap(), DNSMASQ, "options timeout:1 attempts:1\n");
        command.arg(name).output().unwrap()
    };
    assert_eq!(said(&run("100-64-3-3.example.com")), "1 [111]");
    assert!(!run("secret.evil.net").status.success());
}

#[test]
fn clients_learn_at_once_what_they_may_not_ask() {
    /// Why a name does not resolve, and in how many tenths of a second that was said.
    const SCRIPT: &str = "
import socket, sys, time
start = time.monotonic()
try:
    found = socket.getaddrinfo(sys.argv[1], 443, type=socket.SOCK_STREAM)
    print(len(found))
except socket.gaierror as error:
    print(error.errno == socket.EAI_AGAIN, int((time.monotonic() - start) * 10))
";
    let mut world = World::new();
    world.write(", queries: Named");
    let patient = "options timeout:30 attempts:1\n";
    let python = |world: &World, more: &str, name: &str| {
        let mut command = world.command_with("python3", DNSMASQ, &format!("{patient}{more}"));
        said(&command.args(["-c", SCRIPT, name]).output().unwrap())
    };
    assert_eq!(python(&world, "", "100-64-3-1.example.com"), "1");
    // A server that is silent would be waited for.
    let refused = python(&world, "", "secret.evil.net");
    let tenths: u32 = refused.strip_prefix("True ").unwrap().parse().unwrap();
    assert!(tenths < 100, "{tenths}");
    let denial = world.agent.denial().unwrap();
    assert_eq!(
        (&denial["reason"], &denial["destination"]["host"], &denial["process"]["comm"]),
        (&json!("dns_query"), &json!("secret.evil.net"), &json!("python3"))
    );
    // The name is asked for below the search domain first, as the policy allows.
    assert_eq!(python(&world, "search a.search.test\noptions ndots:5\n", "100-64-3-4.example.com"), "1");
    // With one that it does not allow, that is the end of the search.
    assert!(python(&world, "search other.test\noptions ndots:5\n", "100-64-3-5.example.com").starts_with("True"));
    let dig = companion("dig/scripts/dig").unwrap();
    for options in [&[][..], &["+tcp"], &["+noedns"], &["+dnssec"], &["+tcp", "+keepopen"]] {
        let run = |name: &str| {
            let mut command = world.command(dig.to_str().unwrap(), DNSMASQ);
            // Like musl, it does not look whether a datagram could be sent.
            let options = ["+short", "+tries=1", "+time=2", "+retry=0"].iter().chain(options);
            command.arg(format!("@{DNSMASQ}")).args(options).arg(name).output().unwrap()
        };
        assert_eq!(said(&run("100-64-4-9.example.com")), "100.64.4.9", "{options:?}");
        let refused = run("secret.evil.net");
        assert!(!refused.status.success(), "{options:?}: {refused:?}");
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
