//! Which rules apply to which cgroup and user: from policies and the cgroups there are to scopes and placements. Pure but
//! for what it remembers: nothing here asks the system.
//!
//! A scope is one distinct set of policies; workloads that the same policies select share it. Only cgroups whose scope
//! may differ from their parent's are placed; what lies below a placed one follows it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use crate::{
    compile::{CompileError, Context, NodeAction, compile},
    existing,
    pods::{self, Pods},
    policy::{Mode, ObjectName, PolicySet},
    ruleset::Ruleset,
    workload::{
        ScopeKey, UserIdentity, Workload, names_root, select_only_below, selects, selects_any, selects_only_below,
    },
};

/// What becomes of a cgroup that is not placed yet, where policies select cgroups around it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum UnknownWorkloads {
    /// It is refused until it is placed.
    Deny,
    /// It is judged as its parent until it is placed.
    Inherit,
}

/// A cgroup at or below the attach point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Its id in the kernel.
    pub id: u64,
    /// Path below the cgroup2 mount, without a leading slash; empty is the root. Its names are any bytes.
    pub path: PathBuf,
}

impl Node {
    /// Its level in the hierarchy; the root is level 0.
    pub fn level(&self) -> usize {
        self.path.iter().count()
    }
}

/// Where a task belongs: as [`egress_common::Place`], with the index of a scope in its [`Layout`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Seat {
    /// These rules apply.
    Scope(usize),
    /// No rules apply.
    Exempt,
    /// Refused until it is known which rules apply.
    Unknown,
}

/// What holds for the tasks of a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// For tasks in the cgroup itself.
    pub own: Seat,
    /// For tasks in cgroups below it that are not placed.
    pub below: Seat,
    /// Its level in the hierarchy.
    pub level: usize,
}

/// One distinct set of policies.
#[derive(Debug, Clone)]
pub struct Scope {
    /// Its rules.
    pub ruleset: Arc<Ruleset>,
    /// [`Ruleset::hash`]: what the rules mean.
    pub hash: [u8; 32],
    /// Where the rules are written, as a number that is the same for the same places.
    pub written: u64,
    /// Users that other rules apply to: indices of scopes.
    pub users: BTreeMap<u32, usize>,
    /// The policies that select it.
    pub policies: Vec<ObjectName>,
    /// Whether connections that are open and would be refused are ended: `existing`.
    pub terminates: bool,
}

/// What the kernel is to hold.
#[derive(Debug, Clone, Default)]
pub struct Layout {
    /// Distinct sets of policies.
    pub scopes: Vec<Scope>,
    /// By cgroup id.
    pub placements: BTreeMap<u64, Placement>,
    /// For tasks that act from outside the attach point; refused if absent.
    pub elsewhere: Option<Seat>,
}

impl Layout {
    /// SHA-256 over all rules: equal for documents that mean the same to the workloads there are.
    pub fn hash(&self) -> [u8; 32] {
        let hashes: BTreeSet<[u8; 32]> = self.scopes.iter().map(|scope| scope.hash).collect();
        let mut hasher = Sha256::new();
        for hash in hashes {
            hasher.update(hash);
        }
        hasher.finalize().into()
    }
}

/// Places cgroups by one set of policies. Remembers the scopes that it compiled.
pub struct Selector {
    policies: Arc<PolicySet>,
    context: Context,
    unknown: UnknownWorkloads,
    users: Vec<UserIdentity>,
    pods: Pods,
    scopes: Vec<Scope>,
    /// By whom policies select, what for, and whether it resolves names for the whole host.
    known: HashMap<(ScopeKey, Kind, bool), usize>,
    /// By cgroup id.
    placed: HashMap<u64, Placement>,
}

/// What a scope is for: those of users have no users of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Cgroup,
    User,
}

impl Selector {
    /// Places by these policies; `users` are those that policies select by.
    pub fn new(
        policies: Arc<PolicySet>,
        context: Context,
        unknown: UnknownWorkloads,
        users: Vec<UserIdentity>,
    ) -> Self {
        let (pods, scopes, known, placed) = (Pods::default(), Vec::new(), HashMap::new(), HashMap::new());
        Self { policies, context, unknown, users, pods, scopes, known, placed }
    }

    /// From now on with these pods. What was compiled stays as it is, unless it is of namespaces that have long gone.
    pub fn set_pods(&mut self, pods: Pods) {
        const MOST_KEPT: usize = 512;
        self.pods = pods;
        self.placed.clear();
        if self.scopes.len() > MOST_KEPT {
            self.scopes.clear();
            self.known.clear();
        }
    }

    /// The pods.
    pub const fn pods(&self) -> &Pods {
        &self.pods
    }

    /// What becomes of cgroups that are not placed.
    pub const fn unknown(&self) -> UnknownWorkloads {
        self.unknown
    }

