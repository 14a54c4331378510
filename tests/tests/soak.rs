//! Everything that wears an agent down, side by side, for minutes: see [`egress_tests::soak`].

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{env, time::Duration};

use egress_tests::soak::{Options, soak};

/// How many minutes, unless `EGRESS_SOAK_MINUTES` says otherwise.
const MINUTES: u64 = 5;

#[test]
fn every_invariant_holds_for_minutes() {
    let minutes = env::var("EGRESS_SOAK_MINUTES").map_or(MINUTES, |minutes| minutes.parse().unwrap());
    // In a machine that is emulated everything takes longer.
    let slowness = if env::var_os("EGRESS_MACHINE").is_some() { 20 } else { 1 };
    let table = soak(Options { time: Duration::from_mins(minutes), slowness }).unwrap();
    println!("{table}");
    assert!(table.holds(), "an invariant did not hold:\n{table}");
}
