//! Least privilege: what the agent may do, and giving up the rest.
//!
//! | capability | for | without it |
//! |---|---|---|
//! | `CAP_BPF` | create programs, tries and arrays | no start, no reload |
//! | `CAP_NET_ADMIN` | load programs that judge socket addresses; attach the packet guard | no start, no guard on a cgroup that was made anew |
//! | `CAP_PERFMON` | load programs that compute addresses on their stack | no start |
//! | `CAP_SYS_PTRACE` | read `/proc/PID/exe` of processes of other users, or with other capabilities | denials name no program |
//!
//! [`START`] is all of them, [`RUNNING`] what is needed once the programs are loaded: `CAP_BPF` for the maps of the next
//! policy, `CAP_NET_ADMIN` to attach the packet guard again, and `CAP_SYS_PTRACE`. To link other programs to a cgroup that
//! was made anew, to fill and exchange maps that are open, and to add and remove pins takes none.
//!
//! What is not kept, and why: `CAP_SYS_ADMIN` only stands in for `CAP_BPF` before Linux 5.8. `CAP_DAC_OVERRIDE` and
//! `CAP_DAC_READ_SEARCH` are not needed for files of root and the 0700 directory of pins, since the agent is their owner.
//! `CAP_LEASE` is not needed to notice writers of root's own files. `CAP_SYS_RESOURCE` is needed once, by [`prepare`].
//! To end connections (`existing: Terminate`) needs [`TERMINATE`] in addition, and files of other users, which
//! `--allow-writable-policies` accepts, need [`FOREIGN_FILES`].
//!
//! Here nothing is acquired, and no user is changed.

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
    system::uname,
    thread::{
        CapabilitySets, capabilities, capability_is_in_bounding_set, remove_capability_from_bounding_set,
        set_capabilities, set_no_new_privs,
    },
};

pub use rustix::thread::CapabilitySet;

use crate::dataplane::kernel_version;

/// What the agent needs to load its programs and attach them.
pub const START: CapabilitySet = RUNNING.union(CapabilitySet::PERFMON);

/// What it needs afterwards.
pub const RUNNING: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::NET_ADMIN).union(CapabilitySet::SYS_PTRACE);

/// What it needs beside these to follow policy files of other users than root: to read them, and to notice that they are
/// being written.
pub const FOREIGN_FILES: CapabilitySet = CapabilitySet::DAC_READ_SEARCH.union(CapabilitySet::LEASE);

/// What it needs beside these to end connections in the network namespaces of others, by `setns(2)`.
pub const TERMINATE: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// To be called before the first map is created. A policy of thousands of scopes takes thousands of descriptors while it is put
/// in force, and service managers give 1,024 unless they are asked. Before Linux 5.11, maps count as locked memory, and the limit of that is
/// smaller than any policy.
pub fn prepare() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!(%error, "the limit of descriptors stays as it is");
    }
    let release = uname().release().to_string_lossy().into_owned();
    if kernel_version(&release).is_some_and(|version| version < (5, 11)) {
        let unlimited = Rlimit { current: None, maximum: None };
        if let Err(error) = setrlimit(Resource::Memlock, unlimited) {
            tracing::debug!(%error, "the limit of locked memory stays as it is");
        }
    }
}

/// Whether the calling thread has what a start needs.
pub fn may_start() -> bool {
    // `CAP_SYS_ADMIN` stands in for the two that were made from it.
    const OLDER: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::NET_ADMIN);
    const NEWER: CapabilitySet = CapabilitySet::BPF.union(CapabilitySet::PERFMON).union(CapabilitySet::NET_ADMIN);
    capabilities(None).is_ok_and(|held| held.effective.contains(NEWER) || held.effective.contains(OLDER))
}

/// Gives up every capability but these, for good: the calling thread loses them from all its sets, and neither it nor what
/// it executes can gain any. Threads that exist already keep theirs; those that it makes inherit what is left.
///
/// What is not there needs no giving up, so there is nothing that fails. A kernel that refuses nevertheless is warned of.
pub fn keep_only(needed: CapabilitySet) {
    // First, since it takes a capability that goes with the next step.
    narrow_bounding_set(needed);
    let narrowed = capabilities(None).and_then(|held| {
        set_capabilities(
            None,
            CapabilitySets {
                effective: held.effective & needed,
                permitted: held.permitted & needed,
                // The ambient set follows: it never holds what is not in this one.
                inheritable: held.inheritable & needed,
            },
        )
    });
    if let Err(error) = narrowed.and_then(|()| set_no_new_privs(true)) {
        tracing::warn!(%error, "cannot give up privileges");
    }
}

/// The bounding set is what a program of root gets when it is executed.
fn narrow_bounding_set(needed: CapabilitySet) {
    for capability in (0..u64::BITS).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        match capability_is_in_bounding_set(capability) {
            Ok(true) if !needed.contains(capability) => {
                if let Err(error) = remove_capability_from_bounding_set(capability) {
                    // Without `CAP_SETPCAP` the set stays as it is; `no_new_privs` makes it meaningless.
                    return tracing::debug!(%error, "the bounding set of capabilities stays as it is");
                }
            }
            // The kernel knows no further capabilities.
            Err(Errno::INVAL) => return,
            Ok(_) | Err(_) => {}
        }
    }
}
