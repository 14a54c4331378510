//! Any bytes as an answer of a DNS server.

#![no_main]

use egress_tests::fuzz_targets::dns::dns_message;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dns_message(bytes));
