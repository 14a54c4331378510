//! The kernel side of the agent: the only module that makes bpf calls.
//!
//! What the kernel can see is never edited. [`Dataplane::apply`] builds new tries and segment arrays beside the ones in
//! force and exchanges one pointer for each view; the update call returns after the kernel's grace period, so by then
//! nobody sees the old ones and they are freed. Nothing is attached before a policy is complete.

use std::{
    collections::HashMap,
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
    thread,
    time::Duration,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, ArrayOfMaps, LpmTrie, Map, MapData, MapError, PerCpuArray, RingBuf, lpm_trie::Key},
    programs::{CgroupAttachMode, CgroupSockAddr, ProgramError},
};
use egress_common::{ABI_VERSION, Counter, Entries, Entry, Hook, Meta, RuleId, Segment, map};
use rustix::io::Errno;
use thiserror::Error;
use zerocopy::transmute;

use crate::{
    pins::{PinDirectory, PinError},
    policy::RuleName,
    prefix::Prefix,
    ruleset::{Ruleset, Table, in_slot, rule_id},
};

/// A trie of the `POLICY` map, in bytes: see [`egress_common::PrefixKey`] and [`Entry`].
type Trie = LpmTrie<MapData, [u8; 16], [u8; 16]>;
/// An array of the `SEGMENTS` map, in bytes: see [`Segment`].
type Segments = Array<MapData, [u8; 12]>;

/// `BPF_F_NO_PREALLOC` and `BPF_F_INNER_MAP` of `linux/bpf.h`.
const NO_PREALLOC: u32 = 1;
const INNER_MAP: u32 = 1 << 12;

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
    #[error("no permission to load programs into the kernel: run as root, or with CAP_BPF and CAP_NET_ADMIN")]
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
    /// The maps could not be pinned.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// A map could not be pinned.
    #[error("cannot pin map {name}")]
    Pin {
        /// The map.
        name: &'static str,
        /// Why.
        #[source]
        cause: aya::pin::PinError,
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
        cause: ProgramError,
    },
}

/// The rules that events name. Shared with whoever reads events.
#[derive(Debug, Clone, Default)]
pub struct RuleNames(Arc<RwLock<HashMap<RuleId, RuleName>>>);

impl RuleNames {
    /// The rule of an id that the kernel reported.
    pub fn get(&self, id: RuleId) -> Option<RuleName> {
        self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner).get(&id).cloned()
    }
}

/// Programs and maps in the kernel. Detaches when dropped.
pub struct Dataplane {
    ebpf: Ebpf,
    _pins: Option<PinDirectory>,
    policy: ArrayOfMaps<MapData, Trie>,
    segments: ArrayOfMaps<MapData, Segments>,
    meta: Array<MapData, [u8; size_of::<Meta>()]>,
    generation: u64,
    /// For each view, which of its two slots in `SEGMENTS` the trie in force points to.
    in_use: [u32; 2],
    /// The view with Audit was filled before.
    audited: bool,
    rules: RuleIds,
}

/// What a policy became in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Counts the policies put in force, from 1.
    pub generation: u64,
    /// Rules that the tries name.
    pub rules: usize,
    /// Elements of all tries.
    pub prefixes: usize,
    /// Elements of all segment arrays.
    pub segments: usize,
}

/// Whether the programs say what they do, for diagnosis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelLog {
    /// They are silent; the code that would speak is not even loaded.
    Off,
    /// They log at debug level.
    Debug,
}

/// Whether the running kernel and the agent's privileges allow what follows.
pub fn probe() -> Result<(), DataplaneError> {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    if kernel_version(&release).is_some_and(|version| version < (5, 10)) {
        return Err(DataplaneError::KernelTooOld { found: release });
    }
    Ok(())
}

pub(crate) fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

