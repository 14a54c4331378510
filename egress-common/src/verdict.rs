//! The answer to a question, and why it is the answer.

use crate::{Refusal, RuleId, coded_enum};

coded_enum! {
    /// What happens to a flow.
    #[must_use = "a verdict that is not used lets the connection through"]
    pub enum Verdict {
        /// It goes through.
        Allow = 0 => "allow",
        /// It is refused.
        Deny = 1 => "deny",
        /// It goes through, and an Audit policy would have refused it.
        WouldDeny = 2 => "would_deny",
    }
}

coded_enum! {
    /// Why a verdict was given. Codes are stable; a retired code is never given to another reason.
    pub enum Reason {
        /// A rule names the destination.
        Rule = 0 => "rule",
        /// A rule names a name that the destination was an answer for.
        Name = 1 => "name",
        /// A datagram back to a peer that the socket has received from.
        Reply = 2 => "reply",
        /// No rule names the destination; the default decided.
        NoRule = 3 => "no_rule",
        /// The agent has yet to place the cgroup.
        UnknownWorkload = 4 => "unknown_workload",
        /// A socket of a protocol that rules cannot judge.
        SocketKind = 5 => "socket_kind",
        /// A question to a server of DNS for a name that no rule knows, or that cannot be read.
        DnsQuery = 6 => "dns_query",
        /// The rules could not be read; see the failure table of the documentation.
        Fault = 7 => "fault",
        /// Packets would go elsewhere than to the destination that rules judge, or claim to come from somebody else.
        Bypass = 8 => "bypass",
    }
}

/// A verdict with its reason and its rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a decision that is not used lets the connection through"]
pub struct Decision {
    /// What happens.
    pub verdict: Verdict,
    /// Why.
    pub reason: Reason,
    /// The rule that decided; `None` unless the reason is [`Reason::Rule`] or [`Reason::Name`].
    pub rule: Option<RuleId>,
    /// What the call returns if it is refused.
    pub refusal: Refusal,
}

impl Decision {
    /// No rules apply to the task.
    pub const EXEMPT: Self = Self::new(Verdict::Allow, Reason::NoRule);

    /// It is not known which rules apply to the task: refused until the agent has placed its cgroup.
    pub const UNKNOWN_WORKLOAD: Self = Self::new(Verdict::Deny, Reason::UnknownWorkload);

    /// The rules could not be read: refused, since a filter that cannot answer must not guess.
    pub const FAULT: Self = Self::new(Verdict::Deny, Reason::Fault);

    /// Without a rule; refused calls return `EPERM`.
    #[inline(always)]
    pub const fn new(verdict: Verdict, reason: Reason) -> Self {
        Self { verdict, reason, rule: None, refusal: Refusal::Eperm }
    }
}
