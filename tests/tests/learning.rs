//! Names that are learnt in the kernel: by every way to ask, before the first connection, from nobody but those who were asked.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    mem::ManuallyDrop,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use egress_tests::{
    asker::{self, Asker, Heard, Transport},
    eventually,
    resolving::{FAR, NEAR, SIX, WILDCARD, World, policy},
};
use rustix::process::Signal;
use serde_json::json;

#[test]
fn what_is_answered_may_be_dialled_by_whatever_way_it_was_asked_for() {
    let mut world = World::new(WILDCARD);
    for (index, transport) in (0..).zip(Transport::ALL) {
        for (server, third) in [(NEAR, 0), (FAR, 1)] {
            let address = format!("198.18.{third}.{index}");
            let name = format!("{}.a.b.example.com", address.replace('.', "-"));
            assert!(!world.is_open(&address, 443), "{transport:?} {server}");
            assert_eq!(world.ask(transport, server, &name), [address.parse::<IpAddr>().unwrap()]);
            assert!(world.is_open(&address, 443), "{transport:?} {server}");
            assert!(!world.is_open(&address, 80), "{transport:?} {server}");
        }
    }
    assert_eq!(world.ask(Transport::Udp, NEAR, "2001-db8--7.example.com"), ["2001:db8::7".parse::<IpAddr>().unwrap()]);
    assert!(world.is_open("2001:db8::7", 443));
    // In letters of any size, and by an alias.
    world.ask(Transport::Udp, NEAR, "198-18-2-1.EXAMPLE.cOm");
    world.ask(Transport::Udp, NEAR, "alias-198-18-2-2.example.com");
    assert!(world.is_open("198.18.2.1", 443) && world.is_open("198.18.2.2", 443));
}

#[test]
fn names_that_no_policy_names_open_nothing() {
    let mut world = World::new(WILDCARD);
    for name in ["198-18-0-1.example.org", "198-18-0-1.badexample.com", "198-18-0-1.example.com.evil.net"] {
        world.ask(Transport::Udp, NEAR, name);
        assert!(!world.is_open("198.18.0.1", 443), "{name}");
    }
}

#[test]
fn hundreds_of_addresses_are_learnt_from_one_answer() {
    let mut world = World::new(WILDCARD);
    for transport in [Transport::Udp, Transport::Tcp] {
        let found = world.ask(transport, NEAR, "many-250.example.com");
        assert_eq!(found.len(), 250);
        assert!(found.iter().all(|address| world.is_open(&address.to_string(), 443)), "{transport:?}");
    }
    // Too long to be looked at.
    world.ask(Transport::Tcp, NEAR, "many-300.example.com");
    assert!(!world.is_open("198.19.1.43", 443));
    assert_eq!(world.learnt("too_long"), 1);
}

#[test]
fn the_first_connection_after_an_answer_is_never_refused() {
    let mut world = World::with(WILDCARD, &["--name-quota", "100000"]);
    for (rounds, transport) in [(12_000, Transport::Udp), (4_000, Transport::Sendto), (4_000, Transport::Tcp)] {
        let server = NEAR.parse().unwrap();
        assert_eq!(world.asker.race(rounds, transport, server, "example.com", 443).unwrap(), 0, "{transport:?}");
    }
    // The control: it would be.
    assert_eq!(world.asker.race(50, Transport::Udp, NEAR.parse().unwrap(), "example.org", 444).unwrap(), 50);
}

#[test]
fn names_are_learnt_while_no_agent_runs() {
    let mut world = World::new(WILDCARD);
    world.agent.take().unwrap().kill().unwrap();
    for transport in [Transport::Udp, Transport::Tcp] {
        assert_eq!(world.asker.race(1_000, transport, FAR.parse().unwrap(), "example.com", 443).unwrap(), 0);
    }
}

#[test]
fn a_deny_of_an_address_beats_a_name() {
    let mut world = World::new(&format!("{WILDCARD}  deny: [ {{ to: [ {{ cidr: 198.18.0.0/24 }} ] }} ]\n"));
    world.ask(Transport::Udp, NEAR, "198-18-0-1.example.com");
    world.ask(Transport::Udp, NEAR, "198-18-1-1.example.com");
    assert!(!world.is_open("198.18.0.1", 443) && world.is_open("198.18.1.1", 443));
}

