//! What the documents mean, slowly and obviously: for one flow, every statement is read again from the top.
//!
//! Written from the description of the policy language, not from the compiler, with which it shares nothing but the
//! parsed documents. [`ask`] puts the same question to the compiled rules.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use egress_agent::{
    compile::{Context, Names, NodeAction},
    policy::{
        DefaultAction, DnsServers, EgressPolicy, EndpointAddress, ExportTo, HostPattern, L4, Mode, NamespaceRef,
        ObjectName, Peer, PolicySet, Reach, Resolution, Rule, RuleName, ServiceEntry, Toggle,
    },
    ruleset::Ruleset,
    workload::{Workload, selects},
};
use egress_common::{Flow, Protocol, Verdict};
use ipnet::IpNet;

/// What a workload dials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// TCP or UDP.
    pub l4: L4,
    /// As the workload gives it.
    pub address: IpAddr,
    /// Destination port.
    pub port: u16,
}

/// The answer, with the rule's identity where one decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Goes through.
    Allow(Why),
    /// Refused.
    Deny(Why),
    /// Goes through, and is reported.
    WouldDeny(Why),
}

/// Why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// A rule: its document, if it has one, and its place there, or the builtin's name.
    Rule(Option<ObjectName>, String),
    /// No rule.
    NoRule,
}

/// What a compiled ruleset answers.
pub fn ask(ruleset: &Ruleset, asked: Question) -> Answer {
    let protocol = match asked.l4 {
        L4::Tcp => Protocol::TCP,
        L4::Udp => Protocol::UDP,
    };
    let flow = Flow { place: Ruleset::PLACE, protocol, address: asked.address.into(), port: asked.port };
    let decision = ruleset.decide(&flow);
    let why = match ruleset.rule(&decision) {
        Some(RuleName::Document { object, path, .. }) => Why::Rule(Some(object.clone()), path.to_string()),
        Some(RuleName::Builtin(name)) => Why::Rule(None, (*name).to_owned()),
        None => Why::NoRule,
    };
    match decision.verdict {
        Verdict::Allow => Answer::Allow(why),
        Verdict::Deny => Answer::Deny(why),
        Verdict::WouldDeny => Answer::WouldDeny(why),
    }
}

/// Judges one flow.
pub fn judge(policies: &PolicySet, workload: &Workload, context: &Context, asked: Question) -> Answer {
    let asked = Question { address: inner(asked.address), ..asked };
    if goes_nowhere(asked.address) {
        return Answer::Deny(Why::NoRule);
    }
    let selecting: Vec<&EgressPolicy> = policies.egress_policies.iter().filter(|p| selects(p, workload)).collect();
    let enforcing: Vec<&EgressPolicy> = selecting.iter().copied().filter(|p| p.mode == Mode::Enforce).collect();
    let world = World { policies, workload, context };
    let default = workload.pod.as_ref().and_then(|pod| pod.default).unwrap_or(context.node_default.action);
    let (allowed, why) = if !enforcing.is_empty() {
        world.said_by(&enforcing, asked)
    } else if default == NodeAction::Deny {
        world.registry_only(asked)
    } else {
        (true, Why::NoRule)
    };
    if !allowed {
        return Answer::Deny(why);
    }
    let audited = if selecting.iter().any(|policy| policy.mode == Mode::Audit) {
        world.said_by(&selecting, asked)
    } else if enforcing.is_empty() && default == NodeAction::Audit {
        world.registry_only(asked)
    } else {
        (true, Why::NoRule)
    };
    if audited.0 { Answer::Allow(why) } else { Answer::WouldDeny(audited.1) }
}

/// `100::/64` (RFC 6666), which no policy opens.
pub fn goes_nowhere(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(v6) if v6.segments()[..4] == [0x100, 0, 0, 0])
}

/// IPv4 inside IPv6: mapped (RFC 4291), or behind NAT64 (RFC 6052) unless it is an address of this host.
fn inner(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    match (v6.to_ipv4_mapped(), behind_nat64(v6)) {
        (Some(v4), _) => v4.into(),
        (None, Some(v4)) if !is_of_this_host(v4) => v4.into(),
        (None, _) => address,
    }
}

fn behind_nat64(v6: Ipv6Addr) -> Option<Ipv4Addr> {
    let [0, 0x64, 0xff, 0x9b, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d] = v6.octets() else { return None };
    Some(Ipv4Addr::new(a, b, c, d))
}

