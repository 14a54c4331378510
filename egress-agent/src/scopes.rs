//! Which rules apply to which cgroup and user: from policies and the cgroups there are to scopes and placements. Pure but
//! for what it remembers: nothing here asks the system.
//!
//! A scope is one distinct set of policies; workloads that the same policies select share it. Only cgroups whose scope
//! may differ from their parent's are placed; what lies below a placed one follows it.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet},
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

use sha2::{Digest, Sha256};

use crate::{
    compile::{CompileError, Context, NodeAction, combine::dialled_names, compile_selecting},
    existing,
    pods::{self, Member, Pods},
    policy::{self, EgressPolicy, Kind as ObjectKind, Mode, ObjectName, PolicySet, Reach},
    ruleset::Ruleset,
    selection::{Index, Place},
    workload::{Pod, UserIdentity, Workload, names_root, select_only_below, selects_any},
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
    pub policies: Arc<[ObjectName]>,
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

/// Places cgroups by one set of policies. Remembers which policies select which cgroups, and the rules that it compiled; the
/// selector of the next set of policies takes over what still holds.
pub struct Selector {
    policies: Arc<PolicySet>,
    context: Context,
    unknown: UnknownWorkloads,
    users: Vec<UserIdentity>,
    pods: Pods,
    /// By the place of a policy in the set.
    ids: Vec<PolicyId>,
    places: HashMap<PolicyId, Place>,
    given: PolicyId,
    index: Index,
    /// Whether any policy refuses anything.
    enforces: bool,
    /// By its path, what is known of each cgroup.
    known: HashMap<PathBuf, Known>,
    /// Rules, by what they depend on.
    compiled: HashMap<ScopeKey, Arc<Compiled>>,
    scopes: Vec<(ScopeKey, Scope)>,
    by_key: HashMap<(ScopeKey, Kind), usize>,
}

/// A policy as it is written: one that is written anew has another.
type PolicyId = u32;

/// Which policies select a cgroup.
#[derive(Debug, Clone)]
struct Known {
    /// The pod that it belongs to.
    pod: Option<Arc<Member>>,
    /// The policies that select it, but those that select every workload; sorted.
    selecting: Arc<[PolicyId]>,
    serves_dns: bool,
    /// Whether cgroups below it may be selected that this one is not, by any policy; and by one that enforces. `None` if that
    /// has to be found out again.
    selects_below: Option<bool>,
    enforces_below: Option<bool>,
    /// Whether one below it may resolve names for the whole host.
    serves_dns_below: bool,
}

/// What the rules of a workload depend on, as long as the policies that select every workload, the entries and the context are
/// the same.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct ScopeKey {
    selecting: Arc<[PolicyId]>,
    /// The namespace that visibility is judged by, for pods.
    namespace: Option<String>,
    default: Option<NodeAction>,
    serves_dns: bool,
}

/// The rules of workloads that the same policies select.
#[derive(Debug)]
struct Compiled {
    ruleset: Arc<Ruleset>,
    hash: [u8; 32],
    written: u64,
    policies: Arc<[ObjectName]>,
    terminates: bool,
}

/// What a scope is for: those of users have no users of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Kind {
    Cgroup,
    User,
}

/// Rules that no workload needs are kept up to this number: pods of one kind come and go.
const MAX_UNUSED: usize = 512;

impl Selector {
    /// Places by these policies; `users` are those that policies select by.
    pub fn new(
        policies: Arc<PolicySet>,
        context: Context,
        unknown: UnknownWorkloads,
        users: Vec<UserIdentity>,
    ) -> Self {
        let count = policies.egress_policies.len();
        let ids: Vec<PolicyId> = (0..).take(count).collect();
        let enforces = context.node_default.action == NodeAction::Deny
            || policies.egress_policies.iter().any(|policy| policy.mode == Mode::Enforce);
        Self {
            index: Index::new(&policies.egress_policies, 0..count),
            places: ids.iter().copied().zip(0..).collect(),
            given: PolicyId::try_from(count).unwrap_or(PolicyId::MAX),
            ids,
            enforces,
            policies,
            context,
            unknown,
            users,
            pods: Pods::default(),
            known: HashMap::new(),
            compiled: HashMap::new(),
            scopes: Vec::new(),
            by_key: HashMap::new(),
        }
    }

