//! `allow` and `deny`.

use super::{Code, Decoder, Dialect, FieldPath, Node, peers, ports};
use crate::policy::{
    Rule,
    schema::{
        Object,
        egress_policy::{ALLOW_PEER, ALLOW_RULE, DENY_PEER, DENY_RULE},
    },
};

/// Which of the two lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    Allow,
    Deny,
}

impl Effect {
    /// What an item looks like.
    pub(super) const fn rule(self) -> &'static Object {
        match self {
            Self::Allow => &ALLOW_RULE,
            Self::Deny => &DENY_RULE,
        }
    }

    /// What an item of `to` looks like.
    pub(super) const fn peer(self) -> &'static Object {
        match self {
            Self::Allow => &ALLOW_PEER,
            Self::Deny => &DENY_PEER,
        }
    }
}

/// Reads the list. An empty one says nothing, as its absence does.
pub(super) fn decode(
    decoder: &mut Decoder<'_>,
    node: &Node<'_>,
    path: &FieldPath<'_>,
    effect: Effect,
) -> Option<Vec<Rule>> {
    let items = decoder.items(node, path)?;
    Some(items.iter().enumerate().filter_map(|(index, item)| rule(decoder, item, &path.item(index), effect)).collect())
}

fn rule(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>, effect: Effect) -> Option<Rule> {
    let fields = decoder.fields(node, path, effect.rule(), Dialect::Strict)?;
    let to = match fields.get("to") {
        Some(node) => Some(peers::decode(decoder, node, &path.field("to"), effect)?),
        None => None,
    };
    let ports = match fields.get("ports") {
        Some(node) => Some(ports::decode(decoder, node, &path.field("ports"))?),
        None => None,
    };
    Some(Rule { to, ports, at: decoder.position(node.span) })
}

/// Reports an empty list where absence means everything. Readers of Kubernetes' `NetworkPolicy` expect everything
/// there, readers of most other languages nothing.
pub(super) fn not_empty(
    decoder: &mut Decoder<'_>,
    items: &[Node<'_>],
    node: &Node<'_>,
    path: &FieldPath<'_>,
    what: &str,
) {
    if items.is_empty() {
        let message = format!("an empty list could mean {what} or none");
        let help = "leave the field out to mean all; to mean none, leave out what it belongs to";
        decoder.say(Code::AmbiguousEmptyList, node.span, path, message, help);
    }
}