#[test]
fn no_name_opens_this_host_or_link() {
    let mut world = World::new(WILDCARD);
    for address in ["127.0.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"] {
        world.ask(Transport::Udp, NEAR, &format!("{}.example.com", address.replace('.', "-")));
        assert!(!world.is_open(address, 443), "{address}");
    }
    world.ask(Transport::Udp, NEAR, "100--1.example.com");
    assert!(!world.is_open("100::1", 443));
    assert_eq!(world.learnt("reserved_address"), 5);
}

#[test]
fn what_was_learnt_is_judged_by_the_policy_in_force() {
    let mut world = World::new(WILDCARD);
    world.ask(Transport::Udp, NEAR, "198-18-0-1.example.com");
    assert!(world.is_open("198.18.0.1", 443) && !world.is_open("198.18.0.1", 80));
    world.write(&WILDCARD.replace("443", "80"));
    assert!(!world.is_open("198.18.0.1", 443) && world.is_open("198.18.0.1", 80));
    // A name of its own is something else from now on, and says what the pattern says, too.
    let own = ", { to: [ { host: 198-18-0-2.example.com } ], ports: [ { port: 8080 } ] } ]";
    world.write(&WILDCARD.replace(" ]\n", &format!("{own}\n")));
    world.ask(Transport::Udp, NEAR, "198-18-0-2.example.com");
    assert!(world.is_open("198.18.0.2", 443) && world.is_open("198.18.0.2", 8080));
    assert!(world.is_open("198.18.0.1", 443) && !world.is_open("198.18.0.1", 8080));
    // Without the name, the pattern is what it was an answer for.
    world.write(WILDCARD);
    assert!(world.is_open("198.18.0.2", 443) && !world.is_open("198.18.0.2", 8080));
    world.write("");
    assert!(!world.is_open("198.18.0.1", 443) && !world.is_open("198.18.0.2", 443));
    world.write(WILDCARD);
    assert!(world.is_open("198.18.0.1", 443));
}

/// One policy for each of two cgroups below that of a world, by name, and what else it says.
fn write_for_two(world: &World, rules: [(&str, &str); 2]) {
    let top = world.cgroup.name();
    let document = |(name, rest): (&str, &str)| {
        let select = format!("  workloads: [ {{ cgroup: '{}/{name}' }} ]\n", top.trim_start_matches('/'));
        policy(&(select + rest)).replace("name: p", &format!("name: {name}"))
    };
    fs::write(world.policies.path().join("policy.yaml"), rules.map(document).join("---\n")).unwrap();
}

/// Processes in two cgroups with the same rules, which go with the world's.
fn two_workloads(world: &World) -> (Asker, Asker) {
    let [one, other] = ["one", "other"].map(|name| ManuallyDrop::new(world.cgroup.child(name).unwrap()));
    write_for_two(world, [("one", WILDCARD), ("other", WILDCARD)]);
    world.place.reload().unwrap();
    (Asker::start(&world.near, &one).unwrap(), Asker::start(&world.near, &other).unwrap())
}

#[test]
fn what_one_workload_learns_opens_nothing_to_another() {
    let world = World::new("");
    let (mut first, mut second) = two_workloads(&world);
    let to = "198.18.0.1:443".parse().unwrap();
    first.ask(Transport::Udp, NEAR.parse().unwrap(), "198-18-0-1.example.com").unwrap();
    assert!(!first.is_refused(to).unwrap() && second.is_refused(to).unwrap());
    drop((first, second));
}

#[test]
fn an_answer_holds_for_its_time_and_no_longer() {
    let mut world = World::with(WILDCARD, &["--name-floor", "1", "--name-grace", "1"]);
    world.ask(Transport::Udp, NEAR, "198-18-0-1.example.com");
    assert!(world.is_open("198.18.0.1", 443));
    eventually("the end of an answer", || (!world.is_open("198.18.0.1", 443)).then_some(())).unwrap();
    world.ask(Transport::Udp, NEAR, "198-18-0-1.example.com");
    assert!(world.is_open("198.18.0.1", 443));
}

