//! What is pinned stays in force without an agent: killed, stopped, started again, detached.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fmt::Write,
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use egress_tests::{
    agent::{Agent, Place},
    foreign::{self, Hook, How, Program},
    kernel_is_before,
    world::{World, opening, tcp},
};
use rustix::process::Signal;
use serde_json::Value;

const ONE: &str = "192.0.2.1";
const TWO: &str = "192.0.2.2";
const THREE: &str = "192.0.2.3";

/// One address is open, another is not.
#[track_caller]
fn expect(world: &mut World, open: &str, refused: &str) {
    assert!(world.is_open(open).unwrap(), "{open} is refused");
    assert!(!world.is_open(refused).unwrap(), "{refused} is open");
}

/// Nothing is refused, and nothing is left.
#[track_caller]
fn expect_nothing_in_force(world: &mut World) {
    assert!(world.is_open(ONE).unwrap() && world.is_open(TWO).unwrap());
    assert!(!world.place.pins().exists());
}

/// What `status` tells, and with which exit status. What a kernel lacks for good, and says so as long as anything is in force,
/// is not told here.
#[track_caller]
fn status(world: &World, code: i32) -> Value {
    let (mut found, mut status) = world.place.status().unwrap();
    if kernel_is_before(6, 1) && status["enforcing"] == true {
        let degraded = status["degraded"].as_array_mut().unwrap();
        let before = degraded.len();
        degraded.retain(|text| !text.as_str().unwrap().contains("the program setsockopt"));
        assert_eq!((found, before - degraded.len()), (Some(1), 1), "{status:#}");
        found = found.filter(|_| !status["degraded"].as_array().unwrap().is_empty()).or(Some(0));
    }
    assert_eq!(found, Some(code), "{status:#}");
    status
}

/// Something that is wrong is said with these words, and nothing else is wrong.
#[track_caller]
fn degraded(world: &World, words: &[&str]) -> Value {
    let status = status(world, 1);
    let said: Vec<&str> = status["degraded"].as_array().unwrap().iter().map(|text| text.as_str().unwrap()).collect();
    assert_eq!(said.len(), words.len(), "{said:?}");
    for (said, words) in said.iter().zip(words) {
        assert!(said.contains(words), "{words:?} in {said:?}");
    }
    status
}

#[test]
fn an_agent_that_is_killed_leaves_its_rules_in_force() {
    let mut world = World::opening(&[ONE]).unwrap();
    for set in 1..=3 {
        let agent = world.start(&[]).unwrap();
        expect(&mut world, ONE, TWO);
        agent.kill().unwrap();
        expect(&mut world, ONE, TWO);
        assert_eq!(world.place.pinned(), [format!("set-{set}")]);
    }
}

#[test]
fn to_stop_the_agent_is_not_to_stop_the_enforcement() {
    let mut world = World::opening(&[ONE]).unwrap();
    for signal in [Signal::TERM, Signal::INT] {
        let mut agent = world.start(&[]).unwrap();
        agent.signal(signal).unwrap();
        assert_eq!(agent.exit_status().unwrap().code(), Some(0));
        let (_, log) = agent.rest().unwrap();
        assert!(log.iter().any(|line| line.contains("the rules stay in force")), "{log:#?}");
        expect(&mut world, ONE, TWO);
    }
}

#[test]
fn with_detach_on_exit_both_end() {
    let mut world = World::opening(&[ONE]).unwrap();
    world.start(&[]).unwrap().kill().unwrap();
    for signal in [Signal::TERM, Signal::INT] {
        let mut agent = world.start(&["--detach-on-exit"]).unwrap();
        expect(&mut world, ONE, TWO);
        agent.signal(signal).unwrap();
        assert_eq!(agent.exit_status().unwrap().code(), Some(0));
        expect_nothing_in_force(&mut world);
    }
}

#[test]
fn detach_removes_everything_and_says_what() {
    let mut world = World::opening(&[ONE]).unwrap();
    let (code, said) = world.detach().unwrap();
    assert!(code == Some(0) && said.contains("nothing is in force"), "{code:?} {said}");

    let agent = world.start(&[]).unwrap();
    let (code, said) = world.detach().unwrap();
    assert!(code == Some(5) && said.contains(&format!("pid {}", agent.pid())), "{code:?} {said}");
    expect(&mut world, ONE, TWO);

    agent.kill().unwrap();
    let (code, said) = world.detach().unwrap();
    assert_eq!(code, Some(0), "{said}");
    let (cgroup, set) = (world.cgroup.name(), world.pin("set-1"));
    assert_eq!(said, format!("cgroup {cgroup} is no longer filtered\nremoved {}\n", set.display()));
    expect_nothing_in_force(&mut world);
    assert_eq!(world.detach().unwrap().0, Some(0));
}

