//! The daemon: puts the policies in force, reports what they refuse, and follows their files.
//!
//! Order at start: policy read, kernel probed, maps filled, programs attached and pinned, the set of the agent before
//! retired, READY. Afterwards a policy that cannot be read leaves the last good one in force.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use egress_common::Lifetime;
use rustix::system::uname;
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::{JoinHandle, spawn_blocking},
    time::{Instant, Interval, interval, interval_at, sleep, sleep_until},
};

use crate::{
    board::{self, Board, Changing},
    cgroup::{self, Cgroup, CgroupError, CgroupPaths},
    cli::{ClusterArgs, EXEC_PIN_DIRECTORY, LogLevel, Output, RunArgs},
    compile::{CompileError, Names, NodeAction, NodeDefault},
    control::{self, Asked, Control, Request},
    dataplane::{self, Applied, Dataplane, DataplaneError, KernelLog, NameSettings, others, pinned},
    enforcement::{Enforcement, LOOK_AFTER, Target},
    events::{Enricher, HostNames},
    exec,
    existing::{self, ExistingError},
    kubernetes::{self, Cluster, ClusterError, Rejection, Revisions},
    memory,
    notify::Notifier,
    pins::{self, PinDirectory, PinError},
    pods::{PodNames, ROOTS},
    policy::load::{LoadError, LoadOptions},
    privileges::{self, CapabilitySet, FOREIGN_FILES},
    report::{Counts, Reported, Reporter, Sink},
    resolver::{self, Resolver, ResolverError},
    socket_matching,
    source::{HOLD, LOOK, Policy, Source, SourceOptions},
    status::{self, FromAgent, Pending, Wildcard},
    stop,
    text::{printable, printable_bytes},
    workload::names_root,
};

/// Why the agent ended before it was asked to.
#[derive(Debug, Error)]
pub enum RunError {
    /// The policy paths cannot be read.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// The documents are invalid; each error is already printed.
    #[error("the policy is invalid: {errors} error(s)")]
    Invalid {
        /// How many.
        errors: usize,
    },
    /// The cgroup cannot be had.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The pin directory cannot be had.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// The agent would have to filter itself.
    #[error(
        "the agent itself runs in cgroup {}, and never filters itself: start it from another cgroup", .path.display()
    )]
    OwnCgroup {
        /// The cgroup to filter.
        path: PathBuf,
    },
    /// Everything on the host would be refused.
    #[error(
        "no document at all and --default Deny would refuse everything on this host: add policies, use --default Audit, or \
         --force"
    )]
    NeedsForce,
    /// The kernel cannot be brought to enforce.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
    /// The Kubernetes API cannot be asked.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// No cgroup of pods.
    #[error(
        "no cgroup of pods: none of {} is below {}; name another with --cgroup", ROOTS.join(", "), .mount.display()
    )]
    NoPods {
        /// Where the hierarchy is mounted.
        mount: PathBuf,
    },
    /// Connections cannot be ended.
    #[error(transparent)]
    Existing(#[from] ExistingError),
    /// The kernel would not filter.
    #[error("{}", socket_matching::STOPPED)]
    SocketMatching,
    /// Names cannot be resolved at all.
    #[error(transparent)]
    Resolver(Box<ResolverError>),
    /// The policy is too large to be compiled.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// Something of the system failed.
    #[error("{what}")]
    System {
        /// What.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl From<ResolverError> for RunError {
    fn from(error: ResolverError) -> Self {
        Self::Resolver(Box::new(error))
    }
}

impl RunError {
    /// The exit status that the command line promises.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Load(_)
            | Self::Invalid { .. }
            | Self::Compile(_)
            | Self::Dataplane(DataplaneError::TooLarge { .. } | DataplaneError::TooManyScopes { .. }) => 1,
            Self::Cgroup(CgroupError::NotFound { .. } | CgroupError::NotCgroup2 { .. })
            | Self::OwnCgroup { .. }
            | Self::NoPods { .. }
            | Self::NeedsForce => 2,
            Self::Pins(PinError::Claimed { .. }) => 5,
            Self::Cgroup(_)
            | Self::Dataplane(_)
            | Self::Cluster(_)
            | Self::Existing(_)
            | Self::SocketMatching
            | Self::Resolver(_)
            | Self::Pins(_)
            | Self::System { .. } => 4,
        }
    }
}

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |cause| RunError::System { what, cause }
}

