//! A workload as policies see it, and which policies select it.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::{
    cgroup,
    compile::NodeAction,
    policy::{EgressPolicy, LabelOperator, LabelRequirement, PodSelector, PolicySet, Reach, Selector, User},
};

/// What is known of a workload. A selector of a kind that is not known here does not match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Workload {
    /// Path below the cgroup2 mount, without a leading slash; empty is the root cgroup.
    pub cgroup: Option<PathBuf>,
    /// The systemd unit it belongs to.
    pub unit: Option<OsString>,
    /// The pod it belongs to.
    pub pod: Option<Pod>,
    /// The user it runs as.
    pub user: Option<UserIdentity>,
}

/// A Kubernetes pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The labels of its namespace.
    pub namespace_labels: BTreeMap<String, String>,
    /// What holds of it where no enforcing policy selects it; `--default` where that is not said.
    pub default: Option<NodeAction>,
}

/// A user of the initial user namespace: number, name, or both.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserIdentity {
    /// The number.
    pub uid: Option<u32>,
    /// The name in `/etc/passwd`.
    pub name: Option<String>,
}

/// What the rules of a workload depend on: workloads with the same key share them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ScopeKey {
    /// The places of the policies that select it.
    selecting: Vec<usize>,
    /// The namespace that visibility is judged by, for pods.
    namespace: Option<String>,
    default: Option<NodeAction>,
}

impl Workload {
    /// A cgroup as policies see it. The root is described by its empty path.
    pub fn of_cgroup(path: &Path) -> Self {
        let unit = cgroup::unit(path).map(ToOwned::to_owned);
        Self { cgroup: Some(path.to_owned()), unit, ..Self::default() }
    }
}

impl ScopeKey {
    /// The key of a workload.
    pub fn new(policies: &PolicySet, workload: &Workload) -> Self {
        let policies = policies.egress_policies.iter().enumerate();
        let selecting = policies.filter(|(_, policy)| selects(policy, workload)).map(|(index, _)| index).collect();
        let pod = workload.pod.as_ref();
        Self { selecting, namespace: pod.map(|pod| pod.namespace.clone()), default: pod.and_then(|pod| pod.default) }
    }
}

/// Whether a policy selects a workload: any of its selectors does, or it has none. Whom it does not reach it never selects.
pub fn selects(policy: &EgressPolicy, workload: &Workload) -> bool {
    let is_reached = match policy.reach {
        Reach::Anything => true,
        Reach::Namespace => workload.pod.as_ref().is_some_and(|pod| *pod.namespace == *policy.object.namespace),
    };
    is_reached
        && match &policy.workloads {
            None => true,
            Some(selectors) => selectors.iter().any(|selector| matches(selector, workload)),
        }
}

/// Whether any of these selects a workload.
pub fn selects_any(selectors: &[Selector], workload: &Workload) -> bool {
    selectors.iter().any(|selector| matches(selector, workload))
}

fn matches(selector: &Selector, workload: &Workload) -> bool {
    match selector {
        Selector::Cgroup(pattern) => workload.cgroup.as_deref().is_some_and(|path| cgroup_matches(pattern, path)),
        Selector::Unit(pattern) => units(workload).any(|unit| glob(pattern, unit)),
        Selector::Pod(selector) => workload.pod.as_ref().is_some_and(|pod| pod_matches(selector, pod)),
        Selector::User(user) => workload.user.as_ref().is_some_and(|identity| user_matches(user, identity)),
    }
}

/// The unit of a workload and the slices that it is in.
pub(crate) fn units(workload: &Workload) -> impl Iterator<Item = &[u8]> {
    let unit = workload.unit.as_deref().map(OsStrExt::as_bytes);
    unit.into_iter().chain(workload.cgroup.as_deref().into_iter().flat_map(slices))
}

/// The slices that a cgroup is in: a slice holds only slices and other units, so they come first in its path.
fn slices(path: &Path) -> impl Iterator<Item = &[u8]> {
    names(path).take_while(|name| is_slice(name))
}

pub(crate) fn is_slice(name: &[u8]) -> bool {
    name.ends_with(b".slice")
}

/// The names that a path is made of, as the kernel has them: any bytes.
pub(crate) fn names(path: &Path) -> impl Iterator<Item = &[u8]> {
    path.as_os_str().as_bytes().split(|&byte| byte == b'/').filter(|name| !name.is_empty())
}

