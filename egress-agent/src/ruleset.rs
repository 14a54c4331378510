//! What the kernel is to hold, as values: the last step before [`crate::dataplane`].
//!
//! A [`Ruleset`] is logical. It names no map, file descriptor or kernel id, and it answers [`egress_common::decide`]
//! itself, which is how `explain` and the tests see exactly what the kernel sees.

use std::{net::IpAddr, num::NonZeroU32};

use egress_common::{
    Action, Address, Claim, Claims, Decision, Entries, Entry, Flow, NameId, NameKey, NamedRules, Place, Protocol,
    RuleId, Rules, SHARED, Scope, Segment, SegmentList, Settings, Verdict, View, decide, decide_query, find_segment,
    rule_by_name,
};
use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;

use crate::{policy::RuleName, prefix::Prefix};

/// The rules of one scope.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ruleset {
    /// The rules that the views name: rule `n` of a view is element `n - 1`.
    pub rules: Vec<RuleName>,
    /// Decides what happens.
    pub enforcing: Table,
    /// All policies together; there only if an Audit policy has a part in it.
    pub with_audit: Option<Table>,
}

impl Ruleset {
    /// Judges a flow as the kernel would that has learnt nothing of names.
    pub fn decide(&self, flow: &Flow) -> Decision {
        self.decide_named(flow, None)
    }

    /// Judges a flow as the kernel would that has learnt that its destination was an answer for a name.
    pub fn decide_named(&self, flow: &Flow, name: Option<&NameKey>) -> Decision {
        decide(&Asked { ruleset: self, name }, flow)
    }

    /// Whether some name would allow a flow, if its destination was an answer for it.
    pub fn may_allow_by_name(&self, flow: &Flow) -> bool {
        let names = self.enforcing.names().filter_map(|(name, _)| NameKey::from_bytes_of_name(name));
        names.into_iter().any(|name| self.decide_named(flow, Some(&name)).verdict != Verdict::Deny)
    }

    /// Judges a question to a server of DNS for a name.
    pub fn decide_query(&self, name: &NameKey) -> Decision {
        decide_query(&Asked { ruleset: self, name: Some(name) }, Self::PLACE, Some(ASKED))
    }

    /// Whether it matters what names its workloads ask for.
    pub fn judges_queries(&self) -> bool {
        self.views(Self::SCOPE).any(|(_, table)| table.settings.asks_only_named())
    }

    /// Whether it names names, so that it matters what is learnt of them.
    pub fn has_names(&self) -> bool {
        self.views(Self::SCOPE).any(|(_, table)| table.settings.has_names())
    }

    /// Whether its workloads resolve names for the whole host.
    pub fn serves_dns(&self) -> bool {
        self.enforcing.settings.serves_dns()
    }

    /// Of workloads that resolve names for the whole host.
    pub(crate) fn with_dns_service(mut self) -> Self {
        for table in [Some(&mut self.enforcing), self.with_audit.as_mut()].into_iter().flatten() {
            table.settings = table.settings.with_dns_service();
        }
        self
    }

    /// Whose answers are believed, where names matter.
    pub fn resolvers(&self) -> impl Iterator<Item = IpAddr> {
        let is_wanted = self.has_names();
        self.views(Self::SCOPE).flat_map(|(_, table)| &table.resolvers).copied().filter(move |_| is_wanted)
    }

    /// The name of the rule that decided.
    pub fn rule(&self, decision: &Decision) -> Option<&RuleName> {
        decision.rule.and_then(|rule| self.name(rule))
    }

    /// The name of a rule of this ruleset.
    pub fn name(&self, rule: RuleId) -> Option<&RuleName> {
        self.rules.get(usize::try_from(rule.0.get() - 1).ok()?)
    }

    /// SHA-256 over all that decides: equal for documents that mean the same, wherever they are written.
    pub fn hash(&self) -> [u8; 32] {
        let mut hasher = Sha256::new();
        for rule in &self.rules {
            hasher.update(rule.to_string());
            hasher.update([0]);
        }
        for table in [Some(&self.enforcing), self.with_audit.as_ref()] {
            hasher.update([u8::from(table.is_some())]);
            if let Some(table) = table {
                table.hash(&mut hasher);
            }
        }
        hasher.finalize().into()
    }

