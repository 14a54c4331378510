//! What the agent does with the capabilities it keeps, what it could not do with fewer, and what is no longer possible.
//!
//! Capabilities belong to threads, so each case gives up its own in a thread that ends with it.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs::{self, File},
    io,
    os::unix::{fs as unix, process::CommandExt},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use aya::{
    Ebpf,
    maps::{Array, ArrayOfMaps, LpmTrie, MapData, MapError, lpm_trie::Key},
    programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, Program},
};
use egress_agent::{
    pins::PinDirectory,
    policy::load::{LoadOptions, load},
    privileges::{CapabilitySet, RUNNING, START, keep_only, prepare},
};
use egress_common::{Hook, map};
use egress_tests::{bpffs::Bpffs, cgroup::Cgroup, eventually};
use rustix::{
    mount::{MountFlags, UnmountFlags, mount, unmount},
    thread::capabilities,
};
use socket2::{Domain, Protocol, Socket, Type};

type Trie = LpmTrie<MapData, [u8; 16], [u8; 16]>;
type Segments = Array<MapData, [u8; 12]>;

/// The object that the agent was built with.
const OBJECT: &str = match option_env!("EGRESS_EBPF_OBJECT") {
    Some(object) => object,
    None => concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/egress-ebpf.o"),
};

/// `BPF_F_NO_PREALLOC` and `BPF_F_INNER_MAP` of `linux/bpf.h`.
const NO_PREALLOC: u32 = 1;
const INNER_MAP: u32 = 1 << 12;

/// Runs in a thread that has only these capabilities.
fn with<T: Send>(needed: CapabilitySet, work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let narrow = || {
            keep_only(needed);
            work()
        };
        scope.spawn(narrow).join().unwrap()
    })
}

/// The programs, loaded.
fn load_programs() -> anyhow::Result<Ebpf> {
    let mut ebpf = Ebpf::load(&fs::read(OBJECT)?)?;
    for hook in Hook::ALL {
        match ebpf.program_mut(hook.as_str()).unwrap() {
            Program::CgroupSockAddr(program) => program.load()?,
            Program::CgroupSock(program) => program.load()?,
            Program::CgroupSockopt(program) => program.load()?,
            Program::CgroupSkb(program) => program.load()?,
            // Few kernels take one, and it takes no other privileges.
            Program::LsmCgroup(_) => {}
            other => panic!("{} is {:?}", hook.as_str(), other.prog_type()),
        }
    }
    Ok(ebpf)
}

fn attach(ebpf: &mut Ebpf, cgroup: &Cgroup) -> anyhow::Result<()> {
    attach_but_for_packets(ebpf, cgroup)?;
    attach_for_packets(ebpf, cgroup)
}

fn attach_but_for_packets(ebpf: &mut Ebpf, cgroup: &Cgroup) -> anyhow::Result<()> {
    let (cgroup, mode) = (File::open(cgroup.path())?, CgroupAttachMode::Single);
    for hook in Hook::ALL {
        match ebpf.program_mut(hook.as_str()).unwrap() {
            Program::CgroupSockAddr(program) => {
                program.attach(&cgroup, mode)?;
            }
            Program::CgroupSock(program) => {
                program.attach(&cgroup, mode)?;
            }
            Program::CgroupSockopt(program) => {
                program.attach(&cgroup, mode)?;
            }
            _ => {}
        }
    }
    Ok(())
}

fn attach_for_packets(ebpf: &mut Ebpf, cgroup: &Cgroup) -> anyhow::Result<()> {
    let program: &mut CgroupSkb = ebpf.program_mut(Hook::Egress.as_str()).unwrap().try_into()?;
    program.attach(File::open(cgroup.path())?, CgroupSkbAttachType::Egress, CgroupAttachMode::Single)?;
    Ok(())
}

/// A process of another user.
struct Other(Child);

impl Other {
    fn new() -> Self {
        let child = Command::new("sleep").arg("1000").uid(65_534).gid(65_534).stdin(Stdio::null()).spawn().unwrap();
        let other = Self(child);
        eventually("the other process", || other.exe().ok().filter(|exe| !exe.ends_with("privileges"))).unwrap();
        other
    }