    /// Whether cgroups directly below a path are to be placed.
    pub fn looks_below(&self, path: &Path) -> bool {
        matches!(self.pods.place(path), pods::Place::Parent)
            || self.policies.egress_policies.iter().any(|policy| selects_only_below(policy, path))
            || select_only_below(&self.context.shared_resolvers, path)
    }

    /// Places cgroups, the attach point first. `agent` is the agent's own.
    pub fn layout(&mut self, nodes: &[Node], agent: Option<u64>) -> Result<Layout, CompileError> {
        let mut placements = BTreeMap::new();
        // What is gone is not remembered.
        let mut placed = HashMap::with_capacity(nodes.len());
        for node in nodes {
            let placement = match self.placed.get(&node.id) {
                Some(&placement) => Some(placement),
                None => self.place(node)?,
            };
            let Some(mut placement) = placement else { continue };
            placed.insert(node.id, placement);
            if agent == Some(node.id) {
                placement.own = Seat::Exempt;
            }
            placements.insert(node.id, placement);
        }
        self.placed = placed;
        let elsewhere = nodes.first().and_then(|node| placements.get(&node.id)).map(|placement| placement.below);
        let used = placements.values().flat_map(|placement| [placement.own, placement.below]);
        let (used, renumbered) = self.in_use(used);
        let renumber = |seat| match seat {
            Seat::Scope(scope) => Seat::Scope(renumbered[&scope]),
            Seat::Exempt | Seat::Unknown => seat,
        };
        for placement in placements.values_mut() {
            (placement.own, placement.below) = (renumber(placement.own), renumber(placement.below));
        }
        Ok(Layout { scopes: used, placements, elsewhere: elsewhere.map(renumber) })
    }

    /// `None` for what belongs to a pod that is not known: it is judged as what stands below its parent.
    fn place(&mut self, node: &Node) -> Result<Option<Placement>, CompileError> {
        let mut workload = Workload::of_cgroup(&node.path);
        match self.pods.place(&node.path) {
            pods::Place::Pod(member) => workload.pod = Some(member.pod.clone()),
            pods::Place::Unknown => return Ok(None),
            pods::Place::Parent | pods::Place::Elsewhere => {}
        }
        let (own, below) = if node.path.as_os_str().is_empty() {
            let own = if self.policies.egress_policies.iter().any(names_root) {
                Seat::Scope(self.scope(&workload, Kind::Cgroup)?)
            } else {
                Seat::Exempt
            };
            (own, Seat::Scope(self.scope(&Workload::default(), Kind::Cgroup)?))
        } else {
            let scope = Seat::Scope(self.scope(&workload, Kind::Cgroup)?);
            (scope, scope)
        };
        let below = if self.refuses_below(&node.path) { Seat::Unknown } else { below };
        Ok(Some(Placement { own, below, level: node.level() }))
    }

    /// Only what enforces can make a difference to a verdict. Any policy that does may be for a pod that comes.
    fn refuses_below(&self, path: &Path) -> bool {
        if self.unknown == UnknownWorkloads::Inherit {
            return false;
        }
        let policies = self.policies.egress_policies.iter();
        let mut enforcing = policies.filter(|policy| policy.mode == Mode::Enforce).peekable();
        let enforces = enforcing.peek().is_some() || self.context.node_default.action == NodeAction::Deny;
        if let pods::Place::Parent = self.pods.place(path) {
            return enforces || self.pods.is_any_refused();
        }
        let is_resolver = || enforces && select_only_below(&self.context.shared_resolvers, path);
        enforcing.any(|policy| selects_only_below(policy, path)) || is_resolver()
    }

    /// The scope of a workload, compiled if it is the first of its kind, with those of its users.
    fn scope(&mut self, workload: &Workload, kind: Kind) -> Result<usize, CompileError> {
        let serves_dns = selects_any(&self.context.shared_resolvers, workload);
        let key = (ScopeKey::new(&self.policies, workload), kind, serves_dns);
        if let Some(&scope) = self.known.get(&key) {
            return Ok(scope);
        }
        let users = if kind == Kind::Cgroup { self.scopes_of_users(workload, &key.0)? } else { BTreeMap::new() };
        let ruleset = compile(&self.policies, workload, &self.context)?;
        let selecting = self.policies.egress_policies.iter().filter(|policy| selects(policy, workload));
        let policies = selecting.clone().map(|policy| policy.object.clone()).collect();
        let terminates = selecting.into_iter().any(existing::terminates);
        self.scopes.push(Scope {
            hash: ruleset.hash(),
            written: places(&ruleset),
            ruleset: Arc::new(ruleset),
            users,
            policies,
            terminates,
        });
        self.known.insert(key, self.scopes.len() - 1);
        Ok(self.scopes.len() - 1)
    }

