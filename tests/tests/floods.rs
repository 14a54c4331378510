//! Workloads whose reports are dear, or very many: they take it from themselves, not from their neighbours, and not from the
//! memory of the agent.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::time::Duration;

use egress_tests::{
    PATIENCE,
    agent::Agent,
    flood::{Flood, Kind, Neighbour, peak_memory},
    world::World,
};

/// Most memory that the agent may ever have.
const MEMORY: u64 = 64 << 20;
/// Refusals of the neighbour, and in how long all of them are to be reported.
const REFUSALS: u32 = 400;
const WITHIN: Duration = Duration::from_secs(1);
/// What reads logs cuts longer lines.
const LINE: usize = 16 << 10;

/// Beside a flood of a kind, a neighbour's refusals are reported in time, no line is too long, and the agent stays small.
fn beside(kind: Kind) {
    let mut world = World::opening(&["192.0.2.1"]).unwrap();
    let (noisy, quiet) = (world.cgroup.child("noisy").unwrap(), world.cgroup.child("quiet").unwrap());
    let mut neighbour = Neighbour::start(&quiet, &world.namespace).unwrap();
    let command = world.command(&[]).unwrap();
    let (mut agent, reports) = Agent::watched(&world.place, command, &[neighbour.cgroup()]).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    let flood = Flood::start(kind, &noisy, &world.namespace).unwrap();
    // A machine that is busy otherwise may take longer once.
    let mut times = Vec::new();
    for round in 1..=3 {
        neighbour.refuse(REFUSALS).unwrap();
        let time = reports.wait_for(neighbour.cgroup(), u64::from(REFUSALS * round), PATIENCE);
        times.push(time.unwrap_or_else(|error| panic!("{kind:?}: {error}\n{}", agent.log().join("\n"))));
    }
    let (memory, seen) = (peak_memory(agent.pid()).unwrap(), reports.seen());
    println!("{kind:?}: {times:?}, {} MB, {} lines, the longest of {}", memory >> 20, seen.lines, seen.longest);
    drop(flood);
    assert!(world.is_open("192.0.2.1").unwrap());
    agent.kill().unwrap();
    assert!(times.iter().any(|time| *time < WITHIN), "{kind:?}: {times:?}");
    assert!(memory < MEMORY, "{kind:?}: {} MB", memory >> 20);
    assert!(seen.longest <= LINE && seen.harmful == 0, "{kind:?}: {seen:#?}");
}

#[test]
fn a_flood_of_refusals_delays_no_report_of_a_neighbour() {
    beside(Kind::Plain);
}

#[test]
fn memory_that_is_declared_to_be_arguments_is_not_read() {
    beside(Kind::DeclaredArguments);
}

#[test]
fn long_arguments_are_cut() {
    beside(Kind::Arguments);
}

#[test]
fn a_cgroup_a_thousand_levels_deep_costs_no_more_than_others() {
    beside(Kind::Deep);
}

#[test]
fn jobs_in_ten_thousand_cgroups_delay_no_report_of_a_neighbour() {
    beside(Kind::Jobs);
}

#[test]
fn names_and_arguments_of_control_characters_fit_a_line() {
    beside(Kind::Names);
}
