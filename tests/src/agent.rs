//! The built agent as a process.

use std::{
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use egress_agent::{
    control::{Request, ask, socket},
    run::Reloaded,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    PATIENCE,
    bpffs::Bpffs,
    cgroup::Cgroup,
    container::Container,
    eventually,
    flood::{Reports, piped},
};

/// The agent that `cargo xtask` built.
pub fn binary() -> Result<PathBuf> {
    std::env::var_os("EGRESS_AGENT").map(PathBuf::from).context("EGRESS_AGENT is not set: run `cargo xtask test`")
}

/// `run` with JSON output.
pub fn run_command(policies: &Path, cgroup: &Path, more: &[&str]) -> Result<Command> {
    let mut command = Command::new(binary()?);
    command.arg("run").arg("--policies").arg(policies).arg("--cgroup").arg(cgroup);
    command.args(["--output", "json"]).args(more);
    Ok(command)
}

/// A running agent, killed when dropped.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    log: Receiver<String>,
    /// Lines that were read while waiting for another.
    seen: Vec<String>,
    denials: Receiver<String>,
    /// What it pins and where it listens is its own, and goes with it, unless the command says otherwise.
    _place: Option<Place>,
    /// Where it runs, if that is a container; the child is then its runc.
    container: Option<Container>,
}

/// A place for pins and for the control socket.
#[derive(Debug)]
pub struct Place {
    bpffs: Bpffs,
    run: TempDir,
}

impl Place {
    /// Makes one.
    pub fn new() -> Result<Self> {
        Ok(Self { bpffs: Bpffs::new()?, run: tempfile::Builder::new().prefix("egress-run-").tempdir()? })
    }

    /// The pin directory.
    pub fn pins(&self) -> PathBuf {
        self.bpffs.path().join("egress")
    }

    /// Where `exec` pins.
    pub fn exec_pins(&self) -> PathBuf {
        self.bpffs.path().join("egress-exec")
    }

    /// Where the control socket lies.
    pub fn run_directory(&self) -> PathBuf {
        self.run.path().to_owned()
    }

    /// Tells a command of it, whatever the command is.
    pub fn tell(&self, command: &mut Command) {
        command
            .env("EGRESS_PIN_DIR", self.pins())
            .env("EGRESS_RESOLVER", "127.0.0.1:1")
            .env("EGRESS_RUN_DIR", self.run.path());
        command.env("EGRESS_EXEC_PIN_DIR", self.exec_pins());
    }

    /// Has the agent read its policies again, and waits until that is done: the generation in force.
    pub fn reload(&self) -> Result<u64> {
        let told: Reloaded = ask(&socket(self.run.path(), &self.pins()), Request::Reload)?;
        match told.error.or(told.pending.map(|pending| pending.reason)) {
            Some(error) => bail!("the policies are not in force: {error}"),
            None => Ok(told.generation),
        }
    }

    /// Runs a command of the agent that ends by itself.
    pub fn output(&self, args: &[&str]) -> Result<Output> {
        let mut command = Command::new(binary()?);
        self.tell(&mut command);
        Ok(command.args(args).output()?)
    }

    /// The exit status of `status`, and what it tells.
    pub fn status(&self) -> Result<(Option<i32>, Value)> {
        let output = self.output(&["status", "--output", "json"])?;
        let told = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("no status: {}", String::from_utf8_lossy(&output.stderr)))?;
        Ok((output.status.code(), told))
    }

    /// Whether a probe is met that asks for a state, and what it says.
    pub fn probe(&self, state: &str) -> Result<(bool, String)> {
        let output = self.output(&["status", "--probe", state])?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.code() {
            Some(0) if said.is_empty() && output.stdout.is_empty() => Ok((true, said)),
            Some(1) if !said.is_empty() && output.stdout.is_empty() => Ok((false, said)),
            _ => bail!("the probe ends with {output:?}"),
        }
    }

    /// The names in the pin directory, sorted; none if it is not there.
    pub fn pinned(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.pins()).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

impl Agent {
    /// Starts `run` on a cgroup, with JSON output, and waits until its policy is in force.
    pub fn start(policies: &Path, cgroup: &Cgroup, more: &[&str]) -> Result<Self> {
        let mut agent = Self::spawn(run_command(policies, cgroup.path(), more)?)?;
        agent.wait_for("policy applied generation=1 ")?;
        Ok(agent)
    }

