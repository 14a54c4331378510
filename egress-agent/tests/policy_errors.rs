//! Every finding, at its place: the files in `policy/errors` say in comments what is found where.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::BTreeSet;

use egress_agent::policy::{code::Code, load::load_text, yaml::documents};

#[path = "policy/annotated.rs"]
mod annotated;

const FILES: [&str; 5] =
    ["errors/yaml.yaml", "errors/object.yaml", "errors/service_entry.yaml", "errors/egress_policy.yaml", "lint.yaml"];

fn check(name: &str) {
    annotated::check(name, |text| annotated::places(&load_text(name, text).findings));
}

#[test]
fn broken_text_is_found() {
    annotated::check("errors/yaml.yaml", |text| {
        let problems = documents(text).flat_map(|document| document.problems);
        problems.map(|p| format!("{}:{} {}", p.span.line, p.span.column, p.code)).collect()
    });
}

#[test]
fn broken_objects_are_found() {
    check("errors/object.yaml");
}

#[test]
fn every_rule_of_a_service_entry_is_checked() {
    check("errors/service_entry.yaml");
}

#[test]
fn every_rule_of_an_egress_policy_is_checked() {
    check("errors/egress_policy.yaml");
}

/// Codes about whole files, bounds and the set have tests of their own, in the other `policy_*.rs`.
#[test]
fn every_code_is_tested() {
    const ELSEWHERE: [Code; 13] = [
        Code::FileTooLarge,
        Code::NotUtf8,
        Code::TooComplex,
        Code::UnsafeOwner,
        Code::Unreadable,
        Code::TooManyErrors,
        Code::TooManyNotes,
        Code::BeyondApiLimit,
        Code::UnknownPods,
        Code::AuditOnly,
        Code::RawSockets,
        // Of objects of the Kubernetes API.
        Code::IgnoredField,
        // Of `check`, which knows more than the documents.
        Code::DoesNotResolve,
    ];
    let mut tested: BTreeSet<String> = ELSEWHERE.iter().map(ToString::to_string).collect();
    for name in FILES {
        let expected = annotated::expected(&annotated::text(name));
        tested.extend(expected.iter().filter_map(|line| line.split(' ').nth(1).map(str::to_owned)));
    }
    let all: BTreeSet<String> = Code::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(tested, all);
}

#[test]
fn documents_without_errors_are_kept() {
    let loaded = load_text("x", &annotated::text("errors/service_entry.yaml"));
    let kept: Vec<&str> = loaded.policies.service_entries.iter().map(|entry| &*entry.object.name).collect();
    let good =
        ["dynamic-good", "enum-numbers", "good-addresses", "good-hosts", "shared-address", "tcp-without-address"];
    assert!(good.iter().all(|name| kept.contains(name)), "{kept:?}");
    assert!(!kept.contains(&"bad-hosts"));
}
