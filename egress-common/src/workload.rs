//! Whose rules apply: from the cgroup and the user of a task to a scope.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Scope;

/// Deepest level of the cgroup hierarchy at which a cgroup can be placed; the root is level 0. Tasks in deeper cgroups are
/// found by their ancestors.
pub const MAX_LEVEL: u8 = 63;

/// The cgroup id under which tasks are judged that act, with a socket made below the attach point, from a cgroup that is
/// not below it. No cgroup has this id.
pub const ELSEWHERE: u64 = 0;

/// The workload that stands for all who resolve names for the whole host. No cgroup has this id.
pub const SHARED: u64 = u64::MAX;

/// Where a task belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// These rules apply.
    Scope(Scope),
    /// No rules apply: the agent itself, and tasks of the root cgroup that no policy names.
    Exempt,
    /// A cgroup that the agent has yet to place; refused.
    Unknown,
}

impl Place {
    /// As one number.
    #[inline(always)]
    pub const fn pack(self) -> u32 {
        match self {
            Self::Scope(scope) => Seat::scope(scope).0,
            Self::Exempt => Seat::EXEMPT.0,
            Self::Unknown => Seat::UNKNOWN.0,
        }
    }

    /// What [`Place::pack`] packed.
    #[inline(always)]
    pub const fn unpack(number: u32) -> Self {
        match Seat(number) {
            Seat::EXEMPT => Self::Exempt,
            Seat::UNKNOWN => Self::Unknown,
            Seat(number) => Self::Scope(Scope::new(number)),
        }
    }
}

/// A [`Place`] as it stands in the `WORKLOADS` map; may ask for the user first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Seat(u32);

/// Marks a seat whose scope depends on the user.
const BY_USER: u32 = 1 << 31;

impl Seat {
    /// No rules apply.
    pub const EXEMPT: Self = Self(u32::MAX);
    /// The agent has yet to place it.
    pub const UNKNOWN: Self = Self(u32::MAX - 1);

    /// These rules apply.
    pub const fn scope(scope: Scope) -> Self {
        Self(scope.index())
    }

    /// These rules apply, unless the `USERS` map has others for the user.
    pub const fn scope_by_user(scope: Scope) -> Self {
        Self(scope.index() | BY_USER)
    }

    /// The scope, if rules apply.
    #[inline(always)]
    pub const fn base(self) -> Option<Scope> {
        match self {
            Self::EXEMPT | Self::UNKNOWN => None,
            Self(number) => Some(Scope::new(number & !BY_USER)),
        }
    }

    /// Whether the scope depends on the user.
    #[inline(always)]
    pub const fn is_by_user(self) -> bool {
        self.base().is_some() && self.0 & BY_USER != 0
    }
}

/// An element of the `WORKLOADS` map: what holds for the tasks of a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Placement {
    /// For tasks in the cgroup itself.
    pub own: Seat,
    /// For tasks in cgroups below it that are not placed themselves.
    pub below: Seat,
}

/// The key of the `USERS` map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct UserKey {
    scope: u32,
    /// In the initial user namespace.
    uid: u32,
}

impl UserKey {
    /// A user among the tasks of a scope.
    #[inline(always)]
    pub const fn new(scope: Scope, uid: u32) -> Self {
        Self { scope: scope.index(), uid }
    }

    /// The scope of the cgroup.
    pub const fn scope(self) -> Scope {
        Scope::new(self.scope)
    }
}

const _: () = assert!(size_of::<Placement>() == 8 && size_of::<UserKey>() == 8);

/// Where placements are kept: kernel maps, or a model of them.
pub trait Workloads {
    /// What holds for a cgroup, if it is placed.
    fn placement(&self, cgroup: u64) -> Option<Placement>;

    /// The scope of a user, where it is not that of the cgroup.
    fn of_user(&self, key: UserKey) -> Option<Scope>;

    /// The deepest level at which a cgroup is placed, at most [`MAX_LEVEL`].
    fn deepest(&self) -> u8;
}

/// Who acts.
pub trait Task {
    /// Id of its cgroup.
    fn cgroup(&self) -> u64;

    /// Id of the ancestor of its cgroup at a level, that cgroup itself included; `None` if it is not that deep.
    fn ancestor(&self, level: u8) -> Option<u64>;

    /// Its user id, in the initial user namespace.
    fn uid(&self) -> u32;
}

/// Places a task: by its cgroup, or by the nearest ancestor that is placed, and then by its user.
///
/// Ancestors are asked from the deepest level at which anything is placed, so nesting below it costs nothing.
#[inline(always)]
pub fn place<W: Workloads, T: Task>(workloads: &W, task: &T) -> Place {
    match seat(workloads, task) {
        Seat::EXEMPT => Place::Exempt,
        Seat::UNKNOWN => Place::Unknown,
        seat => match seat.base() {
            Some(scope) if seat.is_by_user() => {
                Place::Scope(workloads.of_user(UserKey::new(scope, task.uid())).unwrap_or(scope))
            }
            Some(scope) => Place::Scope(scope),
            None => Place::Unknown,
        },
    }
}

/// The id of the cgroup by which a task is placed, or [`ELSEWHERE`]: those that share it share what they learnt.
#[inline(always)]
pub fn workload<W: Workloads, T: Task>(workloads: &W, task: &T) -> u64 {
    match nearest(workloads, task) {
        Some((id, _)) => id,
        None => ELSEWHERE,
    }
}

