//! The kernel side of the agent: the only module that makes bpf calls.
//!
//! What the kernel can see is never edited. [`Dataplane::apply`] builds the scopes that are new beside the ones in force,
//! then exchanges one pointer, that to the placements of all cgroups; the update call returns after the kernel's grace
//! period, so by then nobody sees the old ones and they are freed. Nothing is attached before a policy is complete.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io,
    os::fd::{AsFd as _, OwnedFd},
    path::{Component, Path},
    time::SystemTime,
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    maps::{Array, ArrayOfMaps, HashMap as KernelHash, Map, MapData, MapError, RingBuf},
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported},
};
use egress_common::{
    Address, COMMON, Counter, ELSEWHERE, Hook, Lifetime, Meta, Placement, Refusal, ResolverKey, RuleId, SHARED, Scope,
    Settings, UserKey, View, guaranteed, map,
};
use zerocopy::transmute;

use crate::{
    cgroup::Cgroup,
    netns,
    pins::{self, PinSet},
    privileges,
    ruleset::Table,
    scopes::{self, Layout},
};

mod contents;
mod error;
mod facts;
mod ids;
mod lsm;
mod names;
pub mod others;
pub mod pinned;
mod plan;
mod programs;
mod room;
mod slots;
mod sys;

use contents::{NO_PREALLOC, patiently};
pub use error::DataplaneError;
use error::is_eperm;
pub use facts::AskedNames;
use facts::Facts;
use ids::RuleIds;
pub use ids::RuleNames;
use names::{NameIds, Names};
pub use plan::Change;
use plan::{Live, Step, plan, room};
use programs::Hooks;
pub use programs::PacketGuard;
use room::Shortages;
pub use room::{Lack, Shortage};
use slots::Slots;

/// What `WORKLOADS` points to, in bytes: cgroup id → [`Placement`].
type Placements = KernelHash<MapData, u64, [u8; 8]>;
/// The `USERS` map, in bytes: [`UserKey`] → number of a [`Scope`].
type Users = KernelHash<MapData, [u8; 8], u32>;
/// The `RESOLVERS` map, in bytes: [`ResolverKey`] → 1.
type Resolvers = KernelHash<MapData, [u8; size_of::<ResolverKey>()], u32>;
/// The `NETNS` map: cookie → 1.
type NetworkNamespaces = KernelHash<MapData, u64, u32>;
/// The `VIEWS` map, in bytes: view → [`Settings`].
type Views = Array<MapData, [u8; 8]>;

/// Views that are filled before they are put, each with at most two descriptors.
const BATCH: usize = 128;

/// Bytes of kernel memory that a prefix and a port range take, as measured.
const PREFIX_BYTES: u64 = 128;
const SEGMENT_BYTES: u64 = 12;

/// Programs and maps in the kernel. What is not pinned is gone when dropped.
pub struct Dataplane {
    ebpf: Ebpf,
    hooks: Hooks,
    pins: PinSet,
    /// Where the file system with the pins is gone, the links end with the agent.
    unpinned: Vec<OwnedFd>,
    workloads: ArrayOfMaps<MapData, Placements>,
    /// What it points to.
    placements: Option<Placements>,
    users: Users,
    slots: Slots,
    views: Views,
    name_ids: Names,
    resolvers: Resolvers,
    namespaces: NetworkNamespaces,
    meta: Array<MapData, [u8; size_of::<Meta>()]>,
    written: Meta,
    live: Live,
    /// The number of each scope of the layout in force.
    numbers: Vec<Scope>,
    /// What is no longer used, and still there.
    left: Vec<Step>,
    /// The kernel's ids for the rules of each scope.
    ids_of: HashMap<Scope, Vec<RuleId>>,
    rules: RuleIds,
    /// Whom each scope believes.
    believed: HashMap<Scope, BTreeSet<Address>>,
    names: NameIds,
    facts: Facts,
    shortages: Shortages,
    /// The hooks that are attached where they matter, by cgroup, each with its link where that is not pinned.
    spots: BTreeMap<Spot, Option<OwnedFd>>,
    memory_limit: u64,
    can_set_retval: bool,
}