    fn scopes_of_users(&mut self, workload: &Workload, key: &ScopeKey) -> Result<BTreeMap<u32, usize>, CompileError> {
        let mut users = BTreeMap::new();
        for identity in self.users.clone() {
            let uid = identity.uid;
            let of_user = Workload { user: Some(identity), ..workload.clone() };
            if let (Some(uid), true) = (uid, ScopeKey::new(&self.policies, &of_user) != *key) {
                users.insert(uid, self.scope(&of_user, Kind::User)?);
            }
        }
        Ok(users)
    }

    /// The scopes that seats name, those of their users included, and the new index of each.
    fn in_use(&self, seats: impl Iterator<Item = Seat>) -> (Vec<Scope>, HashMap<usize, usize>) {
        let mut used: BTreeSet<usize> = BTreeSet::new();
        for seat in seats {
            if let Seat::Scope(scope) = seat {
                used.insert(scope);
                used.extend(self.scopes[scope].users.values());
            }
        }
        let renumbered: HashMap<usize, usize> = used.iter().enumerate().map(|(new, &old)| (old, new)).collect();
        let scopes = used.iter().map(|&old| {
            let mut scope = self.scopes[old].clone();
            scope.users.values_mut().for_each(|user| *user = renumbered[user]);
            scope
        });
        (scopes.collect(), renumbered)
    }
}

