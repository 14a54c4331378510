//! What the YAML parser complains about, in words that say what to do; and tabs, about which it complains too little.

use saphyr_parser::ScanError;

use super::{Problem, Span, count, end_of, lines};
use crate::policy::code::Code;

/// A tab where there can be none.
pub(super) fn tab(span: Span) -> Problem {
    let message = "a tab where YAML allows only spaces";
    Problem::new(Code::Syntax, span, message).help("indent and separate with spaces")
}

/// A line with a tab before its content.
pub(super) struct Tabbed {
    pub line: u32,
    /// Column of the first tab.
    pub tab: u32,
    /// Column of the content.
    pub content: u32,
}

/// Lines with a tab in their indentation, or behind the `-` of an item.
pub(super) fn indented_with_tabs(text: &str) -> Vec<Tabbed> {
    if !text.contains('\t') {
        return Vec::new();
    }
    let tabbed = |(index, line): (usize, &str)| {
        let content = line.len() - line.trim_start_matches([' ', '\t', '-']).len();
        let tab = line[..content].find('\t')?;
        Some(Tabbed { line: count(index + 1), tab: count(tab + 1), content: count(content + 1) })
    };
    lines(text).enumerate().filter_map(tabbed).collect()
}

/// What the parser says, and what that means to whoever wrote the text.
const COMPLAINTS: [(&str, &str, &str); 9] = [
    (
        "mapping values are not allowed",
        "a `:` where no key can be",
        "put the value in quotes if the colon is part of it, or mend the indentation",
    ),
    (
        "simple key expect",
        "the line before this is neither `key: value` nor an item of a list",
        "write `key: value`, or begin the line with `#`",
    ),
    ("escape", "an escape that YAML does not know", "in single quotes a backslash stands for itself"),
    ("quoted scalar", "a quoted text that does not end", "close it with the quote it began with"),
    (
        "flow ",
        "a list in `[` `]` or `{` `}` that does not end, or lacks a comma",
        "close it, and separate its items with `,`",
    ),
    (
        "illegal placement of ':'",
        "a list in `[` `]` or `{` `}` that does not end, or lacks a comma",
        "close it, and separate its items with `,`",
    ),
    (
        "unexpected character",
        "no value can begin with this character",
        "put text that begins with it in quotes; if this is a template, render it first",
    ),
    ("indentation", "the indentation does not fit", "items of one list or mapping begin in the same column"),
    ("'-' indicator", "a list that goes on as something else", "items of one list begin with `- ` in the same column"),
];

/// The parser's complaint in words that say what to do. `text` is what the parser was given, after `base` lines.
pub(super) fn explain(error: &ScanError, span: Span, text: &str, base: u32) -> Problem {
    let info = error.info();
    if let Some(at) = tab_near(error, text) {
        return tab(Span { line: at.line.saturating_add(base), ..at });
    }
    if info.contains("unknown anchor") {
        let message = "a value that begins with `*` is an alias, and nothing has that anchor";
        return Problem::new(Code::BadAlias, span, message).help("put it in quotes if it is text: \"*.example.com\"");
    }
    match COMPLAINTS.iter().find(|(said, _, _)| info.contains(said)) {
        Some((_, message, help)) => Problem::new(Code::Syntax, span, *message).help(*help),
        None => Problem::new(Code::Syntax, span, format!("this is not YAML: {info}")),
    }
}

/// The tab that an error is about, if it is about one: at the error, right before it, or further on in what could not
/// be read.
fn tab_near(error: &ScanError, text: &str) -> Option<Span> {
    let info = error.info();
    let first = error.marker().index().checked_sub(1)?;
    let (start, _) = text.char_indices().nth(first)?;
    let near = if info.contains("tab") { usize::MAX } else { 2 };
    let (offset, _) = text[start..].char_indices().take(near).find(|(_, c)| *c == '\t')?;
    Some(end_of(&text[..start + offset]))
}