/// Hooks that are attached only to cgroups whose rules need them: to learn names, and to judge questions for them.
pub const WHERE_IT_MATTERS: [Hook; 2] = [Hook::Ingress, Hook::Query];

/// A hook of [`WHERE_IT_MATTERS`], and the id of a cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Spot {
    /// The hook.
    pub hook: Hook,
    /// The id.
    pub cgroup: u64,
}

/// What holds for what is learnt of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NameSettings {
    /// For how long answers hold.
    pub lifetime: Lifetime,
    /// How many addresses each workload may have learnt.
    pub quota: u32,
}

impl Default for NameSettings {
    fn default() -> Self {
        Self { lifetime: Lifetime { floor: 5, grace: 300 }, quota: 8_192 }
    }
}

/// What a policy became in the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    /// Counts the policies put in force, from 1.
    pub generation: u64,
    /// Whether it is another policy than the one before.
    pub is_changed: bool,
    /// Distinct sets of policies.
    pub scopes: usize,
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
    if privileges::may_start() { Ok(()) } else { Err(DataplaneError::Privilege) }
}

pub(crate) fn kernel_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

impl Dataplane {
    /// Loads the programs and creates the maps, pinned in a new set. Nothing is attached, and no policy is in force. Whom sockets
    /// have heard from is in the map of the set before, if there is one: both sets use it until that one is retired.
    pub fn prepare(
        object: &[u8],
        log: KernelLog,
        guard: PacketGuard,
        names: NameSettings,
        mut pins: PinSet,
        memory_limit: u64,
    ) -> Result<Self, DataplaneError> {
        let level: u8 = match log {
            KernelLog::Off => 0,
            KernelLog::Debug => aya_log::Level::Debug as u8,
        };
        let can_set_retval =
            is_helper_supported(ProgramType::CgroupSock, BpfHelper::BPF_FUNC_set_retval).unwrap_or(false);
        let can_set = u8::from(can_set_retval);
        let mut loader = EbpfLoader::new();
        loader.override_global(aya_log::LEVEL, &level, false).override_global("CAN_SET_RETVAL", &can_set, true);
        if let Some(pin) = pinned::peers_before(pins.path()) {
            loader.map_pin_path(map::PEERS, pin);
        }
        let mut ebpf = loader.load(object).map_err(load_error)?;
        let hooks = Hooks::load(&mut ebpf, guard)?;
        for name in map::ALL {
            let map = ebpf.map(name).ok_or(DataplaneError::Missing { what: "map", name })?;
            pins.pin_map(name, map)?;
        }
        Ok(Self {
            workloads: take(&mut ebpf, map::WORKLOADS)?,
            placements: None,
            users: take(&mut ebpf, map::USERS)?,
            slots: Slots::open(&pins)?,
            facts: Facts::open(pins.path())?,
            shortages: Shortages::default(),
            views: take(&mut ebpf, map::VIEWS)?,
            name_ids: take(&mut ebpf, map::NAME_IDS)?,
            resolvers: take(&mut ebpf, map::RESOLVERS)?,
            namespaces: take(&mut ebpf, map::NETNS)?,
            meta: take(&mut ebpf, map::META)?,
            ebpf,
            pins,
            unpinned: Vec::new(),
            written: Meta::new(std::process::id(), env!("CARGO_PKG_VERSION"))
                .with_hooks(&hooks.loaded, &hooks.refused)
                .with_names(names.lifetime, names.quota),
            hooks,
            live: Live::default(),
            numbers: Vec::new(),
            left: Vec::new(),
            ids_of: HashMap::new(),
            rules: RuleIds::default(),
            believed: HashMap::new(),
            names: NameIds::default(),
            spots: BTreeMap::new(),
            memory_limit,
            can_set_retval,
        })
    }

