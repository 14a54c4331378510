//! `ports`: ports and ranges of a protocol.

use super::{Code, Decoder, Dialect, FieldPath, Node, rules::not_empty};
use crate::policy::{
    L4, PortRange,
    schema::egress_policy::{PORT_RANGE, PROTOCOLS},
};

/// Reads the list.
pub(super) fn decode(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<Vec<PortRange>> {
    let items = decoder.items(node, path)?;
    not_empty(decoder, items, node, path, "every port");
    Some(items.iter().enumerate().filter_map(|(index, item)| range(decoder, item, &path.item(index))).collect())
}

fn range(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<PortRange> {
    let fields = decoder.fields(node, path, &PORT_RANGE, Dialect::Strict)?;
    if fields.names().next().is_none() {
        let help = "write `port: 443`, or `protocol: Any` for every port";
        decoder.say(Code::BadPortRange, node.span, path, "an item without `port` and `protocol`", help);
        return None;
    }
    let l4 = match fields.get("protocol") {
        Some(node) => decoder.keyword(node, &path.field("protocol"), Code::UnknownL4, &PROTOCOLS)?,
        None => Some(L4::Tcp),
    };
    let mut number = |name: &str| match fields.get(name) {
        Some(node) => decoder.port(node, &path.field(name), Code::BadPortRange, Dialect::Strict).map(Some),
        None => Some(None),
    };
    let (port, end) = (number("port"), number("endPort"));
    let (port, end) = (port?, end?);
    let end_span = fields.get("endPort").map_or(node.span, |node| node.span);
    let path = path.field("endPort");
    match (port, end) {
        (Some(low), Some(high)) if high < low => {
            let message = format!("the range ends at {high}, before it begins at {low}");
            decoder.say(
                Code::BadPortRange,
                end_span,
                &path,
                message,
                format!("write `port: {high}` and `endPort: {low}`"),
            );
            None
        }
        (None, Some(high)) => {
            let message = "`endPort` without `port`";
            decoder.say(Code::BadPortRange, end_span, &path, message, format!("write `port: 1` and `endPort: {high}`"));
            None
        }
        (Some(low), high) => Some(PortRange { l4, low, high: high.unwrap_or(low) }),
        (None, None) => Some(PortRange { l4, low: 0, high: u16::MAX }),
    }
}
