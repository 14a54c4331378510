//! Documents that people have. `EGRESS_CORPUS` names a directory of them; without it the project's own examples are
//! read. YAML files, fenced blocks of Markdown and here-documents of shell scripts are taken; unrendered templates are
//! named and skipped. Each `ServiceEntry` is accepted, or rejected for a reason that Istio's own validation has.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use egress_agent::policy::{
    diagnostic::{Color, Severity, render},
    load::load_text,
};

/// One text that was written as YAML.
struct Block {
    /// File and first line.
    origin: String,
    text: String,
}

#[derive(Default)]
struct Counts {
    blocks: usize,
    templates: Vec<String>,
    documents: usize,
    entries: usize,
    accepted: usize,
    rejected: BTreeMap<String, Vec<String>>,
    others: usize,
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(self::files(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

fn blocks(path: &Path, name: &str) -> Vec<Block> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension {
        "yaml" | "yml" | "json" => vec![Block { origin: name.to_owned(), text }],
        "md" => fenced(&text, name).into_iter().chain(here_documents(&text, name)).collect(),
        "sh" => here_documents(&text, name),
        _ => Vec::new(),
    }
}

/// The blocks between lines of three backticks, and the same of Hugo's `text` short codes.
fn fenced(text: &str, name: &str) -> Vec<Block> {
    let begins = |line: &str| {
        let line = line.trim_start();
        line.starts_with("```") || line.starts_with("{{< text yaml") || line.starts_with("{{< text syntax=yaml")
    };
    let ends = |line: &str| line.trim_start().starts_with("```") || line.contains("{{< /text >}}");
    between(text, name, |line| begins(line).then(|| String::from("```")), move |line, _| ends(line))
}

/// What stands between `<<EOF` and `EOF`.
fn here_documents(text: &str, name: &str) -> Vec<Block> {
    let begins = |line: &str| {
        let (_, after) = line.split_once("<<")?;
        let word = after.trim_start_matches(['-', ' ']).trim_start_matches(['"', '\'', '\\']);
        let word: String = word.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
        (!word.is_empty()).then_some(word)
    };
    between(text, name, begins, |line, word| line.trim() == word)
}

fn between(
    text: &str,
    name: &str,
    begins: impl Fn(&str) -> Option<String>,
    ends: impl Fn(&str, &str) -> bool,
) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut open: Option<(String, usize, Vec<&str>)> = None;
    for (index, line) in text.lines().enumerate() {
        open = match open.take() {
            None => begins(line).map(|word| (word, index, Vec::new())),
            Some((word, first, lines)) if ends(line, &word) => {
                blocks.push(Block { origin: format!("{name}:{}", first + 2), text: dedent(&lines) });
                None
            }
            Some((word, first, mut lines)) => {
                lines.push(line);
                Some((word, first, lines))
            }
        };
    }
    blocks
}

fn dedent(lines: &[&str]) -> String {
    let indent = |line: &&&str| line.len() - line.trim_start().len();
    let common = lines.iter().filter(|line| !line.trim().is_empty()).map(|line| indent(&line)).min().unwrap_or(0);
    lines.iter().map(|line| line.get(common..).unwrap_or_default()).fold(String::new(), |text, line| text + line + "\n")
}

/// `{{ … }}`, `${…}` and `$NAME` stand for something that is not there yet.
fn is_template(text: &str) -> bool {
    let variable = text.split('$').skip(1).any(|rest| rest.starts_with(|c: char| c == '{' || c.is_ascii_alphabetic()));
    text.contains("{{") || variable
}

fn read(block: &Block, counts: &mut Counts) {
    for (index, text) in split(&block.text).into_iter().enumerate() {
        if !text.lines().any(|line| line.trim_end() == "kind: ServiceEntry") {
            counts.others += 1;
            continue;
        }
        let origin = format!("{}#{index}", block.origin);
        if is_template(&text) {
            counts.templates.push(origin);
            continue;
        }
        let loaded = load_text(&origin, &text);
        counts.documents += loaded.documents;
        counts.entries += text.lines().filter(|line| line.trim_end() == "kind: ServiceEntry").count();
        counts.accepted += loaded.policies.service_entries.len();
        for finding in loaded.findings.iter().filter(|finding| finding.severity == Severity::Error) {
            let printed = render(finding, loaded.source(finding), Color::Never);
            counts.rejected.entry(finding.code.to_string()).or_default().push(printed);
        }
    }
}

fn split(text: &str) -> Vec<String> {
    let mut documents = vec![String::new()];
    for line in text.lines() {
        if line.trim_end() == "---" {
            documents.push(String::new());
        } else if let Some(last) = documents.last_mut() {
            last.push_str(line);
            last.push('\n');
        }
    }
    documents
}

/// Every rule about a `ServiceEntry` is one of Istio's. Syntax, names, types and unknown fields are Kubernetes' own.
fn istio_has_it(code: &str) -> bool {
    code.starts_with("E01") || ["E0003", "E0004", "E0014", "E0015", "E0017", "E0018", "E0019"].contains(&code)
}

#[test]
fn real_documents_are_accepted_or_rejected_for_a_reason_that_istio_has() {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies");
    let directory = env::var_os("EGRESS_CORPUS").map(PathBuf::from);
    let mut counts = Counts::default();
    let root = directory.as_ref().unwrap_or(&own);
    for path in files(root) {
        let name = path.strip_prefix(root).unwrap_or(&path).display().to_string();
        for block in blocks(&path, &name) {
            counts.blocks += 1;
            read(&block, &mut counts);
        }
    }
    println!(
        "read from {}",
        if directory.is_some() { "EGRESS_CORPUS" } else { "policies/ (EGRESS_CORPUS is not set)" }
    );
    println!("{} blocks, {} documents of other kinds", counts.blocks, counts.others);
    println!("{} unrendered templates skipped: {:#?}", counts.templates.len(), counts.templates);
    println!("{} ServiceEntry documents, {} accepted", counts.entries, counts.accepted);
    for (code, findings) in &counts.rejected {
        println!("{code}: {}\n{}", findings.len(), findings.concat());
    }
    assert!(counts.accepted > 0);
    let unexplained: Vec<&String> = counts.rejected.keys().filter(|code| !istio_has_it(code)).collect();
    assert!(unexplained.is_empty(), "{unexplained:?}");
}
