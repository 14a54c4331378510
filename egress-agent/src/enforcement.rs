//! What is in force on a cgroup, and how that follows its policies and the cgroups below it.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use egress_common::{Hook, MAX_LEVEL, SHARED};

use crate::{
    cgroup::{self, Cgroup, CgroupError, is_gone, reach},
    dataplane::{Applied, Change, Dataplane, DataplaneError, Lack, Shortage, Spot},
    existing::{Sweep, may_enter},
    hierarchy::{Changed, Hierarchy},
    memory::Heap,
    netns::PodNamespaces,
    pods::{Place, Pods},
    policy::load::Watched,
    ruleset::Ruleset,
    run::{RunError, chain, system},
    scopes::{Layout, Node, Placement, Seat, Selector, UnknownWorkloads},
    socket_matching::{self, Matching, Vigil},
    status,
    text::printable_bytes,
    watch::Watch,
};

/// How often the cgroup is looked after, beside the notice of changes.
pub(crate) const LOOK_AFTER: Duration = Duration::from_secs(1);

/// How often all cgroups are looked at again where some cannot be watched.
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How often what was learnt of names, and holds no longer, is removed.
const SWEEP: Duration = Duration::from_secs(10);

/// The filtered cgroup over time. It may be removed and made again, as systemd does when it restarts a unit; the programs
/// go with it, so they are attached again.
pub(crate) struct Enforcement {
    given: PathBuf,
    mount: PathBuf,
    /// As it was when it was attached last.
    pub(crate) cgroup: Cgroup,
    is_attached: bool,
    /// Whether the pins were there when they were looked for last.
    is_pinned: bool,
    /// Where its going and coming is noticed.
    watch: Watch,
    hierarchy: Hierarchy,
    /// Some cgroups that came could not be looked at.
    is_behind: bool,
    /// When everything was looked at last.
    looked: Instant,
    /// The agent's own cgroup.
    agent: Option<Cgroup>,
    selector: Selector,
    /// What is in force.
    layout: Layout,
    /// The same for `status`, made when somebody asks.
    told: OnceLock<Arc<[status::Scope]>>,
    pub(crate) dataplane: Dataplane,
    sweeping: Sweeping,
    /// When what was learnt of names was swept last.
    swept: Instant,
    /// Where pods are, if the agent may look.
    namespaces: Option<PodNamespaces>,
    /// Why names are not learnt, if they are not.
    unlearnt: Option<String>,
    /// Where the kernel may stop to match sockets to cgroups.
    vigil: Option<Vigil>,
    /// Hooks that are not where the policies need them, each with what is wrong.
    unattached: BTreeMap<Spot, String>,
    heap: Heap,
}

/// A hook that could not be attached to a cgroup that is there.
struct Unattached {
    spot: Spot,
    /// The cgroup, below the mount.
    path: PathBuf,
    error: RunError,
}

impl Unattached {
    /// For `status`.
    fn told(&self) -> String {
        let Self { spot, path, error } = self;
        let follows = match spot.hook {
            Hook::Query => "what is there is refused",
            _ => "names are not learnt there",
        };
        let (hook, path) = (spot.hook.as_str(), printable_bytes(&Path::new("/").join(path)));
        format!("{hook} is not attached to cgroup {path}, {follows}: {}", chain(error))
    }
}

/// Whether connections that are to end are looked for once more: one that was allowed a moment before may not have been there
/// yet.
enum Sweeping {
    Done,
    OnceMore,
}

/// What changed.
pub(crate) enum Noticed {
    /// The filtered cgroup came or went, perhaps.
    Top,
    /// Cgroups below it did.
    Below(Changed),
}

/// A cgroup that is to be filtered.
pub(crate) struct Target {
    pub(crate) mount: PathBuf,
    pub(crate) given: PathBuf,
    pub(crate) cgroup: Cgroup,
    agent: Option<Cgroup>,
    /// This process made it, so that nobody else makes it anew.
    pub(crate) is_our_own: bool,
}

