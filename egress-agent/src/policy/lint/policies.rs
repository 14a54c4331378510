//! Lints of `EgressPolicy`.

use super::{
    coverage::{Cover, includes},
    denies, denies_for_all, metadata_services, say,
};
use crate::policy::{
    DefaultAction, EgressPolicy, ExportTo, Mode, NamespaceRef, Peer, PolicySet, Position, Rule, Selector, ServiceEntry,
    ServiceRef, code::Code, diagnostic::Finding,
};

/// Rules of one list beyond which they are not compared with each other.
const MOST_COMPARED: usize = 2000;

pub(super) fn lint(set: &PolicySet, findings: &mut Vec<Finding>) {
    for policy in &set.egress_policies {
        any_address(policy, findings);
        within_each_other(policy, findings);
        services(policy, set, findings);
        metadata_service(policy, set, findings);
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

fn within_each_other(policy: &EgressPolicy, findings: &mut Vec<Finding>) {
    if policy.allow.len().max(policy.deny.len()) > MOST_COMPARED {
        return;
    }
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

fn services(policy: &EgressPolicy, set: &PolicySet, findings: &mut Vec<Finding>) {
    // A pod's own namespace is its, not the policy's, so only the name can be looked for.
    let selects_pods = policy.workloads.iter().flatten().any(|selector| matches!(selector, Selector::Pod(_)));
    for (index, reference) in policy.services.iter().flatten().enumerate() {
        let own = &*policy.object.namespace;
        let named: Vec<&ServiceEntry> =
            set.service_entries.iter().filter(|entry| is_meant(reference, entry, own, selects_pods)).collect();
        let visible = named.iter().any(|entry| selects_pods || is_exported(entry, own));
        let what = match (&reference.namespace, &reference.name) {
            _ if visible => continue,
            (NamespaceRef::Any, _) | (NamespaceRef::Own, None) => continue,
            _ if named.is_empty() => "there is no such ServiceEntry".to_owned(),
            _ => format!("it is not exported to the namespace `{own}`"),
        };
        let help = "correct the reference, add the entry, or add the namespace to its `exportTo`";
        say(findings, Code::DanglingService, &reference.at, format!("spec.services[{index}]"), (what, help));
    }
}

fn is_meant(reference: &ServiceRef, entry: &ServiceEntry, own: &str, selects_pods: bool) -> bool {
    let namespace = match &reference.namespace {
        NamespaceRef::Own => selects_pods || *entry.object.namespace == *own,
        NamespaceRef::Any => true,
        NamespaceRef::Named(name) => *entry.object.namespace == **name,
    };
    namespace && reference.name.as_ref().is_none_or(|name| *entry.object.name == **name)
}

fn is_exported(entry: &ServiceEntry, namespace: &str) -> bool {
    match &entry.export_to {
        ExportTo::All => true,
        ExportTo::Namespaces(names) => names.iter().any(|name| name == namespace),
        ExportTo::Nobody => false,
    }
}

fn metadata_service(policy: &EgressPolicy, set: &PolicySet, findings: &mut Vec<Finding>) {
    for address in metadata_services() {
        if denies(policy, address) || set.egress_policies.iter().any(|other| denies_for_all(other, address)) {
            continue;
        }
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
