//! JSON as a located tree. YAML's reader would hold a whole one-line file in memory as tokens, and knows neither
//! surrogate pairs nor all of JSON's freedom with tabs.

use std::borrow::Cow;

use super::{Document, Entry, MAX_DEPTH, MAX_NODES, Node, Problem, Scalar, Span, Value, count, unique};
use crate::policy::code::Code;

/// Every value of the text: usually one, several where objects follow each other.
pub(super) fn read(text: &str) -> Result<Vec<Document<'_>>, Problem> {
    let mut reader = Reader { text, at: 0, line: 1, column: 1, nodes: 0, problems: Vec::new() };
    let mut documents = Vec::new();
    reader.skip_space();
    while reader.peek().is_some() {
        let root = Some(reader.value(0)?);
        documents.push(Document { root, problems: std::mem::take(&mut reader.problems) });
        reader.skip_space();
    }
    Ok(documents)
}

struct Reader<'t> {
    text: &'t str,
    at: usize,
    line: usize,
    column: usize,
    nodes: usize,
    problems: Vec<Problem>,
}

impl<'t> Reader<'t> {
    fn value(&mut self, depth: usize) -> Result<Node<'t>, Problem> {
        self.nodes += 1;
        if depth > MAX_DEPTH || self.nodes > MAX_NODES {
            return Err(Problem::new(Code::TooComplex, self.span(1), "the document is too deep or too large"));
        }
        let span = self.span(1);
        match self.peek() {
            Some(b'{') => Ok(Node { span, value: Value::Mapping(self.object(depth)?) }),
            Some(b'[') => Ok(Node { span, value: Value::Sequence(self.array(depth)?) }),
            Some(b'"') => {
                let text = self.string()?;
                Ok(self.scalar(span, text, false))
            }
            Some(b'-' | b'0'..=b'9' | b'a'..=b'z') => {
                let text = Cow::Borrowed(self.word()?);
                Ok(self.scalar(span, text, true))
            }
            _ => Err(self.error("a value was expected here")),
        }
    }

    fn scalar(&self, start: Span, text: Cow<'t, str>, plain: bool) -> Node<'t> {
        let length = count(self.column).saturating_sub(start.column);
        Node { span: Span { length, ..start }, value: Value::Scalar(Scalar { text, plain }) }
    }

    fn object(&mut self, depth: usize) -> Result<Vec<Entry<'t>>, Problem> {
        let mut entries = Vec::new();
        self.list(b'}', |reader| {
            let start = reader.span(1);
            let key = if reader.peek() == Some(b'"') {
                reader.string()?
            } else {
                return Err(reader.error("a key in double quotes was expected here"));
            };
            let key_span = Span { length: count(reader.column).saturating_sub(start.column), ..start };
            reader.skip_space();
            if !reader.take(b':') {
                return Err(reader.error("`:` was expected here"));
            }
            reader.skip_space();
            entries.push(Entry { key, key_span, value: reader.value(depth + 1)? });
            Ok(())
        })?;
        Ok(unique(entries, &mut self.problems))
    }

    fn array(&mut self, depth: usize) -> Result<Vec<Node<'t>>, Problem> {
        let mut items = Vec::new();
        self.list(b']', |reader| {
            items.push(reader.value(depth + 1)?);
            Ok(())
        })?;
        Ok(items)
    }

    /// Items between the bracket at hand and its partner, separated by commas.
    fn list(&mut self, close: u8, mut item: impl FnMut(&mut Self) -> Result<(), Problem>) -> Result<(), Problem> {
        self.advance(1);
        self.skip_space();
        if self.take(close) {
            return Ok(());
        }
        loop {
            item(self)?;
            self.skip_space();
            if self.take(close) {
                return Ok(());
            }
            if !self.take(b',') {
                return Err(self.error(format!("`,` or `{}` was expected here", char::from(close))));
            }
            self.skip_space();
        }
    }

    /// A number, `true`, `false` or `null`; whoever reads the field looks closer.
    fn word(&mut self) -> Result<&'t str, Problem> {
        let rest = &self.text[self.at..];
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && !"+-._".contains(c)).unwrap_or(rest.len());
        let word = &rest[..end];
        if word.starts_with(|c: char| c.is_ascii_alphabetic()) && !matches!(word, "true" | "false" | "null") {
            return Err(self.error("text must be in double quotes"));
        }
        self.advance(end);
        Ok(word)
    }

    fn string(&mut self) -> Result<Cow<'t, str>, Problem> {
        let body = &self.text[self.at + 1..];
        let end = string_end(body).ok_or_else(|| self.error("this string does not end"))?;
        let raw = &body[..end];
        let text = if raw.contains('\\') {
            Cow::Owned(unescape(raw).ok_or_else(|| self.error("this string has an escape that JSON does not know"))?)
        } else {
            Cow::Borrowed(raw)
        };
        self.advance(end + 2);
        Ok(text)
    }

    fn peek(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn take(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        if found {
            self.advance(1);
        }
        found
    }

    fn skip_space(&mut self) {
        let rest = &self.text[self.at..];
        let end = rest.find(|c| !matches!(c, ' ' | '\t' | '\n' | '\r')).unwrap_or(rest.len());
        self.advance(end);
    }

    fn advance(&mut self, bytes: usize) {
        let mut passed = self.text[self.at..self.at + bytes].chars().peekable();
        while let Some(c) = passed.next() {
            if c == '\n' || (c == '\r' && passed.peek() != Some(&'\n')) {
                self.line += 1;
                self.column = 1;
            } else {
                self.column += 1;
            }
        }
        self.at += bytes;
    }

    fn span(&self, length: u32) -> Span {
        Span { line: count(self.line), column: count(self.column), length }
    }

    fn error(&self, message: impl Into<String>) -> Problem {
        Problem::new(Code::Syntax, self.span(1), message)
    }
}

/// Where the closing quote is; control characters end the search, as JSON does not allow them in strings.
fn string_end(body: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in body.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return Some(at),
            0..0x20 => return None,
            _ => {}
        }
    }
    None
}

/// Resolves escapes by reading the string as JSON once more, which is rare enough.
fn unescape(raw: &str) -> Option<String> {
    serde_json::from_str(&format!("\"{raw}\"")).ok()
}

#[cfg(test)]
mod tests {
    use super::read;
    use crate::policy::yaml::{Node, Value};

    fn root(text: &str) -> Node<'_> {
        read(text).unwrap().remove(0).root.unwrap()
    }

    #[test]
    fn values_know_where_they_stand() {
        let Value::Mapping(entries) = root("{\r\n\t\"é\": [1,\n  \"x\\ud83d\\ude00\"]}").value else { panic!() };
        let Value::Sequence(items) = &entries[0].value.value else { panic!() };
        assert_eq!((entries[0].key_span.line, entries[0].key_span.column, entries[0].key_span.length), (2, 2, 3));
        assert_eq!((items[1].span.line, items[1].span.column, items[1].span.length), (3, 3, 15));
        let Value::Scalar(text) = &items[1].value else { panic!() };
        assert_eq!((&*text.text, text.plain), ("x\u{1f600}", false));
    }

    #[test]
    fn what_is_not_json_is_an_error() {
        for text in ["{", "[1 2]", "{a: 1}", "[\"a\n\"]", "[\"\\x\"]", "{\"a\" 1}", "[yes]", &"[".repeat(100_000)] {
            assert!(read(text).is_err(), "{text:.20}");
        }
    }
}
