//! Random documents and flows, biased towards the places where a compiler goes wrong: nested and neighbouring prefixes,
//! their first and last addresses and the ones just outside, touching port ranges, and the forms in which IPv6 carries
//! IPv4.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_agent::policy::{EndpointAddress, L4, PolicySet, ServiceEntry};
use ipnet::IpNet;
use proptest::{collection::vec, prelude::*, sample::select};
use serde_json::{Value, json};

use crate::reference::Question;

/// Prefixes that nest, touch and disguise themselves.
const PREFIXES: &[&str] = &[
    "0.0.0.0/0",
    "0.0.0.0/1",
    "128.0.0.0/1",
    "10.0.0.0/8",
    "10.0.0.0/9",
    "10.128.0.0/9",
    "10.1.0.0/16",
    "10.1.2.0/24",
    "10.1.2.0/25",
    "10.1.2.128/25",
    "10.1.2.3/32",
    "10.1.2.2/31",
    "11.0.0.0/8",
    "192.0.2.1/32",
    "192.0.2.77/24",
    "169.254.169.254/32",
    "255.255.255.254/32",
    "::/0",
    "::/1",
    "8000::/1",
    "2001:db8::/32",
    "2001:db8::/33",
    "2001:db8:8000::/33",
    "2001:db8::1/128",
    "2001:db8::/127",
    "2001:db8:1:2:3::9/64",
    "fe80::1/128",
    "::/95",
    "::/96",
    "::ffff:10.1.0.0/112",
    "::ffff:0:0/96",
    "64:ff9b::10.1.2.0/120",
    "64:ff9b::/96",
    "64:ff9b::/64",
    "::ffff:192.0.2.1/128",
    "fd00::/8",
];
const PORTS: &[u16] = &[1, 22, 53, 80, 443, 3306, 8000, 8001, 8100, 65_534, 65_535];
const NAMESPACES: &[&str] = &["default", "shop", "web"];

fn prefix() -> impl Strategy<Value = String> {
    prop_oneof![
        8 => select(PREFIXES).prop_map(str::to_owned),
        1 => (any::<u32>(), 0..=32_u8).prop_map(|(bits, len)| format!("{}/{len}", Ipv4Addr::from_bits(bits))),
        1 => (any::<u128>(), 0..=128_u8).prop_map(|(bits, len)| format!("{}/{len}", Ipv6Addr::from_bits(bits))),
    ]
}

fn host_address() -> impl Strategy<Value = String> {
    select(PREFIXES).prop_map(|text| text.parse::<IpNet>().expect("a prefix").addr().to_string())
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![6 => select(PORTS), 1 => 1..=u16::MAX]
}

fn distinct_ports() -> impl Strategy<Value = Vec<Value>> {
    vec((port(), select(&["TCP", "tcp", "UDP", "HTTP", "TLS", ""][..]), proptest::option::of(port())), 1..4).prop_map(
        |mut ports| {
            ports.sort_by_key(|(number, ..)| *number);
            ports.dedup_by_key(|(number, ..)| *number);
            let port = |(index, (number, protocol, target)): (usize, (u16, &str, Option<u16>))| {
                let mut port = json!({ "number": number, "name": format!("p{index}"), "protocol": protocol });
                if let Some(target) = target {
                    port["targetPort"] = json!(target);
                }
                port
            };
            ports.into_iter().enumerate().map(port).collect()
        },
    )
}

fn export_to() -> impl Strategy<Value = Option<Value>> {
    prop_oneof![
        4 => Just(None),
        1 => Just(Some(json!(["."]))),
        1 => Just(Some(json!(["*"]))),
        1 => Just(Some(json!(["shop"]))),
    ]
}

/// A file of several documents; JSON is YAML.
pub fn file(documents: &[Value]) -> String {
    let mut text = String::new();
    for document in documents {
        text.push_str("---\n");
        text.push_str(&document.to_string());
        text.push('\n');
    }
    text
}

