//! Whether one rule says everything that another says.

use std::collections::HashSet;

use ipnet::IpNet;

use crate::policy::{HostPattern, Peer, PortRange, Rule};

/// What a rule without `ports` says.
const EVERY_PORT: &[PortRange] = &[PortRange { l4: None, low: 0, high: u16::MAX }];

/// A rule, prepared for the question whether others lie within it.
pub(super) struct Cover<'r> {
    rule: &'r Rule,
    /// Prefixes without exceptions, sorted; none lies within another.
    nets: Vec<IpNet>,
    hosts: HashSet<&'r HostPattern>,
}

impl<'r> Cover<'r> {
    pub(super) fn new(rule: &'r Rule) -> Self {
        let mut cover = Self { rule, nets: Vec::new(), hosts: HashSet::new() };
        for peer in rule.to.iter().flatten() {
            match peer {
                Peer::Cidr { cidr, except } if except.is_empty() => {
                    cover.nets.push(*cidr);
                }
                Peer::Cidr { .. } => {}
                Peer::Host(host) => {
                    cover.hosts.insert(host);
                }
            }
        }
        cover.nets.sort_unstable();
        cover.nets.dedup_by(|net, kept| kept.contains(&*net));
        cover
    }

    /// Whether every address and port of `other` is one of this rule.
    pub(super) fn covers(&self, other: &Rule) -> bool {
        self.covers_ports(other.ports.as_deref()) && self.covers_peers(other.to.as_deref())
    }

    fn covers_peers(&self, peers: Option<&[Peer]>) -> bool {
        match (&self.rule.to, peers) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(_), Some(peers)) => peers.iter().all(|peer| match peer {
                Peer::Cidr { cidr, .. } => self.covers_net(*cidr),
                Peer::Host(host) => self.hosts.contains(host),
            }),
        }
    }

    /// Whether a prefix lies within one of the rule's own: only the last that begins at or before it can be around it.
    fn covers_net(&self, net: IpNet) -> bool {
        let after = self.nets.partition_point(|own| *own <= net);
        self.nets[..after].last().is_some_and(|own| own.contains(&net))
    }

    fn covers_ports(&self, ports: Option<&[PortRange]>) -> bool {
        let Some(own) = &self.rule.ports else { return true };
        let within = |range: &PortRange| {
            own.iter()
                .any(|own| (own.l4.is_none() || own.l4 == range.l4) && own.low <= range.low && own.high >= range.high)
        };
        ports.unwrap_or(EVERY_PORT).iter().all(within)
    }
}

/// Whether the addresses of a rule include one, whatever the port.
pub(super) fn includes(rule: &Rule, net: IpNet) -> bool {
    let Some(peers) = &rule.to else { return true };
    peers.iter().any(|peer| match peer {
        Peer::Cidr { cidr, except } => cidr.contains(&net) && !except.iter().any(|except| except.contains(&net)),
        Peer::Host(_) => false,
    })
}
