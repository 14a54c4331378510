//! Random documents and flows, biased towards the places where a compiler goes wrong: nested and neighbouring prefixes,
//! their first and last addresses and the ones just outside, touching port ranges, and the forms in which IPv6 carries
//! IPv4.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_agent::{
    compile::{Names, NodeAction},
    policy::{EgressPolicy, EndpointAddress, L4, Peer, PolicySet, Rule, ServiceEntry},
    prefix::canonical,
    workload::{Pod, UserIdentity, Workload},
};
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
        1 => Just(Some(json!(["~"]))),
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

/// A prefix and others within it.
fn cidr() -> impl Strategy<Value = Value> {
    (prefix(), any::<bool>(), vec(select(PREFIXES), 0..3)).prop_map(|(cidr, narrowed, excepts)| {
        let around = canonical(cidr.parse().expect("a prefix"));
        let within = |text: &&str| {
            let net = canonical(text.parse().expect("a prefix"));
            around.contains(&net) && around != net
        };
        let excepts: Vec<&str> = excepts.into_iter().filter(within).collect();
        if narrowed && !excepts.is_empty() {
            json!({ "cidr": cidr, "except": excepts })
        } else {
            json!({ "cidr": cidr })
        }
    })
}

/// Names that documents use and that [`names`] may know.
const HOSTS: &[&str] = &["host0.example.com", "host1.example.com", "a.b.example.org", "b.example.org"];
const PATTERNS: &[&str] = &["host0.example.com", "*.example.org", "*.b.example.org", "b.example.org", "*.example.com"];

fn peer(with_hosts: bool) -> BoxedStrategy<Value> {
    if with_hosts {
        prop_oneof![4 => cidr(), 1 => select(PATTERNS).prop_map(|host| json!({ "host": host }))].boxed()
    } else {
        cidr().boxed()
    }
}

fn port_range() -> impl Strategy<Value = Value> {
    let protocol = proptest::option::of(select(&["TCP", "UDP", "Any"][..]));
    (proptest::option::of((port(), proptest::option::of(port()))), protocol).prop_map(|(ports, protocol)| {
        let mut range = json!({});
        if let Some((port, end)) = ports {
            range["port"] = json!(port);
            if let Some(end) = end.filter(|&end| end >= port) {
                range["endPort"] = json!(end);
            }
        }
        if let Some(protocol) = protocol {
            range["protocol"] = json!(protocol);
        } else if range == json!({}) {
            range["protocol"] = json!("TCP");
        }
        range
    })
}

fn rule(with_hosts: bool) -> impl Strategy<Value = Value> {
    let to = proptest::option::weighted(0.8, vec(peer(with_hosts), 1..4));
    let ports = proptest::option::weighted(0.7, vec(port_range(), 1..3));
    (to, ports).prop_map(|(to, ports)| {
        let mut rule = json!({});
        if let Some(to) = to {
            rule["to"] = json!(to);
        }
        if let Some(ports) = ports {
            rule["ports"] = json!(ports);
        }
        rule
    })
}

/// One of some values, or nothing.
fn sometimes(values: Vec<Value>) -> impl Strategy<Value = Option<Value>> {
    proptest::option::weighted(0.4, select(values))
}

/// An `EgressPolicy`. Without selectors it speaks for every workload.
pub fn egress_policy(index: usize, with_selectors: bool) -> impl Strategy<Value = Value> {
    let selectors = vec![
        json!([{ "cgroup": "a/*" }]),
        json!([{ "user": 33 }, { "unit": "x.service" }]),
        json!([{ "pod": { "matchLabels": { "app": "web" } } }]),
        json!([{ "pod": { "matchLabels": { "app": "db" }, "namespaces": ["shop"] } }, { "user": "root" }]),
    ];
    let workloads = if with_selectors { sometimes(selectors).boxed() } else { Just(None).boxed() };
    let services = sometimes(vec![
        json!([]),
        json!(["*/*"]),
        json!(["./*"]),
        json!(["shop/entry0", "./entry1"]),
        json!(["web/*", "default/entry2"]),
    ]);
    let rules = (vec(rule(true), 0..3), vec(rule(false), 0..2));
    let dns = sometimes(vec![
        json!({ "servers": "System" }),
        json!({ "servers": "None" }),
        json!({ "servers": ["10.1.2.3", "2001:db8::1"] }),
    ]);
    let toggles = (
        sometimes(vec![json!("Deny"), json!("Allow")]),
        sometimes(vec![json!("Allow"), json!("None")]),
        sometimes(vec![json!("Enforce"), json!("Audit"), json!("Audit")]),
    );
    (workloads, services, rules, dns, toggles, select(NAMESPACES)).prop_map(
        move |(workloads, services, (allow, deny), dns, (default, loopback, mode), namespace)| {
            let lists = [("allow", allow), ("deny", deny)]
                .map(|(field, list)| (field, (!list.is_empty()).then_some(json!(list))));
            let fields = [
                ("workloads", workloads),
                ("services", services),
                ("dns", dns),
                ("defaultAction", default),
                ("loopback", loopback),
                ("mode", mode),
            ];
            let spec = fields.into_iter().chain(lists).filter_map(|(field, value)| Some((field.to_owned(), value?)));
            json!({
                "apiVersion": "egress.filter/v1alpha1",
                "kind": "EgressPolicy",
                "metadata": { "name": format!("policy{index}"), "namespace": namespace },
                "spec": Value::Object(spec.collect()),
            })
        },
    )
}

