//! Which policies select a workload, found without asking each of them. Pure.
//!
//! Selectors are kept by what stands in them word for word: whole paths and units, and the beginnings of patterns. For a
//! workload, only those are asked whose words are in its own path or unit.

use std::{
    collections::{BTreeSet, HashMap},
    os::unix::ffi::OsStrExt as _,
    path::Path,
};

use crate::{
    policy::{EgressPolicy, Reach, Selector},
    workload::{Workload, cgroup_matches, cgroup_may_match_below, glob, is_slice, names, selects, units},
};

/// The place of a policy among those of a set.
pub(crate) type Place = usize;

/// An index of some policies of a set. The calls take the whole set.
#[derive(Debug, Default)]
pub(crate) struct Index {
    /// Those that select every workload.
    everyone: Vec<Place>,
    /// Those that reach the pods of a namespace alone.
    by_namespace: HashMap<Box<str>, Vec<Place>>,
    /// Of all others, those that select pods.
    of_pods: Vec<Place>,
    cgroups: Patterns,
    units: Patterns,
    /// Those that select by unit: units may lie in any slice.
    of_units: Vec<Place>,
    /// By the path of a cgroup, those that select some below it, as they say word for word.
    above: HashMap<Box<[u8]>, Vec<Place>>,
}

/// A pattern with wildcards, and the place of its policy.
type Glob = (Place, Box<str>);

/// Patterns of one kind, with the policies that have them.
#[derive(Debug, Default)]
struct Patterns {
    exact: HashMap<Box<[u8]>, Vec<Place>>,
    /// By what they begin with.
    globs: HashMap<Box<[u8]>, Vec<Glob>>,
    /// How long these beginnings are.
    lengths: BTreeSet<usize>,
}

impl Patterns {
    /// Adds a pattern; what it begins with.
    fn add<'p>(&mut self, pattern: &'p str, place: Place) -> &'p [u8] {
        let Some(wildcard) = pattern.find(['*', '?']) else {
            self.exact.entry(pattern.as_bytes().into()).or_default().push(place);
            return pattern.as_bytes();
        };
        // `a/**` is `a`, too.
        let beginning = pattern[..wildcard].trim_end_matches('/').as_bytes();
        self.globs.entry(beginning.into()).or_default().push((place, pattern.into()));
        self.lengths.insert(beginning.len());
        beginning
    }

    fn exact(&self, text: &[u8]) -> impl Iterator<Item = Place> {
        self.exact.get(text).into_iter().flatten().copied()
    }

    /// The patterns with wildcards that a text may match.
    fn globs(&self, text: &[u8]) -> impl Iterator<Item = (Place, &str)> {
        let lengths = self.lengths.iter().take_while(|&&length| length <= text.len());
        let found = lengths.filter_map(|&length| self.globs.get(&text[..length]));
        found.flatten().map(|(place, pattern)| (*place, &**pattern))
    }
}

impl Index {
    /// Of the policies at some places of a set.
    pub(crate) fn new(policies: &[EgressPolicy], places: impl Iterator<Item = Place>) -> Self {
        let mut index = Self::default();
        for place in places {
            index.add(place, &policies[place]);
        }
        index
    }

    fn add(&mut self, place: Place, policy: &EgressPolicy) {
        match (policy.reach, &policy.workloads) {
            (Reach::Namespace, _) => {
                self.by_namespace.entry((*policy.object.namespace).into()).or_default().push(place);
            }
            (Reach::Anything, None) => self.everyone.push(place),
            (Reach::Anything, Some(selectors)) => {
                for selector in selectors {
                    self.add_selector(place, selector);
                }
            }
        }
    }

    fn add_selector(&mut self, place: Place, selector: &Selector) {
        match selector {
            Selector::Cgroup(pattern) => {
                let pattern = pattern.trim_matches('/');
                let beginning = self.cgroups.add(pattern, place);
                if pattern.is_empty() {
                    return;
                }
                let slashes = (0..beginning.len()).filter(|&at| beginning[at] == b'/');
                for end in slashes.chain((!beginning.is_empty()).then_some(0)) {
                    push(self.above.entry(beginning[..end].into()).or_default(), place);
                }
            }
            Selector::Unit(pattern) => {
                self.units.add(pattern, place);
                push(&mut self.of_units, place);
            }
            Selector::Pod(_) => push(&mut self.of_pods, place),
            // A user is no part of a cgroup.
            Selector::User(_) => {}
        }
    }

    /// The policies that select every workload.
    pub(crate) fn everyone(&self) -> &[Place] {
        &self.everyone
    }

