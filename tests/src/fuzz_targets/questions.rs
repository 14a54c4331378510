//! Questions about all that policies name: the first and last address of each prefix and the ones just outside, with
//! the first and last port of each range and the ones just outside.

use std::{collections::BTreeSet, iter::once, net::IpAddr};

use egress_agent::{
    compile::Context,
    policy::{DnsServers, EgressPolicy, EndpointAddress, L4, Peer, PolicySet, Rule, ServiceEntry},
};
use ipnet::IpNet;

use crate::{
    generate::{EDGES, at_edge},
    reference::Question,
};

/// Prime, so that steps of this size reach each question once, far from the one before.
const STEP: usize = 2_654_435_761;

/// At most `most` questions, spread evenly if there are more.
pub fn at_edges(policies: &PolicySet, context: &Context, most: usize) -> impl Iterator<Item = Question> {
    let addresses: Vec<IpAddr> = addresses(policies, context).into_iter().collect();
    let ports: Vec<u16> = ports(policies).into_iter().collect();
    let count = addresses.len() * ports.len() * 2;
    (0..count.min(most)).map(move |index| {
        let index = index.wrapping_mul(STEP) % count;
        let (index, l4) = (index / 2, [L4::Tcp, L4::Udp][index % 2]);
        Question { l4, address: addresses[index / ports.len()], port: ports[index % ports.len()] }
    })
}

fn addresses(policies: &PolicySet, context: &Context) -> BTreeSet<IpAddr> {
    let entries = policies.service_entries.iter().flat_map(of_entry);
    let written = policies.egress_policies.iter().flat_map(of_policy);
    let known = context.system_resolvers.iter().chain(context.names.0.values().flatten());
    let known = known.map(|&address| IpNet::from(address));
    let loopback = ["127.0.0.0/8", "0.0.0.0/32", "::1/128", "::/128"].map(|text| text.parse().expect("a prefix"));
    let nets = entries.chain(written).chain(known).chain(loopback);
    nets.flat_map(|net| (0..EDGES).map(move |place| at_edge(net, place))).collect()
}

fn of_entry(entry: &ServiceEntry) -> impl Iterator<Item = IpNet> {
    let endpoints = entry.endpoints.iter().filter_map(|endpoint| match endpoint.address {
        EndpointAddress::Ip(address) => Some(IpNet::from(address)),
        EndpointAddress::Host(_) | EndpointAddress::Unix(_) | EndpointAddress::Gateway => None,
    });
    entry.addresses.iter().copied().chain(endpoints)
}

fn of_policy(policy: &EgressPolicy) -> impl Iterator<Item = IpNet> {
    let peers = rules(policy).flat_map(|rule| rule.to.iter().flatten()).flat_map(|peer| match peer {
        Peer::Cidr { cidr, except } => once(*cidr).chain(except.iter().copied()).collect(),
        Peer::Host(_) => Vec::new(),
    });
    let servers = match &policy.dns_servers {
        Some(DnsServers::List(servers)) => servers.as_slice(),
        Some(DnsServers::System | DnsServers::None) | None => &[],
    };
    peers.chain(servers.iter().map(|&address| address.into()))
}

fn ports(policies: &PolicySet) -> BTreeSet<u16> {
    let entries = policies.service_entries.iter().flat_map(|entry| {
        let dialled = entry.ports.iter().flat_map(|port| once(port.number).chain(port.target_port));
        dialled.chain(entry.endpoints.iter().flat_map(|endpoint| endpoint.ports.values().copied()))
    });
    let ranges = policies.egress_policies.iter().flat_map(rules).flat_map(|rule| rule.ports.iter().flatten());
    let named = entries.chain(ranges.flat_map(|range| [range.low, range.high])).chain([53]);
    named.flat_map(|port| [port.saturating_sub(1), port, port.saturating_add(1)]).collect()
}

fn rules(policy: &EgressPolicy) -> impl Iterator<Item = &Rule> {
    policy.allow.iter().chain(&policy.deny)
}
