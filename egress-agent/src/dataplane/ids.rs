//! The numbers by which kernel records name rules.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, PoisonError, RwLock},
};

use egress_common::RuleId;

use crate::{policy::RuleName, ruleset::rule_id};

/// The rules that events name. Shared with whoever reads events.
#[derive(Debug, Clone, Default)]
pub struct RuleNames(Arc<RwLock<HashMap<RuleId, RuleName>>>);

impl RuleNames {
    /// The rule of an id that the kernel reported.
    pub fn get(&self, id: RuleId) -> Option<RuleName> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&id).cloned()
    }
}

/// Gives each rule an id that it keeps while it is in force and that no other rule gets, so that an event that is read
/// late still names the right rule.
#[derive(Debug, Default)]
pub(super) struct RuleIds {
    ids: HashMap<RuleName, RuleId>,
    /// Ids in force, then those of the policy before.
    current: HashSet<RuleId>,
    previous: HashSet<RuleId>,
    given: usize,
    pub(super) names: RuleNames,
}

impl RuleIds {
    /// The ids of `rules`, in their order.
    pub(super) fn assign(&mut self, rules: &[RuleName]) -> Vec<RuleId> {
        let mut names = self.names.0.write().unwrap_or_else(PoisonError::into_inner);
        rules
            .iter()
            .map(|rule| {
                let id = *self.ids.entry(rule.clone()).or_insert_with(|| {
                    self.given += 1;
                    rule_id(self.given - 1)
                });
                names.entry(id).or_insert_with(|| rule.clone());
                id
            })
            .collect()
    }

    /// How many rules are in force.
    pub(super) fn in_force(&self) -> usize {
        self.current.len()
    }

    /// The rules of `ids` are in force. Forgets those that neither they nor the ones before them name.
    pub(super) fn retire(&mut self, ids: HashSet<RuleId>) {
        self.previous = std::mem::replace(&mut self.current, ids);
        let keep: HashSet<RuleId> = self.current.iter().chain(&self.previous).copied().collect();
        self.ids.retain(|_, id| keep.contains(id));
        let mut names = self.names.0.write().unwrap_or_else(PoisonError::into_inner);
        names.retain(|id, _| keep.contains(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(names: &[&'static str]) -> Vec<RuleName> {
        names.iter().map(|name| RuleName::Builtin(name)).collect()
    }

    #[test]
    fn a_rule_keeps_its_id_and_no_other_rule_gets_it() {
        let mut ids = RuleIds::default();
        let first = ids.assign(&rules(&["a", "b"]));
        ids.retire(first.iter().copied().collect());
        // A policy that failed to be put in force leaves the ones before it named.
        ids.assign(&rules(&["d"]));
        let second = ids.assign(&rules(&["b", "c"]));
        ids.retire(second.iter().copied().collect());
        assert_eq!(first[1], second[0]);
        assert!(!first.contains(&second[1]));
        // An event of the policy before is still named; the one before that is not.
        assert_eq!(ids.names.get(first[0]), Some(RuleName::Builtin("a")));
        let third = ids.assign(&rules(&["c"]));
        ids.retire(third.into_iter().collect());
        assert_eq!(ids.names.get(first[0]), None);
    }
}