#[test]
fn a_flood_of_names_closes_nothing_to_others() {
    let world = World::with("", &["--name-quota", "100", "--name-floor", "1", "--name-grace", "1"]);
    let (mut first, mut second) = two_workloads(&world);
    let server = NEAR.parse().unwrap();
    first.ask(Transport::Tcp, server, "many-200.example.com").unwrap();
    let to = |last: u32| format!("198.19.0.{last}:443").parse().unwrap();
    assert!(!first.is_refused(to(99)).unwrap() && first.is_refused(to(100)).unwrap());
    assert_eq!(world.learnt("quota"), 100);
    second.ask(Transport::Tcp, server, "many-100.example.com").unwrap();
    assert!(!second.is_refused(to(99)).unwrap());
    // What has ended makes room.
    eventually("room", || {
        first.ask(Transport::Udp, server, "198-18-0-1.example.com").unwrap();
        (!first.is_refused("198.18.0.1:443".parse().unwrap()).unwrap()).then_some(())
    })
    .unwrap();
}

/// A policy for every cgroup directly below that of a world.
fn write_for_all(world: &World) {
    let select = format!("  workloads: [ {{ cgroup: '{}/*' }} ]\n", world.cgroup.name().trim_start_matches('/'));
    fs::write(world.policies.path().join("policy.yaml"), policy(&(select + WILDCARD))).unwrap();
    world.place.reload().unwrap();
}

/// Asks for addresses as soon as the process's cgroup is placed.
fn ask_when_placed(asker: &mut Asker, name: &str) {
    let server = NEAR.parse().unwrap();
    eventually("a cgroup that is placed", || asker.ask(Transport::Tcp, server, name).ok()).unwrap();
}

/// Almost as many as a workload may have.
fn learn_much(asker: &mut Asker) {
    for skipped in (0..8_000).step_by(200) {
        ask_when_placed(asker, &format!("many-200-{skipped}.example.com"));
    }
}

#[test]
fn a_workload_finds_room_however_much_others_have_learnt() {
    const GREEDY: usize = 36;
    let mut world = World::new("");
    write_for_all(&world);
    // All but the cgroups that go, which are dropped before.
    let cgroup = |name: &str| ManuallyDrop::new(world.cgroup.child(name).unwrap());
    let start = |name: &str| Asker::start(&world.near, &cgroup(name)).unwrap();
    let mut early = start("early");
    let mut greedy: Vec<Asker> = (0..GREEDY).map(|n| start(&format!("greedy-{n}"))).collect();
    for asker in &mut greedy {
        learn_much(asker);
    }
    let mut late = start("late");
    let last = "198.19.3.231:443".parse().unwrap();
    for asker in [&mut early, &mut late] {
        for skipped in (0..1_000).step_by(200) {
            ask_when_placed(asker, &format!("many-200-{skipped}.example.com"));
        }
        assert!(!asker.is_refused(last).unwrap());
    }
    // It is told, with a name, in the log once.
    let is_told = || world.status()["degraded"].to_string().contains("the table of learnt names is full: /");
    eventually("a full table that is told", || is_told().then_some(())).unwrap();
    // Those that have much keep at least their part.
    let learnt = world.status()["names"]["learnt"].clone();
    let has = |workload: &serde_json::Value| workload["addresses"].as_u64().unwrap();
    let of_greedy =
        learnt["workloads"].as_array().unwrap().iter().filter(|at| at["cgroup"].to_string().contains("greedy"));
    let of_greedy: Vec<u64> = of_greedy.map(has).collect();
    assert!(of_greedy.len() == GREEDY && of_greedy.iter().all(|&has| has >= 3_000), "{of_greedy:?}");
    assert!(learnt["addresses"].as_u64().unwrap() <= 262_144, "{learnt}");
    drop(greedy);
    for n in 0..GREEDY {
        let path = world.cgroup.path().join(format!("greedy-{n}"));
        eventually("an empty cgroup", || fs::remove_dir(&path).ok()).unwrap();
    }
    let addresses = || world.status()["names"]["learnt"]["addresses"].as_u64().unwrap();
    eventually("what is gone to be forgotten", || (addresses() == 2_000).then_some(())).unwrap();
    assert!(!early.is_refused(last).unwrap() && !late.is_refused(last).unwrap());
    learn_much(&mut late);
    assert!(!late.is_refused("198.19.31.63:443".parse().unwrap()).unwrap());
    drop((early, late));
    let log = world.agent().log().iter().filter(|line| line.contains("names are not learnt")).count();
    assert!((1..=GREEDY + 2).contains(&log), "{log}");
}

