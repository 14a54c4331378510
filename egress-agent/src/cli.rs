//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::compile::NodeAction;

/// Egress firewall in the kernel, driven by Istio `ServiceEntry` documents.
///
/// A workload may open connections only to destinations that a policy names. The kernel decides at `connect()` and
/// `sendmsg()`: no proxy, no cost per packet. Whoever is refused gets `EPERM` at once, and each refusal is reported.
#[derive(Debug, Parser)]
#[command(name = "egress-agent", version, about, long_about, max_term_width = 100)]
pub struct Cli {
    /// What the agent says on stderr about its own work.
    #[arg(long, global = true, value_name = "LEVEL", env = "EGRESS_LOG", default_value = "info")]
    pub log: LogLevel,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Enforce policies on a cgroup and all below it, and report what they refuse.
    Run(RunArgs),
}

/// Verbosity of the agent's own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Only what is broken.
    Error,
    /// And what should be looked at soon.
    Warn,
    /// And policies that are put in force.
    Info,
    /// And what the kernel programs say of themselves.
    Debug,
}

/// How data is written to stdout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Lines for a person.
    Text,
    /// One JSON object a line.
    Json,
}

/// Arguments of `run`.
///
/// Exit status: 0 asked to stop, 1 policy invalid at start, 2 usage, 4 kernel or privilege missing, 5 another agent runs.
#[derive(Debug, Args)]
#[command(after_help = "\
Denials go to stdout, talk to stderr. Policies are read again when their files change, and on SIGHUP; if they are invalid,
the last good ones stay in force. SIGTERM and SIGINT end the agent and the enforcement.

Exit status: 0 asked to stop, 1 policy invalid at start, 2 usage, 4 kernel or privilege missing, 5 another agent runs.

Example:
  egress-agent run --policies /etc/egress/policies --cgroup system.slice/ratings.service")]
pub struct RunArgs {
    /// A policy file, or a directory of *.yaml, *.yml and *.json files; may be given several times.
    #[arg(long, value_name = "PATH", required = true, env = "EGRESS_POLICIES")]
    pub policies: Vec<PathBuf>,
    /// The cgroup to filter, with all below it: a directory, or a path below the cgroup2 mount.
    #[arg(long, value_name = "PATH", env = "EGRESS_CGROUP")]
    pub cgroup: PathBuf,
    /// A directory on a bpf file system in which the maps can be found while the agent runs; one agent for each.
    #[arg(long, value_name = "DIR", env = "EGRESS_PIN_DIR")]
    pub pin_dir: Option<PathBuf>,
    /// What holds for workloads that no enforcing `EgressPolicy` selects.
    #[arg(long, value_name = "ACTION", env = "EGRESS_DEFAULT", default_value = "Deny", ignore_case = true)]
    pub default: NodeAction,
    /// Do not open loopback addresses by default.
    #[arg(long)]
    pub no_loopback: bool,
    /// Do not open the resolvers of /etc/resolv.conf by default.
    #[arg(long)]
    pub no_dns: bool,
    /// Accept policy files and directories that others than root may write.
    #[arg(long)]
    pub allow_writable_policies: bool,
    /// How denials are written; text on a terminal, else JSON lines.
    #[arg(long, value_name = "FORMAT")]
    pub output: Option<Output>,
}
