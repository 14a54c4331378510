//! Every way by which a process can make this host send a packet off the machine: closed, or documented.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::fs;

use egress_tests::escape::{battery, table};

#[test]
fn no_way_out_that_is_not_documented() {
    let cases = battery::run(&[]).unwrap();
    if let Some(file) = std::env::var_os("EGRESS_ESCAPE_TABLE") {
        fs::write(file, table::markdown(&cases)).unwrap();
    }
    battery::check(&cases).unwrap();
}
