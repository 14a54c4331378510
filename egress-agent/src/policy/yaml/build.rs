//! The tree from the events of the YAML parser.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::{HashMap, HashSet},
    rc::Rc,
    str::Chars,
};

use saphyr_parser::{BufferedInput, Event, Marker, Parser, ScalarStyle, ScanError, Tag};

use super::{
    Document, Entry, MAX_ALIASED, MAX_DEPTH, MAX_NODES, MAX_TOKEN, Node, Problem, Scalar, ScalarKind, Span, Value,
    complaints::{Tabbed, explain, indented_with_tabs, tab},
    count, end_of, lines, unique,
};
use crate::policy::code::Code;

/// Reads one document after the other.
pub(super) struct Documents<'t> {
    /// The text from where the parser started.
    text: &'t str,
    /// Lines before `text`.
    base: u32,
    /// Behind the last character.
    end: Span,
    parser: Option<Parser<'t, BufferedInput<Feed<'t>>>>,
    meter: Rc<Meter>,
    aliased: usize,
    /// Lines that are indented with tabs.
    tabs: Vec<Tabbed>,
}

impl<'t> Documents<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        let mut documents = Self {
            text,
            base: 0,
            end: end_of(text),
            parser: None,
            meter: Rc::default(),
            aliased: 0,
            tabs: indented_with_tabs(text),
        };
        documents.start(text, 0);
        documents
    }

    fn start(&mut self, text: &'t str, base: u32) {
        self.text = text;
        self.base = base;
        self.meter = Rc::default();
        self.parser = Some(Parser::new_from_iter(Feed { chars: text.chars(), meter: Rc::clone(&self.meter) }));
    }

    /// Goes on at the next line that begins a document, from the line of the error on.
    fn resume_after(&mut self, line: u32) {
        self.parser = None;
        let skip = line.saturating_sub(self.base).saturating_sub(1).max(1) as usize;
        let found = lines(self.text).enumerate().skip(skip).find(|(_, line)| begins_document(line));
        if let Some((index, line)) = found {
            let offset = line.as_ptr() as usize - self.text.as_ptr() as usize;
            self.start(&self.text[offset..], self.base.saturating_add(count(index)));
        }
    }

    fn event(&mut self) -> Result<Option<(Event<'t>, Span)>, Problem> {
        self.meter.rewind();
        let Some(event) = self.parser.as_mut().and_then(Parser::next_event) else { return Ok(None) };
        let cut = self.meter.ran_out();
        match event {
            Ok((_, span)) if cut => Err(too_long(self.span(span))),
            Err(error) if cut => Err(too_long(self.mark(&error))),
            Ok((event, span)) => Ok(Some((event, self.span(span)))),
            Err(error) => Err(explain(&error, self.mark(&error), self.text, self.base)),
        }
    }

    fn span(&self, span: saphyr_parser::Span) -> Span {
        Span { length: count(span.len()), ..self.place(&span.start) }
    }

    fn mark(&self, error: &ScanError) -> Span {
        Span { length: 1, ..self.place(error.marker()) }
    }

    /// The parser takes the end of a text for the begin of another line, also where the last line has no end.
    fn place(&self, mark: &Marker) -> Span {
        let line = count(mark.line().max(1)).saturating_add(self.base);
        if line > self.end.line { self.end } else { Span { line, column: count(mark.col() + 1), length: 0 } }
    }

    /// The parser lets some tabs pass; how deep they indent is anyone's guess.
    fn no_tab(&self, builder: &Builder<'_>, span: Span) -> Result<(), Problem> {
        let found = self.tabs.binary_search_by_key(&(span.line, span.column), |line| (line.line, line.content));
        match found {
            Ok(index) if !builder.in_flow() => Err(tab(Span { column: self.tabs[index].tab, length: 1, ..span })),
            _ => Ok(()),
        }
    }

    /// Reads to the end of the document at hand; `None` at the end of the text.
    fn read(&mut self) -> Result<Option<Document<'t>>, (Vec<Problem>, Problem)> {
        let mut builder = Builder { aliased: self.aliased, ..Builder::default() };
        loop {
            let step = match self.event() {
                Ok(None | Some((Event::StreamEnd, _))) => return Ok(None),
                Ok(Some((Event::DocumentEnd, _))) => break,
                Ok(Some((event, span))) => self.no_tab(&builder, span).and_then(|()| builder.event(event, span)),
                Err(problem) => Err(problem),
            };
            step.map_err(|problem| (std::mem::take(&mut builder.problems), problem))?;
        }
        self.aliased = builder.aliased;
        Ok(Some(builder.finish()))
    }
}

