//! What the filter adds to one UDP `connect`: `cargo bench --package egress-tests --bench connect`, as root, with
//! `EGRESS_AGENT` naming the built agent.
//!
//! The same process dials the same destination: without a filter, behind a program that does nothing, and behind policies of
//! several sizes. The cases take turns in each round; printed are the medians, and the median of what a round added to its
//! unfiltered case.

use std::{fmt::Write as _, fs, net::Ipv4Addr};

use anyhow::Result;
use egress_tests::{
    agent::Agent,
    cgroup::Cgroup,
    dial::{Call, Dialer, Method, Timed},
    foreign::{Hook, How, Program},
    netns::Netns,
};

const ROUNDS: usize = 51;
const CALLS: u32 = 10_000;

fn main() -> Result<()> {
    let namespace = Netns::with_every_address_local()?;
    println!("{:<34} {:>8} {:>8}", "UDP connect", "ns", "added");
    let open = Cgroup::new()?;
    let mut unfiltered = Dialer::start(env!("CARGO_BIN_EXE_dial"), &open, &namespace)?;
    let empty = Cgroup::new()?;
    let _empty = Program::pass(Hook::Connect4)?.attach(&empty, How::Link)?;
    let mut passed = Dialer::start(env!("CARGO_BIN_EXE_dial"), &empty, &namespace)?;
    for size in [1, 1_000, 100_000] {
        let (cgroup, policies) = (Cgroup::new()?, tempfile::tempdir()?);
        fs::write(policies.path().join("policy.yaml"), document(size))?;
        let _agent = Agent::start(policies.path(), &cgroup, &[])?;
        let mut filtered = Dialer::start(env!("CARGO_BIN_EXE_dial"), &cgroup, &namespace)?;
        let call = |address: Ipv4Addr| Call { method: Method::UdpConnect, mapped: false, to: (address, 53).into() };
        let allowed = call(address(size / 2));
        let refused = call(Ipv4Addr::new(9, 9, 9, 9));
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let none = unfiltered.time(Timed::Connect, &allowed, CALLS)?;
            let empty = passed.time(Timed::Connect, &allowed, CALLS)?;
            let allowed = filtered.time(Timed::Connect, &allowed, CALLS)?;
            // Few enough that the reports of a round fit the ring buffer.
            rounds.push([none, empty, allowed, filtered.time(Timed::Connect, &refused, 5_000)?]);
        }
        let column = |of: fn(&[f64; 4]) -> f64| median(rounds.iter().map(of).collect());
        println!("{:<34} {:>8.0}", "without a filter", column(|round| round[0]));
        let (empty, added) = (column(|round| round[1]), column(|round| round[1] - round[0]));
        println!("{:<34} {empty:>8.0} {added:>+8.0}", "a program that does nothing");
        let (allowed, added) = (column(|round| round[2]), column(|round| round[2] - round[0]));
        println!("{:<34} {allowed:>8.0} {added:>+8.0}", format!("allowed, prefixes: {size}"));
        println!("{:<34} {:>8.0}", format!("refused and reported, prefixes: {size}"), column(|round| round[3]));
    }
    beside_connect(&namespace, &mut unfiltered)
}

/// What is added to calls beside `connect`, with and without the packet guard.
fn beside_connect(namespace: &Netns, unfiltered: &mut Dialer) -> Result<()> {
    let policies = tempfile::tempdir()?;
    fs::write(policies.path().join("policy.yaml"), document(1))?;
    let (off, on) = (Cgroup::new()?, Cgroup::new()?);
    let _without = Agent::start(policies.path(), &off, &["--packet-guard", "Off"])?;
    let _with = Agent::start(policies.path(), &on, &["--packet-guard", "On"])?;
    let mut off = Dialer::start(env!("CARGO_BIN_EXE_dial"), &off, namespace)?;
    let mut on = Dialer::start(env!("CARGO_BIN_EXE_dial"), &on, namespace)?;
    let call = Call { method: Method::UdpConnect, mapped: false, to: (address(0), 53).into() };
    for (what, timed) in [
        ("a datagram", Timed::Datagram),
        ("a datagram and its answer", Timed::Exchange),
        ("a UDP socket, made and closed", Timed::Socket),
        ("setsockopt", Timed::Option),
    ] {
        let mut rounds = Vec::new();
        for _ in 0..ROUNDS {
            let [none, off, on] = [&mut *unfiltered, &mut off, &mut on].map(|dialer| dialer.time(timed, &call, CALLS));
            rounds.push((none?, off?, on?));
        }
        let column = |of: fn(&(f64, f64, f64)) -> f64| median(rounds.iter().map(of).collect());
        println!("{:<34} {:>8.0}", what, column(|round| round.0));
        let (guarded, added) = (column(|round| round.2), column(|round| round.2 - round.0));
        println!(
            "{:<34} {:>8.0} {:>+8.0}",
            "  without the guard",
            column(|round| round.1),
            column(|round| round.1 - round.0)
        );
        println!("{:<34} {guarded:>8.0} {added:>+8.0}", "  with the guard");
    }
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// The prefixes lie apart, so none is merged with another.
fn address(index: u32) -> Ipv4Addr {
    Ipv4Addr::from_bits(0x0b00_0000 + index * 2)
}

fn document(prefixes: u32) -> String {
    let mut text =
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: bench }\nspec:\n  hosts: \
                    [bench.example.com]\n  ports: [{ number: 53, name: dns, protocol: UDP }]\n  addresses:\n"
            .to_owned();
    for index in 0..prefixes {
        let _ = writeln!(text, "  - {}", address(index));
    }
    text
}
