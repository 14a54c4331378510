//! Lints of `EgressPolicy`.

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;

use super::{
    coverage::{Cover, includes},
    denies, say,
};
use crate::policy::{
    DefaultAction, EgressPolicy, ExportTo, Mode, NamespaceRef, Peer, PolicySet, Position, Rule, Selector, ServiceEntry,
    SocketProtocol, code::Code, diagnostic::Finding,
};

/// Comparisons of one rule with one peer or one port of another that there is time for, in all policies together. A
/// policy that needs more than are left is not looked at in this way.
const MOST_COMPARISONS: usize = 16 << 20;

/// `open`: the metadata services that are not denied for all.
pub(super) fn lint(set: &PolicySet, open: &[IpNet], findings: &mut Vec<Finding>) {
    let known = Services::new(&set.service_entries);
    let mut comparisons = MOST_COMPARISONS;
    for policy in &set.egress_policies {
        any_address(policy, findings);
        if let Some(left) = comparisons.checked_sub(comparisons_of(policy)) {
            comparisons = left;
            within_each_other(policy, findings);
        }
        raw_sockets(policy, findings);
        services(policy, &known, findings);
        metadata_service(policy, open, findings);
    }
    audit_only(set, findings);
}

fn any_address(policy: &EgressPolicy, findings: &mut Vec<Finding>) {
    for (index, rule) in policy.allow.iter().enumerate() {
        let everything = |peer: &Peer| matches!(peer, Peer::Cidr { cidr, .. } if cidr.prefix_len() == 0);
        let what = match &rule.to {
            None => "without `to`, this rule opens every address",
            Some(peers) if peers.iter().any(everything) => "this rule opens every address of a family",
            Some(_) => continue,
        };
        let help = "name prefixes or hosts, or say in `ports` how much is meant";
        say(findings, Code::AllowsAnyAddress, &rule.at, format!("spec.allow[{index}]"), (what, help));
    }
    if policy.default_action == Some(DefaultAction::Allow) {
        let what = "what no rule names is allowed";
        let help = "write `defaultAction: Deny` and allow what is needed; `mode: Audit` shows what that is";
        say(findings, Code::AllowsAnyAddress, &policy.at, "spec.defaultAction", (what, help));
    }
}

fn raw_sockets(policy: &EgressPolicy, findings: &mut Vec<Finding>) {
    let is_raw = |protocol: &SocketProtocol| matches!(protocol, SocketProtocol::Raw | SocketProtocol::Packet);
    if policy.protocols.iter().flatten().any(is_raw) {
        let what = "a raw or packet socket sends any packet to anybody, whatever the rules say";
        let help = "write `ICMP` for ping sockets; where raw sockets must be, a packet filter is what limits them";
        say(findings, Code::RawSockets, &policy.at, "spec.protocols", (what, help));
    }
}

/// Every rule with every peer, and every port with every port.
fn comparisons_of(policy: &EgressPolicy) -> usize {
    let sum = |size: fn(&Rule) -> usize| policy.allow.iter().chain(&policy.deny).map(size).sum::<usize>();
    let (rules, peers) = (sum(|_| 1), sum(|rule| rule.to.as_ref().map_or(1, Vec::len)));
    let ports = sum(|rule| rule.ports.as_ref().map_or(1, Vec::len));
    rules.saturating_mul(peers).saturating_add(ports.saturating_mul(ports))
}

fn within_each_other(policy: &EgressPolicy, findings: &mut Vec<Finding>) {
    let denies: Vec<Cover<'_>> = policy.deny.iter().map(Cover::new).collect();
    let allows: Vec<Cover<'_>> = policy.allow.iter().map(Cover::new).collect();
    for (index, rule) in policy.allow.iter().enumerate() {
        if let Some(deny) = denies.iter().position(|deny| deny.covers(rule)) {
            let message = format!("this rule allows nothing: `spec.deny[{deny}]` denies all of it");
            let help = "a deny wins whatever its size; narrow the deny or delete this rule";
            say(findings, Code::ShadowedRule, &rule.at, format!("spec.allow[{index}]"), (message, help));
        }
    }
    redundant(&policy.allow, &allows, "allow", findings);
    redundant(&policy.deny, &denies, "deny", findings);
}

