//! Policies from bytes, as valid as those that were read from text, and made to collide: few addresses, few ports, few
//! names. Where the bytes end, zeros follow.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::Path,
    sync::Arc,
};

use arbitrary::{Result, Unstructured};
use egress_agent::{
    compile::{Context, Names, NodeAction, NodeDefault, PodContext},
    policy::{
        DefaultAction, DnsServers, EgressPolicy, Endpoint, EndpointAddress, ExportTo, HostPattern, Kind, L4, Location,
        Mode, NamespaceRef, ObjectName, Peer, PodSelector, PolicySet, PortRange, Position, Reach, Resolution, Rule,
        Selector, ServiceEntry, ServicePort, ServiceRef, Toggle, User,
    },
    prefix::canonical,
    workload::{Pod, UserIdentity, Workload},
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Addresses from which all others differ in a bit or two.
const BASES: [&str; 12] = [
    "10.1.2.3",
    "0.0.0.0",
    "255.255.255.255",
    "127.0.0.1",
    "2001:db8::1",
    "::",
    "::ffff:10.1.2.3",
    "64:ff9b::10.1.2.3",
    "::fffe:0:0",
    "::1:0:0:0",
    "64:ff9b::1:0:0",
    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
];
const PORTS: [u16; 8] = [443, 53, 1, 80, 442, 444, 65_535, 0];
const HOSTS: [&str; 3] = ["b.example.com", "a.b.example.com", "example.com"];
const NAMES: [&str; 3] = ["a", "b", "c"];
const NAMESPACES: [&str; 3] = ["default", "shop", "web"];
const UID: u32 = 1000;

/// Policies, a workload and what else a ruleset depends on.
#[derive(Debug)]
pub struct World {
    pub policies: PolicySet,
    pub workload: Workload,
    pub context: Context,
}

impl World {
    /// What some bytes stand for.
    pub fn from_bytes(bytes: &[u8]) -> Self {
        world(&mut Unstructured::new(bytes)).expect("where the bytes end, zeros follow")
    }
}

type Bytes<'b, 'a> = &'b mut Unstructured<'a>;

fn world(u: Bytes) -> Result<World> {
    let actions = [NodeAction::Deny, NodeAction::Allow, NodeAction::Audit];
    let node_default = NodeDefault { action: *u.choose(&actions)?, loopback: u.arbitrary()?, dns: u.arbitrary()? };
    let (system_resolvers, names, pods) = (some(u, 2, address)?, names(u)?, pods(u)?);
    let context = Context { system_resolvers, names, pods, ..Context::new(node_default) };
    let namespace = |u: Bytes| Ok((*u.choose(&NAMESPACES)?).to_owned());
    let pod = maybe(u, |u| Ok(Pod { namespace: namespace(u)?, ..Pod::default() }))?;
    let workload = Workload { pod, user: Some(UserIdentity { uid: Some(UID), name: None }), ..Workload::default() };
    let mut policies =
        PolicySet { egress_policies: some(u, 4, egress_policy)?, service_entries: some(u, 4, service_entry)? };
    policies.egress_policies.sort_by(|a, b| a.object.cmp(&b.object));
    policies.egress_policies.dedup_by(|a, b| a.object == b.object);
    policies.service_entries.sort_by(|a, b| a.object.cmp(&b.object));
    policies.service_entries.dedup_by(|a, b| a.object == b.object);
    Ok(World { policies, workload, context })
}

fn pods(u: Bytes) -> Result<PodContext> {
    Ok(PodContext { resolvers: some(u, 2, address)?, internal: some(u, 2, prefix)? })
}

fn names(u: Bytes) -> Result<Names> {
    let known = some(u, 3, |u| Ok((pick(u, &HOSTS)?.to_owned(), some(u, 2, bits)?.into_iter().collect())))?;
    Ok(Names(known.into_iter().collect()))
}

/// Up to `most` of something.
fn some<T>(u: Bytes, most: usize, one: impl Fn(Bytes) -> Result<T>) -> Result<Vec<T>> {
    (0..u.int_in_range(0..=most)?).map(|_| one(u)).collect()
}

fn maybe<T>(u: Bytes, one: impl FnOnce(Bytes) -> Result<T>) -> Result<Option<T>> {
    if u.arbitrary()? { one(u).map(Some) } else { Ok(None) }
}

fn pick<T: Copy>(u: Bytes, choices: &[T]) -> Result<T> {
    u.choose(choices).copied()
}

fn object(u: Bytes, kind: Kind) -> Result<ObjectName> {
    Ok(ObjectName { kind, namespace: pick(u, &NAMESPACES)?.into(), name: pick(u, &NAMES)?.into() })
}

fn somewhere() -> Position {
    Position { file: Arc::from(Path::new("any.yaml")), line: 1, column: 1 }
}

/// A base with its last byte changed, and one bit anywhere.
fn bits(u: Bytes) -> Result<IpAddr> {
    let base: IpAddr = pick(u, &BASES)?.parse().expect("an address");
    let (last, flip) = (u.arbitrary::<u8>()?, u.int_in_range(0..=128)?);
    Ok(match base {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() ^ u32::from(last) ^ 1_u32.unbounded_shl(128 - flip)).into(),
        IpAddr::V6(v6) => {
            Ipv6Addr::from_bits(v6.to_bits() ^ u128::from(last) ^ 1_u128.unbounded_shl(128 - flip)).into()
        }
    })
}

