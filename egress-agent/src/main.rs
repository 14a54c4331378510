//! `egress-agent`: the command. Only here are errors printed, the environment read, and the exit status chosen.

use std::{
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context as _;
use egress_agent::{
    check::{LookUp, Report},
    cli::{CheckArgs, Command, DetachArgs, ExecArgs, ExplainArgs, LogLevel, Output, ReloadArgs, RunArgs, StatusArgs},
    compile::{Context, Names, NodeDefault},
    control::{self, Request},
    exec::{self, Ended, Sudo},
    explain::{
        Explainer,
        ask::{self, Target, Who, flows},
    },
    log,
    notify::Notifier,
    pins::{self, PinError},
    policy::{
        diagnostic::{Color, Severity, render},
        load::{LoadOptions, load},
    },
    privileges, resolv,
    run::{self, Reloaded, chain},
    settings,
    status::{self, FromAgent, Pending, Status},
    stop,
    text::{self, printable},
    users::{PASSWD, Users},
};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt::MakeWriter,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// The kernel programs.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("EGRESS_EBPF_OBJECT"));

fn main() -> ExitCode {
    let args: Vec<OsString> = std::env::args_os().collect();
    let command = match settings::command(&args, |name| std::env::var_os(name)) {
        Ok(command) => command,
        Err(error) => {
            say(&format!("error: {}\n", chain(&error)));
            return ExitCode::from(2);
        }
    };
    let is_exec = settings::subcommand(&args) == Some(OsStr::new("exec"));
    let cli = match settings::parse(command, args) {
        Ok(cli) => cli,
        // There, 2 may be the status of the command.
        Err(error) if is_exec && error.use_stderr() => {
            // There is nobody to tell if that fails.
            let _ = error.print();
            return ExitCode::from(exec::FAILED);
        }
        Err(error) => error.exit(),
    };
    match cli.command {
        Command::Run(args) => run(&args, cli.log),
        Command::Exec(args) => exec(&args, cli.log),
        command => short(command, cli.log),
    }
}

/// A command that only reads and tells: who does not read what it says has time to wait for it.
fn short(command: Command, level: LogLevel) -> ExitCode {
    start_log(level, io::stderr);
    match command {
        // They were told from these.
        Command::Run(_) | Command::Exec(_) => ExitCode::from(2),
        Command::Status(args) => finish(tell_status(&args)),
        Command::Reload(args) => finish(reload(&args)),
        Command::Detach(args) => finish(detach(&args)),
        Command::Check(args) => finish(check(&args)),
        Command::Explain(args) => finish(explain(&args)),
    }
}

/// The status of a command that only reads and tells.
fn finish(result: anyhow::Result<u8>) -> ExitCode {
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            say(&format!("error: {error:#}\n"));
            ExitCode::from(2)
        }
    }
}

/// Writes to stderr, which shows what others have put into it.
fn say(text: &str) {
    let lines: Vec<_> = text.split('\n').map(printable).collect();
    log::say(&lines.join("\n"));
}

/// Whoever stops reading has read enough: `egress-agent check … | head`. The status is what it would have been.
fn unless_reader_left(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::BrokenPipe { Ok(()) } else { Err(error) })
}

/// Text for a terminal, JSON for a program.
fn output(asked: Option<Output>) -> Output {
    asked.unwrap_or(if io::stdout().is_terminal() { Output::Text } else { Output::Json })
}

fn color() -> Color {
    let wanted = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    if wanted { Color::Ansi } else { Color::Never }
}

fn tell_status(args: &StatusArgs) -> anyhow::Result<u8> {
    let status = Status::read(&args.agent.pin_dir, &args.agent.run_dir)?;
    if let Some(probe) = args.probe {
        let is_met = status.is(probe);
        if !is_met {
            say(&format!("{status}"));
        }
        return Ok(u8::from(!is_met));
    }
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match output(args.output) {
        Output::Text => write!(out, "{status}"),
        Output::Json => text::to_json(&mut out, &status).map_err(io::Error::from).and_then(|()| writeln!(out)),
    };
    unless_reader_left(written.and_then(|()| out.flush())).context("cannot write the status")?;
    Ok(status.exit_code())
}