/// Of two equal rules the later is reported.
fn redundant(rules: &[Rule], covers: &[Cover<'_>], list: &str, findings: &mut Vec<Finding>) {
    for (index, rule) in rules.iter().enumerate() {
        let own = &covers[index];
        let says_more = |(other, cover): &(usize, &Cover<'_>)| {
            *other != index && cover.covers(rule) && (*other < index || !own.covers(&rules[*other]))
        };
        if let Some((other, _)) = covers.iter().enumerate().find(says_more) {
            let message = format!("`spec.{list}[{other}]` says all that this rule says");
            say(findings, Code::RedundantRule, &rule.at, format!("spec.{list}[{index}]"), (message, "delete it"));
        }
    }
}

/// The entries that references can mean.
struct Services<'s> {
    names: HashSet<&'s str>,
    /// Of a namespace, and of a namespace and a name.
    exports: HashMap<(&'s str, Option<&'s str>), Exports<'s>>,
}

/// Who sees some of several entries.
#[derive(Default)]
struct Exports<'s> {
    all: bool,
    namespaces: HashSet<&'s str>,
}

impl<'s> Services<'s> {
    fn new(entries: &'s [ServiceEntry]) -> Self {
        let mut services = Self { names: HashSet::new(), exports: HashMap::new() };
        for ServiceEntry { object, export_to, .. } in entries {
            services.names.insert(&object.name);
            for name in [None, Some(&*object.name)] {
                let exports = services.exports.entry((&object.namespace, name)).or_default();
                match export_to {
                    ExportTo::All => exports.all = true,
                    ExportTo::Namespaces(names) => exports.namespaces.extend(names.iter().map(String::as_str)),
                    ExportTo::Nobody => {}
                }
            }
        }
        services
    }
}

fn services(policy: &EgressPolicy, known: &Services<'_>, findings: &mut Vec<Finding>) {
    // A pod's own namespace is its, not the policy's, so only the name can be looked for.
    let selects_pods = policy.workloads.iter().flatten().any(|selector| matches!(selector, Selector::Pod(_)));
    let own = &*policy.object.namespace;
    for (index, reference) in policy.services.iter().flatten().enumerate() {
        let name = reference.name.as_deref();
        let meant = match (&reference.namespace, name) {
            (NamespaceRef::Any, _) | (NamespaceRef::Own, None) => continue,
            (NamespaceRef::Own, Some(name)) if selects_pods && known.names.contains(name) => continue,
            (NamespaceRef::Own, Some(_)) => known.exports.get(&(own, name)),
            (NamespaceRef::Named(namespace), _) => known.exports.get(&(namespace, name)),
        };
        let what = match meant {
            Some(exports) if selects_pods || exports.all || exports.namespaces.contains(own) => continue,
            Some(_) => format!("it is not exported to the namespace `{own}`"),
            None => "there is no such ServiceEntry".to_owned(),
        };
        let help = "correct the reference, add the entry, or add the namespace to its `exportTo`";
        say(findings, Code::DanglingService, &reference.at, format!("spec.services[{index}]"), (what, help));
    }
}

fn metadata_service(policy: &EgressPolicy, open: &[IpNet], findings: &mut Vec<Finding>) {
    for &address in open.iter().filter(|&&address| !denies(policy, address)) {
        let mut report = |at: &Position, path: String| {
            let message = format!("the cloud's metadata service {} can be reached", address.addr());
            let help = format!("deny it: `deny: [ {{ to: [ {{ cidr: \"{address}\" }} ] }} ]`");
            say(findings, Code::MetadataReachable, at, path, (message, help));
        };
        match policy.allow.iter().position(|rule| includes(rule, address)) {
            Some(index) => report(&policy.allow[index].at, format!("spec.allow[{index}]")),
            None if policy.default_action == Some(DefaultAction::Allow) => {
                report(&policy.at, "spec.defaultAction".to_owned());
            }
            None => {}
        }
    }
}

fn audit_only(set: &PolicySet, findings: &mut Vec<Finding>) {
    let [first, ..] = &set.egress_policies[..] else { return };
    if set.egress_policies.iter().all(|policy| policy.mode == Mode::Audit) {
        let what = "every policy is in Audit mode: they report and refuse nothing";
        let help = "write `mode: Enforce` once the reports are empty";
        say(findings, Code::AuditOnly, &first.at, "spec.mode", (what, help));
    }
}
