//! Flattening: the value of each prefix holds the merged result of every rule that covers it, so one trie look-up is
//! the whole answer, a /32 never hides the ports of its /8, and deny beats allow at any length.
//!
//! 1. Every statement becomes items (some addresses with the same ports) that are switched on at the prefixes they
//!    begin with, and off at their exceptions.
//! 2. Sweeping over the sorted prefixes with a stack of open ones gives each prefix the set of items on there. Sets
//!    are interned: a policy has far fewer distinct sets than prefixes.
//! 3. Each distinct set cuts the port axis once; equal results are interned again.
//! 4. Equal halves are joined, and a prefix that says what the prefix around it says is dropped.
//!
//! IPv4, `::ffff:0:0/96`, is a root of its own: nothing is inherited into it. Names are flattened alike: written backwards, a
//! pattern is a prefix of what it covers.

use std::{
    collections::{HashMap, HashSet},
    rc::Rc,
};

use egress_common::{Action, Entries, Entry, NameKey, Protocol, RuleId, Segment, SegmentList};

use crate::{
    policy::HostPattern,
    prefix::Prefix,
    ruleset::{NamedValue, Table},
};

use super::{
    CompileError, Ports, Statement,
    ports::{Cut, cut},
};

/// Most port ranges of a table: 12 bytes each in the kernel.
const MAX_SEGMENTS: usize = 4 << 20;
/// Most rules of all distinct sets of overlapping rules, each set counted with its size: 4 bytes each while compiling.
const MAX_OVERLAPS: usize = 32 << 20;

/// Flattens statements, which are in the order in which they are heard, first to last. `ids` names them.
pub fn flatten(statements: &[Statement], ids: &[RuleId], default: Action) -> Result<Table, CompileError> {
    let Itemized { items, changes, named } = itemize(statements);
    let mut values = Values::new(statements, ids, default);
    let contents = compact(sweep(changes, &items, &mut values)?);
    let names = sweep_names(named, &items, &mut values)?;
    Ok(Table::new(contents, names, values.entries, values.segments, default))
}

/// Addresses that share a statement and its ports.
struct Item<'a> {
    rank: u32,
    ports: &'a [Ports],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
enum Change {
    /// Nothing; the prefix is there because it is a root.
    Root,
    On(u32),
    Off(u32),
}

/// What statements say, item by item.
struct Itemized<'a> {
    items: Vec<Item<'a>>,
    changes: Vec<(Prefix, Change)>,
    /// Items that are on for a name, or for all that a pattern covers.
    named: Vec<(NameKey, u32)>,
}

/// Blocks without exceptions are one item, with the names; a block with exceptions is one of its own, since they narrow it alone.
fn itemize(statements: &[Statement]) -> Itemized<'_> {
    let (mut items, mut named): (Vec<Item<'_>>, Vec<(NameKey, u32)>) = Default::default();
    let mut changes = vec![(Prefix::V6_ROOT, Change::Root), (Prefix::V4_ROOT, Change::Root)];
    for (rank, statement) in (0..).zip(statements) {
        for part in &statement.parts {
            let mut add = || {
                items.push(Item { rank, ports: &part.ports });
                u32::try_from(items.len() - 1).expect("files are bounded below four billion items")
            };
            let mut plain = None;
            for block in &part.blocks {
                let item = if block.except.is_empty() { *plain.get_or_insert_with(&mut add) } else { add() };
                changes.push((block.cidr.into(), Change::On(item)));
                changes.extend(block.except.iter().map(|&net| (net.into(), Change::Off(item))));
            }
            for key in part.hosts.iter().filter_map(HostPattern::key) {
                named.push((key, *plain.get_or_insert_with(&mut add)));
            }
        }
    }
    Itemized { items, changes, named }
}

