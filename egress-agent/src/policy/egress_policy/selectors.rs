//! `workloads`: whom a policy is for.

use std::collections::BTreeMap;

use super::{Code, Decoder, Dialect, FieldPath, Node, quoted, rules::not_empty};
use crate::policy::{
    LabelOperator, LabelRequirement, PodSelector, Selector, User,
    names::{is_label_key, is_label_value, is_namespace},
    schema::egress_policy::{OPERATORS, POD, REQUIREMENT, SELECTOR},
    yaml::{ScalarKind, Value},
};

/// Suffixes of systemd units that can hold processes.
const UNIT_TYPES: [&str; 3] = [".service", ".scope", ".slice"];

/// Reads the list.
pub(super) fn decode(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Vec<Selector>> {
    let items = decoder.items(node, path)?;
    not_empty(decoder, items, node, path, "every workload");
    Some(items.iter().enumerate().filter_map(|(index, item)| selector(decoder, item, &path.item(index))).collect())
}

fn selector(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Selector> {
    let fields = decoder.fields(node, path, &SELECTOR, Dialect::Strict)?;
    let mut names = fields.names();
    let (Some(name), None) = (names.next(), names.next()) else {
        let message = "an item selects by exactly one of `cgroup`, `unit`, `pod` and `user`";
        let help = "items are alternatives: write one item for each";
        decoder.say(Code::BadSelector, node.span, path, message, help);
        return None;
    };
    let (node, path) = (fields.get(name)?, path.field(name));
    match name {
        "cgroup" => cgroup(decoder, node, &path).map(Selector::Cgroup),
        "unit" => unit(decoder, node, &path).map(Selector::Unit),
        "pod" => pod(decoder, node, &path).map(Selector::Pod),
        _ => user(decoder, node, &path).map(Selector::User),
    }
}

fn cgroup(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<String> {
    let text = decoder.text(node, path)?;
    if text == "/" {
        return Some(text.to_owned());
    }
    let trimmed = text.strip_prefix('/').unwrap_or(text);
    let trimmed = trimmed.strip_suffix('/').unwrap_or(trimmed);
    let help = if text.starts_with("/sys/fs/cgroup") {
        Some("write the path below the mount: leave out `/sys/fs/cgroup`")
    } else if trimmed.is_empty() {
        Some("write a path as `system.slice/nginx.service`, or `/` for the tasks of the root cgroup itself")
    } else if trimmed.split('/').any(|part| matches!(part, "" | "." | "..")) {
        Some("write the path without empty parts, `.` and `..`")
    } else if trimmed.split('/').any(|part| part.contains("**") && part != "**") {
        Some("`**` stands for any number of parts, so it is a part of its own: `a/**/b`")
    } else {
        unusable_glob(trimmed)
    };
    checked(decoder, Code::BadCgroup, node, path, trimmed, help)
}

fn unit(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<String> {
    let text = decoder.text(node, path)?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || ":-_.\\@*?".contains(c);
    let help = if text.contains('/') {
        Some("write the name of the unit, not a path; paths go with `cgroup`")
    } else if let Some(help) = unusable_glob(text) {
        Some(help)
    } else if text.len() > 255 || !text.chars().all(allowed) {
        Some("unit names are at most 255 letters, digits and `:-_.\\@`")
    } else if !text.ends_with('*') && !UNIT_TYPES.iter().any(|suffix| text.ends_with(suffix) && text != *suffix) {
        Some("write the full name, as `nginx.service`; services, scopes and slices hold processes")
    } else {
        None
    };
    checked(decoder, Code::BadUnit, node, path, text, help)
}

/// What a shell would expand and this does not.
fn unusable_glob(text: &str) -> Option<&'static str> {
    text.contains(['[', ']', '{', '}']).then_some("wildcards are `*` and `?`; list alternatives as items of their own")
}

fn checked(
    decoder: &mut Decoder<'_>,
    code: Code,
    node: &Node<'_>,
    path: &FieldPath<'_>,
    text: &str,
    help: Option<&str>,
) -> Option<String> {
    let Some(help) = help else { return Some(text.to_owned()) };
    decoder.say(code, node.span, path, format!("{} selects nothing", quoted(text)), help);
    None
}

fn user(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<User> {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let is_number = matches!(&node.value, Value::Scalar(scalar)
        if matches!(scalar.kind(), ScalarKind::Integer | ScalarKind::OddNumber) || digits(&scalar.text));
    let code = Code::BadUser;
    if is_number {
        let uid = decoder.integer(node, path, Dialect::Proto)?;
        // 4294967295 is -1, which no process can have.
        let valid = u32::try_from(uid).ok().filter(|&uid| uid != u32::MAX);
        if valid.is_none() {
            decoder.say(code, node.span, path, format!("{uid} is not a uid"), "uids are 0 to 4294967294");
        }
        return valid.map(User::Uid);
    }
    let text = decoder.text(node, path)?;
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-$@+".contains(c);
    if text.is_empty() || text.len() > 256 || text.starts_with('-') || !text.chars().all(fits) {
        let message = format!("{} is not the name of a user", quoted(text));
        decoder.say(code, node.span, path, message, "write one name of /etc/passwd, or a uid; there are no wildcards");
        return None;
    }
    Some(User::Name(text.to_owned()))
}

fn pod(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<PodSelector> {
    let fields = decoder.fields(node, path, &POD, Dialect::Strict)?;
    let mut selector = PodSelector::default();
    if let Some(node) = fields.get("matchLabels") {
        selector.match_labels = labels(decoder, node, &path.field("matchLabels"))?;
    }
    if let Some(node) = fields.get("matchExpressions") {
        let path = path.field("matchExpressions");
        for (index, item) in decoder.items(node, &path)?.iter().enumerate() {
            selector.match_expressions.extend(requirement(decoder, item, &path.item(index)));
        }
    }
    if let Some(node) = fields.get("namespaces") {
        selector.namespaces = namespaces(decoder, node, &path.field("namespaces"));
    }
    if let Some(node) = fields.get("namespaceLabels") {
        selector.namespace_labels = labels(decoder, node, &path.field("namespaceLabels"));
    }
    Some(selector)
}

fn namespaces(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Vec<String>> {
    let items = decoder.items(node, path)?;
    not_empty(decoder, items, node, path, "every namespace");
    let mut names = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        if !is_namespace(text) {
            let message = format!("{} is not a namespace", quoted(text));
            let help = "namespaces are at most 63 lower case letters, digits and inner `-`; there are no wildcards";
            decoder.say(Code::BadLabelSelector, item.span, &path, message, help);
        }
        names.push(text.to_owned());
    }
    Some(names)
}

fn labels(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<BTreeMap<String, String>> {
    let labels = decoder.text_map(node, path)?;
    for entry in decoder.mapping(node, path).unwrap_or_default() {
        let path = path.key(&entry.key);
        key(decoder, &entry.key, entry.key_span, &path);
        if let Some(text) = labels.get(&*entry.key) {
            value(decoder, text, entry.value.span, &path);
        }
    }
    Some(labels)
}

fn key(decoder: &mut Decoder<'_>, text: &str, span: super::super::yaml::Span, path: &FieldPath<'_>) {
    if !is_label_key(text) {
        let message = format!("{} is not the key of a label", quoted(text));
        let help = "keys are at most 63 letters, digits, `-`, `_` and `.`, and may have a DNS name and `/` before them";
        decoder.say(Code::BadLabelSelector, span, path, message, help);
    }
}

fn value(decoder: &mut Decoder<'_>, text: &str, span: super::super::yaml::Span, path: &FieldPath<'_>) {
    if !is_label_value(text) {
        let message = format!("{} is not the value of a label", quoted(text));
        let help = "values are at most 63 letters, digits, `-`, `_` and `.`; they are compared literally";
        decoder.say(Code::BadLabelSelector, span, path, message, help);
    }
}

fn requirement(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<LabelRequirement> {
    let fields = decoder.fields(node, path, &REQUIREMENT, Dialect::Strict)?;
    let required = (Code::BadLabelSelector, "name the label");
    let key_node = decoder.required(&fields, "key", node.span, path, required);
    let required = (Code::BadLabelSelector, "write `In`, `NotIn`, `Exists` or `DoesNotExist`");
    let operator = decoder.required(&fields, "operator", node.span, path, required);
    let key_text = decoder.text(key_node?, &path.field("key"))?;
    key(decoder, key_text, key_node?.span, &path.field("key"));
    let operator = decoder.keyword(operator?, &path.field("operator"), Code::BadLabelSelector, &OPERATORS)?;
    let path = path.field("values");
    let mut values = Vec::new();
    for (index, item) in
        fields.get("values").and_then(|node| decoder.items(node, &path)).unwrap_or_default().iter().enumerate()
    {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        value(decoder, text, item.span, &path);
        values.push(text.to_owned());
    }
    let wants_values = matches!(operator, LabelOperator::In | LabelOperator::NotIn);
    if wants_values == values.is_empty() {
        let span = fields.get("values").map_or(node.span, |node| node.span);
        let (message, help) = if wants_values {
            ("`In` and `NotIn` compare with `values`, and there are none", "list the values, as `values: [web, api]`")
        } else {
            ("`Exists` and `DoesNotExist` compare with nothing", "delete `values`, or write `In` or `NotIn`")
        };
        decoder.say(Code::BadLabelSelector, span, &path, message, help);
    }
    Some(LabelRequirement { key: key_text.to_owned(), operator, values })
}
