//! Findings: what is wrong with a document, where, and what to write instead; printed as compilers do.
//!
//! Files can be hostile. What a finding quotes went through [`quoted`], and [`render`] prints nothing of a source line
//! that could move the cursor or turn text around.

use std::{
    borrow::Cow,
    fmt::{self, Write as _},
    path::Path,
    sync::Arc,
};

use serde::{Serialize, Serializer};

use super::{
    Position,
    code::Code,
    yaml::{Span, lines},
};
pub use crate::text::printable;
use crate::text::{is_treacherous, printable_bytes};

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The document is not put in force.
    Error,
    /// Valid, and probably not what was meant.
    Warning,
    /// Worth knowing.
    Note,
}

impl Severity {
    /// As in text and JSON.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warning => "warning",
            Self::Note => "note",
        }
    }
}

/// One thing to say about a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is about.
    pub code: Code,
    /// How bad it is; follows from the code.
    pub severity: Severity,
    /// What is wrong, in the user's words.
    pub message: String,
    /// The file.
    pub file: Arc<Path>,
    /// Line, from 1; 0 when it is about the file as a whole.
    pub line: u32,
    /// Column in characters, from 1; 0 when it is about the file as a whole.
    pub column: u32,
    /// Characters to underline.
    pub length: u32,
    /// The field, as `spec.ports[0].number`; empty when it is about no field.
    pub path: String,
    /// What to write instead.
    pub help: Option<String>,
    /// Another place that has to do with it, and what it is.
    pub related: Option<(Position, &'static str)>,
}

impl Finding {
    /// A finding about a place in a file.
    pub fn at(code: Code, file: &Arc<Path>, span: Span, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: code.severity(),
            message: message.into(),
            file: Arc::clone(file),
            line: span.line,
            column: span.column,
            length: span.length,
            path: String::new(),
            help: None,
            related: None,
        }
    }

    /// A finding about a file as a whole.
    pub fn about_file(code: Code, file: &Arc<Path>, message: impl Into<String>) -> Self {
        Self::at(code, file, Span { line: 0, column: 0, length: 0 }, message)
    }

    /// A finding about an object of the Kubernetes API as a whole.
    pub fn about_object(code: Code, message: impl Into<String>) -> Self {
        Self::about_file(code, &Position::nowhere().file, message)
    }

    /// With the field.
    #[must_use]
    pub fn with_path(self, path: impl Into<String>) -> Self {
        Self { path: path.into(), ..self }
    }

    /// With what to write instead.
    #[must_use]
    pub fn with_help(self, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..self }
    }
}

/// The shape of `check --output json`; what is unknown is absent.
impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Shape<'a> {
            code: Code,
            severity: Severity,
            message: Cow<'a, str>,
            file: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            line: Option<u32>,
            #[serde(skip_serializing_if = "Option::is_none")]
            column: Option<u32>,
            #[serde(skip_serializing_if = "str::is_empty")]
            path: Cow<'a, str>,
            #[serde(skip_serializing_if = "Option::is_none")]
            help: Option<Cow<'a, str>>,
        }
        let known = |number| Some(number).filter(|&number| number != 0);
        Shape {
            code: self.code,
            severity: self.severity,
            message: printable(&self.message),
            file: printable_bytes(&*self.file),
            line: known(self.line),
            column: known(self.column),
            path: printable(&self.path),
            help: self.help.as_deref().map(printable),
        }
        .serialize(serializer)
    }
}

/// A value from a file for use in a message: in backticks, of bounded length, harmless to a terminal.
pub fn quoted(text: &str) -> String {
    format!("`{}`", shortened(text, 80))
}

/// The first characters of a text, harmless to a terminal.
pub fn shortened(text: &str, longest: usize) -> String {
    let shown: String = text.chars().take(longest).collect();
    let more = if shown.len() < text.len() { "…" } else { "" };
    format!("{}{more}", printable(&shown))
}

/// Colors of a terminal, or none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Color {
    /// ANSI escapes.
    Ansi,
    /// Plain text.
    Never,
}

/// A finding as text: code and message, place, the line with the offending part underlined, and the help. Ends with a
/// line break. `source` is the text of the file, when it is at hand.
pub fn render(finding: &Finding, source: Option<&str>, color: Color) -> String {
    Rendering { finding, color }.print(source).unwrap_or_default()
}