/// A `ServiceEntry` that is dialled by its names.
pub fn named_entry(index: usize) -> impl Strategy<Value = Value> {
    let hosts = prop_oneof![select(PATTERNS).prop_map(str::to_owned), Just(format!("host{index}.example.com"))];
    let endpoint = prop_oneof![select(HOSTS).prop_map(str::to_owned), host_address()];
    (hosts, distinct_ports(), proptest::option::of(endpoint), select(NAMESPACES)).prop_map(
        move |(host, ports, endpoint, namespace)| {
            let is_wild = host.starts_with('*');
            let mut spec =
                json!({ "hosts": [host], "ports": ports, "resolution": if is_wild { "NONE" } else { "DNS" } });
            if let Some(endpoint) = endpoint.filter(|_| !is_wild) {
                spec["endpoints"] = json!([{ "address": endpoint }]);
            }
            json!({
                "apiVersion": "networking.istio.io/v1",
                "kind": "ServiceEntry",
                "metadata": { "name": format!("named{index}"), "namespace": namespace },
                "spec": spec,
            })
        },
    )
}

/// What is known of names.
pub fn names() -> impl Strategy<Value = Names> {
    vec((select(HOSTS), host_address()), 0..5).prop_map(|known| {
        let mut names = Names::default();
        for (host, address) in known {
            let address = address.parse().expect("an address");
            names.0.entry(host.to_owned()).or_default().insert(address);
        }
        names
    })
}

/// Documents of both kinds.
pub fn documents(with_selectors: bool) -> impl Strategy<Value = Vec<Value>> {
    let entries = (0..5_usize, 0..3_usize).prop_flat_map(|(plain, named)| {
        ((0..plain).map(service_entry).collect::<Vec<_>>(), (0..named).map(named_entry).collect::<Vec<_>>())
    });
    let policies = (0..4_usize)
        .prop_flat_map(move |count| (0..count).map(|index| egress_policy(index, with_selectors)).collect::<Vec<_>>());
    (entries, policies).prop_map(|((plain, named), policies)| [plain, named, policies].concat())
}

/// A workload that some selectors match.
pub fn workload() -> impl Strategy<Value = Workload> {
    let default = select(&[None, Some(NodeAction::Deny), Some(NodeAction::Allow), Some(NodeAction::Audit)][..]);
    let pod = (select(NAMESPACES), select(&["web", "db"][..]), default).prop_map(|(namespace, app, default)| Pod {
        namespace: namespace.to_owned(),
        labels: [("app".to_owned(), app.to_owned())].into(),
        namespace_labels: std::collections::BTreeMap::new(),
        default,
    });
    let cgroup = select(&["a/b/c", "b/x.service"][..]).prop_map(str::to_owned);
    let user = select(&[(33, "www-data"), (0, "root")][..])
        .prop_map(|(uid, name)| UserIdentity { uid: Some(uid), name: Some(name.to_owned()) });
    let unit = Just("x.service".to_owned());
    let option = proptest::option::of::<BoxedStrategy<String>>;
    (option(cgroup.boxed()), option(unit.boxed()), proptest::option::of(pod), proptest::option::of(user)).prop_map(
        |(cgroup, unit, pod, user)| Workload { cgroup: cgroup.map(Into::into), unit: unit.map(Into::into), pod, user },
    )
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
    let of_entries = policies.service_entries.iter().flat_map(named_in);
    let of_policies = policies.egress_policies.iter().flat_map(named_in_policy);
    let named: Vec<(IpNet, u16, L4)> = of_entries.chain(of_policies).collect();
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

fn named_in_policy(policy: &EgressPolicy) -> Vec<(IpNet, u16, L4)> {
    let nets = |rule: &Rule| -> Vec<IpNet> {
        let of_peer = |peer: &Peer| match peer {
            Peer::Cidr { cidr, except } => [*cidr].into_iter().chain(except.iter().copied()).collect(),
            Peer::Host(_) => Vec::new(),
        };
        rule.to.iter().flatten().flat_map(of_peer).collect()
    };
    let ports = |rule: &Rule| -> Vec<(u16, L4)> {
        let ranges = rule.ports.iter().flatten();
        let edges = ranges.flat_map(|range| [range.low, range.high].map(|port| (port, range.l4.unwrap_or(L4::Udp))));
        edges.chain([(443, L4::Tcp)]).collect()
    };
    let rules = policy.allow.iter().chain(&policy.deny);
    let pairs = |rule: &Rule| {
        let ports = ports(rule);
        nets(rule).into_iter().flat_map(move |net| ports.clone().into_iter().map(move |(port, l4)| (net, port, l4)))
    };
    rules.flat_map(pairs).collect()
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
