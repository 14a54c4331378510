//! The decision: one pure function for the kernel, for `explain`, and for tests.

use crate::{
    Action, Address, Decision, Entries, Entry, Flow, Place, Protocol, Reason, RuleId, Segment, SegmentList,
    UnknownCode, Verdict, View,
};

/// Where the rules are kept: kernel maps, or the agent's own copy of them.
pub trait Rules {
    /// The value of the longest prefix that covers `address` in a view; `None` if the view is not there.
    fn entry(&self, view: View, address: Address) -> Option<Entry>;

    /// The segment of `list` that may contain a port: see [`find_segment`]. `None` if a segment cannot be read.
    fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment>;
}

/// Judges a flow.
///
/// 1. Who is exempt, or not placed, has no rules.
/// 2. The enforcing view decides what happens.
/// 3. Only where that is allow, the view with Audit policies is asked; where it denies, the flow goes through and is
///    reported.
#[inline(always)]
pub fn decide<R: Rules>(rules: &R, flow: &Flow) -> Decision {
    let scope = match flow.place {
        Place::Scope(scope) => scope,
        Place::Exempt => return Decision::EXEMPT,
        Place::Unknown => return Decision::UNKNOWN_WORKLOAD,
    };
    let Some(enforced) = judge(rules, scope.enforcing(), flow) else { return Decision::FAULT };
    match enforced.verdict {
        Verdict::Deny | Verdict::WouldDeny => enforced,
        Verdict::Allow => match judge(rules, scope.with_audit(), flow) {
            Some(audited) if audited.verdict == Verdict::Deny => Decision { verdict: Verdict::WouldDeny, ..audited },
            Some(_) | None => enforced,
        },
    }
}

/// What one view says; `None` if the view is not there.
#[inline(always)]
fn judge<R: Rules>(rules: &R, view: View, flow: &Flow) -> Option<Decision> {
    let entry = rules.entry(view, flow.address.judged())?;
    Some(read(rules, &entry, flow).unwrap_or(Decision::FAULT))
}

/// What one trie value says of a flow; an error if it cannot be understood.
#[inline(always)]
fn read<R: Rules>(rules: &R, entry: &Entry, flow: &Flow) -> Result<Decision, UnknownCode> {
    let default = entry.default_action()?;
    if let Protocol::Other(_) = flow.protocol {
        return Ok(unmatched(default, Reason::SocketKind));
    }
    match entry.entries()? {
        Entries::None => Ok(unmatched(default, Reason::NoRule)),
        Entries::EveryPort(action, rule) => Ok(matched(action, rule)),
        Entries::Range(segment) => in_segment(&segment, default, flow),
        Entries::Segments(list) => match rules.segment(list, flow.protocol, flow.port) {
            Some(segment) => in_segment(&segment, default, flow),
            None => Ok(Decision::FAULT),
        },
    }
}

#[inline(always)]
fn in_segment(segment: &Segment, default: Action, flow: &Flow) -> Result<Decision, UnknownCode> {
    if !segment.contains(flow.protocol, flow.port) {
        return Ok(unmatched(default, Reason::NoRule));
    }
    match segment.rule() {
        Some(rule) => Ok(matched(segment.action()?, rule)),
        None => Ok(Decision::FAULT),
    }
}

#[inline(always)]
const fn matched(action: Action, rule: RuleId) -> Decision {
    Decision { verdict: verdict(action), reason: Reason::Rule, rule: Some(rule) }
}

#[inline(always)]
const fn unmatched(default: Action, reason: Reason) -> Decision {
    Decision { verdict: verdict(default), reason, rule: None }
}

#[inline(always)]
const fn verdict(action: Action) -> Verdict {
    match action {
        Action::Allow => Verdict::Allow,
        Action::Deny => Verdict::Deny,
    }
}

/// Halvings that bring 2 × 65,536 segments down to one, and a spare.
const MAX_PROBES: u32 = 18;

