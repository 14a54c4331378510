//! Events: kernel records, completed with what `/proc` and the cgroup tree know, one shape for all readers.
//!
//! Fields are only ever added to the shape; what is not known is absent. Text of others is shown by [`text`], and each field
//! has a bound, so that no line is longer than [`MAX_LINE`], whatever a process calls itself.

use std::{
    collections::HashMap,
    fmt, fs,
    net::{IpAddr, SocketAddr},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt},
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
    pods::{Owner, PodName, PodNames},
    policy::RuleName,
    processes::{MAX_CMDLINE, Processes, Seen, Unseen},
    text::{self, printable},
};

/// Most bytes of a line, its end included: what reads logs cuts longer ones.
pub const MAX_LINE: usize = 16 << 10;

/// Most bytes of each field within a string of JSON.
const MAX_COMM: usize = 128;
const MAX_EXE: usize = 2048;
const MAX_ARGUMENTS: usize = 5632;
const MAX_PATH: usize = 4096;
const MAX_UNIT: usize = 512;
const MAX_HOST: usize = 1024;
/// Most bytes of each name of a pod.
const MAX_POD: usize = 256;

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
    /// The fields that are not whole, as `process.cmdline`; `process` where it would have taken too long to look at it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub truncated: Vec<&'static str>,
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

/// What is told of a cgroup, the same in each report.
#[derive(Debug)]
struct Known {
    path: PathBuf,
    /// As it is shown, and whether that is all of it.
    shown: (String, bool),
    unit: Option<(String, bool)>,
    container_id: Option<String>,
    /// The cgroups above, the nearest first.
    above: Vec<u64>,
}

/// Most cgroups of which that is remembered, and most bytes of their paths.
const MAX_CGROUPS: usize = 2048;

impl Known {
    fn new(path: PathBuf, above: Vec<u64>) -> Self {
        Self {
            shown: text::shown(path.as_os_str().as_bytes(), MAX_PATH),
            unit: cgroup::unit(&path).map(|unit| text::shown(unit.as_bytes(), MAX_UNIT)),
            container_id: cgroup::container_id(&path).map(str::to_owned),
            path,
            above,
        }
    }
}

/// Completes kernel records.
#[derive(Debug)]
pub struct Enricher {
    paths: CgroupPaths,
    cgroups: HashMap<u64, Arc<Known>>,
    processes: Processes,
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
        Self {
            paths: paths.bounded(),
            cgroups: HashMap::new(),
            processes: Processes::default(),
            rules,
            hosts,
            asked: None,
            pods: PodNames::default(),
            sees_all: is_initial_pid_namespace(),
        }
    }

    /// Knows what workloads asked for.
    #[must_use]
    pub fn with_asked(self, asked: AskedNames) -> Self {
        Self { asked: Some(asked), ..self }
    }

    /// What the workload of a cgroup asked for when it got an address: the cgroup's own, or that of the nearest above it.
    fn asked(&self, cgroup: u64, known: Option<&Known>, address: Address) -> Option<String> {
        let asked = self.asked.as_ref()?;
        let above = known.into_iter().flat_map(|known| &known.above).copied();
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
        let (recorded, address) = (*event.process(), event.address().to_ip());
        let mut truncated = Vec::new();
        let (process, known) = self.look(event, &mut truncated);
        let known = known.as_deref();
        let asked = self.asked(recorded.cgroup_id, known, event.address());
        let mut whole = |(text, is_whole): (String, bool), field| {
            if !is_whole {
                truncated.push(field);
            }
            text
        };
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
                }
                .map(|host| whole(text::shown(host.as_bytes(), MAX_HOST), "destination.host")),
            }),
            process,
            cgroup: Cgroup {
                id: recorded.cgroup_id,
                path: known.map(|known| whole(known.shown.clone(), "cgroup.path")),
            },
            unit: known.and_then(|known| known.unit.clone()).map(|unit| whole(unit, "unit")),
            container_id: known.and_then(|known| known.container_id.clone()),
            pod: known.and_then(|known| self.pods.describe(&known.path)).map(bounded_pod),
            truncated,
        })
    }

    /// The process of a record, and its cgroup, of which the process tells.
    fn look(&mut self, event: &Event, truncated: &mut Vec<&'static str>) -> (Process, Option<Arc<Known>>) {
        let recorded = event.process();
        let (id, workload) = (recorded.cgroup_id, event.lineage().workload());
        let seen =
            if self.sees_all { self.processes.look(recorded.pid, event.time(), workload) } else { Err(Unseen::Gone) };
        let is_known = self.cgroups.contains_key(&id);
        if let (Ok(seen), false) = (seen, is_known) {
            self.paths.learn(id, &seen.cgroup);
        }
        let process = describe(recorded, seen, truncated);
        if !is_known && let Some(path) = self.paths.path(id).map(Path::to_owned) {
            if self.cgroups.len() >= MAX_CGROUPS {
                self.cgroups.clear();
            }
            let above = self.paths.above(&path);
            self.cgroups.insert(id, Arc::new(Known::new(path, above)));
        }
        (process, self.cgroups.get(&id).cloned())
    }

    /// The path of the cgroup that stands for the workload of a record, if it is known: that of the record, or one above it.
    pub(crate) fn workload(&mut self, event: &Event) -> Option<String> {
        let known = self.cgroups.get(&event.process().cgroup_id)?;
        let workload = event.lineage().workload();
        if workload == event.process().cgroup_id {
            return Some(known.shown.0.clone());
        }
        let nearest = known.above.iter().rposition(|&id| id == workload)?;
        let levels = known.above.len() - nearest - 1;
        let path: PathBuf = known.path.iter().take(levels + 1).collect();
        Some(text::shown(path.as_os_str().as_bytes(), MAX_PATH).0)
    }
}

