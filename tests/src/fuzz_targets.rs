//! What must hold of any input at all: the bodies of the fuzz targets in `fuzz/`, which the replay of their corpus runs
//! as well. A broken promise is a panic.

use std::collections::BTreeMap;

use egress_agent::{
    compile::{Context, NodeAction, NodeDefault, compile},
    policy::{
        PolicySet,
        decode::MAX_FINDINGS,
        diagnostic::{Color, Finding, render},
        load::{Loaded, load_text},
        yaml::lines,
    },
    prefix::Prefix,
    ruleset::Table,
    workload::Workload,
};

use crate::reference::{Question, ask, judge};

mod arbitrary;
pub mod dns;
mod questions;

use self::arbitrary::World;

/// Longest text of a finding, in bytes: it quotes its file in excerpts only.
const MAX_RENDERED: usize = 16 << 10;
/// Most questions about one policy that was read.
const ABOUT_TEXT: usize = 64;
/// Most questions about one policy that was made up.
const ABOUT_VALUES: usize = 256;

/// Any text is read without a panic, twice alike, and every finding about it lies within it and can be printed. What
/// was accepted compiles, and decides as the reference says.
pub fn read_policy(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let loaded = load_text("any.yaml", &text);
    same(&loaded, &load_text("any.yaml", &text));
    assert!(loaded.findings.len() <= 2 * (MAX_FINDINGS + 1), "{} findings", loaded.findings.len());
    let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
    for finding in &loaded.findings {
        lies_within(text, finding);
        prints_safely(&loaded, finding);
    }
    let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: true };
    let context = Context { system_resolvers: vec![[10, 1, 2, 3].into()], ..Context::new(node_default) };
    agree(&loaded.policies, &Workload::default(), &context, ABOUT_TEXT);
}

/// The compiled rules answer as the reference does, at the edges of all that the policies name, and hold nothing twice.
pub fn compile_vs_reference(bytes: &[u8]) {
    let World { policies, workload, context } = World::from_bytes(bytes);
    agree(&policies, &workload, &context, ABOUT_VALUES);
}

fn agree(policies: &PolicySet, workload: &Workload, context: &Context, most: usize) {
    // What is too large is refused as a whole.
    let Ok(ruleset) = compile(policies, workload, context) else { return };
    ruleset.views(egress_agent::ruleset::Ruleset::SCOPE).for_each(|(_, table)| is_tidy(table));
    for asked in questions::at_edges(policies, context, most) {
        let (found, expected) = (ask(&ruleset, asked), judge(policies, workload, context, asked));
        let Question { l4, address, port } = asked;
        assert_eq!(found, expected, "{l4:?} {address} {port} of {workload:?} under {policies:#?} in {context:?}");
    }
}

/// Both roots are there, and nothing is said twice: not by a prefix and the one around it, nor by two halves.
fn is_tidy(table: &Table) {
    let values: BTreeMap<Prefix, u32> = table.entries().collect();
    assert!(table.entries().map(|(prefix, _)| prefix).eq(values.keys().copied()), "not sorted: {table:?}");
    let roots = [Prefix::V6_ROOT, Prefix::V4_ROOT];
    assert!(roots.iter().all(|root| values.contains_key(root)), "no root in {table:?}");
    let mut open: Vec<(Prefix, u32)> = Vec::new();
    for (&prefix, &value) in &values {
        while open.pop_if(|(top, _)| !top.covers(prefix)).is_some() {}
        let around = open.last().map(|&(_, around)| around);
        let other_half = prefix.sibling().filter(|half| !roots.contains(half)).and_then(|half| values.get(&half));
        let is_needed = around != Some(value) && other_half != Some(&value);
        assert!(is_needed || roots.contains(&prefix), "{prefix} is not needed in {table:?}");
        open.push((prefix, value));
    }
}

fn same(one: &Loaded, other: &Loaded) {
    assert_eq!(one.policies, other.policies);
    assert_eq!(one.findings, other.findings);
    assert_eq!((one.files, one.documents), (other.files, other.documents));
}

fn lies_within(text: &str, finding: &Finding) {
    let related = finding.related.as_ref().map(|(position, _)| (position.line, position.column, 0));
    for (line, column, length) in [Some((finding.line, finding.column, finding.length)), related].into_iter().flatten()
    {
        let characters = characters_after(text, line, column);
        assert!(characters.is_some_and(|characters| length as usize <= characters + 1), "{finding:?}\n{text:?}");
    }
}

/// How many characters follow a place in a text; `None` if the text has no such place.
fn characters_after(text: &str, line: u32, column: u32) -> Option<usize> {
    let (line, column) = ((line as usize).checked_sub(1)?, (column as usize).checked_sub(1)?);
    let line = lines(text).nth(line)?;
    let rest = &text[line.as_ptr().addr() - text.as_ptr().addr()..];
    (column <= line.chars().count()).then(|| rest.chars().count() - column)
}

fn prints_safely(loaded: &Loaded, finding: &Finding) {
    let source = loaded.source(finding);
    assert!(source.is_some(), "no source for {finding:?}");
    render(finding, source, Color::Ansi);
    let json = serde_json::to_string(finding).expect("findings are text and numbers");
    for printed in [render(finding, source, Color::Never), render(finding, None, Color::Never), json] {
        assert!(!printed.contains(obeyed_by_terminals), "{printed:?}");
        assert!(printed.len() <= MAX_RENDERED, "{} bytes for one finding", printed.len());
    }
}

/// Controls, and what turns the text around it the other way.
fn obeyed_by_terminals(c: char) -> bool {
    (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}
