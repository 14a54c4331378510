//! What is valid and probably not meant.
//!
//! Lints see a [`PolicySet`] and nothing else: they look nothing up and know no workloads. Documents may be hostile, so
//! each lint takes time in proportion to them, or within a stated bound.

use ipnet::IpNet;

use super::{EgressPolicy, Mode, PolicySet, Position, code::Code, diagnostic::Finding, yaml::Span};

mod coverage;
mod entries;
mod policies;

/// Every lint, by file and position.
pub fn lint(set: &PolicySet) -> Vec<Finding> {
    let mut findings = Vec::new();
    let open = metadata_services().into_iter().filter(|&address| !is_denied_for_all(set, address));
    let open: Vec<IpNet> = open.collect();
    entries::lint(set, &open, &mut findings);
    policies::lint(set, &open, &mut findings);
    findings.sort_by(|a, b| (&a.file, a.line, a.column, a.code).cmp(&(&b.file, b.line, b.column, b.code)));
    findings
}

fn say(
    findings: &mut Vec<Finding>,
    code: Code,
    at: &Position,
    path: impl Into<String>,
    (message, help): (impl Into<String>, impl Into<String>),
) {
    let span = Span { line: at.line, column: at.column, length: 1 };
    findings.push(Finding::at(code, &at.file, span, message).with_path(path).with_help(help));
}

/// Where clouds serve credentials: IPv4 everywhere, and IPv6 in AWS.
fn metadata_services() -> [IpNet; 2] {
    [
        IpNet::from(std::net::IpAddr::from([169, 254, 169, 254])),
        IpNet::from(std::net::IpAddr::from([0xfd00, 0x0ec2, 0, 0, 0, 0, 0, 0x0254])),
    ]
}

/// Whether some policy refuses every connection of every workload to an address.
fn is_denied_for_all(set: &PolicySet, address: IpNet) -> bool {
    let for_all = |policy: &&EgressPolicy| policy.workloads.is_none() && policy.mode == Mode::Enforce;
    set.egress_policies.iter().filter(for_all).any(|policy| denies(policy, address))
}

/// Whether a policy refuses every connection of its workloads to an address.
fn denies(policy: &EgressPolicy, address: IpNet) -> bool {
    policy.deny.iter().any(|rule| rule.ports.is_none() && coverage::includes(rule, address))
}
