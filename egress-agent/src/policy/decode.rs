//! From tree to fields: types, unknown fields, `null`, with a finding for everything that does not fit.
//!
//! A decoder does not stop at the first mistake. Whoever gets `None` knows that it has been reported.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use super::{
    Position,
    code::Code,
    diagnostic::{Finding, Severity, printable, quoted},
    path::FieldPath,
    schema::Object,
    suggest::{choice, list, nearest},
    yaml::{Entry, Node, ScalarKind, Span, Value},
};

mod describe;

use describe::{describe, mapping_for_text};

/// Most errors, and most warnings and notes, that are kept for one file.
pub const MAX_FINDINGS: usize = 1000;

/// How strictly an object is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dialect {
    /// As protocol buffers are read from JSON: `null` is absent, `snake_case` is understood; both are worth a warning.
    Proto,
    /// `null` is an error, for nobody can tell what was meant.
    Strict,
    /// What Kubernetes itself writes: `null` is absent.
    Kubernetes,
}

/// The known fields of an object that are there.
#[derive(Debug)]
pub struct Fields<'n> {
    object: &'static Object,
    found: Vec<(&'static str, &'n Entry<'n>)>,
}

impl<'n> Fields<'n> {
    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&'n Node<'n>> {
        debug_assert!(self.object.field(name).is_some(), "`{name}` is read and not described");
        self.found.iter().find(|(known, _)| *known == name).map(|(_, entry)| &entry.value)
    }

    /// Where the field's name stands.
    pub fn key(&self, name: &str) -> Option<Span> {
        self.found.iter().find(|(known, _)| *known == name).map(|(_, entry)| entry.key_span)
    }

    /// The names of the fields that are there.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        self.found.iter().map(|(name, _)| *name)
    }
}

/// Reads the documents of one file and keeps what is wrong with them.
#[derive(Debug)]
pub struct Decoder<'f> {
    file: &'f Arc<Path>,
    unknown_field: Code,
    findings: Vec<Finding>,
    errors: usize,
}

impl<'f> Decoder<'f> {
    /// For the documents of a file.
    pub const fn new(file: &'f Arc<Path>) -> Self {
        Self { file, unknown_field: Code::UnknownField, findings: Vec::new(), errors: 0 }
    }

    /// For an object of the Kubernetes API, whose unknown fields are ignored.
    pub fn of_object(nowhere: &'f Arc<Path>) -> Self {
        Self { unknown_field: Code::IgnoredField, ..Self::new(nowhere) }
    }

    /// What was found, by position.
    pub fn into_findings(mut self) -> Vec<Finding> {
        self.findings.sort_by_key(|finding| (finding.line, finding.column));
        self.findings
    }

    /// How many errors there have been.
    pub const fn errors(&self) -> usize {
        self.errors
    }

