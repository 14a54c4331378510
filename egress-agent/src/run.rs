//! The daemon: puts the policies in force, reports what they refuse, and follows their files.
//!
//! Order at start: policy read and compiled, kernel probed, maps filled, programs attached, READY. Afterwards a policy
//! that cannot be read leaves the last good one in force.

use std::{
    io::{self, IsTerminal},
    path::{Path, PathBuf},
    time::Duration,
};

use egress_common::Counter;
use sd_notify::NotifyState;
use thiserror::Error;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::spawn_blocking,
    time::{Instant, Interval, interval, sleep_until},
};

use crate::{
    cgroup::{self, Cgroup, CgroupError, CgroupPaths},
    cli::{LogLevel, Output, RunArgs},
    compile::{CompileError, Context, Names, NodeDefault, combine::service_statements, compile},
    dataplane::{self, Applied, Dataplane, DataplaneError, KernelLog},
    events::Enricher,
    pins::{PinDirectory, PinError},
    policy::{
        PolicySet,
        diagnostic::{Finding, Severity},
        egress_policy::unbuilt::unsupported,
        load::{LoadError, LoadOptions, Loaded, load, watched},
    },
    report::Reporter,
    resolv,
    ruleset::Ruleset,
    watch::Watch,
    workload::Workload,
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
    /// The kernel cannot be brought to enforce.
    #[error(transparent)]
    Dataplane(#[from] DataplaneError),
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

impl RunError {
    /// The exit status that the command line promises.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::Load(_) | Self::Invalid { .. } | Self::Compile(_) => 1,
            Self::Cgroup(CgroupError::NotFound { .. } | CgroupError::NotCgroup2 { .. }) => 2,
            Self::Pins(PinError::Claimed { .. }) => 5,
            Self::Cgroup(_) | Self::Dataplane(_) | Self::Pins(_) | Self::System { .. } => 4,
        }
    }
}

fn system(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
    move |cause| RunError::System { what, cause }
}

/// How long changes are gathered before the policy is read again.
const DEBOUNCE: Duration = Duration::from_millis(100);
/// How soon a policy that could not be read is tried again without any change being noticed.
const RETRY: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT.
pub async fn run(args: &RunArgs, log: LogLevel, object: &[u8]) -> Result<(), RunError> {
    let mut source = Source::new(args)?;
    let (loaded, ruleset) = source.read()?;
    dataplane::probe()?;
    let mount = cgroup::mount_point()?;
    let mut attachment = Attachment::new(&args.cgroup, &mount)?;
    let claim = |path: &PathBuf| PinDirectory::claim(path, dataplane::pinned_by);
    let pins = args.pin_dir.as_ref().map(claim).transpose()?;
    let mut dataplane = Dataplane::prepare(object, kernel_log(log), pins)?;
    let applied = dataplane.apply(&ruleset)?;
    let reporter = start_reports(&mut dataplane, mount, args.output)?;
    // Before there is something to undo, a signal simply ends the process.
    let mut signals = Signals::new()?;
    attachment.attach(&mut dataplane)?;
    announce(&applied, &loaded, &attachment.cgroup.path);
    let state = State { source, dataplane, ruleset: Some(ruleset), generation: applied.generation };
    follow(state, attachment, &mut signals).await?;
    tracing::info!("asked to stop: detaching");
    reporter.finish();
    Ok(())
}

const fn kernel_log(log: LogLevel) -> KernelLog {
    match log {
        LogLevel::Debug => KernelLog::Debug,
        LogLevel::Error | LogLevel::Warn | LogLevel::Info => KernelLog::Off,
    }
}

fn start_reports(dataplane: &mut Dataplane, mount: PathBuf, output: Option<Output>) -> Result<Reporter, RunError> {
    let enricher = Enricher::new(CgroupPaths::new(mount), dataplane.rule_names());
    let output = output.unwrap_or(if io::stdout().is_terminal() { Output::Text } else { Output::Json });
    let (events, log) = (dataplane.take_events()?, dataplane.take_log());
    Reporter::start(events, log, enricher, output).map_err(system("cannot start to report denials"))
}

/// Tells whoever waits: the log, and systemd.
fn announce(applied: &Applied, loaded: &Loaded, cgroup: &Path) {
    let Applied { generation, rules, prefixes, segments } = *applied;
    let (documents, cgroup) = (loaded.documents, cgroup.display());
    tracing::info!(generation, documents, rules, prefixes, segments, %cgroup, "policy applied");
    notify(&[NotifyState::Ready, NotifyState::Status(&format!("generation {generation}"))]);
}

fn notify(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "cannot notify the service manager");
    }
}

/// Where policies come from.
struct Source {
    paths: Vec<PathBuf>,
    options: LoadOptions,
    node_default: NodeDefault,
    watch: Watch,
}