struct Rendering<'a> {
    finding: &'a Finding,
    color: Color,
}

impl Rendering<'_> {
    fn print(&self, source: Option<&str>) -> Result<String, fmt::Error> {
        let Finding { code, severity, message, file, line, column, help, related, .. } = self.finding;
        let mut out = String::new();
        let head = format!("{}[{code}]", severity.as_str());
        writeln!(out, "{}{}", self.strong(&head), self.bold(&format!(": {}", printable(message))))?;
        let width = if *line == 0 { 1 } else { line.to_string().len() };
        let place = if *line == 0 { String::new() } else { format!(":{line}:{column}") };
        writeln!(out, "{:width$}{} {}{place}", "", self.blue("-->"), printable_bytes(&**file))?;
        self.print_line(&mut out, width, source)?;
        let note = format!("{:width$} {}", "", self.blue("="));
        if let Some((position, what)) = related {
            writeln!(out, "{note} {} {what}: {}", self.bold("note:"), printable(&position.to_string()))?;
        }
        if let Some(help) = help {
            writeln!(out, "{note} {} {}", self.bold("help:"), printable(help))?;
        }
        Ok(out)
    }

    fn print_line(&self, out: &mut String, width: usize, source: Option<&str>) -> fmt::Result {
        let path = printable(&self.finding.path);
        let bar = format!("{:width$} {}", "", self.blue("|"));
        match source.and_then(|source| excerpt(source, self.finding)) {
            Some(Excerpt { text, skipped, marked }) => {
                let (number, bar_here) = (self.blue(&self.finding.line.to_string()), self.blue("|"));
                let marks = format!("{} {path}", "^".repeat(marked));
                writeln!(out, "{bar}")?;
                writeln!(out, "{number} {bar_here} {text}")?;
                writeln!(out, "{bar} {:skipped$}{}", "", self.strong(marks.trim_end()))
            }
            None if path.is_empty() => Ok(()),
            None => writeln!(out, "{bar} {path}"),
        }
    }

    fn strong(&self, text: &str) -> String {
        let color = match self.finding.severity {
            Severity::Error => "\u{1b}[1;31m",
            Severity::Warning => "\u{1b}[1;33m",
            Severity::Note => "\u{1b}[1;36m",
        };
        self.painted(color, text)
    }

    fn bold(&self, text: &str) -> String {
        self.painted("\u{1b}[1m", text)
    }

    fn blue(&self, text: &str) -> String {
        self.painted("\u{1b}[1;34m", text)
    }

    fn painted(&self, color: &str, text: &str) -> String {
        match self.color {
            Color::Ansi => format!("{color}{text}\u{1b}[0m"),
            Color::Never => text.to_owned(),
        }
    }
}

/// The part of a source line that is shown.
struct Excerpt {
    text: String,
    /// Columns before the marked part.
    skipped: usize,
    /// Columns to mark, at least one.
    marked: usize,
}

/// The line of a finding, cut to what fits a terminal. Each character takes one column, whatever it was.
fn excerpt(source: &str, finding: &Finding) -> Option<Excerpt> {
    const BEFORE: usize = 60;
    const WIDTH: usize = 120;
    let source = source.strip_prefix('\u{feff}').unwrap_or(source);
    let line = lines(source).nth(usize::try_from(finding.line).ok()?.checked_sub(1)?)?;
    let start = usize::try_from(finding.column).ok()?.checked_sub(1)?;
    let first = if start > WIDTH - BEFORE { start - BEFORE } else { 0 };
    let shown: Vec<char> = line.chars().skip(first).take(WIDTH).collect();
    let cut = |there: bool| if there { "…" } else { "" };
    let more = line.chars().nth(first + WIDTH).is_some();
    let body: String = shown.iter().map(|&c| if c == '\t' { ' ' } else { visible(c) }).collect();
    let skipped = start - first;
    let room = shown.len().saturating_sub(skipped).max(1);
    let marked = usize::try_from(finding.length).ok()?.clamp(1, room);
    let text = format!("{}{body}{}", cut(first > 0), cut(more)).trim_end().to_owned();
    Some(Excerpt { text, skipped: skipped + usize::from(first > 0), marked })
}

fn visible(c: char) -> char {
    if is_treacherous(c) { '\u{fffd}' } else { c }
}
