//! Values in words, for findings about their type.

use super::is_null;
use crate::policy::{
    diagnostic::{printable, quoted},
    yaml::{Entry, Node, Scalar, ScalarKind, Value},
};

/// A value in a few words.
pub(super) fn describe(node: &Node<'_>) -> String {
    match &node.value {
        Value::Sequence(_) => "a list".to_owned(),
        Value::Mapping(_) => "a mapping".to_owned(),
        Value::Scalar(scalar) => describe_scalar(scalar),
    }
}

fn describe_scalar(scalar: &Scalar<'_>) -> String {
    let text = quoted(&scalar.text);
    match scalar.kind() {
        ScalarKind::Null => "nothing".to_owned(),
        ScalarKind::Bool => format!("{text}, which YAML reads as a boolean"),
        ScalarKind::Integer | ScalarKind::OddNumber => format!("the number {text}"),
        ScalarKind::Text => format!("the text {text}"),
    }
}

/// `001:db8::` and `a: b` without quotes are mappings.
pub(super) fn mapping_for_text(entries: &[Entry<'_>]) -> String {
    match entries {
        [entry] if is_null(&entry.value) => {
            format!("YAML reads a colon at the end as a mapping; put it in quotes: \"{}:\"", printable(&entry.key))
        }
        _ => "write one value; if a colon is part of it, put it in quotes".to_owned(),
    }
}
