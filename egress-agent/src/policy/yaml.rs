//! YAML and JSON as a tree that knows where each value stands.
//!
//! It keeps scalars as text: what a text means is for whoever knows the field. Bounded in every direction, so that a
//! hostile file ends in a problem and not in an exhausted machine. It knows nothing of policies.

use std::{
    borrow::Cow,
    collections::{HashMap, hash_map},
};

mod build;
mod complaints;
mod json;
mod scalar;

pub use scalar::{Scalar, ScalarKind};

use super::{code::Code, diagnostic::quoted};

/// Deepest nesting of mappings and sequences.
pub const MAX_DEPTH: usize = 64;
/// Most values in a document.
pub const MAX_NODES: usize = 8_000_000;
/// Most values that aliases and merge keys may add to the documents of a file.
pub const MAX_ALIASED: usize = 250_000;
/// Most characters of a single YAML value, comment or flow collection.
pub const MAX_TOKEN: usize = 2 << 20;

/// Where a value stands: line and column count from 1, in characters; the length may run over line ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Span {
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// Characters, 0 where the start is all there is to show.
    pub length: u32,
}

/// A value and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node<'t> {
    /// Where it stands.
    pub span: Span,
    /// What it is.
    pub value: Value<'t>,
}

impl<'t> Node<'t> {
    /// The value of a key, if this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Node<'t>> {
        match &self.value {
            Value::Mapping(entries) => entries.iter().find(|entry| entry.key == key).map(|entry| &entry.value),
            Value::Scalar(_) | Value::Sequence(_) => None,
        }
    }
}

/// What a [`Node`] is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value<'t> {
    /// Text.
    Scalar(Scalar<'t>),
    /// A list.
    Sequence(Vec<Node<'t>>),
    /// Keys and values, in document order, each key once.
    Mapping(Vec<Entry<'t>>),
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<'t> {
    /// The key.
    pub key: Cow<'t, str>,
    /// Where the key stands.
    pub key_span: Span,
    /// The value.
    pub value: Node<'t>,
}

/// What is wrong with a text before anyone asks what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// What it is about.
    pub code: Code,
    /// Where.
    pub span: Span,
    /// In the user's words.
    pub message: String,
    /// What to write instead.
    pub help: Option<String>,
}

impl Problem {
    fn new(code: Code, span: Span, message: impl Into<String>) -> Self {
        Self { code, span, message: message.into(), help: None }
    }

    fn help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }
}

/// One document of a text.
#[derive(Debug, Default)]
pub struct Document<'t> {
    /// Its content; `None` where it is broken or empty.
    pub root: Option<Node<'t>>,
    /// What is wrong with it.
    pub problems: Vec<Problem>,
}

/// The documents of a text, in order. After a broken one, reading goes on at the next line that begins with `---`.
pub fn documents(text: &str) -> Box<dyn Iterator<Item = Document<'_>> + '_> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if let Some(problem) = control_character(text) {
        return Box::new(std::iter::once(Document { root: None, problems: vec![problem] }));
    }
    if text.trim_start().starts_with(['{', '[']) {
        match json::read(text) {
            Ok(documents) => return Box::new(documents.into_iter()),
            // What is not JSON can still be YAML, but no flow collection of that size is read as YAML.
            Err(problem) if text.len() > MAX_TOKEN => {
                return Box::new(std::iter::once(Document { root: None, problems: vec![problem] }));
            }
            Err(_) => {}
        }
    }
    Box::new(build::Documents::new(text))
}

/// The lines of a text as YAML counts them, without their ends: after `\n`, `\r\n` and a lone `\r`.
pub fn lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let Some(end) = text.find(['\n', '\r']) else {
            rest = None;
            return Some(text);
        };
        let after = &text[end..];
        rest = Some(after.strip_prefix("\r\n").unwrap_or(&after[1..]));
        Some(&text[..end])
    })
}

/// Neither YAML nor JSON may hold control characters, and YAML readers differ in what they make of them.
fn control_character(text: &str) -> Option<Problem> {
    let forbidden = |c: char| c.is_control() && !matches!(c, '\t' | '\n' | '\r' | '\u{85}');
    let at = text.find(forbidden)?;
    let c = text[at..].chars().next()?;
    let span = end_of(&text[..at]);
    let message = format!("the control character U+{:04X} cannot be part of a policy", u32::from(c));
    Some(Problem::new(Code::Syntax, span, message).help("delete it; in double quotes it can be written `\\x..`"))
}

/// The place behind the last character of a text.
pub fn end_of(text: &str) -> Span {
    let (index, last) = lines(text).enumerate().last().unwrap_or_default();
    Span { line: count(index + 1), column: count(last.chars().count() + 1), length: 1 }
}

/// A line or column number; what does not fit is beyond every file that is read.
fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Drops repeated keys, each with a problem.
fn unique<'t>(mut entries: Vec<Entry<'t>>, problems: &mut Vec<Problem>) -> Vec<Entry<'t>> {
    entries.shrink_to_fit();
    let repeated = repeated(&entries);
    if repeated.is_empty() {
        return entries;
    }
    for &(index, first) in &repeated {
        let Entry { key, key_span, .. } = &entries[index];
        let message = format!("{} is given twice, first on line {}", quoted(key), entries[first].key_span.line);
        let help = "readers differ in which of the two they take: delete one";
        problems.push(Problem::new(Code::DuplicateKey, *key_span, message).help(help));
    }
    let mut drop = repeated.into_iter().map(|(index, _)| index).peekable();
    let keep = |(index, entry)| if drop.next_if_eq(&index).is_some() { None } else { Some(entry) };
    entries.into_iter().enumerate().filter_map(keep).collect()
}

/// Each entry whose key was there before, with the first that has it.
fn repeated(entries: &[Entry<'_>]) -> Vec<(usize, usize)> {
    /// Up to here, comparing all with all is faster than a table.
    const FEW: usize = 8;
    let indices = entries.iter().enumerate();
    if entries.len() <= FEW {
        let earlier = |key: &str, index: usize| entries[..index].iter().position(|entry| entry.key == key);
        return indices.filter_map(|(index, entry)| Some((index, earlier(&entry.key, index)?))).collect();
    }
    let mut first: HashMap<&str, usize> = HashMap::with_capacity(entries.len());
    let mut repeated = Vec::new();
    for (index, entry) in indices {
        match first.entry(&*entry.key) {
            hash_map::Entry::Vacant(slot) => {
                slot.insert(index);
            }
            hash_map::Entry::Occupied(slot) => repeated.push((index, *slot.get())),
        }
    }
    repeated
}