/// How long changes are gathered before the policy is read again.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// The same for objects of the Kubernetes API, each of which is complete when it comes.
const OBJECTS_DEBOUNCE: Duration = Duration::from_millis(50);
/// They are gathered for as long as the last change took to be put in force, and no longer than this.
const MOST_DEBOUNCE: Duration = Duration::from_millis(500);
/// How soon a policy that could not be read is tried again without any change being noticed.
const RETRY: Duration = Duration::from_secs(5);
/// How long whoever waits for a reload waits for files that are being written: until they hold back nothing else.
const RELOAD_HOLD: Duration = HOLD.saturating_add(Duration::from_secs(1));
/// How long a reload waits for the addresses of new names; what comes later is put in force when it comes.
const RELOAD_WAIT: Duration = Duration::from_secs(1);

/// The exit status where an end that was asked for took too long, and the rules were to end with the agent.
const NOT_DETACHED: u8 = 4;

/// Runs until SIGTERM or SIGINT, which [`stop::expect`] must have been called for.
pub async fn run(args: &RunArgs, log: LogLevel, object: &[u8], mut notifier: Notifier) -> Result<(), RunError> {
    memory::share_one_heap();
    let mut source = Source::new(options(args));
    let mut possible = None;
    if args.cluster.kubernetes {
        dataplane::probe()?;
        let capabilities = *possible.insert(existing::possible());
        source.cluster = Some(connect(args, !capabilities.is_empty(), &mut notifier).await?);
    }
    let policy = source.read_first().await?;
    dataplane::probe()?;
    let terminating = possible.map_or_else(|| existing::expect(&policy.set), Ok)?;
    let mount = cgroup::mount_point()?;
    let target = Target::open(&filtered(args, &mount)?, &mount)?;
    if target.cgroup.is_root() {
        warn_of_exempt(&target, args, &policy)?;
    }
    let claimed = PinDirectory::claim(&args.pin_dir)?;
    exec::sweep(Path::new(EXEC_PIN_DIRECTORY), &mount);
    let limit = args.memory_limit.saturating_mul(1_000_000);
    let set = claimed.begin()?;
    let dataplane = Dataplane::prepare(object, kernel_log(log), args.packet_guard, name_settings(args), set, limit)?;
    for hook in dataplane.refused() {
        tracing::warn!(hook = hook.as_str(), "this kernel lacks what a program needs: see docs/kernels.md");
    }
    let wait = Duration::from_secs(args.resolve_wait);
    let (resolver, names) = Resolver::start(resolver_settings(args), policy.names.clone(), wait).await?;
    let hosts = HostNames::new(&names);
    let selector = source.selector(&policy, names);
    let (mut enforcement, applied) = Enforcement::new(target, dataplane, selector)?;
    // Before there is something to undo, a signal simply ends the process.
    let mut signals = Signals::new()?;
    stop::in_good_order(if args.detach_on_exit { NOT_DETACHED } else { 0 });
    enforcement.expect_matching()?;
    enforcement.attach()?;
    enforcement.dataplane.commit()?;
    // While it may be asked whose they are.
    let mut company = Company::default();
    company.look(&enforcement, &mount, &args.pin_dir);
    // Before there is a second thread, which would keep its own.
    privileges::keep_only(privileges::RUNNING | files(args) | terminating);
    enforcement.terminate();
    let backlog = retire(&claimed, &mut enforcement.dataplane);
    let pods = PodNames::default();
    pods.set(enforcement.pods().clone());
    let enricher = Enricher::new(CgroupPaths::new(mount.clone()), enforcement.dataplane.rule_names(), hosts.clone());
    let enricher = enricher.with_pods(pods.clone()).with_asked(enforcement.dataplane.asked_names()?);
    let reporter = start_reports(&mut enforcement.dataplane, enricher, args.output, backlog)?;
    let reports = reporter.counts();
    let (last_error, pending, started) = (None, None, SystemTime::now());
    let rules = applied.rules;
    let place = Place { mount, pins: args.pin_dir.clone() };
    let mut state = State {
        source,
        enforcement,
        policy,
        hosts,
        pods,
        reports,
        rules,
        last_error,
        pending,
        company,
        place,
        started,
    };
    state.pend(&Ok(()));
    // Whoever waits for the start may ask at once.
    let board = Arc::new(Board::new(state.tell(&resolver)));
    let control = listen(args, &board);
    announce(&applied, &state, &mut notifier);
    let outlets = Outlets { notifier, board, watchdog: Watchdog::new() };
    Box::pin(follow(state, resolver, control, outlets, &mut signals)).await?;
    if args.detach_on_exit {
        tracing::info!("asked to stop: detaching");
        // Also where a change is still being made, on a thread that ends with this process.
        claimed.sets()?.iter().try_for_each(|set| pinned::remove(set))?;
        claimed.remove()?;
        // Whatever takes too long now, the rules have ended.
        stop::in_good_order(0);
        reporter.finish();
    } else {
        reporter.finish();
        tracing::info!("asked to stop: the rules stay in force; `egress-agent detach` removes them");
    }
    Ok(())
}

