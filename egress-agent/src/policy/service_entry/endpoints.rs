//! `endpoints`: where the service is served.

use std::{
    collections::{BTreeMap, HashSet},
    net::IpAddr,
};

use super::{Code, Decoder, Dialect, FieldPath, Fields, Node, Resolution, Spec, quoted};
use crate::policy::{
    Endpoint, EndpointAddress,
    address::address,
    decode::is_null,
    names::{fqdn, is_label_key, is_label_value},
    schema::service_entry::ENDPOINT,
};

/// What an endpoint on this host begins with.
const UNIX: &str = "unix://";

/// Reads the list, for the resolutions that have endpoints at all.
pub(super) fn decode(decoder: &mut Decoder<'_>, spec: &Spec<'_>, path: &FieldPath<'_>) -> Vec<Endpoint> {
    let resolution = match spec.resolution {
        None | Some(Resolution::None | Resolution::DynamicDns) => return Vec::new(),
        Some(resolution) => resolution,
    };
    let reader = Reader { resolution, spec, names: spec.ports.iter().map(|port| &*port.service.name).collect() };
    let items = spec.endpoint_nodes.iter().enumerate();
    items.filter_map(|(index, item)| reader.endpoint(decoder, item, &path.item(index))).collect()
}

struct Reader<'s> {
    resolution: Resolution,
    spec: &'s Spec<'s>,
    /// Names of the service's ports.
    names: HashSet<&'s str>,
}