fn address(u: Bytes) -> Result<IpAddr> {
    Ok(canonical(bits(u)?.into()).addr())
}

fn prefix(u: Bytes) -> Result<IpNet> {
    let address = bits(u)?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let length = longest - u.int_in_range(0..=longest)?;
    Ok(canonical(IpNet::new(address, length).expect("a length that fits")))
}

/// A prefix within another. Of `::/0` and the like, IPv4 is no part.
fn within(u: Bytes, net: IpNet) -> Result<IpNet> {
    let shorter = |u: Bytes, length: u8| u.int_in_range(0..=length);
    let inner = match (net, bits(u)?.to_canonical()) {
        (IpNet::V4(net), IpAddr::V4(v4)) => {
            let address = Ipv4Addr::from_bits(net.network().to_bits() | (v4 & net.hostmask()).to_bits());
            IpNet::V4(Ipv4Net::new_assert(address, 32 - shorter(u, 32 - net.prefix_len())?))
        }
        (IpNet::V6(net), IpAddr::V6(v6)) => {
            let address = Ipv6Addr::from_bits(net.network().to_bits() | (v6 & net.hostmask()).to_bits());
            IpNet::V6(Ipv6Net::new_assert(address, 128 - shorter(u, 128 - net.prefix_len())?))
        }
        _ => net,
    };
    let inner = canonical(inner);
    Ok(if net.contains(&inner) { inner } else { net })
}

fn port(u: Bytes) -> Result<u16> {
    if u.ratio(1_u8, 8_u8)? { u.arbitrary() } else { pick(u, &PORTS) }
}

fn real_port(u: Bytes) -> Result<u16> {
    Ok(port(u)?.max(1))
}

fn service_entry(u: Bytes) -> Result<ServiceEntry> {
    let object = object(u, Kind::ServiceEntry)?;
    let resolutions =
        [Resolution::None, Resolution::Static, Resolution::Dns, Resolution::DnsRoundRobin, Resolution::DynamicDns];
    Ok(ServiceEntry {
        at: somewhere(),
        hosts: (0..=u.int_in_range(0..=1)?).map(|_| host_pattern(u)).collect::<Result<_>>()?,
        addresses: some(u, 4, prefix)?,
        ports: (0..=u.int_in_range(0..=2)?).map(|index| service_port(u, index)).collect::<Result<_>>()?,
        location: Location::MeshExternal,
        resolution: pick(u, &resolutions)?,
        endpoints: some(u, 2, endpoint)?,
        workload_selector: None,
        export_to: export_to(u)?,
        subject_alt_names: Vec::new(),
        object,
    })
}

fn host_pattern(u: Bytes) -> Result<HostPattern> {
    Ok(match u.int_in_range(0..=5)? {
        5 => HostPattern::Ending("ample.com".to_owned()),
        4 => HostPattern::Below("b.example.com".to_owned()),
        3 => HostPattern::Below("example.com".to_owned()),
        _ => HostPattern::Exact(pick(u, &HOSTS)?.to_owned()),
    })
}