/// The cgroup to filter.
fn filtered(args: &RunArgs, mount: &Path) -> Result<PathBuf, RunError> {
    if let Some(cgroup) = &args.cgroup {
        return Ok(cgroup.clone());
    }
    let root = ROOTS.into_iter().find(|root| mount.join(root).is_dir());
    root.map(PathBuf::from).ok_or_else(|| RunError::NoPods { mount: mount.to_owned() })
}

/// How often whoever waits for the Kubernetes API is told what is missing.
const TELL: Duration = Duration::from_secs(10);

/// Waits until everything there is in the cluster has been listed: before, what was in force stays.
async fn connect(args: &RunArgs, may_terminate: bool, notifier: &mut Notifier) -> Result<Cluster, RunError> {
    let mount = cgroup::mount_point()?;
    let top = Cgroup::open(&filtered(args, &mount)?, &mount)?;
    let ClusterArgs { node_name, root_namespace, service_entries_from, all_namespaces, exempt_namespaces, .. } =
        &args.cluster;
    let named = |names: &[String]| names.iter().filter(|name| !name.is_empty()).cloned().collect();
    let mut cluster = Cluster::start(kubernetes::Settings {
        node: node_name.clone().unwrap_or_else(|| uname().nodename().to_string_lossy().to_lowercase()),
        root_namespace: root_namespace.clone(),
        entries_from: named(service_entries_from),
        all_namespaces: *all_namespaces,
        exempt: named(exempt_namespaces),
        top: top.path,
        may_terminate,
    })?;
    let mut tell = interval_at(Instant::now() + TELL, TELL);
    while !cluster.revisions().is_synced {
        tokio::select! {
            _ = cluster.changed() => {}
            _ = tell.tick() => {
                let missing = cluster.report().missing();
                tracing::warn!(%missing, "waiting for the Kubernetes API; until then, what was in force stays");
                // systemd waits longer, as long as this is said again in time.
                notifier.extend("waiting for the Kubernetes API");
            }
        }
    }
    Ok(cluster)
}

/// The capabilities that reading the policy files takes.
pub const fn files(args: &RunArgs) -> CapabilitySet {
    if args.allow_writable_policies { FOREIGN_FILES } else { CapabilitySet::empty() }
}

fn options(args: &RunArgs) -> SourceOptions {
    SourceOptions {
        paths: args.policies.clone(),
        load: LoadOptions { require_root_owned: !args.allow_writable_policies, follow: true },
        node_default: NodeDefault { action: args.default, loopback: !args.no_loopback, dns: !args.no_dns },
        unknown: args.unknown_workloads,
        pods: args.cluster.networks.context(),
        shared_resolvers: args.shared_resolver.clone(),
    }
}

fn name_settings(args: &RunArgs) -> NameSettings {
    let seconds = |seconds: u64| u32::try_from(seconds).unwrap_or(u32::MAX);
    NameSettings {
        lifetime: Lifetime { floor: seconds(args.name_floor), grace: seconds(args.name_grace) },
        quota: args.name_quota,
    }
}

fn resolver_settings(args: &RunArgs) -> resolver::Settings {
    resolver::Settings {
        servers: args.resolver.clone(),
        floor: Duration::from_secs(args.name_floor),
        grace: Duration::from_secs(args.name_grace),
        ..resolver::Settings::default()
    }
}

/// Tells how many tasks the root cgroup has. Where everything would be refused but them, that is probably a mistake.
fn warn_of_exempt(target: &Target, args: &RunArgs, policy: &Policy) -> Result<(), RunError> {
    if args.default == NodeAction::Deny && policy.documents == 0 && !args.force {
        return Err(RunError::NeedsForce);
    }
    let threads = std::fs::read_to_string(target.mount.join("cgroup.threads"));
    let tasks = threads.map_or(0, |tasks| tasks.lines().count());
    match (policy.set.egress_policies.iter().any(names_root), target.holds_agent()) {
        (true, false) => {}
        (true, true) => tracing::warn!(
            tasks,
            "tasks in the root cgroup itself are not filtered, also not by the policy for cgroup `/`: the agent is one of them; \
             start it in a cgroup of its own"
        ),
        (false, _) => {
            tracing::warn!(tasks, "tasks in the root cgroup itself are not filtered; a policy for cgroup `/` would");
        }
    }
    Ok(())
}

pub(crate) const fn kernel_log(log: LogLevel) -> KernelLog {
    match log {
        LogLevel::Debug => KernelLog::Debug,
        LogLevel::Error | LogLevel::Warn | LogLevel::Info => KernelLog::Off,
    }
}