    /// Brings the kernel to hold a layout. If anything fails, what was in force stays in force. What is no longer used is
    /// left for [`Dataplane::clean`].
    pub fn apply(&mut self, layout: &Layout, change: Change) -> Result<Applied, DataplaneError> {
        self.clean();
        let size = self.fits(layout)?;
        let patterns = names::patterns(layout);
        let plan = plan(&self.live, layout, &patterns, change)?;
        let is_changed = plan.live != self.live;
        self.names.assign(&patterns);
        let names = self.names.trie(&patterns)?;
        let mut last = None;
        let made = self.fill(&plan.steps, layout).and_then(|()| {
            plan.steps.iter().try_for_each(|step| {
                last = Some(step);
                self.make(step)
            })
        });
        if let Err(error) = made {
            match last {
                Some(Step::Insert(_)) => self.keep_filled(plan.live),
                _ => self.forget(&plan.live),
            }
            return Err(error);
        }
        (self.live, self.numbers) = (plan.live, plan.numbers);
        self.left = plan.cleanup;
        if let Some(names) = names {
            // After the rules: what is learnt for a name must find what it may do.
            self.names.exchange(&mut self.name_ids, names, &mut self.pins)?;
        }
        self.guard_dns()?;
        if let Err(error) = self.share(learners(layout)) {
            tracing::error!(error = %crate::run::chain(&error), "the guaranteed parts of what may be learnt are as before");
        }
        let live = &self.live;
        self.ids_of.retain(|scope, _| live.scopes.contains_key(scope));
        if change == Change::Policy && is_changed {
            let with_policy = self.written.with_policy(self.written.generation() + 1, layout.hash(), now());
            self.write_meta(with_policy)?;
            self.rules.retire(self.ids_of.values().flatten().copied().collect());
        }
        Ok(Applied { generation: self.written.generation(), is_changed, rules: self.rules.in_force(), ..size })
    }

    /// Removes what the last change left. Takes as long as the kernel's grace period, and nobody waits for it.
    pub fn clean(&mut self) {
        for step in std::mem::take(&mut self.left) {
            if let Err(error) = self.make(&step) {
                tracing::warn!(%error, "what is no longer used stays in memory");
            }
        }
    }

    /// What a layout takes, if it may.
    fn fits(&self, layout: &Layout) -> Result<Applied, DataplaneError> {
        let tables = || layout.scopes.iter().flat_map(|scope| scope.ruleset.views(Scope::new(0)));
        let prefixes: usize = tables().map(|(_, table)| table.entries().len() + table.names().len()).sum();
        let segments: usize = tables().map(|(_, table)| table.segments().len()).sum();
        let bytes = prefixes as u64 * PREFIX_BYTES + segments as u64 * SEGMENT_BYTES;
        let (scopes, limit) = (layout.scopes.len(), self.memory_limit);
        if bytes > limit {
            return Err(DataplaneError::TooLarge { prefixes, segments, scopes, bytes, limit });
        }
        Ok(Applied { generation: 0, is_changed: false, scopes, rules: 0, prefixes, segments })
    }

    /// Fills every scope that is new and puts it where nothing points to yet. Its descriptors are closed as soon as the scopes of
    /// a batch are put: a policy of thousands of scopes takes no more of them than one of a few.
    fn fill(&mut self, steps: &[Step], layout: &Layout) -> Result<(), DataplaneError> {
        let mut filled = Vec::with_capacity(BATCH);
        for step in steps {
            let Step::Fill { scope, index } = *step else { continue };
            let ruleset = &layout.scopes[index].ruleset;
            let ids = self.rules.assign(&ruleset.rules);
            for (view, table) in ruleset.views(scope) {
                filled.push(contents::fill(view, table, &ids, &self.names)?);
            }
            if filled.len() >= BATCH {
                self.slots.put(&filled)?;
                filled.clear();
            }
            self.believe(scope, ruleset.resolvers().map(Address::from).collect())?;
            self.set(scope.enforcing(), Some(&ruleset.enforcing))?;
            self.set(scope.with_audit(), ruleset.with_audit.as_ref())?;
            self.ids_of.insert(scope, ids);
        }
        self.slots.put(&filled)
    }

