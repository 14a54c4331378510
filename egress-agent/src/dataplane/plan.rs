//! The steps from what the kernel holds to what it is to hold. Pure.
//!
//! 1. A scope in the kernel never changes. What is new gets a scope of its own, filled before anything points to it.
//! 2. Placements are exchanged as a whole, by one pointer: before it a flow has its old verdict, after it its new one.
//!    Cgroups that are placed for the first time are inserted one by one, if there is room.
//! 3. What nothing points to any more is removed, after the grace period that the exchange waits for.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    ops::Bound,
};

use egress_common::{ELSEWHERE, MAX_LEVEL, MAX_SCOPES, Placement, Scope, Seat, UserKey};

use super::{DataplaneError, names::Pattern};
use crate::scopes::{self, Layout};

/// What tells scopes apart: their rules, and those of their users; and the names that others name and their patterns cover.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Identity {
    rules: ([u8; 32], u64),
    users: BTreeMap<u32, ([u8; 32], u64)>,
    covered: BTreeSet<Pattern>,
}

/// What the kernel holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Live {
    /// Each with its users.
    pub(super) scopes: BTreeMap<Scope, (Identity, BTreeMap<u32, Scope>)>,
    /// By cgroup id, that of [`ELSEWHERE`] included.
    pub(super) placements: BTreeMap<u64, Placement>,
    /// See [`egress_common::Workloads::deepest`].
    pub(super) deepest: u8,
    /// How many placements there is room for.
    pub(super) room: usize,
    /// Cgroups that are gone are among the placements, or others are missing.
    pub(super) is_untidy: bool,
}

/// Room for as many cgroups again, so that new ones can be inserted.
pub(super) fn room(placements: usize) -> usize {
    const LEAST: usize = 1024;
    (placements * 2).max(LEAST)
}

/// What brings a new layout about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Another policy, or the first.
    Policy,
    /// Cgroups came and went; the policy is the same.
    Cgroups,
    /// As [`Change::Cgroups`], and those that went are to be forgotten.
    Tidy,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Puts the rules of a scope of the layout under a number that nothing points to.
    Fill { scope: Scope, index: usize },
    /// Adds users to a scope that nothing points to.
    AddUsers(BTreeMap<UserKey, Scope>),
    /// Sets the level from which ancestors are asked.
    SetDeepest(u8),
    /// Places cgroups that were not placed.
    Insert(BTreeMap<u64, Placement>),
    /// Exchanges all placements at once, and waits until no program sees the old ones.
    Exchange(BTreeMap<u64, Placement>),
    /// Removes users of a scope that nothing points to.
    RemoveUsers(BTreeSet<UserKey>),
    /// Removes scopes that nothing points to.
    Clear(BTreeSet<Scope>),
}

/// The steps of a change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// If one of these fails, all that was filled is cleared, and nothing has changed; but if cgroups are being inserted,
    /// some of them point to what was filled.
    pub(super) steps: Vec<Step>,
    /// Afterwards: if one of these fails, memory is lost, and no verdict is wrong.
    pub(super) cleanup: Vec<Step>,
    /// The number of each scope of the layout.
    pub(super) numbers: Vec<Scope>,
    /// What the kernel holds then.
    pub(super) live: Live,
}

/// Plans a change. `names` are all names and patterns of the layout.
pub(super) fn plan(
    live: &Live,
    layout: &Layout,
    names: &BTreeSet<Pattern>,
    change: Change,
) -> Result<Plan, DataplaneError> {
    let identities = identities(layout, names);
    let numbers = assign(live, &identities)?;
    let mut next = Live { deepest: deepest(layout), room: live.room, ..Live::default() };
    let mut steps = Vec::new();
    let mut users = BTreeMap::new();
    for (index, scope) in layout.scopes.iter().enumerate() {
        let number = numbers[index];
        let of_users: BTreeMap<u32, Scope> = scope.users.iter().map(|(&uid, &index)| (uid, numbers[index])).collect();
        // Equal scopes of a layout are one in the kernel.
        if !live.scopes.contains_key(&number) && !next.scopes.contains_key(&number) {
            steps.push(Step::Fill { scope: number, index });
            users.extend(of_users.iter().map(|(&uid, &scope)| (UserKey::new(number, uid), scope)));
        }
        next.scopes.insert(number, (identities[index].clone(), of_users));
    }
    steps.extend((!users.is_empty()).then_some(Step::AddUsers(users)));
    steps.extend((next.deepest > live.deepest).then_some(Step::SetDeepest(next.deepest)));
    next.placements = placements(layout, &numbers);
    if next == *live {
        return Ok(Plan { steps: Vec::new(), cleanup: Vec::new(), numbers, live: next });
    }
    if change == Change::Cgroups
        && let Some(added) = added(live, &next)
        && live.placements.len() + added.len() <= live.room
    {
        return Ok(insert(live, next, added, numbers, steps));
    }
    next.room = room(next.placements.len());
    steps.push(Step::Exchange(next.placements.clone()));
    let mut cleanup = Vec::new();
    cleanup.extend((next.deepest < live.deepest).then_some(Step::SetDeepest(next.deepest)));
    let gone = || live.scopes.iter().filter(|(scope, _)| !next.scopes.contains_key(scope));
    let users = gone().flat_map(|(&scope, (_, users))| users.keys().map(move |&uid| UserKey::new(scope, uid)));
    let (users, scopes): (BTreeSet<UserKey>, BTreeSet<Scope>) =
        (users.collect(), gone().map(|(&scope, _)| scope).collect());
    cleanup.extend((!users.is_empty()).then_some(Step::RemoveUsers(users)));
    cleanup.extend((!scopes.is_empty()).then_some(Step::Clear(scopes)));
    Ok(Plan { steps, cleanup, numbers, live: next })
}