    /// Takes over what an earlier selector found out and still holds: only policies that are new or changed are asked whom they
    /// select, and only what depends on them is compiled again.
    pub fn inherit(&mut self, before: &Self) {
        let fresh = self.identify(before);
        if self.context.shared_resolvers != before.context.shared_resolvers {
            return;
        }
        let changes = Changes {
            gone: before.ids.iter().copied().filter(|id| !self.places.contains_key(id)).collect(),
            index: Index::new(&self.policies.egress_policies, fresh.iter().copied()),
        };
        self.known =
            before.known.iter().map(|(path, known)| (path.clone(), self.after(&changes, path, known))).collect();
        self.compiled = self.still_compiled(before);
    }

    /// Gives each policy the id that it had; tells the places of those that are new or changed.
    fn identify(&mut self, before: &Self) -> Vec<Place> {
        let policies = &before.policies.egress_policies;
        let old: HashMap<&ObjectName, Place> = policies.iter().map(|policy| &policy.object).zip(0..).collect();
        let mut fresh = Vec::new();
        self.given = before.given;
        for (place, policy) in self.policies.egress_policies.iter().enumerate() {
            self.ids[place] = match old.get(&policy.object) {
                Some(&old) if policies[old] == *policy => before.ids[old],
                _ => {
                    fresh.push(place);
                    self.given += 1;
                    self.given - 1
                }
            };
        }
        self.places = self.ids.iter().copied().zip(0..).collect();
        fresh
    }

    /// What is known of a cgroup after policies changed.
    fn after(&self, changes: &Changes, path: &Path, known: &Known) -> Known {
        let policies = &self.policies.egress_policies;
        let fresh = changes.index.selecting(policies, &workload(path, known.pod.as_ref()));
        let is_gone = |id: &PolicyId| changes.gone.contains(id);
        let selecting = if fresh.is_empty() && !known.selecting.iter().any(is_gone) {
            Arc::clone(&known.selecting)
        } else {
            let kept = known.selecting.iter().copied().filter(|id| !is_gone(id));
            sorted(kept.chain(fresh.iter().map(|&place| self.ids[place])))
        };
        let is_root = path.as_os_str().is_empty();
        let is_wanted = |place: &Place| is_root || fresh.binary_search(place).is_err();
        // What is true may be so because of a policy that has gone; what is not is made so only by one that came.
        let below = |told: Option<bool>, comes: bool| match told {
            _ if comes => Some(true),
            Some(true) if !changes.gone.is_empty() => None,
            told => told,
        };
        let comes = changes.index.selects_only_below(path, |place| is_wanted(&place));
        let enforcing = |place: Place| is_wanted(&place) && policies[place].mode == Mode::Enforce;
        let comes_enforcing = comes && changes.index.selects_only_below(path, enforcing);
        Known {
            pod: known.pod.clone(),
            selecting,
            selects_below: below(known.selects_below, comes),
            enforces_below: below(known.enforces_below, comes_enforcing),
            ..*known
        }
    }

    /// The rules that are what they were.
    fn still_compiled(&self, before: &Self) -> HashMap<ScopeKey, Arc<Compiled>> {
        let everyone = |selector: &Self| selector.index.everyone().iter().map(|&place| selector.ids[place]).collect();
        let (now, then): (Vec<PolicyId>, Vec<PolicyId>) = (everyone(self), everyone(before));
        let (names, context) =
            (&self.context.names, Context { names: before.context.names.clone(), ..self.context.clone() });
        let is_same = now == then
            && context == before.context
            && any_enforces(&self.policies) == any_enforces(&before.policies)
            && self.policies.service_entries == before.policies.service_entries;
        if !is_same {
            return HashMap::new();
        }
        let names_differ = *names != before.context.names;
        let of_names: HashSet<PolicyId> = if names_differ { self.naming().collect() } else { HashSet::new() };
        if names_differ && self.everyone_may_name(&of_names) {
            return HashMap::new();
        }
        let holds =
            |key: &ScopeKey| key.selecting.iter().all(|id| self.places.contains_key(id) && !of_names.contains(id));
        let kept = before.compiled.iter().filter(|(key, _)| holds(key));
        kept.map(|(key, compiled)| (key.clone(), Arc::clone(compiled))).collect()
    }

