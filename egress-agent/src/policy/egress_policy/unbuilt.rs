//! Fields that are part of the language and that this version does not carry out.
//!
//! Whoever enforces refuses them: a policy that is carried out by half is worse than none. Whoever only checks or
//! explains reads them as what they will mean.

use crate::policy::{DnsQueries, EgressPolicy, Existing, Selector, code::Code, diagnostic::Finding, yaml::Span};

/// A field, and whether a policy depends on it.
struct Field {
    path: &'static str,
    what: &'static str,
    is_used: fn(&EgressPolicy) -> bool,
}

/// Shrinks with every field that is built.
const FIELDS: &[Field] = &[
    Field {
        path: "spec.workloads",
        what: "selecting by `pod`",
        is_used: |p| selects(p, |s| matches!(s, Selector::Pod(_))),
    },
    Field { path: "spec.dns.queries", what: "`Named`", is_used: |p| p.dns_queries == Some(DnsQueries::Named) },
    Field { path: "spec.existing", what: "`Terminate`", is_used: |p| p.existing == Some(Existing::Terminate) },
];

fn selects(policy: &EgressPolicy, kind: impl Fn(&Selector) -> bool) -> bool {
    policy.workloads.iter().flatten().any(kind)
}

/// What a policy depends on and this version does not carry out, as errors for whoever enforces it.
pub fn unsupported(policy: &EgressPolicy) -> Vec<Finding> {
    let at = Span { line: policy.at.line, column: policy.at.column, length: 0 };
    let used = FIELDS.iter().filter(|field| (field.is_used)(policy));
    used.map(|Field { path, what, .. }| {
        let message =
            format!("{} depends on {what} (`{path}`), which this version does not carry out yet", policy.object);
        Finding::at(Code::NotBuilt, &policy.at.file, at, message)
            .with_path(*path)
            .with_help("delete it, or enforce the policy with a version that does")
    })
    .collect()
}
