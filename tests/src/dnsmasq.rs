//! A real DNS server, with answers that a test decides.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{cgroup::Cgroup, companion, eventually, netns::Netns};

/// A server that knows nothing but what it is told, ended when dropped.
#[derive(Debug)]
pub struct Dnsmasq {
    child: Child,
    directory: TempDir,
}

impl Dnsmasq {
    /// Starts a server in a namespace, on port 53 of an address, with answers written as in `/etc/hosts` and more options.
    /// Returns once it answers.
    pub fn start(namespace: &Netns, address: &str, hosts: &str, options: &[&str]) -> Result<Self> {
        Self::start_in(namespace, None, address, hosts, options)
    }

    /// The same in a cgroup.
    pub fn start_in(
        namespace: &Netns,
        cgroup: Option<&Cgroup>,
        address: &str,
        hosts: &str,
        options: &[&str],
    ) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("egress-dnsmasq-").tempdir()?;
        fs::write(directory.path().join("hosts"), hosts)?;
        let log = File::create(directory.path().join("log"))?;
        let mut command = namespace.command(companion("dnsmasq/bin/dnsmasq")?, cgroup)?;
        command.args(["--keep-in-foreground", "--no-resolv", "--no-hosts", "--bind-interfaces", "--pid-file"]);
        command.args(["--log-facility=-", "--log-queries", "--cache-size=10000"]);
        command.arg(format!("--listen-address={address}"));
        command.arg(format!("--addn-hosts={}", directory.path().join("hosts").display())).args(options);
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut server = Self { child, directory };
        eventually("the DNS server", || server.is_ready().transpose())??;
        Ok(server)
    }

    /// Gives other answers from now on. Returns once it does.
    pub fn say(&self, hosts: &str) -> Result<()> {
        // Replaced at once, so that nobody reads half of it.
        let path = self.directory.path().join("hosts");
        fs::write(path.with_extension("new"), hosts)?;
        fs::rename(path.with_extension("new"), path)?;
        let read = self.reads()?;
        self.signal(Signal::HUP)?;
        eventually("the DNS server to read its answers", || match self.reads() {
            Ok(reads) => (reads > read).then_some(Ok(())),
            Err(error) => Some(Err(error)),
        })?
    }

    /// Stops it in its tracks: it says nothing, and nothing says that it does not.
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// How often it was asked something, such as `query[A] a.example.com`.
    pub fn asked(&self, what: &str) -> Result<usize> {
        Ok(self.log()?.lines().filter(|line| line.contains(&format!("{what} from"))).count())
    }

    /// How often it has read its answers.
    fn reads(&self) -> Result<usize> {
        let read = format!("read {} -", self.hosts().display());
        Ok(self.log()?.lines().filter(|line| line.contains(&read)).count())
    }

    fn hosts(&self) -> PathBuf {
        self.directory.path().join("hosts")
    }

    fn log(&self) -> Result<String> {
        fs::read_to_string(self.directory.path().join("log")).context("cannot read the DNS server's log")
    }

    /// Whether it answers; an error if it ended.
    fn is_ready(&mut self) -> Result<Option<()>> {
        if let Some(status) = self.child.try_wait()? {
            bail!("the DNS server ended with {status}:\n{}", self.log()?);
        }
        Ok((self.reads()? > 0).then_some(()))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        Ok(kill_process(pid, signal)?)
    }
}

impl Drop for Dnsmasq {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