    /// The policies that select a workload by its cgroup, its unit or its pod, but those that select every one; sorted.
    pub(crate) fn selecting(&self, policies: &[EgressPolicy], workload: &Workload) -> Vec<Place> {
        let mut found = Vec::new();
        if let Some(path) = &workload.cgroup {
            let text = text(path);
            found.extend(paths_to(text).flat_map(|above| self.cgroups.exact(above)));
            let globs = self.cgroups.globs(text);
            found.extend(globs.filter(|(_, pattern)| cgroup_matches(pattern, path)).map(|(place, _)| place));
        }
        for unit in units(workload) {
            found.extend(self.units.exact(unit));
            let globs = self.units.globs(unit);
            found.extend(globs.filter(|(_, pattern)| glob(pattern, unit)).map(|(place, _)| place));
        }
        if let Some(pod) = &workload.pod {
            let of_namespace = self.by_namespace.get(&*pod.namespace).into_iter().flatten();
            let asked = self.of_pods.iter().chain(of_namespace);
            found.extend(asked.copied().filter(|&place| selects(&policies[place], workload)));
        }
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Whether some of these policies that is `wanted` selects cgroups below a path, and not that itself.
    pub(crate) fn selects_only_below(&self, path: &Path, mut wanted: impl FnMut(Place) -> bool) -> bool {
        let text = text(path);
        let of_units = if names(path).all(is_slice) { &*self.of_units } else { &[] };
        let above = self.above.get(text).into_iter().flatten().chain(of_units).copied();
        let globs = self.cgroups.globs(text);
        let mut globs = globs.filter(|(_, pattern)| cgroup_may_match_below(pattern, path)).map(|(place, _)| place);
        above.into_iter().any(&mut wanted) || globs.any(wanted)
    }
}

/// The selectors of a policy come one after the other.
fn push(places: &mut Vec<Place>, place: Place) {
    if places.last() != Some(&place) {
        places.push(place);
    }
}

fn text(path: &Path) -> &[u8] {
    let path = path.as_os_str().as_bytes();
    let begin = path.iter().position(|&byte| byte != b'/').unwrap_or(path.len());
    let end = path.iter().rposition(|&byte| byte != b'/').map_or(begin, |last| last + 1);
    &path[begin..end]
}

/// The paths of the cgroups above one and its own; the root's only for the root.
fn paths_to(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    let ends = (0..path.len()).filter(|&at| path[at] == b'/').chain([path.len()]);
    ends.map(|end| &path[..end])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        policy::load::load_text,
        workload::{Pod, selects_only_below},
    };

    fn policies(workloads: &[Vec<String>]) -> Vec<EgressPolicy> {
        let document = |(index, workloads): (usize, &Vec<String>)| {
            let workloads =
                if workloads.is_empty() { String::new() } else { format!("workloads: [{}]", workloads.join(", ")) };
            format!(
                "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p{index} }}\nspec: {{ {workloads} }}\n"
            )
        };
        let text: String = workloads.iter().enumerate().map(document).collect();
        let loaded = load_text("p.yaml", &text);
        assert!(!loaded.has_errors(), "{:?}", loaded.findings);
        let mut policies = loaded.policies.egress_policies;
        // Every third is an object of a namespace.
        for policy in policies.iter_mut().skip(2).step_by(3) {
            policy.reach = Reach::Namespace;
        }
        policies
    }

    fn path(parts: &'static [&'static str]) -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(parts), 1..5).prop_map(|parts| parts.join("/"))
    }

    fn a_selector() -> impl Strategy<Value = String> {
        prop_oneof![
            6 => path(&["a", "b", "ab", "a.slice", "b.slice", "c.service", "*", "**", "a*", "?", "a?.slice", "é*"])
                .prop_map(|pattern| format!("{{ cgroup: '{pattern}' }}")),
            1 => Just("{ cgroup: / }".to_owned()),
            2 => prop::sample::select(&["a.slice", "c.service", "*.service", "?.service", "*.slice"][..])
                .prop_map(|pattern| format!("{{ unit: '{pattern}' }}")),
            1 => Just("{ user: 33 }".to_owned()),
            1 => Just("{ pod: { matchLabels: { app: web } } }".to_owned()),
        ]
    }

    proptest! {
        /// The index finds what every policy would say if it was asked.
        #[test]
        fn what_is_found_is_what_every_policy_says(
            workloads in prop::collection::vec(prop::collection::vec(a_selector(), 0..4), 1..8),
            paths in prop::collection::vec(path(&["a", "b", "ab", "a.slice", "b.slice", "ax.slice", "c.service", "éa"]), 1..8),
            pod in prop::option::of(prop::sample::select(&["web", "db"][..])),
        ) {
            let policies = policies(&workloads);
            let index = Index::new(&policies, 0..policies.len());
            for path in paths.iter().map(Path::new).chain([Path::new("")]) {
                let labels = pod.map(|app| [("app".to_owned(), app.to_owned())].into());
                let pod = labels.map(|labels| Pod { namespace: "default".to_owned(), labels, ..Pod::default() });
                let workload = Workload { pod, ..Workload::of_cgroup(path) };
                let mut found = index.selecting(&policies, &workload);
                found.extend(index.everyone());
                found.sort_unstable();
                let expected: Vec<Place> = (0..policies.len()).filter(|&place| selects(&policies[place], &workload)).collect();
                prop_assert_eq!(&found, &expected, "{:?}", path);
                let alone = index.selecting(&policies, &Workload::of_cgroup(path));
                let is_root = path == Path::new("");
                for (place, policy) in policies.iter().enumerate() {
                    let below = index.selects_only_below(path, |found| found == place && (is_root || !alone.contains(&found)));
                    prop_assert_eq!(below, selects_only_below(policy, path), "{:?} {}", path, place);
                }
            }
        }
    }
}
