//! Explains a decision: what is decided, by which rule, what the other rules would have said, and what would allow it.
//!
//! The decision itself is [`egress_common::decide`] over the compiled rules, as in the kernel. Only the story around it
//! is told here.

use std::{collections::HashSet, net::IpAddr};

use egress_common::{Address, Decision, Flow, NameEnd, NameKey, Protocol, Verdict};
use ipnet::IpNet;
use serde::Serialize;

use crate::{
    compile::{
        Block, CompileError, Context, Part, Statement, assemble,
        combine::{Combined, combine, policy_statements, service_statements},
    },
    policy::{EgressPolicy, L4, Mode, ObjectName, PolicySet, RuleName, write},
    prefix::Prefix,
    ruleset::Ruleset,
    text::printable_bytes,
    workload::{Workload, selects},
};

pub mod ask;

/// A destination that is asked about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Destination {
    /// Where to.
    pub address: IpAddr,
    /// Port.
    pub port: u16,
    /// TCP or UDP.
    pub protocol: L4,
    /// The name it was given by.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

impl Destination {
    /// The question for [`egress_common::decide`].
    pub fn flow(&self) -> Flow {
        let protocol = match self.protocol {
            L4::Tcp => Protocol::TCP,
            L4::Udp => Protocol::UDP,
        };
        Flow { place: Ruleset::PLACE, protocol, address: self.address.into(), port: self.port }
    }

    /// The name that the kernel will have learnt for the address, if it was given by name.
    fn learnt(&self) -> Option<NameKey> {
        let host = self.host.as_deref().filter(|_| Address::from(self.address).reserved().is_none());
        host.and_then(|host| NameKey::of(host, NameEnd::Exact))
    }
}

/// The answer: fields are only ever added to the shape.
#[derive(Debug, Clone, Serialize)]
pub struct Explanation {
    /// `allow`, `deny` or `would_deny`.
    pub verdict: &'static str,
    /// Why.
    pub reason: &'static str,
    /// The rule that decided; null if none did.
    pub rule: Option<RuleName>,
    /// What was asked.
    pub to: Destination,
    /// The `EgressPolicy` documents that select the workload.
    pub policies: Vec<String>,
    /// The other rules that speak of the destination.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub other_rules: Option<Vec<OtherRule>>,
    /// A document that would allow it, where one can.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to_allow: Option<String>,
    /// What becomes of a question to a server of DNS for the name, where a policy says that not every name may be asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<&'static str>,
}

/// A rule that did not decide.
#[derive(Debug, Clone, Serialize)]
pub struct OtherRule {
    /// Its identity.
    pub rule: RuleName,
    /// `allow` or `deny`.
    pub effect: &'static str,
    /// What kept it from deciding.
    pub why_not: WhyNot,
}

/// What kept a rule from deciding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WhyNot {
    /// It names the address, with other ports.
    Port,
    /// It names address and port, of the other protocol.
    Protocol,
    /// It names the host, which has this address only by other accounts.
    Address,
    /// No policy of the workload uses its `ServiceEntry`, or none may see it.
    NotImported,
    /// It belongs to an Audit policy.
    Audit,
    /// Another rule is heard first.
    LowerPrecedence,
}

impl WhyNot {
    /// In words.
    const fn text(self) -> &'static str {
        match self {
            Self::Port => "names other ports",
            Self::Protocol => "names the other protocol",
            Self::Address => "names the host, but not this address",
            Self::NotImported => "is not among the services of this workload",
            Self::Audit => "belongs to an Audit policy",
            Self::LowerPrecedence => "another rule is heard first",
        }
    }
}

/// The policies compiled for one workload, ready to be asked.
#[derive(Debug)]
pub struct Explainer<'a> {
    policies: &'a PolicySet,
    workload: Workload,
    context: &'a Context,
    ruleset: Ruleset,
    /// The names of the statements of the enforcing view.
    heard: HashSet<RuleName>,
    /// Those of them that no document has.
    builtins: Vec<Statement>,
    selecting: Vec<&'a EgressPolicy>,
    /// Those that select and only audit.
    auditing: HashSet<&'a ObjectName>,
    /// The names of those that select.
    names: Vec<String>,
}