    /// The scope under which a ruleset answers by itself.
    pub const SCOPE: Scope = Scope::new(0);

    /// Where a ruleset answers by itself.
    pub const PLACE: Place = Place::Scope(Self::SCOPE);

    /// The views there are as those of a scope, each with the index it then has in the `POLICY` map.
    pub fn views(&self, scope: Scope) -> impl Iterator<Item = (View, &Table)> {
        let with_audit = self.with_audit.as_ref().map(|table| (scope.with_audit(), table));
        [(scope.enforcing(), &self.enforcing)].into_iter().chain(with_audit)
    }

    fn table(&self, view: View) -> Option<&Table> {
        self.views(Self::SCOPE).find_map(|(index, table)| (index == view).then_some(table))
    }
}

/// A ruleset that is asked about a flow whose destination was an answer for a name. Both views in one [`Rules`]: the slot of a
/// segment list, which is 0 in a [`Table`], becomes the index of its view.
struct Asked<'a> {
    ruleset: &'a Ruleset,
    name: Option<&'a NameKey>,
}

impl Rules for Asked<'_> {
    fn entry(&self, view: View, address: Address) -> Option<Entry> {
        let slot = u16::try_from(view.index()).ok()?;
        Some(in_slot(self.ruleset.table(view)?.entry(address), slot))
    }

    fn segment(&self, list: SegmentList, protocol: Protocol, port: u16) -> Option<Segment> {
        let (_, table) = self.ruleset.views(Ruleset::SCOPE).find(|(view, _)| view.index() == u32::from(list.slot))?;
        let get = |index: u32| table.segments.get(usize::try_from(list.first + index).ok()?).copied();
        get(find_segment(list.count, protocol, port, get)?)
    }

    fn settings(&self, view: View) -> Option<Settings> {
        Some(self.ruleset.table(view)?.settings)
    }

    /// A flow that is only asked about has no socket that could have heard anything.
    fn is_reply(&self, _: &Flow) -> bool {
        false
    }

    fn rule_by_name(&self, view: View, flow: &Flow) -> Option<RuleId> {
        rule_by_name(self, view, flow, SHARED)
    }

    fn named(&self, view: View, _: NameId) -> Option<Entry> {
        let (slot, table) = (u16::try_from(view.index()).ok()?, self.ruleset.table(view)?);
        let value = self.name.and_then(|name| table.name_value(name.as_bytes_of_name()));
        Some(value.map_or(NOTHING, |value| in_slot(table.values[value as usize], slot)))
    }
}

/// What is said of a name that no rule knows.
const NOTHING: Entry = Entry::new(Entries::None, Action::Deny);
/// The only name there is.
const ASKED: NameId = NameId::new(1).unwrap();

impl NamedRules for Asked<'_> {
    fn claims(&self, _: &Flow, _: u64) -> (Claims, u32) {
        let claims = self.name.map_or(Claims::default(), |_| Claims::only(Claim::new(ASKED, u32::MAX)));
        (claims, 0)
    }
}

/// The same value, with its segments in another slot of the `SEGMENTS` map.
pub fn in_slot(entry: Entry, slot: u16) -> Entry {
    match (entry.entries(), entry.default_action()) {
        (Ok(Entries::Segments(list)), Ok(default)) => {
            Entry::new(Entries::Segments(SegmentList { slot, ..list }), default)
        }
        _ => entry,
    }
}

/// A name or pattern as [`egress_common::NameKey`] has it, with the index of its value.
pub(crate) type NamedValue = (Box<[u8]>, u32);

/// One view: the contents of a trie and of its segments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Sorted; `::/0` and `::ffff:0:0/96` are always there, so every look-up hits.
    prefixes: Vec<Prefix>,
    /// For each prefix, the index of its value.
    value_of: Vec<u32>,
    /// For each prefix, the index of the longest shorter one that covers it; its own for a root.
    parents: Vec<u32>,
    /// The distinct values; segment lists are in slot 0.
    values: Vec<Entry>,
    segments: Vec<Segment>,
    /// Sorted.
    names: Vec<NamedValue>,
    settings: Settings,
    resolvers: Vec<IpAddr>,
}

