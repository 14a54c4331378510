//! Which policies speak for a workload, and what they say together.
//!
//! 1. The enforcing view takes the enforcing policies that select the workload. If there are none, the node default
//!    stands in for them.
//! 2. The view with Audit takes every policy that selects the workload, as if all of them enforced: what it refuses is
//!    what would be refused after switching the Audit policies over. It is there only if one of them is an Audit policy,
//!    or if the node default is Audit and stands in.
//! 3. An absent field says nothing. Only where no policy of a view speaks does the default of the field hold: `services`
//!    is then `*/*`, `defaultAction` Deny, `loopback` Allow, `dns` System.
//! 4. Where several speak, services, allows, denies, loopback and dns unite, and Deny beats Allow as the default.
//!    Protocols unite, and Deny beats Allow for replies. Policies that differ in `refuseWith` refuse with `EPERM`.
//! 5. Statements are heard in this order: denies, then by kind, namespace, name, and place in the document; builtins
//!    come last. The first that covers a destination decides.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_common::{Action, Refusal, Settings, SocketKind, SocketKinds};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::{
    policy::{
        DefaultAction, DnsQueries, DnsServers, EgressPolicy, Endpoint, EndpointAddress, ExportTo, HostPattern, L4,
        Mode, NamespaceRef, ObjectName, Peer, PolicySet, PortRange, Reach, RefuseWith, Resolution, Rule, RuleName,
        ServiceEntry, ServicePort, ServiceRef, SocketProtocol, Toggle,
    },
    workload::{Workload, selects},
};

use super::{Block, Context, Names, NodeAction, Part, Ports, Statement};

/// What all policies of a view say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Combined {
    /// In the order in which they are heard.
    pub statements: Vec<Statement>,
    /// What happens to destinations that no statement covers.
    pub default: Action,
    /// What holds beside the statements.
    pub settings: Settings,
    /// The servers of DNS that may be asked, and whose answers are believed.
    pub resolvers: Vec<IpAddr>,
    /// The `EgressPolicy` documents that speak; empty where the node default stands in.
    pub policies: Vec<ObjectName>,
}

impl Combined {
    /// The view in which everything is allowed.
    pub const fn allow_any() -> Self {
        let default = Action::Allow;
        Self {
            statements: Vec::new(),
            default,
            settings: Settings::new(default),
            resolvers: Vec::new(),
            policies: Vec::new(),
        }
    }
}

/// What the view of `mode` says of a workload; `None` if there is no such view.
pub fn combine(policies: &PolicySet, workload: &Workload, context: &Context, mode: Mode) -> Option<Combined> {
    combine_selecting(policies, &selecting(policies, workload), workload, context, mode)
}

/// The policies that select a workload, in the order of the set.
pub(crate) fn selecting<'p>(policies: &'p PolicySet, workload: &Workload) -> Vec<&'p EgressPolicy> {
    policies.egress_policies.iter().filter(|policy| selects(policy, workload)).collect()
}

/// The same, where it is known which policies select the workload, of which nothing else matters then but its pod.
pub(crate) fn combine_selecting(
    policies: &PolicySet,
    selecting: &[&EgressPolicy],
    workload: &Workload,
    context: &Context,
    mode: Mode,
) -> Option<Combined> {
    let enforcing: Vec<&EgressPolicy> =
        selecting.iter().copied().filter(|policy| policy.mode == Mode::Enforce).collect();
    let default = workload.pod.as_ref().and_then(|pod| pod.default).unwrap_or(context.node_default.action);
    match mode {
        Mode::Enforce if !enforcing.is_empty() => Some(united(policies, workload, context, &enforcing)),
        Mode::Enforce => Some(match default {
            NodeAction::Deny => registry_only(policies, workload, context),
            NodeAction::Allow | NodeAction::Audit => Combined::allow_any(),
        }),
        Mode::Audit if selecting.len() > enforcing.len() => Some(united(policies, workload, context, selecting)),
        Mode::Audit => {
            (enforcing.is_empty() && default == NodeAction::Audit).then(|| registry_only(policies, workload, context))
        }
    }
}