    /// Writes the settings of a view that nothing points to.
    fn set(&mut self, view: View, table: Option<&Table>) -> Result<(), DataplaneError> {
        let settings = table.map_or(Settings::ABSENT, Table::settings);
        let settings = if self.can_set_retval { settings } else { settings.with_refusal(Refusal::Eperm) };
        let bytes: [u8; 8] = transmute!(settings);
        self.views.set(view.index(), bytes, 0).map_err(|cause| failed(map::VIEWS, "write", cause))
    }

    fn make(&mut self, step: &Step) -> Result<(), DataplaneError> {
        match step {
            Step::Fill { .. } => Ok(()),
            Step::AddUsers(users) => users.iter().try_for_each(|(&key, &scope)| self.add_user(key, scope)),
            Step::SetDeepest(level) => self.write_meta(self.written.with_deepest(*level)),
            Step::Insert(added) => match &mut self.placements {
                Some(placements) => insert(placements, added),
                None => Ok(()),
            },
            Step::Exchange(placements) => self.exchange(placements),
            Step::RemoveUsers(users) => users.iter().try_for_each(|&key| self.remove_user(key)),
            Step::Clear(scopes) => {
                self.slots.clear(scopes)?;
                scopes.iter().try_for_each(|&scope| self.disbelieve(scope))
            }
        }
    }

    fn add_user(&mut self, key: UserKey, scope: Scope) -> Result<(), DataplaneError> {
        let key: [u8; 8] = transmute!(key);
        patiently(|| self.users.insert(key, scope.index(), 0)).map_err(|cause| failed(map::USERS, "fill", cause))
    }

    fn remove_user(&mut self, key: UserKey) -> Result<(), DataplaneError> {
        let key: [u8; 8] = transmute!(key);
        self.users.remove(&key).map_err(|cause| failed(map::USERS, "empty", cause))
    }

    /// Lets the workloads of a scope that nothing points to believe these resolvers.
    fn believe(&mut self, scope: Scope, resolvers: BTreeSet<Address>) -> Result<(), DataplaneError> {
        for &resolver in &resolvers {
            let key: [u8; size_of::<ResolverKey>()] = transmute!(ResolverKey::new(scope, resolver));
            patiently(|| self.resolvers.insert(key, 1, 0)).map_err(|cause| failed(map::RESOLVERS, "fill", cause))?;
        }
        self.believed.insert(scope, resolvers);
        Ok(())
    }

    fn disbelieve(&mut self, scope: Scope) -> Result<(), DataplaneError> {
        for resolver in self.believed.remove(&scope).into_iter().flatten() {
            let key: [u8; size_of::<ResolverKey>()] = transmute!(ResolverKey::new(scope, resolver));
            self.resolvers.remove(&key).map_err(|cause| failed(map::RESOLVERS, "empty", cause))?;
        }
        Ok(())
    }

    /// Keeps port 53 for those who may serve it, where somebody believes a resolver of this host.
    fn guard_dns(&mut self) -> Result<(), DataplaneError> {
        let in_force = self.believed.iter().filter(|(scope, _)| self.live.scopes.contains_key(scope));
        let guards = in_force.flat_map(|(_, resolvers)| resolvers).any(|resolver| resolver.is_loopback());
        if guards == self.written.guards_dns() {
            Ok(())
        } else {
            self.write_meta(self.written.with_dns_guarded(guards))
        }
    }

    /// Lets sockets of the calling thread's network namespace believe resolvers. On kernels that do not tell its cookie
    /// otherwise, this takes a program on `own`, the agent's cgroup.
    pub fn trust_own_namespace(&mut self, own: Option<&Cgroup>) -> Result<(), DataplaneError> {
        let cookie = match (netns::own_cookie(), own) {
            (Err(error), Some(own)) if error.kind() == io::ErrorKind::Unsupported => {
                programs::ask_cookie(&mut self.ebpf, own)?
            }
            (cookie, _) => cookie.map_err(DataplaneError::NoCookie)?,
        };
        self.trust_namespace(cookie)
    }

    /// Lets sockets of a network namespace believe resolvers.
    pub fn trust_namespace(&mut self, cookie: u64) -> Result<(), DataplaneError> {
        self.namespaces.insert(cookie, 1, 0).map_err(|cause| failed(map::NETNS, "fill", cause))
    }

