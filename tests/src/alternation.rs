//! Policies that take turns while threads dial, for [`crate::hammer`]. Among them are those whose change would show anything in
//! between: prefixes inside each other that come and go together, sets of ports, audit views.

use std::net::IpAddr;

use anyhow::{Result, ensure};
use egress_agent::{
    compile::{Context, NodeAction, NodeDefault},
    policy::{L4, PolicySet, load::load_text},
    workload::Workload,
};

use crate::{
    dial::{Call, Method},
    hammer::Expected,
    reference::{Answer, Question, judge},
};

/// The specs of the policies, in the order of their turns.
pub const SPECS: [&str; 6] = [
    // A wide prefix, with a hole.
    "allow: [{ to: [{ cidr: 10.0.0.0/8 }, { cidr: 192.0.2.1 }] }], deny: [{ to: [{ cidr: 10.1.2.3 }] }]",
    // Neither of both.
    "allow: [{ to: [{ cidr: 192.0.2.1 }, { cidr: 192.0.2.2 }] }]",
    // The other way round: all is refused but what is inside, and sets of ports.
    "deny: [{ to: [{ cidr: 10.2.0.0/16 }] }], allow: [{ to: [{ cidr: 10.1.2.3 }] },
       { to: [{ cidr: 192.0.2.0/24 }], ports: [{ port: 80, protocol: Any }, { port: 90, endPort: 99 }, { port: 200 }] }]",
    // Beside it an audit view, which changes no answer.
    "allow: [{ to: [{ cidr: 10.0.0.0/8 }], ports: [{ port: 80, endPort: 89, protocol: Any }, { port: 91 }, { port: 93 }] },
       { to: [{ cidr: 192.0.2.1 }] }]\n---\nAudit\ndeny: [{ to: [{ cidr: 0.0.0.0/0 }] }]",
    // Everything but what is never open; both families.
    "defaultAction: Allow, deny: [{ to: [{ cidr: 203.0.113.0/24 }, { cidr: 10.9.0.0/16 },
       { cidr: 2001:db8:3::/48 }] }]",
    // A chain of prefixes, each of which says something else than the one around it.
    "allow: [{ to: [{ cidr: 10.1.0.0/16, except: [10.1.2.0/24] }, { cidr: 10.1.2.2/31 }, { cidr: 10.9.0.0/16 }, { cidr: 192.0.2.1 }] },
       { to: [{ cidr: 2001:db8::/32, except: ['2001:db8:3::/48'] }] }], deny: [{ to: [{ cidr: 10.1.2.2 }] }]",
];

/// The text of a policy, with its audit policy if it has one.
pub fn text(spec: &str) -> String {
    let mut parts = spec.split("\n---\nAudit\n").zip(["Enforce", "Audit"]).map(|(spec, mode)| {
        format!(
            "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {} }}\n\
             spec: {{ mode: {mode}, dns: {{ servers: None }}, {spec} }}\n",
            mode.to_lowercase()
        )
    });
    let first = parts.next().unwrap_or_default();
    parts.fold(first, |text, part| text + "---\n" + &part)
}

/// The node default that stands beside them.
pub fn context() -> Context {
    let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: false };
    Context::new(node_default)
}

/// The decoded policies, in the order of [`SPECS`].
pub fn policies() -> Result<Vec<PolicySet>> {
    let load = |spec: &&str| {
        let loaded = load_text("policy.yaml", &text(spec));
        ensure!(!loaded.has_errors(), "{:#?}", loaded.findings);
        Ok(loaded.policies)
    };
    SPECS.iter().map(load).collect()
}

/// Every destination in every way, with what the documents say of it.
pub fn expected(policies: &[PolicySet]) -> Vec<Expected> {
    let addresses = [
        "10.1.2.3",
        "10.1.2.2",
        "10.1.2.9",
        "10.1.9.9",
        "10.2.0.1",
        "10.9.9.9",
        "192.0.2.1",
        "192.0.2.2",
        "203.0.113.9",
        "2001:db8::1",
        "2001:db8:3::1",
    ];
    let mut expected = Vec::new();
    for address in addresses {
        for (method, l4, port) in [
            (Method::TcpConnect, L4::Tcp, 80),
            (Method::TcpConnect, L4::Tcp, 95),
            (Method::UdpConnect, L4::Udp, 80),
            (Method::UdpConnect, L4::Udp, 95),
            (Method::UdpSend, L4::Udp, 80),
        ] {
            let address = address.parse::<IpAddr>().expect("the addresses above are addresses");
            let asked = Question { l4, address, port };
            let is_open = |policies: &PolicySet| {
                !matches!(judge(policies, &Workload::default(), &context(), asked), Answer::Deny(_))
            };
            let call = Call { method, mapped: port == 95, to: (address, port).into() };
            expected.push(Expected { call, is_open: policies.iter().map(is_open).collect() });
        }
    }
    expected
}
