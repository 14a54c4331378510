//! `ServiceEntry`, read as Istio reads it and refused for the reasons for which Istio's validation refuses it.
//!
//! The rules follow `ValidateServiceEntry` and the constraints of its CRD. Limits on the number of items
//! are the API server's, not Istio's, and only noted.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::{
    ExportTo, HostPattern, Kind, Location, Resolution, ServiceEntry,
    address::{self, network},
    code::Code,
    decode::{Decoder, Dialect, Fields},
    diagnostic::quoted,
    names::host_pattern,
    object::{Metadata, metadata},
    path::FieldPath,
    schema::service_entry::{LOCATIONS, OBJECT, RESOLUTIONS, SPEC, WORKLOAD_SELECTOR},
    yaml::{Node, ScalarKind, Span, Value},
};

mod endpoints;
mod export;
mod ports;
mod rules;

pub(in crate::policy) use ports::Family;
use ports::Port;

/// Reads an object; `None` if anything is wrong with it.
pub fn decode(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<ServiceEntry> {
    let errors = decoder.errors();
    let object = decoder.fields(node, path, &OBJECT, Dialect::Kubernetes)?;
    let at = path.field("metadata");
    let metadata = metadata(decoder, Kind::ServiceEntry, object.get("metadata"), node.span, &at);
    let required = (Code::MissingField, "hosts and ports stand in `spec`");
    let spec = decoder.required(&object, "spec", node.span, path, required);
    let entry = spec.and_then(|spec| spec_of(decoder, spec, metadata.as_ref(), &path.field("spec")));
    let mut entry = ServiceEntry { object: metadata?.object, at: decoder.position(node.span), ..entry? };
    if let Some(status) = object.get("status") {
        entry.addresses.extend(status_addresses(status));
    }
    (decoder.errors() == errors).then_some(entry)
}

/// What is known of `spec` while its rules are checked.
struct Spec<'n> {
    fields: Fields<'n>,
    span: Span,
    hosts: Vec<Host<'n>>,
    addresses: Addresses,
    ports: Vec<Port>,
    location: Location,
    /// `None` when it could not be read, so that no rule about it is checked.
    resolution: Option<Resolution>,
    /// Endpoints as the document lists them.
    endpoint_nodes: &'n [Node<'n>],
    selector: Option<BTreeMap<String, String>>,
}

struct Host<'n> {
    text: &'n str,
    pattern: HostPattern,
    span: Span,
}

#[derive(Default)]
struct Addresses {
    nets: Vec<IpNet>,
    /// The first that is written as a prefix.
    first_cidr: Option<Span>,
}

fn spec_of<'n>(
    decoder: &mut Decoder<'_>,
    node: &'n Node<'n>,
    metadata: Option<&Metadata>,
    path: &FieldPath<'_>,
) -> Option<ServiceEntry> {
    let fields = decoder.fields(node, path, &SPEC, Dialect::Proto)?;
    let namespace = metadata.map_or("default", |metadata| &*metadata.object.namespace);
    let export_to =
        fields.get("exportTo").map(|node| export::decode(decoder, node, namespace, &path.field("exportTo")));
    let subject_alt_names = match fields.get("subjectAltNames") {
        Some(node) => texts(decoder, node, &path.field("subjectAltNames")),
        None => Vec::new(),
    };
    let resolution = match fields.get("resolution") {
        Some(node) => proto_enum(decoder, node, &path.field("resolution"), &RESOLUTIONS),
        None => Some(Resolution::None),
    };
    let location = match fields.get("location") {
        Some(node) => proto_enum(decoder, node, &path.field("location"), &LOCATIONS),
        None => Some(Location::MeshExternal),
    };
    let endpoint_nodes = fields.get("endpoints").and_then(|node| decoder.items(node, &path.field("endpoints")));
    let spec = Spec {
        span: node.span,
        hosts: hosts(decoder, &fields, node.span, path),
        addresses: addresses(decoder, &fields, path),
        ports: ports::decode(decoder, fields.get("ports"), &path.field("ports")),
        location: location.unwrap_or(Location::MeshExternal),
        resolution,
        endpoint_nodes: endpoint_nodes.unwrap_or_default(),
        selector: fields
            .get("workloadSelector")
            .and_then(|node| selector(decoder, node, &path.field("workloadSelector"))),
        fields,
    };
    rules::check(decoder, &spec, metadata, path);
    let endpoints = endpoints::decode(decoder, &spec, &path.field("endpoints"));
    Some(ServiceEntry {
        object: metadata?.object.clone(),
        at: decoder.position(node.span),
        hosts: spec.hosts.into_iter().map(|host| host.pattern).collect(),
        addresses: spec.addresses.nets,
        ports: spec.ports.into_iter().map(|port| port.service).collect(),
        location: spec.location,
        resolution: resolution?,
        endpoints,
        workload_selector: spec.selector,
        export_to: export_to.unwrap_or(Some(ExportTo::All))?,
        subject_alt_names,
    })
}

