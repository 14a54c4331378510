//! Whatever the layouts before and after: at no step does a flow see anything but its verdict of before or of after.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use egress_common::{Place, Task, Workloads, place};
use proptest::prelude::*;

use super::{super::names::patterns, *};
use crate::{
    compile::{Context, NodeAction, NodeDefault, compile},
    policy::PolicySet,
    ruleset::Ruleset,
    workload::Workload,
};

/// What the kernel holds, step by step. The rules of a scope are their hash.
#[derive(Debug, Clone, Default)]
struct Kernel {
    rules: HashMap<Scope, [u8; 32]>,
    users: BTreeMap<UserKey, Scope>,
    placements: BTreeMap<u64, Placement>,
    deepest: u8,
}

impl Kernel {
    fn make(&mut self, step: &Step, layout: &Layout) {
        match step {
            Step::Fill { scope, index } => {
                let before = self.rules.insert(*scope, layout.scopes[*index].hash);
                assert_eq!(before, None, "a scope in the kernel never changes");
            }
            Step::AddUsers(users) => self.users.extend(users),
            Step::SetDeepest(level) => self.deepest = *level,
            Step::Insert(added) => self.placements.extend(added),
            Step::Exchange(placements) => self.placements.clone_from(placements),
            Step::RemoveUsers(users) => self.users.retain(|key, _| !users.contains(key)),
            Step::Clear(scopes) => self.rules.retain(|scope, _| !scopes.contains(scope)),
        }
    }

    fn answer(&self, task: &Actor) -> Answer {
        match place(self, task) {
            Place::Scope(scope) => self.rules.get(&scope).map_or(Answer::Fault, |&rules| Answer::Rules(rules)),
            Place::Exempt => Answer::Exempt,
            Place::Unknown => Answer::Unknown,
        }
    }

    fn answers(&self) -> Vec<Answer> {
        Actor::all().iter().map(|task| self.answer(task)).collect()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Rules([u8; 32]),
    Exempt,
    Unknown,
    Fault,
}

impl Workloads for Kernel {
    fn placement(&self, cgroup: u64) -> Option<Placement> {
        self.placements.get(&cgroup).copied()
    }

    fn of_user(&self, key: UserKey) -> Option<Scope> {
        self.users.get(&key).copied()
    }

    fn deepest(&self) -> u8 {
        self.deepest
    }
}

/// A task in a cgroup of a binary tree: the parent of cgroup `n` is `n / 2`, the root is 1.
#[derive(Debug)]
struct Actor {
    path: Vec<u64>,
    uid: u32,
}

const CGROUPS: u64 = 32;

impl Actor {
    /// One in each cgroup, for each of a few users, and one elsewhere.
    fn all() -> Vec<Self> {
        let path = |cgroup: u64| {
            let mut path: Vec<u64> =
                std::iter::successors(Some(cgroup), |id| Some(id / 2)).take_while(|&id| id > 0).collect();
            path.reverse();
            path
        };
        let paths = (1..CGROUPS).map(path).chain([vec![1000, 1001]]);
        paths.flat_map(|path| (0..3).map(move |uid| Self { path: path.clone(), uid })).collect()
    }
}

impl Task for Actor {
    fn cgroup(&self) -> u64 {
        *self.path.last().unwrap()
    }

    fn ancestor(&self, level: u8) -> Option<u64> {
        self.path.get(usize::from(level)).copied()
    }

