//! `ports`: what clients dial.

use std::collections::HashMap;

use super::{Code, Decoder, Dialect, FieldPath, Node, Span, quoted};
use crate::policy::{
    L4, ServicePort,
    names::is_dns_label,
    schema::{
        service_entry::{PROTOCOLS, SERVICE_PORT},
        words,
    },
    suggest::choice,
};

/// What Istio can do with a protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::policy) enum Family {
    /// Requests name their host.
    Http,
    /// The client's greeting names the host.
    Tls,
    /// Nothing names the host.
    Tcp,
    /// Datagrams.
    Udp,
}

/// A port with what the rules of its entry ask about it.
pub(super) struct Port {
    pub service: ServicePort,
    /// `None` when the document names no protocol.
    pub family: Option<Family>,
    /// The protocol is absent, or `TCP` in upper case: Istio's rule about addresses looks no further.
    pub is_plain_tcp: bool,
    pub span: Span,
}

/// Reads the list; ports that are wrong are reported and left out.
pub(super) fn decode(decoder: &mut Decoder<'_>, node: Option<&Node<'_>>, path: &FieldPath<'_>) -> Vec<Port> {
    let items = node.and_then(|node| decoder.items(node, path)).unwrap_or_default();
    let (mut names, mut numbers) = (HashMap::new(), HashMap::new());
    let mut ports = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = path.item(index);
        let Some((port, number_span, name_span)) = port(decoder, item, &path) else { continue };
        if let Some(line) = numbers.insert(port.service.number, item.span.line) {
            let message = format!("port {} is listed already, on line {line}", port.service.number);
            let help = "one port number stands for one protocol: delete one of the two";
            decoder.say(Code::DuplicatePortNumber, number_span, &path.field("number"), message, help);
        }
        if let Some(line) = names.insert(port.service.name.clone(), item.span.line) {
            let message = format!("the name {} is taken, on line {line}", quoted(&port.service.name));
            let help = "endpoints refer to ports by name: give each its own";
            decoder.say(Code::BadPortName, name_span, &path.field("name"), message, help);
        }
        ports.push(port);
    }
    ports
}

fn port(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<(Port, Span, Span)> {
    let fields = decoder.fields(node, path, &SERVICE_PORT, Dialect::Proto)?;
    let required = (Code::BadPortNumber, "write the port that clients dial");
    let number_node = decoder.required(&fields, "number", node.span, path, required);
    let number =
        number_node.and_then(|node| decoder.port(node, &path.field("number"), Code::BadPortNumber, Dialect::Proto));
    let required = (Code::BadPortName, "every port has a name, as `tcp-mysql`");
    let name_node = decoder.required(&fields, "name", node.span, path, required);
    let name = name_node.and_then(|node| name(decoder, node, &path.field("name")));
    let target = fields.get("targetPort");
    let target = target.map(|node| decoder.port(node, &path.field("targetPort"), Code::BadTargetPort, Dialect::Proto));
    let protocol = match fields.get("protocol") {
        Some(node) => protocol(decoder, node, &path.field("protocol"))?,
        None => Protocol::ABSENT,
    };
    let service = ServicePort {
        name: name?.to_owned(),
        number: number?,
        l4: if protocol.family == Some(Family::Udp) { L4::Udp } else { L4::Tcp },
        app_protocol: protocol.name,
        target_port: target.map_or(Some(None), |port| port.map(Some))?,
        at: decoder.position(node.span),
    };
    let Protocol { family, is_plain_tcp, .. } = protocol;
    let port = Port { service, family, is_plain_tcp, span: node.span };
    Some((port, number_node?.span, name_node?.span))
}

fn name<'n>(decoder: &mut Decoder<'_>, node: &'n Node<'n>, path: &FieldPath<'_>) -> Option<&'n str> {
    let text = decoder.text(node, path)?;
    if is_dns_label(text) {
        return Some(text);
    }
    let message = format!("{} is not the name of a port", quoted(text));
    let help = "port names are at most 63 letters, digits and inner `-`";
    decoder.say(Code::BadPortName, node.span, path, message, help);
    None
}

struct Protocol {
    name: Option<&'static str>,
    family: Option<Family>,
    is_plain_tcp: bool,
}

impl Protocol {
    const ABSENT: Self = Self { name: None, family: None, is_plain_tcp: true };
}

fn protocol(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Protocol> {
    let text = decoder.text(node, path)?;
    if text.is_empty() {
        return Some(Protocol::ABSENT);
    }
    let found = PROTOCOLS.iter().find(|(word, _)| word.eq_ignore_ascii_case(text));
    let Some(&(_, (name, family))) = found else {
        let message = format!("unknown protocol {}", quoted(text));
        decoder.say(Code::UnknownProtocol, node.span, path, message, choice(text, &words(&PROTOCOLS)));
        return None;
    };
    Some(Protocol { name: Some(name), family: Some(family), is_plain_tcp: text == "TCP" })
}