impl Target {
    /// Opens the cgroup. The agent must not be in it, or it would filter nobody or itself; the root cgroup, whose tasks
    /// are exempt, is another matter.
    pub(crate) fn open(given: &Path, mount: &Path) -> Result<Self, RunError> {
        let cgroup = Cgroup::open(given, mount)?;
        let agent = cgroup::own(mount);
        let target = Self { mount: mount.to_owned(), given: given.to_owned(), cgroup, agent, is_our_own: false };
        if target.holds_agent() && !target.cgroup.is_root() {
            return Err(RunError::OwnCgroup { path: target.cgroup.path });
        }
        Ok(target)
    }

    /// Whether it is the agent's own cgroup: the root.
    pub(crate) fn holds_agent(&self) -> bool {
        self.agent.as_ref().is_some_and(|agent| agent.id == self.cgroup.id)
    }
}

impl Enforcement {
    /// Puts the first policy into the kernel; nothing is attached yet. Must be called in a tokio runtime.
    pub(crate) fn new(
        target: Target,
        mut dataplane: Dataplane,
        selector: Selector,
    ) -> Result<(Self, Applied), RunError> {
        let Target { mount, given, cgroup, agent, is_our_own } = target;
        let trusted = dataplane.trust_own_namespace(agent.as_ref());
        let unlearnt = trusted.err().map(|error| format!("names are not learnt in the kernel: {}", chain(&error)));
        if let Some(unlearnt) = &unlearnt {
            tracing::warn!("{unlearnt}");
        }
        let always = agent.as_ref().map(|agent| agent.path.as_path());
        let hierarchy = Hierarchy::new(&mount, &cgroup.path, always);
        let mut watch = Watch::default();
        if !is_our_own {
            let directory = mount.join(cgroup::below(&cgroup.path));
            match watch.set(Watched::path(&directory)) {
                // It is looked at every second, too.
                Err(error) if error.kind() == io::ErrorKind::QuotaExceeded => tracing::warn!(%error, "{CANNOT_WATCH}"),
                watched => watched.map_err(system(CANNOT_WATCH))?,
            }
        }
        let vigil = (socket_matching::is_possible() && !cgroup.is_root()).then(Vigil::default);
        let mut enforcement = Self {
            vigil,
            unattached: BTreeMap::new(),
            heap: Heap::default(),
            namespaces: may_enter().then(PodNamespaces::default),
            unlearnt,
            sweeping: Sweeping::Done,
            swept: Instant::now(),
            given,
            mount,
            cgroup,
            is_attached: false,
            is_pinned: true,
            watch,
            hierarchy,
            is_behind: false,
            looked: Instant::now(),
            agent,
            selector,
            layout: Layout::default(),
            told: OnceLock::new(),
            dataplane,
        };
        let applied = enforcement.place(Change::Policy)?;
        enforcement.follow_namespaces();
        Ok((enforcement, applied))
    }

    /// Whether the kernel would filter.
    pub(crate) fn expect_matching(&self) -> Result<(), RunError> {
        if self.vigil.is_none() {
            return Ok(());
        }
        match socket_matching::probe(self.agent.as_ref()) {
            Matching::Works => Ok(()),
            Matching::Stopped => Err(RunError::SocketMatching),
            Matching::Unknown(why) => {
                tracing::warn!(
                    %why,
                    "cannot tell whether net_cls or net_prio has stopped this kernel from matching sockets to cgroups"
                );
                Ok(())
            }
        }
    }

    /// Whether names are learnt anywhere.
    fn learns(&self) -> bool {
        self.dataplane.spots().any(|spot| spot.hook == Hook::Ingress)
    }

    /// What is not as it should be.
    pub(crate) fn degraded(&self) -> Vec<String> {
        let stopped = self.vigil.as_ref().is_some_and(Vigil::is_stopped);
        let learns = self.learns();
        let unlearnt = self.unlearnt.clone().filter(|_| learns);
        let stopped = stopped.then(|| socket_matching::STOPPED.to_owned());
        let unattached = self.unattached.values().cloned();
        stopped
            .into_iter()
            .chain(unlearnt)
            .chain(unattached)
            .chain(self.too_deep())
            .chain(self.unwatched())
            .chain(self.short_of_room())
            .collect()
    }

