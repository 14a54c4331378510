//! The compiled rules decide as the documents say: compared with the slow reference, for random documents and flows.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::net::IpAddr;

use egress_agent::{
    compile::{Context, NodeAction, NodeDefault, compile},
    policy::{PolicySet, load::load_text},
    workload::Workload,
};
use egress_tests::{
    generate,
    reference::{ask, judge},
};
use proptest::{collection::vec, prelude::*, sample::select};

fn context() -> impl Strategy<Value = Context> {
    let action = select(&[NodeAction::Deny, NodeAction::Allow, NodeAction::Audit][..]);
    let servers = vec(select(&["10.1.2.3", "2001:db8::1", "::ffff:192.0.2.1", "127.0.0.53"][..]), 0..3);
    (action, any::<bool>(), any::<bool>(), servers).prop_map(|(action, loopback, dns, servers)| Context {
        node_default: NodeDefault { action, loopback, dns },
        system_resolvers: servers.into_iter().map(|text| text.parse::<IpAddr>().unwrap()).collect(),
    })
}

fn parse(documents: &[serde_json::Value]) -> PolicySet {
    let text = generate::file(documents);
    let loaded = load_text("generated.yaml", &text);
    assert!(!loaded.has_errors(), "{:#?}\n{text}", loaded.findings);
    loaded.policies
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn service_entries_decide_as_the_reference_says(
        (policies, flows) in generate::service_entries().prop_flat_map(|documents| {
            let policies = parse(&documents);
            let flows = vec(generate::question_about(&policies), 100);
            (Just(policies), flows)
        }),
        context in context(),
    ) {
        let workload = Workload::default();
        let ruleset = compile(&policies, &workload, &context);
        for asked in flows {
            let expected = judge(&policies, &workload, &context, asked);
            prop_assert_eq!(ask(&ruleset, asked), expected, "{:?}", asked);
        }
    }

    #[test]
    fn the_order_of_documents_does_not_matter(
        documents in generate::service_entries().prop_shuffle_pair(),
        context in context(),
    ) {
        let (one, other) = documents;
        let compiled = |documents: &[serde_json::Value]| compile(&parse(documents), &Workload::default(), &context);
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
