//! The resolver against a real DNS server, in a network namespace that only the two of them use.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    collections::BTreeSet,
    fmt::Write as _,
    fs,
    net::IpAddr,
    time::{Duration, Instant},
};

use egress_agent::resolver::{NameReport, Resolver, Settings, Source};
use egress_tests::{PATIENCE, dnsmasq::Dnsmasq, netns::Netns};
use tempfile::TempDir;
use tokio::{runtime::Builder, time::timeout};

const FLOOR: Duration = Duration::from_millis(50);
const GRACE: Duration = Duration::from_millis(400);
const SERVER: &str = "127.0.0.1";
/// The server answers for this domain, also where the answer is that there is nothing.
const LOCAL: &str = "--local=/example.com/";
const NAME: &str = "a.example.com";

struct World {
    resolver: Resolver,
    server: Option<Dnsmasq>,
    directory: TempDir,
}

/// Runs a test in a namespace that has a server with these answers, and a resolver that asks it.
fn world(answers: &str, options: &[&str], test: impl AsyncFnOnce(&mut World, &Netns) + Send) {
    world_with(&[SERVER], answers, options, test);
}

fn world_with(servers: &[&str], answers: &str, options: &[&str], test: impl AsyncFnOnce(&mut World, &Netns) + Send) {
    let namespace = Netns::new().unwrap();
    let server = Dnsmasq::start(&namespace, SERVER, answers, options).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let servers: Vec<String> = servers.iter().map(|server| format!("nameserver {server}")).collect();
    fs::write(directory.path().join("resolv.conf"), servers.join("\n")).unwrap();
    let inside = || {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let resolver = Resolver::new(settings(&directory)).unwrap();
            let mut world = World { resolver, server: Some(server), directory };
            world.want(&[NAME]);
            test(&mut world, &namespace).await;
        });
    };
    namespace.run(inside).unwrap();
}

fn settings(directory: &TempDir) -> Settings {
    Settings {
        servers: Vec::new(),
        floor: FLOOR,
        grace: GRACE,
        timeout: Duration::from_millis(200),
        hosts: directory.path().join("hosts"),
        resolv_conf: directory.path().join("resolv.conf"),
    }
}

impl World {
    fn want(&mut self, names: &[&str]) {
        self.resolver.want(names.iter().map(ToString::to_string).collect());
    }

    fn server(&self) -> &Dnsmasq {
        self.server.as_ref().unwrap()
    }

    fn file(&self, name: &str, text: &str) {
        fs::write(self.directory.path().join("new"), text).unwrap();
        fs::rename(self.directory.path().join("new"), self.directory.path().join(name)).unwrap();
    }

    fn addresses(&mut self, name: &str) -> BTreeSet<IpAddr> {
        self.resolver.names().0.remove(name).unwrap_or_default()
    }

    fn report(&self, name: &str) -> NameReport {
        self.resolver.report().into_iter().find(|report| report.name == name).unwrap()
    }

    /// Waits until a name has these addresses.
    async fn becomes(&mut self, name: &str, addresses: &[&str]) {
        let expected: BTreeSet<IpAddr> = addresses.iter().map(|text| text.parse().unwrap()).collect();
        while self.addresses(name) != expected {
            let changed = timeout(PATIENCE, self.resolver.changed()).await;
            assert!(changed.is_ok(), "{:?} is not {addresses:?}", self.report(name));
        }
    }

    /// Lets the resolver work until something of it, or of the server, is so.
    async fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !is_so(self) {
            self.goes_on(Duration::from_millis(5)).await;
            assert!(start.elapsed() < PATIENCE, "not {what}: {:?}", self.resolver.report());
        }
    }

    /// Lets the resolver work; whether an address changed.
    async fn goes_on(&mut self, time: Duration) -> bool {
        let changed = timeout(time, self.resolver.changed()).await.is_ok();
        self.resolver.names();
        changed
    }

    async fn answers(&mut self) {
        self.resolver.first_answers(PATIENCE).await;
    }
}

#[test]
fn answers_that_change_are_followed() {
    world("192.0.2.1 a.example.com", &[LOCAL], async |world, _| {
        world.becomes(NAME, &["192.0.2.1"]).await;
        world.server().say("192.0.2.2 a.example.com\n2001:db8::2 a.example.com").unwrap();
        world.becomes(NAME, &["192.0.2.1", "192.0.2.2", "2001:db8::2"]).await;
        world.becomes(NAME, &["192.0.2.2", "2001:db8::2"]).await;
        assert!(!world.goes_on(2 * GRACE).await, "{:?}", world.report(NAME));
    });
}

