//! Lints, and what this version does not carry out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use egress_agent::policy::{Peer, PolicySet, code::Code, lint::lint, load::load_text};

#[path = "policy/annotated.rs"]
mod annotated;

fn policies(text: &str) -> PolicySet {
    let loaded = load_text("x.yaml", text);
    assert!(!loaded.has_errors(), "{:?}", loaded.findings);
    loaded.policies
}

fn policy(spec: &str) -> PolicySet {
    policies(&format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{name: p}}\nspec: {{{spec}}}\n"
    ))
}

fn codes(spec: &str) -> Vec<Code> {
    lint(&policy(spec)).iter().map(|finding| finding.code).collect()
}

#[test]
fn every_lint_is_found_at_its_place() {
    annotated::check("lint.yaml", |text| {
        let loaded = load_text("lint.yaml", text);
        assert_eq!(loaded.findings, []);
        annotated::places(&lint(&loaded.policies))
    });
}

#[test]
fn policies_that_only_audit_are_worth_a_word() {
    assert_eq!(codes("mode: Audit"), [Code::AuditOnly]);
    assert_eq!(codes("protocols: [RAW, ICMP]"), [Code::RawSockets]);
    assert_eq!(codes("protocols: [ICMP]"), []);
    assert_eq!(codes("mode: Enforce"), []);
}

#[test]
fn a_deny_for_one_port_leaves_the_metadata_service_reachable() {
    let allow = "allow: [{to: [{cidr: 169.254.0.0/16}]}]";
    assert_eq!(codes(allow), [Code::MetadataReachable]);
    assert_eq!(
        codes(&format!("{allow}, deny: [{{to: [{{cidr: 169.254.169.254}}], ports: [{{port: 80}}]}}]")),
        [Code::MetadataReachable]
    );
    assert_eq!(codes(&format!("{allow}, deny: [{{to: [{{cidr: 169.254.169.254}}]}}]")), []);
    assert_eq!(codes("allow: [{to: [{cidr: 169.254.0.0/16, except: [169.254.169.254/32]}]}]"), []);
}

#[test]
fn rules_that_differ_in_ports_or_exceptions_are_not_redundant() {
    for allow in [
        "{to: [{cidr: 10.0.0.0/8}], ports: [{port: 80}]}, {to: [{cidr: 10.1.0.0/16}]}",
        "{to: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}, {to: [{cidr: 10.1.0.0/16}]}",
        "{to: [{cidr: 10.0.0.0/8}], ports: [{protocol: UDP}]}, {to: [{cidr: 10.1.0.0/16}], ports: [{port: 80}]}",
        "{to: [{host: a.example.com}]}, {to: [{host: b.example.com}]}",
    ] {
        assert_eq!(codes(&format!("allow: [{allow}]")), [], "{allow}");
    }
    let within =
        "{to: [{cidr: 10.1.0.0/16}], ports: [{port: 80}]}, {to: [{cidr: 10.0.0.0/8}], ports: [{protocol: Any}]}";
    assert_eq!(codes(&format!("allow: [{within}]")), [Code::RedundantRule]);
}

#[test]
fn the_whole_schema_becomes_the_model() {
    let set = policy(
        "allow: [{to: [{cidr: 10.0.0.9/8, except: [10.1.0.0/16]}, {host: \"*.Example.org.\"}], \
         ports: [{port: 443}, {port: 8000, endPort: 8100, protocol: UDP}, {protocol: Any}]}]",
    );
    let rule = &set.egress_policies[0].allow[0];
    let peers: Vec<String> = rule
        .to
        .iter()
        .flatten()
        .map(|peer| match peer {
            Peer::Cidr { cidr, except } => format!("{cidr} {except:?}"),
            Peer::Host(host) => host.to_string(),
        })
        .collect();
    assert_eq!(peers, ["10.0.0.0/8 [10.1.0.0/16]", "*.example.org"]);
    let ports: Vec<(u16, u16)> = rule.ports.iter().flatten().map(|range| (range.low, range.high)).collect();
    assert_eq!(ports, [(443, 443), (8000, 8100), (0, 65535)]);
}
