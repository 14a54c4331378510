//! The decision: one pure function for the kernel, for `explain`, and for tests.

use crate::{
    Action, Address, Claims, Decision, Entries, Entry, Flow, MOST_CLAIMS, NameId, Place, Protocol, Reason, Refusal,
    RuleId, Scope, Segment, SegmentList, Settings, SocketKind, UnknownCode, Verdict, View,
};

/// Where the rules are kept: kernel maps, or the agent's own copy of them.
pub trait Rules {
    /// The value of the longest prefix that covers `address` in a view; `None` if the view is not there.
    fn entry(&self, view: View, address: Address) -> Option<Entry>;

    /// The segment of `list` that may contain a port: see [`find_segment`]. `None` if a segment cannot be read.
    fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment>;

    /// What holds for a view beside its rules; `None` if the view is not there.
    fn settings(&self, view: View) -> Option<Settings>;

    /// Whether the socket has heard from the destination of `flow` lately.
    fn is_reply(&self, flow: &Flow) -> bool;

    /// The rule that allows a flow for a name that its destination was an answer for, to its workload or to one that resolves for
    /// the whole host ([`crate::SHARED`]): see [`rule_by_name`].
    fn rule_by_name(&self, view: View, flow: &Flow) -> Option<RuleId>;

    /// What a view says of a name; `None` if the view is not there.
    fn named(&self, view: View, name: NameId) -> Option<Entry>;
}

/// Where it is kept which names an address was an answer for.
pub trait NamedRules: Rules {
    /// The names that the destination of a flow was an answer for, to a workload, and the time, in seconds since boot.
    fn claims(&self, flow: &Flow, workload: u64) -> (Claims, u32);
}

/// The rule of the first name that allows a flow, of those that a workload learnt. A name only ever opens: an address is shared by
/// many, so that to refuse by name would refuse others.
#[inline(always)]
pub fn rule_by_name<R: NamedRules>(rules: &R, view: View, flow: &Flow, workload: u64) -> Option<RuleId> {
    let (claims, now) = rules.claims(flow, workload);
    for index in 0..MOST_CLAIMS {
        if let Some(name) = claims.live(index, now)
            && let Some(entry) = rules.named(view, name)
            && let Ok(Decision { verdict: Verdict::Allow, rule: Some(rule), .. }) = read(rules, &entry, flow)
        {
            return Some(rule);
        }
    }
    None
}

/// Judges a flow.
///
/// 1. Who is exempt, or not placed, has no rules.
/// 2. The enforcing view decides what happens.
/// 3. Only where that is allow, the view with Audit policies is asked; where it denies, the flow goes through and is
///    reported.
#[inline(always)]
pub fn decide<R: Rules>(rules: &R, flow: &Flow) -> Decision {
    answer(rules, flow.place, Question::Destination(flow))
}

/// Judges whether a task may make a socket of a kind.
#[inline(always)]
pub fn decide_socket<R: Rules>(rules: &R, place: Place, kind: SocketKind) -> Decision {
    answer(rules, place, Question::Socket(kind))
}

/// Judges what would send packets elsewhere than to a destination that rules judge, or under a forged source.
#[inline(always)]
pub fn decide_bypass<R: Rules>(rules: &R, place: Place) -> Decision {
    answer(rules, place, Question::Bypass)
}

/// Judges whether a task may take the port of servers of DNS.
#[inline(always)]
pub fn decide_dns_service<R: Rules>(rules: &R, place: Place) -> Decision {
    answer(rules, place, Question::DnsService)
}

/// Judges whether a workload may ask a server of DNS for a name: `None` if policies know no such name.
#[inline(always)]
pub fn decide_query<R: Rules>(rules: &R, place: Place, name: Option<NameId>) -> Decision {
    answer(rules, place, Question::Query(name))
}

/// What may become of questions to servers of DNS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Queries {
    /// Each is let through.
    Any,
    /// Each is let through; those for names that no policy knows are reported.
    Reported,
    /// Those for names that no policy knows are refused.
    Named,
}

/// What may become of what the workloads of a place ask servers of DNS. Where it is not known whose rules apply, and where they
/// cannot be read, each question is judged.
#[inline(always)]
pub fn queries<R: Rules>(rules: &R, place: Place) -> Queries {
    let scope = match place {
        Place::Scope(scope) => scope,
        Place::Exempt => return Queries::Any,
        Place::Unknown => return Queries::Named,
    };
    let is_named = |view| rules.settings(view).map(|settings| settings.asks_only_named());
    match (is_named(scope.enforcing()), is_named(scope.with_audit())) {
        (Some(true) | None, _) => Queries::Named,
        (_, Some(true)) => Queries::Reported,
        (_, Some(false) | None) => Queries::Any,
    }
}

