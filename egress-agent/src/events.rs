//! Events: kernel records, completed with what `/proc` and the cgroup tree know, one shape for all readers.
//!
//! Fields are only ever added to the shape; what is not known is absent.

use std::{
    collections::HashMap,
    fmt, fs,
    net::{IpAddr, SocketAddr},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::{Duration, SystemTime},
};

use egress_common::{Address, Decision, Event, Hook, NameKey, Protocol, Reason, SHARED, SocketKind, Verdict};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

use crate::{
    cgroup::{self, CgroupPaths},
    compile::Names,
    dataplane::{AskedNames, RuleNames},
    pods::{PodName, PodNames},
    policy::RuleName,
};

/// A flow that was refused, or would have been.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "type", rename = "connection")]
pub struct Connection {
    /// When, RFC 3339 in UTC with nanoseconds.
    pub time: String,
    /// `deny` or `would_deny`.
    pub verdict: &'static str,
    /// Why.
    pub reason: &'static str,
    /// The rule that decided; null if none did.
    pub rule: Option<RuleName>,
    /// `TCP`, `UDP`, `RAW`, or the name or number of another IP protocol.
    pub protocol: String,
    /// The hook that saw it.
    pub hook: &'static str,
    /// What the workload got.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errno: Option<&'static str>,
    /// How many alike this line stands for.
    pub count: u64,
    /// What it probably was: `address_sorting` is the C library, which sorts the addresses of a name by connecting a UDP socket
    /// to each, and sends nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<&'static str>,
    /// Where to; absent where a socket was refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination: Option<Destination>,
    /// Who.
    pub process: Process,
    /// From which cgroup.
    pub cgroup: Cgroup,
    /// The systemd unit of that cgroup.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unit: Option<String>,
    /// The container of that cgroup.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub container_id: Option<String>,
    /// The pod of that cgroup.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodName>,
}

/// Where a workload wanted to go.
#[derive(Debug, Clone, Serialize)]
pub struct Destination {
    /// IPv4 where it is IPv4-mapped.
    pub address: IpAddr,
    /// TCP or UDP port.
    pub port: u16,
    /// The name that the workload asked for last when it got this address; else one of the policies that has it. Of a question
    /// that was refused, what it asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

/// The names of the policies by address, for those who tell of denials. All copies are one.
#[derive(Debug, Clone, Default)]
pub struct HostNames(Arc<RwLock<HashMap<IpAddr, String>>>);

impl HostNames {
    /// These, until others are set.
    pub fn new(names: &Names) -> Self {
        let hosts = Self::default();
        hosts.set(names);
        hosts
    }

    /// From now on these. Of several names of an address, the first is told.
    pub fn set(&self, names: &Names) {
        let mut by_address = HashMap::new();
        for (name, addresses) in &names.0 {
            for &address in addresses {
                by_address.entry(address).or_insert_with(|| name.clone());
            }
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = by_address;
    }

    fn get(&self, address: IpAddr) -> Option<String> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&address).cloned()
    }
}

/// The process that acted.
#[derive(Debug, Clone, Serialize)]
pub struct Process {
    /// In the initial pid namespace.
    pub pid: u32,
    /// Its parent, if the process was still there to be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ppid: Option<u32>,
    /// In the initial user namespace.
    pub uid: u32,
    /// In the initial user namespace.
    pub gid: u32,
    /// Name of the thread.
    pub comm: String,
    /// Its program, if the process was still there to be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exe: Option<String>,
    /// Its arguments, if the process was still there to be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<Vec<String>>,
}

/// The cgroup it acted from.
#[derive(Debug, Clone, Serialize)]
pub struct Cgroup {
    /// Inode number of its directory.
    pub id: u64,
    /// From the root of the hierarchy, if it was still there to be found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
}

/// Completes kernel records.
#[derive(Debug)]
pub struct Enricher {
    paths: CgroupPaths,
    rules: RuleNames,
    hosts: HostNames,
    asked: Option<AskedNames>,
    pods: PodNames,
    /// `/proc` shows the ids that the kernel reports.
    sees_all: bool,
}

impl Enricher {
    /// Names rules by `rules`, cgroups by `paths` and addresses by `hosts`.
    pub fn new(paths: CgroupPaths, rules: RuleNames, hosts: HostNames) -> Self {
        Self { paths, rules, hosts, asked: None, pods: PodNames::default(), sees_all: is_initial_pid_namespace() }
    }

    /// Knows what workloads asked for.
    #[must_use]
    pub fn with_asked(self, asked: AskedNames) -> Self {
        Self { asked: Some(asked), ..self }
    }

    /// What the workload of a cgroup asked for when it got an address: the cgroup's own, or that of the nearest above it.
    fn asked(&self, cgroup: u64, path: Option<&Path>, address: Address) -> Option<String> {
        let asked = self.asked.as_ref()?;
        let above = path.into_iter().flat_map(|path| self.paths.above(path));
        std::iter::once(cgroup).chain(above).chain([SHARED]).find_map(|workload| asked.get(workload, address))
    }