    /// The file.
    pub const fn file(&self) -> &'f Arc<Path> {
        self.file
    }

    /// A place in the file.
    pub fn position(&self, span: Span) -> Position {
        Position { file: Arc::clone(self.file), line: span.line, column: span.column }
    }

    /// Keeps a finding, unless there are too many already.
    pub fn push(&mut self, finding: Finding) {
        let is_error = finding.severity == Severity::Error;
        let before = if is_error { self.errors } else { self.findings.len() - self.errors.min(MAX_FINDINGS + 1) };
        self.errors += usize::from(is_error);
        let last = match before {
            0..MAX_FINDINGS => return self.findings.push(finding),
            MAX_FINDINGS if is_error => (Code::TooManyErrors, "further errors in this file are not listed"),
            MAX_FINDINGS => (Code::TooManyNotes, "further warnings and notes in this file are not listed"),
            _ => return,
        };
        let Finding { line, column, length, .. } = finding;
        self.findings.push(Finding::at(last.0, self.file, Span { line, column, length }, last.1));
    }

    /// Reports what is wrong with a field, and what to write instead (empty where there is nothing to write).
    pub fn say(
        &mut self,
        code: Code,
        span: Span,
        path: &FieldPath<'_>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let help = Some(help.into()).filter(|help| !help.is_empty());
        self.push(Finding { help, ..Finding::at(code, self.file, span, message).with_path(path.to_string()) });
    }

    /// The fields of an object. Those it does not know are reported, with the name that may have been meant.
    pub fn fields<'n>(
        &mut self,
        node: &'n Node<'n>,
        path: &FieldPath<'_>,
        object: &'static Object,
        dialect: Dialect,
    ) -> Option<Fields<'n>> {
        let entries = self.mapping(node, path)?;
        let mut fields = Fields { object, found: Vec::with_capacity(entries.len().min(object.fields.len())) };
        for entry in entries {
            let name = self.known(entry, path, object, dialect);
            if let Some(name) = name.filter(|name| !self.is_null(entry, path, name, dialect)) {
                if fields.get(name).is_some() {
                    let message =
                        format!("`{name}` is given twice, as {} and in its other spelling", quoted(&entry.key));
                    self.say(Code::DuplicateKey, entry.key_span, &path.field(name), message, "delete one");
                    continue;
                }
                fields.found.push((name, entry));
            }
        }
        Some(fields)
    }

    fn known(
        &mut self,
        entry: &Entry<'_>,
        path: &FieldPath<'_>,
        object: &'static Object,
        dialect: Dialect,
    ) -> Option<&'static str> {
        let key = &*entry.key;
        if let Some(field) = object.field(key) {
            return Some(field.name);
        }
        let path = path.field(key);
        if dialect == Dialect::Proto
            && let Some(name) = object.names().find(|name| snake_case(name) == key)
        {
            let message = format!("`{key}` is read as `{name}`, but the Kubernetes API server drops it");
            self.say(Code::SnakeCase, entry.key_span, &path, message, format!("write `{name}`"));
            return Some(name);
        }
        let message = format!("unknown field {}", quoted(key));
        let names: Vec<&str> = object.names().collect();
        let help = match nearest(key, names.iter().copied()) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("the fields here are {}", list(&names).replacen(" or ", " and ", 1)),
        };
        self.say(self.unknown_field, entry.key_span, &path, message, help);
        None
    }

    fn is_null(&mut self, entry: &Entry<'_>, path: &FieldPath<'_>, name: &str, dialect: Dialect) -> bool {
        if !is_null(&entry.value) {
            return false;
        }
        let path = path.field(name);
        match dialect {
            Dialect::Kubernetes => {}
            Dialect::Proto => {
                let message = format!("`{name}` has no value and is read as if it were not there");
                self.say(Code::NullIsAbsent, entry.key_span, &path, message, "give it a value or delete it");
            }
            Dialect::Strict => {
                let message = format!("`{name}` has no value");
                self.say(Code::NullField, entry.key_span, &path, message, "give it a value or delete it");
            }
        }
        true
    }

    /// Reports a required field that is not there.
    pub fn missing(&mut self, code: Code, span: Span, path: &FieldPath<'_>, help: impl Into<String>) {
        let name = match path {
            FieldPath::Field(_, name) => name,
            _ => "value",
        };
        self.say(code, Span { length: span.length.max(1), ..span }, path, format!("`{name}` is missing"), help);
    }

    /// The value of a required field; if it is not there, that is reported.
    pub fn required<'n>(
        &mut self,
        fields: &Fields<'n>,
        name: &str,
        at: Span,
        path: &FieldPath<'_>,
        (code, help): (Code, &str),
    ) -> Option<&'n Node<'n>> {
        let node = fields.get(name);
        if node.is_none() {
            self.missing(code, at, &path.field(name), help);
        }
        node
    }

    /// The entries of a mapping.
    pub fn mapping<'n>(&mut self, node: &'n Node<'n>, path: &FieldPath<'_>) -> Option<&'n [Entry<'n>]> {
        if let Value::Mapping(entries) = &node.value {
            return Some(entries);
        }
        self.wrong_type(node, path, "a mapping", "write its fields below it, indented");
        None
    }

    /// The items of a list.
    pub fn items<'n>(&mut self, node: &'n Node<'n>, path: &FieldPath<'_>) -> Option<&'n [Node<'n>]> {
        if let Value::Sequence(items) = &node.value {
            return Some(items);
        }
        self.wrong_type(node, path, "a list", "write each item on a line of its own behind `- `, or all in `[` `]`");
        None
    }

    /// Text.
    pub fn text<'n>(&mut self, node: &'n Node<'n>, path: &FieldPath<'_>) -> Option<&'n str> {
        match &node.value {
            Value::Scalar(scalar) if scalar.kind() == ScalarKind::Text => return Some(&scalar.text),
            Value::Scalar(scalar) if scalar.kind() != ScalarKind::Null => {
                let help = format!("put it in quotes: \"{}\"", printable(&scalar.text));
                self.wrong_type(node, path, "text", help);
            }
            Value::Mapping(entries) => self.wrong_type(node, path, "text", mapping_for_text(entries)),
            _ => self.wrong_type(node, path, "text", "write one value"),
        }
        None
    }

    /// A decimal integer, saturating. `Proto` takes it in quotes too, as protocol buffers do.
    pub fn integer(&mut self, node: &Node<'_>, path: &FieldPath<'_>, dialect: Dialect) -> Option<i64> {
        let Value::Scalar(scalar) = &node.value else {
            self.wrong_type(node, path, "a number", "write one number in decimal digits");
            return None;
        };
        match scalar.kind() {
            ScalarKind::Integer => Some(saturating(&scalar.text)),
            ScalarKind::OddNumber => {
                let message = format!("{} is not the same number to every reader of YAML", quoted(&scalar.text));
                let help = "write it in decimal digits, without leading zeros, `_`, fraction or exponent";
                self.say(Code::OddNumber, node.span, path, message, help);
                None
            }
            ScalarKind::Text if dialect == Dialect::Proto && is_decimal(&scalar.text) => Some(saturating(&scalar.text)),
            ScalarKind::Text if is_decimal(&scalar.text) => {
                self.wrong_type(node, path, "a number", format!("leave out the quotes: {}", scalar.text));
                None
            }
            _ => {
                self.wrong_type(node, path, "a number", "write one number in decimal digits");
                None
            }
        }
    }

    /// A port, 1 to 65535.
    pub fn port(&mut self, node: &Node<'_>, path: &FieldPath<'_>, code: Code, dialect: Dialect) -> Option<u16> {
        let number = self.integer(node, path, dialect)?;
        let port = u16::try_from(number).ok().filter(|&port| port != 0);
        if port.is_none() {
            let message = format!("port {number} is out of range");
            self.say(code, node.span, path, message, "ports are 1 to 65535");
        }
        port
    }

    /// One of a few words. Case matters; the help names the word in its right case.
    pub fn keyword<T: Copy>(
        &mut self,
        node: &Node<'_>,
        path: &FieldPath<'_>,
        code: Code,
        known: &[(&'static str, T)],
    ) -> Option<T> {
        let text = match &node.value {
            Value::Scalar(scalar) if scalar.kind() != ScalarKind::Null => &*scalar.text,
            _ => self.text(node, path)?,
        };
        let found = known.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let words: Vec<&str> = known.iter().map(|(word, _)| *word).collect();
            let message = format!("{} is not a value of this field", quoted(text));
            self.say(code, node.span, path, message, choice(text, &words));
        }
        found
    }

    /// A mapping of text to text, as labels are.
    pub fn text_map(&mut self, node: &Node<'_>, path: &FieldPath<'_>) -> Option<BTreeMap<String, String>> {
        let entries = self.mapping(node, path)?;
        let before = self.errors;
        let mut map = BTreeMap::new();
        for entry in entries {
            if let Some(text) = self.text(&entry.value, &path.key(&entry.key)) {
                map.insert(entry.key.to_string(), text.to_owned());
            }
        }
        (self.errors == before).then_some(map)
    }

    fn wrong_type(&mut self, node: &Node<'_>, path: &FieldPath<'_>, expected: &str, help: impl Into<String>) {
        let message = format!("{expected} was expected, and this is {}", describe(node));
        self.say(Code::WrongType, node.span, path, message, help);
    }
}

/// Whether a value is `null`, in whatever spelling.
pub fn is_null(node: &Node<'_>) -> bool {
    matches!(&node.value, Value::Scalar(scalar) if scalar.kind() == ScalarKind::Null)
}

fn is_decimal(text: &str) -> bool {
    !text.is_empty() && text.len() <= 20 && text.bytes().all(|b| b.is_ascii_digit())
}

/// Too large or too small is out of range wherever it is used, so where exactly does not matter.
fn saturating(text: &str) -> i64 {
    text.parse().unwrap_or(if text.starts_with('-') { i64::MIN } else { i64::MAX })
}

/// `exportTo` as protocol buffers spell it: `export_to`.
fn snake_case(name: &str) -> String {
    let mut out = String::with_capacity(name.len() + 4);
    for c in name.chars() {
        if c.is_ascii_uppercase() {
            out.push('_');
        }
        out.push(c.to_ascii_lowercase());
    }
    out
}