fn bounded_pod(pod: PodName) -> PodName {
    let bounded = |name: String| text::shown(name.as_bytes(), MAX_POD).0;
    PodName {
        namespace: bounded(pod.namespace),
        name: bounded(pod.name),
        container: pod.container.map(bounded),
        owner: pod.owner.map(|owner| Owner { kind: bounded(owner.kind), name: bounded(owner.name) }),
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
    let name: Vec<u8> = key.backwards().iter().rev().copied().collect();
    Some(text::shown(&name, usize::MAX).0).filter(|name| !name.is_empty())
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

/// Adds what `/proc` tells of it to what the kernel recorded.
fn describe(
    recorded: &egress_common::Process,
    seen: Result<&Seen, Unseen>,
    truncated: &mut Vec<&'static str>,
) -> Process {
    let comm = recorded.comm.split(|&byte| byte == 0).next().unwrap_or_default();
    let mut process = Process {
        pid: recorded.pid,
        ppid: None,
        uid: recorded.uid,
        gid: recorded.gid,
        comm: text::shown(comm, MAX_COMM).0,
        exe: None,
        cmdline: None,
    };
    match seen {
        Ok(seen) => {
            process.ppid = Some(seen.ppid);
            process.exe = seen.exe.as_ref().map(|exe| {
                let (exe, is_whole) = text::shown(exe, MAX_EXE);
                truncated.extend((!is_whole).then_some("process.exe"));
                exe
            });
            process.cmdline = (!seen.cmdline.is_empty()).then(|| {
                let (arguments, is_whole) = arguments(&seen.cmdline);
                truncated.extend((!is_whole).then_some("process.cmdline"));
                arguments
            });
        }
        Err(Unseen::Slow) => truncated.push("process"),
        Err(Unseen::Gone) => {}
    }
    process
}

/// The first arguments of a process, and whether these are all.
fn arguments(raw: &[u8]) -> (Vec<String>, bool) {
    let is_whole = raw.len() <= MAX_CMDLINE;
    let raw = &raw[..raw.len().min(MAX_CMDLINE)];
    let raw = if is_whole { raw.strip_suffix(b"\0").unwrap_or(raw) } else { raw };
    let (mut arguments, mut left) = (Vec::new(), MAX_ARGUMENTS);
    for argument in raw.split(|&byte| byte == 0) {
        // Two quotes and a comma.
        let Some(room) = left.checked_sub(3) else { return (arguments, false) };
        let (argument, is_all) = text::shown(argument, room);
        left = room - text::size(&argument);
        arguments.push(argument);
        if !is_all {
            return (arguments, false);
        }
    }
    (arguments, is_whole)
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
            write!(f, " host={}", text::value(host))?;
        }
        if self.count > 1 {
            write!(f, " count={}", self.count)?;
        }
        if let Some(note) = self.note {
            write!(f, " note={note}")?;
        }
        if let Some(rule) = &self.rule {
            write!(f, " rule={}", text::quoted(&printable(&rule.to_string())))?;
        }
        if let Some(PodName { namespace, name, container, .. }) = &self.pod {
            let container = container.as_ref().map_or_else(String::new, |container| format!("/{container}"));
            write!(f, " pod={}", text::value(&format!("{namespace}/{name}{container}")))?;
        }
        let process = &self.process;
        write!(f, " comm={} pid={} uid={}", text::quoted(&process.comm), process.pid, process.uid)?;
        match &self.cgroup.path {
            Some(path) => write!(f, " cgroup={}", text::value(path))?,
            None => write!(f, " cgroup={}", self.cgroup.id)?,
        }
        let truncated: Vec<&str> = self.truncated.iter().copied().filter(|field| is_in_text(field)).collect();
        if truncated.is_empty() { Ok(()) } else { write!(f, " truncated={}", truncated.join(",")) }
    }
}

