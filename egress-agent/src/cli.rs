//! The command line.

use std::{
    ffi::OsString,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::{
    compile::{NodeAction, PodContext},
    dataplane::PacketGuard,
    exec::DANGEROUS,
    policy::{L4, Selector, address},
    prefix::canonical,
    privileges::CapabilitySet,
    scopes::UnknownWorkloads,
    settings::CONFIG,
    status::Probe,
};

/// Where rules are pinned by default.
const PIN_DIRECTORY: &str = "/sys/fs/bpf/egress";
/// Where `exec` pins the rules of its commands by default.
pub(crate) const EXEC_PIN_DIRECTORY: &str = "/sys/fs/bpf/egress-exec";
/// Where control sockets lie by default.
const RUN_DIRECTORY: &str = "/run/egress";

/// Egress firewall in the kernel, driven by Istio `ServiceEntry` documents.
///
/// A workload may open connections only to destinations that a policy names. The kernel decides at `connect()` and
/// `sendmsg()`: no proxy, no rules to search for each packet. Whoever is refused gets `EPERM` at once, and each refusal
/// is reported.
#[derive(Debug, Parser)]
#[command(name = "egress-agent", version, about, long_about, max_term_width = 120)]
pub struct Cli {
    /// What the agent says on stderr about its own work.
    #[arg(long, global = true, value_name = "LEVEL", env = "EGRESS_LOG", default_value = "info")]
    pub log: LogLevel,
    /// Settings of `run`, one `flag: value` a line, as `policies: [/etc/egress/policies]`; flags and environment are
    /// stronger. By default /etc/egress/agent.yaml, if it is there; /dev/null for none. Its `pin-dir` and `run-dir` are for `status`, `reload` and
    /// `detach` as well.
    #[arg(long, global = true, value_name = "FILE", env = CONFIG)]
    pub config: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Enforce policies on a cgroup and all below it, and report what they refuse.
    Run(RunArgs),
    /// Run one command behind a policy.
    Exec(ExecArgs),
    /// Tell what is in force.
    Status(StatusArgs),
    /// Have the running agent read its policies again.
    Reload(ReloadArgs),
    /// Remove what is in force, and everything it left in the kernel.
    Detach(DetachArgs),
    /// Find what is wrong with policy documents, and what is probably not meant.
    Check(CheckArgs),
    /// Tell what policies say of a destination, by which rule, and what would allow it.
    Explain(ExplainArgs),
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
the last good ones stay in force. SIGTERM and SIGINT end the agent; the rules stay in force until `egress-agent detach`, or
end with the agent if --detach-on-exit says so.

Exit status: 0 asked to stop, 1 policy invalid at start, 2 usage, 4 kernel or privilege missing, 5 another agent runs.

Example:
  egress-agent run --policies /etc/egress/policies --cgroup system.slice/ratings.service")]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own on the command line")]
