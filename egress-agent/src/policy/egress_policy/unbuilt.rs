//! Fields that are part of the language and that this version does not carry out.
//!
//! Whoever enforces refuses them: a policy that is carried out by half is worse than none. Whoever only checks or
//! explains reads them as what they will mean.

use crate::policy::{DnsQueries, EgressPolicy, Selector, code::Code, diagnostic::Finding, yaml::Span};

/// A field, and whether a policy depends on it.
struct Field {
    path: &'static str,
    what: &'static str,
    is_used: fn(&EgressPolicy) -> bool,
}

/// Shrinks with every field that is built.
const FIELDS: &[Field] =
    &[Field { path: "spec.dns.queries", what: "`Named`", is_used: |p| p.dns_queries == Some(DnsQueries::Named) }];

fn selects(policy: &EgressPolicy, kind: impl Fn(&Selector) -> bool) -> bool {
    policy.workloads.iter().flatten().any(kind)
}

/// What a policy depends on and this version does not carry out, as errors for whoever enforces it.
/// `knows_pods` tells whether there is somebody who knows the pods.
pub fn unsupported(policy: &EgressPolicy, knows_pods: bool) -> Vec<Finding> {
    let at = Span { line: policy.at.line, column: policy.at.column, length: 0 };
    let used = FIELDS.iter().filter(|field| (field.is_used)(policy));
    let pods = (!knows_pods && selects(policy, |selector| matches!(selector, Selector::Pod(_)))).then(|| {
        let message = format!("{} selects pods, and nobody tells who they are", policy.object);
        Finding::at(Code::NotBuilt, &policy.at.file, at, message)
            .with_path("spec.workloads")
            .with_help("run the agent with `--kubernetes`, or select by `cgroup`, `unit` or `user`")
    });
    let unbuilt = used.map(|Field { path, what, .. }| {
        let message =
            format!("{} depends on {what} (`{path}`), which this version does not carry out yet", policy.object);
        Finding::at(Code::NotBuilt, &policy.at.file, at, message)
            .with_path(*path)
            .with_help("delete it, or enforce the policy with a version that does")
    });
    unbuilt.chain(pods).collect()
}
