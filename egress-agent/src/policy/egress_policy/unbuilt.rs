//! Fields that are part of the language and that this version does not carry out.
//!
//! Whoever enforces refuses them: a policy that is carried out by half is worse than none. Whoever only checks or
//! explains reads them as what they will mean.

use crate::policy::{DnsQueries, EgressPolicy, Selector, code::Code, diagnostic::Finding, yaml::Span};

/// A field, and whether a policy depends on it.
struct Field {
    path: &'static str,
    says: &'static str,
    help: &'static str,
    /// The second argument tells whether there is somebody who knows the pods.
    is_used: fn(&EgressPolicy, bool) -> bool,
}

/// Shrinks with every field that is built.
const FIELDS: &[Field] = &[
    Field {
        path: "spec.dns.queries",
        says: "depends on `Named` (`spec.dns.queries`), which this version does not carry out yet",
        help: "delete it, or enforce the policy with a version that does",
        is_used: |policy, _| policy.dns_queries == Some(DnsQueries::Named),
    },
    Field {
        path: "spec.workloads",
        says: "selects pods, and nobody tells who they are",
        help: "run the agent with `--kubernetes`, or select by `cgroup`, `unit` or `user`",
        is_used: |policy, knows_pods| !knows_pods && selects_pods(policy),
    },
];

fn selects_pods(policy: &EgressPolicy) -> bool {
    policy.workloads.iter().flatten().any(|selector| matches!(selector, Selector::Pod(_)))
}

/// What a policy depends on and this version does not carry out, as errors for whoever enforces it.
/// `knows_pods` tells whether there is somebody who knows the pods.
pub fn unsupported(policy: &EgressPolicy, knows_pods: bool) -> Vec<Finding> {
    let at = Span { line: policy.at.line, column: policy.at.column, length: 0 };
    let used = FIELDS.iter().filter(|field| (field.is_used)(policy, knows_pods));
    used.map(|Field { path, says, help, .. }| {
        Finding::at(Code::NotBuilt, &policy.at.file, at, format!("{} {says}", policy.object))
            .with_path(*path)
            .with_help(*help)
    })
    .collect()
}