    /// Names pods by `pods`.
    #[must_use]
    pub fn with_pods(self, pods: PodNames) -> Self {
        Self { pods, ..self }
    }

    /// The full story of a record; `None` if it is of another version and cannot be understood.
    /// `name` is what was asked for, where that is what was judged.
    pub fn connection(&mut self, event: &Event, name: Option<&NameKey>) -> Option<Connection> {
        let (hook, decision) = (event.hook().ok()?, event.decision().ok()?);
        let process = *event.process();
        let address = event.address().to_ip();
        let pid = self.sees_all.then_some(process.pid);
        let path = self.paths.path(process.cgroup_id, pid).map(PathBuf::from);
        let asked = self.asked(process.cgroup_id, path.as_deref(), event.address());
        Some(Connection {
            note: sorts_addresses(event, hook, decision, asked.is_some()).then_some(ADDRESS_SORTING),
            time: humantime::format_rfc3339_nanos(wall_time(event.time())).to_string(),
            verdict: decision.verdict.as_str(),
            reason: decision.reason.as_str(),
            rule: decision.rule.and_then(|rule| self.rules.get(rule)),
            protocol: protocol_name(event)?,
            hook: hook.as_str(),
            errno: errno(decision),
            count: 1,
            destination: has_destination(hook).then(|| Destination {
                address,
                port: event.port(),
                host: match hook {
                    Hook::Query => name.and_then(spelled),
                    _ => asked.or_else(|| self.hosts.get(address)),
                },
            }),
            unit: path.as_deref().and_then(cgroup::unit).map(|unit| lossy(unit.as_ref())),
            container_id: path.as_deref().and_then(cgroup::container_id).map(str::to_owned),
            pod: path.as_deref().and_then(|path| self.pods.describe(path)),
            process: describe(&process, event.time(), self.sees_all),
            cgroup: Cgroup { id: process.cgroup_id, path: path.as_deref().map(lossy) },
        })
    }
}

/// Whether this process is in the initial pid namespace, whose ids the kernel reports: elsewhere the same number is another
/// process. Its inode number is fixed, `PROC_PID_INIT_INO` of `linux/proc_ns.h`.
fn is_initial_pid_namespace() -> bool {
    const PROC_PID_INIT_INO: u64 = 0xEFFF_FFFC;
    let is_initial = fs::metadata("/proc/self/ns/pid").is_ok_and(|meta| meta.ino() == PROC_PID_INIT_INO);
    if !is_initial {
        tracing::warn!("not in the host's pid namespace: denials name no parent, program or arguments of processes");
    }
    is_initial
}

/// A name as people write it; `None` if it is none.
pub(crate) fn spelled(key: &NameKey) -> Option<String> {
    let name = key.backwards().iter().rev().copied().collect();
    String::from_utf8(name).ok().filter(|name| !name.is_empty())
}

/// See [`Connection::note`].
const ADDRESS_SORTING: &str = "address_sorting";

/// Whether it looks as if somebody sorts the addresses of a name (RFC 6724; `getaddrinfo` of glibc): a UDP socket is connected
/// to an address that the workload was told for a name, and no rule names it. QUIC looks the same.
fn sorts_addresses(event: &Event, hook: Hook, decision: Decision, is_asked: bool) -> bool {
    let connects = matches!(hook, Hook::Connect4 | Hook::Connect6) && event.protocol() == Protocol::UDP;
    connects && decision.reason == Reason::NoRule && is_asked
}

impl Connection {
    /// Whether another stands for the same: one process that sorts the addresses of one name.
    pub(crate) fn is_like(&self, other: &Self) -> bool {
        let host = |connection: &Self| connection.destination.as_ref().and_then(|destination| destination.host.clone());
        self.note.is_some()
            && self.note == other.note
            && self.process.pid == other.process.pid
            && host(self) == host(other)
    }
}

/// Whether what was refused had a destination.
const fn has_destination(hook: Hook) -> bool {
    match hook {
        Hook::Connect4 | Hook::Connect6 | Hook::Sendmsg4 | Hook::Sendmsg6 | Hook::Egress | Hook::Query => true,
        Hook::SockCreate
        | Hook::SocketCreate
        | Hook::Setsockopt
        | Hook::Recvmsg4
        | Hook::Recvmsg6
        | Hook::Bind4
        | Hook::Bind6
        | Hook::Ingress => false,
    }
}

const fn errno(decision: Decision) -> Option<&'static str> {
    match decision.verdict {
        Verdict::Deny => Some(decision.refusal.as_str()),
        Verdict::Allow | Verdict::WouldDeny => None,
    }
}

/// `None` if it is of a kind that is unknown.
fn protocol_name(event: &Event) -> Option<String> {
    let socket = event.socket().ok()?;
    Some(match (socket, event.protocol().number()) {
        (SocketKind::Raw | SocketKind::Packet | SocketKind::Vsock, _) => socket.as_str().to_owned(),
        (SocketKind::Other, 0) => format!("family {}", event.family()),
        (_, 1) => "ICMP".to_owned(),
        (_, 6) => "TCP".to_owned(),
        (_, 17) => "UDP".to_owned(),
        (_, 58) => "ICMPv6".to_owned(),
        (_, 132) => "SCTP".to_owned(),
        (_, 136) => "UDPLITE".to_owned(),
        (_, number) => number.to_string(),
    })
}

