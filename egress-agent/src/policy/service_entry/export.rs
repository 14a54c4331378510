//! `exportTo`: the namespaces that see an entry.

use std::collections::HashMap;

use super::{Code, Decoder, ExportTo, FieldPath, Node, quoted};
use crate::policy::{names::is_dns_label, yaml::Span};

/// Reads the list; `namespace` is the entry's own.
pub(super) fn decode(
    decoder: &mut Decoder<'_>,
    node: &Node<'_>,
    namespace: &str,
    path: &FieldPath<'_>,
) -> Option<ExportTo> {
    let items = decoder.items(node, path)?;
    let before = decoder.errors();
    let mut seen = HashMap::new();
    for (index, item) in items.iter().enumerate() {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        check(decoder, text, item.span, &path);
        let name = if text == "." { namespace } else { text };
        if let Some(first) = seen.insert(name, text) {
            let message = if first == text {
                format!("{} is listed twice", quoted(text))
            } else {
                format!("`.` and `{namespace}` are the same namespace")
            };
            decoder.say(Code::BadExportTo, item.span, &path, message, "delete one of them");
        }
    }
    if items.len() > 1 {
        exclusive(decoder, &seen, node.span, path);
    }
    (decoder.errors() == before).then(|| match items {
        [] => ExportTo::All,
        _ if seen.contains_key("*") => ExportTo::All,
        _ if seen.contains_key("~") => ExportTo::Nobody,
        _ => ExportTo::Namespaces(sorted(&seen)),
    })
}

fn check(decoder: &mut Decoder<'_>, text: &str, span: Span, path: &FieldPath<'_>) {
    if !matches!(text, "*" | "." | "~") && !is_dns_label(text) {
        let message = format!("{} is not a namespace", quoted(text));
        let help = "write `*` for all, `.` for the entry's own, `~` for nobody, or the name of a namespace";
        decoder.say(Code::BadExportTo, span, path, message, help);
    }
}

fn exclusive(decoder: &mut Decoder<'_>, seen: &HashMap<&str, &str>, span: Span, path: &FieldPath<'_>) {
    if seen.contains_key("*") {
        let message = "`*` exports to every namespace, so nothing can stand beside it";
        decoder.say(Code::BadExportTo, span, path, message, "write `[\"*\"]` alone, or only the namespaces");
    }
    if seen.contains_key("~") {
        let message = "`~` exports to nobody, so nothing can stand beside it";
        decoder.say(Code::BadExportTo, span, path, message, "write `[\"~\"]` alone, or only the namespaces");
    }
}

fn sorted(names: &HashMap<&str, &str>) -> Vec<String> {
    let mut names: Vec<String> = names.keys().map(|&name| name.to_owned()).collect();
    names.sort();
    names
}