impl Dataplane {
    /// Loads the programs and creates the maps, which can be found in the pin directory from then on. Nothing is attached,
    /// and no policy is in force.
    pub fn prepare(object: &[u8], log: KernelLog, mut pins: Option<PinDirectory>) -> Result<Self, DataplaneError> {
        let level: u8 = match log {
            KernelLog::Off => 0,
            KernelLog::Debug => aya_log::Level::Debug as u8,
        };
        let mut ebpf =
            EbpfLoader::new().override_global(aya_log::LEVEL, &level, false).load(object).map_err(load_error)?;
        for hook in Hook::ALL.iter().map(|hook| hook.as_str()) {
            program(&mut ebpf, hook)?.load().map_err(|cause| DataplaneError::Program { hook, cause })?;
        }
        if let Some(pins) = &mut pins {
            pin_maps(&ebpf, pins)?;
        }
        Ok(Self {
            policy: take(&mut ebpf, map::POLICY)?,
            segments: take(&mut ebpf, map::SEGMENTS)?,
            meta: take(&mut ebpf, map::META)?,
            ebpf,
            _pins: pins,
            generation: 0,
            in_use: [0; 2],
            audited: false,
            rules: RuleIds::default(),
        })
    }

    /// Puts a policy in force: builds all of it beside the old one, then exchanges one pointer for each view.
    pub fn apply(&mut self, ruleset: &Ruleset) -> Result<Applied, DataplaneError> {
        let generation = self.generation + 1;
        let ids = self.rules.assign(&ruleset.rules);
        let open = Table::allow_any();
        let with_audit = egress_common::Scope::DEFAULT.with_audit();
        // A view that was never filled is not asked. Once filled, it is closed by one in which everything is allowed.
        let closed_view = (self.audited && ruleset.with_audit.is_none()).then_some((with_audit, &open));
        let mut applied = Applied { generation, rules: ruleset.rules.len(), prefixes: 0, segments: 0 };
        let mut ready = Vec::new();
        for (view, table) in ruleset.views().chain(closed_view) {
            // Two slots for each view, used in turn: the segments of the trie in force stay where they are.
            let turn = 1 - self.in_use[view.index() as usize];
            let slot = view.index() * 2 + turn;
            self.fill_segments(slot, table, &ids)?;
            ready.push((view, turn, fill_trie(slot, table, &ids)?));
            applied.prefixes += table.entries().len();
            applied.segments += table.segments().len();
        }
        self.write_meta(generation, ruleset)?;
        for (view, turn, trie) in &ready {
            self.policy.set(view.index(), trie, 0).map_err(|cause| failed(map::POLICY, "exchange a trie of", cause))?;
            self.in_use[view.index() as usize] = *turn;
        }
        self.generation = generation;
        self.audited |= ruleset.with_audit.is_some();
        self.rules.retire(ids);
        Ok(applied)
    }

    fn fill_segments(&mut self, slot: u32, table: &Table, ids: &[RuleId]) -> Result<(), DataplaneError> {
        let entries = u32::try_from(table.segments().len().max(1)).unwrap_or(u32::MAX);
        let mut array = Segments::create(entries, INNER_MAP).map_err(|cause| failed(map::SEGMENTS, "create", cause))?;
        for (index, segment) in (0..).zip(table.segments()) {
            let bytes: [u8; 12] = transmute!(named(*segment, ids));
            array.set(index, bytes, 0).map_err(|cause| failed(map::SEGMENTS, "fill", cause))?;
        }
        self.segments.set(slot, &array, 0).map_err(|cause| failed(map::SEGMENTS, "exchange an array of", cause))
    }

    fn write_meta(&mut self, generation: u64, ruleset: &Ruleset) -> Result<(), DataplaneError> {
        let meta = Meta::new(std::process::id(), env!("CARGO_PKG_VERSION"), generation, ruleset.hash());
        let bytes: [u8; size_of::<Meta>()] = transmute!(meta);
        self.meta.set(0, bytes, 0).map_err(|cause| failed(map::META, "write", cause))
    }

    /// Attaches every hook to a cgroup. All of it is undone if one of them fails.
    pub fn attach(&mut self, cgroup: &File, path: &Path) -> Result<(), DataplaneError> {
        let mut links = Vec::new();
        for hook in Hook::ALL.iter().map(|hook| hook.as_str()) {
            let attached = program(&mut self.ebpf, hook)?.attach(cgroup, CgroupAttachMode::Single);
            match attached {
                Ok(link) => links.push((hook, link)),
                Err(cause) => {
                    for (hook, link) in links {
                        program(&mut self.ebpf, hook)?
                            .detach(link)
                            .map_err(|cause| DataplaneError::Program { hook, cause })?;
                    }
                    return Err(DataplaneError::Attach { hook, cgroup: path.to_owned(), cause });
                }
            }
        }
        Ok(())
    }

