//! Sockets whose destinations no hook sees, servers that answer, and what a refused call returns.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::{BufRead, BufReader},
    net::{SocketAddr, UdpSocket},
    process::Stdio,
    time::Duration,
};

use egress_tests::{
    actor::{Actor, Outcome},
    agent::Agent,
    bpf_is_a_security_module,
    cgroup::Cgroup,
    dnsmasq::Dnsmasq,
    kernel_is_before,
    netns::Netns,
};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

const REFUSED: Outcome = Err(Errno::PERM);
const DONE: Outcome = Ok(());

/// Families, types and protocols of `linux/net.h` and `linux/in.h`.
const AF_UNIX: i32 = 1;
const AF_INET: i32 = 2;
const AF_INET6: i32 = 10;
const AF_NETLINK: i32 = 16;
const AF_PACKET: i32 = 17;
const AF_VSOCK: i32 = 40;
const AF_MCTP: i32 = 45;
const STREAM: i32 = 1;
const DGRAM: i32 = 2;
const RAW: i32 = 3;
const ICMP: i32 = 1;
const TCP: i32 = 6;
const UDP: i32 = 17;
const ICMPV6: i32 = 58;
const UDPLITE: i32 = 136;

/// An actor in a filtered cgroup, in a namespace in which every address is local.
struct Scene {
    actor: Actor,
    agent: Agent,
    policies: TempDir,
    namespace: Netns,
    cgroup: Cgroup,
}

impl Scene {
    fn new(spec: &str, more: &[&str]) -> Self {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let policies = tempfile::tempdir().unwrap();
        fs::write(policies.path().join("policy.yaml"), policy(spec)).unwrap();
        let agent = Agent::start(policies.path(), &cgroup, more).unwrap();
        let actor = Actor::start(&namespace, &cgroup, None).unwrap();
        Self { actor, agent, policies, namespace, cgroup }
    }

    fn change(&mut self, spec: &str, generation: u32) {
        fs::write(self.policies.path().join("policy.yaml"), policy(spec)).unwrap();
        self.agent.wait_for(&format!("policy applied generation={generation} ")).unwrap();
    }

