//! Sets of pins that another process made, or this one: read, drained and removed.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    thread,
};

use aya::maps::{Array, ArrayOfMaps, HashMap, Map, MapData, MapInfo, MapType, PerCpuArray, RingBuf};
use egress_common::{
    ABI_VERSION, Account, COMMON, Claims, Counter, Event, FactKey, Hook, Meta, NameKey, Peers, ResolverKey, Settings,
    Share, map,
};
use zerocopy::transmute;

use super::{DataplaneError, WHERE_IT_MATTERS, facts::accounts, failed, open, sys};
use crate::{
    pins::{self, PinError},
    report::Reported,
};

/// The pin of the map of whom sockets have heard from, of the newest set beside one that is being made; `None` if there is no such map,
/// or if it is not as the programs expect it.
pub(super) fn peers_before(set: &Path) -> Option<PathBuf> {
    let sets = pins::sets(set.parent()?).ok()?;
    let pin = sets.iter().rev().map(|set| set.join(map::PEERS)).find(|pin| pin.exists())?;
    // Whatever is pinned under the name would be taken as it is.
    let is_fit = MapInfo::from_pin(&pin).is_ok_and(|info| {
        matches!(info.map_type(), Ok(MapType::SkStorage))
            && (info.key_size() as usize, info.value_size() as usize) == (size_of::<i32>(), size_of::<Peers>())
    });
    if !is_fit {
        tracing::warn!(pin = %pin.display(), "a map of peers that is none: sockets have to hear from their peers again");
    }
    is_fit.then_some(pin)
}

/// Who filled the maps of a set, and with what. An error if they are of another version.
pub fn meta(set: &Path) -> Result<Meta, DataplaneError> {
    let read = |cause| failed(map::META, "read", cause);
    // Checks the sizes, so a map of another version is not misread.
    let meta = Array::<_, [u8; size_of::<Meta>()]>::try_from(Map::Array(open(set, map::META)?)).map_err(read)?;
    let meta: Meta = transmute!(meta.get(&0, 0).map_err(read)?);
    if meta.abi() == ABI_VERSION { Ok(meta) } else { Err(DataplaneError::OtherVersion { found: meta.abi() }) }
}

/// Every counter of a set with its value.
pub fn counters(set: &Path) -> Result<Vec<(Counter, u64)>, DataplaneError> {
    let stats = open_stats(set)?;
    Counter::all().map(|counter| Ok((counter, read_counter(&stats, counter)?))).collect()
}

/// The workloads of a set that learnt names, each with how many addresses.
pub fn learners(set: &Path) -> Result<Vec<(u64, u32)>, DataplaneError> {
    // Those of another version would be misread.
    meta(set)?;
    let forgotten = Map::HashMap(open(set, map::FORGOTTEN)?);
    let forgotten =
        HashMap::<_, u64, u64>::try_from(forgotten).map_err(|cause| failed(map::FORGOTTEN, "read", cause))?;
    let count = |(workload, account): (u64, Account)| {
        let count = account.count(forgotten.get(&workload, 0).unwrap_or(0));
        (workload, u32::try_from(count).unwrap_or(u32::MAX))
    };
    let accounts = accounts(&open(set, map::QUOTAS)?)?.into_iter().filter(|(workload, _)| *workload != COMMON);
    let mut learners: Vec<(u64, u32)> = accounts.map(count).filter(|(_, count)| *count > 0).collect();
    learners.sort_unstable();
    Ok(learners)
}

/// How many events of a set found no room.
pub fn lost(set: &Path) -> Result<u64, DataplaneError> {
    read_counter(&open_stats(set)?, Counter::EventsLost)
}

/// The cgroups of a set whose events found no room, each with how many.
pub fn lost_by_cgroup(set: &Path) -> Result<Vec<(u64, u64)>, DataplaneError> {
    read_shares(&Map::LruHashMap(open(set, map::SHARES)?))
}

pub(super) fn read_shares(shares: &Map) -> Result<Vec<(u64, u64)>, DataplaneError> {
    let read = |cause| failed(map::SHARES, "read", cause);
    let shares = HashMap::<_, u64, [u8; size_of::<Share>()]>::try_from(shares).map_err(read)?;
    let lost = |(id, share)| {
        (id, {
            let share: Share = transmute!(share);
            share.lost()
        })
    };
    Ok(shares.iter().flatten().map(lost).filter(|(_, lost)| *lost > 0).collect())
}

fn open_stats(set: &Path) -> Result<Map, DataplaneError> {
    Ok(Map::PerCpuArray(open(set, map::STATS)?))
}

/// The value of a counter, summed over the CPUs.
pub(super) fn read_counter(stats: &Map, counter: Counter) -> Result<u64, DataplaneError> {
    let read = |cause| failed(map::STATS, "read", cause);
    let stats = PerCpuArray::<_, u64>::try_from(stats).map_err(read)?;
    Ok(stats.get(&counter.index(), 0).map_err(read)?.iter().sum())
}

