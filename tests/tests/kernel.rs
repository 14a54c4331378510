//! The kernel decides as the documents say: tens of thousands of real calls, verdict by verdict, in a namespace in which
//! every address is local, so that no packet leaves.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{fs, net::SocketAddr};

use egress_agent::{
    compile::{Context, NodeAction, NodeDefault},
    policy::{L4, load::load_text},
    workload::Workload,
};
use egress_tests::{
    agent::Agent,
    cgroup::Cgroup,
    dial::{Call, Dialer, Method, is_dialable},
    generate,
    netns::Netns,
    reference::{Answer, Question, Why, judge},
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use serde_json::Value;

const POLICIES: u64 = 60;
const CALLS: usize = 500;

/// Random, but the same in each run.
fn runner() -> TestRunner {
    TestRunner::new_with_rng(Config::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]))
}

/// One value of a strategy.
fn pick<T>(runner: &mut TestRunner, strategy: impl Strategy<Value = T>) -> T {
    strategy.new_tree(runner).unwrap().current()
}

/// A call that asks the kernel the question; `None` if it would fail before any hook.
fn call(runner: &mut TestRunner, asked: Question) -> Option<Call> {
    let method = match asked.l4 {
        L4::Tcp => Method::TcpConnect,
        // The kernel refuses to send to port 0 before it asks anybody.
        L4::Udp if asked.port != 0 && pick(runner, any::<bool>()) => Method::UdpSend,
        L4::Udp => Method::UdpConnect,
    };
    let mapped = pick(runner, any::<bool>());
    is_dialable(asked.address).then(|| Call { method, mapped, to: SocketAddr::new(asked.address, asked.port) })
}

#[test]
fn the_kernel_decides_as_the_reference_says() {
    let (cgroup, namespace) = (Cgroup::new().unwrap(), Netns::with_every_address_local().unwrap());
    let directory = tempfile::tempdir().unwrap();
    let mut agent = Agent::start(directory.path(), &cgroup, &["--no-dns"]).unwrap();
    let mut dialer = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace).unwrap();
    let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: false };
    let context = Context::new(node_default);
    let mut runner = runner();
    let (mut refused, mut audited, mut calls) = (0, 0, 0_u64);
    for round in 1..=POLICIES {
        let mut documents: Vec<Value> = (0..4).map(|index| pick(&mut runner, generate::service_entry(index))).collect();
        documents.extend((0..round % 4).map(|index| {
            // The running agent cannot select workloads yet, so each policy speaks for all.
            pick(&mut runner, generate::egress_policy(index.try_into().unwrap(), false))
        }));
        let text = generate::file(&documents);
        fs::write(directory.path().join("policy.yaml"), &text).unwrap();
        agent.wait_for(&format!("policy applied generation={} ", round + 1)).unwrap();
        let policies = load_text("policy.yaml", &text).policies;
        let questions = generate::question_about(&policies);
        for _ in 0..CALLS {
            let asked = pick(&mut runner, &questions);
            let Some(call) = call(&mut runner, asked) else { continue };
            let answer = judge(&policies, &Workload::default(), &context, asked);
            let is_refused = matches!(answer, Answer::Deny(_));
            if dialer.is_refused(&call).unwrap() != is_refused {
                let denial = if is_refused { None } else { Some(agent.denial()) };
                panic!("{call} is {}refused, {denial:?}, under\n{text}", if is_refused { "not " } else { "" });
            }
            match &answer {
                Answer::Allow(_) => {}
                Answer::Deny(why) => check_denial(&agent.denial().unwrap(), "deny", asked, why, dialer.pid()),
                Answer::WouldDeny(why) => {
                    check_denial(&agent.denial().unwrap(), "would_deny", asked, why, dialer.pid());
                }
            }
            refused += u64::from(is_refused);
            audited += u64::from(matches!(answer, Answer::WouldDeny(_)));
            calls += 1;
        }
    }
    let (status, denials, log) = agent.stop().unwrap();
    assert_eq!((status.code(), denials.len()), (Some(0), 0), "{log:#?}");
    assert!(refused > calls / 5 && refused < calls * 4 / 5, "{refused} of {calls} refused: the flows are one-sided");
    assert!(audited > 100, "{audited} calls tell nothing about Audit");
    println!("{calls} calls under {POLICIES} policies, {refused} refused, {audited} only reported");
}

fn check_denial(denial: &Value, verdict: &str, asked: Question, why: &Why, pid: u32) {
    let canonical = asked.address.to_canonical().to_string();
    assert_eq!(denial["destination"]["address"], canonical.as_str(), "{denial}");
    assert_eq!(denial["verdict"], verdict, "{denial}");
    assert_eq!(denial.get("errno").is_some(), verdict == "deny", "{denial}");
    assert_eq!(denial["destination"]["port"], asked.port, "{denial}");
    assert_eq!(denial["process"]["pid"], pid, "{denial}");
    let (reason, place) = match why {
        Why::Rule(_, place) => ("rule", Value::from(place.as_str())),
        Why::NoRule => ("no_rule", Value::Null),
    };
    assert_eq!((&denial["reason"], &denial["rule"]["path"]), (&reason.into(), &place), "{denial}");
}
