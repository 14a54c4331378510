//! Any text as a policy file.

#![no_main]

use egress_tests::fuzz_targets::read_policy;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| read_policy(bytes));