fn service_port(u: Bytes, index: usize) -> Result<ServicePort> {
    Ok(ServicePort {
        name: format!("p{index}"),
        number: real_port(u)?,
        l4: pick(u, &[L4::Tcp, L4::Udp])?,
        app_protocol: None,
        target_port: maybe(u, real_port)?,
        at: somewhere(),
    })
}

fn endpoint(u: Bytes) -> Result<Endpoint> {
    let address = match u.int_in_range(0..=9)? {
        9 => EndpointAddress::Host(pick(u, &HOSTS)?.to_owned()),
        8 => EndpointAddress::Gateway,
        _ => EndpointAddress::Ip(address(u)?),
    };
    let ports = some(u, 2, |u| Ok((format!("p{}", u.int_in_range(0..=2)?), real_port(u)?)))?.into_iter().collect();
    Ok(Endpoint { address, ports, labels: BTreeMap::new(), at: somewhere() })
}

fn export_to(u: Bytes) -> Result<ExportTo> {
    let namespaces = |u: Bytes| some(u, 2, |u| Ok(pick(u, &NAMESPACES)?.to_owned()));
    Ok(match u.int_in_range(0..=7)? {
        7 => ExportTo::Nobody,
        5 | 6 => ExportTo::Namespaces(namespaces(u)?),
        _ => ExportTo::All,
    })
}

fn egress_policy(u: Bytes) -> Result<EgressPolicy> {
    Ok(EgressPolicy {
        object: object(u, Kind::EgressPolicy)?,
        at: somewhere(),
        reach: pick(u, &[Reach::Anything, Reach::Namespace])?,
        workloads: maybe(u, |u| some(u, 2, selector))?,
        mode: pick(u, &[Mode::Enforce, Mode::Audit])?,
        services: maybe(u, |u| some(u, 2, service_ref))?,
        allow: some(u, 3, |u| rule(u, peer))?,
        deny: some(u, 3, |u| rule(u, block))?,
        default_action: maybe(u, |u| pick(u, &[DefaultAction::Deny, DefaultAction::Allow]))?,
        loopback: maybe(u, |u| pick(u, &[Toggle::Allow, Toggle::None]))?,
        dns_servers: maybe(u, dns_servers)?,
        dns_queries: None,
        replies: None,
        protocols: None,
        existing: None,
        refuse_with: None,
    })
}

fn selector(u: Bytes) -> Result<Selector> {
    Ok(match u.int_in_range(0..=2)? {
        0 => Selector::User(User::Uid(UID)),
        1 => Selector::User(User::Uid(UID + 1)),
        _ => Selector::Pod(PodSelector {
            namespaces: Some(vec![pick(u, &NAMESPACES)?.to_owned()]),
            ..PodSelector::default()
        }),
    })
}

fn service_ref(u: Bytes) -> Result<ServiceRef> {
    let namespace = match u.int_in_range(0..=2)? {
        0 => NamespaceRef::Any,
        1 => NamespaceRef::Own,
        _ => NamespaceRef::Named(pick(u, &NAMESPACES)?.to_owned()),
    };
    let name = maybe(u, |u| Ok(pick(u, &NAMES)?.to_owned()))?;
    Ok(ServiceRef { namespace, name, at: somewhere() })
}

fn rule(u: Bytes, peer: fn(Bytes) -> Result<Peer>) -> Result<Rule> {
    Ok(Rule { to: maybe(u, |u| some(u, 3, peer))?, ports: maybe(u, |u| some(u, 3, port_range))?, at: somewhere() })
}

fn peer(u: Bytes) -> Result<Peer> {
    if u.ratio(1_u8, 8_u8)? { host_pattern(u).map(Peer::Host) } else { block(u) }
}

fn block(u: Bytes) -> Result<Peer> {
    let cidr = prefix(u)?;
    Ok(Peer::Cidr { cidr, except: some(u, 2, |u| within(u, cidr))? })
}

fn port_range(u: Bytes) -> Result<PortRange> {
    let l4 = pick(u, &[Some(L4::Tcp), Some(L4::Udp), None])?;
    let (one, other) = (port(u)?, port(u)?);
    Ok(PortRange { l4, low: one.min(other), high: one.max(other) })
}

fn dns_servers(u: Bytes) -> Result<DnsServers> {
    Ok(match u.int_in_range(0..=2)? {
        0 => DnsServers::None,
        1 => DnsServers::System,
        _ => DnsServers::List(some(u, 2, address)?),
    })
}