fn reload(args: &ReloadArgs) -> anyhow::Result<u8> {
    let socket = control::socket(&args.agent.run_dir, &args.agent.pin_dir);
    let unreached = || format!("cannot reach the agent at {}: does it run?", socket.display());
    if !args.wait {
        control::tell(&socket, Request::Reload).with_context(unreached)?;
        return Ok(0);
    }
    let patience = Duration::from_secs(args.timeout);
    let Reloaded { generation, error, pending } = match control::ask_within(&socket, Request::Reload, patience) {
        Ok(reloaded) => reloaded,
        Err(error) if error.kind() == io::ErrorKind::TimedOut => return Ok(overdue(&socket, args.timeout)),
        Err(error) => return Err(error).with_context(unreached),
    };
    match (&error, &pending) {
        (None, None) => say(&format!("generation {generation} is in force\n")),
        (Some(error), _) => say(&format!("error: {error}; generation {generation} stays in force\n")),
        (None, Some(Pending { reason, .. })) => {
            say(&format!("error: not all of the policy on disk is in force: {reason}; generation {generation} is\n"));
        }
    }
    for other in status::others(&args.agent.pin_dir) {
        say(&format!("warning: {other}\n"));
    }
    Ok(u8::from(error.is_some() || pending.is_some()))
}

/// Tells why a reload is not answered in time, as far as the agent knows.
fn overdue(socket: &Path, seconds: u64) -> u8 {
    let told = control::ask::<FromAgent>(socket, Request::Status);
    let why = match told {
        Ok(FromAgent { pending: Some(pending), .. }) => pending.reason,
        Ok(FromAgent { changing_since: Some(since), .. }) => format!("a change is being put in force since {since}"),
        Ok(_) => "the agent is busy".to_owned(),
        Err(error) => format!("the agent does not answer: {error}"),
    };
    say(&format!("error: not known to be in force after {seconds} s: {why}\n"));
    1
}

fn detach(args: &DetachArgs) -> anyhow::Result<u8> {
    let removed = match pins::remove_all(&args.pin_dir) {
        Err(error @ PinError::Claimed { .. }) => {
            say(&format!("error: {error}: stop it first\n"));
            return Ok(5);
        }
        removed => removed?,
    };
    for line in &removed {
        say(&format!("{line}\n"));
    }
    if removed.is_empty() {
        say(&format!("nothing is in force in {}\n", args.pin_dir.display()));
    }
    Ok(0)
}

fn check(args: &CheckArgs) -> anyhow::Result<u8> {
    let look_up = if args.resolve { LookUp::System } else { LookUp::Never };
    let report = Report::new(&args.paths, look_up)?;
    let mut out = BufWriter::new(io::stdout().lock());
    let written = report.write(&mut out, output(args.output), color()).and_then(|()| out.flush());
    unless_reader_left(written).context("cannot write the report")?;
    Ok(report.exit_code(args.strict))
}

fn explain(args: &ExplainArgs) -> anyhow::Result<u8> {
    let loaded = load(&args.paths, &LoadOptions::default())?;
    for finding in &loaded.findings {
        if finding.severity == Severity::Error {
            say(&render(finding, loaded.source(finding), Color::Never));
        }
    }
    anyhow::ensure!(!loaded.has_errors(), "the policy is invalid; `egress-agent check` tells all of it");
    let mut out = BufWriter::new(io::stdout().lock());
    let users = Users::read(Path::new(PASSWD));
    let mut context = context(args)?;
    if let Some(path) = &args.flows {
        flows(&loaded.policies, &context, &users, args.proto.into(), &mut open(path)?, &mut out)?;
        return Ok(0);
    }
    let target = Target::parse(args.to.as_deref().unwrap_or_default(), &context.names)?;
    if let Some(host) = &target.host {
        context.names.0.entry(host.clone()).or_default().extend(&target.addresses);
    }
    let explainer = Explainer::new(&loaded.policies, who(args).workload(&users), &context)?;
    let denied = ask::is_denied(&explainer, &target, args.proto.into());
    let written = ask::explain(&explainer, &target, args.proto.into(), output(args.output), &mut out);
    unless_reader_left(written.and_then(|()| out.flush())).context("cannot write the answer")?;
    Ok(u8::from(denied))
}

fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin().lock()));
    }
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(Box::new(BufReader::new(file)))
}

fn context(args: &ExplainArgs) -> anyhow::Result<Context> {
    let system_resolvers = if args.system_resolver.is_empty() {
        resolv::resolvers(Path::new(resolv::RESOLV_CONF)).context("cannot read /etc/resolv.conf")?
    } else {
        args.system_resolver.clone()
    };
    let mut names = Names::default();
    for (host, address) in &args.resolve {
        names.0.entry(host.clone()).or_default().insert(*address);
    }
    let node_default = NodeDefault { action: args.default, loopback: true, dns: true };
    Ok(Context { node_default, system_resolvers, names, pods: args.networks.context(), shared_resolvers: Vec::new() })
}

fn who(args: &ExplainArgs) -> Who {
    Who {
        namespace: args.namespace.clone(),
        labels: args.labels.iter().cloned().collect(),
        cgroup: args.cgroup.clone(),
        unit: args.unit.clone(),
        user: args.user.clone(),
    }
}

fn run(args: &RunArgs, level: LogLevel) -> ExitCode {
    start_log(level, log::start());
    let code = run_to_the_end(args, level);
    log::flush();
    code
}

fn run_to_the_end(args: &RunArgs, level: LogLevel) -> ExitCode {
    if let Err(error) = stop::expect() {
        tracing::warn!(%error, "signals end the agent only where it expects them");
    }
    privileges::prepare();
    // The only thing that needs more than is kept. Whether it is mounted is seen when it is used.
    pins::mount_bpffs(&args.pin_dir);
    // Before there is a second thread, which would keep its own.
    // Whether connections are to be ended is known when the policy is read.
    privileges::keep_only(privileges::START | privileges::TERMINATE | run::files(args));
    log::write_behind();
    let Some(runtime) = runtime() else { return ExitCode::from(4) };
    let result = runtime.block_on(run::run(args, level, OBJECT, Notifier::new(std::env::var_os("NOTIFY_SOCKET"))));
    // A policy that is still being compiled when the agent is asked to stop is not waited for.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Everything but what takes its time is done on this thread. An error is told here.
fn runtime() -> Option<tokio::runtime::Runtime> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.inspect_err(|error| tracing::error!(%error, "cannot start")).ok()
}

fn exec(args: &ExecArgs, level: LogLevel) -> ExitCode {
    start_log(level, log::start());
    let code = exec_to_the_end(args, level);
    log::flush_while_read();
    code
}

fn exec_to_the_end(args: &ExecArgs, level: LogLevel) -> ExitCode {
    let limits = exec::prepare(args);
    let sudo = Sudo { uid: std::env::var_os("SUDO_UID"), gid: std::env::var_os("SUDO_GID") };
    let Some(runtime) = runtime() else { return ExitCode::from(exec::FAILED) };
    match runtime.block_on(exec::exec(args, level, OBJECT, &sudo, &limits)) {
        Ok(Ended { code, summary }) => {
            if !summary.is_empty() {
                match args.output {
                    Output::Text => say(&summary.to_string()),
                    Output::Json => {
                        let mut json = Vec::new();
                        // A summary is JSON, and there is room for it.
                        let _ = text::to_json(&mut json, &summary);
                        say(&(String::from_utf8_lossy(&json) + "\n"));
                    }
                }
            }
            ExitCode::from(code)
        }
        Err(error) => {
            tracing::error!("{}", chain(&error));
            ExitCode::from(error.exit_code())
        }
    }
}

fn start_log<W: for<'w> MakeWriter<'w> + Send + Sync + 'static>(level: LogLevel, writer: W) {
    let filter = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
    };
    // Libraries speak only of what goes wrong, in their own words.
    let targets = Targets::new()
        .with_default(filter.min(LevelFilter::WARN))
        .with_targets([("egress_agent", filter), ("egress_ebpf", filter)])
        // It writes down whole answers that it cannot read. What is wrong with them is told by whoever asked.
        .with_target("kube_client", LevelFilter::OFF);
    let color = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let format = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .fmt_fields(log::fields())
        .with_ansi(color)
        .with_target(false);
    tracing_subscriber::registry().with(format).with(targets).init();
}