    fn exe(&self) -> io::Result<std::path::PathBuf> {
        fs::read_link(format!("/proc/{}/exe", self.0.id()))
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a running agent does, that cannot be done with these capabilities.
fn fails_running(kept: CapabilitySet) -> Vec<&'static str> {
    let (mut ebpf, before, anew) = (load_programs().unwrap(), Cgroup::new().unwrap(), Cgroup::new().unwrap());
    attach(&mut ebpf, &before).unwrap();
    let mut policy: ArrayOfMaps<_, Trie> = ebpf.take_map(map::POLICY).unwrap().try_into().unwrap();
    let spare = Trie::create(1, NO_PREALLOC).unwrap();
    let (bpffs, other, policies) = (Bpffs::new().unwrap(), Other::new(), tempfile::tempdir().unwrap());
    let pin = bpffs.path().join("private/pin");
    drop(PinDirectory::claim(pin.parent().unwrap()).unwrap());
    ebpf.map(map::META).unwrap().pin(&pin).unwrap();
    let file = policies.path().join("policy.yaml");
    fs::write(&file, "").unwrap();
    with(kept, || {
        let mut failed = Vec::new();
        let mut expect = |what, done: bool| {
            if !done {
                failed.push(what);
            }
        };
        expect("create a trie", Trie::create(1, NO_PREALLOC).is_ok());
        expect("create an array", Segments::create(1, INNER_MAP).is_ok());
        expect("fill and exchange a trie", exchange(spare, &mut policy).is_ok());
        expect("attach again", attach_but_for_packets(&mut ebpf, &anew).is_ok());
        expect("attach the packet guard again", attach_for_packets(&mut ebpf, &anew).is_ok());
        expect("read the program of another user's process", other.exe().is_ok());
        expect("remove a pin", fs::remove_file(&pin).is_ok());
        let pinned = ebpf.map(map::STATS).unwrap().pin(&pin);
        expect("pin a map", pinned.is_ok());
        expect("read policies", read_policies(policies.path()));
        let writer = File::options().append(true).open(&file).unwrap();
        expect("notice that a policy is being written", !read_policies(policies.path()));
        drop(writer);
        failed
    })
}

fn exchange(mut trie: Trie, policy: &mut ArrayOfMaps<MapData, Trie>) -> Result<(), MapError> {
    trie.insert(&Key::new(0, [0; 16]), [0; 16], 0)?;
    policy.set(0, &trie, 0)
}

fn read_policies(directory: &Path) -> bool {
    load(&[directory.to_owned()], &LoadOptions { require_root_owned: false, follow: true }).is_ok()
}

/// Why the agent cannot start with these capabilities.
fn fails_to_start(kept: CapabilitySet) -> Option<String> {
    let cgroup = Cgroup::new().unwrap();
    with(kept, || {
        load_programs().and_then(|mut ebpf| attach(&mut ebpf, &cgroup)).err().map(|error| format!("{error:#}"))
    })
}

#[test]
fn each_capability_that_is_kept_at_the_start_is_needed() {
    // That one is for denials.
    let enough = START - CapabilitySet::SYS_PTRACE;
    assert_eq!(fails_to_start(enough), None);
    for (needed, refused) in [
        (CapabilitySet::BPF, "BPF_BTF_LOAD syscall returned Operation not permitted"),
        (CapabilitySet::NET_ADMIN, "BPF_PROG_LOAD syscall returned Operation not permitted"),
        (CapabilitySet::PERFMON, "BPF_PROG_LOAD syscall returned Permission denied"),
    ] {
        let error = fails_to_start(enough - needed).unwrap_or_default();
        assert!(error.contains(refused), "without {needed:?}: {error}");
    }
}

#[test]
fn each_capability_that_is_kept_while_running_is_needed() {
    let (maps, exe) = (["create a trie", "create an array"], "read the program of another user's process");
    let guard = "attach the packet guard again";
    assert_eq!(fails_running(RUNNING), [""; 0]);
    assert_eq!(fails_running(RUNNING - CapabilitySet::BPF), maps);
    assert_eq!(fails_running(RUNNING - CapabilitySet::NET_ADMIN), [guard]);
    assert_eq!(fails_running(RUNNING - CapabilitySet::SYS_PTRACE), [exe]);
    // All else that a running agent does takes none.
    assert_eq!(fails_running(CapabilitySet::empty()), [maps[0], maps[1], guard, exe]);
}

/// Which of the calls for which root is feared succeed.
fn feats(directory: &Path) -> Vec<&'static str> {
    let file = directory.join("file");
    let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::ICMPV4));
    let chown = || Command::new("chown").arg("65533").arg(&file).stderr(Stdio::null()).status();
    let feats = [
        ("mount", mount("none", directory.join("mount"), "tmpfs", MountFlags::empty(), None).is_ok()),
        ("chown", unix::chown(&file, Some(65_534), None).is_ok()),
        ("raw socket", raw().is_ok()),
        ("chown by a program", chown().unwrap().success()),
    ];
    feats.into_iter().filter(|(_, done)| *done).map(|(name, _)| name).collect()
}

#[test]
fn what_is_given_up_is_gone_for_the_thread_and_for_what_it_executes() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("mount")).unwrap();
    fs::write(directory.path().join("file"), "").unwrap();
    assert_eq!(with(START, || feats(directory.path())), [""; 0]);
    // Other threads keep theirs.
    assert_eq!(feats(directory.path()), ["mount", "chown", "raw socket", "chown by a program"]);
    unmount(directory.path().join("mount"), UnmountFlags::DETACH).unwrap();
}

#[test]
fn only_what_is_named_is_left_in_every_set() {
    let status = with(RUNNING, || {
        // Nothing comes back, and giving up twice is no mistake.
        keep_only(START);
        fs::read_to_string("/proc/thread-self/status").unwrap()
    });
    let set = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        CapabilitySet::from_bits_retain(u64::from_str_radix(line.trim(), 16).unwrap())
    };
    for name in ["CapPrm:", "CapEff:", "CapBnd:"] {
        assert_eq!(set(name), RUNNING, "{name}");
    }
    assert!(RUNNING.contains(set("CapInh:")) && RUNNING.contains(set("CapAmb:")), "{status}");
    assert!(status.contains("NoNewPrivs:\t1\n"), "{status}");
}

#[test]
fn what_is_needed_and_not_there_keeps_nothing_else_from_being_given_up() {
    let left = with(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN, || {
        keep_only(START);
        capabilities(None).unwrap()
    });
    assert_eq!((left.permitted, left.effective), (CapabilitySet::BPF, CapabilitySet::BPF));
}

#[test]
fn without_any_privilege_there_is_nothing_to_give_up_and_nothing_fails() {
    let left = with(CapabilitySet::empty(), || {
        prepare();
        keep_only(START);
        capabilities(None).unwrap()
    });
    assert_eq!((left.permitted, left.effective), (CapabilitySet::empty(), CapabilitySet::empty()));
}