fn is_of_this_host(v4: Ipv4Addr) -> bool {
    v4.octets()[0] == 127 || v4.octets()[0] == 0
}

struct World<'a> {
    policies: &'a PolicySet,
    workload: &'a Workload,
    context: &'a Context,
}

/// A matching statement: deny before allow, then by document (builtins last), then by place.
type Found = (bool, Option<String>, Option<ObjectName>, usize, String);

impl World<'_> {
    fn registry_only(&self, asked: Question) -> (bool, Why) {
        let mut found: Vec<Found> = Vec::new();
        for entry in &self.policies.service_entries {
            let seen = match &self.workload.pod {
                Some(pod) => sees(&pod.namespace, entry),
                None => !self.anybody_enforces() || sees("default", entry),
            };
            if seen {
                found.extend(in_entry(entry, asked, &self.context.names));
            }
        }
        let default = self.context.node_default;
        found.extend(default.loopback.then(|| loopback(asked)).flatten());
        found.extend(default.dns.then(|| dns(self.resolvers(), asked)).flatten());
        found.extend(self.internal(asked));
        first(found, false)
    }

    /// Whether the host has a policy that is more than a trial.
    fn anybody_enforces(&self) -> bool {
        self.policies
            .egress_policies
            .iter()
            .any(|policy| policy.mode == Mode::Enforce && policy.reach == Reach::Anything)
    }

    fn said_by(&self, speaking: &[&EgressPolicy], asked: Question) -> (bool, Why) {
        let mut found: Vec<Found> = Vec::new();
        let nobody_names_services = speaking.iter().all(|policy| policy.services.is_none());
        for policy in speaking {
            let own = self.workload.pod.as_ref().map_or(&*policy.object.namespace, |pod| &pod.namespace);
            for entry in &self.policies.service_entries {
                let named = policy.services.iter().flatten().any(|service| {
                    let namespace = match &service.namespace {
                        NamespaceRef::Own => *entry.object.namespace == *own,
                        NamespaceRef::Any => true,
                        NamespaceRef::Named(name) => **name == *entry.object.namespace,
                    };
                    namespace && service.name.as_ref().is_none_or(|name| **name == *entry.object.name)
                });
                if sees(own, entry) && (named || nobody_names_services) {
                    found.extend(in_entry(entry, asked, &self.context.names));
                }
            }
            for (is_allow, field, rules) in [(false, "deny", &policy.deny), (true, "allow", &policy.allow)] {
                for (index, rule) in rules.iter().enumerate() {
                    if in_rule(rule, asked, &self.context.names) {
                        let place = format!("{field}[{index}]");
                        found.push((is_allow, None, Some(policy.object.clone()), index, place));
                    }
                }
            }
        }
        let loopbacks: Vec<Toggle> = speaking.iter().filter_map(|policy| policy.loopback).collect();
        if loopbacks.is_empty() || loopbacks.contains(&Toggle::Allow) {
            found.extend(loopback(asked));
        }
        found.extend(self.dns_of(speaking, asked));
        found.extend(self.internal(asked));
        let defaults: Vec<DefaultAction> = speaking.iter().filter_map(|policy| policy.default_action).collect();
        first(found, !defaults.is_empty() && !defaults.contains(&DefaultAction::Deny))
    }

    fn resolvers(&self) -> &[IpAddr] {
        match &self.workload.pod {
            Some(_) if !self.context.pods.resolvers.is_empty() => &self.context.pods.resolvers,
            _ => &self.context.system_resolvers,
        }
    }

    /// The networks of the cluster, for pods.
    fn internal(&self, asked: Question) -> Option<Found> {
        let is_internal = self.context.pods.internal.iter().any(|net| holds(*net, asked.address));
        (self.workload.pod.is_some() && is_internal)
            .then(|| (true, Some("internal".to_owned()), None, 0, "internal".to_owned()))
    }

    fn dns_of(&self, speaking: &[&EgressPolicy], asked: Question) -> Option<Found> {
        let said: Vec<&DnsServers> = speaking.iter().filter_map(|policy| policy.dns_servers.as_ref()).collect();
        if said.is_empty() {
            return dns(self.resolvers(), asked);
        }
        said.into_iter().find_map(|servers| match servers {
            DnsServers::System => dns(self.resolvers(), asked),
            DnsServers::None => None,
            DnsServers::List(list) => dns(list, asked),
        })
    }
}

