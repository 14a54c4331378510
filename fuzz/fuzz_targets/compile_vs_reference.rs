//! Any policies, compiled, against the reference.

#![no_main]

use egress_tests::fuzz_targets::compile_vs_reference;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| compile_vs_reference(bytes));
