//! Cutting the port axis: many overlapping ranges in, sorted disjoint segments out.

use std::collections::BTreeSet;

use egress_common::Protocol;

use crate::policy::L4;

use super::Ports;

/// A range of ports of one protocol and the statement that speaks first for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Cut {
    pub protocol: Protocol,
    pub low: u16,
    pub high: u16,
    /// Position in the order of statements.
    pub rank: u32,
}

/// Cuts the axis of both protocols: sorted, disjoint, and no two neighbours alike. Where several statements speak, the
/// one of lowest rank is heard.
pub(super) fn cut(claims: &[(u32, Ports)]) -> Vec<Cut> {
    let of = |l4| claims.iter().filter(move |(_, ports)| ports.l4 == l4).map(|&(rank, ports)| (rank, ports));
    let mut cuts = cut_protocol(Protocol::TCP, of(L4::Tcp));
    cuts.extend(cut_protocol(Protocol::UDP, of(L4::Udp)));
    cuts
}

/// Sweeps over the ports at which a claim begins or has ended, with the set of claims that are open in between.
fn cut_protocol(protocol: Protocol, claims: impl Iterator<Item = (u32, Ports)>) -> Vec<Cut> {
    let mut edges: Vec<(u32, bool, usize, u32)> = Vec::new();
    for (index, (rank, ports)) in claims.enumerate() {
        edges.push((ports.low.into(), true, index, rank));
        edges.push((u32::from(ports.high) + 1, false, index, rank));
    }
    edges.sort_unstable();
    let mut cuts: Vec<Cut> = Vec::new();
    let mut open = BTreeSet::new();
    let mut from = 0;
    for (at, begins, index, rank) in edges {
        if at > from
            && let Some(&(first, _)) = open.first()
        {
            push(&mut cuts, protocol, from, at - 1, first);
        }
        from = at;
        if begins {
            open.insert((rank, index));
        } else {
            open.remove(&(rank, index));
        }
    }
    cuts
}

/// Appends `low..=high`, joined to the last cut where it continues it.
fn push(cuts: &mut Vec<Cut>, protocol: Protocol, low: u32, high: u32, rank: u32) {
    let port = |value: u32| u16::try_from(value).expect("edges lie between 0 and 65,536, and an end is one less");
    let (low, high) = (port(low), port(high));
    match cuts.last_mut() {
        Some(last) if last.rank == rank && u32::from(last.high) + 1 == u32::from(low) => last.high = high,
        _ => cuts.push(Cut { protocol, low, high, rank }),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ports() -> impl Strategy<Value = Ports> {
        let port = prop_oneof![Just(0), Just(u16::MAX), 0..6_u16, any::<u16>()];
        (any::<bool>(), port.clone(), port).prop_map(|(udp, a, b)| Ports {
            l4: if udp { L4::Udp } else { L4::Tcp },
            low: a.min(b),
            high: a.max(b),
        })
    }

    proptest! {
        #[test]
        fn each_port_belongs_to_the_first_claim_that_has_it(
            claims in prop::collection::vec((0..5_u32, ports()), 0..12),
            asked in prop::collection::vec(prop_oneof![0..8_u16, any::<u16>(), Just(u16::MAX)], 1..40),
        ) {
            let cuts = cut(&claims);
            for (protocol, l4) in [(Protocol::TCP, L4::Tcp), (Protocol::UDP, L4::Udp)] {
                for &port in &asked {
                    let expected = claims
                        .iter()
                        .filter(|(_, ports)| ports.l4 == l4 && (ports.low..=ports.high).contains(&port))
                        .map(|&(rank, _)| rank)
                        .min();
                    let found: Vec<u32> = cuts
                        .iter()
                        .filter(|cut| cut.protocol == protocol && (cut.low..=cut.high).contains(&port))
                        .map(|cut| cut.rank)
                        .collect();
                    prop_assert_eq!(found, Vec::from_iter(expected));
                }
            }
            for pair in cuts.windows(2) {
                let joined = pair[0].protocol == pair[1].protocol
                    && pair[0].rank == pair[1].rank
                    && u32::from(pair[0].high) + 1 == u32::from(pair[1].low);
                prop_assert!(!joined, "neighbours {pair:?} are one segment");
            }
        }
    }
}
