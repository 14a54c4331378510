//! `exec`: one command behind a policy, in a cgroup and with pins of its own.
//!
//! Order: policy read, leftovers swept, pins claimed, cgroup made, rules complete and attached, and only then the command,
//! which is in the cgroup before it is executed. Nothing here follows policy files: whoever starts the command chose the
//! policy, and it holds as it was then. The rules end with the last process in the cgroup, not with this one.

use std::{
    collections::BTreeSet,
    ffi::OsString,
    io,
    path::{Path, PathBuf},
    process::{Child, ExitStatus},
    sync::{Arc, Mutex},
    time::Duration,
};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use thiserror::Error;
use tokio::{
    signal::unix::{SignalKind, signal},
    time::interval,
};

use crate::{
    cgroup::{self, CgroupPaths},
    cli::{ExecArgs, LogLevel},
    compile::{Context, NodeDefault, PodContext},
    dataplane::{
        self, Dataplane, DataplaneError, KernelLog, NameSettings, PacketGuard,
        others::{self, Other},
    },
    enforcement::{Enforcement, LOOK_AFTER, Target},
    events::{Enricher, HostNames},
    explain::Explainer,
    pins::{self, PinError},
    policy::load::{LoadOptions, Loaded},
    privileges::{self, CapabilitySet},
    report::{Reporter, Sink},
    resolver::{self, Resolver},
    run::{RunError, chain, kernel_log, system},
    scopes::UnknownWorkloads,
    source::{Policy, Source, SourceOptions},
    workload::{UserIdentity, Workload},
};

mod command;
mod scratch;
mod signals;
mod summary;
mod user;

use command::Command;
use scratch::Scratch;
pub(crate) use scratch::sweep;
use signals::Forwarded;
pub use summary::Summary;
use summary::Tally;