#[test]
fn a_second_agent_is_refused_with_the_pid_of_the_first() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    let (code, log) = world.outcome(&[]).unwrap();
    assert_eq!(code, Some(5), "{log}");
    let pins = world.place.pins().display().to_string();
    let says =
        |line: &str| line.contains("ERROR") && line.contains(&format!("pid {}", agent.pid())) && line.contains(&pins);
    assert!(log.lines().any(says), "{log}");
    assert_eq!(world.place.pinned(), ["set-1"]);
    // Elsewhere there is room for another, on the same cgroup too.
    let elsewhere = world.place.pins().with_file_name("elsewhere");
    world.start(&["--pin-dir", elsewhere.to_str().unwrap()]).unwrap();
}

/// The destinations that a process dials without a pause are refused, or let through, in both policies.
#[test]
fn a_restart_leaves_no_gap() {
    let mut world = World::opening(&[ONE, TWO]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let (stop, dialer) = (AtomicBool::new(false), &mut world.dialer);
    // The loop needs the rest of the world while the thread dials.
    let (place, policies, cgroup) = (&world.place, &world.policies, &world.cgroup);
    let dials = thread::scope(|scope| {
        let dialling = scope.spawn(|| {
            let mut dials = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                assert!(!dialer.is_refused(&tcp(ONE, 80)).unwrap(), "refused what both policies allow");
                assert!(dialer.is_refused(&tcp("203.0.113.9", 80)).unwrap(), "let through what both policies refuse");
                dials += 2;
            }
            dials
        });
        for round in 0..20 {
            if round % 2 == 0 {
                agent.signal(Signal::KILL).unwrap();
            } else {
                agent.signal(Signal::TERM).unwrap();
            }
            agent.exit_status().unwrap();
            let other = if round % 2 == 0 { THREE } else { TWO };
            fs::write(policies.path().join("policy.yaml"), opening(&[ONE, other])).unwrap();
            agent = Agent::start_in(place, policies.path(), cgroup, &[]).unwrap();
            if dialling.is_finished() {
                break;
            }
        }
        stop.store(true, Ordering::Relaxed);
        dialling.join().unwrap()
    });
    println!("{dials} dials across 20 restarts");
    assert!(dials > 1_000, "{dials}");
    assert_eq!(world.place.pinned().len(), 1);
}

fn ports(denials: &[Value]) -> Vec<u64> {
    denials.iter().map(|denial| denial["destination"]["port"].as_u64().unwrap()).collect()
}

#[test]
fn denials_made_while_no_agent_ran_are_reported_by_the_next_one() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut refuse = |port| assert!(world.dialer.is_refused(&tcp(TWO, port)).unwrap());
    let start = || Agent::start_in(&world.place, world.policies.path(), &world.cgroup, &[]).unwrap();
    let mut agent = start();
    refuse(1);
    assert_eq!(agent.denial().unwrap()["destination"]["port"], 1);
    agent.kill().unwrap();
    (2..100).for_each(&mut refuse);
    let agent = start();
    refuse(100);
    // Once its own is there, so are those before it.
    let (_, denials, log) = agent.stop().unwrap();
    assert_eq!(ports(&denials), (2..=100).collect::<Vec<_>>(), "{log:#?}");
    assert!(
        denials.iter().all(|denial| denial["process"]["exe"].as_str().unwrap().ends_with("dial")),
        "{}",
        denials[0]
    );
    // What was reported is not reported again.
    let (_, denials, log) = start().stop().unwrap();
    assert!(denials.is_empty(), "{log:#?}");
}