/// `builtin/default` of `--default Deny`: every visible `ServiceEntry`, loopback and the resolvers. On a host where no policy
/// enforces, every entry is visible: a policy that only audits changes nothing.
fn registry_only(policies: &PolicySet, workload: &Workload, context: &Context) -> Combined {
    let enforces = |policy: &EgressPolicy| policy.mode == Mode::Enforce && policy.reach == Reach::Anything;
    let host = workload.pod.is_none() && !policies.egress_policies.iter().any(enforces);
    let namespace = workload.pod.as_ref().map_or("default", |pod| &pod.namespace);
    let visible = |entry: &&ServiceEntry| host || is_visible(entry, namespace);
    let mut statements: Vec<Statement> = policies
        .service_entries
        .iter()
        .filter(visible)
        .flat_map(|entry| service_statements(entry, &context.names))
        .collect();
    statements.extend(context.node_default.loopback.then(loopback));
    let resolvers = if context.node_default.dns { system_resolvers(workload, context) } else { &[] };
    statements.extend(context.node_default.dns.then(|| dns(resolvers)));
    statements.extend(internal(workload, context));
    let default = Action::Deny;
    Combined {
        statements: ordered(statements),
        default,
        settings: Settings::new(default),
        resolvers: resolvers.to_vec(),
        policies: Vec::new(),
    }
}

fn united(policies: &PolicySet, workload: &Workload, context: &Context, speaking: &[&EgressPolicy]) -> Combined {
    let mut statements: Vec<Statement> = policies
        .service_entries
        .iter()
        .filter(|entry| is_used(entry, workload, speaking))
        .flat_map(|entry| {
            let asked = if asks_only_named(speaking) { asked_part(entry) } else { None };
            service_statements(entry, &context.names).map(move |mut statement| {
                statement.parts.extend(asked.clone());
                statement
            })
        })
        .collect();
    for policy in speaking {
        statements.extend(policy_statements(policy, &context.names));
    }
    statements.extend(allows_loopback(speaking).then(loopback));
    let servers = dns_servers(speaking, system_resolvers(workload, context));
    statements.extend((!servers.is_empty()).then(|| dns(&servers)));
    statements.extend(internal(workload, context));
    let default = default_action(speaking);
    Combined {
        statements: ordered(statements),
        default,
        settings: settings(speaking, default),
        resolvers: servers,
        policies: speaking.iter().map(|policy| policy.object.clone()).collect(),
    }
}

/// Stable, so that the statements of a document stay in its order.
fn ordered(mut statements: Vec<Statement>) -> Vec<Statement> {
    statements.sort_by(|a, b| rank(a).cmp(&rank(b)));
    statements
}

fn rank(statement: &Statement) -> impl Ord + '_ {
    let (builtin, object) = match &statement.name {
        RuleName::Document { object, .. } => (None, Some(object)),
        RuleName::Builtin(name) => (Some(name), None),
    };
    (statement.action == Action::Allow, builtin, object)
}

/// Deny if any policy says so, and where none says anything.
fn default_action(speaking: &[&EgressPolicy]) -> Action {
    let mut said = speaking.iter().filter_map(|policy| policy.default_action).peekable();
    if said.peek().is_some() && said.all(|action| action == DefaultAction::Allow) {
        Action::Allow
    } else {
        Action::Deny
    }
}

fn settings(speaking: &[&EgressPolicy], default: Action) -> Settings {
    let denies_replies = speaking.iter().any(|policy| policy.replies == Some(DefaultAction::Deny));
    let protocols = speaking.iter().flat_map(|policy| policy.protocols.iter().flatten());
    let settings = Settings::new(default);
    let settings = if asks_only_named(speaking) { settings.with_named_queries() } else { settings };
    settings
        .with_replies(if denies_replies { Action::Deny } else { Action::Allow })
        .with_sockets(protocols.fold(SocketKinds::default(), |kinds, &protocol| kinds.with(kind(protocol))))
        .with_refusal(refusal(speaking))
}