/// Takes every set but our own out of force, and hands over what their programs reported and nobody read. What fails here
/// is more that is enforced, never less.
///
/// What it learnt of names is taken over before, so that nothing is refused in between, and once more after, for what it alone
/// heard meanwhile.
fn retire(pins: &PinDirectory, dataplane: &mut Dataplane) -> Vec<Reported> {
    let own = dataplane.pins().path().to_owned();
    let others = pins.sets().unwrap_or_default();
    let mut backlog = Vec::new();
    for set in others.iter().filter(|set| **set != own) {
        let path = set.display();
        let mut adopt = || {
            let adopted = dataplane.adopt_facts(set);
            let adopted =
                adopted.inspect(|facts| tracing::debug!(facts, pins = %path, "taken over what was learnt of names"));
            if let Err(error) = adopted {
                tracing::warn!(error = %chain(&error), pins = %path, "what the agent before learnt of names is lost");
            }
        };
        adopt();
        let read = || Ok::<_, DataplaneError>((pinned::drain(set)?, pinned::lost(set)?));
        let detached = pinned::detach(set);
        adopt();
        let retired = detached.map(|()| match read() {
            Ok((events, lost)) => {
                backlog.extend(events);
                if lost > 0 {
                    tracing::warn!(lost, pins = %path, "denials of the agent before were not reported: the ring buffer was full");
                }
            }
            Err(error) => tracing::warn!(error = %chain(&error), pins = %path, "denials of the agent before are lost"),
        });
        match retired.and_then(|()| pinned::remove(set)) {
            Ok(()) => tracing::info!(pins = %path, "retired the rules of the agent before"),
            Err(error) => {
                tracing::error!(error = %chain(&error), pins = %path, "the rules of the agent before stay in force too");
            }
        }
    }
    backlog
}

fn start_reports(
    dataplane: &mut Dataplane,
    enricher: Enricher,
    output: Option<Output>,
    backlog: Vec<Reported>,
) -> Result<Reporter, RunError> {
    let output = output.unwrap_or(if io::stdout().is_terminal() { Output::Text } else { Output::Json });
    let (events, log) = (dataplane.take_events()?, dataplane.take_log());
    Sink::stdout()
        .and_then(|sink| Reporter::start(events, log, enricher, output, sink, backlog))
        .map_err(system("cannot start to report denials"))
}

/// Tells whoever waits: the log, and systemd.
fn announce(applied: &Applied, state: &State, notifier: &mut Notifier) {
    let Applied { generation, scopes, rules, prefixes, segments, .. } = *applied;
    let (documents, cgroup) = (state.policy.documents, state.enforcement.cgroup.path.display());
    tracing::info!(generation, documents, rules, scopes, prefixes, segments, %cgroup, "policy applied");
    notifier.ready(&format!("generation {generation}"));
}

/// Without a control socket all is enforced the same; `status` reads the pins, and SIGHUP reloads.
fn listen(args: &RunArgs, board: &Arc<Board>) -> Option<Control> {
    let path = control::socket(&args.run_dir, &args.pin_dir);
    let listening = Control::listen(path.clone(), Arc::clone(board));
    if let Err(error) = &listening {
        tracing::warn!(%error, path = %path.display(), "no control socket: `status` tells less, and `reload` does not reach");
    }
    listening.ok()
}

/// What is in force, and where it comes from.
struct State {
    source: Source,
    enforcement: Enforcement,
    policy: Policy,
    /// For those who tell of denials.
    hosts: HostNames,
    pods: PodNames,
    reports: Counts,
    rules: usize,
    /// Why the policy that was read last is not in force.
    last_error: Option<String>,
    /// What of the policy on disk is not in force.
    pending: Option<NotInForce>,
    /// Who else judges.
    company: Company,
    place: Place,
    started: SystemTime,
}

/// Where cgroups and pins are.
struct Place {
    mount: PathBuf,
    pins: PathBuf,
}

/// How often it is looked who else judges.
const LOOK_FOR_OTHERS: Duration = Duration::from_secs(10);

/// Other filters of ours on the same cgroups. The log is told when they come and go; `status` asks the kernel itself.
#[derive(Default)]
struct Company {
    cgroups: Vec<String>,
    looked: Option<Instant>,
}