impl<'a> Explainer<'a> {
    /// Compiles.
    pub fn new(policies: &'a PolicySet, workload: Workload, context: &'a Context) -> Result<Self, CompileError> {
        let enforcing = combine(policies, &workload, context, Mode::Enforce).unwrap_or_else(Combined::allow_any);
        let with_audit = combine(policies, &workload, context, Mode::Audit);
        let ruleset = assemble(&enforcing, with_audit.as_ref())?;
        let selecting: Vec<&EgressPolicy> =
            policies.egress_policies.iter().filter(|policy| selects(policy, &workload)).collect();
        let audits = selecting.iter().filter(|policy| policy.mode == Mode::Audit);
        let auditing = audits.map(|policy| &policy.object).collect();
        let names = selecting.iter().map(|policy| policy.object.to_string()).collect();
        let heard = enforcing.statements.iter().map(|statement| statement.name.clone()).collect();
        let builtins = enforcing.statements.into_iter().filter(is_builtin).collect();
        Ok(Self { policies, workload, context, ruleset, heard, builtins, selecting, auditing, names })
    }

    /// How much it holds: rules and prefixes.
    pub fn size(&self) -> usize {
        let prefixes: usize = self.ruleset.views(Ruleset::SCOPE).map(|(_, table)| table.entries().len()).sum();
        self.ruleset.rules.len() + prefixes
    }

    /// Only the answer.
    pub fn answer(&self, to: &Destination) -> Explanation {
        self.tell(to, self.decide(to))
    }

    /// The answer with the rules that did not decide, and the document that would allow what is refused.
    pub fn explain(&self, to: &Destination) -> Explanation {
        let decision = self.decide(to);
        let to_allow = match decision.verdict {
            Verdict::Deny => self.to_allow(to, decision),
            // No policy is there to be opened, so an entry for `--default Deny` is what will be needed.
            Verdict::WouldDeny if self.selecting.is_empty() => self.to_allow(to, decision),
            Verdict::Allow if self.is_unaskable(to) => self.to_allow(to, decision),
            Verdict::Allow | Verdict::WouldDeny => None,
        };
        let other_rules = Some(self.other_rules(to, self.ruleset.rule(&decision)));
        Explanation { other_rules, to_allow, ..self.tell(to, decision) }
    }

    fn decide(&self, to: &Destination) -> Decision {
        self.ruleset.decide_named(&to.flow(), to.learnt().as_ref())
    }

    fn tell(&self, to: &Destination, decision: Decision) -> Explanation {
        Explanation {
            verdict: decision.verdict.as_str(),
            reason: decision.reason.as_str(),
            rule: self.ruleset.rule(&decision).cloned(),
            to: to.clone(),
            policies: self.names.clone(),
            other_rules: None,
            to_allow: None,
            query: self.query(to).map(Verdict::as_str),
        }
    }

    /// See [`Explanation::query`].
    fn query(&self, to: &Destination) -> Option<Verdict> {
        let host = to.host.as_deref().filter(|_| self.ruleset.judges_queries())?;
        Some(self.ruleset.decide_query(&NameKey::of(host, NameEnd::Exact)?).verdict)
    }

    fn other_rules(&self, to: &Destination, decided: Option<&RuleName>) -> Vec<OtherRule> {
        let of_entries = self.policies.service_entries.iter().flat_map(|entry| {
            let names_host =
                to.host.as_ref().is_some_and(|host| entry.hosts.iter().any(|pattern| pattern.covers(host)));
            service_statements(entry, &self.context.names).map(move |statement| (statement, names_host))
        });
        let of_policies = self.selecting.iter().flat_map(|policy| policy_statements(policy, &self.context.names));
        let all =
            of_entries.chain(of_policies.chain(self.builtins.iter().cloned()).map(|statement| (statement, false)));
        let others = all.filter(|(statement, _)| Some(&statement.name) != decided);
        others
            .filter_map(|(statement, names_host)| {
                let why_not = self.why_not(&statement, to, names_host)?;
                Some(OtherRule { rule: statement.name, effect: statement.action.as_str(), why_not })
            })
            .collect()
    }

    /// Why a statement did not decide; `None` if it does not speak of the destination at all.
    fn why_not(&self, statement: &Statement, to: &Destination, names_host: bool) -> Option<WhyNot> {
        match reach(statement, to) {
            Reach::Elsewhere => names_host.then_some(WhyNot::Address),
            Reach::OtherPorts => Some(WhyNot::Port),
            Reach::OtherProtocol => Some(WhyNot::Protocol),
            Reach::Here if self.heard.contains(&statement.name) => Some(WhyNot::LowerPrecedence),
            Reach::Here => Some(match &statement.name {
                RuleName::Document { object, .. } if self.auditing.contains(object) => WhyNot::Audit,
                RuleName::Document { .. } | RuleName::Builtin(_) => WhyNot::NotImported,
            }),
        }
    }

    fn is_unaskable(&self, to: &Destination) -> bool {
        self.query(to) == Some(Verdict::Deny)
    }