#[test]
fn a_name_that_does_not_exist_appears_and_goes() {
    world("", &[LOCAL], async |world, _| {
        world.answers().await;
        assert!(world.addresses(NAME).is_empty());
        assert_eq!(world.report(NAME).error, None);
        // Without a record that says how long it does not exist, it is believed for half a minute: a new wish asks at once.
        world.server().say("192.0.2.1 a.example.com").unwrap();
        world.want(&[]);
        world.want(&[NAME]);
        world.becomes(NAME, &["192.0.2.1"]).await;
        world.server().say("").unwrap();
        world.becomes(NAME, &[]).await;
        assert_eq!((world.report(NAME).error, world.report(NAME).stale), (None, false));
    });
}

#[test]
fn what_is_known_stays_while_the_server_says_nothing() {
    world("192.0.2.1 a.example.com", &[LOCAL], async |world, _| {
        world.becomes(NAME, &["192.0.2.1"]).await;
        world.server().freeze().unwrap();
        world.until("stale", |world| world.report(NAME).stale).await;
        assert!(!world.goes_on(2 * GRACE).await);
        assert!(!world.addresses(NAME).is_empty());
        world.server().thaw().unwrap();
        world.server().say("192.0.2.2 a.example.com").unwrap();
        world.becomes(NAME, &["192.0.2.1", "192.0.2.2"]).await;
        world.becomes(NAME, &["192.0.2.2"]).await;
        assert_eq!(world.report(NAME).error, None);
    });
}

#[test]
fn the_start_does_not_wait_for_a_server_that_says_nothing() {
    world("192.0.2.1 a.example.com", &[LOCAL], async |world, _| {
        world.server().freeze().unwrap();
        let start = Instant::now();
        world.resolver.first_answers(Duration::from_millis(100)).await;
        assert!(start.elapsed() < Duration::from_millis(200), "{:?}", start.elapsed());
        assert!(world.addresses(NAME).is_empty());
        world.server().thaw().unwrap();
        world.becomes(NAME, &["192.0.2.1"]).await;
    });
}

#[test]
fn what_is_known_stays_while_there_is_no_server() {
    world("192.0.2.1 a.example.com", &[LOCAL], async |world, namespace| {
        world.becomes(NAME, &["192.0.2.1"]).await;
        world.server = None;
        world.until("stale", |world| world.report(NAME).stale).await;
        assert!(!world.goes_on(2 * GRACE).await);
        world.server = Some(Dnsmasq::start(namespace, SERVER, "192.0.2.2 a.example.com", &[LOCAL]).unwrap());
        world.becomes(NAME, &["192.0.2.1", "192.0.2.2"]).await;
        world.becomes(NAME, &["192.0.2.2"]).await;
    });
}

#[test]
fn a_server_that_refuses_takes_nothing_away() {
    world("192.0.2.1 a.example.com", &[], async |world, _| {
        world.becomes(NAME, &["192.0.2.1"]).await;
        // Without the name, and without servers of its own, it refuses.
        world.server().say("").unwrap();
        world.until("refused", |world| world.report(NAME).error.is_some()).await;
        let error = world.report(NAME).error.unwrap();
        assert!(error.to_lowercase().contains("refused"), "{error}");
        assert!(!world.goes_on(2 * GRACE).await);
        assert!(world.report(NAME).stale);
    });
}

#[test]
fn a_ttl_of_zero_is_the_floor() {
    world("192.0.2.1 a.example.com", &[LOCAL], async |world, _| {
        let start = Instant::now();
        world.until("asked ten times", |world| world.server().asked("query[A] a.example.com").unwrap() >= 10).await;
        assert!(start.elapsed() >= 9 * FLOOR, "{:?}", start.elapsed());
    });
}

#[test]
fn a_name_is_asked_for_again_just_before_its_records_end() {
    world("192.0.2.1 a.example.com", &[LOCAL, "--local-ttl=1"], async |world, _| {
        world.answers().await;
        let start = Instant::now();
        world.until("asked again", |world| world.server().asked("query[A] a.example.com").unwrap() >= 2).await;
        let took = start.elapsed();
        assert!(took >= Duration::from_millis(750) && took < Duration::from_millis(1100), "{took:?}");
    });
}

#[test]
fn every_one_of_sixty_addresses_counts() {
    let addresses: Vec<String> = (1..=60).map(|last| format!("192.0.2.{last}")).collect();
    let answers: Vec<String> = addresses.iter().map(|address| format!("{address} a.example.com")).collect();
    // Too many for a datagram, so that TCP is needed.
    world(&answers.join("\n"), &[LOCAL, "--edns-packet-max=512"], async |world, _| {
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        world.becomes(NAME, &addresses).await;
    });
}

#[test]
fn an_alias_is_followed() {
    let options = [LOCAL, "--cname=a.example.com,b.example.com", "--cname=b.example.com,c.example.com"];
    world("192.0.2.1 c.example.com\n2001:db8::1 c.example.com", &options, async |world, _| {
        world.becomes(NAME, &["192.0.2.1", "2001:db8::1"]).await;
    });
}

