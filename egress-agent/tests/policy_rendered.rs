//! Findings as they are printed. `UPDATE_SNAPSHOTS=1` writes the expected text anew.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{env, fs, path::Path};

use egress_agent::policy::{
    diagnostic::{Color, render},
    load::load_text,
};

fn check(name: &str) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policy/rendered");
    let text = fs::read_to_string(directory.join(name)).unwrap();
    let loaded = load_text(name, &text);
    let printed = |finding| render(finding, loaded.source(finding), Color::Never);
    let printed: Vec<String> = loaded.findings.iter().map(printed).collect();
    let json: Vec<String> =
        loaded.findings.iter().map(|finding| serde_json::to_string(finding).unwrap() + "\n").collect();
    for (found, extension) in [(printed.join("\n"), "txt"), (json.concat(), "jsonl")] {
        let expected = directory.join(name).with_extension(extension);
        if env::var_os("UPDATE_SNAPSHOTS").is_some() {
            fs::write(&expected, &found).unwrap();
        }
        assert_eq!(fs::read_to_string(&expected).unwrap_or_default(), found, "{}", expected.display());
    }
}

#[test]
fn a_service_entry_with_many_mistakes() {
    check("service_entry.yaml");
}

#[test]
fn an_egress_policy_with_many_mistakes() {
    check("egress_policy.yaml");
}

#[test]
fn broken_text() {
    check("text.yaml");
}

#[test]
fn color_is_added_around_and_never_inside_what_is_said() {
    let loaded = load_text("a.yaml", "a: b: c\n");
    let finding = &loaded.findings[0];
    let (plain, colored) = (Color::Never, Color::Ansi);
    let [plain, colored] = [plain, colored].map(|color| render(finding, loaded.source(finding), color));
    assert!(colored.starts_with("\u{1b}[1;31merror[E0003]\u{1b}[0m"), "{colored:?}");
    let mut stripped = colored.clone();
    for code in ["\u{1b}[1;31m", "\u{1b}[1m", "\u{1b}[1;34m", "\u{1b}[0m"] {
        stripped = stripped.replace(code, "");
    }
    assert_eq!(stripped, plain);
}