const fn kind(protocol: SocketProtocol) -> SocketKind {
    match protocol {
        SocketProtocol::Icmp => SocketKind::Icmp,
        SocketProtocol::Sctp => SocketKind::Sctp,
        SocketProtocol::UdpLite => SocketKind::UdpLite,
        SocketProtocol::Raw => SocketKind::Raw,
        SocketProtocol::Packet => SocketKind::Packet,
        SocketProtocol::Vsock => SocketKind::Vsock,
    }
}

/// Those that speak must agree to be heard.
fn refusal(speaking: &[&EgressPolicy]) -> Refusal {
    let mut said = speaking.iter().filter_map(|policy| policy.refuse_with);
    match said.next() {
        Some(first) if said.all(|other| other == first) => match first {
            RefuseWith::Eperm => Refusal::Eperm,
            RefuseWith::Econnrefused => Refusal::Econnrefused,
            RefuseWith::Ehostunreach => Refusal::Ehostunreach,
        },
        Some(_) | None => Refusal::Eperm,
    }
}

/// `Named` beats `Any`.
fn asks_only_named(speaking: &[&EgressPolicy]) -> bool {
    speaking.iter().any(|policy| policy.dns_queries == Some(DnsQueries::Named))
}

/// The names of an entry that clients ask for although its rules need no answer: they may, where not every question may be asked.
fn asked_part(entry: &ServiceEntry) -> Option<Part> {
    let part = || Part { blocks: Vec::new(), hosts: entry.hosts.clone(), ports: Vec::new() };
    (!is_dialled_by_name(entry)).then(part)
}

fn allows_loopback(speaking: &[&EgressPolicy]) -> bool {
    let mut said = speaking.iter().filter_map(|policy| policy.loopback).peekable();
    said.peek().is_none() || said.any(|loopback| loopback == Toggle::Allow)
}

fn dns_servers(speaking: &[&EgressPolicy], system: &[IpAddr]) -> Vec<IpAddr> {
    let said: Vec<&DnsServers> = speaking.iter().filter_map(|policy| policy.dns_servers.as_ref()).collect();
    if said.is_empty() {
        return system.to_vec();
    }
    said.into_iter()
        .flat_map(|servers| match servers {
            DnsServers::System => system,
            DnsServers::None => &[],
            DnsServers::List(list) => list,
        })
        .copied()
        .collect()
}

/// Whether a policy names the entry among its services, or no policy names any and one of them sees it.
fn is_used(entry: &ServiceEntry, workload: &Workload, speaking: &[&EgressPolicy]) -> bool {
    let namespace = |policy: &EgressPolicy| match &workload.pod {
        Some(pod) => pod.namespace.clone(),
        None => policy.object.namespace.to_string(),
    };
    let said: Vec<_> = speaking.iter().filter(|policy| policy.services.is_some()).collect();
    if said.is_empty() {
        return speaking.iter().any(|policy| is_visible(entry, &namespace(policy)));
    }
    said.into_iter().any(|policy| {
        let own = namespace(policy);
        let named = policy.services.iter().flatten().any(|service| is_named(entry, service, &own));
        named && is_visible(entry, &own)
    })
}

fn is_named(entry: &ServiceEntry, service: &ServiceRef, own: &str) -> bool {
    let namespace = match &service.namespace {
        NamespaceRef::Own => *entry.object.namespace == *own,
        NamespaceRef::Any => true,
        NamespaceRef::Named(name) => *entry.object.namespace == **name,
    };
    namespace && service.name.as_ref().is_none_or(|name| *entry.object.name == **name)
}

/// `exportTo`: whether a namespace sees an entry.
pub fn is_visible(entry: &ServiceEntry, namespace: &str) -> bool {
    match &entry.export_to {
        ExportTo::All => true,
        ExportTo::Namespaces(names) => names.iter().any(|name| name == namespace),
        ExportTo::Nobody => false,
    }
}

/// One statement for each port of an entry.
pub fn service_statements(entry: &ServiceEntry, names: &Names) -> impl Iterator<Item = Statement> {
    entry.ports.iter().enumerate().map(|(index, port)| Statement {
        name: RuleName::Document {
            object: entry.object.clone(),
            path: format!("ports[{index}]").into(),
            at: port.at.clone(),
        },
        action: Action::Allow,
        parts: service_parts(entry, port, names),
    })
}