impl Company {
    fn look(&mut self, enforcement: &Enforcement, mount: &Path, pins: &Path) {
        if self.looked.is_some_and(|looked| looked.elapsed() < LOOK_FOR_OTHERS) {
            return;
        }
        self.looked = Some(Instant::now());
        let own = pins::programs(pins);
        // Without pins it is not known which programs are our own.
        if own.is_empty() {
            return;
        }
        let others = match others::find(mount, &enforcement.cgroup.path, &own) {
            Ok(others) => others,
            Err(error) => return tracing::debug!(%error, "cannot tell who else judges"),
        };
        let cgroups: Vec<String> = others.iter().map(|other| other.cgroup.clone()).collect();
        if cgroups != self.cgroups {
            for other in &others {
                tracing::warn!("{other}; `egress-agent status` tells more");
            }
            if others.is_empty() {
                tracing::info!("no other filter judges the same cgroups any more");
            }
            self.cgroups = cgroups;
        }
    }
}

/// What of the policy on disk is not in force.
struct NotInForce {
    since: SystemTime,
    noticed: Instant,
    reason: String,
    file: Option<PathBuf>,
    /// A file that is being written: whoever waits for a reload is told a little later.
    may_pass: bool,
    /// The log has it.
    is_told: bool,
}

impl NotInForce {
    fn tell(&self) -> Pending {
        let file = self.file.as_ref().map(printable_bytes);
        Pending { since: status::time(self.since), reason: self.reason.clone(), file }
    }

    fn is_old(&self) -> bool {
        self.noticed.elapsed() > board::PATIENCE
    }
}

/// Clients that wait for a reload, with when they asked.
#[derive(Default)]
struct Waiting(Vec<(Instant, oneshot::Sender<String>)>);

impl Waiting {
    /// Answers those for whom it is settled: the files were read as they are, or are being written for too long.
    fn answer(&mut self, state: &State) {
        let may_pass = state.pending.as_ref().is_some_and(|pending| pending.may_pass);
        for (asked, answer) in std::mem::take(&mut self.0) {
            if may_pass && asked.elapsed() < RELOAD_HOLD {
                self.0.push((asked, answer));
            } else {
                // Whoever asked may be gone.
                let _ = answer.send(state.tell_reload());
            }
        }
    }
}

/// Looks for changes that nobody tells of, on a thread: a file system may take its time.
#[derive(Default)]
struct Looking(Option<(Instant, JoinHandle<Option<PathBuf>>)>);

impl Looking {
    /// Begins, where that is due.
    fn begin(&mut self, source: &Source, last: &mut Instant) {
        if self.0.is_none() && last.elapsed() >= LOOK {
            *last = Instant::now();
            let looker = source.looker();
            self.0 = Some((*last, spawn_blocking(move || looker.look())));
        }
    }

    /// What is to be read, if something is.
    async fn done(&mut self) -> Option<PathBuf> {
        let Some((_, looking)) = &mut self.0 else { return std::future::pending().await };
        // A look that panicked found nothing.
        let found = looking.await.ok().flatten();
        self.0 = None;
        found
    }

    fn degraded(&self) -> Option<String> {
        let (begun, _) = self.0.as_ref().filter(|(begun, _)| begun.elapsed() > board::PATIENCE)?;
        let seconds = begun.elapsed().as_secs();
        Some(format!("the file system of the policies has not answered for {seconds} s"))
    }
}

/// Where the loop says how it is.
struct Outlets {
    notifier: Notifier,
    board: Arc<Board>,
    watchdog: Watchdog,
}

impl Outlets {
    /// Says how everything is now.
    fn post(&self, state: &State, resolver: &Resolver, looking: &Looking) {
        let mut told = state.tell(resolver);
        told.degraded.extend(self.notifier.degraded());
        told.degraded.extend(looking.degraded());
        self.board.post(told);
    }

    /// Puts in force what changed, and says so; and when it is to be tried again. `None` if the agent is asked to stop.
    async fn change(
        &mut self,
        again: Again,
        state: State,
        resolver: &mut Resolver,
        signals: &mut Signals,
    ) -> Result<Option<(State, Option<Duration>)>, RunError> {
        // What is said meanwhile is what led to the change.
        self.post(&state, resolver, &Looking::default());
        self.board.begin(if again == Again::Names { Changing::Names } else { Changing::Policies });
        self.notifier.reloading();
        let apply = Box::pin(apply_again(again, state, resolver));
        let Some(applied) = undisturbed(apply, self, signals).await else { return Ok(None) };
        let (mut state, result) = applied?;
        let retry = state.conclude(again, &result, &mut self.notifier);
        // Whoever reads of it in the log finds it in the status.
        self.post(&state, resolver, &Looking::default());
        self.board.end();
        let Ok(applied) = result else { return Ok(Some((state, retry))) };
        state.tell_applied(&applied);
        let tidied = undisturbed(on_a_thread(state, State::tidy), self, signals).await;
        Ok(tidied.transpose()?.map(|(state, ())| (state, retry)))
    }
}