/// The value of each name and pattern, sorted; one that says what the pattern around it says is left out.
fn sweep_names(
    mut named: Vec<(NameKey, u32)>,
    items: &[Item<'_>],
    values: &mut Values<'_>,
) -> Result<Vec<NamedValue>, CompileError> {
    named.sort_unstable_by(|a, b| (a.0.as_bytes_of_name(), a.1).cmp(&(b.0.as_bytes_of_name(), b.1)));
    named.dedup();
    let mut sets = Sets::new();
    let mut open: Vec<(&NameKey, u32, u32)> = Vec::new();
    let mut contents = Vec::new();
    for group in named.chunk_by(|a, b| a.0 == b.0) {
        let key = &group[0].0;
        let covers = |above: &NameKey| key.as_bytes_of_name().starts_with(above.as_bytes_of_name());
        while open.pop_if(|(above, ..)| !covers(above)).is_some() {}
        let (inherited, around) = open.last().map_or((Sets::EMPTY, None), |&(_, set, value)| (set, Some(value)));
        let changes_here: Vec<Change> = group.iter().map(|&(_, item)| Change::On(item)).collect();
        let set = sets.change(inherited, &changes_here)?;
        let value = sets.value(set, |set| values.of_name(set.iter().map(|&item| &items[item as usize])))?;
        open.push((key, set, value));
        if around != Some(value) {
            contents.push((key.as_bytes_of_name().into(), value));
        }
    }
    Ok(contents)
}

/// The value of each prefix at which something changes.
fn sweep(
    mut changes: Vec<(Prefix, Change)>,
    items: &[Item<'_>],
    values: &mut Values<'_>,
) -> Result<Vec<(Prefix, u32)>, CompileError> {
    changes.sort_unstable();
    let mut changes_here = Vec::new();
    let mut sets = Sets::new();
    let mut open: Vec<(Prefix, u32)> = Vec::new();
    let mut contents = Vec::new();
    for group in changes.chunk_by(|a, b| a.0 == b.0) {
        let prefix = group[0].0;
        while open.pop_if(|(top, _)| !top.covers(prefix)).is_some() {}
        let inherited = match open.last() {
            Some(&(_, set)) if prefix != Prefix::V4_ROOT => set,
            _ => Sets::EMPTY,
        };
        changes_here.clear();
        changes_here.extend(group.iter().map(|&(_, change)| change));
        changes_here.dedup();
        let set = sets.change(inherited, &changes_here)?;
        open.push((prefix, set));
        let value = sets.value(set, |set| values.of(set.iter().map(|&item| &items[item as usize])))?;
        contents.push((prefix, value));
    }
    Ok(contents)
}

/// Distinct sets of items, each with the index of its value once that is known.
struct Sets {
    ids: HashMap<Rc<[u32]>, u32>,
    known: Vec<(Rc<[u32]>, Option<u32>)>,
    /// What a set becomes by some changes: most prefixes repeat what others did.
    steps: HashMap<(u32, Box<[Change]>), u32>,
    /// Elements of all sets together.
    elements: usize,
}

impl Sets {
    const EMPTY: u32 = 0;

    fn new() -> Self {
        let empty: Rc<[u32]> = Rc::new([]);
        Self {
            ids: HashMap::from([(Rc::clone(&empty), Self::EMPTY)]),
            known: vec![(empty, None)],
            steps: HashMap::new(),
            elements: 0,
        }
    }

    /// The set that differs from `from` by `changes`, which are sorted.
    fn change(&mut self, from: u32, changes: &[Change]) -> Result<u32, CompileError> {
        let step = (from, Box::from(changes));
        if let Some(&id) = self.steps.get(&step) {
            return Ok(id);
        }
        let set = changed(&self.known[from as usize].0, changes);
        let id = match self.ids.get(set.as_slice()) {
            Some(&id) => id,
            None => self.add(set)?,
        };
        self.steps.insert(step, id);
        Ok(id)
    }

    fn add(&mut self, set: Vec<u32>) -> Result<u32, CompileError> {
        self.elements += set.len();
        if self.elements > MAX_OVERLAPS {
            return Err(CompileError::TooManyOverlaps { limit: MAX_OVERLAPS });
        }
        let (set, id) = (Rc::<[u32]>::from(set), index(self.known.len()));
        self.known.push((Rc::clone(&set), None));
        self.ids.insert(set, id);
        Ok(id)
    }

    fn value(
        &mut self,
        id: u32,
        resolve: impl FnOnce(&[u32]) -> Result<u32, CompileError>,
    ) -> Result<u32, CompileError> {
        let (set, value) = &mut self.known[id as usize];
        if let Some(value) = *value {
            return Ok(value);
        }
        Ok(*value.insert(resolve(set)?))
    }
}

/// A sorted set with some items switched on, then others switched off.
fn changed(set: &[u32], changes: &[Change]) -> Vec<u32> {
    let on = changes.iter().filter_map(|change| if let Change::On(item) = change { Some(*item) } else { None });
    let off: HashSet<u32> =
        changes.iter().filter_map(|change| if let Change::Off(item) = change { Some(*item) } else { None }).collect();
    let mut items: Vec<u32> = set.iter().copied().chain(on).filter(|item| !off.contains(item)).collect();
    #[expect(clippy::stable_sort_primitive, reason = "it merges sorted runs, of which there are two, in linear time")]
    items.sort();
    items.dedup();
    items
}

/// Distinct trie values and the segments they point to.
struct Values<'a> {
    statements: &'a [Statement],
    ids: &'a [RuleId],
    default: Action,
    interned: HashMap<Vec<Cut>, u32>,
    /// The value of names that may be asked for, and no more.
    asked: Option<u32>,
    entries: Vec<Entry>,
    segments: Vec<Segment>,
}

impl<'a> Values<'a> {
    fn new(statements: &'a [Statement], ids: &'a [RuleId], default: Action) -> Self {
        Self {
            statements,
            ids,
            default,
            interned: HashMap::new(),
            asked: None,
            entries: Vec::new(),
            segments: Vec::new(),
        }
    }

    /// The value of a set of items that are on for a name. Where none of them names a port, the name may be asked for.
    fn of_name<'b>(&mut self, items: impl Iterator<Item = &'b Item<'b>>) -> Result<u32, CompileError> {
        let value = self.of(items)?;
        if self.entries[value as usize].entries() != Ok(Entries::None) {
            return Ok(value);
        }
        Ok(*self.asked.get_or_insert_with(|| {
            self.entries.push(Entry::new(Entries::Asked, self.default));
            index(self.entries.len() - 1)
        }))
    }

    /// The value of a set of items.
    fn of<'b>(&mut self, items: impl Iterator<Item = &'b Item<'b>>) -> Result<u32, CompileError> {
        let claims: Vec<(u32, Ports)> =
            items.flat_map(|item| item.ports.iter().map(|&ports| (item.rank, ports))).collect();
        let cuts = cut(&claims);
        if let Some(&value) = self.interned.get(&cuts) {
            return Ok(value);
        }
        if self.segments.len() + cuts.len() > MAX_SEGMENTS {
            return Err(CompileError::TooManyRanges { limit: MAX_SEGMENTS });
        }
        let value = index(self.entries.len());
        let entry = self.entry(&cuts);
        self.entries.push(entry);
        self.interned.insert(cuts, value);
        Ok(value)
    }

    fn entry(&mut self, cuts: &[Cut]) -> Entry {
        let entries = match cuts {
            [] => Entries::None,
            [tcp, udp] if is_every_port(tcp, udp) => {
                Entries::EveryPort(self.statements[tcp.rank as usize].action, self.ids[tcp.rank as usize])
            }
            [one] => Entries::Range(self.segment(one)),
            several => {
                let first = index(self.segments.len());
                let segments: Vec<Segment> = several.iter().map(|cut| self.segment(cut)).collect();
                self.segments.extend(segments);
                Entries::Segments(SegmentList { slot: 0, first, count: index(several.len()) })
            }
        };
        Entry::new(entries, self.default)
    }

    fn segment(&self, cut: &Cut) -> Segment {
        let rank = cut.rank as usize;
        Segment::new(cut.protocol, cut.low, cut.high, self.statements[rank].action, self.ids[rank])
    }
}

