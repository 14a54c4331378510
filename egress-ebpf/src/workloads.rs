//! Where the acting task belongs, or a packet. The agent fills the maps; nothing here writes them.
//!
//! What `WORKLOADS` points to never loses or changes an element: a change of policy exchanges the pointer, and it is read
//! once for each decision.

use aya_ebpf::{
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::{ArrayOfMaps, HashMap},
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_uid_gid,
        generated::{bpf_get_current_ancestor_cgroup_id, bpf_skb_ancestor_cgroup_id, bpf_skb_cgroup_id},
    },
    macros::btf_map,
    programs::SkBuffContext,
};
use egress_common::{
    ELSEWHERE, Lineage, MAX_USERS, Place, Placement, Scope, Task, UserKey, Workloads, place, workload,
};
use zerocopy::transmute;

use crate::meta;

/// Hashes take memory for what they hold: most hosts need few of the elements.
pub(crate) const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// A [`Placement`], in words: see `rules.rs` for why.
type PlacementWords = [u32; 2];
type Placements = HashMap<u64, PlacementWords, 1, NO_PREALLOC>;

#[btf_map]
static WORKLOADS: ArrayOfMaps<Placements, 1> = ArrayOfMaps::new();

#[btf_map]
static USERS: HashMap<UserKey, u32, { MAX_USERS as usize }, NO_PREALLOC> = HashMap::new();

/// Places the current task.
#[inline(always)]
pub(crate) fn place_current() -> Place {
    Place::unpack(current_place())
}

/// Places a packet, by the cgroup in which its socket was made and a user: that who made it, unless another is known to use it.
#[inline(always)]
pub(crate) fn place_of(ctx: &SkBuffContext, uid: Option<u32>) -> Place {
    let uid = match uid {
        Some(uid) => uid,
        None => ctx.get_socket_uid(),
    };
    match WORKLOADS.get(0) {
        Some(placements) => place(&Maps { placements }, &Sender { ctx, uid }),
        None => Place::Unknown,
    }
}

/// [`place`] for the current task, verified once as a function of its own.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn current_place() -> u32 {
    let place = match WORKLOADS.get(0) {
        Some(placements) => place(&Maps { placements }, &Current),
        None => Place::Unknown,
    };
    place.pack()
}

/// The workload of the current task: see [`workload`].
#[unsafe(no_mangle)]
#[inline(never)]
pub(crate) extern "C" fn current_workload() -> u64 {
    match WORKLOADS.get(0) {
        Some(placements) => workload(&Maps { placements }, &Current),
        None => ELSEWHERE,
    }
}

/// Whose share of the reports the current task takes.
#[inline(always)]
pub(crate) fn current_lineage() -> Lineage {
    lineage(&Current)
}

/// Whose share of the reports a packet takes.
#[inline(always)]
pub(crate) fn lineage_of(ctx: &SkBuffContext) -> Lineage {
    lineage(&Sender { ctx, uid: 0 })
}

#[inline(always)]
fn lineage(task: &impl Task) -> Lineage {
    let level = meta::level();
    Lineage::of(task.cgroup(), |below| task.ancestor(level.saturating_add(below)).unwrap_or(0))
}

struct Maps<'a> {
    placements: &'a Placements,
}

impl Workloads for Maps<'_> {
    #[inline(always)]
    fn placement(&self, cgroup: u64) -> Option<Placement> {
        // SAFETY: no element is changed or removed while the map can be reached from here.
        let words: PlacementWords = *unsafe { self.placements.get(cgroup) }?;
        Some(transmute!(words))
    }

    #[inline(always)]
    fn of_user(&self, key: UserKey) -> Option<Scope> {
        // SAFETY: an element is removed only after a grace period in which nothing named its scope.
        unsafe { USERS.get(key) }.copied().map(Scope::new)
    }

    #[inline(always)]
    fn deepest(&self) -> u8 {
        meta::deepest()
    }
}

/// Who made the socket of a packet. What runs meanwhile may be anybody.
struct Sender<'a> {
    ctx: &'a SkBuffContext,
    uid: u32,
}

impl Task for Sender<'_> {
    #[inline(always)]
    fn cgroup(&self) -> u64 {
        cgroup_of(self.ctx)
    }

    #[inline(always)]
    fn ancestor(&self, level: u8) -> Option<u64> {
        // SAFETY: the helper takes a valid context and a number, of which it checks the bounds, and returns a number.
        let id = unsafe { bpf_skb_ancestor_cgroup_id(self.ctx.skb.skb, level.into()) };
        (id != 0).then_some(id)
    }

    #[inline(always)]
    fn uid(&self) -> u32 {
        self.uid
    }
}

/// The id of the cgroup in which the socket of a packet was made.
#[inline(always)]
pub(crate) fn cgroup_of(ctx: &SkBuffContext) -> u64 {
    // SAFETY: the helper takes a valid context and returns a number.
    unsafe { bpf_skb_cgroup_id(ctx.skb.skb) }
}

/// The task that runs.
struct Current;

impl Task for Current {
    #[inline(always)]
    fn cgroup(&self) -> u64 {
        // SAFETY: the helper takes no arguments and only returns a number.
        unsafe { bpf_get_current_cgroup_id() }
    }

    #[inline(always)]
    fn ancestor(&self, level: u8) -> Option<u64> {
        // SAFETY: the helper takes a number, of which it checks the bounds, and returns one.
        let id = unsafe { bpf_get_current_ancestor_cgroup_id(level.into()) };
        (id != 0).then_some(id)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the lower half is the user id")]
    fn uid(&self) -> u32 {
        bpf_get_current_uid_gid() as u32
    }
}
