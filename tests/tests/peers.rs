//! Which peers a UDP server may answer: how many, in what order they are forgotten, and what an agent that ends or is replaced changes.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    path::PathBuf,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use aya::maps::{Array, Map, MapData};
use egress_common::{MAX_PEERS, Meta, map};
use egress_tests::{
    actor::{Actor, Outcome},
    agent::{Agent, Place},
    cgroup::Cgroup,
    netns::Netns,
};
use rustix::{io::Errno, process::Signal};
use tempfile::TempDir;

const DONE: Outcome = Ok(());
const REFUSED: Outcome = Err(Errno::PERM);
const SERVER: &str = "192.0.2.1:5514";
const ENFORCING: &str = "dns: { servers: None }";

/// A server in a filtered cgroup, in a namespace in which every address is local; the place of the agent outlives it.
struct World {
    server: Actor,
    agent: Option<Agent>,
    place: Place,
    policies: TempDir,
    namespace: Netns,
    cgroup: Cgroup,
}

impl World {
    fn new(spec: &str) -> Self {
        let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
        let mut server = Actor::start(&namespace, &cgroup, None).unwrap();
        server.serve_udp(SERVER.parse().unwrap()).unwrap();
        let (policies, place) = (tempfile::tempdir().unwrap(), Place::new().unwrap());
        let mut world = Self { server, agent: None, place, policies, namespace, cgroup };
        world.write(spec);
        world.start();
        world
    }

    fn write(&self, spec: &str) {
        let text = format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec: {{ {spec} }}\n"
        );
        fs::write(self.policies.path().join("policy.yaml"), text).unwrap();
    }

    fn start(&mut self) {
        self.agent = Some(Agent::start_in(&self.place, self.policies.path(), &self.cgroup, &[]).unwrap());
    }

    /// The server receives a datagram of a new peer.
    fn hear(&mut self, at: &str) -> SocketAddr {
        let peer = self.namespace.run(|| UdpSocket::bind(at).unwrap()).unwrap();
        peer.send_to(b"?", SERVER).unwrap();
        assert_eq!(self.server.receive().unwrap(), peer.local_addr().unwrap());
        peer.local_addr().unwrap()
    }

    /// The server sends a datagram of its own accord.
    fn answer(&mut self, to: SocketAddr) -> Outcome {
        self.server.send_with_made_socket(to).unwrap()
    }

    /// The pins of the only set.
    fn set(&self) -> PathBuf {
        let names = self.place.pinned();
        let [name] = &names[..] else { panic!("one set, not {names:?}") };
        self.place.pins().join(name)
    }
}

/// Datagrams of ever new peers, until they are enough.
fn flood(namespace: &Netns, is_enough: &AtomicBool) {
    const AT_ONCE: u32 = 16;
    let peers = (0..u32::MAX).map(|n| (Ipv4Addr::from_bits(Ipv4Addr::new(10, 0, 0, 1).to_bits() + n), 2_000));
    let send = || {
        for (n, peer) in (0..).zip(peers) {
            if is_enough.load(Ordering::Relaxed) {
                return;
            }
            UdpSocket::bind(peer).and_then(|socket| socket.send_to(b"?", SERVER)).unwrap();
            if n % AT_ONCE == 0 {
                // Some four thousand a second, so that few are lost.
                thread::sleep(Duration::from_millis(4));
            }
        }
    };
    namespace.run(send).unwrap();
}

#[test]
fn the_256_peers_heard_from_last_are_answered_however_many_there_are() {
    const COUNT: u32 = 6_000;
    let mut world = World::new(ENFORCING);
    let behind = u32::try_from(MAX_PEERS).unwrap() - 1;
    for (behind, is_promised) in [(80, true), (behind, true), (behind + 1, false)] {
        let World { server, namespace, .. } = &mut world;
        let is_enough = AtomicBool::new(false);
        let refused = thread::scope(|scope| {
            scope.spawn(|| flood(namespace, &is_enough));
            let refused = server.answer_behind(COUNT, behind);
            is_enough.store(true, Ordering::Relaxed);
            refused.unwrap()
        });
        // The one after that is forgotten, each time: nothing else is kept instead.
        let expected = if is_promised { 0 } else { COUNT - behind };
        assert_eq!(refused, expected, "{behind} behind");
    }
}