    /// That cgroups may come which nothing tells of.
    fn unwatched(&self) -> Option<String> {
        let unwatched = self.hierarchy.unwatched();
        let (path, limit) = unwatched.first_key_value()?;
        let (path, count, seconds) =
            (printable_bytes(&Path::new("/").join(path)), unwatched.len(), LOOK_AGAIN.as_secs());
        Some(format!("{limit}; what comes below {count} cgroup(s), as {path}, is placed after up to {seconds} s"))
    }

    /// That policies may select cgroups which are too deep to be told apart.
    fn too_deep(&self) -> Option<String> {
        let too_deep = self.hierarchy.too_deep();
        let path = printable_bytes(&Path::new("/").join(too_deep.first()?));
        let (count, unknown) = (too_deep.len(), self.selector.unknown());
        let become_of = match unknown {
            UnknownWorkloads::Deny => "are refused (unknown_workload) where an enforcing policy may select them",
            UnknownWorkloads::Inherit => "are judged as the cgroup above them",
        };
        Some(format!("cgroups deeper than level {MAX_LEVEL} {become_of}: below {count} cgroup(s), as {path}"))
    }

    /// The workloads that find no room for the names that they are answered.
    fn short_of_room(&self) -> Vec<String> {
        let nodes = self.hierarchy.nodes();
        let mut shortages = self.dataplane.shortages();
        let told = shortages.by_ref().take(MAX_SHORTAGES_TOLD).map(|shortage| {
            let who = workload_name(&nodes, shortage.workload);
            match shortage.lack {
                Lack::Quota => format!(
                    "{who} was answered names that were not learnt: it has {} addresses and may have no more (--name-quota)",
                    shortage.has
                ),
                Lack::Table => format!(
                    "the table of learnt names is full: {who} was answered names that were not learnt, and has {} addresses",
                    shortage.has
                ),
            }
        });
        let mut told: Vec<String> = told.collect();
        let more = shortages.count();
        told.extend((more > 0).then(|| format!("{more} more workloads were answered names that were not learnt")));
        told
    }

    fn look_for_room(&mut self) {
        match self.dataplane.look_for_room() {
            Ok(shortages) => {
                let nodes = if shortages.is_empty() { Vec::new() } else { self.hierarchy.nodes() };
                for &Shortage { workload, lack, has } in shortages.iter().take(MAX_SHORTAGES_TOLD) {
                    let cgroup = workload_name(&nodes, workload);
                    tracing::warn!(%cgroup, addresses = has, ?lack, "names are not learnt: no room for more addresses");
                }
                if shortages.len() > MAX_SHORTAGES_TOLD {
                    let workloads = shortages.len() - MAX_SHORTAGES_TOLD;
                    tracing::warn!(workloads, "names of more workloads are not learnt: no room for more addresses");
                }
            }
            Err(error) => tracing::error!(error = %chain(&error), "cannot tell whether there is room for names"),
        }
    }

    /// Attaches the programs.
    pub(crate) fn attach(&mut self) -> Result<(), DataplaneError> {
        self.dataplane.attach(&self.cgroup)?;
        self.is_attached = true;
        Ok(())
    }

    /// Puts other policies in force. If that fails, those before stay.
    pub(crate) fn adopt(&mut self, mut selector: Selector) -> Result<Applied, RunError> {
        let pods = self.with_gone(selector.pods().clone());
        selector.set_pods(pods);
        selector.inherit(&self.selector);
        let before = std::mem::replace(&mut self.selector, selector);
        let applied = self.place(Change::Policy);
        if applied.is_err() {
            self.selector = before;
            // What is known of the hierarchy is again what these policies ask for.
            self.look()?;
        }
        applied
    }