impl<'t> Iterator for Documents<'t> {
    type Item = Document<'t>;

    fn next(&mut self) -> Option<Document<'t>> {
        match self.read() {
            Ok(document) => document,
            Err((mut problems, last)) => {
                self.resume_after(last.span.line);
                problems.push(last);
                Some(Document { root: None, problems })
            }
        }
    }
}

fn begins_document(line: &str) -> bool {
    line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t']))
}

/// Characters on their way to the parser, which sees the end of the text where it would have to buffer too much.
struct Feed<'t> {
    chars: Chars<'t>,
    meter: Rc<Meter>,
}

impl Iterator for Feed<'_> {
    type Item = char;

    fn next(&mut self) -> Option<char> {
        self.meter.0.set(self.meter.0.get() + 1);
        if self.meter.ran_out() { None } else { self.chars.next() }
    }
}

/// Counts what the parser took since its last event.
#[derive(Default)]
struct Meter(Cell<usize>);

impl Meter {
    fn rewind(&self) {
        if !self.ran_out() {
            self.0.set(0);
        }
    }

    fn ran_out(&self) -> bool {
        self.0.get() > MAX_TOKEN
    }
}

#[derive(Default)]
struct Builder<'t> {
    open: Vec<Open<'t>>,
    root: Option<Node<'t>>,
    problems: Vec<Problem>,
    /// Anchored values, with the number of values in each.
    anchors: HashMap<usize, (Node<'t>, usize)>,
    nodes: usize,
    aliased: usize,
}

/// A collection whose end has not come yet.
struct Open<'t> {
    span: Span,
    anchor: usize,
    /// `nodes` before it began.
    before: usize,
    content: Content<'t>,
}

enum Content<'t> {
    Sequence(Vec<Node<'t>>),
    Mapping { entries: Vec<Entry<'t>>, key: Option<Key<'t>>, merged: Vec<Node<'t>> },
}

enum Key<'t> {
    Name(Cow<'t, str>, Span),
    Merge,
    /// Reported; its value is dropped.
    Bad,
}

impl<'t> Builder<'t> {
    /// Whether a collection in brackets is open: those begin with a character of their own.
    fn in_flow(&self) -> bool {
        self.open.iter().any(|open| open.span.length > 0)
    }

    fn event(&mut self, event: Event<'t>, span: Span) -> Result<(), Problem> {
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let tagged = self.tag(tag.as_deref(), &["str"], span);
                let scalar = Scalar { text, plain: style == ScalarStyle::Plain && !tagged };
                let before = self.nodes;
                self.close(Node { span, value: Value::Scalar(scalar) }, anchor, before)
            }
            Event::SequenceStart(anchor, tag) => {
                self.tag(tag.as_deref(), &["seq"], span);
                self.open(span, anchor, Content::Sequence(Vec::new()))
            }
            Event::MappingStart(anchor, tag) => {
                self.tag(tag.as_deref(), &["map"], span);
                self.open(span, anchor, Content::Mapping { entries: Vec::new(), key: None, merged: Vec::new() })
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(),
            Event::Alias(id) => self.alias(id, span),
            _ => Ok(()),
        }
    }

    /// Whether there is a tag; every tag but the plain ones is a problem.
    fn tag(&mut self, tag: Option<&Tag>, known: &[&str], span: Span) -> bool {
        let Some(tag) = tag else { return false };
        let non_specific = tag.handle.is_empty() && tag.suffix == "!";
        let is_plain = tag.is_yaml_core_schema() && known.contains(&&*tag.suffix);
        if !(non_specific || is_plain) {
            let message = "a tag (`!…`) changes what the value means and is not read here";
            let help = "leave out the tag, and put text in quotes";
            self.problems.push(Problem::new(Code::UnsupportedTag, span, message).help(help));
        }
        true
    }

    fn open(&mut self, span: Span, anchor: usize, content: Content<'t>) -> Result<(), Problem> {
        if self.open.len() >= MAX_DEPTH {
            let message = format!("more than {MAX_DEPTH} levels of nesting");
            return Err(Problem::new(Code::TooComplex, span, message));
        }
        self.open.push(Open { span, anchor, before: self.nodes, content });
        Ok(())
    }

    fn end(&mut self) -> Result<(), Problem> {
        let Some(Open { span, anchor, before, content }) = self.open.pop() else { return Ok(()) };
        let value = match content {
            Content::Sequence(items) => Value::Sequence(items),
            Content::Mapping { entries, merged, .. } => {
                let entries = unique(entries, &mut self.problems);
                Value::Mapping(merge(entries, merged))
            }
        };
        self.close(Node { span, value }, anchor, before)
    }

    fn alias(&mut self, id: usize, span: Span) -> Result<(), Problem> {
        let Some((node, size)) = self.anchors.get(&id) else {
            let message = "this alias points into the value it is part of";
            return Err(Problem::new(Code::BadAlias, span, message));
        };
        self.aliased += size;
        if self.aliased > MAX_ALIASED {
            return Err(too_many_aliased(span));
        }
        let (node, before) = (node.clone(), self.nodes);
        self.nodes += size - 1;
        self.close(node, 0, before)
    }

    /// Puts a complete value into the collection it belongs to.
    fn close(&mut self, node: Node<'t>, anchor: usize, before: usize) -> Result<(), Problem> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            let message = format!("more than {MAX_NODES} values in one document");
            return Err(Problem::new(Code::TooComplex, node.span, message));
        }
        if anchor != 0 {
            let size = self.nodes - before;
            self.aliased += size;
            if self.aliased > MAX_ALIASED {
                return Err(too_many_aliased(node.span));
            }
            self.anchors.insert(anchor, (node.clone(), size));
        }
        match self.open.last_mut().map(|open| &mut open.content) {
            None => self.root = Some(node),
            Some(Content::Sequence(items)) => items.push(node),
            Some(Content::Mapping { entries, key, merged }) => match key.take() {
                None => *key = Some(read_key(node, &mut self.problems)),
                Some(Key::Name(name, key_span)) => entries.push(Entry { key: name, key_span, value: node }),
                Some(Key::Merge) => collect_merged(node, merged, &mut self.problems),
                Some(Key::Bad) => {}
            },
        }
        Ok(())
    }

    fn finish(self) -> Document<'t> {
        let empty = |node: &Node<'_>| matches!(&node.value, Value::Scalar(s) if s.kind() == ScalarKind::Null);
        Document { root: self.root.filter(|root| !empty(root)), problems: self.problems }
    }
}

