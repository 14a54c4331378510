//! `to`: destinations by prefix or name.

use ipnet::IpNet;

use super::{Code, Decoder, Dialect, FieldPath, Fields, Node, quoted, rules::Effect, rules::not_empty};
use crate::policy::{HostPattern, Peer, address::network, names::host_pattern, service_entry::warn_of_host_bits};

/// Reads the list.
pub(super) fn decode(
    decoder: &mut Decoder<'_>,
    node: &Node<'_>,
    path: &FieldPath<'_>,
    effect: Effect,
) -> Option<Vec<Peer>> {
    let items = decoder.items(node, path)?;
    not_empty(decoder, items, node, path, "every address");
    let mut peers = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        peers.extend(peer(decoder, item, &path.item(index), effect));
    }
    Some(peers)
}

fn peer(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>, effect: Effect) -> Option<Peer> {
    let fields = decoder.fields(node, path, effect.peer(), Dialect::Strict)?;
    match (fields.get("cidr"), fields.get("host")) {
        (Some(cidr), None) => {
            let cidr = prefix(decoder, cidr, &path.field("cidr"))?;
            let except = except(decoder, &fields, cidr, &path.field("except"))?;
            Some(Peer::Cidr { cidr, except })
        }
        (None, Some(host)) => {
            if let Some(span) = fields.key("except") {
                let message = "`except` takes prefixes out of a `cidr`, and this is a `host`";
                decoder.say(
                    Code::ExceptOutside,
                    span,
                    &path.field("except"),
                    message,
                    "deny the prefixes in `spec.deny`",
                );
            }
            self::host(decoder, host, &path.field("host"), effect).map(Peer::Host)
        }
        (Some(_), Some(_)) => {
            let help = "write two items, one with `cidr` and one with `host`";
            decoder.say(Code::BadPeer, node.span, path, "an item with both `cidr` and `host`", help);
            None
        }
        (None, None) => {
            let help = "write `cidr: 203.0.113.0/24` or `host: db.example.com`; leave out `to` for every address";
            decoder.say(Code::BadPeer, node.span, path, "an item with neither `cidr` nor `host`", help);
            None
        }
    }
}

fn prefix(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>) -> Option<IpNet> {
    let text = decoder.text(node, path)?;
    match network(text) {
        Ok(read) => {
            warn_of_host_bits(decoder, text, read, node.span, path);
            Some(read.net)
        }
        Err(bad) => {
            let help = if host_pattern(text).is_ok() { "write names as `host`" } else { bad.help };
            decoder.say(Code::BadCidr, node.span, path, bad.message, help);
            None
        }
    }
}

fn except(decoder: &mut Decoder<'_>, fields: &Fields<'_>, cidr: IpNet, path: &FieldPath<'_>) -> Option<Vec<IpNet>> {
    let Some(node) = fields.get("except") else { return Some(Vec::new()) };
    let mut except = Vec::new();
    for (index, item) in decoder.items(node, path)?.iter().enumerate() {
        let path = path.item(index);
        let Some(net) = prefix(decoder, item, &path) else { continue };
        if !cidr.contains(&net) {
            let message = format!("`{net}` is not within `{cidr}`, so there is nothing to take out");
            let help = "write it below the `cidr` that holds it, or delete it";
            decoder.say(Code::ExceptOutside, item.span, &path, message, help);
        }
        except.push(net);
    }
    Some(except)
}

fn host(decoder: &mut Decoder<'_>, node: &Node<'_>, path: &FieldPath<'_>, effect: Effect) -> Option<HostPattern> {
    if effect == Effect::Deny {
        let message = "a deny by name: an address is shared by many names, so it would not do what it says";
        let help = "deny prefixes with `cidr`, or allow only the names that are wanted";
        decoder.say(Code::HostInDeny, node.span, path, message, help);
        return None;
    }
    let text = decoder.text(node, path)?;
    match host_pattern(text) {
        Ok(HostPattern::Ending(end)) => {
            let message = format!("{} is a wildcard that is only part of a label", quoted(text));
            let help = format!("write `*.{}`", end.trim_start_matches('-'));
            decoder.say(Code::BadPeerHost, node.span, path, message, help);
            None
        }
        Ok(HostPattern::Exact(name)) if name.bytes().all(|b| b.is_ascii_digit()) => {
            decoder.say(
                Code::BadPeerHost,
                node.span,
                path,
                format!("{} is a number", quoted(text)),
                "write a DNS name",
            );
            None
        }
        Ok(pattern) => Some(pattern),
        Err(bad) => {
            let help = if network(text).is_ok() { "write addresses as `cidr`".to_owned() } else { bad.help };
            decoder.say(Code::BadPeerHost, node.span, path, bad.message, help);
            None
        }
    }
}
