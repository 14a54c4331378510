//! What the running kernel can do of what the agent makes use of: that it came with the version that `docs/kernels.md` names.
//!
//! How the agent does without is tested elsewhere. With `EGRESS_FEATURES=FILE` the findings are written there.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fmt::Write as _,
    fs, io,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
};

use aya::{
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use egress_tests::kernel_is_before;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

struct Feature {
    name: &'static str,
    since: (u32, u32),
    is_there: fn() -> bool,
}

const FEATURES: [Feature; 5] = [
    Feature {
        name: "`setsockopt` programs that know the caller's cgroup",
        since: (6, 1),
        is_there: || has(ProgramType::CgroupSockopt, BpfHelper::BPF_FUNC_get_current_ancestor_cgroup_id),
    },
    Feature { name: "filling a trie by batches", since: (5, 19), is_there: tries_take_batches },
    Feature {
        name: "`bpf_set_retval`",
        since: (5, 18),
        is_there: || has(ProgramType::CgroupSock, BpfHelper::BPF_FUNC_set_retval),
    },
    Feature { name: "memory of maps outside `RLIMIT_MEMLOCK`", since: (5, 11), is_there: maps_need_no_limit },
    Feature { name: "detaching a link", since: (5, 9), is_there: links_detach },
];

#[test]
fn features_came_with_the_versions_that_the_documentation_names() {
    let found = FEATURES.map(|feature| (feature.name, feature.since, (feature.is_there)()));
    if let Some(file) = std::env::var_os("EGRESS_FEATURES") {
        let lines = found.iter().fold(String::new(), |mut lines, (name, _, is_there)| {
            writeln!(lines, "=== FEATURE {} {name}", if *is_there { "yes" } else { "no" }).unwrap();
            lines
        });
        fs::write(file, lines).unwrap();
    }
    for (name, (major, minor), is_there) in found {
        assert_eq!(is_there, !kernel_is_before(major, minor), "{name}");
    }
}

fn has(kind: ProgramType, helper: BpfHelper) -> bool {
    is_helper_supported(kind, helper).unwrap()
}

/// The attributes of `BPF_MAP_CREATE`.
#[repr(C)]
struct Create {
    kind: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// The attributes of the batch commands.
#[repr(C)]
#[derive(Default)]
struct Batch {
    cursors: [u64; 2],
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    flags: [u64; 2],
}

/// A batch of nothing is taken by those that take any.
fn tries_take_batches() -> bool {
    const LPM_TRIE: u32 = 11;
    const NO_PREALLOC: u32 = 1;
    const UPDATE_BATCH: libc::c_int = 26;
    let trie = Create { kind: LPM_TRIE, key_size: 8, value_size: 4, max_entries: 1, flags: NO_PREALLOC };
    let trie = create(&trie).unwrap();
    let map = trie.as_raw_fd().try_into().unwrap();
    bpf(UPDATE_BATCH, &Batch { map, ..Batch::default() }).is_ok()
}

/// What is no link is refused as such by those that know the command.
fn links_detach() -> bool {
    const LINK_DETACH: libc::c_int = 34;
    bpf(LINK_DETACH, &u32::MAX).unwrap_err().raw_os_error() == Some(libc::EBADF)
}

/// Made with none to spare. No other test of this program makes maps meanwhile.
fn maps_need_no_limit() -> bool {
    const ARRAY: u32 = 2;
    let before = getrlimit(Resource::Memlock);
    setrlimit(Resource::Memlock, Rlimit { current: Some(0), ..before }).unwrap();
    let made = create(&Create { kind: ARRAY, key_size: 4, value_size: 4096, max_entries: 16, flags: 0 });
    setrlimit(Resource::Memlock, before).unwrap();
    made.is_ok()
}

fn create(map: &Create) -> io::Result<OwnedFd> {
    const MAP_CREATE: libc::c_int = 0;
    let fd = bpf(MAP_CREATE, map)?;
    // SAFETY: the kernel just gave us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the attributes are readable for as long as the call takes, and name no memory.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result.try_into().expect("a descriptor is small")) }
}
