//! Hostile text: bounded in time and memory, never a panic, and never read by halves.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fmt::Write as _,
    fs,
    path::Path,
    time::{Duration, Instant},
};

use egress_agent::policy::{
    code::Code,
    decode::MAX_FINDINGS,
    diagnostic::{Color, render},
    load::{Loaded, load_text},
};
use proptest::prelude::*;

fn codes(text: &str) -> Vec<Code> {
    load_text("x.yaml", text).findings.iter().map(|finding| finding.code).collect()
}

fn entry(spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: a}}\nspec:\n  hosts: [a.example.com]\n{spec}"
    )
}

#[test]
fn nesting_is_bounded() {
    for open in ["- ", "[", "{a: ", "? ", "a:\n"] {
        let text: String = if open.ends_with('\n') {
            (0..200).fold(String::new(), |text, depth| text + &" ".repeat(depth) + open)
        } else {
            open.repeat(100_000)
        };
        let started = Instant::now();
        let found = codes(&text);
        assert!(matches!(found[..], [Code::TooComplex | Code::Syntax]), "{open:?}: {found:?}");
        assert!(started.elapsed() < Duration::from_secs(2), "{open:?}");
    }
}

#[test]
fn alias_bombs_end_in_an_error() {
    let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..20 {
        let aliases = vec![format!("*a{}", level - 1); 10].join(", ");
        writeln!(text, "a{level}: &a{level} [{aliases}]").unwrap();
    }
    assert_eq!(codes(&text), [Code::TooComplex]);
    let nested = "&a [".repeat(60) + &"x, ".repeat(20_000) + &"]".repeat(60);
    assert_eq!(codes(&nested), [Code::TooComplex]);
}

#[test]
fn a_text_is_never_cut_short() {
    let spec = "  addresses:\n  - 10.0.0.1\n";
    for filler in ["#\n".repeat(1_100_000), " \n".repeat(1_100_000), format!("# {}\n", "x".repeat(2_200_000))] {
        assert_eq!(codes(&(filler + &entry(spec))), [Code::TooComplex]);
    }
    let flow = entry(&format!("  addresses:\n    [{}10.0.0.1]\n", "10.0.0.2, ".repeat(220_000)));
    assert_eq!(codes(&flow), [Code::TooComplex]);
}

#[test]
fn a_million_prefixes_load_in_seconds() {
    let mut spec = String::from("  addresses:\n");
    for number in 0..1_000_000_u32 {
        let [_, b, c, d] = number.to_be_bytes();
        writeln!(spec, "  - 10.{b}.{c}.{d}/32").unwrap();
    }
    let started = Instant::now();
    let loaded = load_text("x.yaml", &entry(&spec));
    assert_eq!(loaded.policies.service_entries[0].addresses.len(), 1_000_000);
    assert_eq!(loaded.findings.iter().map(|finding| finding.code).collect::<Vec<_>>(), [Code::BeyondApiLimit]);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn findings_are_bounded_and_errors_stay_errors() {
    let addresses = |address: &str| entry(&format!("  addresses:\n{}", format!("  - {address}\n").repeat(5000)));
    let loaded = load_text("x.yaml", &addresses("x"));
    assert_eq!(loaded.findings.iter().filter(|finding| finding.code == Code::BadAddress).count(), MAX_FINDINGS);
    assert!(loaded.findings.iter().any(|finding| finding.code == Code::TooManyErrors));
    let loaded = load_text("x.yaml", &(addresses("10.0.0.1/8") + "  - x\n"));
    assert!(loaded.findings.iter().any(|finding| finding.code == Code::TooManyNotes));
    assert!(loaded.findings.iter().any(|finding| finding.code == Code::BadAddress));
    assert_eq!(loaded.findings.len(), MAX_FINDINGS + 2);
}

#[test]
fn no_list_is_searched_again_and_again() {
    let mut ports = String::from("  ports:\n");
    for number in 1..60_000 {
        writeln!(ports, "  - {{number: {number}, name: p{number}, protocol: HTTP}}").unwrap();
    }
    let mut keys = String::new();
    for key in 0..200_000 {
        writeln!(keys, "k{key}: v").unwrap();
    }
    let started = Instant::now();
    assert_eq!(codes(&entry(&ports)), [Code::BeyondApiLimit]);
    load_text("x.yaml", &keys);
    load_text("x.yaml", &format!("<<: [{}]\n{keys}", "{a: b}, ".repeat(30_000)));
    load_text("x.yaml", &"a: b: c\n---\n".repeat(20_000));
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn control_characters_never_reach_the_terminal() {
    let hostile = "\u{1b}]0;title\u{7}\u{9b}31m\u{202e}";
    for text in [
        entry(
            &format!("  \"x{hostile}\": 1\n")
                .replace('\u{1b}', "\\e")
                .replace('\u{7}', "\\a")
                .replace('\u{9b}', "\\x9b"),
        ),
        entry("  addresses: [\"\\e[31m\\x9b1m\u{202e}x\"]\n"),
        entry(&format!("  addresses: [{hostile}]\n")),
        entry("  exportTo: [\"\\u202e\u{2066}\"]\n"),
        format!("kind: \"\\e[2J\"\napiVersion: a # {}", '\u{202e}'),
    ] {
        let loaded = load_text("bad\u{1b}[0m\u{9b}.yaml", &text);
        assert!(!loaded.findings.is_empty());
        for finding in &loaded.findings {
            let printed =
                render(finding, loaded.source(finding), Color::Never) + &serde_json::to_string(finding).unwrap();
            let bad = |c: char| (c.is_control() && c != '\n') || ('\u{202a}'..='\u{202e}').contains(&c);
            assert!(!printed.contains(bad), "{printed:?}");
        }
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policy/errors");
    fs::read_dir(directory).unwrap().map(|file| fs::read(file.unwrap().path()).unwrap()).collect()
}

/// What must hold of any text at all.
fn check(bytes: &[u8]) -> Loaded {
    let text = String::from_utf8_lossy(bytes);
    let started = Instant::now();
    let loaded = load_text("x.yaml", &text);
    assert!(started.elapsed() < Duration::from_secs(5), "{text:?}");
    for finding in &loaded.findings {
        assert!(finding.line >= 1 && finding.column >= 1, "{finding:?}");
        render(finding, loaded.source(finding), Color::Ansi);
    }
    loaded
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_end_in_a_result(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        check(&bytes);
    }

    #[test]
    fn any_yaml_like_text_ends_in_a_result(text in "[-:,\\[\\]{}&*!|>'\"%@`#?~ \t\n\r0-9a-c.]{0,200}") {
        check(text.as_bytes());
    }

    #[test]
    fn any_change_of_a_document_ends_in_a_result(
        seed in any::<proptest::sample::Index>(),
        start in any::<proptest::sample::Index>(),
        changes in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let seeds = seeds();
        let text = seed.get(&seeds);
        let start = start.index(text.len());
        let mut text = text[start..text.len().min(start + 2000)].to_vec();
        for (place, byte) in changes {
            let place = place.index(text.len());
            text[place] = byte;
        }
        check(&text);
    }
}