/// The programs name rules by numbers that only the agent that made them understands.
#[test]
fn a_denial_of_the_agent_before_names_no_rule_of_this_one() {
    let policy = |name: &str, cidr: &str| {
        format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {name} }}\n\
             spec: {{ defaultAction: Allow, dns: {{ servers: None }}, loopback: None, deny: [{{ to: [{{ cidr: {cidr} }}] }}] }}\n"
        )
    };
    let mut world = World::opening(&[]).unwrap();
    world.write(&policy("before", TWO)).unwrap();
    let mut agent = world.start(&[]).unwrap();
    assert!(!world.is_open(TWO).unwrap());
    assert_eq!(agent.denial().unwrap()["rule"]["name"], "before");
    agent.kill().unwrap();
    assert!(!world.is_open(TWO).unwrap());
    world.write(&policy("after", THREE)).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let denial = agent.denial().unwrap();
    assert_eq!((&denial["reason"], &denial["rule"]), (&"rule".into(), &Value::Null), "{denial}");
    assert!(!world.is_open(THREE).unwrap());
    assert_eq!(agent.denial().unwrap()["rule"]["name"], "after");
}

#[test]
fn what_a_start_left_half_made_is_swept() {
    let mut world = World::opening(&[ONE]).unwrap();
    world.start(&[]).unwrap().kill().unwrap();
    for name in ["new-1", "new-99999999"] {
        fs::create_dir(world.pin(name)).unwrap();
    }
    foreign::pin_array(&world.pin("new-1/META"), 8, 1).unwrap();
    let half_made = Program::refuse(Hook::Connect4).unwrap().attach(&world.cgroup, How::Link).unwrap();
    half_made.pin(&world.pin("new-1/connect4")).unwrap();
    assert!(!world.is_open(ONE).unwrap());
    let mut agent = world.start(&[]).unwrap();
    assert_eq!(world.place.pinned(), ["set-2"]);
    let swept = agent.log().iter().filter(|line| line.contains("half-made")).count();
    assert_eq!(swept, 2, "{:#?}", agent.log());
    expect(&mut world, ONE, TWO);
    agent.kill().unwrap();

    // `detach` sweeps them, too.
    fs::create_dir(world.pin("new-1")).unwrap();
    let half_made = Program::refuse(Hook::Connect4).unwrap().attach(&world.cgroup, How::Link).unwrap();
    half_made.pin(&world.pin("new-1/connect4")).unwrap();
    assert_eq!(world.detach().unwrap().0, Some(0));
    expect_nothing_in_force(&mut world);
}

/// Whether probes for `Live` and `Ready` are met.
fn probes(world: &World) -> [bool; 2] {
    ["Live", "Ready"].map(|state| world.place.probe(state).unwrap().0)
}

#[test]
fn status_tells_what_is_in_force_whether_an_agent_runs_or_not() {
    let world = World::opening(&[ONE]).unwrap();
    let nothing = status(&world, 3);
    assert_eq!((&nothing["enforcing"], &nothing["agent"]["running"]), (&false.into(), &false.into()));
    assert_eq!(probes(&world), [false, false]);

    let agent = world.start(&[]).unwrap();
    assert_eq!(probes(&world), [true, true]);
    let pid = agent.pid();
    let healthy = status(&world, 0);
    assert_eq!((&healthy["agent"]["running"], &healthy["agent"]["pid"]), (&true.into(), &pid.into()));
    assert_eq!(healthy["attached"][0]["cgroup"], world.cgroup.name());
    assert_eq!(healthy["policy"]["documents"], 1);

    agent.kill().unwrap();
    let dead = degraded(&world, &["no agent runs"]);
    assert_eq!(probes(&world), [false, false]);
    assert!(world.place.probe("Live").unwrap().1.contains("no agent runs"));
    assert_eq!((&dead["enforcing"], &dead["agent"]["running"]), (&true.into(), &false.into()));
    assert_eq!((&dead["agent"]["pid"], &dead["policy"]["hash"]), (&pid.into(), &healthy["policy"]["hash"]));

    world.detach().unwrap();
    status(&world, 3);
}

#[test]
fn status_does_not_wait_for_an_agent_that_hangs() {
    let world = World::opening(&[ONE]).unwrap();
    let agent = world.start(&[]).unwrap();
    agent.signal(Signal::STOP).unwrap();
    let asked = Instant::now();
    let hung = degraded(&world, &["the agent does not answer"]);
    assert!(asked.elapsed() < Duration::from_secs(5), "{:?}", asked.elapsed());
    assert_eq!((&hung["agent"]["running"], &hung["agent"]["pid"]), (&true.into(), &agent.pid().into()));
    assert_eq!(probes(&world), [false, false]);
    agent.signal(Signal::CONT).unwrap();
    status(&world, 0);
}