/// Why the command was not run.
#[derive(Debug, Error)]
pub enum ExecError {
    /// The rules cannot be put in force.
    #[error(transparent)]
    Run(#[from] RunError),
    /// There is no such user.
    #[error("there is no user {0}")]
    NoSuchUser(String),
    /// sudo tells of a caller that is none.
    #[error("{variable} is {value:?}, not a number: start this by sudo, or name the user by --user")]
    NotANumber {
        /// The variable.
        variable: &'static str,
        /// What it is.
        value: OsString,
    },
    /// No cgroup could be made.
    #[error("cannot make a cgroup for the command below {}", .below.display())]
    Cgroup {
        /// The last place that was tried.
        below: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// The command did not reach its cgroup or its user.
    #[error("cannot {what} before the command is run")]
    Prepare {
        /// What was tried.
        what: &'static str,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// There is no such command.
    #[error("{}: command not found", .0.display())]
    NotFound(OsString),
    /// The command cannot be executed.
    #[error("cannot run {}", .command.display())]
    CannotRun {
        /// The command.
        command: OsString,
        /// Why.
        #[source]
        cause: io::Error,
    },
}

impl ExecError {
    /// The exit status that the command line promises.
    pub const fn exit_code(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::CannotRun { .. } => 126,
            Self::Run(_)
            | Self::NoSuchUser(_)
            | Self::NotANumber { .. }
            | Self::Cgroup { .. }
            | Self::Prepare { .. } => FAILED,
        }
    }
}

/// The exit status where the agent failed, and not the command.
pub const FAILED: u8 = 125;

impl From<PinError> for ExecError {
    fn from(error: PinError) -> Self {
        RunError::from(error).into()
    }
}

impl From<DataplaneError> for ExecError {
    fn from(error: DataplaneError) -> Self {
        RunError::from(error).into()
    }
}

/// What the environment says of whoever called sudo.
#[derive(Debug, Clone, Default)]
pub struct Sudo {
    /// `SUDO_UID`.
    pub uid: Option<OsString>,
    /// `SUDO_GID`.
    pub gid: Option<OsString>,
}

/// The end of a command.
#[derive(Debug)]
pub struct Ended {
    /// The exit status to end with.
    pub code: u8,
    /// What was refused.
    pub summary: Summary,
}

/// Limits that this process may have raised for itself, as they were.
#[derive(Debug, Clone)]
pub struct Limits {
    locked_memory: Rlimit,
    descriptors: Rlimit,
}

impl Limits {
    /// Sets them for this process.
    fn set(&self) -> Result<(), Errno> {
        setrlimit(Resource::Memlock, self.locked_memory)?;
        setrlimit(Resource::Nofile, self.descriptors)
    }
}

/// What is done before there is a second thread. The limits as they were, for the command.
pub fn prepare(args: &ExecArgs) -> Limits {
    let (locked_memory, descriptors) = (getrlimit(Resource::Memlock), getrlimit(Resource::Nofile));
    privileges::prepare();
    pins::mount_bpffs(&args.pin_dir);
    Limits { locked_memory, descriptors }
}

/// Runs the command to its end. Must be called in a tokio runtime, on the only thread of the process.
pub async fn exec(
    args: &ExecArgs,
    log: LogLevel,
    object: &[u8],
    sudo: &Sudo,
    limits: &Limits,
) -> Result<Ended, ExecError> {
    if !rustix::process::geteuid().is_root() {
        return Err(DataplaneError::Privilege.into());
    }
    let user = user::choose(args.user.as_deref(), sudo)?;
    let mut source = Source::new(options(args));
    // A source must have a path: that of the daemon is followed.
    let policy = if args.policies.is_empty() { source.accept(Loaded::default())? } else { source.read()? };
    dataplane::probe()?;
    let mount = cgroup::mount_point().map_err(RunError::from)?;
    let scratch = Scratch::make(&args.pin_dir, &mount, user.as_ref().map_or(0, |user| user.uid))?;
    let dropped = dropped(user.as_ref(), &args.keep_capabilities);
    let command = Command { words: &args.command, user: user.as_ref(), dropped, limits };
    let behind = Behind { args, log: kernel_log(log), object, source: &source, policy: &policy, mount: &mount };
    let ended = behind.run(&command, &scratch).await;
    let cgroup = scratch.cgroup().to_owned();
    match scratch.end() {
        Ok(0) => {}
        Ok(left) => {
            let cgroup = cgroup.display();
            tracing::warn!(%cgroup, "{left} process(es) of the command go on: the rules stay in force until they end");
        }
        Err(error) => tracing::warn!(error = %chain(&error), "what the command left behind stays until the next start"),
    }
    ended
}

/// Capabilities with which a process sends packets that no hook sees, changes the filter, or acts through processes and
/// devices that are not filtered.
pub const DANGEROUS: [(&str, CapabilitySet); 8] = [
    ("NET_RAW", CapabilitySet::NET_RAW),
    ("NET_ADMIN", CapabilitySet::NET_ADMIN),
    ("BPF", CapabilitySet::BPF),
    ("PERFMON", CapabilitySet::PERFMON),
    ("SYS_ADMIN", CapabilitySet::SYS_ADMIN),
    ("SYS_PTRACE", CapabilitySet::SYS_PTRACE),
    ("SYS_MODULE", CapabilitySet::SYS_MODULE),
    ("SYS_RAWIO", CapabilitySet::SYS_RAWIO),
];

/// What a command of root is not given. Other users have no capabilities.
fn dropped(user: Option<&user::RunAs>, kept: &[CapabilitySet]) -> CapabilitySet {
    if user.is_some_and(|user| user.uid != 0) {
        return CapabilitySet::empty();
    }
    let given_up = DANGEROUS.iter().filter(|(_, capability)| !kept.contains(capability));
    let names: Vec<&str> = given_up.clone().map(|&(name, _)| name).collect();
    if !names.is_empty() {
        tracing::debug!("running as root without CAP_{}: see --keep-capabilities", names.join(", CAP_"));
    }
    given_up.fold(CapabilitySet::empty(), |all, &(_, capability)| all | capability)
}

fn options(args: &ExecArgs) -> SourceOptions {
    SourceOptions {
        paths: args.policies.clone(),
        // Whoever starts the command chooses its policy, so a file of theirs is as good as one of root.
        load: LoadOptions { require_root_owned: false, follow: false },
        node_default: NodeDefault { action: args.default, loopback: !args.no_loopback, dns: !args.no_dns },
        unknown: UnknownWorkloads::Deny,
        pods: PodContext::default(),
        shared_resolvers: Vec::new(),
    }
}

/// Most kernel memory that the rules may take, in bytes: as the daemon's default.
const MEMORY_LIMIT: u64 = 1024 * 1_000_000;

/// How long the command waits for the addresses of names; what comes later is put in force when it comes.
const RESOLVE_WAIT: Duration = Duration::from_secs(5);

/// What this process may do once the command runs: what the daemon may, signal a command of another user, and remove a cgroup
/// below one that was handed over to a user.
const KEPT: CapabilitySet = privileges::RUNNING.union(CapabilitySet::KILL).union(CapabilitySet::DAC_OVERRIDE);

/// What a command is put behind.
struct Behind<'a> {
    args: &'a ExecArgs,
    log: KernelLog,
    object: &'a [u8],
    source: &'a Source,
    policy: &'a Policy,
    mount: &'a Path,
}

impl Behind<'_> {
    async fn run(&self, command: &Command<'_>, scratch: &Scratch) -> Result<Ended, ExecError> {
        let mut target = Target::open(scratch.cgroup(), self.mount)?;
        target.is_our_own = true;
        let settings = resolver::Settings { servers: self.args.resolver.clone(), ..resolver::Settings::default() };
        let started = Resolver::start(settings, self.policy.names.clone(), RESOLVE_WAIT).await;
        let (mut resolver, names) = started.map_err(RunError::from)?;
        let hosts = HostNames::new(&names);
        let context = self.source.context(self.policy, names.clone());
        let workload = described(&target.cgroup.path, command);
        let dataplane = Dataplane::prepare(
            self.object,
            self.log,
            PacketGuard::On,
            NameSettings::default(),
            scratch.pins().begin()?,
            MEMORY_LIMIT,
        )?;
        let selector = self.source.selector(self.policy, names);
        let (mut enforcement, _) = Enforcement::new(target, dataplane, selector)?;
        enforcement.expect_matching()?;
        let filters = self.others(&enforcement);
        enforcement.attach()?;
        enforcement.dataplane.commit()?;

        let forwarded = Forwarded::listen()?;
        let child = command.spawn(scratch.cgroup())?;
        // The command has what it is to have; this process needs little from here on.
        privileges::keep_only(KEPT);
        crate::log::write_behind();
        let tally = Arc::new(Mutex::new(Tally::default()));
        let reporter = self.report(&mut enforcement.dataplane, hosts.clone(), Arc::clone(&tally));
        let status = self.follow(child, forwarded, &mut enforcement, (&mut resolver, &hosts)).await;
        // Without reports the command ran behind its rules all the same.
        match reporter {
            Ok(reporter) => reporter.finish(),
            Err(error) => tracing::error!(error = %chain(&error), "denials are not reported"),
        }
        report_lost(&enforcement.dataplane);
        let tally = tally.lock().map(|mut tally| std::mem::take(&mut *tally)).unwrap_or_default();
        Ok(Ended { code: code(status?), summary: Summary { filters, ..self.summary(tally, workload, &context) } })
    }