impl Source {
    fn new(args: &RunArgs) -> Result<Self, RunError> {
        Ok(Self {
            paths: args.policies.clone(),
            options: LoadOptions { require_root_owned: !args.allow_writable_policies, follow: true },
            node_default: NodeDefault { action: args.default, loopback: !args.no_loopback, dns: !args.no_dns },
            watch: Watch::new().map_err(system("cannot watch policy files"))?,
        })
    }

    /// Reads and compiles.
    fn read(&mut self) -> Result<(Loaded, Ruleset), RunError> {
        let loaded = self.load()?;
        let unbuilt: Vec<Finding> = loaded.policies.egress_policies.iter().flat_map(unsupported).collect();
        let findings = || loaded.findings.iter().chain(&unbuilt);
        findings().for_each(report);
        let errors = findings().filter(|finding| finding.severity == Severity::Error).count();
        if errors > 0 {
            return Err(RunError::Invalid { errors });
        }
        warn_of_names(&loaded.policies);
        let resolv_conf = Path::new(resolv::RESOLV_CONF);
        let system_resolvers = resolv::resolvers(resolv_conf).map_err(system("cannot read /etc/resolv.conf"))?;
        let context = Context { node_default: self.node_default, system_resolvers, names: Names::default() };
        let ruleset = compile(&loaded.policies, &Workload::default(), &context)?;
        Ok((loaded, ruleset))
    }

    /// What is read is watched first, so that no change is missed. A directory that appeared meanwhile was read, perhaps,
    /// and not watched: then all is read again.
    fn load(&mut self) -> Result<Loaded, LoadError> {
        let paths: Vec<PathBuf> = self.paths.iter().cloned().chain([resolv::RESOLV_CONF.into()]).collect();
        loop {
            let seen = watched(&paths);
            if let Err(error) = self.watch.set(seen.clone()) {
                tracing::error!(%error, "cannot watch policy files; see fs.inotify.max_user_watches. Changes need SIGHUP");
            }
            let loaded = load(&self.paths, &self.options);
            if watched(&paths) == seen {
                return loaded;
            }
        }
    }
}

/// The cgroup that is filtered. It may be removed and made again, as systemd does when it restarts a unit; the programs go
/// with it, so they are attached again.
struct Attachment {
    given: PathBuf,
    mount: PathBuf,
    cgroup: Cgroup,
    is_attached: bool,
    watch: Watch,
}

/// How often the cgroup is looked after, beside the notice of changes.
const LOOK_AFTER: Duration = Duration::from_secs(1);

impl Attachment {
    fn new(given: &Path, mount: &Path) -> Result<Self, RunError> {
        let cgroup = Cgroup::open(given, mount)?;
        let mut watch = Watch::new().map_err(system("cannot watch the cgroup"))?;
        let directory = mount.join(cgroup.path.strip_prefix("/").unwrap_or(&cgroup.path));
        watch.set(watched(&[directory])).map_err(system("cannot watch the cgroup"))?;
        Ok(Self { given: given.to_owned(), mount: mount.to_owned(), cgroup, is_attached: false, watch })
    }

    fn attach(&mut self, dataplane: &mut Dataplane) -> Result<(), DataplaneError> {
        dataplane.attach(&self.cgroup.directory, &self.cgroup.path)?;
        self.is_attached = true;
        Ok(())
    }

    /// Attaches again where the cgroup was made anew.
    fn look_after(&mut self, dataplane: &mut Dataplane) {
        let cgroup = self.cgroup.path.display();
        match Cgroup::open(&self.given, &self.mount) {
            Ok(found) if self.is_attached && found.id == self.cgroup.id => {}
            Ok(found) => {
                let path = found.path.display().to_string();
                self.cgroup = found;
                match self.attach(dataplane) {
                    Ok(()) => tracing::warn!(cgroup = path, "the cgroup was made anew: attached again"),
                    Err(error) => tracing::error!(error = %chain(&error), "cannot attach again: nothing is filtered"),
                }
            }
            Err(error) if self.is_attached => {
                tracing::error!(%error, %cgroup, "the cgroup is gone: nothing is filtered until it is back");
                self.is_attached = false;
            }
            Err(_) => {}
        }
    }
}

fn report(finding: &Finding) {
    let (code, file, line, column) = (finding.code.as_str(), finding.file.display(), finding.line, finding.column);
    let (path, help) = (&finding.path, finding.help.as_deref().unwrap_or_default());
    match finding.severity {
        Severity::Error => tracing::error!(%code, %file, line, column, %path, help, "{}", finding.message),
        Severity::Warning => tracing::warn!(%code, %file, line, column, %path, help, "{}", finding.message),
        Severity::Note => tracing::info!(%code, %file, line, column, %path, help, "{}", finding.message),
    }
}

/// Names are not resolved: an entry that has nothing else opens nothing.
fn warn_of_names(policies: &PolicySet) {
    for entry in &policies.service_entries {
        if service_statements(entry, &Names::default()).all(|statement| statement.parts.is_empty()) {
            let hosts: Vec<String> = entry.hosts.iter().map(ToString::to_string).collect();
            tracing::warn!(
                entry = %entry.object, at = %entry.at, hosts = hosts.join(","),
                "names are not resolved: this entry has no addresses and opens nothing"
            );
        }
    }
}