/// What a client dials for a port, without a proxy between: the union of
/// 1. its number at the entry's addresses,
/// 2. its number at the addresses of the entry's names, where Istio would resolve them or leave that to the client,
/// 3. the endpoints' own ports at theirs.
fn service_parts(entry: &ServiceEntry, port: &ServicePort, names: &Names) -> Vec<Part> {
    let own = entry.addresses.iter().map(|&net| net.into());
    let hosts: &[HostPattern] = if is_dialled_by_name(entry) { &entry.hosts } else { &[] };
    let named = hosts.iter().flat_map(|host| names.addresses(host)).map(Block::from);
    let blocks = own.chain(named).collect();
    let mut parts = vec![Part { hosts: hosts.to_vec(), ..part(blocks, port, port.number) }];
    if entry.resolution != Resolution::None {
        parts.extend(entry.endpoints.iter().map(|endpoint| {
            let (blocks, hosts) = match &endpoint.address {
                EndpointAddress::Ip(address) => (vec![(*address).into()], Vec::new()),
                EndpointAddress::Host(name) => {
                    let pattern = HostPattern::Exact(name.clone());
                    (names.addresses(&pattern).map(Block::from).collect(), vec![pattern])
                }
                EndpointAddress::Unix(_) | EndpointAddress::Gateway => (Vec::new(), Vec::new()),
            };
            Part { hosts, ..part(blocks, port, endpoint_port(endpoint, port)) }
        }));
    }
    parts.retain(|part| !part.blocks.is_empty() || !part.hosts.is_empty());
    parts
}

/// The names of a document whose addresses its rules depend on.
pub fn dialled_names(policies: &PolicySet) -> impl Iterator<Item = (&ObjectName, HostPattern)> {
    let of_entry = |entry: &ServiceEntry| {
        let hosts = if is_dialled_by_name(entry) { entry.hosts.clone() } else { Vec::new() };
        let endpoints = entry.endpoints.iter().filter(|_| entry.resolution != Resolution::None);
        let endpoints = endpoints.filter_map(|endpoint| match &endpoint.address {
            EndpointAddress::Host(name) => Some(HostPattern::Exact(name.clone())),
            EndpointAddress::Ip(_) | EndpointAddress::Unix(_) | EndpointAddress::Gateway => None,
        });
        hosts.into_iter().chain(endpoints).collect::<Vec<_>>()
    };
    let of_policy =
        |policy: &EgressPolicy| policy.allow.iter().flat_map(|rule| hosts(rule.to.as_deref())).collect::<Vec<_>>();
    let entries = policies.service_entries.iter().map(move |entry| (&entry.object, of_entry(entry)));
    let egress = policies.egress_policies.iter().map(move |policy| (&policy.object, of_policy(policy)));
    entries.chain(egress).flat_map(|(object, names)| names.into_iter().map(move |name| (object, name)))
}

/// Whether clients reach an entry at whatever its names resolve to.
pub fn is_dialled_by_name(entry: &ServiceEntry) -> bool {
    match entry.resolution {
        Resolution::None => entry.addresses.is_empty(),
        Resolution::Static => false,
        Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns => true,
    }
}

fn part(blocks: Vec<Block>, port: &ServicePort, number: u16) -> Part {
    Part { blocks, hosts: Vec::new(), ports: vec![Ports { l4: port.l4, low: number, high: number }] }
}

fn endpoint_port(endpoint: &Endpoint, port: &ServicePort) -> u16 {
    endpoint.ports.get(&port.name).copied().or(port.target_port).unwrap_or(port.number)
}

/// One statement for each rule of a policy.
pub fn policy_statements<'a>(policy: &'a EgressPolicy, names: &'a Names) -> impl Iterator<Item = Statement> + 'a {
    let denies = rules(policy, "deny", Action::Deny, &policy.deny, names);
    denies.chain(rules(policy, "allow", Action::Allow, &policy.allow, names))
}