/// Follows the files and the cgroups until a signal ends it, also while a policy is being put in force.
async fn follow(
    mut state: State,
    mut resolver: Resolver,
    mut control: Option<Control>,
    mut outlets: Outlets,
    signals: &mut Signals,
) -> Result<(), RunError> {
    let (mut due, mut objects_due, mut took) = (None, None, Duration::ZERO);
    let mut pulse = interval(LOOK_AFTER);
    let mut lost = 0;
    let mut waiting = Waiting::default();
    let (mut looking, mut looked) = (Looking::default(), Instant::now());
    loop {
        let mut again = None;
        tokio::select! {
            _ = signals.terminate.recv() => return Ok(()),
            _ = signals.interrupt.recv() => return Ok(()),
            _ = signals.hangup.recv() => again = Some(Again::Files),
            () = at(due) => again = Some(Again::Files),
            () = at(objects_due) => again = Some(Again::Objects),
            revisions = changed(&mut state.source.cluster) => {
                if revisions.policies == state.policy.revisions.policies {
                    state.place_pods();
                } else {
                    // Where much changes, it is put in force less often, not at the cost of everything else.
                    objects_due = objects_due.or(Some(Instant::now() + took.clamp(OBJECTS_DEBOUNCE, MOST_DEBOUNCE)));
                }
            }
            () = resolver.changed() => again = Some(Again::Names),
            () = outlets.watchdog.tick() => outlets.notifier.alive(),
            _ = pulse.tick() => {
                state.enforcement.look_after();
                state.report_lost(&mut lost);
                state.tell_pending();
                state.company.look(&state.enforcement, &state.place.mount, &state.place.pins);
                outlets.notifier.retry();
                outlets.post(&state, &resolver, &looking);
                waiting.answer(&state);
                looking.begin(&state.source, &mut looked);
            }
            found = looking.done() => if let Some(file) = found {
                tracing::debug!(file = %printable_bytes(&file), "a change was found that nobody told of");
                due = due.or(Some(Instant::now()));
            },
            noticed = state.enforcement.changed() => {
                let noticed = noticed.map_err(system("cannot watch cgroups"))?;
                state.enforcement.follow(noticed);
            }
            changed = state.source.watch.changed() => {
                changed.map_err(system("cannot watch policy files"))?;
                let soon = Instant::now() + DEBOUNCE;
                due = Some(due.map_or(soon, |due: Instant| due.min(soon)));
            }
            Asked { request, answer } = next(&mut control) => match request {
                Request::Status => {
                    outlets.post(&state, &resolver, &looking);
                    // Whoever asked may have taken what was posted before.
                    let _ = answer.send(String::new());
                }
                Request::Reload => {
                    waiting.0.push((Instant::now(), answer));
                    again = Some(Again::Files);
                }
            },
        }
        let Some(again) = again else { continue };
        let begun = Instant::now();
        // What is found meanwhile is read, perhaps.
        looking = Looking::default();
        let change = Box::pin(outlets.change(again, state, &mut resolver, signals));
        let Some((returned, retry)) = change.await? else { return Ok(()) };
        state = returned;
        due = retry.map_or(due.filter(|_| again != Again::Files), |delay| Some(Instant::now() + delay));
        objects_due = objects_due.filter(|_| again == Again::Names);
        took = begun.elapsed();
        if again == Again::Files {
            waiting.answer(&state);
        }
    }
}

async fn changed(cluster: &mut Option<Cluster>) -> Revisions {
    match cluster {
        Some(cluster) => cluster.changed().await,
        None => std::future::pending().await,
    }
}

async fn next(control: &mut Option<Control>) -> Asked {
    match control {
        Some(control) => control.next().await,
        None => std::future::pending().await,
    }
}

/// What is looked at again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Again {
    /// The policy files.
    Files,
    /// The objects of the Kubernetes API.
    Objects,
    /// The addresses of names alone.
    Names,
}

/// Works while the watchdog and the signals are answered. `None` if the agent is asked to stop.
async fn undisturbed<T>(work: impl Future<Output = T>, outlets: &mut Outlets, signals: &mut Signals) -> Option<T> {
    let mut work = pin!(work);
    let mut pulse = interval(LOOK_AFTER);
    let mut is_long = pin!(sleep(board::PATIENCE));
    let mut is_told = false;
    loop {
        tokio::select! {
            () = &mut is_long, if !is_told => {
                is_told = true;
                tracing::info!("a change takes its time: until it is made, the policy before is in force");
            }
            _ = signals.terminate.recv() => return None,
            _ = signals.interrupt.recv() => return None,
            () = outlets.watchdog.tick() => outlets.notifier.alive(),
            _ = pulse.tick() => {
                outlets.notifier.retry();
                outlets.board.stamp();
            }
            done = &mut work => return Some(done),
        }
    }
}