    /// A client outside the cgroup, which has sent the actor's server a datagram that was received.
    fn client(&mut self, server: &str, at: &str) -> UdpSocket {
        let client = self.namespace.run(|| UdpSocket::bind(at).unwrap()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client.send_to(b"?", server).unwrap();
        assert_eq!(self.actor.receive().unwrap(), client.local_addr().unwrap());
        client
    }
}

fn policy(spec: &str) -> String {
    format!("apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec: {{ {spec} }}\n")
}

fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

#[test]
fn sockets_whose_destinations_nobody_judges_are_not_made() {
    let mut scene = Scene::new("dns: { servers: None }", &[]);
    let raw = [(AF_INET, RAW, UDP, "RAW"), (AF_INET, RAW, 255, "RAW"), (AF_INET6, RAW, ICMPV6, "RAW")];
    let udp_lite = [AF_INET, AF_INET6].map(|family| (family, DGRAM, UDPLITE, "UDPLITE"));
    for (family, kind, protocol, name) in raw.into_iter().chain(udp_lite.into_iter().filter(|_| has_udp_lite())) {
        assert_eq!(scene.actor.open(family, kind, protocol).unwrap(), REFUSED, "{family} {kind} {protocol}");
        let denial = scene.agent.denial().unwrap();
        assert_eq!((&denial["reason"], &denial["hook"]), (&"socket_kind".into(), &"sock_create".into()), "{denial}");
        assert_eq!((&denial["protocol"], &denial["errno"]), (&name.into(), &"EPERM".into()), "{denial}");
        assert_eq!(denial["process"]["pid"], scene.actor.pid());
        assert!(denial.get("destination").is_none(), "{denial}");
    }
    for (kind, protocol) in [(STREAM, 0), (STREAM, TCP), (DGRAM, 0), (DGRAM, UDP)] {
        assert_eq!(scene.actor.open(AF_INET, kind, protocol).unwrap(), DONE);
        assert_eq!(scene.actor.open(AF_INET6, kind, protocol).unwrap(), DONE);
    }
    // Not what this is about: sockets that stay on the host.
    assert_eq!(scene.actor.open(1, STREAM, 0).unwrap(), DONE);
    let (status, denials, log) = scene.agent.stop().unwrap();
    assert_eq!((status.code(), denials.len()), (Some(0), 0), "{log:#?}");
}

#[test]
fn a_policy_names_the_sockets_it_wants() {
    // What the kernel does not know, it does not ask the filter about.
    let (named, unnamed) =
        if has_udp_lite() { (DONE, REFUSED) } else { (Err(Errno::PROTONOSUPPORT), Err(Errno::PROTONOSUPPORT)) };
    let mut scene = Scene::new("protocols: [UDPLite]", &[]);
    assert_eq!(scene.actor.open(AF_INET, DGRAM, UDPLITE).unwrap(), named);
    assert_eq!(scene.actor.open(AF_INET, RAW, UDPLITE).unwrap(), REFUSED);
    scene.change("protocols: [RAW]", 2);
    assert_eq!(scene.actor.open(AF_INET, RAW, ICMP).unwrap(), DONE);
    assert_eq!(scene.actor.open(AF_INET6, RAW, ICMPV6).unwrap(), DONE);
    assert_eq!(scene.actor.open(AF_INET, DGRAM, UDPLITE).unwrap(), unnamed);
    // Whoever allows everything but some destinations allows every socket.
    scene.change("defaultAction: Allow", 3);
    assert_eq!(scene.actor.open(AF_INET, DGRAM, UDPLITE).unwrap(), named);
    assert_eq!(scene.actor.open(AF_INET, RAW, UDPLITE).unwrap(), DONE);
}

/// Linux had it until 6.18 at least; 7.3 does not.
fn has_udp_lite() -> bool {
    let made = Socket::new(Domain::IPV4, Type::DGRAM, Some(UDPLITE.into()));
    assert!(made.is_ok() || !kernel_is_before(6, 19), "{made:?}");
    made.is_ok()
}

#[test]
fn sockets_of_other_families_are_refused_where_bpf_is_a_security_module() {
    let mut scene = Scene::new("dns: { servers: None }", &[]);
    let is_refused = bpf_is_a_security_module();
    for (family, kind, name) in [(AF_PACKET, RAW, "PACKET"), (AF_VSOCK, STREAM, "VSOCK"), (AF_MCTP, DGRAM, "family 45")]
    {
        let made = scene.actor.open(family, kind, 0).unwrap();
        if !is_refused {
            assert!(made == DONE || made == Err(Errno::AFNOSUPPORT), "{name}: {made:?}");
            continue;
        }
        assert_eq!(made, REFUSED, "{name}");
        let denial = scene.agent.denial().unwrap();
        assert_eq!((&denial["reason"], &denial["hook"]), (&"socket_kind".into(), &"socket_create".into()), "{denial}");
        assert_eq!((&denial["protocol"], &denial["errno"]), (&name.into(), &"EPERM".into()), "{denial}");
        assert_eq!(denial["process"]["pid"], scene.actor.pid());
        assert!(denial.get("destination").is_none(), "{denial}");
    }
    for family in [AF_UNIX, AF_NETLINK] {
        assert_eq!(scene.actor.open(family, DGRAM, 0).unwrap(), DONE);
    }
    scene.change("protocols: [PACKET]", 2);
    assert_eq!(scene.actor.open(AF_PACKET, RAW, 0).unwrap(), DONE);
    if is_refused {
        assert_eq!(scene.actor.open(AF_VSOCK, STREAM, 0).unwrap(), REFUSED);
    }
}

#[test]
fn ping_sockets_are_opened_by_icmp_alone() {
    let mut scene = Scene::new("protocols: [ICMP]", &[]);
    scene.namespace.ip(&["link", "set", "lo", "mtu", "1500"]).unwrap();
    // The kernel asks for this right before it asks the filter.
    scene.namespace.run(|| fs::write("/proc/sys/net/ipv4/ping_group_range", "0 2147483647").unwrap()).unwrap();
    assert_eq!(scene.actor.open(AF_INET, DGRAM, ICMP).unwrap(), DONE);
    assert_eq!(scene.actor.open(AF_INET6, DGRAM, ICMPV6).unwrap(), DONE);
    assert_eq!(scene.actor.open(AF_INET, RAW, ICMP).unwrap(), REFUSED);
    scene.change("protocols: []", 2);
    assert_eq!(scene.actor.open(AF_INET, DGRAM, ICMP).unwrap(), REFUSED);
}

#[test]
fn audit_reports_a_socket_and_refuses_none() {
    let mut scene = Scene::new("mode: Audit", &["--default", "Allow"]);
    assert_eq!(scene.actor.open(AF_INET, RAW, UDP).unwrap(), DONE);
    let denial = scene.agent.denial().unwrap();
    assert_eq!((&denial["verdict"], &denial["reason"]), (&"would_deny".into(), &"socket_kind".into()));
    assert!(denial.get("errno").is_none(), "{denial}");
}

/// Both families, and a socket of both that a client reaches by IPv4.
const SERVERS: [(&str, &str, &str); 3] = [
    ("192.0.2.1:5514", "192.0.2.1:5514", "203.0.113.7:4000"),
    ("[2001:db8::1]:5514", "[2001:db8::1]:5514", "[2001:db8:f::7]:4000"),
    ("[::]:5514", "192.0.2.1:5514", "203.0.113.7:4000"),
];

#[test]
fn a_udp_server_answers_whom_it_heard_from_and_nobody_else() {
    for (bound, server, at) in SERVERS {
        let mut scene = Scene::new("dns: { servers: None }", &[]);
        // A socket is bound to an IPv6 address only if an interface has it.
        for address in ["2001:db8::1/128", "2001:db8:f::7/128"] {
            scene.namespace.ip(&["address", "add", address, "dev", "lo", "nodad"]).unwrap();
        }
        scene.actor.serve_udp(address(bound)).unwrap();
        let peer = |text: &str| match (address(text), bound) {
            (SocketAddr::V4(v4), "[::]:5514") => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            (other, _) => other,
        };
        assert_eq!(scene.actor.send_with_made_socket(peer(at)).unwrap(), REFUSED, "{bound}: nothing was received");
        assert_eq!(scene.agent.denial().unwrap()["reason"], "no_rule");
        let client = scene.namespace.run(|| UdpSocket::bind(at).unwrap()).unwrap();
        client.send_to(b"?", server).unwrap();
        assert_eq!(scene.actor.receive().unwrap(), peer(at));
        assert_eq!(scene.actor.send_with_made_socket(peer(at)).unwrap(), DONE, "{bound}");
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let (length, sender) = client.recv_from(&mut [0; 8]).unwrap();
        assert_eq!((length, sender.port()), (1, address(server).port()));
        // The same host by another port, and another socket to the same peer.
        let mut other = peer(at);
        other.set_port(4001);
        assert_eq!(scene.actor.send_with_made_socket(other).unwrap(), REFUSED);
        assert_eq!(scene.actor.send_udp(peer(at)).unwrap(), REFUSED);
        assert_eq!(scene.actor.dial_tcp(peer(at)).unwrap(), REFUSED);
    }
}

#[test]
fn replies_can_be_denied_and_a_deny_that_matches_wins() {
    let mut scene = Scene::new("replies: Deny", &[]);
    let (server, at) = ("192.0.2.1:5514", "203.0.113.7:4000");
    scene.actor.serve_udp(address(server)).unwrap();
    let client = scene.client(server, at);
    assert_eq!(scene.actor.send_with_made_socket(address(at)).unwrap(), REFUSED);
    scene.change("replies: Allow", 2);
    client.send_to(b"?", server).unwrap();
    scene.actor.receive().unwrap();
    assert_eq!(scene.actor.send_with_made_socket(address(at)).unwrap(), DONE);
    scene.change("replies: Allow, deny: [{ to: [{ cidr: 203.0.113.0/24 }] }]", 3);
    assert_eq!(scene.actor.send_with_made_socket(address(at)).unwrap(), REFUSED);
}

/// A question for the address of `host.test`.
const QUESTION: &[u8] = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x04host\x04test\x00\x00\x01\x00\x01";

#[test]
fn a_dns_server_answers_its_clients() {
    let mut scene = Scene::new("dns: { servers: None }", &[]);
    let hosts = "198.51.100.7 host.test\n";
    let _server =
        Dnsmasq::start_in(&scene.namespace, Some(&scene.cgroup), "192.0.2.1", hosts, &["--local=/test/"]).unwrap();
    let client = scene.namespace.run(|| UdpSocket::bind("203.0.113.7:0").unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    client.send_to(QUESTION, "192.0.2.1:53").unwrap();
    let mut answer = [0; 512];
    let (length, server) = client.recv_from(&mut answer).unwrap();
    assert_eq!(server, address("192.0.2.1:53"));
    assert!(answer[..length].ends_with(&[198, 51, 100, 7]), "{:?}", &answer[..length]);

    scene.change("dns: { servers: None }, replies: Deny", 2);
    client.send_to(QUESTION, "192.0.2.1:53").unwrap();
    let denial = scene.agent.denial().unwrap();
    assert_eq!((&denial["hook"], &denial["process"]["comm"]), (&"sendmsg4".into(), &"dnsmasq".into()));
    assert_eq!(denial["destination"]["port"], client.local_addr().unwrap().port());
}

#[test]
fn a_quic_server_answers_its_clients() {
    for server in ["192.0.2.1:443", "[2001:db8::1]:443"] {
        let mut scene = Scene::new("dns: { servers: None }", &[]);
        scene.namespace.ip(&["address", "add", "2001:db8::1/128", "dev", "lo", "nodad"]).unwrap();
        let certificate = scene.policies.path().join("certificate");
        let quic = |what: &str, cgroup| {
            let mut command = scene.namespace.command(env!("CARGO_BIN_EXE_quic"), cgroup).unwrap();
            command.args([what, server]).arg(&certificate);
            command
        };
        let mut serving = quic("serve", Some(&scene.cgroup)).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(serving.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        let asked = quic("ask", None).output().unwrap();
        assert!(asked.status.success(), "{}", String::from_utf8_lossy(&asked.stderr));

        let (mut asking, pid) = (quic("ask", None), serving.id());
        scene.change("dns: { servers: None }, replies: Deny", 2);
        let mut asking = asking.stderr(Stdio::null()).spawn().unwrap();
        let denial = scene.agent.denial().unwrap();
        assert_eq!((&denial["reason"], &denial["process"]["pid"]), (&"no_rule".into(), &pid.into()), "{denial}");
        for process in [&mut asking, &mut serving] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
}

#[test]
fn many_clients_of_one_socket_are_answered() {
    let mut scene = Scene::new("dns: { servers: None }", &[]);
    scene.actor.serve_udp(address("192.0.2.1:5514")).unwrap();
    let at = |n: u32| format!("10.0.{}.{}:{}", n / 250, n % 250 + 1, 2000 + n);
    let clients: Vec<UdpSocket> = (0..128).map(|n| scene.client("192.0.2.1:5514", &at(n))).collect();
    let answered = (0..128).filter(|&n| scene.actor.send_with_made_socket(address(&at(n))).unwrap() == DONE).count();
    assert!(answered > 120, "{answered} of {} were answered", clients.len());
}

#[test]
fn a_refused_call_returns_what_the_policy_says() {
    let mut scene = Scene::new("refuseWith: ECONNREFUSED", &[]);
    let to = address("203.0.113.9:443");
    for (generation, refusal, errno) in
        [(1, "ECONNREFUSED", Errno::CONNREFUSED), (2, "EHOSTUNREACH", Errno::HOSTUNREACH), (3, "EPERM", Errno::PERM)]
    {
        if generation > 1 {
            scene.change(&format!("refuseWith: {refusal}"), generation);
        }
        // Programs choose the errno by bpf_set_retval, which Linux has since 5.18.
        let (refusal, errno) = if kernel_is_before(5, 18) { ("EPERM", Errno::PERM) } else { (refusal, errno) };
        assert_eq!(scene.actor.send_udp(to).unwrap(), Err(errno));
        let denial = scene.agent.denial().unwrap();
        assert_eq!((&denial["errno"], &denial["verdict"]), (&refusal.into(), &"deny".into()));
        assert_eq!(scene.actor.dial_tcp(to).unwrap(), Err(errno));
        assert_eq!(scene.agent.denial().unwrap()["errno"], refusal);
    }
    assert!(scene.cgroup.path().exists());
}