#[test]
fn a_workload_that_may_learn_no_more_is_told() {
    let mut world = World::with(WILDCARD, &["--name-quota", "100"]);
    // Some kernels lack something else.
    let before = world.status()["degraded"].clone();
    world.ask(Transport::Tcp, NEAR, "many-100.example.com");
    world.ask(Transport::Tcp, NEAR, "many-100.example.com");
    assert_eq!((world.learnt("quota"), &world.status()["degraded"]), (0, &before));
    for _ in 0..2 {
        world.ask(Transport::Tcp, NEAR, "many-101.example.com");
        let (place, name) = (&world.place, world.cgroup.name());
        let expected =
            format!("{name} was answered names that were not learnt: it has 100 addresses and may have no more");
        let is_told = || {
            let (code, status) = place.status().unwrap();
            (code == Some(1) && status["degraded"].to_string().contains(&expected)).then_some(())
        };
        eventually("a quota that is told", is_told).unwrap();
        let text = place.output(&["status", "--output", "text"]).unwrap().stdout;
        let text = String::from_utf8(text).unwrap();
        assert!(text.contains(&format!("degraded:  {expected}")), "{text}");
    }
    assert_eq!(world.agent().log().iter().filter(|line| line.contains("names are not learnt")).count(), 1);
}

#[test]
fn a_claim_displaces_none_that_holds_longer() {
    let rule = |n: u32| format!("{{ to: [ {{ host: '*.n{n}.example.com' }} ], ports: [ {{ port: {n} }} ] }}");
    let rules: Vec<String> = (1..=6).map(rule).collect();
    let mut world = World::new(&format!("  allow: [ {} ]\n", rules.join(", ")));
    let learn = |world: &mut World, ttl: u32, n: u16| {
        world.ask(Transport::Udp, NEAR, &format!("ttl-{ttl}-198-18-0-1.n{n}.example.com"));
        (1..=6).filter(|&port| world.is_open("198.18.0.1", port)).collect::<Vec<u16>>()
    };
    for (ttl, n) in [(3_600, 1), (3_000, 2), (3_600, 3), (3_600, 4)] {
        learn(&mut world, ttl, n);
    }
    assert_eq!(world.learnt("crowded"), 0);
    // It ends before any of the four.
    assert_eq!(learn(&mut world, 60, 5), [1, 2, 3, 4]);
    assert_eq!(world.learnt("crowded"), 1);
    // It ends after one of them.
    assert_eq!(learn(&mut world, 3_300, 6), [1, 3, 4, 6]);
    assert_eq!(world.learnt("crowded"), 2);
    assert_eq!(learn(&mut world, 3_100, 2), [1, 3, 4, 6]);
}

