//! Values in the order in which they are written, as JSON and as YAML.

use std::fmt::Write as _;

/// A value.
#[derive(Clone)]
pub enum Tree {
    Bool(bool),
    Number(i64),
    Text(String),
    List(Vec<Tree>),
    Map(Vec<(String, Tree)>),
}

impl From<bool> for Tree {
    fn from(value: bool) -> Self {
        Self::Bool(value)
    }
}

impl From<i64> for Tree {
    fn from(value: i64) -> Self {
        Self::Number(value)
    }
}

impl From<u32> for Tree {
    fn from(value: u32) -> Self {
        Self::Number(value.into())
    }
}

impl From<&str> for Tree {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Tree {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// A list.
pub fn list<T: Into<Tree>>(items: impl IntoIterator<Item = T>) -> Tree {
    Tree::List(items.into_iter().map(Into::into).collect())
}

/// A mapping, written in this order.
#[derive(Clone, Default)]
pub struct Map(Vec<(String, Tree)>);

impl Map {
    pub fn new() -> Self {
        Self::default()
    }

    /// With this key and value at the end.
    pub fn with(mut self, key: &str, value: impl Into<Tree>) -> Self {
        self.0.push((key.to_owned(), value.into()));
        self
    }

    /// With these keys and values at the end.
    pub fn and(mut self, other: Self) -> Self {
        self.0.extend(other.0);
        self
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl From<Map> for Tree {
    fn from(map: Map) -> Self {
        Self::Map(map.0)
    }
}

impl Tree {
    /// As JSON, and a line end.
    pub fn to_json(&self) -> String {
        let mut out = String::new();
        self.json(&mut out, 0);
        out + "\n"
    }

    fn json(&self, out: &mut String, depth: usize) {
        match self {
            Self::Map(entries) if !entries.is_empty() => {
                let write = |out: &mut String, (key, value): &(String, Self)| {
                    out.push_str(&json_text(key));
                    out.push_str(": ");
                    value.json(out, depth + 1);
                };
                enclosed(out, ['{', '}'], entries, depth, write);
            }
            Self::List(items) if items.iter().any(|item| matches!(item, Self::Map(_))) => {
                enclosed(out, ['[', ']'], items, depth, |out, item| item.json(out, depth + 1));
            }
            _ => out.push_str(&self.flow()),
        }
    }

    /// On one line, which JSON and YAML read alike.
    fn flow(&self) -> String {
        match self {
            Self::Bool(value) => value.to_string(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => json_text(text),
            Self::List(items) => format!("[{}]", items.iter().map(Self::flow).collect::<Vec<_>>().join(", ")),
            Self::Map(entries) => {
                let pairs: Vec<_> =
                    entries.iter().map(|(key, value)| format!("{}: {}", json_text(key), value.flow())).collect();
                format!("{{{}}}", pairs.join(", "))
            }
        }
    }

    /// As YAML in block style.
    pub fn to_yaml(&self) -> String {
        let mut out = String::new();
        self.yaml(&mut out, 0);
        out.trim_start().to_owned()
    }

    fn yaml(&self, out: &mut String, depth: usize) {
        let start = format!("\n{}", "  ".repeat(depth));
        match self {
            Self::Map(entries) if !entries.is_empty() => {
                for (key, value) in entries {
                    let _ = write!(out, "{start}{}:", plain_or_quoted(key));
                    value.yaml_below(out, depth + 1);
                }
            }
            Self::List(items) if !items.is_empty() => {
                for item in items {
                    let _ = write!(out, "{start}-");
                    match item {
                        Self::Map(entries) if !entries.is_empty() => {
                            let mut text = String::new();
                            item.yaml(&mut text, depth + 1);
                            let _ = write!(out, " {}", text.trim_start());
                        }
                        _ => item.yaml_below(out, depth + 1),
                    }
                }
            }
            _ => out.push_str(&self.flow()),
        }
        if depth == 0 {
            out.push('\n');
        }
    }

    fn yaml_below(&self, out: &mut String, depth: usize) {
        match self {
            Self::Map(entries) if !entries.is_empty() => self.yaml(out, depth),
            Self::List(items) if !items.is_empty() => self.yaml(out, depth),
            Self::Text(text) => {
                let _ = write!(out, " {}", plain_or_quoted(text));
            }
            _ => {
                let _ = write!(out, " {}", self.flow());
            }
        }
    }
}

fn enclosed<T>(
    out: &mut String,
    [open, close]: [char; 2],
    parts: &[T],
    depth: usize,
    mut write: impl FnMut(&mut String, &T),
) {
    out.push(open);
    for (index, part) in parts.iter().enumerate() {
        out.push_str(if index == 0 { "\n" } else { ",\n" });
        out.push_str(&"  ".repeat(depth + 1));
        write(out, part);
    }
    let _ = write!(out, "\n{}{close}", "  ".repeat(depth));
}

fn json_text(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Without quotes where no reader of YAML can take the text for anything else.
fn plain_or_quoted(text: &str) -> String {
    let harmless = |c: char| c.is_ascii_alphanumeric() || " .,;/()_-".contains(c);
    let is_word = ["y", "n", "yes", "no", "on", "off", "true", "false", "null"];
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(harmless)
        && !is_word.contains(&text.to_ascii_lowercase().as_str());
    if is_plain { text.to_owned() } else { json_text(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_notations_keep_the_order_and_nest() {
        let tree: Tree = Map::new()
            .with("type", "object")
            .with("none", list::<Tree>([]))
            .with("items", list([Tree::from(Map::new().with("b", true).with("a", list([1_i64, 2])))]))
            .with("on", "a: b")
            .into();
        let json = concat!(
            "{\n  \"type\": \"object\",\n  \"none\": [],\n",
            "  \"items\": [\n    {\n      \"b\": true,\n      \"a\": [1, 2]\n    }\n  ],\n",
            "  \"on\": \"a: b\"\n}\n",
        );
        let yaml = "type: object\nnone: []\nitems:\n  - b: true\n    a:\n      - 1\n      - 2\n\"on\": \"a: b\"\n";
        assert_eq!(tree.to_json(), json);
        assert_eq!(tree.to_yaml(), yaml);
    }
}
