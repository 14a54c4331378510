//! Names in the kernel: which it knows, by which numbers, and what each scope says of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::fd::AsFd as _,
};

use aya::maps::{ArrayOfMaps, LpmTrie, Map, MapData};
use egress_common::{KEY_BYTES, NameId, NameKey, map};

use super::{DataplaneError, contents, failed, sys};
use crate::{
    pins::{PinError, PinSet},
    ruleset::Table,
    scopes::Layout,
};

/// A name or pattern as the kernel's trie has it: see [`NameKey`].
pub(super) type Pattern = Box<[u8]>;
/// The trie of the `NAME_IDS` map, in bytes.
type Trie = LpmTrie<MapData, [u8; KEY_BYTES], u32>;

/// Gives each name a number that it keeps as long as anything learnt can have it, and that no other gets.
#[derive(Debug, Default)]
pub(super) struct NameIds {
    ids: BTreeMap<Pattern, NameId>,
    given: u32,
    /// Those of the policy in force.
    current: BTreeSet<Pattern>,
}

impl NameIds {
    /// Numbers every name of a layout.
    pub(super) fn assign(&mut self, patterns: &BTreeSet<Pattern>) {
        for pattern in patterns.iter().filter(|&pattern| !self.ids.contains_key(pattern)).cloned().collect::<Vec<_>>() {
            self.given += 1;
            let id = NameId::new(self.given)
                .expect("it is counted from 1, and documents hold fewer than four billion names");
            self.ids.insert(pattern, id);
        }
    }

    /// Forgets the names of earlier policies of which nothing is known any more.
    pub(super) fn retain(&mut self, learnt: &BTreeSet<NameId>) {
        let current = &self.current;
        self.ids.retain(|pattern, id| current.contains(pattern) || learnt.contains(id));
    }

    /// The number of the closest pattern in force that covers a name or pattern.
    pub(super) fn closest(&self, name: &[u8]) -> Option<NameId> {
        let known = |length| self.current.get(&name[..length]).and_then(|pattern| self.ids.get(pattern));
        (1..=name.len()).rev().find_map(known).copied()
    }

    /// What a table says of each name there is, its own or not: the index of a value.
    pub(super) fn values(&self, table: &Table) -> Vec<(NameId, u32)> {
        let mut own = table.names().peekable();
        let mut open: Vec<(&[u8], u32)> = Vec::new();
        let mut values = Vec::new();
        for (pattern, &id) in &self.ids {
            while let Some((name, value)) = own.next_if(|(name, _)| *name <= &**pattern) {
                while open.pop_if(|(above, _)| !name.starts_with(above)).is_some() {}
                open.push((name, value));
            }
            while open.pop_if(|(above, _)| !pattern.starts_with(above)).is_some() {}
            values.extend(open.last().map(|&(_, value)| (id, value)));
        }
        values
    }

    /// A trie of the names of a policy, if it is not that in force.
    pub(super) fn trie(&self, patterns: &BTreeSet<Pattern>) -> Result<Option<NameTrie>, DataplaneError> {
        if *patterns == self.current {
            return Ok(None);
        }
        let element = |what| move |cause| DataplaneError::Element { name: map::NAME_IDS, what, cause };
        let size = u32::try_from(patterns.len()).unwrap_or(u32::MAX).max(1);
        let trie = sys::create_trie::<NameKey, u32>(size).map_err(element("create"))?;
        let key = |pattern: &Pattern| NameKey::from_bytes_of_name(pattern);
        let (keys, ids): (Vec<NameKey>, Vec<u32>) =
            patterns.iter().filter_map(|pattern| Some((key(pattern)?, self.ids.get(pattern)?.number()))).unzip();
        contents::insert(trie.as_fd(), &keys, &ids).map_err(element("fill"))?;
        let open = |cause| failed(map::NAME_IDS, "open", cause);
        let trie = Map::LpmTrie(MapData::from_fd(trie).map_err(open)?).try_into().map_err(open)?;
        Ok(Some(NameTrie { trie, patterns: patterns.clone() }))
    }

