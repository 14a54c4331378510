//! Lints of `ServiceEntry`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::Hash,
};

use ipnet::IpNet;

use super::say;
use crate::policy::{
    EndpointAddress, ExportTo, HostPattern, NamespaceRef, PolicySet, ServiceEntry, ServiceRef, code::Code,
    diagnostic::Finding,
};

/// Protocols that name the host they want.
const NAMING: [&str; 7] = ["HTTP", "HTTP2", "HTTP_PROXY", "GRPC", "GRPC-WEB", "HTTPS", "TLS"];

/// `open`: the metadata services that are not denied for all.
pub(super) fn lint(set: &PolicySet, open: &[IpNet], findings: &mut Vec<Finding>) {
    for entry in &set.service_entries {
        addresses(entry, open, findings);
        names(entry, findings);
        reach(entry, findings);
    }
    disagreements(set, findings);
    exported_to_all(set, findings);
}

fn addresses(entry: &ServiceEntry, open: &[IpNet], findings: &mut Vec<Finding>) {
    if entry.addresses.iter().any(|net| net.prefix_len() == 0) {
        let what = "this entry opens every address of a family";
        say(findings, Code::EntryOpensAny, &entry.at, "spec.addresses", (what, "list the addresses of the service"));
    }
    for address in open {
        if entry.addresses.iter().any(|net| net.contains(address)) {
            let what = format!("the cloud's metadata service {} can be reached", address.addr());
            let help = "take it out of the prefix, or deny it in an EgressPolicy";
            say(findings, Code::MetadataReachable, &entry.at, "spec.addresses", (what, help));
        }
    }
}

fn names(entry: &ServiceEntry, findings: &mut Vec<Finding>) {
    if !entry.subject_alt_names.is_empty() {
        let what = "certificates are not looked at: whoever answers at the address is accepted";
        let help = "verify the certificate in the client, and leave the field to the mesh";
        say(findings, Code::SanNotVerified, &entry.at, "spec.subjectAltNames", (what, help));
    }
    let naming = entry.ports.iter().enumerate().find_map(|(index, port)| {
        port.app_protocol.filter(|protocol| NAMING.contains(protocol)).map(|protocol| (index, protocol, &port.at))
    });
    if let Some((index, protocol, at)) = naming {
        let what = format!("the host that {protocol} asks for is not looked at, only the address it connects to");
        let help = "other names served at the same addresses can be reached too";
        say(findings, Code::NameNotVerified, at, format!("spec.ports[{index}].protocol"), (what, help));
    }
}

/// What the entry opens without and with look-ups.
fn reach(entry: &ServiceEntry, findings: &mut Vec<Finding>) {
    if entry.ports.is_empty() {
        let what = "an entry without ports opens nothing";
        return say(findings, Code::OpensNothing, &entry.at, "spec.ports", (what, "list the ports that clients dial"));
    }
    let has_endpoint = |wanted: fn(&EndpointAddress) -> bool| entry.endpoints.iter().any(|e| wanted(&e.address));
    let has_address = !entry.addresses.is_empty() || has_endpoint(|address| matches!(address, EndpointAddress::Ip(_)));
    if has_address || entry.workload_selector.is_some() {
        return;
    }
    let has_name = entry.hosts.iter().any(|host| matches!(host, HostPattern::Exact(_)))
        || has_endpoint(|address| matches!(address, EndpointAddress::Host(_)));
    if has_name {
        let what = "the addresses come from DNS, which is not asked here";
        say(findings, Code::NeedsLookup, &entry.at, "spec.hosts", (what, "list `addresses` to depend on no look-up"));
    } else {
        let what =
            "the addresses of a wildcard are learnt in the kernel, when a workload asks a resolver of its policy";
        let help = "list `addresses` to depend on no answer; clients that ask by DNS over HTTPS or TLS teach nothing";
        say(findings, Code::NeedsLookup, &entry.at, "spec.hosts", (what, help));
    }
}