fn hosts<'n>(decoder: &mut Decoder<'_>, fields: &Fields<'n>, at: Span, path: &FieldPath<'_>) -> Vec<Host<'n>> {
    let path = path.field("hosts");
    let Some(node) = fields.get("hosts") else {
        decoder.missing(Code::NoHosts, at, &path, "name the service, as `hosts: [db.example.com]`");
        return Vec::new();
    };
    let Some(items) = decoder.items(node, &path) else { return Vec::new() };
    if items.is_empty() {
        decoder.say(
            Code::NoHosts,
            node.span,
            &path,
            "there is no host",
            "name the service, as `hosts: [db.example.com]`",
        );
    }
    let mut hosts = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        match host_pattern(text) {
            Ok(pattern) => hosts.push(Host { text, pattern, span: item.span }),
            Err(bad) if text.parse::<std::net::IpAddr>().is_ok() => {
                let help = "write it in `addresses`, and any name for the service in `hosts`";
                decoder.say(Code::BadHost, item.span, &path, bad.message, help);
            }
            Err(bad) => decoder.say(Code::BadHost, item.span, &path, bad.message, bad.help),
        }
    }
    hosts
}

fn addresses(decoder: &mut Decoder<'_>, fields: &Fields<'_>, path: &FieldPath<'_>) -> Addresses {
    let path = path.field("addresses");
    let items = fields.get("addresses").and_then(|node| decoder.items(node, &path)).unwrap_or_default();
    let mut addresses = Addresses { nets: Vec::with_capacity(items.len()), first_cidr: None };
    for (index, item) in items.iter().enumerate() {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        match network(text) {
            Ok(read) => {
                if text.contains('/') {
                    addresses.first_cidr = addresses.first_cidr.or(Some(item.span));
                }
                warn_of_host_bits(decoder, text, read, item.span, &path);
                addresses.nets.push(read.net);
            }
            Err(bad) => decoder.say(Code::BadAddress, item.span, &path, bad.message, bad.help),
        }
    }
    addresses
}

/// `10.0.0.5/8` is sixteen million addresses, and was perhaps meant to be one.
pub(super) fn warn_of_host_bits(
    decoder: &mut Decoder<'_>,
    text: &str,
    read: address::Network,
    span: Span,
    path: &FieldPath<'_>,
) {
    if read.had_host_bits {
        let address = text.split('/').next().unwrap_or(text);
        let message = format!("{} has host bits and means `{}`", quoted(text), read.net);
        let help = format!("write `{}`, or `{address}` for the one address", read.net);
        decoder.say(Code::HostBits, span, path, message, help);
    }
}

/// Addresses that Istio allocated. What is not an address Istio does not use either.
fn status_addresses(status: &Node<'_>) -> Vec<IpNet> {
    let Some(Value::Sequence(items)) = status.get("addresses").map(|node| &node.value) else { return Vec::new() };
    let read = |item: &Node<'_>| match &item.get("value")?.value {
        Value::Scalar(scalar) => address::address(&scalar.text).ok().map(IpNet::from),
        _ => None,
    };
    items.iter().filter_map(read).collect()
}

/// `workloadSelector`, which holds labels and nothing else.
fn selector(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<BTreeMap<String, String>> {
    let fields = decoder.fields(node, path, &WORKLOAD_SELECTOR, Dialect::Proto)?;
    let path = path.field("labels");
    let Some(node) = fields.get("labels") else { return Some(BTreeMap::new()) };
    let labels = decoder.text_map(node, &path)?;
    for (key, value) in &labels {
        let (path, help) = (path.key(key), "labels are compared literally");
        if key.is_empty() {
            decoder.say(Code::BadWorkloadSelector, node.span, &path, "a label without a key", help);
        }
        if key.contains('*') || value.contains('*') {
            let message = format!("{} is a wildcard", quoted(&format!("{key}: {value}")));
            decoder.say(Code::BadWorkloadSelector, node.span, &path, message, help);
        }
    }
    Some(labels)
}

fn texts(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Vec<String> {
    let items = decoder.items(node, path).unwrap_or_default();
    let text = |(index, item)| decoder.text(item, &path.item(index)).map(str::to_owned);
    items.iter().enumerate().filter_map(text).collect()
}

/// Protocol buffers take the name of an enum's value, or its number.
fn proto_enum<T: Copy>(
    decoder: &mut Decoder<'_>,
    node: &Node<'_>,
    path: &FieldPath<'_>,
    known: &[(&'static str, T)],
) -> Option<T> {
    if let Value::Scalar(scalar) = &node.value
        && scalar.kind() == ScalarKind::Integer
        && let Some((_, value)) = scalar.text.parse().ok().and_then(|number: usize| known.get(number))
    {
        return Some(*value);
    }
    decoder.keyword(node, path, Code::UnknownServiceEnum, known)
}