    /// Places the pods that there are now, by the same policies.
    pub(crate) fn set_pods(&mut self, pods: Pods) {
        let pods = self.with_gone(pods);
        self.selector.set_pods(pods);
        if let Err(error) = self.apply(Change::Tidy) {
            tracing::error!(error = %chain(&error), "cannot place pods: they are refused, or judged as before");
            self.is_behind = true;
        }
        self.sweeping = Sweeping::OnceMore;
    }

    /// The pods that are placed.
    pub(crate) const fn pods(&self) -> &Pods {
        self.selector.pods()
    }

    fn with_gone(&self, mut pods: Pods) -> Pods {
        let nodes = self.hierarchy.nodes();
        pods.keep(self.selector.pods(), nodes.iter().map(|node| node.path.as_path()));
        pods
    }

    /// Ends connections that the policies in force would refuse, where they say so; and once more when it is looked after.
    pub(crate) fn terminate(&mut self) {
        self.sweep();
        self.sweeping = Sweeping::OnceMore;
    }

    fn sweep(&self) {
        let ended = Sweep { mount: &self.mount, top: &self.cgroup.path, layout: &self.layout }.run();
        if ended > 0 {
            tracing::info!(ended, "connections that the policy refuses were terminated");
        }
    }

    /// Removes what the last change left behind.
    pub(crate) fn clean(&mut self) {
        self.dataplane.clean();
        self.heap.give_back();
    }

    fn look(&mut self) -> Result<(), RunError> {
        self.looked = Instant::now();
        let (selector, before) = (&mut self.selector, self.hierarchy.too_deep().len());
        self.hierarchy.look(&mut |path| selector.looks_below(path)).map_err(system(CANNOT_WATCH))?;
        self.warn_of_too_deep(before);
        Ok(())
    }

    /// Once for all of them.
    fn warn_of_too_deep(&self, before: usize) {
        if let (0, Some(too_deep)) = (before, self.too_deep()) {
            tracing::warn!("{too_deep}");
        }
    }

    /// Looks at all cgroups and places them.
    fn place(&mut self, change: Change) -> Result<Applied, RunError> {
        self.look()?;
        self.is_behind = false;
        self.apply(change).inspect_err(|_| self.is_behind = true)
    }

    fn apply(&mut self, change: Change) -> Result<Applied, RunError> {
        let nodes = self.hierarchy.nodes();
        let mut layout = self.selector.layout(&nodes, self.agent.as_ref().map(|agent| agent.id))?;
        let wanted = where_it_matters(&nodes, &layout);
        // Who listens before there is something to learn misses nothing, and a question is judged from the first on by a policy that
        // wants it. But before there is any policy, each would be refused.
        let is_early = |spot: &Spot| self.is_attached || spot.hook == Hook::Ingress;
        let (early, late): (Vec<_>, Vec<_>) = wanted.iter().partition(|(spot, _)| is_early(spot));
        let failed = self.attach_spots(&early);
        self.do_without(failed, change, &nodes, &mut layout)?;
        let applied = self.dataplane.apply(&layout, change)?;
        if let Some(failed) = self.attach_spots(&late).into_iter().next() {
            return Err(failed.error);
        }
        self.layout = layout;
        self.told = OnceLock::new();
        self.heap.holds(applied.prefixes);
        self.detach_elsewhere(&wanted.keys().copied().collect());
        Ok(applied)
    }

    /// After hooks could not be attached: a policy that needs them is not put in force. But a cgroup that came, or one where
    /// that was so before, holds nobody else up: questions that nobody could judge are not asked there, and it is tried again.
    fn do_without(
        &mut self,
        failed: Vec<Unattached>,
        change: Change,
        nodes: &[Node],
        layout: &mut Layout,
    ) -> Result<(), RunError> {
        let before = std::mem::take(&mut self.unattached);
        self.is_behind |= !failed.is_empty();
        for failed in failed {
            let told = failed.told();
            match before.get(&failed.spot) {
                None if change == Change::Policy => {
                    self.unattached = before;
                    return Err(failed.error);
                }
                Some(before) if *before == told => {}
                _ => tracing::error!("{told}"),
            }
            if failed.spot.hook == Hook::Query {
                for node in nodes.iter().filter(|node| node.path.starts_with(&failed.path)) {
                    if let Some(placement) = layout.placements.get_mut(&node.id) {
                        (placement.own, placement.below) = (Seat::Unknown, Seat::Unknown);
                    }
                }
            }
            self.unattached.insert(failed.spot, told);
        }
        Ok(())
    }