    fn uid(&self) -> u32 {
        self.uid
    }
}

/// [`super::plan`] with the names of the layout.
fn plan(live: &Live, layout: &Layout, change: Change) -> Result<Plan, DataplaneError> {
    super::plan(live, layout, &patterns(layout), change)
}

fn level(cgroup: u64) -> usize {
    cgroup.ilog2() as usize
}

/// Rules by one byte, and the users with rules of their own.
type AnyScope = (u8, BTreeMap<u32, prop::sample::Index>);

fn layout(scopes: Vec<AnyScope>, placed: BTreeMap<u64, (u8, u8)>) -> Layout {
    let node_default = NodeDefault { action: NodeAction::Allow, loopback: false, dns: false };
    let context = Context::new(node_default);
    let ruleset: Arc<Ruleset> = Arc::new(compile(&PolicySet::default(), &Workload::default(), &context).unwrap());
    let count = scopes.len();
    // Scopes of users have no users of their own.
    let of_users: Vec<usize> = (0..count).filter(|&index| index == 0 || scopes[index].1.is_empty()).collect();
    let seat = |number: u8| match usize::from(number) % (count + 2) {
        index if index < count => scopes::Seat::Scope(index),
        index if index == count => scopes::Seat::Exempt,
        _ => scopes::Seat::Unknown,
    };
    let placements = placed
        .into_iter()
        .map(|(id, (own, below))| (id, scopes::Placement { own: seat(own), below: seat(below), level: level(id) }));
    let placements: BTreeMap<u64, scopes::Placement> = placements.collect();
    let scopes = scopes.into_iter().enumerate().map(|(index, (rules, users))| scopes::Scope {
        ruleset: ruleset.clone(),
        hash: [rules; 32],
        written: 0,
        users: users
            .into_iter()
            .filter(|_| index > 0)
            .map(|(uid, index)| (uid, of_users[index.index(of_users.len())]))
            .collect(),
        policies: [].into(),
        terminates: false,
    });
    let elsewhere = placements.get(&1).map(|placement| placement.below);
    Layout { scopes: scopes.collect(), placements, elsewhere }
}

fn any_layout() -> impl Strategy<Value = Layout> {
    let users = prop::collection::btree_map(0_u32..3, any::<prop::sample::Index>(), 0..3);
    let scopes = prop::collection::vec((0_u8..6, users), 1..5);
    let placed = prop::collection::btree_map(1..CGROUPS, any::<(u8, u8)>(), 1..12);
    (scopes, placed).prop_map(|(scopes, placed)| layout(scopes, placed))
}

/// Makes a change step by step; every answer at every step is that of before or that of after.
fn change(kernel: &mut Kernel, live: &mut Live, layout: &Layout, change: Change) {
    let before = kernel.answers();
    let plan = plan(live, layout, change).unwrap();
    let mut after = kernel.clone();
    plan.steps.iter().for_each(|step| after.make(step, layout));
    let after = after.answers();
    for step in plan.steps.iter().chain(&plan.cleanup) {
        kernel.make(step, layout);
        for ((now, old), new) in kernel.answers().iter().zip(&before).zip(&after) {
            assert!(now == old || now == new, "{step:?}: {now:?} is neither {old:?} nor {new:?}");
        }
    }
    *live = plan.live;
}

proptest! {
    #[test]
    fn a_flow_has_its_old_or_its_new_verdict_at_every_step(layouts in prop::collection::vec(any_layout(), 1..6)) {
        let (mut kernel, mut live) = (Kernel::default(), Live::default());
        for layout in layouts {
            change(&mut kernel, &mut live, &layout, Change::Policy);
            // The same layout by itself, in a kernel that held nothing, gives the same answers; nothing else is kept.
            let (mut fresh, mut nothing) = (Kernel::default(), Live::default());
            change(&mut fresh, &mut nothing, &layout, Change::Policy);
            prop_assert_eq!(kernel.answers(), fresh.answers());
            prop_assert_eq!(kernel.rules.len(), live.scopes.len());
            prop_assert_eq!(kernel.users.len(), live.scopes.values().map(|(_, users)| users.len()).sum::<usize>());
        }
    }

    #[test]
    fn what_is_half_done_leaves_numbers_that_can_be_used_again(first in any_layout(), second in any_layout(), done: prop::sample::Index) {
        let (mut kernel, mut live) = (Kernel::default(), Live::default());
        change(&mut kernel, &mut live, &first, Change::Policy);
        // A change that fails before the exchange, and what it filled is cleared.
        let plan = plan(&live, &second, Change::Policy).unwrap();
        let before = kernel.answers();
        let filled = plan.steps.len().saturating_sub(1);
        for step in &plan.steps[..done.index(filled + 1)] {
            kernel.make(step, &second);
            prop_assert_eq!(&kernel.answers(), &before);
        }
        kernel.rules.retain(|scope, _| live.scopes.contains_key(scope));
        kernel.users.retain(|key, _| live.scopes.contains_key(&key.scope()));
        change(&mut kernel, &mut live, &second, Change::Policy);
    }

    #[test]
    fn new_cgroups_are_placed_without_touching_others(all in any_layout(), later in prop::collection::btree_set(2..CGROUPS, 0..8)) {
        let (mut kernel, mut live) = (Kernel::default(), Live::default());
        let mut first = all.clone();
        first.placements.retain(|id, _| !later.contains(id));
        change(&mut kernel, &mut live, &first, Change::Policy);
        let plan = plan(&live, &all, Change::Cgroups).unwrap();
        prop_assert!(!plan.steps.iter().any(|step| matches!(step, Step::Exchange(_))), "{:?}", plan.steps);
        prop_assert!(plan.cleanup.is_empty());
        plan.steps.iter().for_each(|step| kernel.make(step, &all));
        live = plan.live;
        let (mut fresh, mut nothing) = (Kernel::default(), Live::default());
        change(&mut fresh, &mut nothing, &all, Change::Policy);
        prop_assert_eq!(kernel.answers(), fresh.answers());
        // Those that went are forgotten when all is tidied.
        change(&mut kernel, &mut live, &first, Change::Cgroups);
        prop_assert_eq!(live.is_untidy, first.placements.len() < all.placements.len());
        change(&mut kernel, &mut live, &first, Change::Tidy);
        prop_assert!(!live.is_untidy);
        prop_assert_eq!(kernel.placements.len(), first.placements.len() + usize::from(first.elsewhere.is_some()));
    }
}

/// That many cgroups, all of them exempt.
fn exempt(count: u64) -> Layout {
    let placement = scopes::Placement { own: scopes::Seat::Exempt, below: scopes::Seat::Exempt, level: 1 };
    Layout { placements: (1..=count).map(|id| (id, placement)).collect(), ..Layout::default() }
}

#[test]
fn cgroups_that_there_is_no_room_for_are_placed_by_an_exchange() {
    let (mut kernel, mut live) = (Kernel::default(), Live::default());
    change(&mut kernel, &mut live, &exempt(600), Change::Policy);
    assert_eq!(live.room, 1200);
    for (count, is_exchange) in [(1200, false), (1201, true), (2402, false)] {
        let plan = plan(&live, &exempt(count), Change::Cgroups).unwrap();
        assert_eq!(matches!(plan.steps[..], [Step::Exchange(_)]), is_exchange, "{count}");
        change(&mut kernel, &mut live, &exempt(count), Change::Cgroups);
        assert_eq!(kernel.placements.len() as u64, count);
    }
    // Those that went take their room until all is tidied.
    let mut others = exempt(100);
    others.placements = others.placements.into_iter().map(|(id, placement)| (id + 10_000, placement)).collect();
    let plan = plan(&live, &others, Change::Cgroups).unwrap();
    assert!(matches!(plan.steps[..], [Step::Exchange(_)]) && !plan.live.is_untidy, "{:?}", plan.steps);
}

#[test]
fn more_scopes_than_there_is_room_for_are_refused_with_numbers() {
    let placed = (1..=4097)
        .map(|id| (id, scopes::Placement { own: scopes::Seat::Exempt, below: scopes::Seat::Exempt, level: 1 }));
    let one = layout(vec![(0, BTreeMap::new())], BTreeMap::new());
    let scopes = (0_u64..4097).map(|number| {
        let mut scope = one.scopes[0].clone();
        scope.written = number;
        scope
    });
    let layout = Layout { scopes: scopes.collect(), placements: placed.collect(), elsewhere: None };
    let error = plan(&Live::default(), &layout, Change::Policy).unwrap_err();
    assert!(error.to_string().contains("4097") && error.to_string().contains("4096"), "{error}");
}
