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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::load::load_text;

    fn entry(name: impl std::fmt::Display, spec: &str) -> String {
        format!(
            "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: {name} }}\nspec: {{ {spec} }}\n---\n"
        )
    }

    fn policy(name: impl std::fmt::Display, spec: &str) -> String {
        format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {name} }}\nspec: {{ {spec} \
             }}\n---\n"
        )
    }

    fn many(count: usize, one: impl Fn(usize) -> String) -> String {
        (0..count).map(one).collect()
    }

    fn address(number: usize) -> String {
        format!("10.{}.{}.{}", number >> 16, number >> 8 & 255, number & 255)
    }

    fn lint_text(text: &str) -> Vec<Finding> {
        let loaded = load_text("x.yaml", text);
        assert!(!loaded.has_errors(), "{:#?}", loaded.findings.first());
        lint(&loaded.policies)
    }

    #[test]
    fn policies_are_compared_while_there_is_time() {
        let redundant = |name: &str, rules: usize| {
            policy(
                name,
                &format!("allow: [{}]", many(rules, |n| format!("{{ to: [{{ cidr: {} }}] }}, ", address(n / 2)))),
            )
        };
        let found = |text: &str| lint_text(text).iter().filter(|finding| finding.code == Code::RedundantRule).count();
        assert_eq!(found(&redundant("a", 2000)), 1000);
        assert_eq!(found(&redundant("a", 4000)), 0, "too many");
        assert_eq!(
            found(&(redundant("a", 4000) + &redundant("b", 10))),
            5,
            "one that is too large takes no time from others"
        );
    }

    #[test]
    fn a_prefix_is_covered_by_any_that_is_around_it() {
        let rules = |covering: &str, covered: &str| {
            let text = policy("p", &format!("allow: [{{ to: [{covering}] }}, {{ to: [{covered}] }}]"));
            lint_text(&text).iter().any(|finding| finding.code == Code::RedundantRule)
        };
        let wide = "{ cidr: 10.0.0.0/8 }, { cidr: 10.1.0.0/16 }, { cidr: 10.200.0.0/16 }, { cidr: \"2001:db8::/32\" }";
        assert!(rules(wide, "{ cidr: 10.1.2.0/24 }, { cidr: 10.255.255.255 }, { cidr: \"2001:db8:1::/48\" }"));
        assert!(!rules(wide, "{ cidr: 10.1.2.0/24 }, { cidr: 11.0.0.0 }"));
        assert!(!rules(wide, "{ cidr: 9.255.255.255 }"));
        assert!(!rules("{ cidr: \"2000::/3\" }, { cidr: 10.1.0.0/16 }", "{ cidr: 10.0.0.0/15 }"));
    }

    #[test]
    fn entries_disagree_in_protocols_only_where_a_port_has_others() {
        let disagree = |a: &str, b: &str| {
            let text =
                entry("a", &format!("hosts: [h], ports: [{a}]")) + &entry("b", &format!("hosts: [h], ports: [{b}]"));
            lint_text(&text).iter().any(|finding| finding.code == Code::EntriesDisagree)
        };
        let (tcp, udp) = ("{ number: 53, name: t, protocol: TCP }", "{ number: 53, name: u, protocol: UDP }");
        assert!(disagree(tcp, udp));
        assert!(!disagree(tcp, "{ number: 54, name: u, protocol: UDP }"));
    }
}