/// Whether a task resolves names for the whole host.
#[inline(always)]
pub fn serves_dns<R: Rules>(rules: &R, scope: Scope) -> bool {
    rules.settings(scope.enforcing()).is_some_and(|settings| settings.serves_dns())
}

/// Whether it can make a difference to a task whom its sockets heard from.
#[inline(always)]
pub fn remembers_peers<R: Rules>(rules: &R, place: Place) -> bool {
    let Place::Scope(scope) = place else { return false };
    answers_peers(rules, scope.enforcing()) || answers_peers(rules, scope.with_audit())
}

#[inline(always)]
fn answers_peers<R: Rules>(rules: &R, view: View) -> bool {
    let Some(settings) = rules.settings(view) else { return false };
    matches!((settings.default_action(), settings.replies()), (Ok(Action::Deny), Ok(Action::Allow)))
}

const ALLOWED: Decision = Decision::new(Verdict::Allow, Reason::NoRule);
/// Whatever the default: a policy says `Named` to have it so.
const UNASKABLE: Decision = Decision::new(Verdict::Deny, Reason::DnsQuery);

/// What a view is asked.
#[derive(Clone, Copy)]
enum Question<'a> {
    Destination(&'a Flow),
    Socket(SocketKind),
    Bypass,
    DnsService,
    Query(Option<NameId>),
}

/// Asks the views of a place, one after the other.
#[inline(always)]
fn answer<R: Rules>(rules: &R, place: Place, question: Question<'_>) -> Decision {
    let scope = match place {
        Place::Scope(scope) => scope,
        Place::Exempt => return Decision::EXEMPT,
        Place::Unknown => return Decision::UNKNOWN_WORKLOAD,
    };
    let Some(enforced) = ask(rules, scope.enforcing(), question) else { return Decision::FAULT };
    match enforced.verdict {
        Verdict::Deny | Verdict::WouldDeny => enforced,
        Verdict::Allow => match ask(rules, scope.with_audit(), question) {
            Some(audited) if audited.verdict == Verdict::Deny => Decision { verdict: Verdict::WouldDeny, ..audited },
            Some(_) | None => enforced,
        },
    }
}

/// What one view says; `None` if the view is not there.
#[inline(always)]
fn ask<R: Rules>(rules: &R, view: View, question: Question<'_>) -> Option<Decision> {
    match question {
        Question::Destination(flow) => judge(rules, view, flow),
        Question::Socket(kind) => {
            let settings = rules.settings(view)?;
            Some(if opens(&settings, kind) { ALLOWED } else { by_default(&settings, Reason::SocketKind) })
        }
        Question::Bypass => Some(by_default(&rules.settings(view)?, Reason::Bypass)),
        Question::DnsService => {
            let settings = rules.settings(view)?;
            Some(if settings.serves_dns() { ALLOWED } else { by_default(&settings, Reason::Bypass) })
        }
        Question::Query(name) => {
            let settings = rules.settings(view)?;
            if !settings.asks_only_named() {
                return Some(ALLOWED);
            }
            let Some(name) = name else { return Some(UNASKABLE) };
            Some(match rules.named(view, name)?.entries() {
                Ok(Entries::None) => UNASKABLE,
                Ok(_) => ALLOWED,
                Err(_) => Decision::FAULT,
            })
        }
    }
}

/// Whether sockets of a kind may be made, whatever the default.
#[inline(always)]
const fn opens(settings: &Settings, kind: SocketKind) -> bool {
    matches!(kind, SocketKind::Tcp | SocketKind::Udp) || settings.sockets().contains(kind)
}

#[inline(always)]
fn by_default(settings: &Settings, reason: Reason) -> Decision {
    match settings.default_action() {
        Ok(default) => unmatched(default, reason),
        Err(_) => Decision::FAULT,
    }
}

/// What the rules of a view say; `None` if the view is not there.
#[inline(always)]
fn judge<R: Rules>(rules: &R, view: View, flow: &Flow) -> Option<Decision> {
    if flow.address.is_discard_only() {
        return Some(Decision::new(Verdict::Deny, Reason::NoRule));
    }
    let entry = rules.entry(view, flow.address.judged())?;
    let decision = read(rules, &entry, flow).unwrap_or(Decision::FAULT);
    match decision.verdict {
        Verdict::Allow | Verdict::WouldDeny => Some(decision),
        Verdict::Deny => Some(match rules.settings(view) {
            Some(settings) => reconsider(rules, view, &settings, flow, decision),
            None => decision,
        }),
    }
}

