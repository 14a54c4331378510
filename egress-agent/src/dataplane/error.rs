//! What can go wrong with the kernel.

use std::{io, path::PathBuf};

use aya::{EbpfError, maps::MapError, programs::ProgramError};
use thiserror::Error;

use crate::pins::PinError;

/// Why the kernel could not be brought to enforce.
#[derive(Debug, Error)]
pub enum DataplaneError {
    /// The running kernel is too old.
    #[error("kernel {found} is too old: cgroup filters with ring buffers and inner maps need Linux 5.10")]
    KernelTooOld {
        /// `uname -r`.
        found: String,
    },
    /// The agent may not use bpf.
    #[error(
        "no permission to load programs into the kernel: run as root, or with CAP_BPF, CAP_NET_ADMIN and \
             CAP_PERFMON"
    )]
    Privilege,
    /// The object file was refused.
    #[error("the kernel refused the programs or their maps")]
    Load(#[source] Box<EbpfError>),
    /// One program was refused.
    #[error("the kernel refused program {hook}")]
    Program {
        /// Its hook.
        hook: &'static str,
        /// Why.
        #[source]
        cause: ProgramError,
    },
    /// The object file does not hold what it must.
    #[error("the object file has no {what} {name}")]
    Missing {
        /// "map" or "program".
        what: &'static str,
        /// Its name.
        name: &'static str,
    },
    /// A map call failed.
    #[error("cannot {what} map {name}")]
    Map {
        /// The map.
        name: &'static str,
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        cause: MapError,
    },
    /// A map call that aya does not make failed.
    #[error("cannot {what} map {name}")]
    Element {
        /// The map.
        name: &'static str,
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The policy needs more memory than it may have.
    #[error(
        "the policy needs about {} MB of kernel memory ({prefixes} prefixes and {segments} port ranges in {scopes} scopes), \
         and may have {} MB: see --memory-limit", .bytes.div_ceil(1_000_000), .limit / 1_000_000
    )]
    TooLarge {
        /// Of all scopes together.
        prefixes: usize,
        /// Of all scopes together.
        segments: usize,
        /// Distinct sets of policies.
        scopes: usize,
        /// What that takes.
        bytes: u64,
        /// What it may take.
        limit: u64,
    },
    /// Threads and processes are limited, too.
    #[error("cannot start a thread to fill maps")]
    NoThread(#[source] io::Error),
    /// The kernel does not tell network namespaces apart.
    #[error("cannot tell which network namespace this is")]
    NoCookie(#[source] io::Error),
    /// More scopes than the maps have room for.
    #[error("the policies make {found} distinct sets of rules, and there is room for {limit}: merge their selectors")]
    TooManyScopes {
        /// Of the old and the new policy together.
        found: usize,
        /// As many fit.
        limit: usize,
    },
    /// The maps are of another version.
    #[error("the maps are of another version of the agent (ABI {found}, this is {})", egress_common::ABI_VERSION)]
    OtherVersion {
        /// Theirs.
        found: u32,
    },
    /// The maps could not be pinned.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// Somebody else's program leaves no room.
    #[error(
        "cannot attach {hook} to cgroup {}: not permitted, because another {hook} program leaves no room: one attached \
         without BPF_F_ALLOW_MULTI to this cgroup or to one above it. `bpftool cgroup tree` shows it; have its owner detach \
         it, or attach it with BPF_F_ALLOW_MULTI or by a link", .cgroup.display()
    )]
    NoRoom {
        /// The hook.
        hook: &'static str,
        /// Where.
        cgroup: PathBuf,
    },
    /// A program that a policy depends on is one that the kernel refuses.
    #[error(
        "a policy says `dns.queries: Named`, and this kernel refuses the program {hook} that carries it out: see docs/kernels.md; \
         `--log debug` tells why"
    )]
    Lacks {
        /// The hook.
        hook: &'static str,
    },
    /// A program could not be attached.
    #[error("cannot attach {hook} to cgroup {}", .cgroup.display())]
    Attach {
        /// The hook.
        hook: &'static str,
        /// Where.
        cgroup: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

/// Whether some call behind an error was not permitted.
pub(super) fn is_eperm(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.any(|error| error.downcast_ref::<io::Error>().is_some_and(|error| error.raw_os_error() == Some(libc::EPERM)))
}