    /// Takes the ring buffer of events; there is one reader.
    pub fn take_events(&mut self) -> Result<RingBuf<MapData>, DataplaneError> {
        take(&mut self.ebpf, map::EVENTS)
    }

    /// Takes the programs' own log; it speaks if [`KernelLog::Debug`] was asked for.
    pub fn take_log(&mut self) -> Option<aya_log::EbpfLogger<&'static dyn log::Log>> {
        aya_log::EbpfLogger::init(&mut self.ebpf).ok()
    }

    /// The names of the rules in events.
    pub fn rule_names(&self) -> RuleNames {
        self.rules.names.clone()
    }

    /// Every counter with its value, summed over the CPUs.
    pub fn counters(&self) -> Result<Vec<(Counter, u64)>, DataplaneError> {
        let missing = DataplaneError::Missing { what: "map", name: map::STATS };
        let stats = self.ebpf.map(map::STATS).ok_or(missing)?;
        let read = |cause| failed(map::STATS, "read", cause);
        let stats = PerCpuArray::<_, u64>::try_from(stats).map_err(read)?;
        Counter::all()
            .map(|counter| Ok((counter, stats.get(&counter.index(), 0).map_err(read)?.iter().sum())))
            .collect()
    }
}

fn pin_maps(ebpf: &Ebpf, pins: &mut PinDirectory) -> Result<(), DataplaneError> {
    for name in [map::POLICY, map::SEGMENTS, map::EVENTS, map::STATS, map::META] {
        let map = ebpf.map(name).ok_or(DataplaneError::Missing { what: "map", name })?;
        map.pin(pins.place(name)?).map_err(|cause| DataplaneError::Pin { name, cause })?;
    }
    Ok(())
}

/// The process that filled the maps of a pin directory, if they are of this version and tell.
pub fn pinned_by(directory: &Path) -> Option<u32> {
    let map = MapData::from_pin(directory.join(map::META)).ok()?;
    // Checks the sizes, so a map of another version is not misread.
    let meta = Array::<_, [u8; size_of::<Meta>()]>::try_from(Map::Array(map)).ok()?;
    let meta: Meta = transmute!(meta.get(&0, 0).ok()?);
    (meta.abi() == ABI_VERSION).then(|| meta.pid())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut CgroupSockAddr, DataplaneError> {
    let missing = DataplaneError::Missing { what: "program", name };
    ebpf.program_mut(name).and_then(|program| program.try_into().ok()).ok_or(missing)
}

fn take<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, DataplaneError> {
    let map = ebpf.take_map(name).ok_or(DataplaneError::Missing { what: "map", name })?;
    M::try_from(map).map_err(|cause| failed(name, "open", cause))
}

fn failed(name: &'static str, what: &'static str, cause: MapError) -> DataplaneError {
    DataplaneError::Map { name, what, cause }
}

fn load_error(error: EbpfError) -> DataplaneError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(&error);
    while let Some(cause) = source {
        if cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::PermissionDenied) {
            return DataplaneError::Privilege;
        }
        source = cause.source();
    }
    DataplaneError::Load(Box::new(error))
}

/// Fills a trie of the right size, in the order of the table, which is the fastest.
fn fill_trie(slot: u32, table: &Table, ids: &[RuleId]) -> Result<Trie, DataplaneError> {
    let size = u32::try_from(table.entries().len()).unwrap_or(u32::MAX);
    let slot = u16::try_from(slot).expect("there are two slots for each of two views");
    let mut trie = Trie::create(size, NO_PREALLOC).map_err(|cause| failed(map::POLICY, "create", cause))?;
    let values: Vec<[u8; 16]> =
        table.values().iter().map(|&value| transmute!(in_slot(named_entry(value, ids), slot))).collect();
    for (prefix, value) in table.entries() {
        insert(&mut trie, prefix, values[value as usize])?;
    }
    Ok(trie)
}