/// Finds the index, among `count` sorted segments, of the last that begins at or before a port of a protocol, or of
/// the first segment if none does: the only one that can contain the port.
///
/// `get` reads one segment; where it gives `None`, so does the search. The number of probes is bounded, as the kernel
/// demands.
#[inline(always)]
pub fn find_segment(count: u32, protocol: Protocol, port: u16, get: impl Fn(u32) -> Option<Segment>) -> Option<u32> {
    let (mut start, mut len) = (0, count);
    for _ in 0..MAX_PROBES {
        if len <= 1 {
            break;
        }
        let half = len / 2;
        if get(start + half)?.starts_by(protocol, port) {
            start += half;
        }
        len -= half;
    }
    Some(start)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use core::{net::IpAddr, num::NonZeroU32};
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;
    use crate::Scope;

    const RULE: RuleId = RuleId(NonZeroU32::new(1).unwrap());
    const SCOPE: Scope = Scope::new(7);

    /// Two views that answer every address alike.
    struct Fixed {
        enforcing: Option<Entry>,
        with_audit: Option<Entry>,
        segments: Vec<Segment>,
    }

    impl Rules for Fixed {
        fn entry(&self, view: View, _: Address) -> Option<Entry> {
            if view == SCOPE.enforcing() { self.enforcing } else { self.with_audit }
        }

        fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment> {
            let get = |index| self.segments.get((list.first + index) as usize).copied();
            get(find_segment(list.count, protocol, port, get)?)
        }
    }

    fn flow(protocol: Protocol, port: u16) -> Flow {
        let address = "192.0.2.1".parse::<IpAddr>().unwrap().into();
        Flow { place: Place::Scope(SCOPE), protocol, address, port }
    }

    fn entry(action: Action) -> Entry {
        Entry::new(Entries::None, action)
    }

    #[test]
    fn without_a_view_everything_is_refused_as_a_fault() {
        let rules = Fixed { enforcing: None, with_audit: Some(entry(Action::Allow)), segments: Vec::new() };
        assert_eq!(decide(&rules, &flow(Protocol::Tcp, 80)), Decision::FAULT);
    }

    #[test]
    fn without_a_scope_no_rules_are_asked() {
        let rules =
            Fixed { enforcing: Some(entry(Action::Deny)), with_audit: Some(entry(Action::Deny)), segments: Vec::new() };
        let at = |place| decide(&rules, &Flow { place, ..flow(Protocol::Tcp, 80) });
        assert_eq!(at(Place::Exempt).verdict, Verdict::Allow);
        let unknown = at(Place::Unknown);
        assert_eq!((unknown.verdict, unknown.reason), (Verdict::Deny, Reason::UnknownWorkload));
    }

    #[test]
    fn audit_reports_and_never_refuses() {
        let rules = Fixed {
            enforcing: Some(entry(Action::Allow)),
            with_audit: Some(entry(Action::Deny)),
            segments: Vec::new(),
        };
        let decision = decide(&rules, &flow(Protocol::Tcp, 80));
        assert_eq!((decision.verdict, decision.reason), (Verdict::WouldDeny, Reason::NoRule));
    }

    #[test]
    fn audit_never_opens_what_is_refused() {
        let rules = Fixed {
            enforcing: Some(entry(Action::Deny)),
            with_audit: Some(entry(Action::Allow)),
            segments: Vec::new(),
        };
        assert_eq!(decide(&rules, &flow(Protocol::Tcp, 80)).verdict, Verdict::Deny);
    }

    #[test]
    fn a_rule_for_every_port_does_not_open_other_protocols() {
        let every_port = Entry::new(Entries::EveryPort(Action::Allow, RULE), Action::Deny);
        let rules = Fixed { enforcing: Some(every_port), with_audit: None, segments: Vec::new() };
        assert_eq!(decide(&rules, &flow(Protocol::Udp, 0)).verdict, Verdict::Allow);
        let other = decide(&rules, &flow(Protocol::Other(132), 80));
        assert_eq!((other.verdict, other.reason), (Verdict::Deny, Reason::SocketKind));
    }

    #[test]
    fn a_segment_that_cannot_be_read_is_a_fault() {
        let list = SegmentList { slot: 0, first: 0, count: 2 };
        let rules = Fixed {
            enforcing: Some(Entry::new(Entries::Segments(list), Action::Allow)),
            with_audit: None,
            segments: Vec::new(),
        };
        assert_eq!(decide(&rules, &flow(Protocol::Tcp, 80)), Decision::FAULT);
    }

    #[test]
    fn the_longest_list_is_searched_to_its_ends() {
        let segments: Vec<Segment> = [Protocol::Tcp, Protocol::Udp]
            .into_iter()
            .flat_map(|protocol| {
                (0..=u16::MAX).map(move |port| Segment::new(protocol, port, port, Action::Allow, RULE))
            })
            .collect();
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            for port in 0..=u16::MAX {
                let count = u32::try_from(segments.len()).unwrap();
                let get = |index: u32| segments.get(index as usize).copied();
                let found = find_segment(count, protocol, port, get).and_then(get);
                assert!(found.is_some_and(|segment| segment.contains(protocol, port)), "{protocol:?} {port}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_search_finds_what_a_scan_finds(cuts in prop::collection::btree_set(0u16.., 0..40), port: u16, udp: bool) {
            let cuts: Vec<u16> = cuts.into_iter().collect();
            let segments: Vec<Segment> = [Protocol::Tcp, Protocol::Udp]
                .into_iter()
                .flat_map(|protocol| {
                    cuts.chunks_exact(2).map(move |cut| Segment::new(protocol, cut[0], cut[1], Action::Allow, RULE))
                })
                .collect();
            let protocol = if udp { Protocol::Udp } else { Protocol::Tcp };
            let count = u32::try_from(segments.len()).unwrap();
            let get = |index: u32| segments.get(index as usize).copied();
            let found = find_segment(count, protocol, port, get)
                .and_then(get)
                .filter(|segment| segment.contains(protocol, port));
            let scanned = segments.iter().copied().find(|segment| segment.contains(protocol, port));
            prop_assert_eq!(found, scanned);
        }
    }
}
