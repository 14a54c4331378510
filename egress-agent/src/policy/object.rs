//! What is the same in every object: `apiVersion`, `kind`, `metadata`, and lists of objects.

use std::{collections::BTreeMap, sync::Arc};

use super::{
    Kind, ObjectName,
    code::Code,
    decode::{Decoder, Dialect, is_null},
    diagnostic::quoted,
    names::{is_namespace, is_object_name},
    path::FieldPath,
    schema::metadata::METADATA,
    suggest::{list, nearest},
    yaml::{Node, Span, Value},
};

/// The group of [`Kind::ServiceEntry`].
pub const ISTIO_GROUP: &str = "networking.istio.io";
/// The group of [`Kind::EgressPolicy`].
pub const EGRESS_GROUP: &str = "egress.filter";
/// Versions of [`ISTIO_GROUP`].
pub const ISTIO_VERSIONS: [&str; 3] = ["v1", "v1beta1", "v1alpha3"];
/// Versions of [`EGRESS_GROUP`].
pub const EGRESS_VERSIONS: [&str; 1] = ["v1alpha1"];

/// Kinds of [`ISTIO_GROUP`] that carry no egress rules.
const OTHER_ISTIO_KINDS: [&str; 8] = [
    "DestinationRule",
    "EnvoyFilter",
    "Gateway",
    "ProxyConfig",
    "Sidecar",
    "VirtualService",
    "WorkloadEntry",
    "WorkloadGroup",
];

/// What to do with an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Read it.
    Policy(Kind),
    /// Read its `items`.
    List,
    /// It is of another kind, which has been noted, or of none, which has been reported.
    None,
}

/// What an object is.
pub fn role(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Role {
    if !matches!(node.value, Value::Mapping(_)) {
        let message = "a document is a mapping with `apiVersion`, `kind`, `metadata` and `spec`";
        decoder.say(Code::NotAnObject, node.span, path, message, "see the examples in `policies/`");
        return Role::None;
    }
    let api_version = header(decoder, node, path, "apiVersion");
    let kind = header(decoder, node, path, "kind");
    let (Some(api_version), Some(kind)) = (api_version, kind) else { return Role::None };
    let (group, version) = api_version.0.split_once('/').unwrap_or(("", api_version.0));
    match (group, kind.0) {
        ("", "List") if version == "v1" => Role::List,
        (ISTIO_GROUP, _) => {
            let others = OTHER_ISTIO_KINDS.as_slice();
            known(decoder, path, (version, api_version.1), kind, (&ISTIO_VERSIONS, Kind::ServiceEntry, others))
        }
        (EGRESS_GROUP, _) => {
            known(decoder, path, (version, api_version.1), kind, (&EGRESS_VERSIONS, Kind::EgressPolicy, &[]))
        }
        _ => foreign(decoder, path, api_version, kind),
    }
}

fn header<'n>(decoder: &mut Decoder<'_>, node: &'n Node<'n>, path: &FieldPath<'_>, name: &str) -> Option<Located<'n>> {
    let path = path.field(name);
    let value = node.get(name).filter(|value| !is_null(value));
    if value.is_none() {
        let help = "write for example `apiVersion: networking.istio.io/v1` and `kind: ServiceEntry`";
        decoder.missing(Code::NoKind, node.span, &path, help);
    }
    let value = value?;
    decoder.text(value, &path).map(|text| (text, value.span))
}

/// A text and where it stands.
type Located<'n> = (&'n str, Span);

/// One of the two groups that are read strictly.
fn known(
    decoder: &mut Decoder<'_>,
    path: &FieldPath<'_>,
    version: Located<'_>,
    kind: Located<'_>,
    (versions, own, others): (&[&str], Kind, &[&str]),
) -> Role {
    let is_list = kind.0.strip_suffix("List") == Some(own.as_str());
    if kind.0 != own.as_str() && !is_list && !others.contains(&kind.0) {
        let message = format!("unknown kind {}", quoted(kind.0));
        let near = nearest(kind.0, others.iter().copied().chain([own.as_str()]));
        let help = format!("did you mean `{}`?", near.unwrap_or(own.as_str()));
        decoder.say(Code::UnknownKind, kind.1, &path.field("kind"), message, help);
        return Role::None;
    }
    if !versions.contains(&version.0) {
        let message = format!("unknown version {} of `{}`", quoted(version.0), own.as_str());
        let help = format!("versions that are read: {}", list(versions));
        decoder.say(Code::UnknownVersion, version.1, &path.field("apiVersion"), message, help);
        return Role::None;
    }
    match kind.0 {
        _ if is_list => Role::List,
        other if other == own.as_str() => Role::Policy(own),
        _ => skip(decoder, path, kind),
    }
}