    /// Starts a command as it is, in a place of its own.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let place = Place::new()?;
        place.tell(&mut command);
        Self::launch(command, Some(place))
    }

    /// Starts `run` in a place that outlives it, and waits until its policy is in force.
    pub fn start_in(place: &Place, policies: &Path, cgroup: &Cgroup, more: &[&str]) -> Result<Self> {
        let mut agent = Self::spawn_in(Some(place), run_command(policies, cgroup.path(), more)?)?;
        agent.wait_for("policy applied generation=1 ")?;
        Ok(agent)
    }

    /// Starts a command in a place that outlives it; without one, as it is.
    pub fn spawn_in(place: Option<&Place>, mut command: Command) -> Result<Self> {
        if let Some(place) = place {
            place.tell(&mut command);
        }
        Self::launch(command, None)
    }

    /// Starts one in a container, which goes with it, and waits until its policy is in force.
    pub fn contained(container: Container) -> Result<Self> {
        let mut agent = Self::spawn_contained(container)?;
        agent.wait_for("policy applied generation=1 ")?;
        Ok(agent)
    }

    /// Starts one in a container, which goes with it, and does not wait.
    pub fn spawn_contained(container: Container) -> Result<Self> {
        let mut agent = Self::launch(container.command()?, None)?;
        agent.container = Some(container);
        Ok(agent)
    }

    /// Its container.
    pub fn container(&self) -> Result<&Container> {
        self.container.as_ref().context("the agent runs in no container")
    }

    /// Starts a command in a place that outlives it, and reads what it reports for what it counts of these cgroups.
    pub fn watched(place: &Place, mut command: Command, cgroups: &[&str]) -> Result<(Self, Reports)> {
        place.tell(&mut command);
        let mut child = piped(command)?;
        let log = lines(child.stderr.take().context("stderr is piped")?);
        let reports = Reports::read(child.stdout.take().context("stdout is piped")?, cgroups);
        let denials = channel().1;
        Ok((Self { child, log, seen: Vec::new(), denials, _place: None, container: None }, reports))
    }

    fn launch(command: Command, place: Option<Place>) -> Result<Self> {
        let mut child = piped(command)?;
        let log = lines(child.stderr.take().context("stderr is piped")?);
        let denials = lines(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, log, seen: Vec::new(), denials, _place: place, container: None })
    }

    /// The agent's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of its log that contains `text`, and gives that line.
    pub fn wait_for(&mut self, text: &str) -> Result<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.log.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if line.contains(text) {
                        return Ok(line);
                    }
                }
                Err(error) => bail!("no line with {text:?} in the agent's log ({error}):\n{}", self.seen.join("\n")),
            }
        }
    }

    /// Every line of its log so far.
    pub fn log(&mut self) -> &[String] {
        self.seen.extend(self.log.try_iter());
        &self.seen
    }

    /// The next denial.
    pub fn denial(&mut self) -> Result<Value> {
        match self.denials.recv_timeout(PATIENCE) {
            Ok(line) => serde_json::from_str(&line).with_context(|| format!("not a JSON line: {line}")),
            Err(error) => bail!("the agent reports no denial ({error}); its log:\n{}", self.log().join("\n")),
        }
    }

    /// Whether no denial is reported for a while. Only for showing that one thing did *not* happen.
    pub fn is_silent_for(&mut self, time: Duration) -> bool {
        matches!(self.denials.recv_timeout(time), Err(RecvTimeoutError::Timeout))
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }

    /// Asks it to stop; its exit status, its remaining denials and its whole log.
    pub fn stop(mut self) -> Result<(ExitStatus, Vec<Value>, Vec<String>)> {
        self.signal(Signal::TERM)?;
        let status = self.exit_status()?;
        let (denials, log) = self.rest()?;
        Ok((status, denials, log))
    }

    /// Kills it, which it cannot prepare for; its denials and its log until then.
    pub fn kill(mut self) -> Result<(Vec<Value>, Vec<String>)> {
        self.child.kill()?;
        self.child.wait()?;
        self.rest()
    }

    /// What an agent that has ended left: its remaining denials and its whole log.
    pub fn rest(&mut self) -> Result<(Vec<Value>, Vec<String>)> {
        let denials = self.denials.iter().map(|line| Ok(serde_json::from_str(&line)?)).collect::<Result<_>>()?;
        self.seen.extend(self.log.iter());
        Ok((denials, std::mem::take(&mut self.seen)))
    }

    /// Waits until it ends by itself.
    pub fn exit_status(&mut self) -> Result<ExitStatus> {
        eventually("the agent's end", || self.child.try_wait().transpose())?.context("cannot wait for the agent")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Both fail only if the agent has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The lines of a pipe, read as they come.
pub fn lines(pipe: impl Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