/// Looks again and puts in force what says something else; the work is done on threads of its own, since a large policy
/// takes its time. An error leaves what was in force.
async fn apply_again(
    again: Again,
    state: State,
    resolver: &mut Resolver,
) -> Result<(State, Result<Applied, RunError>), RunError> {
    let (state, policy) = match again {
        Again::Files => on_a_thread(state, |state| state.source.read()).await?,
        Again::Objects => on_a_thread(state, |state| Ok(state.source.merged())).await?,
        Again::Names => {
            let policy = state.policy.clone();
            (state, Ok(policy))
        }
    };
    let (mut state, result) = match policy {
        Ok(policy) => {
            if again == Again::Files {
                resolver.reread_system();
            }
            // Also where the names are those in force: a policy that was not put in force may have wanted others meanwhile.
            if again != Again::Names {
                resolver.want(policy.names.clone());
                resolver.first_answers(RELOAD_WAIT).await;
            }
            let names = resolver.names();
            on_a_thread(state, move |state| state.put_in_force(policy, names)).await?
        }
        Err(error) => (state, Err(error)),
    };
    if again == Again::Files && result.is_ok() {
        state.last_error = None;
    }
    Ok((state, result))
}

/// Works on a thread where it may take its time.
async fn on_a_thread<T: Send + 'static>(
    mut state: State,
    work: impl FnOnce(&mut State) -> T + Send + 'static,
) -> Result<(State, T), RunError> {
    let work = spawn_blocking(move || {
        let result = work(&mut state);
        (state, result)
    });
    work.await.map_err(|error| system("the policy could not be read")(error.into()))
}

impl State {
    fn put_in_force(&mut self, policy: Policy, names: Names) -> Result<Applied, RunError> {
        existing::expect(&policy.set)?;
        let hosts = names.clone();
        let applied = self.enforcement.adopt(self.source.selector(&policy, names))?;
        self.hosts.set(&hosts);
        self.pods.set(self.enforcement.pods().clone());
        self.policy = policy;
        self.rules = applied.rules;
        Ok(applied)
    }

    /// Tells the log what is in force.
    fn tell_applied(&self, applied: &Applied) {
        let Applied { generation, is_changed, scopes, rules, prefixes, segments } = *applied;
        if is_changed {
            let documents = self.policy.documents;
            tracing::info!(generation, documents, rules, scopes, prefixes, segments, "policy applied");
        } else {
            tracing::info!(generation, "policy unchanged");
        }
    }

    /// Ends connections that are refused from now on, and removes what the change left behind.
    fn tidy(&mut self) {
        self.enforcement.terminate();
        self.enforcement.clean();
    }

    /// Pods came, went or were labelled anew, and the policies are the same.
    fn place_pods(&mut self) {
        let Some(cluster) = &self.source.cluster else { return };
        self.enforcement.set_pods(cluster.pods());
        self.pods.set(self.enforcement.pods().clone());
    }

    /// Tells how it went, and when it is to be tried again.
    fn conclude(
        &mut self,
        again: Again,
        result: &Result<Applied, RunError>,
        notifier: &mut Notifier,
    ) -> Option<Duration> {
        if again == Again::Files || result.is_err() {
            self.pend(result);
        }
        let generation = self.enforcement.dataplane.meta().generation();
        let (status, retry) = match result {
            Ok(_) => (format!("generation {generation}"), None),
            Err(RunError::Load(error @ LoadError::BeingWritten { .. })) => {
                tracing::info!(generation, "{error}");
                (format!("generation {generation}"), Some(RETRY))
            }
            Err(error) => {
                let cause = chain(error);
                tracing::error!(error = %cause, generation, "the last good policy stays in force");
                let status = format!("generation {generation}; {cause}");
                self.last_error = Some(cause);
                (status, Some(RETRY))
            }
        };
        notifier.ready(&status);
        retry
    }

    /// Notes what of the policy on disk is not in force.
    fn pend<T>(&mut self, result: &Result<T, RunError>) {
        let unfinished = self.source.unfinished().first();
        let (reason, file, may_pass) = match (result, unfinished) {
            (Ok(_), None) => return self.pending = None,
            (Ok(_), Some(file)) => (file.to_string(), Some(file.path.to_path_buf()), true),
            (Err(RunError::Load(error @ LoadError::BeingWritten { path })), _) => {
                (error.to_string(), Some(path.clone()), true)
            }
            (Err(error), _) => (chain(error), None, false),
        };
        let before = self.pending.take().map(|before| (before.since, before.noticed, before.is_told));
        let (since, noticed, is_told) = before.unwrap_or_else(|| (SystemTime::now(), Instant::now(), false));
        self.pending = Some(NotInForce { since, noticed, reason, file, may_pass, is_told });
    }