/// A `ServiceEntry` with addresses, or with addresses and endpoints of its own.
pub fn service_entry(index: usize) -> impl Strategy<Value = Value> {
    let endpoints = vec((host_address(), proptest::option::of(port())), 0..3);
    (vec(prefix(), 1..5), distinct_ports(), endpoints, select(NAMESPACES), export_to()).prop_map(
        move |(addresses, ports, endpoints, namespace, export_to)| {
            let mut spec = json!({
                "hosts": [format!("host{index}.example.com")],
                "addresses": addresses,
                "ports": ports,
                "resolution": if endpoints.is_empty() { "NONE" } else { "STATIC" },
            });
            if !endpoints.is_empty() {
                let endpoint = |(address, port): (String, Option<u16>)| match port {
                    Some(port) => json!({ "address": address, "ports": { "p0": port } }),
                    None => json!({ "address": address }),
                };
                spec["endpoints"] = endpoints.into_iter().map(endpoint).collect();
            }
            if let Some(export_to) = export_to {
                spec["exportTo"] = export_to;
            }
            json!({
                "apiVersion": "networking.istio.io/v1",
                "kind": "ServiceEntry",
                "metadata": { "name": format!("entry{index}"), "namespace": namespace },
                "spec": spec,
            })
        },
    )
}

/// A few `ServiceEntry` documents.
pub fn service_entries() -> impl Strategy<Value = Vec<Value>> {
    (vec(any::<()>(), 0..6)).prop_flat_map(|slots| (0..slots.len()).map(service_entry).collect::<Vec<_>>())
}

/// A flow at or next to an edge of some prefix, and of some port.
pub fn question() -> impl Strategy<Value = Question> {
    let edge = (prefix(), 0..EDGES).prop_map(|(text, place)| {
        let net: IpNet = text.parse().expect("generated as a prefix");
        at_edge(net, place)
    });
    let port = prop_oneof![8 => (port(), -1..=1_i32).prop_map(|(port, by)| shifted(port, by)), 1 => any::<u16>()];
    (any::<bool>(), edge, port).prop_map(|(udp, address, port)| Question {
        l4: if udp { L4::Udp } else { L4::Tcp },
        address,
        port,
    })
}

/// A flow at or next to something that the documents name, or any other.
pub fn question_about(policies: &PolicySet) -> BoxedStrategy<Question> {
    let named: Vec<(IpNet, u16, L4)> = policies.service_entries.iter().flat_map(named_in).collect();
    if named.is_empty() {
        return question().boxed();
    }
    let near = (select(named), 0..EDGES, select(&[0, 0, 0, 0, 1, -1][..])).prop_map(|((net, port, l4), place, by)| {
        Question { l4, address: at_edge(net, place), port: shifted(port, by) }
    });
    prop_oneof![2 => near, 1 => question()].boxed()
}

fn named_in(entry: &ServiceEntry) -> Vec<(IpNet, u16, L4)> {
    let endpoints = entry.endpoints.iter().filter_map(|endpoint| match endpoint.address {
        EndpointAddress::Ip(address) => Some(IpNet::from(address)),
        _ => None,
    });
    let nets: Vec<IpNet> = entry.addresses.iter().copied().chain(endpoints).collect();
    let ports = entry.ports.iter().flat_map(|port| {
        let target = port.target_port.map(|target| (target, port.l4));
        [(port.number, port.l4)].into_iter().chain(target)
    });
    ports.flat_map(|(port, l4)| nets.iter().map(move |&net| (net, port, l4)).collect::<Vec<_>>()).collect()
}

fn shifted(port: u16, by: i32) -> u16 {
    u16::try_from(i32::from(port) + by).unwrap_or(port)
}

/// Places that [`at_edge`] knows.
pub const EDGES: u8 = 6;

/// First, last, just before, just after, in between; as IPv4, or as IPv4 behind NAT64.
pub fn at_edge(net: IpNet, place: u8) -> IpAddr {
    match (net.network(), net.broadcast()) {
        (IpAddr::V4(first), IpAddr::V4(last)) => {
            let v4 = Ipv4Addr::from_bits(match place {
                0 => first.to_bits(),
                1 => last.to_bits(),
                2 => first.to_bits().wrapping_sub(1),
                3 => last.to_bits().wrapping_add(1),
                _ => first.to_bits().midpoint(last.to_bits()),
            });
            if place == 5 { nat64(v4) } else { v4.into() }
        }
        (IpAddr::V6(first), IpAddr::V6(last)) => Ipv6Addr::from_bits(match place {
            0 => first.to_bits(),
            1 => last.to_bits(),
            2 => first.to_bits().wrapping_sub(1),
            3 => last.to_bits().wrapping_add(1),
            _ => first.to_bits().midpoint(last.to_bits()),
        })
        .into(),
        _ => net.addr(),
    }
}

fn nat64(v4: Ipv4Addr) -> IpAddr {
    Ipv6Addr::from_bits((0x0064_ff9b << 96) | u128::from(v4.to_bits())).into()
}
