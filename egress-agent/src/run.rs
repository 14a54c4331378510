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
    attachment::{Attachment, LOOK_AFTER},
    cgroup::{self, CgroupError, CgroupPaths},
    cli::{LogLevel, Output, RunArgs},
    compile::CompileError,
    dataplane::{self, Applied, Dataplane, DataplaneError, KernelLog},
    events::Enricher,
    pins::{PinDirectory, PinError},
    policy::load::{LoadError, Loaded},
    report::Reporter,
    ruleset::Ruleset,
    source::Source,
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

pub(crate) fn system(what: &'static str) -> impl FnOnce(io::Error) -> RunError {
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