    /// The policies whose rules depend on the addresses of names.
    fn naming(&self) -> impl Iterator<Item = PolicyId> {
        let objects: HashSet<&ObjectName> = dialled_names(&self.policies).map(|(object, _)| object).collect();
        let policies = self.policies.egress_policies.iter().zip(&self.ids);
        policies.filter(move |(policy, _)| objects.contains(&policy.object)).map(|(_, &id)| id)
    }

    /// Whether the rules of every workload may depend on the addresses of names.
    fn everyone_may_name(&self, naming: &HashSet<PolicyId>) -> bool {
        self.index.everyone().iter().any(|&place| naming.contains(&self.ids[place]))
            || dialled_names(&self.policies).any(|(object, _)| object.kind == ObjectKind::ServiceEntry)
    }

    /// From now on with these pods. What is known of cgroups stays, but of those whose pod is another.
    pub fn set_pods(&mut self, pods: Pods) {
        self.pods = pods;
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
    pub fn looks_below(&mut self, path: &Path) -> bool {
        let (is_parent, pod) = self.member(path);
        is_parent || {
            let known = self.know(path, pod);
            known.serves_dns_below || known.selects_below.unwrap_or_default()
        }
    }

    /// Whether cgroups of pods lie directly below a path, and the pod that it belongs to.
    fn member(&self, path: &Path) -> (bool, Option<Arc<Member>>) {
        match self.pods.place(path) {
            pods::Place::Pod(member) => (false, Some(Arc::clone(member))),
            pods::Place::Parent => (true, None),
            pods::Place::Elsewhere | pods::Place::Unknown => (false, None),
        }
    }

    /// What is known of a cgroup, found out if it is not.
    fn know(&mut self, path: &Path, pod: Option<Arc<Member>>) -> Known {
        let known = self.known.get(path).filter(|known| is_same_pod(known.pod.as_ref(), pod.as_ref()));
        let known = match known {
            Some(known) if known.selects_below.is_some() && known.enforces_below.is_some() => return known.clone(),
            Some(known) => known.clone(),
            None => self.find_out(path, pod),
        };
        let is_root = path.as_os_str().is_empty();
        let selects = |place: &Place| !is_root && known.selecting.binary_search(&self.ids[*place]).is_ok();
        let enforces = |place: &Place| self.policies.egress_policies[*place].mode == Mode::Enforce;
        let enforcing = || self.index.selects_only_below(path, |place| enforces(&place) && !selects(&place));
        let any = || self.index.selects_only_below(path, |place| !selects(&place));
        let enforces_below = known.enforces_below.unwrap_or_else(enforcing);
        let selects_below = enforces_below || known.selects_below.unwrap_or_else(any);
        let known = Known { selects_below: Some(selects_below), enforces_below: Some(enforces_below), ..known };
        self.known.insert(path.to_owned(), known.clone());
        known
    }

    /// Asks the index, which leaves out policies that cannot select the cgroup.
    fn find_out(&self, path: &Path, pod: Option<Arc<Member>>) -> Known {
        let workload = workload(path, pod.as_ref());
        let selecting = self.index.selecting(&self.policies.egress_policies, &workload);
        Known {
            pod,
            selecting: sorted(selecting.into_iter().map(|place| self.ids[place])),
            serves_dns: selects_any(&self.context.shared_resolvers, &workload),
            selects_below: None,
            enforces_below: None,
            serves_dns_below: select_only_below(&self.context.shared_resolvers, path),
        }
    }

    /// Places cgroups, the attach point first. `agent` is the agent's own.
    pub fn layout(&mut self, nodes: &[Node], agent: Option<u64>) -> Result<Layout, CompileError> {
        let mut placements = BTreeMap::new();
        for node in nodes {
            let Some(mut placement) = self.place(node)? else { continue };
            if agent == Some(node.id) {
                placement.own = Seat::Exempt;
            }
            placements.insert(node.id, placement);
        }
        let elsewhere = nodes.first().and_then(|node| placements.get(&node.id)).map(|placement| placement.below);
        let seats = placements.values().flat_map(|placement| [placement.own, placement.below]);
        let (used, renumbered) = self.in_use(seats);
        let renumber = |seat| match seat {
            Seat::Scope(scope) => Seat::Scope(renumbered[&scope]),
            Seat::Exempt | Seat::Unknown => seat,
        };
        for placement in placements.values_mut() {
            (placement.own, placement.below) = (renumber(placement.own), renumber(placement.below));
        }
        self.forget(nodes, &renumbered);
        Ok(Layout { scopes: used, placements, elsewhere: elsewhere.map(renumber) })
    }

    /// Forgets cgroups that are gone, and rules that have long been those of nobody.
    fn forget(&mut self, nodes: &[Node], used: &HashMap<usize, usize>) {
        if self.known.len() > nodes.len() {
            let there: HashSet<&Path> = nodes.iter().map(|node| node.path.as_path()).collect();
            self.known.retain(|path, _| there.contains(path.as_path()));
        }
        if self.compiled.len() > used.len() + MAX_UNUSED {
            let keys: HashSet<&ScopeKey> = used.keys().map(|&index| &self.scopes[index].0).collect();
            self.compiled.retain(|key, _| keys.contains(key));
        }
        if self.scopes.len() > used.len() + MAX_UNUSED {
            self.scopes.clear();
            self.by_key.clear();
        }
    }

    /// `None` for what belongs to a pod that is not known: it is judged as what stands below its parent.
    fn place(&mut self, node: &Node) -> Result<Option<Placement>, CompileError> {
        if let pods::Place::Unknown = self.pods.place(&node.path) {
            return Ok(None);
        }
        let (is_parent, pod) = self.member(&node.path);
        let known = self.know(&node.path, pod);
        let pod = known.pod.as_ref().map(|member| &member.pod);
        let key = ScopeKey {
            selecting: Arc::clone(&known.selecting),
            namespace: pod.map(|pod| pod.namespace.clone()),
            default: pod.and_then(|pod| pod.default),
            serves_dns: known.serves_dns,
        };
        let (own, below) = if node.path.as_os_str().is_empty() {
            let own = if self.policies.egress_policies.iter().any(names_root) {
                Seat::Scope(self.scope(key, Kind::Cgroup)?)
            } else {
                Seat::Exempt
            };
            let nobody = ScopeKey { selecting: [].into(), namespace: None, default: None, serves_dns: false };
            (own, Seat::Scope(self.scope(nobody, Kind::Cgroup)?))
        } else {
            let scope = Seat::Scope(self.scope(key, Kind::Cgroup)?);
            (scope, scope)
        };
        let below = if self.refuses_below(is_parent, &known) { Seat::Unknown } else { below };
        Ok(Some(Placement { own, below, level: node.level() }))
    }

    /// Only what enforces can make a difference to a verdict. Any policy that does may be for a pod that comes.
    fn refuses_below(&self, is_parent: bool, known: &Known) -> bool {
        match self.unknown {
            UnknownWorkloads::Inherit => false,
            UnknownWorkloads::Deny if is_parent => self.enforces || self.pods.is_any_refused(),
            UnknownWorkloads::Deny => known.enforces_below == Some(true) || self.enforces && known.serves_dns_below,
        }
    }

    /// The scope of workloads, compiled if it is the first of its kind, with those of its users.
    fn scope(&mut self, key: ScopeKey, kind: Kind) -> Result<usize, CompileError> {
        let key = (key, kind);
        if let Some(&scope) = self.by_key.get(&key) {
            return Ok(scope);
        }
        let users = if kind == Kind::Cgroup { self.scopes_of_users(&key.0)? } else { BTreeMap::new() };
        let Compiled { ruleset, hash, written, policies, terminates } = &*self.compile(&key.0)?;
        let (hash, written, terminates) = (*hash, *written, *terminates);
        let (ruleset, policies) = (Arc::clone(ruleset), Arc::clone(policies));
        let scope = Scope { ruleset, hash, written, users, policies, terminates };
        self.scopes.push((key.0.clone(), scope));
        self.by_key.insert(key, self.scopes.len() - 1);
        Ok(self.scopes.len() - 1)
    }

    fn compile(&mut self, key: &ScopeKey) -> Result<Arc<Compiled>, CompileError> {
        if let Some(compiled) = self.compiled.get(key) {
            return Ok(Arc::clone(compiled));
        }
        let mut places: Vec<Place> = key.selecting.iter().map(|id| self.places[id]).collect();
        places.extend(self.index.everyone());
        places.sort_unstable();
        let selecting: Vec<&EgressPolicy> = places.iter().map(|&place| &self.policies.egress_policies[place]).collect();
        let pod = key.namespace.clone().map(|namespace| Pod { namespace, default: key.default, ..Pod::default() });
        let workload = Workload { pod, ..Workload::default() };
        let ruleset = compile_selecting(&self.policies, &selecting, &workload, &self.context)?;
        let ruleset = if key.serves_dns { ruleset.with_dns_service() } else { ruleset };
        let compiled = Arc::new(Compiled {
            hash: ruleset.hash(),
            written: written(&ruleset),
            ruleset: Arc::new(ruleset),
            policies: selecting.iter().map(|policy| policy.object.clone()).collect(),
            terminates: selecting.iter().any(|policy| existing::terminates(policy)),
        });
        self.compiled.insert(key.clone(), Arc::clone(&compiled));
        Ok(compiled)
    }

    fn scopes_of_users(&mut self, key: &ScopeKey) -> Result<BTreeMap<u32, usize>, CompileError> {
        let mut users = BTreeMap::new();
        for identity in self.users.clone() {
            let Some(uid) = identity.uid else { continue };
            let policies = self.policies.egress_policies.iter().zip(&self.ids);
            let of_user = policies.filter(|(policy, _)| selects_user(policy, &identity, key.namespace.as_deref()));
            let selecting = sorted(key.selecting.iter().copied().chain(of_user.map(|(_, &id)| id)));
            if *selecting != *key.selecting {
                let alone = Workload { user: Some(identity), ..Workload::default() };
                let serves_dns = key.serves_dns || selects_any(&self.context.shared_resolvers, &alone);
                let key = ScopeKey { selecting, serves_dns, ..key.clone() };
                users.insert(uid, self.scope(key, Kind::User)?);
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
                used.extend(self.scopes[scope].1.users.values());
            }
        }
        let renumbered: HashMap<usize, usize> = used.iter().enumerate().map(|(new, &old)| (old, new)).collect();
        let scopes = used.iter().map(|&old| {
            let mut scope = self.scopes[old].1.clone();
            scope.users.values_mut().for_each(|user| *user = renumbered[user]);
            scope
        });
        (scopes.collect(), renumbered)
    }
}

/// What changed between two sets of policies.
struct Changes {
    /// Policies that are gone or were written anew.
    gone: HashSet<PolicyId>,
    /// Those that are new or written anew.
    index: Index,
}

fn sorted(ids: impl Iterator<Item = PolicyId>) -> Arc<[PolicyId]> {
    let ids: BTreeSet<PolicyId> = ids.collect();
    ids.into_iter().collect()
}

fn workload(path: &Path, member: Option<&Arc<Member>>) -> Workload {
    Workload { pod: member.map(|member| member.pod.clone()), ..Workload::of_cgroup(path) }
}

/// Whether policies see the same pod.
fn is_same_pod(a: Option<&Arc<Member>>, b: Option<&Arc<Member>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b) || a.pod == b.pod,
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    }
}

