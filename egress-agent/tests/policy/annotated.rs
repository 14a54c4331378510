//! Test documents that say in comments what is found where.

use std::{fs, path::Path};

use egress_agent::policy::{code::Code, diagnostic::Finding};

/// The text of a file below `tests/policy`.
pub fn text(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/policy").join(name)).unwrap()
}

/// `line:column code` of each comment: `^ CODE` stands below the place, `#< CODE` below a first column.
pub fn expected(text: &str) -> Vec<String> {
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

/// `line:column code` of each finding.
#[allow(dead_code, reason = "not every test that includes this module looks at findings")]
pub fn places(findings: &[Finding]) -> Vec<String> {
    findings.iter().map(|f| format!("{}:{} {}", f.line, f.column, f.code)).collect()
}

/// Compares, and says what is missing and what is too much.
pub fn check(name: &str, find: impl Fn(&str) -> Vec<String>) {
    let text = text(name);
    let (expected, mut found) = (expected(&text), find(&text));
    found.sort();
    let missing: Vec<&String> = expected.iter().filter(|item| !found.contains(item)).collect();
    let surplus: Vec<&String> = found.iter().filter(|item| !expected.contains(item)).collect();
    assert!(missing.is_empty() && surplus.is_empty(), "{name}: not found {missing:#?}, not expected {surplus:#?}");
    assert_eq!(expected, found, "{name}: the same finding a different number of times");
}