/// The number of each scope of the layout: that of an equal one in the kernel, or one that is free.
fn assign(live: &Live, identities: &[Identity]) -> Result<Vec<Scope>, DataplaneError> {
    let mut numbers: HashMap<Identity, Scope> =
        live.scopes.iter().map(|(&scope, (identity, _))| (identity.clone(), scope)).collect();
    let mut free = (0..MAX_SCOPES).map(Scope::new).filter(|scope| !live.scopes.contains_key(scope));
    let mut given = Vec::with_capacity(identities.len());
    for identity in identities {
        let number = match numbers.get(identity) {
            Some(&number) => number,
            None => free.next().ok_or(DataplaneError::TooManyScopes {
                found: live.scopes.len() + identities.len(),
                limit: MAX_SCOPES as usize,
            })?,
        };
        numbers.insert(identity.clone(), number);
        given.push(number);
    }
    Ok(given)
}

fn identities(layout: &Layout, all: &BTreeSet<Pattern>) -> Vec<Identity> {
    let rules = |scope: &scopes::Scope| (scope.hash, scope.written);
    let users =
        |scope: &scopes::Scope| scope.users.iter().map(|(&uid, &index)| (uid, rules(&layout.scopes[index]))).collect();
    let identity =
        |scope: &scopes::Scope| Identity { rules: rules(scope), users: users(scope), covered: covered(scope, all) };
    layout.scopes.iter().map(identity).collect()
}

/// The names that the patterns of a scope cover and that are none of its own.
fn covered(scope: &scopes::Scope, all: &BTreeSet<Pattern>) -> BTreeSet<Pattern> {
    let own = || scope.ruleset.views(Scope::new(0)).flat_map(|(_, table)| table.names()).map(|(name, _)| name);
    // An exact name ends with a zero byte, and covers nothing else.
    let wildcards = own().filter(|name| name.last() != Some(&0));
    let below = |wildcard: &[u8]| {
        let wildcard = wildcard.to_vec();
        let from = (Bound::Excluded(&*wildcard), Bound::Unbounded);
        all.range::<[u8], _>(from).take_while(|name| name.starts_with(&wildcard)).cloned().collect::<Vec<_>>()
    };
    let mut covered: BTreeSet<Pattern> = wildcards.flat_map(below).collect();
    for name in own() {
        covered.remove(name);
    }
    covered
}

fn placements(layout: &Layout, numbers: &[Scope]) -> BTreeMap<u64, Placement> {
    let seat = |seat| match seat {
        scopes::Seat::Exempt => Seat::EXEMPT,
        scopes::Seat::Unknown => Seat::UNKNOWN,
        scopes::Seat::Scope(index) if layout.scopes[index].users.is_empty() => Seat::scope(numbers[index]),
        scopes::Seat::Scope(index) => Seat::scope_by_user(numbers[index]),
    };
    let of_cgroups = layout
        .placements
        .iter()
        .map(|(&id, placement)| (id, Placement { own: seat(placement.own), below: seat(placement.below) }));
    let elsewhere = layout.elsewhere.map(|there| (ELSEWHERE, Placement { own: seat(there), below: seat(there) }));
    of_cgroups.chain(elsewhere).collect()
}

fn deepest(layout: &Layout) -> u8 {
    let deepest = layout.placements.values().map(|placement| placement.level).max().unwrap_or(0);
    u8::try_from(deepest).unwrap_or(MAX_LEVEL).min(MAX_LEVEL)
}

/// What is new, where everything that is placed and still there stays as it is.
fn added(live: &Live, next: &Live) -> Option<BTreeMap<u64, Placement>> {
    let is_kept = |(id, placement): (&u64, &Placement)| live.placements.get(id).is_none_or(|old| old == placement);
    next.placements.iter().all(is_kept).then(|| {
        let added = next.placements.iter().filter(|(id, _)| !live.placements.contains_key(id));
        added.map(|(&id, &placement)| (id, placement)).collect()
    })
}

/// Nothing is removed: what is gone, and the scopes that only it used, are kept until all is tidied.
fn insert(
    live: &Live,
    mut next: Live,
    added: BTreeMap<u64, Placement>,
    numbers: Vec<Scope>,
    mut steps: Vec<Step>,
) -> Plan {
    next.is_untidy = live.is_untidy || next.placements.len() < live.placements.len() + added.len();
    next.deepest = next.deepest.max(live.deepest);
    for (&id, &placement) in &live.placements {
        next.placements.entry(id).or_insert(placement);
    }
    for (&scope, contents) in &live.scopes {
        next.scopes.entry(scope).or_insert_with(|| contents.clone());
    }
    steps.extend((!added.is_empty()).then_some(Step::Insert(added)));
    Plan { steps, cleanup: Vec::new(), numbers, live: next }
}

#[cfg(test)]
mod tests;