/// A trie's nodes come from a per-CPU cache that the kernel refills behind our back: when it runs dry, it says `ENOMEM`
/// once and has some a moment later.
fn insert(trie: &mut Trie, prefix: Prefix, value: [u8; 16]) -> Result<(), DataplaneError> {
    const PATIENCE: u32 = 100;
    let address: [u8; 16] = transmute!(prefix.address());
    let key = Key::new(prefix.length().into(), address);
    for attempt in 0.. {
        match trie.insert(&key, value, 0) {
            Err(MapError::SyscallError(error)) if attempt < PATIENCE && is_passing(&error.io_error) => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result.map_err(|cause| failed(map::POLICY, "fill", cause)),
        }
    }
    unreachable!("the last attempt returns")
}

fn is_passing(error: &io::Error) -> bool {
    [Errno::NOMEM, Errno::AGAIN].iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

/// A value of a ruleset with its rule in the kernel's numbering.
fn named_entry(entry: Entry, ids: &[RuleId]) -> Entry {
    match (entry.entries(), entry.default_action()) {
        (Ok(Entries::EveryPort(action, rule)), Ok(default)) => {
            Entry::new(Entries::EveryPort(action, kernel_id(rule, ids)), default)
        }
        (Ok(Entries::Range(segment)), Ok(default)) => Entry::new(Entries::Range(named(segment, ids)), default),
        _ => entry,
    }
}

fn named(segment: Segment, ids: &[RuleId]) -> Segment {
    match segment.rule() {
        Some(rule) => segment.with_rule(kernel_id(rule, ids)),
        None => segment,
    }
}

fn kernel_id(rule: RuleId, ids: &[RuleId]) -> RuleId {
    ids[rule.0.get() as usize - 1]
}

/// Gives each rule an id that it keeps while it is in force and that no other rule gets, so that an event that is read
/// late still names the right rule.
#[derive(Debug, Default)]
struct RuleIds {
    ids: HashMap<RuleName, RuleId>,
    /// Ids in force, then those of the policy before.
    current: Vec<RuleId>,
    previous: Vec<RuleId>,
    given: usize,
    names: RuleNames,
}

impl RuleIds {
    /// The ids of `rules`, in their order.
    fn assign(&mut self, rules: &[RuleName]) -> Vec<RuleId> {
        let mut names = self.names.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        rules
            .iter()
            .map(|rule| {
                let id = *self.ids.entry(rule.clone()).or_insert_with(|| {
                    self.given += 1;
                    rule_id(self.given - 1)
                });
                names.entry(id).or_insert_with(|| rule.clone());
                id
            })
            .collect()
    }

    /// The rules of `ids` are in force. Forgets those that neither they nor the ones before them name.
    fn retire(&mut self, ids: Vec<RuleId>) {
        self.previous = std::mem::replace(&mut self.current, ids);
        let keep: std::collections::HashSet<RuleId> = self.current.iter().chain(&self.previous).copied().collect();
        self.ids.retain(|_, id| keep.contains(id));
        let mut names = self.names.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        names.retain(|id, _| keep.contains(id));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(names: &[&'static str]) -> Vec<RuleName> {
        names.iter().map(|name| RuleName::Builtin(name)).collect()
    }

    #[test]
    fn a_rule_keeps_its_id_and_no_other_rule_gets_it() {
        let mut ids = RuleIds::default();
        let first = ids.assign(&rules(&["a", "b"]));
        ids.retire(first.clone());
        // A policy that failed to be put in force leaves the ones before it named.
        ids.assign(&rules(&["d"]));
        let second = ids.assign(&rules(&["b", "c"]));
        ids.retire(second.clone());
        assert_eq!(first[1], second[0]);
        assert!(!first.contains(&second[1]));
        // An event of the policy before is still named; the one before that is not.
        assert_eq!(ids.names.get(first[0]), Some(RuleName::Builtin("a")));
        let third = ids.assign(&rules(&["c"]));
        ids.retire(third);
        assert_eq!(ids.names.get(first[0]), None);
    }

    #[test]
    fn kernel_versions_are_read_from_every_distributions_release() {
        assert_eq!(kernel_version("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(kernel_version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(kernel_version("5.4"), Some((5, 4)));
        assert_eq!(kernel_version("weird"), None);
    }
}