/// Wall-clock time of an instant given in nanoseconds since boot: as long ago as it is on the boot clock.
fn wall_time(since_boot: u64) -> SystemTime {
    SystemTime::now()
        .checked_sub(boot_clock().saturating_sub(Duration::from_nanos(since_boot)))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

pub(crate) fn boot_clock() -> Duration {
    clock_gettime(ClockId::Boottime).try_into().unwrap_or_default()
}

/// Adds what `/proc` knows, unless the process is gone and its id belongs to one that started after the event.
fn describe(process: &egress_common::Process, time: u64, sees_all: bool) -> Process {
    let stat = || fs::read(format!("/proc/{}/stat", process.pid)).ok().and_then(|stat| Stat::parse(&stat));
    let stat = if sees_all { stat().filter(|stat| stat.started_by(time)) } else { None };
    let is_there = stat.is_some();
    Process {
        pid: process.pid,
        ppid: stat.map(|stat| stat.ppid),
        uid: process.uid,
        gid: process.gid,
        comm: text(process.comm.split(|&byte| byte == 0).next().unwrap_or_default()),
        exe: if is_there {
            fs::read_link(format!("/proc/{}/exe", process.pid)).ok().as_deref().map(lossy)
        } else {
            None
        },
        cmdline: if is_there { cmdline(process.pid) } else { None },
    }
}

/// Names of files may hold any bytes; JSON holds only text.
fn lossy(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn cmdline(pid: u32) -> Option<Vec<String>> {
    let raw = fs::read(format!("/proc/{pid}/cmdline")).ok().filter(|raw| !raw.is_empty())?;
    let raw = raw.strip_suffix(b"\0").unwrap_or(&raw);
    Some(raw.split(|&byte| byte == 0).map(text).collect())
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What is wanted of `/proc/PID/stat`, by `proc_pid_stat(5)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    ppid: u32,
    /// Clock ticks since boot.
    start: u64,
}

impl Stat {
    /// The name stands in parentheses and may hold anything, parentheses too, so the fields after the last are counted:
    /// the state is field 3, the parent 4, the start 22.
    fn parse(stat: &[u8]) -> Option<Self> {
        let after_name = stat.iter().rposition(|&byte| byte == b')')? + 1;
        let mut fields = std::str::from_utf8(&stat[after_name..]).ok()?.split_ascii_whitespace();
        let ppid = fields.nth(1)?.parse().ok()?;
        let start = fields.nth(17)?.parse().ok()?;
        Some(Self { ppid, start })
    }

    fn started_by(&self, time: u64) -> bool {
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        self.start.saturating_mul(1_000_000_000 / ticks) <= time
    }
}

/// One line for a person.
impl fmt::Display for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = self.verdict.to_uppercase();
        write!(f, "{} {verdict} {} ", self.time, self.protocol)?;
        match &self.destination {
            Some(destination) => write!(f, "{}", SocketAddr::new(destination.address, destination.port))?,
            None => write!(f, "{}", self.hook)?,
        }
        write!(f, " reason={}", self.reason)?;
        if let Some(host) = self.destination.as_ref().and_then(|destination| destination.host.as_ref()) {
            write!(f, " host={host}")?;
        }
        if self.count > 1 {
            write!(f, " count={}", self.count)?;
        }
        if let Some(note) = self.note {
            write!(f, " note={note}")?;
        }
        if let Some(rule) = &self.rule {
            write!(f, " rule={:?}", rule.to_string())?;
        }
        if let Some(PodName { namespace, name, container, .. }) = &self.pod {
            write!(f, " pod={namespace}/{name}")?;
            container.iter().try_for_each(|container| write!(f, "/{container}"))?;
        }
        let process = &self.process;
        write!(f, " comm={:?} pid={} uid={}", process.comm, process.pid, process.uid)?;
        match &self.cgroup.path {
            Some(path) => write!(f, " cgroup={}", path.escape_debug()),
            None => write!(f, " cgroup={}", self.cgroup.id),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_name_with_parentheses_does_not_confuse_the_fields() {
        let fields = "S 7 1 1 0 -1 4194560 100 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        let stat = format!("42 (a) b (c) {fields}");
        assert_eq!(Stat::parse(stat.as_bytes()), Some(Stat { ppid: 7, start: 4242 }));
        for end in 0..stat.len() - 8 {
            assert_eq!(Stat::parse(&stat.as_bytes()[..end]), None, "{end}");
        }
    }

    #[test]
    fn a_process_that_started_after_the_event_is_another_one() {
        let own = fs::read("/proc/self/stat").unwrap();
        let stat = Stat::parse(&own).unwrap();
        assert!(stat.started_by(u64::try_from(boot_clock().as_nanos()).unwrap()));
        assert!(!stat.started_by(0));
    }
}