/// The first entry of each host is what later ones are compared with.
fn disagreements(set: &PolicySet, findings: &mut Vec<Finding>) {
    let mut first: HashMap<&HostPattern, usize> = HashMap::new();
    let (mut nets, mut protocols) = (Numbers(HashMap::new()), Numbers(HashMap::new()));
    let describe = |entry| Described::new(entry, &mut nets, &mut protocols);
    let described: Vec<_> = set.service_entries.iter().map(describe).collect();
    for (own, entry) in set.service_entries.iter().enumerate() {
        let mut differences: HashMap<usize, Option<&str>> = HashMap::new();
        for (index, host) in entry.hosts.iter().enumerate() {
            let other = *first.entry(host).or_insert(own);
            let compare = || difference(&described[own], &described[other]);
            if let Some(field) = *differences.entry(other).or_insert_with(compare) {
                let other = &set.service_entries[other];
                let what = format!("{} describes `{host}` with other {field}, at {}", other.object, other.at);
                let help = "what either opens is open; keep one entry for each host";
                say(findings, Code::EntriesDisagree, &entry.at, format!("spec.hosts[{index}]"), (what, help));
            }
        }
    }
}

/// Equal values have the same number.
struct Numbers<T>(HashMap<T, usize>);

impl<T: Eq + Hash> Numbers<T> {
    fn of(&mut self, value: T) -> usize {
        let next = self.0.len();
        *self.0.entry(value).or_insert(next)
    }
}

/// What an entry says of its hosts, ready to be compared often.
struct Described<'s> {
    entry: &'s ServiceEntry,
    /// The number of the set of its addresses.
    addresses: usize,
    /// Each port with the number of the set of its protocols, sorted.
    ports: Vec<(u16, usize)>,
}

impl<'s> Described<'s> {
    fn new(
        entry: &'s ServiceEntry,
        nets: &mut Numbers<Vec<IpNet>>,
        protocols: &mut Numbers<BTreeSet<Option<&'static str>>>,
    ) -> Self {
        let mut addresses = entry.addresses.clone();
        addresses.sort_unstable();
        let mut ports: BTreeMap<u16, BTreeSet<_>> = BTreeMap::new();
        for port in &entry.ports {
            ports.entry(port.number).or_default().insert(port.app_protocol);
        }
        let ports = ports.into_iter().map(|(port, set)| (port, protocols.of(set))).collect();
        Self { entry, addresses: nets.of(addresses), ports }
    }

    /// Whether both name a port, and not with the same protocols.
    fn differs_in_protocols(&self, other: &Self) -> bool {
        let (few, many) = if self.ports.len() < other.ports.len() { (self, other) } else { (other, self) };
        few.ports.iter().any(|&(port, protocols)| {
            let found = many.ports.binary_search_by_key(&port, |&(port, _)| port);
            found.is_ok_and(|index| many.ports[index].1 != protocols)
        })
    }
}

fn difference(a: &Described<'_>, b: &Described<'_>) -> Option<&'static str> {
    match () {
        () if a.entry.resolution != b.entry.resolution => Some("`resolution`"),
        () if a.entry.location != b.entry.location => Some("`location`"),
        () if a.addresses != b.addresses => Some("`addresses`"),
        () if a.differs_in_protocols(b) => Some("protocols"),
        () => None,
    }
}

/// A policy that lists services, and not all, expects that the others stay out of reach.
fn exported_to_all(set: &PolicySet, findings: &mut Vec<Finding>) {
    let limits = |references: &Vec<ServiceRef>| !references.iter().any(|r| r.namespace == NamespaceRef::Any);
    let limiting: Vec<_> =
        set.egress_policies.iter().filter(|policy| policy.services.as_ref().is_some_and(limits)).collect();
    let Some(example) = limiting.first() else { return };
    let references = limiting.iter().flat_map(|policy| policy.services.iter().flatten());
    let shared: HashSet<(&str, Option<&str>)> = references
        .filter_map(|reference| match &reference.namespace {
            NamespaceRef::Named(namespace) => Some((namespace.as_str(), reference.name.as_deref())),
            NamespaceRef::Own | NamespaceRef::Any => None,
        })
        .collect();
    for entry in set.service_entries.iter().filter(|entry| entry.export_to == ExportTo::All) {
        let (namespace, name) = (&*entry.object.namespace, &*entry.object.name);
        if !shared.contains(&(namespace, None)) && !shared.contains(&(namespace, Some(name))) {
            let what =
                format!("this entry is exported to every namespace, and {} keeps services apart", example.object);
            let help = "write `exportTo: [\".\"]`, or the namespaces that need it";
            say(findings, Code::ExportedToAll, &entry.at, "spec.exportTo", (what, help));
        }
    }
}