/// Whether some cgroup below `path` is selected by a policy that does not select `path` itself.
pub fn selects_only_below(policy: &EgressPolicy, path: &Path) -> bool {
    let Some(selectors) = &policy.workloads else { return false };
    policy.reach != Reach::Namespace && select_only_below(selectors, path)
}

/// Whether these select cgroups below a path, and not that itself.
pub fn select_only_below(selectors: &[Selector], path: &Path) -> bool {
    let workload = Workload::of_cgroup(path);
    // The root cgroup is nobody's parent in this: its pattern selects it alone.
    let is_selected = names(path).next().is_some() && selectors.iter().any(|selector| matches(selector, &workload));
    !is_selected && selectors.iter().any(|selector| reaches_below(selector, path))
}

fn reaches_below(selector: &Selector, path: &Path) -> bool {
    match selector {
        Selector::Cgroup(pattern) => cgroup_may_match_below(pattern, path),
        // Units lie in slices alone.
        Selector::Unit(_) => names(path).all(is_slice),
        // Pods are placed by whoever knows them; users have no place.
        Selector::Pod(_) | Selector::User(_) => false,
    }
}

/// Whether a longer path than `path` can match the pattern: the places in the pattern that are reached after `path`.
pub(crate) fn cgroup_may_match_below(pattern: &str, path: &Path) -> bool {
    let pattern = pattern.trim_matches('/');
    if pattern.is_empty() {
        return false;
    }
    let parts: Vec<&str> = pattern.split('/').collect();
    let skip = |mut reached: BTreeSet<usize>| {
        for (index, &part) in parts.iter().enumerate() {
            if reached.contains(&index) && part == "**" {
                reached.insert(index + 1);
            }
        }
        reached
    };
    let mut reached = skip(BTreeSet::from([0]));
    for name in names(path) {
        let next = reached.iter().filter(|&&index| index < parts.len()).filter_map(|&index| match parts[index] {
            "**" => Some(index),
            part => glob(part, name).then_some(index + 1),
        });
        reached = skip(next.collect());
    }
    reached.iter().any(|&index| index < parts.len())
}

/// Whether a policy names the root cgroup, whose tasks are otherwise exempt.
pub fn names_root(policy: &EgressPolicy) -> bool {
    let is_root =
        |selector: &Selector| matches!(selector, Selector::Cgroup(pattern) if pattern.trim_matches('/').is_empty());
    policy.workloads.iter().flatten().any(is_root)
}

/// The users that policies select by.
pub fn selected_users(policies: &PolicySet) -> impl Iterator<Item = &User> {
    let selectors = policies.egress_policies.iter().flat_map(|policy| policy.workloads.iter().flatten());
    selectors.filter_map(|selector| match selector {
        Selector::User(user) => Some(user),
        Selector::Cgroup(_) | Selector::Unit(_) | Selector::Pod(_) => None,
    })
}

/// A pattern covers what it matches and everything below. `/` is the root cgroup alone. `*` and `?` stay within one
/// component of the path; `**` stands for any number of components.
pub(crate) fn cgroup_matches(pattern: &str, path: &Path) -> bool {
    let (pattern, path) = (pattern.trim_matches('/'), names(path).collect::<Vec<_>>());
    if pattern.is_empty() {
        return path.is_empty();
    }
    if path.is_empty() {
        return false;
    }
    let pattern: Vec<&str> = pattern.split('/').chain(["**"]).collect();
    wildcard(&pattern, &path, |&part| part == "**", |part, name| glob(part, name))
}

/// A glob over one name: `*` for any bytes, `?` for one character, or one byte that is part of none.
pub(crate) fn glob(pattern: &str, name: &[u8]) -> bool {
    if name.is_ascii() || !pattern.contains('?') {
        return wildcard(pattern.as_bytes(), name, |&part| part == b'*', |&part, &c| part == b'?' || part == c);
    }
    let pattern: Vec<char> = pattern.chars().collect();
    let name: Vec<Result<char, u8>> = name
        .utf8_chunks()
        .flat_map(|chunk| chunk.valid().chars().map(Ok).chain(chunk.invalid().iter().copied().map(Err)))
        .collect();
    wildcard(&pattern, &name, |&part| part == '*', |&part, &c| part == '?' || Ok(part) == c)
}

