//! What a policy trie holds: for each prefix, the whole answer for every port.

use core::num::NonZeroU32;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Protocol, UnknownCode, coded_enum};

coded_enum! {
    /// What a rule, or the default, does.
    pub enum Action {
        /// Let through.
        Allow = 0 => "allow",
        /// Refuse.
        Deny = 1 => "deny",
    }
}

/// Names a rule; the agent keeps the table. Never 0, so that 0 can mean "no rule" in layouts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleId(pub NonZeroU32);

impl RuleId {
    /// From a layout's field, where 0 is no rule.
    #[inline(always)]
    pub const fn from_field(field: u32) -> Option<Self> {
        match NonZeroU32::new(field) {
            Some(id) => Some(Self(id)),
            None => None,
        }
    }
}

/// Codes of [`Entries`] in a trie value.
const KIND_NONE: u8 = 0;
const KIND_EVERY_PORT: u8 = 1;
const KIND_RANGE: u8 = 2;
const KIND_SEGMENTS: u8 = 3;
const KIND_ASKED: u8 = 4;

/// The value of a policy trie: what rules say of the ports of a prefix, and the default for all that they do not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Entry {
    kind: u8,
    default: u8,
    /// Of an inline rule.
    action: u8,
    /// Of an inline range.
    protocol: u8,
    /// Of an inline range, or the slot of a segment list.
    low_or_slot: u16,
    high: u16,
    /// Of an inline rule, or the first index of a segment list.
    rule_or_first: u32,
    /// Of a segment list.
    count: u32,
}

/// An [`Entry`], taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entries {
    /// No port is named.
    None,
    /// Every port of TCP and UDP has the same rule.
    EveryPort(Action, RuleId),
    /// One range of ports is named.
    Range(Segment),
    /// Several ranges are named.
    Segments(SegmentList),
    /// Of a name: no port is named, but the name may be asked for.
    Asked,
}

impl Entry {
    /// A value that says `entries`, and `default` for all else.
    pub const fn new(entries: Entries, default: Action) -> Self {
        let none = Self {
            kind: KIND_NONE,
            default: default.code(),
            action: 0,
            protocol: 0,
            low_or_slot: 0,
            high: 0,
            rule_or_first: 0,
            count: 0,
        };
        match entries {
            Entries::None => none,
            Entries::Asked => Self { kind: KIND_ASKED, ..none },
            Entries::EveryPort(action, rule) => {
                Self { kind: KIND_EVERY_PORT, action: action.code(), rule_or_first: rule.0.get(), ..none }
            }
            Entries::Range(segment) => Self {
                kind: KIND_RANGE,
                action: segment.action,
                protocol: segment.protocol,
                low_or_slot: segment.low,
                high: segment.high,
                rule_or_first: segment.rule,
                ..none
            },
            Entries::Segments(list) => Self {
                kind: KIND_SEGMENTS,
                low_or_slot: list.slot,
                rule_or_first: list.first,
                count: list.count,
                ..none
            },
        }
    }

    /// What the rules say.
    #[inline(always)]
    pub fn entries(&self) -> Result<Entries, UnknownCode> {
        match self.kind {
            KIND_NONE => Ok(Entries::None),
            KIND_ASKED => Ok(Entries::Asked),
            KIND_EVERY_PORT => {
                let rule = RuleId::from_field(self.rule_or_first).ok_or(UnknownCode(self.kind))?;
                Ok(Entries::EveryPort(self.action.try_into()?, rule))
            }
            KIND_RANGE => Ok(Entries::Range(Segment {
                low: self.low_or_slot,
                high: self.high,
                protocol: self.protocol,
                action: self.action,
                reserved: [0; 2],
                rule: self.rule_or_first,
            })),
            KIND_SEGMENTS => Ok(Entries::Segments(SegmentList {
                slot: self.low_or_slot,
                first: self.rule_or_first,
                count: self.count,
            })),
            other => Err(UnknownCode(other)),
        }
    }

    /// What happens to ports and protocols that no rule names.
    #[inline(always)]
    pub fn default_action(&self) -> Result<Action, UnknownCode> {
        self.default.try_into()
    }
}

/// A range of ports of one protocol, and the rule for it: an element of the `SEGMENTS` arrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Segment {
    /// First and last port, in host byte order.
    low: u16,
    high: u16,
    /// IP protocol number.
    protocol: u8,
    action: u8,
    reserved: [u8; 2],
    rule: u32,
}

impl Segment {
    /// `low..=high` of a protocol.
    pub const fn new(protocol: Protocol, low: u16, high: u16, action: Action, rule: RuleId) -> Self {
        Self { low, high, protocol: protocol.number(), action: action.code(), reserved: [0; 2], rule: rule.0.get() }
    }

    /// Whether this range begins at or before a port of a protocol, in the order of a segment list.
    #[inline(always)]
    pub const fn starts_by(&self, protocol: Protocol, port: u16) -> bool {
        let number = protocol.number();
        self.protocol < number || (self.protocol == number && self.low <= port)
    }

    /// Whether a port of a protocol is in this range.
    #[inline(always)]
    pub const fn contains(&self, protocol: Protocol, port: u16) -> bool {
        self.protocol == protocol.number() && self.low <= port && port <= self.high
    }

    /// The same range and action under another rule.
    #[must_use]
    pub const fn with_rule(self, rule: RuleId) -> Self {
        Self { rule: rule.0.get(), ..self }
    }

    /// What happens to ports in the range.
    #[inline(always)]
    pub fn action(&self) -> Result<Action, UnknownCode> {
        self.action.try_into()
    }

    /// The rule that says so.
    #[inline(always)]
    pub const fn rule(&self) -> Option<RuleId> {
        RuleId::from_field(self.rule)
    }
}

/// A run of segments, sorted by protocol and port, disjoint, in one array of the `SEGMENTS` map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentList {
    /// Index into the `SEGMENTS` map.
    pub slot: u16,
    /// Index of the first segment in that array.
    pub first: u32,
    /// How many, at most 65,536 for each protocol.
    pub count: u32,
}

const _: () = assert!(size_of::<Entry>() == 16 && align_of::<Entry>() == 4);
const _: () = assert!(size_of::<Segment>() == 12 && align_of::<Segment>() == 4);

#[cfg(test)]
mod tests {
    use super::*;

    const RULE: RuleId = RuleId(NonZeroU32::new(7).unwrap());

    #[test]
    fn a_trie_value_gives_back_what_was_put_in() {
        let entries = [
            Entries::None,
            Entries::Asked,
            Entries::EveryPort(Action::Deny, RULE),
            Entries::Range(Segment::new(Protocol::UDP, 53, 54, Action::Allow, RULE)),
            Entries::Segments(SegmentList { slot: 3, first: 1 << 20, count: 131_072 }),
        ];
        for entries in entries {
            for default in [Action::Allow, Action::Deny] {
                let entry = Entry::read_from_bytes(Entry::new(entries, default).as_bytes()).unwrap();
                assert_eq!(entry.entries(), Ok(entries));
                assert_eq!(entry.default_action(), Ok(default));
            }
        }
    }

    #[test]
    fn a_value_of_another_version_is_not_guessed_at() {
        let mut bytes: [u8; 16] = zerocopy::transmute!(Entry::new(Entries::None, Action::Allow));
        bytes[0] = 9;
        bytes[1] = 9;
        let entry = Entry::read_from_bytes(&bytes).unwrap();
        assert_eq!(entry.entries(), Err(UnknownCode(9)));
        assert_eq!(entry.default_action(), Err(UnknownCode(9)));
    }
}