/// Whoever has the port can pass for a resolver of this host.
#[test]
fn nobody_takes_the_port_of_a_resolver_of_this_host() {
    let mut world = World::new(WILDCARD);
    let taken = |world: &mut World, at: &str| ["udp", "tcp"].map(|kind| world.order(&format!("bind {kind} {at}")));
    for at in
        ["127.0.0.53:53", "127.0.0.2:53", "0.0.0.0:53", "192.0.2.1:53", "[::]:53", "[::1]:53", "[::ffff:127.0.0.3]:53"]
    {
        assert_eq!(taken(&mut world, at), ["1", "1"], "{at}");
    }
    assert_eq!(taken(&mut world, "127.0.0.2:54"), ["0", "0"]);
    let denial = world.agent().denial().unwrap();
    assert_eq!((&denial["hook"], &denial["reason"]), (&json!("bind4"), &json!("bypass")));
    world.near.run(|| fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")).unwrap().unwrap();
    world.order("uid 65534");
    assert_eq!(taken(&mut world, "127.0.0.2:53"), ["1", "1"]);
    // Where no resolver of this host is believed, the port is nobody's business.
    let far = policy(WILDCARD).replace(&format!("{NEAR}, "), "").replace(&format!(", '{SIX}'"), "");
    fs::write(world.policies.path().join("policy.yaml"), far).unwrap();
    world.place.reload().unwrap();
    assert_eq!(taken(&mut world, "127.0.0.2:53"), ["0", "0"]);
}

/// Such as systemd-resolved: it may be started again, and what it hears counts for whoever asks it otherwise than by DNS.
#[test]
fn what_a_shared_resolver_is_answered_counts_for_every_workload() {
    let mut world = World::new("");
    drop(world.agent.take());
    let (one, resolver) = (world.cgroup.child("one").unwrap(), world.cgroup.child("resolver").unwrap());
    let top = world.cgroup.name().trim_start_matches('/').to_owned();
    write_for_two(&world, [("one", WILDCARD), ("resolver", "")]);
    world.start(&["--shared-resolver", &format!("{top}/resolver")]);
    let (mut first, mut shared) =
        (Asker::start(&world.near, &one).unwrap(), Asker::start(&world.near, &resolver).unwrap());
    assert_eq!(first.order("bind udp 127.0.0.53:53").unwrap(), "1");
    assert_eq!(shared.order("bind udp 127.0.0.53:53").unwrap(), "0");
    let to: SocketAddr = "198.18.0.1:443".parse().unwrap();
    assert!(first.is_refused(to).unwrap());
    shared.ask(Transport::Udp, FAR.parse().unwrap(), "198-18-0-1.example.com").unwrap();
    assert!(!first.is_refused(to).unwrap());
    // What it is told opens nothing to itself that its own policy does not.
    assert!(shared.is_refused(to).unwrap());
    assert_eq!(world.status()["names"]["learnt"]["workloads"], json!([{ "cgroup": "shared", "addresses": 1 }]));
}

/// There, any address is whose it is said to be.
#[test]
fn a_resolver_in_a_network_namespace_of_ones_own_is_not_believed() {
    let mut world = World::new(WILDCARD);
    for (index, server) in (1..).zip([NEAR, FAR]) {
        let mut liar = Asker::start(&world.near, &world.cgroup).unwrap();
        assert_eq!(liar.order("unshare").unwrap(), "");
        liar.order("ip address add 192.0.2.53/32 dev lo").unwrap();
        assert_eq!(liar.order(&format!("serve {server}")).unwrap(), "");
        for transport in Transport::ALL {
            let name = format!("198-18-0-{index}.example.com");
            assert_eq!(liar.ask(transport, server.parse().unwrap(), &name).unwrap().len(), 1);
        }
        assert!(!world.is_open(&format!("198.18.0.{index}"), 443), "{server}");
    }
    // On a wire of ones own.
    let mut liar = Asker::start(&world.near, &world.cgroup).unwrap();
    for order in ["unshare", "beside", "ip address add 192.0.2.2/24 dev v0", "ip link set v0 up"] {
        assert_eq!(liar.order(order).unwrap(), "", "{order}");
    }
    for order in ["ip address add 192.0.2.53/24 dev v1", "ip link set v1 up", "ip link set lo up", "serve 192.0.2.53"] {
        assert_eq!(liar.order(&format!("other {order}")).unwrap(), "", "{order}");
    }
    assert_eq!(liar.ask(Transport::Udp, FAR.parse().unwrap(), "198-18-0-3.example.com").unwrap().len(), 1);
    assert!(!world.is_open("198.18.0.3", 443));
    // The control: it is not that nobody is.
    world.ask(Transport::Udp, FAR, "198-18-0-3.example.com");
    assert!(world.is_open("198.18.0.3", 443));
}

#[test]
fn an_answer_that_nobody_asked_for_is_not_believed() {
    let mut world = World::new(WILDCARD);
    let port: u16 = world.order("open 192.0.2.1").parse().unwrap();
    let answer = asker::response(&asker::question("198-18-0-1.example.com", 1)).unwrap();
    // The server serves port 53 of that address, so another address of its namespace has to do for a second socket.
    let send = |from: &str, to: u16| {
        world.far.run(|| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind(&format!("{from}:53").parse::<SocketAddr>().unwrap().into()).unwrap();
            UdpSocket::from(socket).send_to(&answer, ("192.0.2.1", to)).unwrap();
        })
    };
    world.far.ip(&["address", "add", "192.0.2.54/24", "dev", "far"]).unwrap();
    send("192.0.2.54", port).unwrap();
    assert_eq!(world.asker.order("receive").unwrap(), "192.0.2.54:53");
    assert!(world.asker.is_refused("198.18.0.1:443".parse().unwrap()).unwrap());
    // Also not after somebody else was asked, whose own answer is.
    assert_eq!(world.asker.order("query 192.0.2.53 198-18-0-2.example.com").unwrap(), "");
    assert_eq!(world.asker.order("receive").unwrap(), "192.0.2.53:53");
    send("192.0.2.54", port).unwrap();
    assert_eq!(world.asker.order("receive").unwrap(), "192.0.2.54:53");
    assert!(world.asker.is_refused("198.18.0.1:443".parse().unwrap()).unwrap());
    assert!(!world.asker.is_refused("198.18.0.2:443".parse().unwrap()).unwrap());
    assert_eq!(world.learnt("unasked"), 2);
}