    /// The network namespace is gone.
    pub fn distrust_namespace(&mut self, cookie: u64) -> Result<(), DataplaneError> {
        self.namespaces.remove(&cookie).map_err(|cause| failed(map::NETNS, "empty", cause))
    }

    fn exchange(&mut self, contents: &BTreeMap<u64, Placement>) -> Result<(), DataplaneError> {
        let room = u32::try_from(room(contents.len())).unwrap_or(u32::MAX);
        let create = |cause| failed(map::WORKLOADS, "create", cause);
        let mut placements = Placements::create(room, NO_PREALLOC).map_err(create)?;
        insert(&mut placements, contents)?;
        self.workloads.set(0, &placements, 0).map_err(|cause| failed(map::WORKLOADS, "exchange", cause))?;
        self.placements = Some(placements);
        Ok(())
    }

    /// After some of the new cgroups could not be inserted. Those that were point to what was filled, so it stays until
    /// everything is exchanged.
    fn keep_filled(&mut self, planned: Live) {
        let Live { scopes, deepest, .. } = planned;
        (self.live.scopes, self.live.deepest, self.live.is_untidy) = (scopes, deepest, true);
    }

    /// After a change that failed: removes what it filled. The numbers are free again whether or not that succeeds.
    fn forget(&mut self, planned: &Live) {
        let is_new = |scope: &Scope| !self.live.scopes.contains_key(scope);
        let new: BTreeSet<Scope> = planned.scopes.keys().copied().filter(is_new).collect();
        for &scope in &new {
            for &uid in planned.scopes[&scope].1.keys() {
                // It may never have been added.
                let _ = self.remove_user(UserKey::new(scope, uid));
            }
            self.ids_of.remove(&scope);
            let _ = self.disbelieve(scope);
        }
        if let Err(error) = self.slots.clear(&new) {
            tracing::warn!(%error, "what was filled stays in memory");
        }
    }

    fn write_meta(&mut self, meta: Meta) -> Result<(), DataplaneError> {
        let bytes: [u8; size_of::<Meta>()] = transmute!(meta);
        self.meta.set(0, bytes, 0).map_err(|cause| failed(map::META, "write", cause))?;
        self.written = meta;
        Ok(())
    }

    /// Attaches every hook but those of [`WHERE_IT_MATTERS`] to a cgroup, pinned: the programs stay there when the agent is gone.
    /// All of it is undone if one of them fails.
    pub fn attach(&mut self, cgroup: &Cgroup) -> Result<(), DataplaneError> {
        let level = cgroup.path.components().filter(|part| matches!(part, Component::Normal(_))).count();
        self.write_meta(self.written.with_level(u8::try_from(level).unwrap_or(u8::MAX)))?;
        let mut links = Vec::new();
        for hook in peers_first(&self.hooks.loaded) {
            links.push((hook.as_str(), programs::attach(&mut self.ebpf, hook, cgroup)?));
        }
        if !self.pins.is_there() {
            self.unpinned = links.into_iter().map(|(_, link)| link).collect();
            return Ok(());
        }
        // Links that are not pinned are undone when dropped.
        links.into_iter().try_for_each(|(hook, link)| {
            let path = self.pins.room_for(hook)?;
            Ok(sys::pin(link.as_fd(), &path).map_err(pins::failed("pin", &path))?)
        })
    }

    /// Guarantees each of so many workloads its part of what may be learnt.
    fn share(&mut self, learners: usize) -> Result<(), DataplaneError> {
        let part = guaranteed(self.written.quota(), u32::try_from(learners).unwrap_or(u32::MAX));
        if part == self.written.guaranteed() {
            return Ok(());
        }
        self.write_meta(self.written.with_guaranteed(part))?;
        if self.facts.share(part)? { Ok(()) } else { self.sweep() }
    }

    /// Removes what was learnt and holds no longer.
    pub fn sweep(&mut self) -> Result<(), DataplaneError> {
        let placements = &self.live.placements;
        let learnt = self.facts.sweep(|workload| is_there(placements, workload), self.written.guaranteed())?;
        self.names.retain(&learnt);
        Ok(())
    }