    /// Tells the log once of what is not in force for too long. Errors are told as they happen.
    fn tell_pending(&mut self) {
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.is_old() && !pending.is_told) {
            pending.is_told = true;
            if self.last_error.is_none() {
                tracing::warn!("{}", board::not_in_force(&pending.tell()));
            }
        }
    }

    /// What is not as it should be.
    fn degraded(&self) -> Vec<String> {
        let pending = self.pending.as_ref().filter(|pending| pending.is_old() && self.last_error.is_none());
        let mut degraded = self.enforcement.degraded();
        degraded.extend(pending.map(|pending| board::not_in_force(&pending.tell())));
        degraded.extend(self.reports.degraded().into_iter().chain(crate::log::degraded()));
        degraded
    }

    /// What `status` is to tell.
    fn tell(&self, resolver: &Resolver) -> FromAgent {
        let wildcards = self.policy.wildcards.iter().cloned().map(|(host, document)| Wildcard { host, document });
        FromAgent {
            since: status::time(self.started),
            documents: self.policy.documents,
            rules: self.rules,
            last_error: self.last_error.clone(),
            degraded: self.degraded(),
            attached: self.enforcement.is_attached(),
            pinned: self.enforcement.is_pinned(),
            scopes: self.enforcement.scopes(),
            changing_since: None,
            silent: None,
            pending: self.pending.as_ref().map(NotInForce::tell),
            names: status::Names { wildcards: wildcards.collect(), resolved: resolver.report(), learnt: None },
            kubernetes: self.source.cluster.as_ref().map(|cluster| self.tell_cluster(cluster)),
            reports: self.reports.tell(),
            log_lost: crate::log::lost(),
        }
    }

    fn tell_cluster(&self, cluster: &Cluster) -> kubernetes::Report {
        let mut report = cluster.report();
        let hidden = self.policy.hidden.iter().map(|object| Rejection {
            object: object.to_string(),
            message: "a policy file has a document of this name".to_owned(),
            earlier_in_force: false,
        });
        report.rejected.extend(hidden);
        report
    }

    /// The answer to [`Request::Reload`].
    fn tell_reload(&self) -> String {
        let generation = self.enforcement.dataplane.meta().generation();
        let pending = self.pending.as_ref().map(NotInForce::tell);
        let told = Reloaded { generation, error: self.last_error.clone(), pending };
        serde_json::to_string(&told).unwrap_or_default()
    }

    /// Tells of events that found no room in the ring buffer since the last time.
    fn report_lost(&self, before: &mut u64) {
        let lost = match self.enforcement.dataplane.lost() {
            Ok(lost) => lost,
            Err(error) => return tracing::error!(error = %chain(&error), "cannot read the counters"),
        };
        if lost > *before {
            let by_cgroup = self.enforcement.dataplane.lost_by_cgroup().unwrap_or_default();
            let workloads = self.reports.losers(by_cgroup);
            tracing::warn!(
                lost = lost - *before,
                total = lost,
                %workloads,
                "denials were not reported: the ring buffer was full"
            );
            *before = lost;
        }
    }
}

/// The answer to [`Request::Reload`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reloaded {
    /// What is in force.
    pub generation: u64,
    /// Why it is not what was read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What of the policy on disk is not in force.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
}

/// An error with all its causes, in one line, whatever names of files are in it.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = causes(error).map(ToString::to_string).collect::<Vec<_>>().join(": ");
    printable(&causes).into_owned()
}

/// An error and all its causes.
pub(crate) fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |error| error.source())
}

async fn at(due: Option<Instant>) {
    match due {
        Some(due) => sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// The signals that `run` answers.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> Result<Self, RunError> {
        let listen = |kind| signal(kind).map_err(system("cannot listen for signals"));
        Ok(Self {
            terminate: listen(SignalKind::terminate())?,
            interrupt: listen(SignalKind::interrupt())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }
}

/// When systemd is to be told that the agent is alive: twice as often as it asks (`sd_watchdog_enabled(3)`).
struct Watchdog(Option<Interval>);

impl Watchdog {
    fn new() -> Self {
        Self(sd_notify::watchdog_enabled().map(|timeout| interval(timeout / 2)))
    }

    async fn tick(&mut self) {
        match &mut self.0 {
            Some(interval) => drop(interval.tick().await),
            None => std::future::pending().await,
        }
    }
}
