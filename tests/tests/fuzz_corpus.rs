//! The corpus of the fuzz targets, replayed.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use egress_tests::fuzz_targets::{compile_vs_reference, dns::dns_message, read_policy};

/// Runs a target on each file of its corpus.
fn replay(target: &str, run: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&directory)
        .unwrap_or_else(|error| panic!("no corpus in {}: {error}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    for file in files {
        // Shown only if the test fails, and then the last one is the one that did it.
        println!("{}", file.display());
        run(&fs::read(&file).unwrap());
    }
}

#[test]
fn every_text_of_the_corpus_is_read() {
    replay("read_policy", read_policy);
}

#[test]
fn every_policy_of_the_corpus_decides_as_the_reference_says() {
    replay("compile_vs_reference", compile_vs_reference);
}

#[test]
fn every_answer_of_the_corpus_is_read_as_a_resolver_reads_it() {
    replay("dns_message", dns_message);
}

#[test]
fn what_is_wrong_at_the_end_of_a_text_without_a_last_line_break_is_shown_there() {
    for text in ["a: [b", "a: [\t", "a: b: c\n---\na: [\t", "a: b\n? ? ? : ", "\u{1f4a9}: [\u{1f4a9}"] {
        read_policy(text.as_bytes());
    }
}
