//! What a command was refused, counted, and the policy that would allow it.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::{IpAddr, SocketAddr},
};

use egress_common::Reason;
use serde::Serialize;

use crate::{
    compile::Names,
    dataplane::others::Other,
    events::Connection,
    explain::{Destination, Explainer},
    policy::{L4, RuleName},
    text::printable,
};

/// Most destinations that are told apart.
const MOST: usize = 1000;

/// What was refused so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    refused: BTreeMap<Key, Count>,
    /// Attempts at destinations beyond the most.
    others: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    verdict: &'static str,
    reason: &'static str,
    protocol: String,
    /// Of nothing, where a socket was refused.
    to: Option<(IpAddr, u16)>,
    /// What was asked for, where that was judged.
    asked: Option<String>,
}

#[derive(Debug, Default)]
struct Count {
    count: u64,
    rule: Option<RuleName>,
}

/// What was refused: fields are only ever added to the shape.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename = "summary")]
pub struct Summary {
    /// Each destination once.
    pub destinations: Vec<Refused>,
    /// Attempts at further destinations.
    pub others: u64,
    /// Documents that would allow all of it that documents can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_allow: Option<String>,
    /// Other filters of ours that judge the command, too.
    pub filters: Vec<Other>,
}

/// A destination that was refused, or would have been.
#[derive(Debug, Clone, Serialize)]
pub struct Refused {
    /// `deny` or `would_deny`.
    pub verdict: &'static str,
    /// `TCP`, `UDP`, or the name or number of another IP protocol.
    pub protocol: String,
    /// Why.
    pub reason: &'static str,
    /// Where to; absent where a socket was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub address: Option<IpAddr>,
    /// Port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Its name, if the policy has one for it; of a question, what it asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// How often.
    pub count: u64,
    /// The rule that decided; null if none did.
    pub rule: Option<RuleName>,
}

/// Whether a question to a server of DNS was refused for what it asks for.
fn is_question(reason: &str) -> bool {
    reason == Reason::DnsQuery.as_str()
}

impl Tally {
    pub(super) fn add(&mut self, connection: &Connection) {
        let Connection { verdict, reason, ref protocol, ref destination, ref rule, count, .. } = *connection;
        let to = destination.as_ref().map(|to| (to.address, to.port));
        let asked = destination.as_ref().filter(|_| is_question(reason)).and_then(|to| to.host.clone());
        let key = Key { verdict, reason, protocol: protocol.clone(), to, asked };
        if self.refused.len() >= MOST && !self.refused.contains_key(&key) {
            self.others += count;
            return;
        }
        let counted = self.refused.entry(key).or_default();
        counted.count += count;
        counted.rule.clone_from(rule);
    }

    /// Whether nothing was refused.
    pub(super) fn is_empty(&self) -> bool {
        self.refused.is_empty()
    }

    /// Without an explainer, nothing is said of what would allow it.
    pub(super) fn summary(self, explainer: Option<&Explainer<'_>>, names: &Names) -> Summary {
        let host = |address: &IpAddr| {
            let named = names.0.iter().find(|(_, addresses)| addresses.contains(address));
            named.map(|(name, _)| name.clone())
        };
        let refused = self.refused.into_iter().map(|(key, Count { count, rule })| {
            let Key { verdict, reason, protocol, to, asked } = key;
            let (address, port) = to.unzip();
            let host = if is_question(reason) { asked } else { address.as_ref().and_then(host) };
            Refused { verdict, protocol, reason, address, port, host, count, rule }
        });
        let destinations: Vec<Refused> = refused.collect();
        let documents: BTreeSet<String> =
            destinations.iter().filter_map(|refused| refused.to_allow(explainer?)).collect();
        let documents: Vec<String> = documents.into_iter().collect();
        let to_allow = (!documents.is_empty()).then(|| documents.join("---\n"));
        Summary { destinations, others: self.others, to_allow, filters: Vec::new() }
    }
}

impl Refused {
    fn to_allow(&self, explainer: &Explainer<'_>) -> Option<String> {
        // What a question would be followed by is not known.
        if self.reason == Reason::Bypass.as_str() || is_question(self.reason) {
            return None;
        }
        let (address, port, protocol) = (self.address?, self.port?, L4::parse(&self.protocol)?);
        let to = Destination { address, port, protocol, host: self.host.clone() };
        explainer.explain(&to).to_allow
    }
}

impl Summary {
    /// Whether nothing was refused.
    pub fn is_empty(&self) -> bool {
        self.destinations.is_empty()
    }
}

/// For a person.
impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = self.destinations.len();
        writeln!(f, "refused: {count} destination{}", if count == 1 { "" } else { "s" })?;
        for refused in &self.destinations {
            write!(f, "{:>6} × {} {} ", refused.count, refused.verdict, refused.protocol)?;
            match refused.address.zip(refused.port) {
                Some(to) => write!(f, "{}", SocketAddr::from(to))?,
                None => write!(f, "{}", refused.reason)?,
            }
            match &refused.host {
                Some(host) if is_question(refused.reason) => write!(f, ", asked for {}", printable(host))?,
                Some(host) => write!(f, " ({})", printable(host))?,
                None => {}
            }
            match &refused.rule {
                Some(rule) => writeln!(f, " by {}", printable(&rule.to_string()))?,
                None => writeln!(f)?,
            }
        }
        if self.others > 0 {
            writeln!(f, "{:>6} × others", self.others)?;
        }
        match &self.to_allow {
            Some(documents) => write!(f, "to allow it, save this and name it by --policies:\n\n{documents}"),
            None => Ok(()),
        }
    }
}