#[test]
fn an_invalid_policy_shows_in_the_status() {
    let world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    world.write("kind: [").unwrap();
    agent.wait_for("the last good policy stays in force").unwrap();
    let status = degraded(&world, &["the last good policy stays in force"]);
    assert!(status["policy"]["last_error"].as_str().unwrap().contains("invalid"), "{status:#}");
    assert_eq!(probes(&world), [true, true], "a restart would not mend it");
}

/// As it would be if an agent were killed between two steps: attached, and those before not retired.
#[test]
fn of_two_sets_a_connection_must_pass_both_until_the_next_start() {
    let mut world = World::opening(&[ONE, TWO]).unwrap();
    let second = world.place.pins().with_file_name("second");
    world.start(&["--pin-dir", second.to_str().unwrap()]).unwrap().kill().unwrap();
    world.open_only(&[ONE, THREE]).unwrap();
    world.start(&[]).unwrap().kill().unwrap();
    fs::rename(second.join("set-1"), world.pin("set-2")).unwrap();
    degraded(&world, &["no agent runs", "2 sets are in force at once"]);
    expect(&mut world, ONE, TWO);
    expect(&mut world, ONE, THREE);

    let _agent = world.start(&[]).unwrap();
    assert_eq!(world.place.pinned(), ["set-3"]);
    status(&world, 0);
    expect(&mut world, THREE, TWO);
}

fn reload(place: &Place, args: &[&str]) -> (Option<i32>, String) {
    let output = place.output(&[&["reload"], args].concat()).unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn reload_reaches_the_agent_and_waits_if_asked() {
    let mut world = World::opening(&[ONE]).unwrap();
    for args in [&[][..], &["--wait"]] {
        let (code, said) = reload(&world.place, args);
        assert!(code == Some(2) && said.contains("does it run?"), "{code:?} {said}");
    }
    let mut agent = world.start(&[]).unwrap();
    for (generation, [open, refused]) in (2..12).zip([[TWO, ONE], [ONE, TWO]].into_iter().cycle()) {
        world.open_only(&[open]).unwrap();
        let (code, said) = reload(&world.place, &["--wait"]);
        assert_eq!((code, said), (Some(0), format!("generation {generation} is in force\n")));
        expect(&mut world, open, refused);
    }
    assert_eq!(reload(&world.place, &[]), (Some(0), String::new()));
    agent.wait_for("policy unchanged generation=11").unwrap();

    world.write("kind: [").unwrap();
    let (code, said) = reload(&world.place, &["--wait"]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("invalid") && said.contains("generation 11 stays in force"), "{said}");
    expect(&mut world, ONE, TWO);

    agent.kill().unwrap();
    assert_eq!(reload(&world.place, &["--wait"]).0, Some(2));
}

/// Takes about 1.3 MB in the kernel, and cannot be merged.
fn large() -> String {
    let mut text = String::new();
    for index in 0..10_000_u32 {
        let _ = write!(text, "{{ cidr: 10.{}.{}.1 }}, ", index >> 8, index & 255);
    }
    opening(&[ONE]).replace("to: [", &format!("to: [{text}"))
}

#[test]
fn a_policy_beyond_the_memory_limit_is_refused_with_numbers() {
    let mut world = World::opening(&[ONE]).unwrap();
    world.write(&large()).unwrap();
    let (code, log) = world.outcome(&["--memory-limit", "1"]).unwrap();
    assert_eq!(code, Some(1), "{log}");
    let says = |line: &str| {
        line.contains("ERROR") && line.contains("1 MB") && line.contains("1000") && line.contains("--memory-limit")
    };
    assert!(log.lines().any(says), "{log}");
    assert!(world.place.pinned().is_empty());
    assert!(world.is_open(TWO).unwrap());

    world.open_only(&[ONE]).unwrap();
    let mut agent = world.start(&["--memory-limit", "1"]).unwrap();
    world.write(&large()).unwrap();
    let line = agent.wait_for("the last good policy stays in force").unwrap();
    assert!(says(&line), "{line}");
    expect(&mut world, ONE, "10.0.0.1");
    degraded(&world, &["--memory-limit"]);

    world.open_only(&[TWO]).unwrap();
    agent.wait_for("policy applied generation=2 ").unwrap();
    expect(&mut world, TWO, ONE);
    status(&world, 0);
}