    /// Who else judges the command, before this filter is attached.
    fn others(&self, enforcement: &Enforcement) -> Vec<Other> {
        let others = others::find(self.mount, &enforcement.cgroup.path, &BTreeSet::new());
        let others = others.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot tell who else judges the command");
            Vec::new()
        });
        for other in &others {
            tracing::info!("{other}");
        }
        others
    }

    /// The rules are compiled for it once more, so only where something was refused.
    fn summary(&self, tally: Tally, workload: Workload, context: &Context) -> Summary {
        let explainer = if tally.is_empty() { None } else { Some(Explainer::new(&self.policy.set, workload, context)) };
        let explainer = explainer.transpose().unwrap_or_else(|error| {
            tracing::error!(%error, "cannot tell what would allow what was refused");
            None
        });
        tally.summary(explainer.as_ref(), &context.names)
    }

    /// Denials go to stderr: stdout is the command's.
    fn report(
        &self,
        dataplane: &mut Dataplane,
        hosts: HostNames,
        tally: Arc<Mutex<Tally>>,
    ) -> Result<Reporter, RunError> {
        let enricher = Enricher::new(CgroupPaths::new(self.mount.to_owned()), dataplane.rule_names(), hosts);
        let enricher = enricher.with_asked(dataplane.asked_names()?);
        let (events, log) = (dataplane.take_events()?, dataplane.take_log());
        let listener = Box::new(move |connection: &_| {
            if let Ok(mut tally) = tally.lock() {
                tally.add(connection);
            }
        });
        let sink = Sink::stderr(listener);
        sink.and_then(|sink| Reporter::start(events, log, enricher, self.args.output, sink, Vec::new()))
            .map_err(system("cannot start to report denials"))
    }

    /// Waits for the end of the command. What only keeps the rules current is not worth ending for.
    async fn follow(
        &self,
        mut child: Child,
        mut forwarded: Forwarded,
        enforcement: &mut Enforcement,
        (resolver, hosts): (&mut Resolver, &HostNames),
    ) -> Result<ExitStatus, ExecError> {
        const CANNOT_WAIT: &str = "cannot wait for the command";
        let mut ended = signal(SignalKind::child()).map_err(system(CANNOT_WAIT))?;
        let mut pulse = interval(LOOK_AFTER);
        let mut follows = true;
        loop {
            if let Some(status) = child.try_wait().map_err(system(CANNOT_WAIT))? {
                return Ok(status);
            }
            tokio::select! {
                _ = ended.recv() => {}
                signal = forwarded.next() => signals::send(&child, signal),
                _ = pulse.tick() => enforcement.look_after(),
                noticed = enforcement.changed(), if follows => match noticed {
                    Ok(noticed) => enforcement.follow(noticed),
                    Err(error) => {
                        tracing::error!(%error, "cannot watch cgroups");
                        follows = false;
                    }
                },
                () = resolver.changed() => {
                    let names = resolver.names();
                    hosts.set(&names);
                    if let Err(error) = enforcement.adopt(self.source.selector(self.policy, names)) {
                        tracing::error!(error = %chain(&error), "the addresses of names stay as they were");
                    }
                    enforcement.clean();
                }
            }
        }
    }
}

/// The command as policies see it.
fn described(cgroup: &Path, command: &Command<'_>) -> Workload {
    let user = UserIdentity { uid: Some(command.uid()), name: command.user.and_then(|user| user.name.clone()) };
    Workload { user: Some(user), ..Workload::of_cgroup(cgroup::below(cgroup)) }
}

fn report_lost(dataplane: &Dataplane) {
    let lost = dataplane.lost().unwrap_or_default();
    if lost > 0 {
        tracing::warn!(lost, "denials were not reported: the ring buffer was full");
    }
}

/// As shells tell it: the command's own status, or 128 and the number of the signal that ended it.
fn code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED)
}