    /// Attaches hooks where they are not yet, and tells of those that are needed and cannot be.
    fn attach_spots(&mut self, wanted: &[(&Spot, &PathBuf)]) -> Vec<Unattached> {
        let there: BTreeSet<Spot> = self.dataplane.spots().collect();
        let missing = wanted.iter().filter(|(spot, _)| !there.contains(spot));
        let attach = |&(&spot, path): &(&Spot, &PathBuf)| {
            let error = self.attach_spot(spot, path).err()?;
            Some(Unattached { spot, path: path.clone(), error })
        };
        missing.filter_map(attach).collect()
    }

    /// It is no error if the cgroup is gone, which will be noticed.
    fn attach_spot(&mut self, spot: Spot, path: &Path) -> Result<(), RunError> {
        let opened = match Cgroup::at(&self.mount, path) {
            Ok(cgroup) if cgroup.id == spot.cgroup => cgroup,
            Ok(_) => return Ok(()),
            Err(error) if is_gone(&error) => return Ok(()),
            Err(error) => return Err(system("cannot open the cgroup")(error)),
        };
        let attached = self.dataplane.attach_spot(spot.hook, &opened);
        let is_there = || reach(&self.mount.join(path)).and_then(|path| fs::metadata(&*path));
        match attached {
            Err(_) if is_there().is_err_and(|error| is_gone(&error)) => Ok(()),
            attached => Ok(attached?),
        }
    }

    fn detach_elsewhere(&mut self, wanted: &BTreeSet<Spot>) {
        let unwanted: Vec<Spot> = self.dataplane.spots().filter(|spot| !wanted.contains(spot)).collect();
        for spot in unwanted {
            if let Err(error) = self.dataplane.detach_spot(spot) {
                let (hook, cgroup) = (spot.hook.as_str(), spot.cgroup);
                tracing::warn!(error = %chain(&error), hook, cgroup, "a program still runs where it does not matter");
            }
        }
    }

    /// Waits until cgroups come or go.
    pub(crate) async fn changed(&mut self) -> io::Result<Noticed> {
        tokio::select! {
            changed = self.watch.changed() => changed.map(|()| Noticed::Top),
            changed = self.hierarchy.changed() => changed.map(Noticed::Below),
        }
    }

    /// Looks at what was noticed.
    pub(crate) fn follow(&mut self, noticed: Noticed) {
        match noticed {
            Noticed::Top => self.look_after(),
            Noticed::Below(changed) => self.follow_cgroups(changed),
        }
    }

    /// Places cgroups that came.
    fn follow_cgroups(&mut self, changed: Changed) {
        let (selector, before) = (&mut self.selector, self.hierarchy.too_deep().len());
        let updated = self.hierarchy.update(changed, &mut |path| selector.looks_below(path));
        self.warn_of_too_deep(before);
        if let Err(error) = updated.map_err(system(CANNOT_WATCH)).and_then(|()| self.apply(Change::Cgroups)) {
            self.is_behind = true;
            tracing::error!(error = %chain(&error), "cannot place new cgroups: they are refused, or judged as their parents");
        }
        self.follow_namespaces();
        self.sweeping = Sweeping::OnceMore;
    }

    /// Lets pods believe resolvers in their own network namespaces, where names matter.
    fn follow_namespaces(&mut self) {
        let learns = self.learns();
        let Some(namespaces) = &mut self.namespaces else { return };
        if !learns {
            return;
        }
        let (nodes, pods) = (self.hierarchy.nodes(), self.selector.pods());
        let of_pods = nodes.iter().filter(|node| matches!(pods.place(&node.path), Place::Pod(_)));
        let directories =
            of_pods.flat_map(|node| cgroup::directories(&self.mount.join(&node.path)).collect::<Vec<_>>());
        let (came, went) = namespaces.follow(directories.flat_map(|directory| cgroup::tasks(&directory)));
        for changed in [
            came.into_iter().try_for_each(|cookie| self.dataplane.trust_namespace(cookie)),
            went.into_iter().try_for_each(|cookie| self.dataplane.distrust_namespace(cookie)),
        ] {
            if let Err(error) = changed {
                tracing::error!(error = %chain(&error), "cannot follow the network namespaces of pods");
            }
        }
    }