/// Whether a pattern fits a whole sequence: a star fits any number of items, every other part one. What precedes a star
/// was fitted as early as it can be, so there is never a reason to return to a star before the last: a product of two
/// lengths, not an exponent.
fn wildcard<P, N>(pattern: &[P], items: &[N], is_star: impl Fn(&P) -> bool, fits: impl Fn(&P, &N) -> bool) -> bool {
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < items.len() {
        match pattern.get(p) {
            Some(part) if is_star(part) => {
                star = Some((p, n));
                p += 1;
            }
            Some(part) if fits(part, &items[n]) => {
                p += 1;
                n += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    n = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(is_star)
}

fn pod_matches(selector: &PodSelector, pod: &Pod) -> bool {
    let namespace = selector.namespaces.as_ref().is_none_or(|names| names.contains(&pod.namespace));
    let namespace_labels = selector.namespace_labels.as_ref().is_none_or(|wanted| has(&pod.namespace_labels, wanted));
    namespace
        && namespace_labels
        && has(&pod.labels, &selector.match_labels)
        && selector.match_expressions.iter().all(|requirement| meets(&pod.labels, requirement))
}

fn has(labels: &BTreeMap<String, String>, wanted: &BTreeMap<String, String>) -> bool {
    wanted.iter().all(|(key, value)| labels.get(key) == Some(value))
}

fn meets(labels: &BTreeMap<String, String>, requirement: &LabelRequirement) -> bool {
    let value = labels.get(&requirement.key);
    let listed = value.is_some_and(|value| requirement.values.contains(value));
    match requirement.operator {
        LabelOperator::In => listed,
        LabelOperator::NotIn => !listed,
        LabelOperator::Exists => value.is_some(),
        LabelOperator::DoesNotExist => value.is_none(),
    }
}

pub(crate) fn user_matches(user: &User, identity: &UserIdentity) -> bool {
    match user {
        User::Uid(uid) => identity.uid == Some(*uid),
        User::Name(name) => identity.name.as_ref() == Some(name),
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;

    use proptest::prelude::*;

    use super::*;

    fn cgroup_matches(pattern: &str, path: &str) -> bool {
        super::cgroup_matches(pattern, Path::new(path))
    }

    fn cgroup_may_match_below(pattern: &str, path: &str) -> bool {
        super::cgroup_may_match_below(pattern, Path::new(path))
    }

    fn glob(pattern: &str, name: &str) -> bool {
        super::glob(pattern, name.as_bytes())
    }

    #[test]
    fn names_are_bytes_and_patterns_are_text() {
        assert!(super::glob("a*", b"a\xff") && super::glob("a?", b"a\xff") && super::glob("*", b"\xff\xfe"));
        assert!(!super::glob("?", b"\xff\xfe") && !super::glob("a\u{fffd}", b"a\xff"));
        // A character is one, however many bytes it takes; and so it is beside bytes that are none.
        assert!(super::glob("?", "\u{e9}".as_bytes()) && super::glob("??", b"\xc3\xa9\xff"));
        assert!(super::cgroup_matches("a/*", Path::new(OsStr::from_bytes(b"a/\xff/b"))));
        assert!(super::cgroup_matches("**/b", Path::new(OsStr::from_bytes(b"a/\xff/b"))));
    }

    #[test]
    fn a_cgroup_pattern_covers_the_children_of_what_it_matches() {
        assert!(cgroup_matches("system.slice/nginx.service", "system.slice/nginx.service"));
        assert!(cgroup_matches("system.slice/nginx.service", "/system.slice/nginx.service/worker/1"));
        assert!(!cgroup_matches("system.slice/nginx.service", "system.slice/nginx.service2"));
        assert!(!cgroup_matches("system.slice/nginx.service", "system.slice"));
        assert!(cgroup_matches("system.slice/*.service", "system.slice/a.service/b"));
        assert!(!cgroup_matches("*.service", "system.slice/a.service"));
        assert!(cgroup_matches("**/a.service", "x/y/a.service/z"));
    }

    #[test]
    fn many_double_stars_cost_no_exponent() {
        let pattern = "**/a/".repeat(30) + "b";
        assert!(!cgroup_matches(&pattern, &"a/".repeat(60)));
        assert!(cgroup_matches(&pattern, &("x/a/".repeat(30) + "b/c")));
    }

    /// Every way a glob can fit, one by one.
    fn naive(pattern: &[&str], path: &[&str]) -> bool {
        match (pattern.split_first(), path.split_first()) {
            (None, None) => true,
            (Some((&"**", rest)), _) => (0..=path.len()).any(|skip| naive(rest, &path[skip..])),
            (Some((first, rest)), Some((name, below))) => glob(first, name) && naive(rest, below),
            _ => false,
        }
    }

    proptest! {
        #[test]
        fn a_cgroup_pattern_matches_as_if_every_way_was_tried(
            pattern in prop::collection::vec(prop::sample::select(vec!["**", "*", "?", "a", "b", "ab", "a*"]), 1..6),
            path in prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "ba"]), 1..8),
        ) {
            let expected = (1..=path.len()).any(|end| naive(&pattern, &path[..end]));
            prop_assert_eq!(cgroup_matches(&pattern.join("/"), &path.join("/")), expected);
        }

        #[test]
        fn whatever_is_matched_below_is_foreseen(
            pattern in prop::collection::vec(prop::sample::select(vec!["**", "*", "?", "a", "b", "ab", "a*"]), 1..6),
            path in prop::collection::vec(prop::sample::select(vec!["a", "b", "ab", "ba"]), 1..8),
            split in 0_usize..8,
        ) {
            let (pattern, above) = (pattern.join("/"), path[..split.min(path.len() - 1)].join("/"));
            if cgroup_matches(&pattern, &path.join("/")) && !cgroup_matches(&pattern, &above) {
                prop_assert!(cgroup_may_match_below(&pattern, &above));
            }
        }
    }

    #[test]
    fn the_root_pattern_is_the_root_cgroup_alone() {
        assert!(cgroup_matches("/", ""));
        assert!(!cgroup_matches("/", "system.slice"));
        assert!(cgroup_matches("*", "system.slice/x"));
    }

    #[test]
    fn what_cannot_match_below_needs_no_placing() {
        assert!(!cgroup_may_match_below("system.slice/*.service", "user.slice"));
        assert!(!cgroup_may_match_below("system.slice/*.service", "system.slice/a.service"));
        assert!(cgroup_may_match_below("system.slice/*.service", "system.slice"));
        assert!(cgroup_may_match_below("**/x", "a/b"));
        assert!(!cgroup_may_match_below("/", ""));
    }

    #[test]
    fn a_slice_selects_what_is_in_it_and_a_service_cannot_pose_as_another() {
        let selector = |unit: &str| Selector::Unit(unit.to_owned());
        let workload = |path: &str| Workload::of_cgroup(path.as_ref());
        assert!(matches(&selector("user.slice"), &workload("user.slice/user-1000.slice/session-1.scope")));
        assert!(!matches(&selector("user.slice"), &workload("system.slice/a.service/user.slice")));
        assert!(reaches_below(&selector("a.service"), "system.slice".as_ref()));
        assert!(!reaches_below(&selector("a.service"), "system.slice/b.service".as_ref()));
    }

    #[test]
    fn globs_backtrack_to_the_last_star_only() {
        assert!(glob("*a*b", "xxaxxabb"));
        assert!(glob("nginx@?.service", "nginx@1.service"));
        assert!(!glob("nginx@?.service", "nginx@.service"));
        assert!(!glob(&"*a".repeat(40), &"a".repeat(39)));
    }

    #[test]
    fn label_expressions_read_as_kubernetes_reads_them() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let meets = |key: &str, operator, values: &[&str]| {
            let values = values.iter().map(|&value| value.to_owned()).collect();
            meets(&labels, &LabelRequirement { key: key.to_owned(), operator, values })
        };
        assert!(meets("app", LabelOperator::In, &["api", "web"]));
        assert!(!meets("tier", LabelOperator::In, &["web"]));
        assert!(!meets("app", LabelOperator::NotIn, &["web"]));
        assert!(meets("tier", LabelOperator::NotIn, &["web"]));
        assert!(meets("app", LabelOperator::Exists, &[]));
        assert!(meets("tier", LabelOperator::DoesNotExist, &[]));
    }
}