fn places(ruleset: &Ruleset) -> u64 {
    let mut hasher = DefaultHasher::new();
    ruleset.rules.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        compile::{NodeAction, NodeDefault},
        policy::load::load_text,
    };

    fn policy(name: &str, spec: &str) -> String {
        format!(
            "---\napiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: {name} }}\nspec: {{ {spec} }}\n"
        )
    }

    fn selector(documents: &[String], unknown: UnknownWorkloads, users: &[u32]) -> Selector {
        let loaded = load_text("p.yaml", &documents.concat());
        assert!(!loaded.has_errors(), "{:?}", loaded.findings);
        let node_default = NodeDefault { action: NodeAction::Allow, loopback: false, dns: false };
        let context = Context::new(node_default);
        let users = users.iter().map(|&uid| UserIdentity { uid: Some(uid), name: None }).collect();
        Selector::new(Arc::new(loaded.policies), context, unknown, users)
    }

    /// Cgroups of these paths, whose ids are 1 and up.
    fn nodes(paths: &[&str]) -> Vec<Node> {
        let node = |(id, path): (u64, &&str)| Node { id, path: path.into() };
        (1..).zip(paths).map(node).collect()
    }

    /// The layout of cgroups without users.
    fn layout(documents: &[String], paths: &[&str]) -> Layout {
        selector(documents, UnknownWorkloads::Deny, &[]).layout(&nodes(paths), None).unwrap()
    }

    /// What holds, in words: the names of the policies, or why there are none.
    fn told(layout: &Layout, seat: Seat) -> String {
        match seat {
            Seat::Exempt => "exempt".to_owned(),
            Seat::Unknown => "unknown".to_owned(),
            Seat::Scope(index) => {
                let names: Vec<String> = layout.scopes[index].policies.iter().map(ToString::to_string).collect();
                names.join(" ").replace("EgressPolicy/default/", "")
            }
        }
    }

    /// What holds in a cgroup and below it.
    #[track_caller]
    fn holds(layout: &Layout, id: u64, own: &str, below: &str) {
        let Placement { own: seat, below: seat_below, .. } = layout.placements[&id];
        assert_eq!((&*told(layout, seat), &*told(layout, seat_below)), (own, below));
    }

    #[test]
    fn tasks_of_the_root_cgroup_are_exempt_unless_a_policy_names_it() {
        let everyone = policy("all", "defaultAction: Allow");
        holds(&layout(std::slice::from_ref(&everyone), &[""]), 1, "exempt", "all");
        holds(&layout(&[everyone.clone(), policy("u", "workloads: [{ user: 33 }]")], &[""]), 1, "exempt", "all");
        // It is not a parent in this: what is below it is another matter.
        let root = policy("root", "workloads: [{ cgroup: / }]");
        holds(&layout(&[everyone, root.clone()], &["", "a"]), 1, "all root", "all");
        holds(&layout(&[root], &["", "a"]), 2, "", "");
    }

    #[test]
    fn a_policy_names_the_root_by_its_path_alone() {
        let names = |workloads: &str| {
            let text = policy("p", workloads);
            load_text("p.yaml", &text).policies.egress_policies.iter().any(names_root)
        };
        assert!(names("workloads: [{ unit: a.service }, { cgroup: / }]"));
        for other in ["{ cgroup: '*' }", "{ cgroup: '**' }", "{ unit: '*' }", "{ user: 0 }"] {
            assert!(!names(&format!("workloads: [{other}]")), "{other}");
        }
        assert!(!names("defaultAction: Allow"));
    }

    #[test]
    fn the_agents_own_cgroup_is_exempt_and_what_is_below_it_is_not() {
        let documents = [policy("a", "workloads: [{ cgroup: 'top/*' }]"), policy("root", "workloads: [{ cgroup: / }]")];
        let mut selector = selector(&documents, UnknownWorkloads::Deny, &[]);
        let nodes = nodes(&["", "top", "top/agent", "top/agent/below"]);
        let agents = selector.layout(&nodes, Some(3)).unwrap();
        holds(&agents, 3, "exempt", "a");
        holds(&agents, 4, "a", "a");
        holds(&agents, 2, "", "unknown");
        // The root's tasks with it, also where a policy names them.
        holds(&selector.layout(&nodes, Some(1)).unwrap(), 1, "exempt", "unknown");
        // What is remembered of it is not that.
        holds(&selector.layout(&nodes, None).unwrap(), 3, "a", "a");
    }

    #[test]
    fn who_acts_from_elsewhere_is_judged_as_an_unplaced_cgroup_below_the_top() {
        for (workloads, expected) in [("top", "a"), ("top/x", "unknown"), ("other", "")] {
            let documents = [policy("a", &format!("workloads: [{{ cgroup: {workloads} }}]"))];
            let layout = layout(&documents, &["top"]);
            assert_eq!(told(&layout, layout.elsewhere.unwrap()), expected, "{workloads}");
        }
        assert!(layout(&[], &[]).elsewhere.is_none());
    }

    #[test]
    fn below_is_unknown_only_where_an_enforcing_policy_selects_some_of_it() {
        let below = |spec: &str, unknown| {
            let layout = selector(&[policy("a", spec)], unknown, &[]).layout(&nodes(&["top.slice"]), None).unwrap();
            told(&layout, layout.placements[&1].below)
        };
        let (deny, inherit) = (UnknownWorkloads::Deny, UnknownWorkloads::Inherit);
        for workloads in ["{ cgroup: top.slice/x }", "{ cgroup: '**/x' }", "{ unit: x.service }"] {
            let spec = format!("workloads: [{workloads}]");
            assert_eq!(below(&spec, deny), "unknown", "{workloads}");
            assert_eq!(below(&spec, inherit), "", "{workloads}");
            assert_eq!(below(&format!("{spec}, mode: Audit"), deny), "", "{workloads}");
            assert_eq!(below(&format!("workloads: [{workloads}, {{ cgroup: top.slice }}]"), deny), "a", "{workloads}");
        }
        for workloads in ["{ cgroup: other/x }", "{ user: 33 }", "{ cgroup: / }"] {
            assert_eq!(below(&format!("workloads: [{workloads}]"), deny), "", "{workloads}");
        }
        assert_eq!(below("defaultAction: Allow", deny), "a");
    }

    #[test]
    fn a_user_has_a_scope_beside_each_that_its_policies_would_change() {
        let documents = [
            policy("a", "workloads: [{ cgroup: top/a }]"),
            policy("u", "workloads: [{ user: 33 }, { cgroup: top/u }]"),
            policy("other", "workloads: [{ user: 34 }]"),
        ];
        let mut selector = selector(&documents, UnknownWorkloads::Deny, &[33, 34]);
        let layout = selector.layout(&nodes(&["top", "top/a", "top/u"]), None).unwrap();
        let users = |id: u64| {
            let Seat::Scope(index) = layout.placements[&id].own else { panic!("{id} has no scope") };
            let users = layout.scopes[index].users.iter();
            users.map(|(&uid, &scope)| (uid, told(&layout, Seat::Scope(scope)))).collect::<Vec<_>>()
        };
        let user = |uid: u32, policies: &str| (uid, policies.to_owned());
        assert_eq!(users(1), [user(33, "u"), user(34, "other")]);
        assert_eq!(users(2), [user(33, "a u"), user(34, "a other")]);
        assert_eq!(users(3), [user(34, "other u")]);
        let of_users = layout.scopes.iter().flat_map(|scope| scope.users.values());
        assert!(of_users.into_iter().all(|&scope| layout.scopes[scope].users.is_empty()));
    }

    #[test]
    fn what_is_gone_is_not_remembered_and_scopes_without_workloads_are_left_out() {
        let documents = [policy("a", "workloads: [{ cgroup: top/a }]")];
        let mut selector = selector(&documents, UnknownWorkloads::Deny, &[]);
        assert_eq!(selector.layout(&nodes(&["top", "top/a"]), None).unwrap().scopes.len(), 2);
        let layout = selector.layout(&nodes(&["top"]), None).unwrap();
        assert_eq!((layout.scopes.len(), selector.placed.len()), (1, 1));
        holds(&layout, 1, "", "unknown");
    }
}