#[test]
fn peers_that_were_heard_are_answered_after_the_agent_is_killed_or_ended_and_started() {
    let mut world = World::new(ENFORCING);
    let first = world.hear("203.0.113.7:4000");
    world.agent.take().unwrap().kill().unwrap();
    // The programs go on to note peers.
    let second = world.hear("203.0.113.8:4000");
    for peer in [first, second] {
        assert_eq!(world.answer(peer), DONE);
    }
    world.start();
    let third = world.hear("203.0.113.9:4000");
    for peer in [first, second, third] {
        assert_eq!(world.answer(peer), DONE);
    }
    world.agent.take().unwrap().stop().unwrap();
    world.start();
    for peer in [first, second, third] {
        assert_eq!(world.answer(peer), DONE);
    }
    assert_eq!(world.answer("203.0.113.10:4000".parse().unwrap()), REFUSED);
    assert!(world.agent.as_ref().unwrap().signal(Signal::TERM).is_ok());
}

#[test]
fn no_answer_is_refused_while_one_agent_replaces_another() {
    let mut world = World::new(ENFORCING);
    for is_killed in [true, false, true, false] {
        let agent = world.agent.take().unwrap();
        let World { server, namespace, place, policies, cgroup, .. } = &mut world;
        let is_enough = AtomicBool::new(false);
        let (refused, agent) = thread::scope(|scope| {
            scope.spawn(|| flood(namespace, &is_enough));
            let restart = scope.spawn(|| {
                if is_killed {
                    drop(agent.kill().unwrap());
                } else {
                    drop(agent.stop().unwrap());
                }
                Agent::start_in(place, policies.path(), cgroup, &[])
            });
            let mut refused = 0;
            while !restart.is_finished() {
                refused += server.answer_behind(1_000, 80).unwrap();
            }
            is_enough.store(true, Ordering::Relaxed);
            (refused, restart.join().unwrap().unwrap())
        });
        assert_eq!(refused, 0, "{is_killed}");
        world.agent = Some(agent);
    }
}

/// Whatever the versions of their other maps.
#[test]
fn an_agent_of_another_version_hands_on_whom_sockets_have_heard() {
    let mut world = World::new(ENFORCING);
    let peer = world.hear("203.0.113.7:4000");
    world.agent.take().unwrap().kill().unwrap();
    let meta = Map::Array(MapData::from_pin(world.set().join(map::META)).unwrap());
    let mut meta = Array::<_, [u8; size_of::<Meta>()]>::try_from(meta).unwrap();
    let mut other = meta.get(&0, 0).unwrap();
    other[0] += 1;
    meta.set(0, other, 0).unwrap();
    world.start();
    assert_eq!(world.answer(peer), DONE);
}

#[test]
fn a_map_of_peers_that_is_none_is_not_taken_for_one() {
    let mut world = World::new(ENFORCING);
    let peer = world.hear("203.0.113.7:4000");
    world.agent.take().unwrap().kill().unwrap();
    let pin = world.set().join(map::PEERS);
    fs::remove_file(&pin).unwrap();
    MapData::from_pin(world.set().join(map::META)).unwrap().pin(&pin).unwrap();
    world.start();
    assert_eq!(world.answer(peer), REFUSED);
    world.hear("203.0.113.7:4000");
    assert_eq!(world.answer(peer), DONE);
}

/// What is heard is noted where a policy would judge answers by it, also where it only audits: so nothing need be refused when the first
/// policy is enforced.
#[test]
fn peers_that_were_heard_while_a_policy_audits_are_answered_when_it_enforces() {
    let mut world = World::new("dns: { servers: None }, mode: Audit");
    let heard = world.hear("203.0.113.7:4000");
    world.write(ENFORCING);
    assert_eq!(world.place.reload().unwrap(), 2);
    assert_eq!(world.answer(heard), DONE);
    assert_eq!(world.answer("203.0.113.8:4000".parse().unwrap()), REFUSED);
}