/// What a map of a set takes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct MapUse {
    /// Its name.
    pub name: &'static str,
    /// Elements in use; of `WORKLOADS`, in the map that it points to.
    pub entries: u64,
    /// Elements that there is room for.
    pub capacity: u64,
    /// Bytes of kernel memory, of the map and of what it points to.
    pub bytes: u64,
}

/// What every map of a set takes.
pub fn map_uses(set: &Path) -> Result<Vec<MapUse>, DataplaneError> {
    let views = views(set)?;
    map::ALL.iter().map(|&name| map_use(set, name, &views)).collect()
}

fn map_use(set: &Path, name: &'static str, views: &[u32]) -> Result<MapUse, DataplaneError> {
    let data = open(set, name)?;
    let info = data.info().map_err(|cause| failed(name, "inspect", cause))?;
    let (mut entries, mut bytes) = (0, memory(&data));
    let mut capacity = u64::from(info.max_entries());
    match name {
        map::WORKLOADS => {
            // It has one element; of interest is what that holds.
            for inner in inner_maps(data, &[0]) {
                bytes += memory(&inner);
                capacity = inner.info().map_or(0, |info| info.max_entries().into());
                let placements = HashMap::<_, u64, [u8; 8]>::try_from(Map::HashMap(inner))
                    .map_err(|cause| failed(name, "read", cause))?;
                entries = placements.keys().count() as u64;
            }
        }
        map::NAME_IDS => {
            for inner in inner_maps(data, &[0]) {
                bytes += memory(&inner);
                capacity = inner.info().map_or(0, |info| info.max_entries().into());
                entries = capacity;
            }
        }
        map::POLICY | map::SEGMENTS => {
            let inner = memory_of_inner(&data, views);
            (entries, bytes) = (inner.0, bytes + inner.1);
        }
        map::HOSTS => entries = count::<{ size_of::<FactKey>() }, { size_of::<NameKey>() }>(name, &data)?,
        map::NAMES => entries = count::<{ size_of::<FactKey>() }, { size_of::<Claims>() }>(name, &data)?,
        map::USERS | map::NETNS => entries = count::<8, 4>(name, &data)?,
        map::QUOTAS => entries = count::<8, { size_of::<Account>() }>(name, &data)?,
        map::FORGOTTEN => entries = count::<8, 8>(name, &data)?,
        map::RESOLVERS => entries = count::<{ size_of::<ResolverKey>() }, 4>(name, &data)?,
        map::SHARES => entries = count::<8, { size_of::<Share>() }>(name, &data)?,
        _ => entries = capacity,
    }
    Ok(MapUse { name, entries, capacity, bytes })
}

fn count<const KEY: usize, const VALUE: usize>(name: &'static str, map: &MapData) -> Result<u64, DataplaneError> {
    let read = |cause| DataplaneError::Element { name, what: "read", cause };
    let info = map.info().map_err(|cause| failed(name, "inspect", cause))?;
    // The kernel writes as much as it has for each.
    if (info.key_size() as usize, info.value_size() as usize) != (KEY, VALUE) {
        return Err(read(io::ErrorKind::InvalidData.into()));
    }
    let mut entries = 0;
    sys::each(map.fd().as_fd(), |_: [u8; KEY], _: [u8; VALUE]| entries += 1).map_err(read)?;
    Ok(entries)
}

/// The views that are there: elements of `POLICY` and `SEGMENTS` that can be in use.
fn views(set: &Path) -> Result<Vec<u32>, DataplaneError> {
    let read = |cause| failed(map::VIEWS, "read", cause);
    let views = Array::<_, [u8; size_of::<Settings>()]>::try_from(Map::Array(open(set, map::VIEWS)?)).map_err(read)?;
    let length = views.len();
    let data = open(set, map::VIEWS)?;
    let settings = sys::first_values::<[u8; size_of::<Settings>()]>(data.fd().as_fd(), length);
    let is_there = |bytes: &[u8; size_of::<Settings>()]| {
        let settings: Settings = transmute!(*bytes);
        settings.is_there()
    };
    let settings = settings.or_else(|_| (0..length).map(|index| views.get(&index, 0)).collect::<Result<_, _>>());
    let indices = (0..length).zip(settings.map_err(read)?);
    Ok(indices.filter(|(_, settings)| is_there(settings)).map(|(index, _)| index).collect())
}

/// Threads that look at inner maps at the same time, each at no fewer than this: there may be thousands.
const THREADS: usize = 4;
const MIN_FOR_A_THREAD: usize = 256;

/// How many maps elements of an array of maps point to, and what they take. Needs `CAP_SYS_ADMIN`, as [`inner_maps`].
fn memory_of_inner(outer: &MapData, elements: &[u32]) -> (u64, u64) {
    let outer = outer.fd().as_fd();
    let look = |elements: &[u32]| {
        let maps = elements.iter().filter_map(|&index| sys::inner(outer, index).ok());
        maps.fold((0, 0), |(count, bytes), map| (count + 1, bytes + memory_at(map.as_fd())))
    };
    let share = elements.len().div_ceil(THREADS).max(MIN_FOR_A_THREAD);
    let add = |all: (u64, u64), some: (u64, u64)| (all.0 + some.0, all.1 + some.1);
    thread::scope(|scope| {
        let looks: Vec<_> = elements.chunks(share).map(|share| scope.spawn(move || look(share))).collect();
        looks.into_iter().map(|look| look.join().unwrap_or_default()).fold((0, 0), add)
    })
}