    /// Looks whether workloads find room for what they learn; gives those that do not, and did when that was looked at last. Removes
    /// what workloads learnt that are gone.
    pub fn look_for_room(&mut self) -> Result<Vec<Shortage>, DataplaneError> {
        let standings = self.facts.look()?;
        let placements = &self.live.placements;
        if standings.iter().any(|standing| !is_there(placements, standing.workload)) {
            self.sweep()?;
        }
        Ok(self.shortages.look(&standings, self.written.quota(), std::time::Instant::now()))
    }

    /// The workloads that found no room lately.
    pub fn shortages(&self) -> impl Iterator<Item = &Shortage> {
        self.shortages.all()
    }

    /// Takes over what another set learnt of names; how many addresses that were.
    pub fn adopt_facts(&mut self, set: &Path) -> Result<usize, DataplaneError> {
        let adopted = self.facts.adopt(set, &self.names)?;
        self.facts.share(self.written.guaranteed())?;
        Ok(adopted)
    }

    /// The hooks of [`WHERE_IT_MATTERS`] that are attached.
    pub fn spots(&self) -> impl Iterator<Item = Spot> {
        self.spots.keys().copied()
    }

    /// Attaches a hook of [`WHERE_IT_MATTERS`] to a cgroup, unless it is there. A kernel that refuses its program goes without
    /// where that only keeps names from being learnt.
    pub fn attach_spot(&mut self, hook: Hook, cgroup: &Cgroup) -> Result<(), DataplaneError> {
        let spot = Spot { hook, cgroup: cgroup.id };
        if self.spots.contains_key(&spot) {
            return Ok(());
        }
        match (self.hooks.loaded.contains(&hook), hook) {
            (true, _) => {}
            (false, Hook::Query) => return Err(DataplaneError::Lacks { hook: hook.as_str() }),
            (false, _) => return Ok(()),
        }
        let link = programs::attach(&mut self.ebpf, hook, cgroup)?;
        let kept = if self.pins.is_there() {
            let path = self.pins.room_for(&pinned::spot(hook, cgroup.id))?;
            sys::pin(link.as_fd(), &path).map_err(pins::failed("pin", &path))?;
            None
        } else {
            Some(link)
        };
        self.spots.insert(spot, kept);
        Ok(())
    }

    /// Forgets those whose pins somebody else removed, unless that was all there is; tells which they are.
    pub fn forget_lost_spots(&mut self) -> Vec<Spot> {
        if !self.pins.is_there() {
            return Vec::new();
        }
        let set = self.pins.path();
        let is_lost = |spot: &Spot, link: &mut Option<OwnedFd>| {
            link.is_none() && !set.join(pinned::spot(spot.hook, spot.cgroup)).exists()
        };
        self.spots.extract_if(.., is_lost).map(|(spot, _)| spot).collect()
    }

    /// Takes a hook off a cgroup, which may be gone.
    pub fn detach_spot(&mut self, spot: Spot) -> Result<(), DataplaneError> {
        if let Some(None) = self.spots.remove(&spot)
            && self.pins.is_there()
        {
            pinned::detach_link(&self.pins.path().join(pinned::spot(spot.hook, spot.cgroup)))?;
        }
        Ok(())
    }

    /// The set is complete: it is found by whoever looks for one, and is not swept as half-made.
    pub fn commit(&mut self) -> Result<(), DataplaneError> {
        Ok(self.pins.commit()?)
    }

    /// Where it is pinned.
    pub const fn pins(&self) -> &PinSet {
        &self.pins
    }

    /// The programs that this kernel refused, and without which there are ways around that the documentation names.
    pub fn refused(&self) -> &[Hook] {
        &self.hooks.refused
    }

    /// The number in the kernel of a scope of the layout in force.
    pub fn number(&self, index: usize) -> Option<Scope> {
        self.numbers.get(index).copied()
    }

    /// What is in force.
    pub const fn meta(&self) -> &Meta {
        &self.written
    }