fn first(mut found: Vec<Found>, default: bool) -> (bool, Why) {
    found.sort();
    match found.into_iter().next() {
        Some((is_allow, _, object, _, place)) => (is_allow, Why::Rule(object, place)),
        None => (default, Why::NoRule),
    }
}

fn sees(namespace: &str, entry: &ServiceEntry) -> bool {
    match &entry.export_to {
        ExportTo::All => true,
        ExportTo::Namespaces(names) => names.iter().any(|name| name == namespace),
        ExportTo::Nobody => false,
    }
}

fn in_entry(entry: &ServiceEntry, asked: Question, names: &Names) -> Vec<Found> {
    let by_name = match entry.resolution {
        Resolution::None => entry.addresses.is_empty(),
        Resolution::Static => false,
        Resolution::Dns | Resolution::DnsRoundRobin | Resolution::DynamicDns => true,
    };
    let at_address = entry.addresses.iter().any(|net| holds(*net, asked.address))
        || by_name && entry.hosts.iter().any(|host| resolves_to(host, asked.address, names));
    let mut found = Vec::new();
    for (index, port) in entry.ports.iter().enumerate() {
        let by_endpoint = entry.resolution != Resolution::None
            && entry.endpoints.iter().any(|endpoint| {
                let number = endpoint.ports.get(&port.name).copied().or(port.target_port).unwrap_or(port.number);
                let at_endpoint = match &endpoint.address {
                    EndpointAddress::Ip(address) => *address == asked.address,
                    EndpointAddress::Host(name) => resolves_to(&HostPattern::Exact(name.clone()), asked.address, names),
                    EndpointAddress::Unix(_) | EndpointAddress::Gateway => false,
                };
                at_endpoint && number == asked.port
            });
        if port.l4 == asked.l4 && (at_address && port.number == asked.port || by_endpoint) {
            found.push((true, None, Some(entry.object.clone()), index, format!("ports[{index}]")));
        }
    }
    found
}

fn resolves_to(host: &HostPattern, address: IpAddr, names: &Names) -> bool {
    names.0.iter().any(|(name, addresses)| {
        let is_meant = match host {
            HostPattern::Exact(exact) => name == exact,
            HostPattern::Below(suffix) => name.ends_with(&format!(".{suffix}")),
            HostPattern::Ending(end) => name.ends_with(end.as_str()),
        };
        is_meant && addresses.iter().any(|&known| inner(known) == address)
    })
}

fn in_rule(rule: &Rule, asked: Question, names: &Names) -> bool {
    let to = rule.to.as_ref().is_none_or(|peers| {
        peers.iter().any(|peer| match peer {
            Peer::Cidr { cidr, except } => {
                holds(*cidr, asked.address) && !except.iter().any(|net| holds(*net, asked.address))
            }
            Peer::Host(host) => resolves_to(host, asked.address, names),
        })
    });
    let ports = rule.ports.as_ref().is_none_or(|ranges| {
        ranges.iter().any(|range| {
            range.l4.is_none_or(|l4| l4 == asked.l4) && range.low <= asked.port && asked.port <= range.high
        })
    });
    to && ports
}

/// A prefix written in IPv6 that lies within an IPv4 form is the IPv4 prefix; any other never reaches IPv4.
fn holds(net: IpNet, address: IpAddr) -> bool {
    as_v4(net).unwrap_or(net).contains(&address)
}

fn as_v4(net: IpNet) -> Option<IpNet> {
    let IpNet::V6(v6) = net else { return None };
    let length = v6.prefix_len().checked_sub(96)?;
    let network = v6.network();
    let behind = behind_nat64(network).filter(|&v4| length < 8 || !is_of_this_host(v4));
    let v4 = network.to_ipv4_mapped().or(behind)?;
    IpNet::new(v4.into(), length).ok()
}

fn loopback(asked: Question) -> Option<Found> {
    let is_local = match asked.address {
        IpAddr::V4(v4) => v4.is_loopback() || v4.is_unspecified(),
        IpAddr::V6(v6) => v6 == Ipv6Addr::LOCALHOST || v6 == Ipv6Addr::UNSPECIFIED,
    };
    is_local.then(|| builtin("loopback"))
}

fn dns(servers: &[IpAddr], asked: Question) -> Option<Found> {
    (asked.port == 53 && servers.iter().any(|&server| inner(server) == asked.address)).then(|| builtin("dns"))
}

fn builtin(name: &str) -> Found {
    (true, Some(name.to_owned()), None, 0, name.to_owned())
}