/// What is in force.
struct State {
    source: Source,
    dataplane: Dataplane,
    /// `None` after a change that failed half-way: whatever is read next is put in force.
    ruleset: Option<Ruleset>,
    generation: u64,
}

/// Follows the files until a signal ends it.
async fn follow(mut state: State, mut attachment: Attachment, signals: &mut Signals) -> Result<(), RunError> {
    let mut due = None;
    let mut watchdog = Watchdog::new();
    let mut pulse = interval(LOOK_AFTER);
    let mut lost = 0;
    loop {
        let mut look_again = false;
        tokio::select! {
            _ = signals.terminate.recv() => return Ok(()),
            _ = signals.interrupt.recv() => return Ok(()),
            _ = signals.hangup.recv() => look_again = true,
            () = at(due) => look_again = true,
            () = watchdog.tick() => {}
            _ = pulse.tick() => {
                attachment.look_after(&mut state.dataplane);
                state.report_lost(&mut lost);
            }
            changed = attachment.watch.changed() => {
                changed.map_err(system("cannot watch the cgroup"))?;
                attachment.look_after(&mut state.dataplane);
            }
            changed = state.source.watch.changed() => {
                changed.map_err(system("cannot watch policy files"))?;
                let soon = Instant::now() + DEBOUNCE;
                due = Some(due.map_or(soon, |due: Instant| due.min(soon)));
            }
        }
        if look_again {
            let Some((returned, retry)) = reload(state, &mut watchdog, signals).await? else { return Ok(()) };
            state = returned;
            due = retry.map(|delay| Instant::now() + delay);
        }
    }
}

/// Reads the policy again on a thread of its own, since a large one takes its time; the watchdog and the signals are
/// answered meanwhile. `None` if the agent is asked to stop.
async fn reload(
    mut state: State,
    watchdog: &mut Watchdog,
    signals: &mut Signals,
) -> Result<Option<(State, Option<Duration>)>, RunError> {
    let mut work = spawn_blocking(move || {
        let retry = state.reload();
        (state, retry)
    });
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return Ok(None),
            _ = signals.interrupt.recv() => return Ok(None),
            () = watchdog.tick() => {}
            done = &mut work => {
                return done.map(Some).map_err(|error| system("the policy could not be read")(error.into()));
            }
        }
    }
}

impl State {
    /// Reads the policy again and puts it in force if it says something else. An error leaves the old one, and is tried
    /// again after the time that is returned.
    fn reload(&mut self) -> Option<Duration> {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            notify(&[NotifyState::Reloading, now]);
        }
        let result = self.read_and_apply();
        let (status, retry) = match &result {
            Ok(()) => (format!("generation {}", self.generation), None),
            Err(RunError::Load(error @ LoadError::BeingWritten { .. })) => {
                tracing::info!(generation = self.generation, "{error}");
                (format!("generation {}", self.generation), Some(RETRY))
            }
            Err(error) => {
                let cause = chain(error);
                tracing::error!(error = %cause, generation = self.generation, "the last good policy stays in force");
                (format!("generation {}; {cause}", self.generation), Some(RETRY))
            }
        };
        notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
        retry
    }

    fn read_and_apply(&mut self) -> Result<(), RunError> {
        let (loaded, ruleset) = self.source.read()?;
        if self.ruleset.as_ref() == Some(&ruleset) {
            tracing::info!(generation = self.generation, "policy unchanged");
            return Ok(());
        }
        self.ruleset = None;
        let applied = self.dataplane.apply(&ruleset)?;
        let Applied { generation, rules, prefixes, segments } = applied;
        tracing::info!(generation, documents = loaded.documents, rules, prefixes, segments, "policy applied");
        self.ruleset = Some(ruleset);
        self.generation = generation;
        Ok(())
    }

    /// Tells of events that found no room in the ring buffer since the last time.
    fn report_lost(&self, before: &mut u64) {
        let counters = match self.dataplane.counters() {
            Ok(counters) => counters,
            Err(error) => return tracing::error!(error = %chain(&error), "cannot read the counters"),
        };
        let lost = counters.iter().find(|(counter, _)| *counter == Counter::EventsLost).map_or(0, |(_, count)| *count);
        if lost > *before {
            tracing::warn!(lost = lost - *before, total = lost, "denials were not reported: the ring buffer was full");
            *before = lost;
        }
    }
}

/// An error with all its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
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

/// Tells systemd that the agent is alive, twice as often as it asks (`sd_watchdog_enabled(3)`).
struct Watchdog(Option<Interval>);

impl Watchdog {
    fn new() -> Self {
        Self(sd_notify::watchdog_enabled().map(|timeout| interval(timeout / 2)))
    }

    async fn tick(&mut self) {
        match &mut self.0 {
            Some(interval) => {
                interval.tick().await;
                notify(&[NotifyState::Watchdog]);
            }
            None => std::future::pending().await,
        }
    }
}
