//! The way to a field, as findings show it: `spec.ports[0].number`.

use std::fmt;

use super::diagnostic::printable;

/// The way to a field, built without allocation as long as nobody asks for it.
#[derive(Debug, Clone, Copy)]
pub enum FieldPath<'a> {
    /// The document.
    Root,
    /// A field of an object.
    Field(&'a FieldPath<'a>, &'a str),
    /// An item of a list.
    Item(&'a FieldPath<'a>, usize),
    /// A key of a mapping whose keys are data.
    Key(&'a FieldPath<'a>, &'a str),
}

impl<'a> FieldPath<'a> {
    /// A field below this.
    #[must_use]
    pub const fn field(&'a self, name: &'a str) -> Self {
        Self::Field(self, name)
    }

    /// An item below this.
    #[must_use]
    pub const fn item(&'a self, index: usize) -> Self {
        Self::Item(self, index)
    }

    /// A key below this.
    #[must_use]
    pub const fn key(&'a self, key: &'a str) -> Self {
        Self::Key(self, key)
    }
}

impl fmt::Display for FieldPath<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Self::Root, name) => f.write_str(&printable(name)),
            Self::Field(parent, name) => write!(f, "{parent}.{}", printable(name)),
            Self::Item(parent, index) => write!(f, "{parent}[{index}]"),
            Self::Key(parent, key) => write!(f, "{parent}[{:.80}]", printable(key)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::FieldPath;

    #[test]
    fn paths_read_as_in_the_document_and_hide_nothing() {
        let spec = FieldPath::Root.field("spec");
        let ports = spec.field("ports");
        assert_eq!(ports.item(0).field("number").to_string(), "spec.ports[0].number");
        assert_eq!(spec.field("labels").key("a.b/c\u{1b}").to_string(), "spec.labels[a.b/c\\u{1b}]");
        assert_eq!(FieldPath::Root.to_string(), "");
    }
}