pub struct RunArgs {
    /// A policy file, or a directory of *.yaml, *.yml and *.json files; may be given several times. In the environment,
    /// several are separated by `:`. Needed without --kubernetes.
    #[arg(long, value_name = "PATH", env = "EGRESS_POLICIES")]
    pub policies: Vec<PathBuf>,
    /// The cgroup to filter, with all below it: a directory, or a path below the cgroup2 mount. With --kubernetes, by default
    /// that of all pods.
    #[arg(long, value_name = "PATH", env = "EGRESS_CGROUP")]
    pub cgroup: Option<PathBuf>,
    /// A directory on a bpf file system that keeps the rules in force; one agent for each.
    #[arg(long, value_name = "DIR", env = "EGRESS_PIN_DIR", default_value = PIN_DIRECTORY)]
    pub pin_dir: PathBuf,
    /// Where the agent's control socket lies.
    #[arg(long, value_name = "DIR", env = "EGRESS_RUN_DIR", default_value = RUN_DIRECTORY)]
    pub run_dir: PathBuf,
    /// End the enforcement when asked to stop, not the agent alone.
    #[arg(long, env = "EGRESS_DETACH_ON_EXIT")]
    pub detach_on_exit: bool,
    /// What becomes of a cgroup that is not placed yet, where policies select cgroups around it.
    #[arg(long, value_name = "ACTION", env = "EGRESS_UNKNOWN_WORKLOADS", default_value = "Deny", ignore_case = true)]
    pub unknown_workloads: UnknownWorkloads,
    /// Look at each packet, too: for source routes, IPv6 routing headers and loopback addresses that leave the host.
    #[arg(long, value_name = "On|Off", env = "EGRESS_PACKET_GUARD", default_value = "On", ignore_case = true)]
    pub packet_guard: PacketGuard,
    /// Most kernel memory that rules may take; a policy that needs more is refused.
    #[arg(long, value_name = "MB", env = "EGRESS_MEMORY_LIMIT", default_value_t = 1024)]
    pub memory_limit: u64,
    /// Who resolves the host names of policies; by default the servers of /etc/resolv.conf. The hosts file comes first.
    #[arg(long, value_name = "IP[:PORT]", env = "EGRESS_RESOLVER", value_delimiter = ',', value_parser = server)]
    pub resolver: Vec<SocketAddr>,
    /// A unit, or a cgroup, that resolves names for the whole host, such as systemd-resolved.service: what it is answered counts for
    /// every workload, and it may serve port 53. May be given several times.
    #[arg(long, value_name = "UNIT|CGROUP", env = "EGRESS_SHARED_RESOLVER", value_delimiter = ',', value_parser = workload)]
    pub shared_resolver: Vec<Selector>,
    /// How long a start waits for the addresses of names; what comes later is put in force when it comes.
    #[arg(long, value_name = "SECONDS", env = "EGRESS_RESOLVE_WAIT", default_value_t = 5)]
    pub resolve_wait: u64,
    /// An answer for a name holds at least so long, and no name is asked for again sooner.
    #[arg(long, value_name = "SECONDS", env = "EGRESS_NAME_FLOOR", default_value_t = 5)]
    pub name_floor: u64,
    /// How long an address stays open after the answer for its name has ended, as programs keep what they were told.
    #[arg(long, value_name = "SECONDS", env = "EGRESS_NAME_GRACE", default_value_t = 300)]
    pub name_grace: u64,
    /// How many addresses of names each workload may have learnt at a time; further ones are refused until some have ended.
    #[arg(long, value_name = "N", env = "EGRESS_NAME_QUOTA", default_value_t = 8_192)]
    pub name_quota: u32,
    /// Start even if everything on the host would be refused.
    #[arg(long, env = "EGRESS_FORCE")]
    pub force: bool,
    /// What holds for workloads that no enforcing `EgressPolicy` selects.
    #[arg(long, value_name = "ACTION", env = "EGRESS_DEFAULT", default_value = "Deny", ignore_case = true)]
    pub default: NodeAction,
    /// Do not open loopback addresses by default.
    #[arg(long, env = "EGRESS_NO_LOOPBACK")]
    pub no_loopback: bool,
    /// Do not open the resolvers of /etc/resolv.conf by default.
    #[arg(long, env = "EGRESS_NO_DNS")]
    pub no_dns: bool,
    /// Accept policy files and directories that others than root may write.
    #[arg(long, env = "EGRESS_ALLOW_WRITABLE_POLICIES")]
    pub allow_writable_policies: bool,
    /// How denials are written; text on a terminal, else JSON lines.
    #[arg(long, value_name = "FORMAT", env = "EGRESS_OUTPUT")]
    pub output: Option<Output>,
    /// The cluster.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

/// Arguments of `run` about a cluster.
#[derive(Debug, Args)]
#[command(next_help_heading = "Kubernetes")]
pub struct ClusterArgs {
    /// Filter the pods of this node by the `ServiceEntry` and `EgressPolicy` objects of its cluster, beside those of --policies. The
    /// API is found by the service account of the pod, or by the file that KUBECONFIG names.
    #[arg(long, env = "EGRESS_KUBERNETES")]
    pub kubernetes: bool,
    /// The node whose pods are filtered; by default the name of the host.
    #[arg(long, value_name = "NAME", env = "EGRESS_NODE_NAME")]
    pub node_name: Option<String>,
    /// The namespace whose `EgressPolicy` objects may select anything; those of others select pods of their own namespace.
    #[arg(long, value_name = "NAMESPACE", env = "EGRESS_ROOT_NAMESPACE", default_value = "egress-system")]
    pub root_namespace: String,
    /// Only `ServiceEntry` objects of these namespaces count; by default those of all.
    #[arg(long, value_name = "NAMESPACE", env = "EGRESS_SERVICE_ENTRIES_FROM", value_delimiter = ',')]
    pub service_entries_from: Vec<String>,
    /// Refuse by default what pods of every namespace do, not only of those that have the label `egress.filter/mode: enforce`.
    #[arg(long, env = "EGRESS_ALL_NAMESPACES")]
    pub all_namespaces: bool,
    /// Allow by default what pods of these namespaces do, unless the namespace has that label.
    #[arg(
        long,
        value_name = "NAMESPACE",
        env = "EGRESS_EXEMPT_NAMESPACES",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    pub exempt_namespaces: Vec<String>,
    /// What holds of the networks of the cluster.
    #[command(flatten)]
    pub networks: NetworkArgs,
}

/// Arguments of `run` and `explain`: what cannot be learnt from the API.
#[derive(Debug, Args)]
pub struct NetworkArgs {
    /// What every pod may reach unless a rule denies it: the addresses of pods and services.
    #[arg(long, value_name = "CIDR", env = "EGRESS_INTERNAL_CIDRS", value_delimiter = ',', value_parser = network)]
    pub internal_cidrs: Vec<IpNet>,
    /// What `dns: { servers: System }` means for pods; by default the resolvers of the system.
    #[arg(long, value_name = "IP", env = "EGRESS_CLUSTER_DNS", value_delimiter = ',')]
    pub cluster_dns: Vec<IpAddr>,
}

impl NetworkArgs {
    /// What the rules of pods depend on.
    pub fn context(&self) -> PodContext {
        PodContext {
            resolvers: self.cluster_dns.iter().map(|&address| canonical(address.into()).addr()).collect(),
            internal: self.internal_cidrs.clone(),
        }
    }
}

/// A path has a slash, a unit has none.
fn workload(text: &str) -> Result<Selector, String> {
    let is_unit = !text.contains('/') && text.contains('.');
    match text.trim_matches('/') {
        "" => Err(
            "is neither a unit, such as systemd-resolved.service, nor a cgroup, such as system.slice/dnsmasq.service"
                .to_owned(),
        ),
        name if is_unit => Ok(Selector::Unit(name.to_owned())),
        path => Ok(Selector::Cgroup(path.to_owned())),
    }
}

/// A prefix or an address; host bits are masked.
fn network(text: &str) -> Result<IpNet, String> {
    let read = address::network(text).map_err(|bad| format!("{}: {}", bad.message, bad.help))?;
    Ok(read.net)
}

/// Arguments of `exec`.
#[derive(Debug, Args)]
#[command(after_help = "\
The command runs in a cgroup of its own, made below that of whoever starts it, so that an agent that filters there judges it
too: both must allow. The policy is read once. Denials go to stderr as they happen; at the end comes what was refused, how
often, and a policy that would allow it. Stdin, stdout and the terminal are the command's; it inherits no other descriptors,
since a socket made outside is not filtered.

Needs root. Through sudo the command runs as whoever called sudo, else as root, or as --user says. If that is not root, programs
with the set-user-ID bit, such as sudo, give it no privileges: root could leave the cgroup. A command of root is not confined
against its own will; it is started without the capabilities that make it easy, such as CAP_NET_RAW and CAP_SYS_ADMIN.

SIGTERM, SIGHUP, SIGUSR1, SIGUSR2 and SIGWINCH are passed to the command; SIGINT and SIGQUIT reach it from the terminal. The rules
hold for everything the command starts, until the last of it has ended, even if `exec` is killed; what is left then is removed
by the next start of `exec` or `run`.

Exit status: that of the command, 128+n if signal n ended it; 125 the agent failed, 126 the command cannot be run, 127 it is not
there.

Examples:
  sudo egress-agent exec --policies mysql.yaml -- npm test
  sudo egress-agent exec --default Audit -- ./configure")]
pub struct ExecArgs {
    /// A policy file, or a directory of *.yaml, *.yml and *.json files; may be given several times. Without it, nothing is
    /// open but what --default opens.
    #[arg(long, value_name = "PATH")]
    pub policies: Vec<PathBuf>,
    /// What holds if no enforcing `EgressPolicy` selects the command.
    #[arg(long, value_name = "ACTION", default_value = "Deny", ignore_case = true)]
    pub default: NodeAction,
    /// Do not open loopback addresses by default.
    #[arg(long)]
    pub no_loopback: bool,
    /// Do not open the resolvers of /etc/resolv.conf by default.
    #[arg(long)]
    pub no_dns: bool,
    /// Who resolves the host names of policies; by default the servers of /etc/resolv.conf. The hosts file comes first.
    #[arg(long, value_name = "IP[:PORT]", env = "EGRESS_RESOLVER", value_delimiter = ',', value_parser = server)]
    pub resolver: Vec<SocketAddr>,
    /// Run the command as this user, by name or number.
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Let a command of root keep a capability with which it could go around the rules: `CAP_NET_RAW`, `CAP_NET_ADMIN`,
    /// `CAP_BPF`, `CAP_PERFMON`, `CAP_SYS_ADMIN`, `CAP_SYS_PTRACE`, `CAP_SYS_MODULE` or `CAP_SYS_RAWIO`.
    #[arg(long, value_name = "CAP", value_delimiter = ',', value_parser = capability)]
    pub keep_capabilities: Vec<CapabilitySet>,
    /// A directory on a bpf file system that keeps the rules of all commands in force.
    #[arg(long, value_name = "DIR", env = "EGRESS_EXEC_PIN_DIR", default_value = EXEC_PIN_DIRECTORY)]
    pub pin_dir: PathBuf,
    /// How denials are written.
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub output: Output,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Where an agent is found.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// The pin directory of the agent.
    #[arg(long, value_name = "DIR", env = "EGRESS_PIN_DIR", default_value = PIN_DIRECTORY)]
    pub pin_dir: PathBuf,
    /// Where the agent's control socket lies.
    #[arg(long, value_name = "DIR", env = "EGRESS_RUN_DIR", default_value = RUN_DIRECTORY)]
    pub run_dir: PathBuf,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "\
Reads what is pinned in the kernel, also when no agent runs, and asks the agent where one does.

Exit status: 0 enforcing and healthy, 1 enforcing but degraded, 3 not enforcing, 2 could not tell.

With --probe, which writes nothing if all is well, and is for whoever starts and restarts agents: 0 as asked, 1 not so,
2 could not tell. What is degraded, such as an invalid policy, is not mended by a restart and does not count.

Examples:
  egress-agent status --output json
  egress-agent status --probe Ready")]
pub struct StatusArgs {
    /// Where the agent is found.
    #[command(flatten)]
    pub agent: AgentArgs,
    /// How the answer is written; text on a terminal, else one JSON object.
    #[arg(long, value_name = "FORMAT")]
    pub output: Option<Output>,
    /// Only tell by the exit status whether the agent is as it must be.
    #[arg(long, value_name = "STATE", conflicts_with = "output")]
    pub probe: Option<Probe>,
}

/// Arguments of `reload`.
#[derive(Debug, Args)]
#[command(after_help = "\
Policies are read again by themselves when their files change; this is for when that is not noticed, and for scripts.

Exit status: 0 the agent was told, or with --wait the policy is in force; 1 it is not: it is invalid, a file of it is open for
writing, or it takes longer than --timeout; 2 no agent was reached.

Example:
  egress-agent reload --wait")]
pub struct ReloadArgs {
    /// Where the agent is found.
    #[command(flatten)]
    pub agent: AgentArgs,
    /// Wait until the policies are read and in force.
    #[arg(long)]
    pub wait: bool,
    /// How long to wait at most.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, requires = "wait", value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout: u64,
}

/// Arguments of `detach`.
#[derive(Debug, Args)]
#[command(after_help = "\
Asks for no confirmation: from then on nothing is filtered. An agent that runs is not stopped by this: stop it first.

Exit status: 0 removed, or nothing was there; 2 could not be removed; 5 an agent runs.

Example:
  systemctl stop egress-agent && egress-agent detach")]
pub struct DetachArgs {
    /// The pin directory.
    #[arg(long, value_name = "DIR", env = "EGRESS_PIN_DIR", default_value = PIN_DIRECTORY)]
    pub pin_dir: PathBuf,
}

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Reads the documents as `run` does and prints every error and lint with its place and a fix. Nothing is enforced; no privilege
is needed. Lints come only where no document is wrong.

Exit status: 0 no error (warnings are printed), 1 errors, or with --strict any finding, 2 could not run.

Example:
  egress-agent check --strict policies/")]
pub struct CheckArgs {
    /// Policy files, or directories of *.yaml, *.yml and *.json files.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Fail for warnings and notes too.
    #[arg(long)]
    pub strict: bool,
    /// Look up the names of entries that have no addresses, and warn only of those that do not resolve.
    #[arg(long)]
    pub resolve: bool,
    /// How findings are written; text on a terminal, else one JSON object.
    #[arg(long, value_name = "FORMAT")]
    pub output: Option<Output>,
}

/// Arguments of `explain`.
#[derive(Debug, Args)]
#[command(after_help = "\
The decision is made by the same code, over the same contents, as in the kernel. The workload is described by flags; what is
not given is not known, and selectors of that kind do not match it.

Each line of --flows is {\"to\":\"IP:PORT\",\"protocol\":\"TCP\",\"namespace\":…,\"labels\":{…},\"cgroup\":…,\"unit\":…,\"user\":…},
all but \"to\" optional, and a name instead of IP if --resolve gives its addresses; each is answered by one line, in the same
order. A name is denied if any of its addresses is.

Exit status: 0 allowed or would be denied by Audit only, 1 denied, 2 could not run; with --flows 0 when all were answered.

Examples:
  egress-agent explain policies/ --to 203.0.113.10:3306
  egress-agent explain policies/ --to db.example.com:5432 --resolve db.example.com=192.0.2.7 --cgroup system.slice/web.service
  egress-agent explain policies/ --flows flows.jsonl > answers.jsonl")]
pub struct ExplainArgs {
    /// Policy files, or directories of *.yaml, *.yml and *.json files.
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// The destination; a name is looked up unless --resolve gives its address.
    #[arg(long, value_name = "HOST:PORT", required_unless_present = "flows", conflicts_with = "flows")]
    pub to: Option<String>,
    /// Answer every line of a file, or of stdin (`-`).
    #[arg(long, value_name = "FILE")]
    pub flows: Option<PathBuf>,
    /// TCP or UDP; with --flows, that of the lines that name none.
    #[arg(long, visible_alias = "protocol", value_name = "PROTOCOL", default_value = "TCP", ignore_case = true)]
    pub proto: Proto,
    /// The workload is a pod of this namespace.
    #[arg(long, value_name = "NAMESPACE", conflicts_with = "flows")]
    pub namespace: Option<String>,
    /// The labels of the pod.
    #[arg(long, value_name = "KEY=VALUE,…", value_delimiter = ',', value_parser = pair, requires = "namespace")]
    pub labels: Vec<(String, String)>,
    /// The cgroup of the workload, as a path below the cgroup2 mount.
    #[arg(long, value_name = "PATH", conflicts_with = "flows")]
    pub cgroup: Option<String>,
    /// The systemd unit of the workload; by default what its cgroup says.
    #[arg(long, value_name = "UNIT", conflicts_with = "flows")]
    pub unit: Option<String>,
    /// The user of the workload, by name or number.
    #[arg(long, value_name = "USER", conflicts_with = "flows")]
    pub user: Option<String>,
    /// What holds for workloads that no enforcing `EgressPolicy` selects.
    #[arg(long, value_name = "ACTION", default_value = "Deny", ignore_case = true)]
    pub default: NodeAction,
    /// The address of a name, in the documents and in the question; may be given several times.
    #[arg(long, value_name = "HOST=IP", value_parser = host_address)]
    pub resolve: Vec<(String, IpAddr)>,
    /// The resolvers that `dns: { servers: System }` means; by default those of /etc/resolv.conf.
    #[arg(long, value_name = "IP")]
    pub system_resolver: Vec<IpAddr>,
    /// Where the workload is a pod.
    #[command(flatten)]
    pub networks: NetworkArgs,
    /// How answers are written; text on a terminal, else JSON lines.
    #[arg(long, value_name = "FORMAT", conflicts_with = "flows")]
    pub output: Option<Output>,
}

/// `--proto`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl From<Proto> for L4 {
    fn from(proto: Proto) -> Self {
        match proto {
            Proto::Tcp => Self::Tcp,
            Proto::Udp => Self::Udp,
        }
    }
}

fn server(text: &str) -> Result<SocketAddr, String> {
    let of_ip = || text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53));
    text.parse().or_else(|_| of_ip()).map_err(|_| format!("{text:?} is not an IP address, nor one with a port"))
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("must be KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// A capability by its name, with or without `CAP_`.
fn capability(text: &str) -> Result<CapabilitySet, String> {
    let name = text.to_ascii_uppercase();
    let name = name.strip_prefix("CAP_").unwrap_or(&name);
    let found = DANGEROUS.iter().find(|(known, _)| *known == name);
    found.map(|&(_, capability)| capability).ok_or_else(|| {
        let names: Vec<&str> = DANGEROUS.iter().map(|&(name, _)| name).collect();
        format!("commands keep every capability but {}", names.join(", "))
    })
}

fn host_address(text: &str) -> Result<(String, IpAddr), String> {
    let (host, address) = text.split_once('=').ok_or("must be HOST=IP")?;
    let address = address.parse().map_err(|_| format!("{address:?} is not an IP address"))?;
    Ok((host.trim_end_matches('.').to_lowercase(), address))
}