    /// Whether cgroups that are gone are still placed, or others could not be.
    pub const fn is_untidy(&self) -> bool {
        self.live.is_untidy
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

    /// What workloads asked for when they got addresses.
    pub fn asked_names(&self) -> Result<AskedNames, DataplaneError> {
        AskedNames::open(self.pins.path())
    }

    /// The cgroups whose events found no room in the ring buffer, each with how many: of all of [`Dataplane::lost`], those of
    /// which it is known.
    pub fn lost_by_cgroup(&self) -> Result<Vec<(u64, u64)>, DataplaneError> {
        let shares = self.ebpf.map(map::SHARES).ok_or(DataplaneError::Missing { what: "map", name: map::SHARES })?;
        pinned::read_shares(shares)
    }

    /// How many events found no room in the ring buffer.
    pub fn lost(&self) -> Result<u64, DataplaneError> {
        let stats = self.ebpf.map(map::STATS).ok_or(DataplaneError::Missing { what: "map", name: map::STATS })?;
        pinned::read_counter(stats, Counter::EventsLost)
    }
}

/// Whether what a workload learnt is of use to any.
fn is_there(placements: &BTreeMap<u64, Placement>, workload: u64) -> bool {
    matches!(workload, SHARED | COMMON | ELSEWHERE) || placements.contains_key(&workload)
}

/// How many workloads may learn names: those whose rules have some, and [`SHARED`], for which others may.
fn learners(layout: &Layout) -> usize {
    let has_names = |scope: &scopes::Scope| scope.ruleset.has_names();
    let learns = |seat| match seat {
        scopes::Seat::Scope(index) => {
            let scope = &layout.scopes[index];
            has_names(scope) || scope.users.values().any(|&index| has_names(&layout.scopes[index]))
        }
        scopes::Seat::Exempt | scopes::Seat::Unknown => false,
    };
    let placed = layout.placements.values().filter(|at| learns(at.own) || learns(at.below)).count();
    let is_shared = layout.scopes.iter().any(|scope| scope.ruleset.serves_dns());
    placed + usize::from(layout.elsewhere.is_some_and(learns)) + usize::from(is_shared)
}

/// The hooks that are attached to every filtered cgroup. What a socket receives is noted before what it sends is judged.
fn peers_first(loaded: &[Hook]) -> impl Iterator<Item = Hook> {
    let notes_peers = |hook: &&Hook| matches!(hook, Hook::Recvmsg4 | Hook::Recvmsg6);
    let others = loaded.iter().filter(move |hook| !notes_peers(hook) && !WHERE_IT_MATTERS.contains(hook));
    loaded.iter().filter(notes_peers).chain(others).copied()
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn insert(placements: &mut Placements, contents: &BTreeMap<u64, Placement>) -> Result<(), DataplaneError> {
    contents.iter().try_for_each(|(id, &placement)| {
        let value: [u8; 8] = transmute!(placement);
        patiently(|| placements.insert(id, value, 0)).map_err(|cause| failed(map::WORKLOADS, "fill", cause))
    })
}

fn open(set: &Path, name: &'static str) -> Result<MapData, DataplaneError> {
    MapData::from_pin(set.join(name)).map_err(|cause| failed(name, "open", cause))
}

fn take<M: TryFrom<Map, Error = MapError>>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, DataplaneError> {
    let map = ebpf.take_map(name).ok_or(DataplaneError::Missing { what: "map", name })?;
    M::try_from(map).map_err(|cause| failed(name, "open", cause))
}

fn failed(name: &'static str, what: &'static str, cause: MapError) -> DataplaneError {
    DataplaneError::Map { name, what, cause }
}

fn load_error(error: EbpfError) -> DataplaneError {
    if is_eperm(&error) { DataplaneError::Privilege } else { DataplaneError::Load(Box::new(error)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_versions_are_read_from_every_distributions_release() {
        assert_eq!(kernel_version("5.10.0-28-amd64"), Some((5, 10)));
        assert_eq!(kernel_version("6.18.44-fc"), Some((6, 18)));
        assert_eq!(kernel_version("5.4"), Some((5, 4)));
        assert_eq!(kernel_version("weird"), None);
    }
}