fn is_every_port(tcp: &Cut, udp: &Cut) -> bool {
    let whole = |cut: &Cut, protocol| cut.protocol == protocol && cut.low == 0 && cut.high == u16::MAX;
    whole(tcp, Protocol::TCP) && whole(udp, Protocol::UDP) && tcp.rank == udp.rank
}

fn index(len: usize) -> u32 {
    u32::try_from(len).expect("files are bounded below four billion entries")
}

/// Joins halves that say the same, then drops each prefix that says what the one around it says. The roots stay.
fn compact(contents: Vec<(Prefix, u32)>) -> Vec<(Prefix, u32)> {
    let joined = join_siblings(contents);
    let mut open: Vec<(Prefix, u32)> = Vec::new();
    let mut kept = Vec::with_capacity(joined.len());
    for (prefix, value) in joined {
        while open.pop_if(|(top, _)| !top.covers(prefix)).is_some() {}
        let redundant = open.last().is_some_and(|&(_, around)| around == value) && !is_root(prefix);
        if !redundant {
            open.push((prefix, value));
            kept.push((prefix, value));
        }
    }
    kept
}

fn is_root(prefix: Prefix) -> bool {
    prefix == Prefix::V6_ROOT || prefix == Prefix::V4_ROOT
}

/// Where both halves of a prefix are there and say the same, they become that prefix. A left half has the address of
/// the whole, and comes right after it, so the whole takes the place of its left half.
fn join_siblings(contents: Vec<(Prefix, u32)>) -> Vec<(Prefix, u32)> {
    let mut slots: Vec<Option<(Prefix, u32)>> = Vec::with_capacity(contents.len());
    // For each length, where the last prefix of that length went.
    let mut last = [usize::MAX; 129];
    for (mut prefix, value) in contents {
        let mut slot = slots.len();
        slots.push(Some((prefix, value)));
        while let (Some(sibling), Some(parent)) = (prefix.sibling(), prefix.parent()) {
            let left = last[usize::from(prefix.length())];
            if is_root(prefix) || sibling > prefix || slots.get(left) != Some(&Some((sibling, value))) {
                break;
            }
            let above = last[usize::from(parent.length())];
            let whole = if slots.get(above).is_some_and(|slot| slot.is_some_and(|(prefix, _)| prefix == parent)) {
                above
            } else {
                left
            };
            slots[slot] = None;
            slots[left] = None;
            slots[whole] = Some((parent, value));
            (prefix, slot) = (parent, whole);
        }
        last[usize::from(prefix.length())] = slot;
    }
    slots.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use egress_common::{Flow, NameEnd, Verdict};
    use proptest::{prelude::*, sample::select};

    use super::*;
    use crate::{
        compile::{Block, Part},
        policy::{L4, RuleName},
        ruleset::{Ruleset, rule_id},
    };

    /// What the trie of one allow for `prefixes`, on TCP port 80, holds.
    fn kept(prefixes: &[(&str, &[&str])]) -> Vec<String> {
        let net = |text: &&str| text.parse().unwrap();
        let block =
            |(cidr, except): &(&str, &[&str])| Block { cidr: net(cidr), except: except.iter().map(net).collect() };
        let ports = vec![Ports { l4: L4::Tcp, low: 80, high: 80 }];
        let parts = vec![Part { blocks: prefixes.iter().map(block).collect(), hosts: Vec::new(), ports }];
        let statement = Statement { name: RuleName::Builtin("x"), action: Action::Allow, parts };
        let table = flatten(&[statement], &[rule_id(0)], Action::Deny).unwrap();
        table.entries().map(|(prefix, value)| format!("{prefix} {value}")).collect()
    }

    #[test]
    fn the_roots_are_always_there() {
        assert_eq!(kept(&[]), ["::/0 0", "0.0.0.0/0 0"]);
        assert_eq!(kept(&[("0.0.0.0/0", &[]), ("::/0", &[])]), ["::/0 0", "0.0.0.0/0 0"]);
        assert_eq!(kept(&[("0.0.0.0/1", &[]), ("128.0.0.0/1", &[])]), ["::/0 0", "0.0.0.0/0 1"]);
        assert_eq!(kept(&[("::/1", &[]), ("8000::/1", &[])]), ["::/0 1", "0.0.0.0/0 0"]);
    }

    #[test]
    fn equal_halves_become_the_whole_at_every_level() {
        let quarters: Vec<(&str, &[&str])> =
            ["10.0.0.0/10", "10.64.0.0/10", "10.128.0.0/10", "10.192.0.0/10"].map(|net| (net, &[][..])).into();
        assert_eq!(kept(&quarters), ["::/0 0", "0.0.0.0/0 0", "10.0.0.0/8 1"]);
    }

    #[test]
    fn a_prefix_that_adds_nothing_is_dropped() {
        assert_eq!(kept(&[("10.0.0.0/8", &[]), ("10.1.0.0/16", &[])]), ["::/0 0", "0.0.0.0/0 0", "10.0.0.0/8 1"]);
    }

    #[test]
    fn an_exception_is_a_hole_for_its_own_block_only() {
        let holes = kept(&[("10.0.0.0/8", &["10.1.0.0/16"])]);
        assert_eq!(holes, ["::/0 0", "0.0.0.0/0 0", "10.0.0.0/8 1", "10.1.0.0/16 0"]);
        let filled = kept(&[("10.0.0.0/8", &["10.1.0.0/16"]), ("10.1.2.0/24", &[])]);
        assert_eq!(filled, ["::/0 0", "0.0.0.0/0 0", "10.0.0.0/8 1", "10.1.0.0/16 0", "10.1.2.0/24 1"]);
    }

    fn host() -> impl Strategy<Value = HostPattern> {
        let name = prop::collection::vec(select(vec!["a", "b", "ab", "x-a"]), 1..4).prop_map(|labels| labels.join("."));
        (name, 0..3).prop_map(|(name, kind)| match kind {
            0 => HostPattern::Exact(name),
            1 => HostPattern::Below(name),
            _ => HostPattern::Ending(name),
        })
    }

    proptest! {
        /// A name may do what any pattern says that covers it, whoever else names it more closely.
        #[test]
        fn a_name_may_do_what_any_pattern_that_covers_it_may(
            rules in prop::collection::vec((prop::collection::vec(host(), 0..3), 1..4_u16), 0..6),
            asked in prop::collection::vec(select(vec!["a", "b", "ab", "x-a", "c"]), 1..5),
            port in 1..4_u16,
        ) {
            let asked = asked.join(".");
            let statement = |(hosts, port): &(Vec<HostPattern>, u16)| {
                let ports = vec![Ports { l4: L4::Tcp, low: *port, high: *port }];
                let parts = vec![Part { blocks: Vec::new(), hosts: hosts.clone(), ports }];
                Statement { name: RuleName::Builtin("x"), action: Action::Allow, parts }
            };
            let statements: Vec<Statement> = rules.iter().map(statement).collect();
            let ids: Vec<RuleId> = (0..statements.len()).map(rule_id).collect();
            let enforcing = flatten(&statements, &ids, Action::Deny).unwrap();
            let ruleset = Ruleset { rules: vec![RuleName::Builtin("x"); statements.len()], enforcing, with_audit: None };
            let address = "192.0.2.1".parse::<std::net::IpAddr>().unwrap().into();
            let flow = Flow { place: Ruleset::PLACE, protocol: Protocol::TCP, address, port };
            let decision = ruleset.decide_named(&flow, NameKey::of(&asked, NameEnd::Exact).as_ref());
            let first = rules.iter().position(|(hosts, allowed)| *allowed == port && hosts.iter().any(|host| host.covers(&asked)));
            prop_assert_eq!(decision.rule, first.map(rule_id));
            prop_assert_eq!(ruleset.decide(&flow).verdict, Verdict::Deny);
        }
    }

    /// `count` rules, each with a port of its own, on one prefix, and as many addresses below it: every address has a set
    /// of its own, with all of the others' ports.
    #[test]
    fn what_would_not_fit_memory_is_refused() {
        let rule = |index: u16| {
            let port = index + 1;
            let blocks =
                ["10.0.0.0/8".parse().unwrap(), format!("10.{}.{}.1/32", index >> 8, index & 255).parse().unwrap()];
            let at = |block: ipnet::IpNet, port| Part {
                blocks: vec![block.into()],
                hosts: Vec::new(),
                ports: vec![Ports { l4: L4::Tcp, low: port, high: port }],
            };
            let parts = vec![at(blocks[0], port), at(blocks[1], port + 20_000)];
            Statement { name: RuleName::Builtin("x"), action: Action::Allow, parts }
        };
        let compiled = |count: u16| {
            let statements: Vec<Statement> = (0..count).map(rule).collect();
            let ids: Vec<RuleId> = (0..statements.len()).map(rule_id).collect();
            flatten(&statements, &ids, Action::Deny).map(|table| table.segments().len())
        };
        assert!(compiled(500).is_ok());
        assert!(matches!(
            compiled(8_000),
            Err(CompileError::TooManyRanges { .. } | CompileError::TooManyOverlaps { .. })
        ));
    }
}