impl Table {
    /// From sorted prefixes with the roots among them, each with the index of its value.
    pub(crate) fn new(
        contents: Vec<(Prefix, u32)>,
        names: Vec<NamedValue>,
        values: Vec<Entry>,
        segments: Vec<Segment>,
        default: Action,
    ) -> Self {
        let (prefixes, value_of): (Vec<Prefix>, Vec<u32>) = contents.into_iter().unzip();
        let settings = said_of_names(Settings::new(default), &names);
        let (parents, resolvers) = (parents(&prefixes), Vec::new());
        Self { prefixes, value_of, parents, values, segments, names, settings, resolvers }
    }

    /// With what holds beside the rules.
    pub(crate) fn with_settings(self, settings: Settings) -> Self {
        Self { settings: said_of_names(settings, &self.names), ..self }
    }

    /// With whom it believes.
    pub(crate) fn with_resolvers(self, mut resolvers: Vec<IpAddr>) -> Self {
        resolvers.sort_unstable();
        resolvers.dedup();
        Self { resolvers, ..self }
    }

    /// Every name and pattern, as [`egress_common::NameKey`] has them, with the index of its value; sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = (&[u8], u32)> {
        self.names.iter().map(|(name, value)| (&**name, *value))
    }

    /// The index of the value of the closest pattern that covers a name, or another pattern.
    pub fn name_value(&self, name: &[u8]) -> Option<u32> {
        let found = |length| self.names.binary_search_by(|(known, _)| (**known).cmp(&name[..length])).ok();
        (1..=name.len()).rev().find_map(found).map(|index| self.names[index].1)
    }

    /// Every prefix with its value, sorted by address and then from short to long.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = (Prefix, u32)> {
        self.prefixes.iter().copied().zip(self.value_of.iter().copied())
    }

    /// The distinct values that [`Table::entries`] points to.
    pub fn values(&self) -> &[Entry] {
        &self.values
    }

    /// What the segment lists of the values point to.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// What holds beside the rules.
    pub const fn settings(&self) -> Settings {
        self.settings
    }

    /// The longest prefix that covers an address: the last that begins at or before it, or one around that.
    fn entry(&self, address: Address) -> Entry {
        let bits = address.to_bits();
        let mut index = self.prefixes.partition_point(|prefix| prefix.bits() <= bits) - 1;
        while !self.prefixes[index].contains(address) {
            index = self.parents[index] as usize;
        }
        self.values[self.value_of[index] as usize]
    }

    fn hash(&self, hasher: &mut Sha256) {
        hasher.update((self.prefixes.len() as u64).to_be_bytes());
        for (prefix, value) in self.entries() {
            hasher.update(prefix.key().as_bytes());
            hasher.update(value.to_be_bytes());
        }
        hasher.update((self.values.len() as u64).to_be_bytes());
        hasher.update(self.values.as_bytes());
        hasher.update(self.segments.as_bytes());
        hasher.update(self.settings.as_bytes());
        // Where nothing is named, nothing is learnt, and whom it would be learnt from makes no difference.
        for (name, value) in &self.names {
            hasher.update([u8::try_from(name.len()).unwrap_or(u8::MAX)]);
            hasher.update(name);
            hasher.update(value.to_be_bytes());
        }
        for resolver in self.resolvers.iter().filter(|_| !self.names.is_empty()) {
            hasher.update(Address::from(*resolver).as_bytes());
        }
    }
}

fn said_of_names(settings: Settings, names: &[NamedValue]) -> Settings {
    if names.is_empty() { settings } else { settings.with_names() }
}

fn parents(prefixes: &[Prefix]) -> Vec<u32> {
    let mut open: Vec<u32> = Vec::new();
    let mut parents = Vec::with_capacity(prefixes.len());
    for (index, &prefix) in (0..).zip(prefixes) {
        while open.pop_if(|&mut top| !prefixes[top as usize].covers(prefix)).is_some() {}
        parents.push(open.last().copied().unwrap_or(index));
        open.push(index);
    }
    parents
}

/// The id of the rule at a place of [`Ruleset::rules`].
pub(crate) fn rule_id(index: usize) -> RuleId {
    let number = u32::try_from(index + 1).ok().and_then(NonZeroU32::new);
    RuleId(number.expect("documents hold fewer than four billion rules: files are bounded"))
}