#[test]
fn a_name_may_have_ipv6_addresses_only() {
    world("2001:db8::1 a.example.com", &[LOCAL], async |world, _| {
        world.becomes(NAME, &["2001:db8::1"]).await;
        assert_eq!(world.report(NAME).error, None);
    });
}

#[test]
fn the_hosts_file_comes_first() {
    world("192.0.2.1 a.example.com\n192.0.2.2 b.example.com", &[LOCAL], async |world, _| {
        world.want(&[]);
        world.file("hosts", "127.0.0.1 A.example.com\n");
        world.resolver = Resolver::new(settings(&world.directory)).unwrap();
        world.want(&[NAME, "b.example.com"]);
        world.answers().await;
        world.becomes(NAME, &["127.0.0.1"]).await;
        world.becomes("b.example.com", &["192.0.2.2"]).await;
        assert_eq!((world.report(NAME).source, world.report("b.example.com").source), (Source::Hosts, Source::Dns));
        assert_eq!(world.server().asked("query[A] a.example.com").unwrap(), 0);
        world.file("hosts", "10.0.0.2 b.example.com\n");
        world.becomes(NAME, &["192.0.2.1"]).await;
        world.becomes("b.example.com", &["10.0.0.2"]).await;
    });
}

#[test]
fn addresses_of_this_host_and_link_are_refused() {
    let hostile = ["127.0.0.1", "0.0.0.0", "169.254.169.254", "224.0.0.1", "255.255.255.255", "::1", "fe80::1"];
    let mapped = ["::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe"];
    let mut answers = "192.0.2.1 a.example.com\n".to_owned();
    for address in hostile.iter().chain(&mapped) {
        writeln!(answers, "{address} a.example.com").unwrap();
    }
    world(&answers, &[LOCAL], async |world, _| {
        world.answers().await;
        world.becomes(NAME, &["192.0.2.1"]).await;
        assert!(!world.goes_on(3 * FLOOR).await, "{:?}", world.report(NAME));
    });
}

#[test]
fn the_next_server_is_asked_where_one_says_nothing() {
    world_with(&["127.0.0.9", SERVER], "192.0.2.1 a.example.com", &[LOCAL], async |world, _| {
        world.becomes(NAME, &["192.0.2.1"]).await;
        assert_eq!(world.report(NAME).error, None);
    });
}

#[test]
fn the_next_server_is_asked_where_one_refuses() {
    world_with(&["127.0.0.2", SERVER], "192.0.2.1 a.example.com", &[LOCAL], async |world, namespace| {
        let _refusing = Dnsmasq::start(namespace, "127.0.0.2", "", &[]).unwrap();
        world.becomes(NAME, &["192.0.2.1"]).await;
        assert_eq!(world.report(NAME).error, None);
    });
}

#[test]
fn the_first_server_is_believed_where_it_answers() {
    world_with(&["127.0.0.2", SERVER], "192.0.2.1 a.example.com", &[LOCAL], async |world, namespace| {
        let _first = Dnsmasq::start(namespace, "127.0.0.2", "192.0.2.2 a.example.com", &[LOCAL]).unwrap();
        world.becomes(NAME, &["192.0.2.2"]).await;
        assert!(!world.goes_on(4 * FLOOR).await);
        assert_eq!(world.server().asked("query[A] a.example.com").unwrap(), 0);
    });
}

#[test]
fn other_servers_of_the_system_are_asked_at_once() {
    let options = [LOCAL, "--local-ttl=3600"];
    world("192.0.2.1 a.example.com", &options, async |world, namespace| {
        world.becomes(NAME, &["192.0.2.1"]).await;
        let _other = Dnsmasq::start(namespace, "127.0.0.2", "192.0.2.2 a.example.com", &options).unwrap();
        world.file("resolv.conf", "nameserver 127.0.0.2\n");
        world.resolver.reread_system();
        world.becomes(NAME, &["192.0.2.1", "192.0.2.2"]).await;
    });
}

#[test]
fn thousands_of_names_are_known_within_seconds() {
    let names: Vec<String> = (0..3000).map(|number| format!("n{number}.example.com")).collect();
    let answers: Vec<String> = names.iter().map(|name| format!("192.0.2.1 {name}")).collect();
    world(&answers.join("\n"), &[LOCAL, "--local-ttl=60"], async |world, _| {
        let start = Instant::now();
        world.resolver.want(names.iter().cloned().collect());
        world.answers().await;
        println!("{} names in {:?}", names.len(), start.elapsed());
        assert_eq!(world.resolver.names().0.len(), names.len());
        assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    });
}