impl Reader<'_> {
    fn endpoint(&self, decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Endpoint> {
        let fields = decoder.fields(node, path, &ENDPOINT, Dialect::Proto)?;
        let address = self.address(decoder, node, &fields, path);
        let ports = match fields.get("ports") {
            Some(node) => self.ports(decoder, node, &path.field("ports")),
            None => BTreeMap::new(),
        };
        if let (Some(EndpointAddress::Unix(_)), Some(key)) =
            (&address, fields.key("ports").filter(|_| !ports.is_empty()))
        {
            let message = "an endpoint that is a socket file has no ports";
            decoder.say(Code::BadUnixEndpoint, key, &path.field("ports"), message, "delete `ports`");
        }
        let labels = match fields.get("labels") {
            Some(node) => labels(decoder, node, &path.field("labels")),
            None => Some(BTreeMap::new()),
        };
        carried(decoder, &fields, path);
        Some(Endpoint { address: address?, ports, labels: labels?, at: decoder.position(node.span) })
    }

    fn address(
        &self,
        decoder: &mut Decoder<'_>,
        node: &Node<'_>,
        fields: &Fields<'_>,
        path: &FieldPath<'_>,
    ) -> Option<EndpointAddress> {
        let path = path.field("address");
        let text = match fields.get("address") {
            Some(node) => decoder.text(node, &path)?,
            None => "",
        };
        let span = fields.get("address").map_or(node.span, |node| node.span);
        if text.is_empty() {
            return self.gateway(decoder, node, fields, &path);
        }
        if let Some(socket) = text.strip_prefix(UNIX) {
            return self.unix(decoder, socket, span, &path);
        }
        if let Ok(address) = address(text) {
            return Some(EndpointAddress::Ip(address));
        }
        match fqdn(text) {
            Ok(name) if self.resolution != Resolution::Static => Some(EndpointAddress::Host(name)),
            Ok(_) => {
                let message = format!("{} is not an IP address, and resolution STATIC looks nothing up", quoted(text));
                let help = "write an IP address, or `resolution: DNS`";
                decoder.say(Code::StaticEndpointHost, span, &path, message, help);
                None
            }
            Err(bad) => {
                let zone = text.split_once('%').is_some_and(|(address, _)| address.parse::<IpAddr>().is_ok());
                let help = if zone { "write the address without a zone".to_owned() } else { bad.help };
                let message = format!("{} is neither an IP address nor a host name", quoted(text));
                decoder.say(Code::BadEndpointAddress, span, &path, message, help);
                None
            }
        }
    }

    /// Without an address, an endpoint is somewhere behind the gateway of its network.
    fn gateway(
        &self,
        decoder: &mut Decoder<'_>,
        node: &Node<'_>,
        fields: &Fields<'_>,
        path: &FieldPath<'_>,
    ) -> Option<EndpointAddress> {
        let has_network = fields.get("network").is_some_and(|node| !is_null(node) && !is_empty(node));
        if !has_network || self.resolution != Resolution::Static {
            let help = "write the IP address or, with `resolution: DNS`, the host name of the endpoint";
            decoder.missing(Code::BadEndpointAddress, node.span, path, help);
            return None;
        }
        let message = "an endpoint without an address opens nothing: the gateway of its network is not named here";
        let help = "write its address, or allow the gateway's address in a policy";
        decoder.say(Code::EndpointWithoutAddress, node.span, path, message, help);
        Some(EndpointAddress::Gateway)
    }

    fn unix(
        &self,
        decoder: &mut Decoder<'_>,
        socket: &str,
        span: super::Span,
        path: &FieldPath<'_>,
    ) -> Option<EndpointAddress> {
        let mut say = |message: String, help: &str| decoder.say(Code::BadUnixEndpoint, span, path, message, help);
        if self.resolution != Resolution::Static {
            say("a socket file cannot be looked up".to_owned(), "write `resolution: STATIC`");
            return None;
        }
        let is_file = socket.starts_with('/') && !socket.ends_with('/');
        if !is_file && !socket.starts_with('@') {
            let message = format!("{} is not the absolute path of a file", quoted(socket));
            say(message, "write `unix:///path/to/socket`, or `unix://@name` for an abstract socket");
            return None;
        }
        if self.spec.ports.len() != 1 && self.names.len() != 1 {
            let message = format!("a socket file serves exactly one port, and the entry has {}", self.spec.ports.len());
            say(message, "write one entry for each port");
            return None;
        }
        Some(EndpointAddress::Unix(socket.to_owned()))
    }

    fn ports(&self, decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> BTreeMap<String, u16> {
        let mut ports = BTreeMap::new();
        for entry in decoder.mapping(node, path).unwrap_or_default() {
            let (name, path) = (&*entry.key, path.key(&entry.key));
            if !self.names.contains(name) {
                let message = format!("the entry has no port named {}", quoted(name));
                let known: Vec<&str> = self.spec.ports.iter().map(|port| &*port.service.name).take(8).collect();
                let help = match known.as_slice() {
                    [] => "list the port in `spec.ports` first".to_owned(),
                    known => crate::policy::suggest::choice(name, known),
                };
                decoder.say(Code::BadEndpointPort, entry.key_span, &path, message, help);
            }
            if let Some(port) = decoder.port(&entry.value, &path, Code::BadEndpointPort, Dialect::Proto) {
                ports.insert(name.to_owned(), port);
            }
        }
        ports
    }
}

fn is_empty(node: &Node<'_>) -> bool {
    matches!(&node.value, crate::policy::yaml::Value::Scalar(scalar) if scalar.text.is_empty())
}

fn labels(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<BTreeMap<String, String>> {
    let labels = decoder.text_map(node, path)?;
    for (key, value) in &labels {
        if !is_label_key(key) || !is_label_value(value) {
            let message = format!("{} is not a label", quoted(&format!("{key}: {value}")));
            let help =
                "keys and values are at most 63 letters, digits, `-`, `_` and `.`; keys may have a DNS prefix and `/`";
            decoder.say(Code::BadEndpointLabel, node.span, &path.key(key), message, help);
        }
    }
    Some(labels)
}

/// Fields that change nothing at layer 4: only their types are checked.
fn carried(decoder: &mut Decoder<'_>, fields: &Fields<'_>, path: &FieldPath<'_>) {
    for name in ["network", "locality", "serviceAccount"] {
        if let Some(node) = fields.get(name) {
            decoder.text(node, &path.field(name));
        }
    }
    let Some(node) = fields.get("weight") else { return };
    let path = path.field("weight");
    if decoder.integer(node, &path, Dialect::Proto).is_some_and(|weight| u32::try_from(weight).is_err()) {
        let message = "the weight is out of range";
        decoder.say(Code::WrongType, node.span, &path, message, "weights are 0 to 4294967295");
    }
}