fn rules<'a>(
    policy: &'a EgressPolicy,
    field: &'a str,
    action: Action,
    rules: &'a [Rule],
    names: &'a Names,
) -> impl Iterator<Item = Statement> {
    rules.iter().enumerate().map(move |(index, rule)| Statement {
        name: RuleName::Document {
            object: policy.object.clone(),
            path: format!("{field}[{index}]").into(),
            at: rule.at.clone(),
        },
        action,
        parts: vec![Part {
            blocks: blocks(rule.to.as_deref(), names),
            hosts: hosts(rule.to.as_deref()),
            ports: ports(rule.ports.as_deref()),
        }],
    })
}

/// An absent `to` is every address of both families. A host has the addresses that are known of it.
fn blocks(to: Option<&[Peer]>, names: &Names) -> Vec<Block> {
    let Some(peers) = to else { return every_address() };
    let of_peer = |peer: &Peer| match peer {
        Peer::Cidr { cidr, except } => vec![Block { cidr: *cidr, except: except.clone() }],
        Peer::Host(pattern) => names.addresses(pattern).map(Block::from).collect(),
    };
    peers.iter().flat_map(of_peer).collect()
}

fn hosts(to: Option<&[Peer]>) -> Vec<HostPattern> {
    let pattern = |peer: &Peer| match peer {
        Peer::Host(pattern) => Some(pattern.clone()),
        Peer::Cidr { .. } => None,
    };
    to.into_iter().flatten().filter_map(pattern).collect()
}

fn every_address() -> Vec<Block> {
    vec![IpNet::V4(Ipv4Net::default()).into(), IpNet::V6(Ipv6Net::default()).into()]
}

/// An absent list is every port of TCP and UDP.
fn ports(ranges: Option<&[PortRange]>) -> Vec<Ports> {
    const EVERY: &[PortRange] = &[PortRange { l4: None, low: 0, high: u16::MAX }];
    ranges
        .unwrap_or(EVERY)
        .iter()
        .flat_map(|range| {
            let protocols: &[L4] = match range.l4 {
                Some(L4::Tcp) => &[L4::Tcp],
                Some(L4::Udp) => &[L4::Udp],
                None => &[L4::Tcp, L4::Udp],
            };
            protocols.iter().map(|&l4| Ports { l4, low: range.low, high: range.high })
        })
        .collect()
}

/// `loopback: Allow`. Linux takes the unspecified addresses for this host (`ip(7)`).
fn loopback() -> Statement {
    let blocks = vec![
        IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8)).into(),
        IpAddr::V4(Ipv4Addr::UNSPECIFIED).into(),
        IpAddr::V6(Ipv6Addr::LOCALHOST).into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED).into(),
    ];
    builtin("loopback", blocks, ports(None))
}

/// `dns: { servers: System }`. Where a pod's own `resolv.conf` points is for the pod to say, and so never asked.
fn system_resolvers<'a>(workload: &Workload, context: &'a Context) -> &'a [IpAddr] {
    let of_pods = &context.pods.resolvers;
    if workload.pod.is_some() && !of_pods.is_empty() { of_pods } else { &context.system_resolvers }
}

/// `--internal-cidrs`.
fn internal(workload: &Workload, context: &Context) -> Option<Statement> {
    let networks = &context.pods.internal;
    (workload.pod.is_some() && !networks.is_empty()).then(|| {
        let blocks = networks.iter().map(|&network| network.into()).collect();
        builtin("internal", blocks, ports(None))
    })
}

/// `dns.servers`: port 53 of UDP and TCP.
fn dns(servers: &[IpAddr]) -> Statement {
    let blocks = servers.iter().map(|&address| address.into()).collect();
    builtin("dns", blocks, ports(Some(&[PortRange { l4: None, low: 53, high: 53 }])))
}

fn builtin(name: &'static str, blocks: Vec<Block>, ports: Vec<Ports>) -> Statement {
    let parts = vec![Part { blocks, hosts: Vec::new(), ports }];
    Statement { name: RuleName::Builtin(name), action: Action::Allow, parts }
}