fn read_key<'t>(node: Node<'t>, problems: &mut Vec<Problem>) -> Key<'t> {
    let (message, help) = match node.value {
        Value::Scalar(scalar) => match scalar.kind() {
            ScalarKind::Text if scalar.plain && scalar.text == "<<" => return Key::Merge,
            ScalarKind::Text | ScalarKind::Integer => return Key::Name(scalar.text, node.span),
            ScalarKind::Null => ("a key without a name", "write the name before the `:`"),
            _ => ("YAML reads this key as a boolean or a number", "put it in quotes"),
        },
        _ => (
            "a list or mapping cannot be a key",
            "if this is a template (`{{ … }}`), render it first; text with `{` or `[` at its start needs quotes",
        ),
    };
    problems.push(Problem::new(Code::BadKey, node.span, message).help(help));
    Key::Bad
}

fn collect_merged<'t>(node: Node<'t>, merged: &mut Vec<Node<'t>>, problems: &mut Vec<Problem>) {
    match node.value {
        Value::Mapping(_) => merged.push(node),
        Value::Sequence(items) if items.iter().all(|item| matches!(item.value, Value::Mapping(_))) => {
            merged.extend(items);
        }
        _ => problems.push(Problem::new(Code::BadKey, node.span, "`<<` merges mappings, and this is none")),
    }
}

/// Adds what `<<` brings; keys of the mapping itself win, then those of earlier merges.
fn merge<'t>(mut entries: Vec<Entry<'t>>, merged: Vec<Node<'t>>) -> Vec<Entry<'t>> {
    if merged.is_empty() {
        return entries;
    }
    let mut known: HashSet<Cow<'t, str>> = entries.iter().map(|entry| entry.key.clone()).collect();
    for node in merged {
        let Value::Mapping(more) = node.value else { continue };
        entries.extend(more.into_iter().filter(|entry| known.insert(entry.key.clone())));
    }
    entries
}

fn too_many_aliased(span: Span) -> Problem {
    let message = format!("anchors and aliases stand for more than {MAX_ALIASED} values");
    Problem::new(Code::TooComplex, span, message).help("write the values out, or split the file")
}

fn too_long(span: Span) -> Problem {
    let message = format!("a value, comment or `[…]`, `{{…}}` of more than {MAX_TOKEN} characters");
    Problem::new(Code::TooComplex, span, message).help("write long lists with one `- item` per line, or as JSON")
}