/// The maps that elements of an array of maps point to. Needs `CAP_SYS_ADMIN`, as the kernel hands them out by id; without
/// it, none. To look at an element that holds nothing is not free: before Linux 6.8 each look waits for a grace period of
/// RCU (`bpf_map_copy_value`), and of all elements of an array that took minutes. One is open at a time.
fn inner_maps(outer: MapData, elements: &[u32]) -> impl Iterator<Item = MapData> {
    let outer = ArrayOfMaps::<_, MapData>::try_from(Map::ArrayOfMaps(outer)).ok();
    outer.into_iter().flat_map(|outer| elements.iter().filter_map(move |index| outer.get(index, 0).ok()))
}

/// What the kernel charges for a map, as it tells in `/proc/self/fdinfo`; 0 if it does not.
fn memory(map: &MapData) -> u64 {
    memory_at(map.fd().as_fd())
}

fn memory_at(map: BorrowedFd<'_>) -> u64 {
    // It is shorter than this, and comes whole.
    let mut buffer = [0; 1024];
    let told = File::open(format!("/proc/self/fdinfo/{}", map.as_raw_fd()));
    let length = told.and_then(|mut told| told.read(&mut buffer)).unwrap_or(0);
    let info = String::from_utf8_lossy(&buffer[..length]);
    let line = info.lines().find_map(|line| line.strip_prefix("memlock:"));
    line.and_then(|bytes| bytes.trim().parse().ok()).unwrap_or(0)
}

/// The hooks of a set, with the id of the cgroup that each is attached to; of those whose cgroup is gone, nothing.
pub fn attached(set: &Path) -> Vec<(Hook, u64)> {
    let cgroup = |path: &Path| sys::open_pin(path).and_then(|link| sys::link_cgroup(link.as_fd())).ok();
    links(set).into_iter().filter_map(|(hook, path)| Some((hook, cgroup(&path).filter(|&id| id != 0)?))).collect()
}

/// The ids of the programs of a set.
pub fn programs(set: &Path) -> impl Iterator<Item = u32> {
    let program = |path: &Path| sys::open_pin(path).and_then(|link| sys::link_program(link.as_fd())).ok();
    links(set).into_iter().filter_map(move |(_, path)| program(&path))
}

/// The name of the pin of the link of a hook that is attached where it matters.
pub(super) fn spot(hook: Hook, id: u64) -> String {
    format!("{}-{id}", hook.as_str())
}

/// The pinned links of a set, in the order of the hooks.
fn links(set: &Path) -> Vec<(Hook, PathBuf)> {
    let single = Hook::ALL.iter().map(|&hook| (hook, set.join(hook.as_str()))).filter(|(_, path)| path.exists());
    let entries = fs::read_dir(set).into_iter().flatten().flatten().map(|entry| entry.path());
    let hook = |path: &PathBuf| {
        let (hook, id) = path.file_name()?.to_str()?.split_once('-')?;
        id.parse::<u64>().ok()?;
        WHERE_IT_MATTERS.iter().find(|known| known.as_str() == hook).copied()
    };
    let mut spots: Vec<(Hook, PathBuf)> = entries.filter_map(|path| Some((hook(&path)?, path))).collect();
    spots.sort_by(|(_, a), (_, b)| a.cmp(b));
    single.chain(spots).collect()
}

/// Takes the programs of a set off their cgroups; the maps stay.
pub fn detach(set: &Path) -> Result<(), PinError> {
    links(set).iter().try_for_each(|(_, path)| detach_link(path))
}

/// Takes a program off its cgroup, and removes its pin.
pub(super) fn detach_link(path: &Path) -> Result<(), PinError> {
    let link = sys::open_pin(path).map_err(pins::failed("open", path))?;
    // Kernels before 5.11 know no detaching; there, the last one to let go of the link ends it.
    match sys::detach(link.as_fd()) {
        Err(error) if error.kind() != io::ErrorKind::InvalidInput => Err(pins::failed("detach", path)(error)),
        _ => fs::remove_file(path).map_err(pins::failed("remove", path)),
    }
}

/// The events of a set that nobody has read, without their rules: only the agent that filled the set knew their numbers.
pub fn drain(set: &Path) -> Result<Vec<Reported>, DataplaneError> {
    // Those of another version would be misread.
    meta(set)?;
    let open_ring = |cause| failed(map::EVENTS, "open", cause);
    let mut ring = RingBuf::try_from(Map::RingBuf(open(set, map::EVENTS)?)).map_err(open_ring)?;
    let mut events = Vec::new();
    while let Some(record) = ring.next() {
        events.extend(Event::read(&record).map(|(event, name)| (event.without_rule(), name)));
    }
    Ok(events)
}

/// Removes a set with all it enforces.
pub fn remove(set: &Path) -> Result<(), PinError> {
    detach(set)?;
    fs::remove_dir_all(set).map_err(pins::failed("remove", set))
}
