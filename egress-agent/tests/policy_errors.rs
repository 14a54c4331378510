//! Every finding, at its place: the files in `policy/errors` say in comments what is found where.

use std::{collections::BTreeSet, fs, path::Path};

use egress_agent::policy::{
    code::Code,
    load::{Loaded, load_text},
    yaml::documents,
};

fn directory() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policy/errors")
}

/// `line:column code` of each comment.
fn expected(text: &str) -> Vec<String> {
    let mut expected = Vec::new();
    let mut about = 0;
    for (index, line) in text.lines().enumerate() {
        let Some((_, comment)) = line.split_once('#').filter(|(before, _)| before.trim().is_empty()) else {
            about = index + 1;
            continue;
        };
        if let Some(code) = comment.strip_prefix("< ") {
            expected.push(format!("{about}:1 {code}"));
        } else if let Some((before, code)) = line.split_once("^ ")
            && Code::ALL.iter().any(|known| known.as_str() == code)
        {
            expected.push(format!("{about}:{} {code}", before.chars().count() + 1));
        }
    }
    expected.sort();
    expected
}

fn found(loaded: &Loaded) -> Vec<String> {
    let findings = loaded.findings.iter();
    findings.map(|f| format!("{}:{} {}", f.line, f.column, f.code)).collect()
}

fn check(name: &str) {
    check_with(name, |text| found(&load_text(name, text)));
}

fn check_with(name: &str, find: impl Fn(&str) -> Vec<String>) {
    let text = fs::read_to_string(directory().join(name)).unwrap();
    let (expected, mut found) = (expected(&text), find(&text));
    found.sort();
    let missing: Vec<&String> = expected.iter().filter(|item| !found.contains(item)).collect();
    let surplus: Vec<&String> = found.iter().filter(|item| !expected.contains(item)).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "{name}: not found {missing:#?}, not expected {surplus:#?}");
    assert_eq!(expected, found, "{name}: the same finding a different number of times");
}

#[test]
fn broken_text_is_found() {
    check_with("yaml.yaml", |text| {
        let problems = documents(text).flat_map(|document| document.problems);
        problems.map(|p| format!("{}:{} {}", p.span.line, p.span.column, p.code)).collect()
    });
}

#[test]
fn broken_objects_are_found() {
    check("object.yaml");
}

#[test]
fn every_rule_of_a_service_entry_is_checked() {
    check("service_entry.yaml");
}

#[test]
fn every_rule_of_an_egress_policy_is_checked() {
    check("egress_policy.yaml");
}

/// Codes about whole files and bounds have tests of their own, in `policy_load.rs` and `policy_bounds.rs`.
#[test]
fn every_code_is_tested() {
    const ELSEWHERE: [Code; 9] = [
        Code::FileTooLarge,
        Code::NotUtf8,
        Code::TooComplex,
        Code::UnsafeOwner,
        Code::Unreadable,
        Code::TooManyErrors,
        Code::TooManyNotes,
        Code::BeyondApiLimit,
        Code::NotBuilt,
    ];
    let mut tested: BTreeSet<String> = ELSEWHERE.iter().map(ToString::to_string).collect();
    for file in fs::read_dir(directory()).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        tested.extend(expected(&text).iter().filter_map(|line| line.split(' ').nth(1).map(str::to_owned)));
    }
    let all: BTreeSet<String> = Code::ALL.iter().map(ToString::to_string).collect();
    assert_eq!(tested, all);
}

#[test]
fn documents_without_errors_are_kept() {
    let loaded = load_text("x", &fs::read_to_string(directory().join("service_entry.yaml")).unwrap());
    let kept: Vec<&str> = loaded.policies.service_entries.iter().map(|entry| &*entry.object.name).collect();
    let good =
        ["dynamic-good", "enum-numbers", "good-addresses", "good-hosts", "shared-address", "tcp-without-address"];
    assert!(good.iter().all(|name| kept.contains(name)), "{kept:?}");
    assert!(!kept.contains(&"bad-hosts"));
}