/// Any other group: skipped, unless it is one of our kinds under a wrong name.
fn foreign(decoder: &mut Decoder<'_>, path: &FieldPath<'_>, api_version: Located<'_>, kind: Located<'_>) -> Role {
    let is_meant = |ours: &Kind| ours.as_str().eq_ignore_ascii_case(kind.0);
    let Some(ours) = [Kind::ServiceEntry, Kind::EgressPolicy].into_iter().find(is_meant) else {
        return skip(decoder, path, kind);
    };
    let message = format!("`{}` is not a kind of {}", ours.as_str(), quoted(api_version.0));
    let help = format!("write `{}`", ours.api_version());
    decoder.say(Code::UnknownKind, api_version.1, &path.field("apiVersion"), message, help);
    Role::None
}

fn skip(decoder: &mut Decoder<'_>, path: &FieldPath<'_>, kind: Located<'_>) -> Role {
    let message = format!("{} carries no egress rules and is skipped", quoted(kind.0));
    decoder.say(Code::Skipped, kind.1, &path.field("kind"), message, "");
    Role::None
}

/// What `metadata` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// Namespace and name.
    pub object: ObjectName,
    /// `metadata.labels`.
    pub labels: BTreeMap<String, String>,
    /// Where the name stands.
    pub name_span: Span,
}

/// Reads `metadata`.
pub fn metadata(
    decoder: &mut Decoder<'_>,
    kind: Kind,
    node: Option<&Node<'_>>,
    at: Span,
    path: &FieldPath<'_>,
) -> Option<Metadata> {
    let Some(node) = node else {
        decoder.missing(Code::BadName, at, path, "write `metadata:` and below it `name: …`");
        return None;
    };
    let fields = decoder.fields(node, path, &METADATA, Dialect::Kubernetes)?;
    let namespace = match fields.get("namespace") {
        Some(node) => namespace(decoder, node, &path.field("namespace")),
        None => Some("default"),
    };
    let labels = match fields.get("labels") {
        Some(node) => decoder.text_map(node, &path.field("labels")),
        None => Some(BTreeMap::new()),
    };
    if let Some(node) = fields.get("annotations") {
        decoder.text_map(node, &path.field("annotations"));
    }
    let name = fields.get("name");
    if name.is_none() {
        decoder.missing(Code::BadName, node.span, &path.field("name"), "verdicts and logs name a rule by it");
    }
    let name_span = name?.span;
    let name = object_name(decoder, name?, &path.field("name"));
    let (namespace, name) = (Arc::from(namespace?), Arc::from(name?));
    Some(Metadata { object: ObjectName { kind, namespace, name }, labels: labels?, name_span })
}

fn namespace<'n>(decoder: &mut Decoder<'_>, node: &'n Node<'n>, path: &FieldPath<'_>) -> Option<&'n str> {
    let text = decoder.text(node, path)?;
    if is_namespace(text) {
        return Some(text);
    }
    let message = format!("{} is not a namespace", quoted(text));
    let help = "namespaces are at most 63 lower case letters, digits and inner `-`";
    decoder.say(Code::BadNamespace, node.span, path, message, help);
    None
}

fn object_name<'n>(decoder: &mut Decoder<'_>, node: &'n Node<'n>, path: &FieldPath<'_>) -> Option<&'n str> {
    let text = decoder.text(node, path)?;
    if is_object_name(text) {
        return Some(text);
    }
    let message = format!("{} is not a name", quoted(text));
    let help = "names are at most 253 lower case letters, digits, `-` and `.`, with a letter or digit at both ends";
    decoder.say(Code::BadName, node.span, path, message, help);
    None
}
