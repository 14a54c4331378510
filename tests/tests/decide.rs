//! The compiled rules decide as the documents say: compared with the slow reference, for random documents and flows.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use egress_agent::{
    compile::{Context, NodeAction, NodeDefault, PodContext, compile},
    explain::{Destination, Explainer},
    policy::{PolicySet, load::load_text},
    workload::Workload,
};
use egress_tests::{
    generate,
    reference::{Question, ask, goes_nowhere, judge},
};
use proptest::{collection::vec, prelude::*, sample::select};

fn context() -> impl Strategy<Value = Context> {
    let action = select(&[NodeAction::Deny, NodeAction::Allow, NodeAction::Audit][..]);
    let servers = vec(select(&["10.1.2.3", "2001:db8::1", "::ffff:192.0.2.1", "127.0.0.53"][..]), 0..3);
    let of_pods = vec(select(&["10.96.0.10", "10.1.2.3"][..]), 0..2);
    let internal = vec(select(&["10.0.0.0/9", "192.0.2.0/25", "2001:db8::/33"][..]), 0..3);
    (action, any::<bool>(), any::<bool>(), servers, generate::names(), of_pods, internal).prop_map(
        |(action, loopback, dns, servers, names, of_pods, internal)| {
            let addresses = |texts: Vec<&str>| texts.into_iter().map(|text| text.parse().unwrap()).collect();
            let internal = internal.into_iter().map(|text| text.parse().unwrap()).collect();
            Context {
                system_resolvers: addresses(servers),
                names,
                pods: PodContext { resolvers: addresses(of_pods), internal },
                ..Context::new(NodeDefault { action, loopback, dns })
            }
        },
    )
}

fn parse(documents: &[serde_json::Value]) -> PolicySet {
    let text = generate::file(documents);
    let loaded = load_text("generated.yaml", &text);
    assert!(!loaded.has_errors(), "{:#?}\n{text}", loaded.findings);
    loaded.policies
}

/// Documents, and flows about them.
fn documents_and_flows() -> impl Strategy<Value = (Vec<serde_json::Value>, Vec<Question>)> {
    generate::documents(true).prop_flat_map(|documents| {
        let flows = vec(generate::question_about(&parse(&documents)), 60);
        (Just(documents), flows)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn documents_decide_as_the_reference_says(
        (documents, flows) in documents_and_flows(),
        workload in generate::workload(),
        context in context(),
    ) {
        let policies = parse(&documents);
        let ruleset = compile(&policies, &workload, &context).unwrap();
        for asked in flows {
            let expected = judge(&policies, &workload, &context, asked);
            prop_assert_eq!(ask(&ruleset, asked), expected, "{:?}", asked);
        }
    }

    #[test]
    fn what_explain_says_would_allow_a_flow_allows_it(
        (documents, flows) in documents_and_flows(),
        workload in generate::workload(),
        context in context(),
    ) {
        let policies = parse(&documents);
        for asked in flows.into_iter().take(10) {
            let to = Destination { address: asked.address, port: asked.port, protocol: asked.l4, host: None };
            let explanation = Explainer::new(&policies, workload.clone(), &context).unwrap().explain(&to);
            // Where the node default only audits, an entry is what `--default Deny` will need.
            let would_be = explanation.verdict == "would_deny" && explanation.policies.is_empty();
            let refused = explanation.verdict == "deny" || would_be;
            let can_be_opened = to.port != 0 && !goes_nowhere(to.address);
            let refused_by_default = refused && explanation.rule.is_none() && can_be_opened;
            prop_assert_eq!(explanation.to_allow.is_some(), refused_by_default);
            let Some(document) = explanation.to_allow else { continue };
            let more = load_text("more.yaml", &document);
            prop_assert!(!more.has_errors(), "{}\n{:#?}", document, more.findings);
            let mut with = policies.clone();
            with.service_entries.extend(more.policies.service_entries);
            with.egress_policies.extend(more.policies.egress_policies);
            let answer = Explainer::new(&with, workload.clone(), &context).unwrap().answer(&to);
            prop_assert_ne!(answer.verdict, "deny", "{:?} after adding\n{}", asked, document);
        }
    }

    #[test]
    fn explain_lists_each_rule_that_covers_the_destination_once(
        (documents, flows) in documents_and_flows(),
        workload in generate::workload(),
        context in context(),
    ) {
        let policies = parse(&documents);
        let explainer = Explainer::new(&policies, workload, &context).unwrap();
        for asked in flows.into_iter().take(10) {
            let to = Destination { address: asked.address, port: asked.port, protocol: asked.l4, host: None };
            let explanation = explainer.explain(&to);
            let others: Vec<_> = explanation.other_rules.iter().flatten().map(|other| &other.rule).collect();
            let distinct: std::collections::BTreeSet<_> = others.iter().collect();
            prop_assert_eq!(distinct.len(), others.len());
            prop_assert!(!explanation.rule.iter().any(|rule| others.contains(&rule)));
        }
    }

    #[test]
    fn the_order_of_documents_does_not_matter(
        documents in generate::documents(false).prop_shuffle_pair(),
        context in context(),
    ) {
        let (one, other) = documents;
        let compiled = |documents: &[serde_json::Value]| compile(&parse(documents), &Workload::default(), &context).unwrap();
        prop_assert_eq!(compiled(&one).hash(), compiled(&other).hash());
    }
}

/// A list and a shuffled copy of it.
trait ShufflePair: Strategy<Value = Vec<serde_json::Value>> + Sized {
    fn prop_shuffle_pair(self) -> impl Strategy<Value = (Self::Value, Self::Value)> {
        self.prop_flat_map(|list| (Just(list.clone()), Just(list).prop_shuffle()))
    }
}

impl<S: Strategy<Value = Vec<serde_json::Value>>> ShufflePair for S {}