/// Whether a line for a person has a field.
fn is_in_text(field: &str) -> bool {
    matches!(field, "destination.host" | "cgroup.path")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn recorded(comm: [u8; 16]) -> egress_common::Process {
        egress_common::Process { cgroup_id: u64::MAX, pid: u32::MAX, tid: 1, uid: u32::MAX, gid: u32::MAX, comm }
    }

    /// A report of what was seen.
    fn report(comm: [u8; 16], exe: &[u8], cmdline: &[u8], path: &[u8], name: &[u8]) -> Connection {
        let mut truncated = Vec::new();
        let seen = Seen::new(exe, cmdline);
        let process = describe(&recorded(comm), Ok(&seen), &mut truncated);
        let long = String::from_utf8_lossy(name).into_owned().repeat(4);
        let owner = Some(Owner { kind: long.clone(), name: long.clone() });
        let pod = PodName { namespace: long.clone(), name: long.clone(), container: Some(long.clone()), owner };
        let path = PathBuf::from(std::ffi::OsStr::from_bytes(path));
        let known = Known::new(path, Vec::new());
        Connection {
            time: "2026-11-24T18:58:41.950990343Z".to_owned(),
            verdict: "would_deny",
            reason: "unknown_workload",
            rule: None,
            protocol: "family 255".to_owned(),
            hook: "socket_create",
            errno: Some("EHOSTUNREACH"),
            count: u64::MAX,
            note: Some(ADDRESS_SORTING),
            destination: Some(Destination {
                address: "2001:db8:ffff:ffff:ffff:ffff:ffff:ffff".parse().unwrap(),
                port: u16::MAX,
                host: Some(text::shown(&name.repeat(2), MAX_HOST).0),
            }),
            process,
            cgroup: Cgroup { id: u64::MAX, path: Some(known.shown.0) },
            unit: Some(text::shown(&name.repeat(2), MAX_UNIT).0),
            container_id: Some("0123456789abcdef".repeat(4)),
            pod: Some(bounded_pod(pod)),
            truncated: vec!["destination.host", "process.exe", "process.cmdline", "cgroup.path", "unit"],
        }
    }

    fn is_short(report: &Connection) -> bool {
        // The name of a rule takes some, too: two names of objects of at most 253 characters each.
        serde_json::to_vec(report).unwrap().len() + 700 < MAX_LINE && report.to_string().len() + 700 < MAX_LINE
    }

    /// Kinds of bytes that take the most room when they are shown, or none.
    fn hostile(most: usize) -> impl Strategy<Value = Vec<u8>> {
        let one = prop::sample::select(vec![0_u8, 1, 0x1b, b'"', b'\\', b'a', 0x7f, 0xff, 0xe2, 0x80, 0xae, b'\n']);
        prop_oneof![
            prop::collection::vec(one, 0..most),
            Just(vec![0; most]),
            Just(vec![0x1b; most]),
            Just(vec![b'"'; most]),
            Just("\u{202e}".as_bytes().repeat(most / 3)),
            Just([b'a', 0].repeat(most / 2)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_line_is_longer_than_it_may_be(
            comm: [u8; 16],
            exe in hostile(4096),
            cmdline in hostile(MAX_CMDLINE + 1),
            path in hostile(4096),
            name in hostile(255),
        ) {
            let report = report(comm, &exe, &cmdline, &path, &name);
            prop_assert!(is_short(&report), "{}", serde_json::to_vec(&report).unwrap().len());
            let texts = [report.to_string(), serde_json::to_string(&report).unwrap()];
            prop_assert!(texts.iter().all(|text| !text.chars().any(text::is_treacherous)));
        }
    }

    #[test]
    fn arguments_are_cut_and_that_is_told() {
        assert_eq!(arguments(b"a\0\0b c\0"), (vec!["a".to_owned(), String::new(), "b c".to_owned()], true));
        assert_eq!(arguments(&[b'a'; MAX_CMDLINE]), (vec!["a".repeat(MAX_CMDLINE)], true));
        assert_eq!(arguments(&[b'a'; MAX_CMDLINE + 1]), (vec!["a".repeat(MAX_CMDLINE)], false));
        let (many, is_whole) = arguments(&[0; MAX_CMDLINE]);
        assert!(!is_whole && many.len() == MAX_ARGUMENTS / 3);
    }

    #[test]
    fn what_could_pose_as_a_field_is_in_quotes() {
        let line = report(*b"a\" uid=0 \x1b[2J\0\0\0", b"/x", b"x\0", b"/a comm=\"b\" uid=7", b"n").to_string();
        assert!(line.contains("comm=\"a\\u{22} uid=0 \\u{1b}[2J\" pid="), "{line}");
        assert!(line.contains("cgroup=\"/a comm=\\u{22}b\\u{22} uid=7\" truncated="), "{line}");
    }
}
