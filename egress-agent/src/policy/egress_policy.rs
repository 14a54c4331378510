//! `EgressPolicy`: the whole schema, every field validated.
//!
//! It is our own language, so it is read strictly: `null` is an error, words are spelled one way, and a list that
//! could mean everything or nothing is refused.

use super::{
    DnsQueries, DnsServers, EgressPolicy, Kind, Mode, NamespaceRef, Reach, ServiceRef, SocketProtocol,
    address::address,
    code::Code,
    decode::{Decoder, Dialect, Fields},
    diagnostic::quoted,
    names::{is_namespace, is_object_name},
    object::metadata,
    path::FieldPath,
    schema::egress_policy::{
        ACTIONS, DNS, EXISTING, MODES, OBJECT, QUERIES, REFUSALS, SERVER_SETS, SOCKETS, SPEC, TOGGLES,
    },
    suggest::choice,
    yaml::{Node, Value},
};

mod peers;
mod ports;
mod rules;
mod selectors;

/// Reads an object; `None` if anything is wrong with it.
pub fn decode(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<EgressPolicy> {
    let errors = decoder.errors();
    let object = decoder.fields(node, path, &OBJECT, Dialect::Kubernetes)?;
    let at = path.field("metadata");
    let metadata = metadata(decoder, Kind::EgressPolicy, object.get("metadata"), node.span, &at);
    let required = (Code::MissingField, "what the policy says stands in `spec`");
    let spec = decoder.required(&object, "spec", node.span, path, required)?;
    let path = path.field("spec");
    let fields = decoder.fields(spec, &path, &SPEC, Dialect::Strict)?;
    let mut reader = Reader { decoder, fields: &fields, path: &path };
    let (dns_servers, dns_queries) = reader.dns();
    let policy = EgressPolicy {
        workloads: reader.with("workloads", selectors::decode),
        mode: reader.word("mode", &MODES).unwrap_or(Mode::Enforce),
        services: reader.with("services", services),
        allow: reader.with("allow", |d, n, p| rules::decode(d, n, p, rules::Effect::Allow)).unwrap_or_default(),
        deny: reader.with("deny", |d, n, p| rules::decode(d, n, p, rules::Effect::Deny)).unwrap_or_default(),
        default_action: reader.word("defaultAction", &ACTIONS),
        loopback: reader.word("loopback", &TOGGLES),
        dns_servers,
        dns_queries,
        replies: reader.word("replies", &ACTIONS),
        protocols: reader.with("protocols", socket_protocols),
        existing: reader.word("existing", &EXISTING),
        refuse_with: reader.word("refuseWith", &REFUSALS),
        at: reader.decoder.position(node.span),
        reach: Reach::Anything,
        object: metadata?.object,
    };
    (decoder.errors() == errors).then_some(policy)
}

struct Reader<'d, 'f, 'n> {
    decoder: &'d mut Decoder<'f>,
    fields: &'d Fields<'n>,
    path: &'d FieldPath<'d>,
}

impl Reader<'_, '_, '_> {
    fn with<T>(
        &mut self,
        name: &str,
        decode: impl FnOnce(&mut Decoder<'_>, &Node<'_>, &FieldPath<'_>) -> Option<T>,
    ) -> Option<T> {
        decode(self.decoder, self.fields.get(name)?, &self.path.field(name))
    }

    fn word<T: Copy>(&mut self, name: &str, known: &[(&'static str, T)]) -> Option<T> {
        self.with(name, |decoder, node, path| decoder.keyword(node, path, Code::UnknownValue, known))
    }

    fn dns(&mut self) -> (Option<DnsServers>, Option<DnsQueries>) {
        let Some(node) = self.fields.get("dns") else { return (None, None) };
        let path = self.path.field("dns");
        let Some(fields) = self.decoder.fields(node, &path, &DNS, Dialect::Strict) else {
            return (None, None);
        };
        let mut reader = Reader { decoder: self.decoder, fields: &fields, path: &path };
        (reader.with("servers", dns_servers), reader.word("queries", &QUERIES))
    }
}

fn dns_servers(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<DnsServers> {
    let code = Code::BadDnsServers;
    let Value::Sequence(items) = &node.value else {
        let text = decoder.text(node, path)?;
        return match text {
            "System" => Some(DnsServers::System),
            "None" => Some(DnsServers::None),
            _ => {
                let help = match address(text) {
                    Ok(_) => format!("write a list: `servers: [{text}]`"),
                    Err(_) => format!("{}, or a list of IP addresses", choice(text, &SERVER_SETS)),
                };
                decoder.say(code, node.span, path, format!("{} is not a value of this field", quoted(text)), help);
                None
            }
        };
    };
    if items.is_empty() {
        decoder.say(code, node.span, path, "an empty list of servers", "write `None`, or the addresses of servers");
    }
    let mut servers = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        match address(text) {
            Ok(server) => servers.push(server),
            Err(bad) => decoder.say(code, item.span, &path, bad.message, "servers are IP addresses; their port is 53"),
        }
    }
    Some(DnsServers::List(servers))
}

fn services(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Vec<ServiceRef>> {
    let mut services = Vec::new();
    for (index, item) in decoder.items(node, path)?.iter().enumerate() {
        let path = path.item(index);
        let Some(text) = decoder.text(item, &path) else { continue };
        match service_ref(text) {
            Ok((namespace, name)) => services.push(ServiceRef { namespace, name, at: decoder.position(item.span) }),
            Err(help) => {
                let message = format!("{} does not name a service", quoted(text));
                decoder.say(Code::BadServiceRef, item.span, &path, message, help);
            }
        }
    }
    Some(services)
}

/// `namespace/name`, where `.` is the own namespace, and `*` every name or, before `*`, every namespace.
fn service_ref(text: &str) -> Result<(NamespaceRef, Option<String>), &'static str> {
    let Some((namespace, name)) = text.split_once('/') else {
        return Err("write `./name` for a ServiceEntry of the workload's own namespace, `namespace/name` for another");
    };
    let name = match name {
        "*" => None,
        _ if is_object_name(name) => Some(name.to_owned()),
        _ => return Err("behind the slash stands the name of a ServiceEntry, or `*`"),
    };
    let namespace = match namespace {
        "." => NamespaceRef::Own,
        "*" if name.is_none() => NamespaceRef::Any,
        "*" => return Err("every namespace goes only with every name: `*/*`"),
        _ if is_namespace(namespace) => NamespaceRef::Named(namespace.to_owned()),
        _ => return Err("before the slash stands a namespace, or `.` for the workload's own"),
    };
    Ok((namespace, name))
}

fn socket_protocols(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Vec<SocketProtocol>> {
    let mut protocols = Vec::new();
    for (index, item) in decoder.items(node, path)?.iter().enumerate() {
        let path = path.item(index);
        let Some(protocol) = decoder.keyword(item, &path, Code::BadSocketProtocol, &SOCKETS) else { continue };
        if protocols.contains(&protocol) {
            decoder.say(Code::BadSocketProtocol, item.span, &path, "the protocol is listed twice", "delete one");
        }
        protocols.push(protocol);
    }
    Some(protocols)
}