    /// Exchanges the names that the kernel knows. Returns after a grace period: nothing more is learnt for those before.
    pub(super) fn exchange(
        &mut self,
        names: &mut ArrayOfMaps<MapData, Trie>,
        filled: NameTrie,
        pins: &mut PinSet,
    ) -> Result<(), DataplaneError> {
        names.set(0, &filled.trie, 0).map_err(|cause| failed(map::NAME_IDS, "exchange", cause))?;
        if pins.is_there() {
            let path = pins.room_for(map::NAME_TRIE)?;
            filled.trie.pin(&path).map_err(|cause| PinError::Pin { path, cause })?;
        }
        self.current = filled.patterns;
        Ok(())
    }
}

/// The `NAME_IDS` map.
pub(super) type Names = ArrayOfMaps<MapData, Trie>;

/// A trie that is filled and not yet in force.
pub(super) struct NameTrie {
    trie: Trie,
    patterns: BTreeSet<Pattern>,
}

/// Every name and pattern of a layout.
pub(super) fn patterns(layout: &Layout) -> BTreeSet<Pattern> {
    let tables = layout.scopes.iter().flat_map(|scope| scope.ruleset.views(egress_common::Scope::new(0)));
    tables.flat_map(|(_, table)| table.names()).map(|(name, _)| name.into()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        compile::{Context, NodeAction, NodeDefault, compile},
        policy::{HostPattern, load::load_text},
        workload::Workload,
    };

    fn pattern(text: &str) -> Pattern {
        let host = match text.strip_prefix("*.") {
            Some(suffix) => HostPattern::Below(suffix.to_owned()),
            None => HostPattern::Exact(text.to_owned()),
        };
        host.key().unwrap().as_bytes_of_name().into()
    }

    fn ids(patterns: &[&str]) -> NameIds {
        let patterns: BTreeSet<Pattern> = patterns.iter().map(|text| pattern(text)).collect();
        let mut ids = NameIds::default();
        ids.assign(&patterns);
        ids.current = patterns;
        ids
    }

    #[test]
    fn a_number_is_kept_while_something_learnt_has_it_and_never_given_again() {
        let mut ids = ids(&["a.example", "*.example"]);
        let [exact, wildcard] = ["a.example", "*.example"].map(|text| ids.closest(&pattern(text)).unwrap());
        ids.current.remove(&pattern("a.example"));
        assert_eq!(ids.closest(&pattern("a.example")), Some(wildcard));
        ids.retain(&BTreeSet::from([exact]));
        ids.assign(&BTreeSet::from([pattern("a.example")]));
        ids.current.insert(pattern("a.example"));
        assert_eq!(ids.closest(&pattern("a.example")), Some(exact));
        ids.current.remove(&pattern("a.example"));
        ids.retain(&BTreeSet::new());
        ids.assign(&BTreeSet::from([pattern("a.example")]));
        ids.current.insert(pattern("a.example"));
        let again = ids.closest(&pattern("a.example")).unwrap();
        assert!(again != exact && again != wildcard);
    }

    proptest! {
        /// The walk over both sorted lists finds for each name what a search for it would.
        #[test]
        fn each_name_has_the_value_of_the_closest_pattern_of_a_scope(
            own in prop::sample::subsequence(NAMES.to_vec(), 0..NAMES.len()),
            all in prop::sample::subsequence(NAMES.to_vec(), 0..NAMES.len()),
        ) {
            let rule = |(index, host): (usize, &&str)| format!("{{ to: [ {{ host: '{host}' }} ], ports: [ {{ port: {} }} ] }}", index + 1);
            let rules: Vec<String> = own.iter().enumerate().map(rule).collect();
            let text = format!(
                "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec: {{ allow: [ {} ] }}\n",
                rules.join(", ")
            );
            let policies = load_text("p.yaml", &text).policies;
            let context = Context::new(NodeDefault { action: NodeAction::Deny, loopback: false, dns: false });
            let table = compile(&policies, &Workload::default(), &context).unwrap().enforcing;
            let ids = ids(&all.iter().chain(&own).copied().collect::<Vec<_>>());
            let expected: Vec<(NameId, u32)> =
                ids.ids.iter().filter_map(|(name, &id)| Some((id, table.name_value(name)?))).collect();
            prop_assert_eq!(ids.values(&table), expected);
        }
    }

    const NAMES: [&str; 10] = [
        "*.example",
        "*.a.example",
        "*.b.a.example",
        "a.example",
        "b.a.example",
        "c.b.a.example",
        "example",
        "other",
        "*.other",
        "x.y.example",
    ];
}
