//! Rules about several fields of an entry at once.

use super::{Code, Decoder, FieldPath, HostPattern, Location, Metadata, Resolution, Spec, ports::Family, quoted};
use crate::policy::{
    names::fqdn,
    schema::service_entry::{ADDRESSES, ENDPOINTS, HOSTS, PORTS},
};

/// The label that opts an entry out of automatic addresses.
const AUTO_ALLOCATE: &str = "networking.istio.io/enable-autoallocate-ip";
/// The label that sends an entry through a waypoint.
const USE_WAYPOINT: &str = "istio.io/use-waypoint";

/// Checks every rule.
pub(super) fn check(decoder: &mut Decoder<'_>, spec: &Spec<'_>, metadata: Option<&Metadata>, path: &FieldPath<'_>) {
    hosts(decoder, spec, path);
    selector(decoder, spec, path);
    limits(decoder, spec, path);
    let Some(resolution) = spec.resolution else { return };
    match resolution {
        Resolution::None => none(decoder, spec, path),
        Resolution::Static => {}
        Resolution::Dns | Resolution::DnsRoundRobin => dns(decoder, spec, resolution, path),
        Resolution::DynamicDns => dynamic_dns(decoder, spec, metadata, path),
    }
    tcp_without_address(decoder, spec, resolution, metadata, path);
    indistinguishable_hosts(decoder, spec, resolution, path);
}

fn hosts(decoder: &mut Decoder<'_>, spec: &Spec<'_>, path: &FieldPath<'_>) {
    if spec.resolution == Some(Resolution::DynamicDns) {
        return;
    }
    let path = path.field("hosts");
    for (index, host) in spec.hosts.iter().enumerate() {
        if let HostPattern::Ending(end) = &host.pattern {
            let message = format!("{} is a wildcard that is only part of a label", quoted(host.text));
            let help = format!("write `*.{}`, and `{0}` if the name itself is meant too", end.trim_start_matches('-'));
            decoder.say(Code::PartialWildcard, host.span, &path.item(index), message, help);
        }
    }
}

fn selector(decoder: &mut Decoder<'_>, spec: &Spec<'_>, path: &FieldPath<'_>) {
    let (Some(span), Some(labels)) = (spec.fields.key("workloadSelector"), &spec.selector) else { return };
    let path = path.field("workloadSelector");
    if !spec.endpoint_nodes.is_empty() {
        let message = "an entry has `endpoints` or a `workloadSelector`, not both";
        decoder.say(Code::EndpointsAndSelector, span, &path, message, "delete one of the two");
    }
    if labels.is_empty() {
        let message = "a `workloadSelector` without labels selects every workload of the namespace";
        decoder.say(Code::EmptyWorkloadSelector, span, &path, message, "name labels, or delete it");
    }
    if spec.resolution == Some(Resolution::None) {
        let message = "with resolution NONE the `workloadSelector` is not looked at";
        decoder.say(Code::SelectorWithNone, span, &path, message, "write `resolution: STATIC`, or delete the selector");
    }
    let message = "the selected workloads are known to the Kubernetes API only; files open nothing for them";
    decoder.say(Code::SelectorNeedsApi, span, &path, message, "list `endpoints` to open addresses from files");
}

/// What the API server's schema caps.
fn limits(decoder: &mut Decoder<'_>, spec: &Spec<'_>, path: &FieldPath<'_>) {
    for (name, count, list) in [
        ("hosts", spec.hosts.len(), &HOSTS),
        ("addresses", spec.addresses.nets.len(), &ADDRESSES),
        ("ports", spec.ports.len(), &PORTS),
        ("endpoints", spec.endpoint_nodes.len(), &ENDPOINTS),
    ] {
        let most = list.api_limit;
        if let Some(span) = spec.fields.key(name).filter(|_| count > most as usize) {
            let message = format!("the Kubernetes API server accepts at most {most} {name}, and these are {count}");
            decoder.say(
                Code::BeyondApiLimit,
                span,
                &path.field(name),
                message,
                "fine in files; split it for Kubernetes",
            );
        }
    }
}

fn none(decoder: &mut Decoder<'_>, spec: &Spec<'_>, path: &FieldPath<'_>) {
    if let Some(span) = spec.fields.key("endpoints").filter(|_| !spec.endpoint_nodes.is_empty()) {
        let message = "with resolution NONE an entry has no endpoints: connections go where the client dials";
        let help = "write `resolution: STATIC` for addresses or `resolution: DNS` for names, or delete `endpoints`";
        decoder.say(Code::EndpointsWithNone, span, &path.field("endpoints"), message, help);
    }
}