#[inline(always)]
fn seat<W: Workloads, T: Task>(workloads: &W, task: &T) -> Seat {
    if let Some((id, placement)) = nearest(workloads, task) {
        return if id == task.cgroup() { placement.own } else { placement.below };
    }
    match workloads.placement(ELSEWHERE) {
        Some(placement) => placement.below,
        None => Seat::UNKNOWN,
    }
}

/// The nearest ancestor that is placed.
#[inline(always)]
fn nearest<W: Workloads, T: Task>(workloads: &W, task: &T) -> Option<(u64, Placement)> {
    let mut level = workloads.deepest();
    for _ in 0..=MAX_LEVEL {
        if let Some(id) = task.ancestor(level)
            && let Some(placement) = workloads.placement(id)
        {
            return Some((id, placement));
        }
        if level == 0 {
            break;
        }
        level -= 1;
    }
    None
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::{collections::HashMap, vec, vec::Vec};

    use super::*;

    #[derive(Default)]
    struct Model {
        placements: HashMap<u64, Placement>,
        users: HashMap<UserKey, Scope>,
        deepest: u8,
    }

    impl Workloads for Model {
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

    /// Cgroup ids from the root down, and a user.
    struct Actor(Vec<u64>, u32);

    impl Task for Actor {
        fn cgroup(&self) -> u64 {
            *self.0.last().unwrap()
        }

        fn ancestor(&self, level: u8) -> Option<u64> {
            self.0.get(usize::from(level)).copied()
        }

        fn uid(&self) -> u32 {
            self.1
        }
    }

    const A: Scope = Scope::new(1);
    const B: Scope = Scope::new(2);

    fn model(placements: &[(u64, Seat, Seat)], deepest: u8) -> Model {
        let placements = placements.iter().map(|&(id, own, below)| (id, Placement { own, below })).collect();
        Model { placements, deepest, ..Model::default() }
    }

    #[test]
    fn the_nearest_placed_ancestor_speaks_for_what_is_below_it() {
        let workloads = model(&[(1, Seat::EXEMPT, Seat::scope(A)), (3, Seat::scope(B), Seat::UNKNOWN)], 2);
        let at = |path: &[u64]| place(&workloads, &Actor(path.to_vec(), 0));
        assert_eq!(at(&[1]), Place::Exempt);
        assert_eq!(at(&[1, 2]), Place::Scope(A));
        assert_eq!(at(&[1, 2, 3]), Place::Scope(B));
        assert_eq!(at(&[1, 2, 3, 4, 5]), Place::Unknown);
        let of = |path: &[u64]| workload(&workloads, &Actor(path.to_vec(), 0));
        assert_eq!([of(&[1]), of(&[1, 2]), of(&[1, 2, 3]), of(&[1, 2, 3, 4]), of(&[9])], [1, 1, 3, 3, ELSEWHERE]);
    }

    #[test]
    fn nesting_below_the_deepest_level_does_not_matter() {
        let workloads = model(&[(1, Seat::scope(A), Seat::scope(A)), (2, Seat::scope(B), Seat::scope(B))], 1);
        let deep: Vec<u64> = (1..5000).collect();
        assert_eq!(place(&workloads, &Actor(deep, 0)), Place::Scope(B));
    }

    #[test]
    fn the_deepest_level_is_reached_from_the_root_and_back() {
        let path: Vec<u64> = (1..=u64::from(MAX_LEVEL) + 1).collect();
        let root = model(&[(1, Seat::scope(A), Seat::scope(A))], MAX_LEVEL);
        assert_eq!(place(&root, &Actor(path.clone(), 0)), Place::Scope(A));
        let leaf = model(&[(u64::from(MAX_LEVEL) + 1, Seat::scope(B), Seat::scope(B))], MAX_LEVEL);
        assert_eq!(place(&leaf, &Actor(path, 0)), Place::Scope(B));
    }

    #[test]
    fn a_task_elsewhere_is_judged_as_an_unplaced_one_below_the_attach_point() {
        let mut workloads = model(&[(2, Seat::EXEMPT, Seat::scope(A)), (ELSEWHERE, Seat::UNKNOWN, Seat::scope(A))], 1);
        assert_eq!(place(&workloads, &Actor(vec![1, 9], 0)), Place::Scope(A));
        workloads.placements.clear();
        assert_eq!(place(&workloads, &Actor(vec![1, 9], 0)), Place::Unknown);
    }

    #[test]
    fn users_are_asked_for_only_where_the_seat_says_so() {
        let mut workloads = model(&[(1, Seat::scope_by_user(A), Seat::scope(A))], 0);
        workloads.users.insert(UserKey::new(A, 33), B);
        assert_eq!(place(&workloads, &Actor(vec![1], 33)), Place::Scope(B));
        assert_eq!(place(&workloads, &Actor(vec![1], 34)), Place::Scope(A));
        assert_eq!(place(&workloads, &Actor(vec![1, 2], 33)), Place::Scope(A));
    }

    #[test]
    fn a_place_survives_packing() {
        for place in [Place::Scope(Scope::new(0)), Place::Scope(B), Place::Exempt, Place::Unknown] {
            assert_eq!(Place::unpack(place.pack()), place);
        }
    }

    #[test]
    fn what_is_no_scope_has_no_base() {
        for seat in [Seat::EXEMPT, Seat::UNKNOWN] {
            assert_eq!((seat.base(), seat.is_by_user()), (None, false));
        }
    }
}