/// The socket never sees it, so whoever sent it need not know what was asked.
#[test]
fn a_datagram_with_a_wrong_checksum_is_not_believed() {
    let mut world = World::new(WILDCARD);
    let port: u16 = world.order("open 192.0.2.1").parse().unwrap();
    world.order("query 192.0.2.53 198-18-0-1.example.com");
    assert_eq!(world.order("receive"), "192.0.2.53:53");
    // The kernel sums a short one before anybody sees it (`CHECKSUM_BREAK` of `linux/skbuff.h`).
    let name = format!("198-18-0-2.{}.example.com", "a".repeat(60));
    let answer = asker::response(&asker::question(&name, 1)).unwrap();
    let length = u16::try_from(answer.len() + 8).unwrap();
    let udp = [&[0, 53][..], &port.to_be_bytes(), &length.to_be_bytes(), &[0xbe, 0xef], &answer].concat();
    let total = (length + 20).to_be_bytes();
    let ip = [0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 53, 192, 0, 2, 1];
    world
        .far
        .run(|| {
            let raw = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::RAW, Some(libc::IPPROTO_RAW.into()))
                .unwrap();
            let to: SocketAddr = "192.0.2.1:0".parse().unwrap();
            raw.send_to(&[&ip[..], &udp].concat(), &to.into()).unwrap();
        })
        .unwrap();
    eventually("the datagram", || (world.learnt("wrong_checksum") == 1).then_some(())).unwrap();
    assert!(!world.is_open("198.18.0.2", 443));
}

/// It is not the workload that says whom it asks.
#[test]
fn servers_that_the_policy_does_not_name_are_refused() {
    let mut world = World::new(WILDCARD);
    world.near.run(|| asker::serve("127.0.0.10".parse().unwrap(), &Heard::default())).unwrap().unwrap();
    for transport in Transport::ALL {
        let refused = world.asker.ask(transport, "127.0.0.10".parse().unwrap(), "198-18-0-1.example.com");
        assert!(refused.unwrap_err().to_string().contains("os error 1"), "{transport:?}");
    }
    assert!(!world.is_open("198.18.0.1", 443));
}

#[test]
fn to_what_is_received_is_listened_only_where_names_matter() {
    let mut world = World::with("", &["--log", "debug"]);
    let hooks = |world: &World| world.status()["attached"][0]["hooks"].to_string();
    assert!(!hooks(&world).contains("ingress"));
    world.write(WILDCARD);
    assert!(hooks(&world).contains("ingress"), "{}", world.agent().log().join("\n"));
    world.write("");
    assert!(!hooks(&world).contains("ingress"));
}

#[test]
fn what_was_learnt_survives_the_agent() {
    let mut world = World::new(WILDCARD);
    world.ask(Transport::Udp, NEAR, "198-18-0-1.example.com");
    world.agent.take().unwrap().kill().unwrap();
    assert!(world.is_open("198.18.0.1", 443));
    world.start(&[]);
    assert!(world.is_open("198.18.0.1", 443));
    world.agent().signal(Signal::TERM).unwrap();
    drop(world.agent.take());
    world.start(&[]);
    assert!(world.is_open("198.18.0.1", 443));
}