/// What is refused for lack of a rule may be an answer for a name, or a reply, or a socket that needs none.
#[inline(always)]
fn reconsider<R: Rules>(rules: &R, view: View, settings: &Settings, flow: &Flow, refused: Decision) -> Decision {
    if refused.reason == Reason::NoRule
        && settings.has_names()
        && let Some(rule) = rules.rule_by_name(view, flow)
    {
        return Decision { rule: Some(rule), ..Decision::new(Verdict::Allow, Reason::Name) };
    }
    match (refused.reason, flow.protocol) {
        (Reason::NoRule, Protocol::UDP) if settings.replies() == Ok(Action::Allow) && rules.is_reply(flow) => {
            Decision::new(Verdict::Allow, Reason::Reply)
        }
        (Reason::SocketKind, protocol) if opens(settings, SocketKind::of(protocol)) => ALLOWED,
        _ => Decision { refusal: settings.refusal().unwrap_or(Refusal::Eperm), ..refused },
    }
}

/// What one trie value says of a flow; an error if it cannot be understood.
#[inline(always)]
fn read<R: Rules>(rules: &R, entry: &Entry, flow: &Flow) -> Result<Decision, UnknownCode> {
    let default = entry.default_action()?;
    if !flow.protocol.is_judged() {
        return Ok(unmatched(default, Reason::SocketKind));
    }
    match entry.entries()? {
        Entries::None | Entries::Asked => Ok(unmatched(default, Reason::NoRule)),
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
    Decision { rule: Some(rule), ..Decision::new(verdict(action), Reason::Rule) }
}

#[inline(always)]
const fn unmatched(default: Action, reason: Reason) -> Decision {
    Decision::new(verdict(default), reason)
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
    use crate::{Claim, SHARED, SocketKinds};

    const RULE: RuleId = RuleId(NonZeroU32::new(1).unwrap());
    const SCOPE: Scope = Scope::new(7);

    /// Two views that answer every address alike.
    #[derive(Default)]
    struct Fixed {
        enforcing: Option<(Entry, Settings)>,
        with_audit: Option<(Entry, Settings)>,
        segments: Vec<Segment>,
        is_reply: bool,
        claims: Claims,
        workload: u64,
        named: Option<(NameId, Entry)>,
    }

    /// The workload that asks.
    const OWN: u64 = 1;
    /// Seconds since boot.
    const NOW: u32 = 100;

    impl NamedRules for Fixed {
        fn claims(&self, _: &Flow, workload: u64) -> (Claims, u32) {
            (if workload == self.workload { self.claims } else { Claims::default() }, NOW)
        }
    }

    impl Fixed {
        fn view(&self, view: View) -> Option<(Entry, Settings)> {
            if view == SCOPE.enforcing() { self.enforcing } else { self.with_audit }
        }

        fn enforcing(enforcing: (Entry, Settings)) -> Self {
            Self { enforcing: Some(enforcing), ..Self::default() }
        }
    }

    impl Rules for Fixed {
        fn entry(&self, view: View, _: Address) -> Option<Entry> {
            self.view(view).map(|(entry, _)| entry)
        }

        fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment> {
            let get = |index| self.segments.get((list.first + index) as usize).copied();
            get(find_segment(list.count, protocol, port, get)?)
        }

        fn settings(&self, view: View) -> Option<Settings> {
            let (_, settings) = self.view(view)?;
            Some(if self.named.is_some() { settings.with_names() } else { settings })
        }

        fn is_reply(&self, _: &Flow) -> bool {
            self.is_reply
        }

        fn rule_by_name(&self, view: View, flow: &Flow) -> Option<RuleId> {
            [OWN, SHARED].into_iter().find_map(|workload| rule_by_name(self, view, flow, workload))
        }

        fn named(&self, view: View, name: NameId) -> Option<Entry> {
            let (entry, _) = self.view(view)?;
            Some(
                self.named
                    .filter(|named| named.0 == name)
                    .map_or(Entry::new(Entries::None, entry.default_action().unwrap()), |named| named.1),
            )
        }
    }

    fn flow(protocol: Protocol, port: u16) -> Flow {
        let address = "192.0.2.1".parse::<IpAddr>().unwrap().into();
        Flow { place: Place::Scope(SCOPE), protocol, address, port }
    }

    /// A view without rules.
    fn view(action: Action) -> (Entry, Settings) {
        (Entry::new(Entries::None, action), Settings::new(action))
    }

    const DENY: Action = Action::Deny;
    const ALLOW: Action = Action::Allow;

    #[test]
    fn without_a_view_everything_is_refused_as_a_fault() {
        let rules = Fixed { with_audit: Some(view(ALLOW)), ..Fixed::default() };
        assert_eq!(decide(&rules, &flow(Protocol::TCP, 80)), Decision::FAULT);
        assert_eq!(decide_socket(&rules, Place::Scope(SCOPE), SocketKind::Raw), Decision::FAULT);
        assert_eq!(decide_bypass(&rules, Place::Scope(SCOPE)), Decision::FAULT);
    }

    #[test]
    fn without_a_scope_no_rules_are_asked() {
        let rules = Fixed { with_audit: Some(view(DENY)), ..Fixed::enforcing(view(DENY)) };
        let at = |place| {
            let decision = decide(&rules, &Flow { place, ..flow(Protocol::TCP, 80) });
            assert_eq!(decide_socket(&rules, place, SocketKind::Tcp), decision);
            assert_eq!(decide_bypass(&rules, place), decision);
            decision
        };
        assert_eq!(at(Place::Exempt).verdict, Verdict::Allow);
        let unknown = at(Place::Unknown);
        assert_eq!((unknown.verdict, unknown.reason), (Verdict::Deny, Reason::UnknownWorkload));
    }

    #[test]
    fn audit_reports_and_never_refuses() {
        let rules = Fixed { with_audit: Some(view(DENY)), ..Fixed::enforcing(view(ALLOW)) };
        let decision = decide(&rules, &flow(Protocol::TCP, 80));
        assert_eq!((decision.verdict, decision.reason), (Verdict::WouldDeny, Reason::NoRule));
        let socket = decide_socket(&rules, Place::Scope(SCOPE), SocketKind::Sctp);
        assert_eq!((socket.verdict, socket.reason), (Verdict::WouldDeny, Reason::SocketKind));
    }

    #[test]
    fn audit_never_opens_what_is_refused() {
        let rules = Fixed { with_audit: Some(view(ALLOW)), ..Fixed::enforcing(view(DENY)) };
        assert_eq!(decide(&rules, &flow(Protocol::TCP, 80)).verdict, Verdict::Deny);
        assert_eq!(decide_bypass(&rules, Place::Scope(SCOPE)).verdict, Verdict::Deny);
    }

    #[test]
    fn a_rule_for_every_port_does_not_open_other_protocols() {
        let every_port = Entry::new(Entries::EveryPort(ALLOW, RULE), DENY);
        let rules = Fixed::enforcing((every_port, Settings::new(DENY)));
        assert_eq!(decide(&rules, &flow(Protocol::UDP, 0)).verdict, Verdict::Allow);
        let other = decide(&rules, &flow(Protocol::from_kernel(132), 80));
        assert_eq!((other.verdict, other.reason), (Verdict::Deny, Reason::SocketKind));
    }

    #[test]
    fn sockets_are_of_the_kinds_that_a_policy_names() {
        let (entry, settings) = view(DENY);
        let rules = Fixed::enforcing((entry, settings.with_sockets(SocketKinds::default().with(SocketKind::Icmp))));
        for &kind in SocketKind::ALL {
            let is_allowed = matches!(kind, SocketKind::Tcp | SocketKind::Udp | SocketKind::Icmp);
            let decision = decide_socket(&rules, Place::Scope(SCOPE), kind);
            assert_eq!(decision.verdict == Verdict::Allow, is_allowed, "{kind:?}");
            assert_eq!(
                decide_socket(&Fixed::enforcing(view(ALLOW)), Place::Scope(SCOPE), kind).verdict,
                Verdict::Allow
            );
        }
        // Such a socket may connect, wherever to: no rule can name it.
        assert_eq!(decide(&rules, &flow(Protocol::from_kernel(1), 0)).verdict, Verdict::Allow);
        assert_eq!(decide(&rules, &flow(Protocol::from_kernel(132), 80)).verdict, Verdict::Deny);
    }

    #[test]
    fn a_reply_needs_no_rule() {
        let answered =
            |enforcing, protocol| decide(&Fixed { is_reply: true, ..Fixed::enforcing(enforcing) }, &flow(protocol, 9));
        let reply = answered(view(DENY), Protocol::UDP);
        assert_eq!((reply.verdict, reply.reason), (Verdict::Allow, Reason::Reply));
        assert_eq!(answered(view(DENY), Protocol::TCP).verdict, Verdict::Deny);
        assert_eq!(decide(&Fixed::enforcing(view(DENY)), &flow(Protocol::UDP, 9)).verdict, Verdict::Deny);
        let (entry, settings) = view(DENY);
        assert_eq!(answered((entry, settings.with_replies(DENY)), Protocol::UDP).verdict, Verdict::Deny);
        // A deny that matches wins.
        let denied = Entry::new(Entries::EveryPort(DENY, RULE), DENY);
        assert_eq!(answered((denied, settings), Protocol::UDP).reason, Reason::Rule);
    }

    #[test]
    fn a_name_opens_what_no_rule_names_and_nothing_that_a_rule_denies() {
        let (name, other) = (NameId::new(5).unwrap(), NameId::new(6).unwrap());
        let entry = Entry::new(Entries::Range(Segment::new(Protocol::TCP, 443, 443, ALLOW, RULE)), DENY);
        let named = Some((name, entry));
        let claims =
            |name, until| Claims::default().with(Claim::new(other, NOW + 50), NOW).with(Claim::new(name, until), NOW);
        let with = |claims, enforcing| Fixed { claims, workload: OWN, named, ..Fixed::enforcing(enforcing) };
        let answered = |rules: &Fixed, protocol, port| decide(rules, &flow(protocol, port));
        let rules = with(claims(name, NOW + 1), view(DENY));
        let decision = answered(&rules, Protocol::TCP, 443);
        assert_eq!((decision.verdict, decision.reason, decision.rule), (Verdict::Allow, Reason::Name, Some(RULE)));
        for (protocol, port) in [(Protocol::TCP, 444), (Protocol::UDP, 443), (Protocol::from_kernel(132), 443)] {
            assert_eq!(answered(&rules, protocol, port).verdict, Verdict::Deny, "{protocol:?} {port}");
        }
        let shared = Fixed { workload: SHARED, ..with(claims(name, NOW + 1), view(DENY)) };
        assert_eq!(answered(&shared, Protocol::TCP, 443).reason, Reason::Name);
        // Too long ago, and for another name.
        for claims in [claims(name, NOW), claims(other, NOW + 1), Claims::default()] {
            assert_eq!(answered(&with(claims, view(DENY)), Protocol::TCP, 443).reason, Reason::NoRule);
        }
        let denied = Entry::new(Entries::EveryPort(DENY, RULE), DENY);
        let denying = with(claims(name, NOW + 1), (denied, Settings::new(DENY)));
        assert_eq!(answered(&denying, Protocol::TCP, 443).reason, Reason::Rule);
        assert_eq!(answered(&denying, Protocol::TCP, 443).verdict, Verdict::Deny);
        // What Audit policies would refuse is asked about names, too.
        let audited = Fixed { with_audit: Some(view(DENY)), ..with(claims(name, NOW + 1), view(ALLOW)) };
        assert_eq!(answered(&audited, Protocol::TCP, 443).verdict, Verdict::Allow);
        assert_eq!(answered(&audited, Protocol::TCP, 444).verdict, Verdict::WouldDeny);
    }

    #[test]
    fn only_names_that_rules_know_may_be_asked_for_where_a_policy_says_so() {
        let [name, other] = [1, 2].map(NameId::new);
        let place = Place::Scope(SCOPE);
        let with = |entry, enforcing| Fixed { named: Some((name.unwrap(), entry)), ..Fixed::enforcing(enforcing) };
        let answered = |rules: &Fixed, name| {
            let decision = decide_query(rules, place, name);
            (decision.verdict, decision.reason)
        };
        let refused = (Verdict::Deny, Reason::DnsQuery);
        let range = Entries::Range(Segment::new(Protocol::TCP, 443, 443, ALLOW, RULE));
        for entries in [Entries::EveryPort(ALLOW, RULE), range, Entries::Asked] {
            let entry = Entry::new(entries, DENY);
            for action in [DENY, ALLOW] {
                let (of_view, settings) = view(action);
                let named = with(entry, (of_view, settings.with_named_queries()));
                assert_eq!(queries(&named, place), Queries::Named);
                assert_eq!(answered(&named, name).0, Verdict::Allow);
                assert_eq!((answered(&named, other), answered(&named, None)), (refused, refused));
                let any = with(entry, (of_view, settings));
                assert_eq!(queries(&any, place), Queries::Any);
                assert_eq!(answered(&any, None).0, Verdict::Allow);
            }
        }
        // A name that may be asked for opens nothing.
        let claims = Claims::only(Claim::new(name.unwrap(), NOW + 1));
        let asked = Fixed { claims, workload: OWN, ..with(Entry::new(Entries::Asked, DENY), view(DENY)) };
        assert_eq!(decide(&asked, &flow(Protocol::TCP, 443)).reason, Reason::NoRule);
        let (of_view, settings) = view(DENY);
        let audited = Fixed {
            with_audit: Some((of_view, settings.with_named_queries())),
            ..with(Entry::new(range, DENY), view(DENY))
        };
        assert_eq!(queries(&audited, place), Queries::Reported);
        assert_eq!(answered(&audited, other), (Verdict::WouldDeny, Reason::DnsQuery));
        assert_eq!(answered(&audited, name).0, Verdict::Allow);
        // Without rules to read, and without a place, it is refused; who is exempt may ask anything.
        let none = Fixed::default();
        assert_eq!((queries(&none, place), decide_query(&none, place, name)), (Queries::Named, Decision::FAULT));
        assert_eq!(queries(&audited, Place::Unknown), Queries::Named);
        assert_eq!(decide_query(&audited, Place::Unknown, name), Decision::UNKNOWN_WORKLOAD);
        assert_eq!(queries(&none, Place::Exempt), Queries::Any);
        assert_eq!(decide_query(&none, Place::Exempt, None).verdict, Verdict::Allow);
    }

    #[test]
    fn where_the_rules_of_names_stand_nobody_goes() {
        let to = |text: &str| Flow { address: text.parse::<IpAddr>().unwrap().into(), ..flow(Protocol::TCP, 443) };
        let open = Fixed::enforcing(view(ALLOW));
        assert_eq!(decide(&open, &to("100::5")).verdict, Verdict::Deny);
        assert_eq!(decide(&open, &to("100:0:0:1::5")).verdict, Verdict::Allow);
    }

    #[test]
    fn peers_are_remembered_where_they_can_make_a_difference() {
        let place = Place::Scope(SCOPE);
        let (entry, settings) = view(DENY);
        assert!(remembers_peers(&Fixed::enforcing(view(DENY)), place));
        assert!(!remembers_peers(&Fixed::enforcing(view(ALLOW)), place));
        assert!(!remembers_peers(&Fixed::enforcing((entry, settings.with_replies(DENY))), place));
        assert!(remembers_peers(&Fixed { with_audit: Some(view(DENY)), ..Fixed::enforcing(view(ALLOW)) }, place));
        assert!(!remembers_peers(&Fixed::enforcing(view(DENY)), Place::Exempt));
    }

    #[test]
    fn a_refusal_says_what_the_policy_asks_for() {
        let (entry, settings) = view(DENY);
        let rules = Fixed::enforcing((entry, settings.with_refusal(Refusal::Econnrefused)));
        assert_eq!(decide(&rules, &flow(Protocol::TCP, 80)).refusal, Refusal::Econnrefused);
        assert_eq!(decide_socket(&rules, Place::Scope(SCOPE), SocketKind::Raw).refusal, Refusal::Eperm);
    }

    #[test]
    fn a_segment_that_cannot_be_read_is_a_fault() {
        let list = SegmentList { slot: 0, first: 0, count: 2 };
        let rules = Fixed::enforcing((Entry::new(Entries::Segments(list), ALLOW), Settings::new(ALLOW)));
        assert_eq!(decide(&rules, &flow(Protocol::TCP, 80)), Decision::FAULT);
    }

    #[test]
    fn the_longest_list_is_searched_to_its_ends() {
        let segments: Vec<Segment> = [Protocol::TCP, Protocol::UDP]
            .into_iter()
            .flat_map(|protocol| {
                (0..=u16::MAX).map(move |port| Segment::new(protocol, port, port, Action::Allow, RULE))
            })
            .collect();
        for protocol in [Protocol::TCP, Protocol::UDP] {
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
            let segments: Vec<Segment> = [Protocol::TCP, Protocol::UDP]
                .into_iter()
                .flat_map(|protocol| {
                    cuts.chunks_exact(2).map(move |cut| Segment::new(protocol, cut[0], cut[1], Action::Allow, RULE))
                })
                .collect();
            let protocol = if udp { Protocol::UDP } else { Protocol::TCP };
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
