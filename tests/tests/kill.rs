//! The agent is killed at any moment, hundreds of times: what is in force then is the old policy or the new one, for each
//! flow, and never nothing; the next start recovers.
//!
//! Each round has a policy of its own, which opens one address that no other opens. So what is open tells which policies are
//! in force: one address, that one's policy; none, several at once, which all must agree.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

use egress_tests::{
    agent::Agent,
    dial::{Call, Method},
    eventually,
    world::World,
};
use rustix::process::Signal;

const ALWAYS: &str = "192.0.2.1";
const NEVER: &str = "203.0.113.9";
/// Rounds of all worlds together, unless the environment says otherwise.
const ROUNDS: u32 = 320;
/// Worlds side by side: an agent mostly waits.
const WORLDS: u32 = 4;
/// How long a change of policy takes at most, about; how long a start takes is measured.
const CHANGE: Duration = Duration::from_millis(40);

/// A cgroup in which agents are killed.
struct Victim {
    world: World,
    /// Policies that may be in force.
    candidates: BTreeSet<u32>,
    /// How long the last start took.
    start: Duration,
    random: Random,
    /// How often the old policy was found in force, the new one, and both.
    found: [u32; 3],
}

/// The address that the policy of a round opens.
fn own(round: u32) -> String {
    format!("10.{}.{}.1", round >> 8, round & 255)
}

/// All four hooks, and TCP and UDP.
fn calls(address: &str) -> [Call; 4] {
    let v4 = format!("{address}:80").parse().unwrap();
    [(Method::TcpConnect, false), (Method::TcpConnect, true), (Method::UdpConnect, false), (Method::UdpSend, false)]
        .map(|(method, mapped)| Call { method, mapped, to: v4 })
}

impl Victim {
    fn new(seed: u64) -> Self {
        let world = World::opening(&[ALWAYS, &own(0)]).unwrap();
        let mut victim =
            Self { world, candidates: BTreeSet::from([0]), start: Duration::ZERO, random: Random(seed), found: [0; 3] };
        victim.start().kill().unwrap();
        victim
    }

    fn start(&mut self) -> Agent {
        let begun = Instant::now();
        let agent = self.world.start(&[]).unwrap();
        self.start = begun.elapsed();
        agent
    }

    fn write(&self, round: u32) {
        self.world.open_only(&[ALWAYS, &own(round)]).unwrap();
    }

    fn wait(&mut self, most: Duration) {
        let most = u64::try_from(most.as_micros()).unwrap();
        thread::sleep(Duration::from_micros(self.random.below(most)));
    }

    /// Kills an agent while it starts with a new policy.
    fn kill_at_start(&mut self, round: u32) {
        self.write(round);
        let agent = self.world.spawn(&[]).unwrap();
        self.wait(self.start * 5 / 4);
        agent.kill().unwrap();
        self.look(round);
    }

    /// Kills an agent at the steps of its start that others can see.
    fn kill_at_attach(&mut self, round: u32) {
        self.write(round);
        let agent = self.world.spawn(&[]).unwrap();
        let half_made = self.world.pin(&format!("new-{}", agent.pid()));
        eventually("the pins of a start", || half_made.exists().then_some(())).unwrap();
        self.wait(self.start / 3);
        agent.kill().unwrap();
        self.look(round);
    }

    /// Kills an agent while it puts a new policy in force. Its start has recovered from whatever was before.
    fn kill_at_change(&mut self, round: u32) {
        let agent = self.start();
        self.candidates.insert(round - 1);
        assert_eq!(self.open(), [round - 1], "a start puts its policy in force, and no other");
        assert_eq!(self.world.place.pinned().len(), 1, "a start leaves one set");
        self.candidates = BTreeSet::from([round - 1]);
        self.write(round);
        agent.signal(Signal::HUP).unwrap();
        self.wait(CHANGE);
        agent.kill().unwrap();
        self.look(round);
        assert_eq!(self.candidates.len(), 1, "of two policies of one agent, one is in force");
    }

    /// What is in force is the old policy or the new one.
    #[track_caller]
    fn look(&mut self, round: u32) {
        let old = self.candidates.clone();
        self.candidates.insert(round);
        let open = self.open();
        match open[..] {
            [] => self.found[2] += 1,
            [one] => {
                self.found[usize::from(!old.contains(&one))] += 1;
                self.candidates = BTreeSet::from([one]);
            }
            _ => panic!("round {round}: {open:?} are open at once"),
        }
        self.check(ALWAYS, true, round);
        self.check(NEVER, false, round);
    }

    /// Of the policies that may be in force, those whose address is open; the others are closed.
    fn open(&mut self) -> Vec<u32> {
        let candidates = self.candidates.clone();
        let next = candidates.last().copied().unwrap_or(0) + 1;
        assert!(!self.world.is_open(&own(next)).unwrap(), "what no policy opens yet is open");
        candidates.into_iter().filter(|&round| self.world.is_open(&own(round)).unwrap()).collect()
    }

    #[track_caller]
    fn check(&mut self, address: &str, is_open: bool, round: u32) {
        for call in calls(address) {
            assert_eq!(!self.world.dialer.is_refused(&call).unwrap(), is_open, "round {round}: {call}");
        }
    }

    /// The last start is not disturbed.
    fn recover(&mut self, round: u32) {
        self.write(round);
        let agent = self.world.start(&[]).unwrap();
        self.candidates.insert(round);
        assert_eq!(self.open(), [round]);
        assert_eq!(self.world.place.pinned().len(), 1);
        assert_eq!(self.world.place.status().unwrap().0, Some(0));
        agent.stop().unwrap();
        assert_eq!(self.world.detach().unwrap().0, Some(0));
        assert!(self.world.is_open(NEVER).unwrap());
    }
}

/// Numbers that look random and are the same in each run: `splitmix64`.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut number = self.0;
        number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (number ^ (number >> 31)) % bound
    }
}

fn from_environment<T: std::str::FromStr>(name: &str, default: T) -> T {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn whenever_an_agent_is_killed_the_old_or_the_new_policy_is_in_force() {
    let rounds: u32 = from_environment("EGRESS_KILL_ROUNDS", ROUNDS);
    let seed: u64 = from_environment("EGRESS_KILL_SEED", 7);
    println!("EGRESS_KILL_SEED={seed}");
    let found: Vec<[u32; 3]> = thread::scope(|scope| {
        let run = |world: u32| {
            let mut victim = Victim::new(seed ^ (u64::from(world) << 32));
            for round in 1..=rounds / WORLDS {
                match victim.random.below(4) {
                    0 => victim.kill_at_start(round),
                    1 | 2 => victim.kill_at_attach(round),
                    _ => victim.kill_at_change(round),
                }
            }
            victim.recover(rounds / WORLDS + 1);
            println!("a start took {:?} at last", victim.start);
            victim.found
        };
        let running: Vec<_> = (0..WORLDS).map(|world| scope.spawn(move || run(world))).collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let sum = |index: usize| found.iter().map(|found| found[index]).sum::<u32>();
    println!(
        "{rounds} kills: the old policy in force after {}, the new after {}, both after {}",
        sum(0),
        sum(1),
        sum(2)
    );
    assert!(sum(0) > 0 && sum(1) > 0, "the delays never reach one side: {found:?}");
}