fn dns(decoder: &mut Decoder<'_>, spec: &Spec<'_>, resolution: Resolution, path: &FieldPath<'_>) {
    no_cidr(decoder, spec, path);
    if spec.endpoint_nodes.is_empty() {
        let path = path.field("hosts");
        for (index, host) in spec.hosts.iter().enumerate() {
            if fqdn(host.text).is_err() {
                let message = format!("{} would have to be looked up, and is not one name", quoted(host.text));
                let help = "name the hosts one by one, list `endpoints`, or write `resolution: NONE`";
                decoder.say(Code::DnsNeedsFullHost, host.span, &path.item(index), message, help);
            }
        }
    }
    if let [_, second, ..] = spec.endpoint_nodes
        && resolution == Resolution::DnsRoundRobin
    {
        let message = "DNS_ROUND_ROBIN has at most one endpoint";
        let help = "write `resolution: DNS`, or one entry for each endpoint";
        decoder.say(Code::RoundRobinEndpoints, second.span, &path.field("endpoints").item(1), message, help);
    }
    let tcp = spec.ports.iter().any(|port| matches!(port.family, Some(Family::Tcp | Family::Tls)));
    if let Some(span) = spec.fields.key("addresses").filter(|_| tcp && spec.hosts.len() > 1)
        && !spec.addresses.nets.is_empty()
    {
        let message = "several hosts share these addresses and a TCP port, so they cannot be told apart";
        let help = "write one entry for each host";
        decoder.say(Code::HostsShareAddress, span, &path.field("addresses"), message, help);
    }
}

fn no_cidr(decoder: &mut Decoder<'_>, spec: &Spec<'_>, path: &FieldPath<'_>) {
    if let Some(span) = spec.addresses.first_cidr {
        let message = "a prefix cannot be looked up: CIDR addresses go with resolution NONE or STATIC";
        let help = "write `resolution: NONE`, or addresses without `/`";
        decoder.say(Code::CidrNeedsNoneOrStatic, span, &path.field("addresses"), message, help);
    }
}

fn dynamic_dns(decoder: &mut Decoder<'_>, spec: &Spec<'_>, metadata: Option<&Metadata>, path: &FieldPath<'_>) {
    let code = Code::BadDynamicDns;
    for (index, host) in spec.hosts.iter().enumerate() {
        if matches!(host.pattern, HostPattern::Exact(_)) {
            let message = format!("{} is not a wildcard, as DYNAMIC_DNS demands", quoted(host.text));
            let help = "write `resolution: DNS` for a full name";
            decoder.say(code, host.span, &path.field("hosts").item(index), message, help);
        }
    }
    for name in ["addresses", "endpoints"] {
        let is_empty = spec.fields.get(name).is_none_or(is_empty_list);
        if let Some(span) = spec.fields.key(name).filter(|_| !is_empty) {
            let message = format!("DYNAMIC_DNS takes the destination from each request and knows no {name}");
            decoder.say(code, span, &path.field(name), message, format!("delete `{name}`"));
        }
    }
    for (index, port) in spec.ports.iter().enumerate() {
        let name = port.service.app_protocol;
        if !matches!(name, Some("HTTP" | "HTTP2" | "GRPC" | "TLS")) {
            let message = format!("DYNAMIC_DNS cannot read a host name from {}", name.unwrap_or("an unnamed protocol"));
            let help = "its ports are HTTP, HTTP2, GRPC or TLS";
            decoder.say(code, port.span, &path.field("ports").item(index).field("protocol"), message, help);
        }
    }
    let waypoint = metadata.and_then(|metadata| metadata.labels.get(USE_WAYPOINT));
    let uses_waypoint = waypoint.is_some_and(|name| !name.is_empty() && !name.eq_ignore_ascii_case("none"));
    if spec.location == Location::MeshInternal && uses_waypoint {
        let span = spec.fields.key("location").unwrap_or(spec.span);
        let message = format!("DYNAMIC_DNS with MESH_INTERNAL does not go with the label `{USE_WAYPOINT}`");
        decoder.say(code, span, &path.field("location"), message, "write `location: MESH_EXTERNAL`");
    }
}

fn is_empty_list(node: &super::Node<'_>) -> bool {
    matches!(&node.value, crate::policy::yaml::Value::Sequence(items) if items.is_empty())
}

/// Istio allocates addresses itself unless the resolution is NONE or a label forbids it.
fn tcp_without_address(
    decoder: &mut Decoder<'_>,
    spec: &Spec<'_>,
    resolution: Resolution,
    metadata: Option<&Metadata>,
    path: &FieldPath<'_>,
) {
    let label = metadata.and_then(|metadata| metadata.labels.get(AUTO_ALLOCATE));
    let opted_out = label.is_some_and(|value| value.eq_ignore_ascii_case("false"));
    let allocates = resolution != Resolution::None && !opted_out;
    if allocates || !spec.addresses.nets.is_empty() {
        return;
    }
    for (index, port) in spec.ports.iter().enumerate().filter(|(_, port)| port.is_plain_tcp) {
        let message = "without `addresses`, only its number tells this TCP port from those of other services";
        let help = "list `addresses`; nothing is opened for a name that is not looked up";
        decoder.say(Code::TcpWithoutAddress, port.span, &path.field("ports").item(index), message, help);
    }
}

/// HTTP and TLS name the host they want; nothing else does.
fn indistinguishable_hosts(decoder: &mut Decoder<'_>, spec: &Spec<'_>, resolution: Resolution, path: &FieldPath<'_>) {
    if resolution == Resolution::None || spec.hosts.len() < 2 {
        return;
    }
    let cannot_tell = |port: &&super::Port| !matches!(port.family, Some(Family::Http | Family::Tls));
    if let Some(port) = spec.ports.iter().find(cannot_tell) {
        let name = port.service.app_protocol.unwrap_or("a port without protocol");
        let message = format!("the entry has {} hosts, and {name} cannot tell which is meant", spec.hosts.len());
        let help = "write one entry for each host, or `resolution: NONE`";
        decoder.say(Code::HostsIndistinguishable, port.span, &path.field("ports"), message, help);
    }
}