    /// Forgets cgroups that went, and places those that could not be placed before.
    fn catch_up(&mut self) -> Result<(), RunError> {
        let may_have_come = !self.hierarchy.unwatched().is_empty() && self.looked.elapsed() >= LOOK_AGAIN;
        if self.is_behind || may_have_come {
            self.place(Change::Tidy)?;
        } else if self.dataplane.is_untidy() {
            self.apply(Change::Tidy).inspect_err(|_| self.is_behind = true)?;
        }
        Ok(())
    }

    /// Catches up with cgroups that came and went, and attaches again where the cgroup was made anew.
    pub(crate) fn look_after(&mut self) {
        self.look_for_pins();
        self.look_for_spots();
        self.follow_namespaces();
        if let Sweeping::OnceMore = std::mem::replace(&mut self.sweeping, Sweeping::Done) {
            self.sweep();
        }
        if let Some(vigil) = &mut self.vigil {
            vigil.look(self.agent.as_ref());
        }
        self.look_for_room();
        if self.swept.elapsed() >= SWEEP {
            self.swept = Instant::now();
            if let Err(error) = self.dataplane.sweep() {
                tracing::error!(error = %chain(&error), "what was learnt of names is not forgotten");
            }
        }
        if let Err(error) = self.catch_up() {
            tracing::error!(error = %chain(&error), "cannot follow the cgroups that came and went");
        }
        let cgroup = self.cgroup.path.display();
        match Cgroup::open(&self.given, &self.mount) {
            Ok(found) if self.is_attached && found.id == self.cgroup.id => {}
            Ok(found) => match self.attach_anew(found) {
                Ok(()) => {
                    tracing::warn!(cgroup = %self.cgroup.path.display(), "the cgroup was made anew: attached again");
                }
                Err(error) => tracing::error!(error = %chain(&error), "cannot attach again: nothing is filtered"),
            },
            // It is there, and there is no descriptor left, perhaps.
            Err(error @ CgroupError::Open { .. }) => tracing::debug!(%error, "cannot look after the cgroup"),
            Err(error) if self.is_attached => {
                tracing::error!(%error, %cgroup, "the cgroup is gone: nothing is filtered until it is back");
                self.is_attached = false;
            }
            Err(_) => {}
        }
    }

    /// Without pins, the agent's own descriptors keep everything in force.
    fn look_for_pins(&mut self) {
        let pins = self.dataplane.pins();
        if self.is_pinned && !pins.is_there() {
            tracing::error!(pins = %pins.path().display(), "the pins are gone: what is in force ends with this agent");
        }
        self.is_pinned = pins.is_there();
    }

    /// Attaches again what somebody else took off.
    fn look_for_spots(&mut self) {
        for spot in self.dataplane.forget_lost_spots() {
            let (hook, cgroup) = (spot.hook.as_str(), spot.cgroup);
            tracing::error!(hook, cgroup, "the pin of a program is gone: attached again");
            self.is_behind = true;
        }
    }

    /// The cgroup has another id, so it is placed before it is attached.
    fn attach_anew(&mut self, found: Cgroup) -> Result<(), RunError> {
        self.cgroup = found;
        // Until it is: whatever fails here is tried again.
        self.is_attached = false;
        self.place(Change::Tidy)?;
        Ok(self.attach()?)
    }

    /// Whether the programs are on the cgroup.
    pub(crate) const fn is_attached(&self) -> bool {
        self.is_attached
    }

    /// Whether what is in force outlives the agent.
    pub(crate) const fn is_pinned(&self) -> bool {
        self.is_pinned
    }