    /// A document that allows what the default refuses, or a question for the name. What a `deny` refuses, no document can open,
    /// nor `100::/64`, and none can name port 0.
    fn to_allow(&self, to: &Destination, decision: Decision) -> Option<String> {
        let is_denied_by_rule = decision.verdict != Verdict::Allow && decision.rule.is_some();
        if is_denied_by_rule || to.port == 0 || Address::from(to.address).is_discard_only() {
            return None;
        }
        let wanted = write::Wanted {
            address: to.address,
            port: to.port,
            l4: to.protocol,
            host: to.host.as_deref(),
            is_unaskable: self.is_unaskable(to),
        };
        let enforcing = self.selecting.iter().find(|policy| policy.mode == Mode::Enforce);
        Some(if let Some(policy) = enforcing {
            write::egress_policy(&wanted, policy)
        } else {
            let namespace = self.workload.pod.as_ref().map_or("default", |pod| &pod.namespace);
            write::service_entry(&wanted, namespace)
        })
    }
}

fn is_builtin(statement: &Statement) -> bool {
    matches!(statement.name, RuleName::Builtin(_))
}

/// How near a statement comes to a destination, from far to near.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reach {
    Elsewhere,
    OtherPorts,
    OtherProtocol,
    Here,
}

fn reach(statement: &Statement, to: &Destination) -> Reach {
    statement.parts.iter().map(|part| reach_of(part, to)).max().unwrap_or(Reach::Elsewhere)
}

fn reach_of(part: &Part, to: &Destination) -> Reach {
    let is_named = to.host.as_ref().is_some_and(|host| part.hosts.iter().any(|pattern| pattern.covers(host)));
    if !is_named && !part.blocks.iter().any(|block| is_in(block, to.address)) {
        return Reach::Elsewhere;
    }
    let with_port = || part.ports.iter().filter(|ports| (ports.low..=ports.high).contains(&to.port));
    if with_port().any(|ports| ports.l4 == to.protocol) {
        Reach::Here
    } else if with_port().next().is_some() {
        Reach::OtherProtocol
    } else {
        Reach::OtherPorts
    }
}

fn is_in(block: &Block, address: IpAddr) -> bool {
    let address = Prefix::from(address);
    let covers = |net: IpNet| {
        let prefix = Prefix::from(net);
        // IPv4 is a root of its own: a prefix around it does not reach into it.
        prefix.covers(address) && (Prefix::V4_ROOT.covers(prefix) == Prefix::V4_ROOT.covers(address))
    };
    covers(block.cidr) && !block.except.iter().any(|&net| covers(net))
}

/// A few lines for a person.
impl std::fmt::Display for Explanation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let to = &self.to;
        let socket = std::net::SocketAddr::new(to.address, to.port);
        let host = to.host.as_ref().map(|host| format!(" ({host})")).unwrap_or_default();
        writeln!(f, "{}: {} {socket}{host}", self.verdict.to_uppercase(), to.protocol.as_str())?;
        match (&self.rule, self.reason) {
            (Some(rule), _) => writeln!(f, "  by {}", located(rule))?,
            (None, "no_rule") => writeln!(f, "  by the default: no rule names it")?,
            (None, reason) => writeln!(f, "  reason: {reason}")?,
        }
        if !self.policies.is_empty() {
            writeln!(f, "  policies of this workload: {}", self.policies.join(", "))?;
        }
        let question = match self.query {
            Some("deny") => Some("may not be asked for"),
            Some("would_deny") => Some("may not be asked for, once the Audit policies enforce"),
            _ => None,
        };
        if let Some(question) = question {
            writeln!(f, "  its name {question} (`dns.queries: Named`): no policy names it")?;
        }
        for other in self.other_rules.iter().flatten() {
            writeln!(f, "  not by {} ({}): {}", located(&other.rule), other.effect, other.why_not.text())?;
        }
        match &self.to_allow {
            Some(document) => write!(f, "  to allow it, add:\n\n{document}"),
            None => Ok(()),
        }
    }
}

fn located(rule: &RuleName) -> String {
    match rule {
        RuleName::Document { at, .. } => {
            format!("{rule} ({}:{})", printable_bytes(&*at.file), at.line)
        }
        RuleName::Builtin(_) => rule.to_string(),
    }
}

/// Of the answers for the addresses of one name the one that counts, since a client may take any of them: the first that
/// is refused, else the first that would be.
pub fn worst(answers: impl IntoIterator<Item = Explanation>) -> Option<Explanation> {
    const WORST_FIRST: [Verdict; 3] = [Verdict::Deny, Verdict::WouldDeny, Verdict::Allow];
    let rank = |answer: &Explanation| WORST_FIRST.iter().position(|verdict| verdict.as_str() == answer.verdict);
    answers.into_iter().min_by_key(rank)
}

/// Whether the workload is refused.
pub fn is_denied(explanation: &Explanation) -> bool {
    explanation.verdict == Verdict::Deny.as_str()
}