/// Whether a policy selects a user, wherever it is among what the policy reaches; `namespace` is that of its pod.
fn selects_user(policy: &EgressPolicy, identity: &UserIdentity, namespace: Option<&str>) -> bool {
    let users = policy.workloads.iter().flatten().filter(|selector| matches!(selector, policy::Selector::User(_)));
    let alone = Workload { user: Some(identity.clone()), ..Workload::default() };
    let is_reached = policy.reach == Reach::Anything || namespace == Some(&*policy.object.namespace);
    is_reached && users.into_iter().any(|selector| selects_any(std::slice::from_ref(selector), &alone))
}

/// What the node's default depends on: see [`crate::compile::combine`].
fn any_enforces(policies: &PolicySet) -> bool {
    policies.egress_policies.iter().any(|policy| policy.mode == Mode::Enforce && policy.reach == Reach::Anything)
}

/// Where rules are written, as a number.
fn written(ruleset: &Ruleset) -> u64 {
    let mut hasher = DefaultHasher::new();
    ruleset.rules.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        compile::{NodeAction, NodeDefault},
        policy::load::load_text,
        workload::selects,
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
        assert_eq!((layout.scopes.len(), selector.known.len()), (1, 1));
        holds(&layout, 1, "", "unknown");
    }

    /// What the world of a selector is made of, each part chosen anew by numbers.
    #[derive(Debug, Clone)]
    struct World {
        /// What each policy selects and says, by its name; absent is none.
        policies: [Option<(usize, usize)>; 6],
        cgroups: BTreeSet<usize>,
        pod: Option<usize>,
        is_named: bool,
        has_entry: bool,
    }

    const SELECTORS: [&str; 13] = [
        "",
        "workloads: [{ cgroup: top/a }]",
        "workloads: [{ cgroup: 'top/*' }]",
        "workloads: [{ cgroup: '**/b' }]",
        "workloads: [{ cgroup: top/a/b }, { user: 33 }]",
        "workloads: [{ user: 33 }]",
        "workloads: [{ user: 34 }, { cgroup: top/u.slice }]",
        "workloads: [{ unit: x.service }]",
        "workloads: [{ unit: '*.service' }, { cgroup: top }]",
        "workloads: [{ cgroup: / }]",
        "workloads: [{ pod: { matchLabels: { app: web } } }]",
        "workloads: [{ pod: {} }, { cgroup: kubepods/podx/c }]",
        "workloads: [{ cgroup: 'top/a*' }, { cgroup: other }]",
    ];
    const SPECS: [&str; 6] = [
        "mode: Audit",
        "defaultAction: Allow",
        "allow: [{ to: [{ cidr: 192.0.2.1/32 }] }]",
        "allow: [{ to: [{ host: a.example }] }]",
        "existing: Terminate, dns: { queries: Named }",
        "services: []",
    ];
    const PATHS: [&str; 12] = [
        "",
        "top",
        "top/a",
        "top/a/b",
        "top/ab",
        "top/c",
        "other",
        "top.slice",
        "top.slice/x.service",
        "kubepods",
        "kubepods/podx",
        "kubepods/podx/c",
    ];

    fn a_world() -> impl Strategy<Value = World> {
        let policy = prop::option::of((0..SELECTORS.len(), 0..SPECS.len()));
        let policies = prop::array::uniform6(policy);
        let cgroups = prop::collection::btree_set(0..PATHS.len(), 0..PATHS.len());
        (policies, cgroups, prop::option::of(0..3_usize), any::<bool>(), any::<bool>()).prop_map(
            |(policies, cgroups, pod, is_named, has_entry)| World { policies, cgroups, pod, is_named, has_entry },
        )
    }

    /// Worlds one after the other; most parts stay as they are from one to the next.
    fn worlds() -> impl Strategy<Value = Vec<World>> {
        (a_world(), prop::collection::vec((a_world(), 0..6_usize, any::<[bool; 4]>()), 1..6)).prop_map(
            |(first, changes)| {
                let mut worlds = vec![first];
                for (next, policy, [cgroups, pods, names, entry]) in changes {
                    let mut world = worlds.last().unwrap().clone();
                    world.policies[policy] = next.policies[policy];
                    if cgroups {
                        world.cgroups = next.cgroups;
                    }
                    if pods {
                        world.pod = next.pod;
                    }
                    world.is_named ^= names;
                    world.has_entry ^= entry && names;
                    worlds.push(world);
                }
                worlds
            },
        )
    }

    impl World {
        fn selector(&self) -> Selector {
            let policies = self.policies.iter().enumerate().filter_map(|(name, policy)| Some((name, (*policy)?)));
            let mut documents: Vec<String> = policies
                .map(|(name, (selects, says))| {
                    let parts = [SELECTORS[selects], SPECS[says]].into_iter().filter(|part| !part.is_empty());
                    policy(&format!("p{name}"), &parts.collect::<Vec<_>>().join(", "))
                })
                .collect();
            if self.has_entry {
                documents.push("---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: { name: e }\nspec: { hosts: [b.example], resolution: DNS, ports: [{ number: 443, name: x, protocol: TLS }] }\n".to_owned());
            }
            let mut selector = selector(&documents, UnknownWorkloads::Deny, &[33, 34]);
            if self.is_named {
                let address = ["192.0.2.7".parse().unwrap()];
                let names = ["a.example", "b.example"].map(|name| (name.to_owned(), address.into()));
                selector.context.names.0.extend(names);
            }
            let member = self.pod.map(|number| {
                let labels = BTreeMap::from([("app".to_owned(), ["web", "db"][number % 2].to_owned())]);
                let default = (number == 2).then_some(NodeAction::Deny);
                let pod = Pod { namespace: "default".to_owned(), labels, default, ..Pod::default() };
                Member { info: pods::PodInfo { uid: "x".to_owned(), ..pods::PodInfo::default() }, pod }
            });
            selector.set_pods(Pods::below("/".as_ref()).with(member, self.pod == Some(2)));
            selector
        }

        /// Each has the id that it always has.
        fn nodes(&self) -> Vec<Node> {
            let node = |&index: &usize| Node { id: 1 + index as u64, path: PATHS[index].into() };
            self.cgroups.iter().map(node).collect()
        }
    }

    /// A layout without the numbers of its scopes, and where is looked further.
    fn meant(selector: &mut Selector, nodes: &[Node]) -> Vec<String> {
        let looks: Vec<bool> = PATHS.iter().map(|path| selector.looks_below(path.as_ref())).collect();
        let layout = selector.layout(nodes, Some(3)).unwrap();
        let rules =
            |scope: &Scope| format!("{:?} {} {:?} {}", scope.hash, scope.written, scope.policies, scope.terminates);
        let of_seat = |seat| match seat {
            Seat::Scope(index) => {
                let scope = &layout.scopes[index];
                let users = scope.users.iter().map(|(uid, &index)| format!("{uid}: {}", rules(&layout.scopes[index])));
                format!("{} {:?}", rules(scope), users.collect::<Vec<_>>())
            }
            other => format!("{other:?}"),
        };
        let placed = layout.placements.iter();
        let placed = placed.map(|(id, at)| format!("{id} {} {} {}", of_seat(at.own), of_seat(at.below), at.level));
        let elsewhere = layout.elsewhere.map(of_seat);
        placed.chain([format!("{elsewhere:?} {looks:?}")]).collect()
    }

    proptest! {
        #[test]
        fn what_is_taken_over_is_what_would_be_found_out_anew(worlds in worlds()) {
            let mut last: Option<Selector> = None;
            for world in worlds {
                let (mut anew, mut kept) = (world.selector(), world.selector());
                if let Some(last) = &last {
                    kept.inherit(last);
                }
                prop_assert_eq!(meant(&mut kept, &world.nodes()), meant(&mut anew, &world.nodes()));
                last = Some(kept);
            }
        }

        /// Cgroups and pods come and go, and the policies stay.
        #[test]
        fn what_is_remembered_is_what_would_be_found_out_anew(first in a_world(), then in prop::collection::vec(a_world(), 1..6)) {
            let mut kept = first.selector();
            for next in then {
                let world = World { policies: first.policies, is_named: first.is_named, has_entry: first.has_entry, ..next };
                kept.set_pods(world.selector().pods().clone());
                let mut anew = world.selector();
                prop_assert_eq!(meant(&mut kept, &world.nodes()), meant(&mut anew, &world.nodes()));
            }
        }

        /// By the policies that select a cgroup, asked one by one.
        #[test]
        fn a_cgroup_has_the_policies_that_select_it(world in a_world()) {
            let mut selector = world.selector();
            let nodes = world.nodes();
            let layout = selector.layout(&nodes, None).unwrap();
            for node in nodes.iter().filter(|node| !node.path.as_os_str().is_empty()) {
                let Some(&Placement { own: Seat::Scope(index), .. }) = layout.placements.get(&node.id) else { continue };
                let (_, pod) = selector.member(&node.path);
                let workload = workload(&node.path, pod.as_ref());
                let policies = selector.policies.egress_policies.iter();
                let expected: Vec<&ObjectName> =
                    policies.filter(|policy| selects(policy, &workload)).map(|policy| &policy.object).collect();
                prop_assert_eq!(layout.scopes[index].policies.iter().collect::<Vec<_>>(), expected);
            }
        }
    }
}