    /// The scopes in force, for `status`.
    pub(crate) fn scopes(&self) -> Arc<[status::Scope]> {
        Arc::clone(self.told.get_or_init(|| self.tell_scopes()))
    }

    fn tell_scopes(&self) -> Arc<[status::Scope]> {
        let Layout { scopes, placements, .. } = &self.layout;
        let mut cgroups = vec![Vec::new(); scopes.len()];
        for node in self.hierarchy.nodes() {
            if let Some(&Placement { own: Seat::Scope(index), .. }) = placements.get(&node.id) {
                cgroups[index].push(printable_bytes(&Path::new("/").join(&node.path)));
            }
        }
        let mut users = vec![BTreeSet::new(); scopes.len()];
        for (&uid, &index) in scopes.iter().flat_map(|scope| &scope.users) {
            users[index].insert(uid);
        }
        let with_workloads = scopes.iter().zip(cgroups).zip(users).enumerate();
        with_workloads
            .map(|(index, ((scope, cgroups), users))| status::Scope {
                id: self.dataplane.number(index).map_or(0, egress_common::Scope::index),
                policies: scope.policies.iter().map(ToString::to_string).collect(),
                workloads: cgroups.len() + users.len(),
                cgroups,
                users: users.into_iter().collect(),
                prefixes: scope.ruleset.views(Ruleset::SCOPE).map(|(_, table)| table.entries().len()).sum(),
            })
            .collect()
    }
}

/// The hooks that few cgroups need, with those that do and where these are. What is below one of them has them, too.
fn where_it_matters(nodes: &[Node], layout: &Layout) -> BTreeMap<Spot, PathBuf> {
    let mut sorted: Vec<&Node> = nodes.iter().collect();
    sorted.sort_by_key(|node| node.level());
    let names_matter = layout.scopes.iter().any(|scope| scope.ruleset.has_names());
    let learns = |rules: &Ruleset| rules.has_names() || (names_matter && rules.serves_dns());
    let mut wanted = BTreeMap::new();
    for node in top_most(&sorted, layout, learns) {
        wanted.insert(Spot { hook: Hook::Ingress, cgroup: node.id }, node.path.clone());
    }
    for node in top_most(&sorted, layout, Ruleset::judges_queries) {
        wanted.insert(Spot { hook: Hook::Query, cgroup: node.id }, node.path.clone());
    }
    wanted
}

/// How many workloads are told that find no room for names; of more, how many there are.
const MAX_SHORTAGES_TOLD: usize = 8;

/// A workload as `status` names it.
fn workload_name(nodes: &[Node], workload: u64) -> String {
    if workload == SHARED {
        return "shared".to_owned();
    }
    let node = nodes.iter().find(|node| node.id == workload);
    node.map_or_else(|| workload.to_string(), |node| printable_bytes(&Path::new("/").join(&node.path)))
}

/// The nodes whose rules, or those of users in them, are of a kind, and that have none above them. `sorted` has each node after those
/// above it.
fn top_most<'a>(sorted: &[&'a Node], layout: &Layout, matters: impl Fn(&Ruleset) -> bool) -> Vec<&'a Node> {
    let matters_at = |seat| match seat {
        Seat::Scope(index) => {
            let scope = &layout.scopes[index];
            let of_users = scope.users.values().map(|&index| &layout.scopes[index]);
            std::iter::once(scope).chain(of_users).any(|scope| matters(&scope.ruleset))
        }
        Seat::Exempt | Seat::Unknown => false,
    };
    let mut paths: HashSet<&Path> = HashSet::new();
    let mut found = Vec::new();
    for &node in sorted {
        let path = node.path.as_path();
        let matters = layout.placements.get(&node.id).is_some_and(|at| matters_at(at.own) || matters_at(at.below));
        if matters && !path.ancestors().any(|above| paths.contains(above)) {
            paths.insert(path);
            found.push(node);
        }
    }
    found
}

const CANNOT_WATCH: &str = "cannot watch cgroups";
