//! `existing: Terminate`: ends connections that are open and that the policy in force would refuse.
//!
//! Sockets are found by their cgroup in every network namespace that a process at or below the attach point is in, judged by
//! [`egress_common::decide`] as a new connection would be, and ended as `ss --kill` does. What a listening socket accepted is
//! no choice of the workload and stays; so does what a name that the policy allows may have opened.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    io,
    net::UdpSocket,
    path::Path,
};

use egress_common::{Flow, Protocol, Reason, Verdict};
use rustix::thread::{CapabilitySet, capabilities};

use crate::{
    cgroup::{Found, below, found_below, tasks},
    netns::Namespace,
    policy::{EgressPolicy, Existing, Mode, PolicySet},
    privileges::TERMINATE,
    ruleset::Ruleset,
    scopes::{Layout, Seat},
    sock_diag::{Kind, SockDiag, Socket, state},
};

/// Why connections could not be ended.
#[derive(Debug, thiserror::Error)]
pub enum ExistingError {
    /// The kernel was built without it.
    #[error(
        "a policy says `existing: Terminate`, and this kernel ends no sockets of others: it lacks CONFIG_INET_DIAG_DESTROY, or \
         the modules tcp_diag and udp_diag"
    )]
    Unsupported(#[source] io::Error),
    /// The agent has given up what it takes.
    #[error(
        "a policy says `existing: Terminate`, which takes CAP_SYS_ADMIN to enter network namespaces. An agent keeps it only if \
         a policy says so when it starts: start the agent again"
    )]
    Privilege,
}

/// Whether the kernel can end sockets: ends one that is made for it.
fn probe() -> Result<(), ExistingError> {
    let probe = || {
        let socket = UdpSocket::bind("127.0.0.1:0")?;
        let own = socket.local_addr()?;
        socket.connect(own)?;
        let diag = SockDiag::open()?;
        let found = diag.sockets(Kind::Udp, &[state::ESTABLISHED])?.into_iter().find(|found| found.source == own);
        diag.destroy(&found.ok_or(io::ErrorKind::NotFound)?)
    };
    probe().map_err(ExistingError::Unsupported)
}

/// Whether it is what a policy asks for. One that only audits changes nothing.
pub fn terminates(policy: &EgressPolicy) -> bool {
    policy.mode == Mode::Enforce && policy.existing == Some(Existing::Terminate)
}

/// Whether the calling thread may enter network namespaces.
pub(crate) fn may_enter() -> bool {
    capabilities(None).is_ok_and(|held| held.effective.contains(TERMINATE))
}

/// The capabilities that take what policies ask for. Fails if the calling thread lacks them, or the kernel the means.
pub fn expect(policies: &PolicySet) -> Result<CapabilitySet, ExistingError> {
    if !policies.egress_policies.iter().any(terminates) {
        return Ok(CapabilitySet::empty());
    }
    if may_enter() { probe().map(|()| TERMINATE) } else { Err(ExistingError::Privilege) }
}

/// What can be given to those who may ask for it later: nothing, if the calling thread or the kernel cannot.
pub fn possible() -> CapabilitySet {
    if may_enter() && probe().is_ok() { TERMINATE } else { CapabilitySet::empty() }
}

/// Where connections are looked for.
pub(crate) struct Sweep<'a> {
    pub(crate) mount: &'a Path,
    /// The attach point.
    pub(crate) top: &'a Path,
    pub(crate) layout: &'a Layout,
}

impl Sweep<'_> {
    /// Ends what is open and would be refused; tells how many that were. What cannot be looked at is warned of.
    pub(crate) fn run(&self) -> usize {
        if self.layout.scopes.iter().all(|scope| !scope.terminates) {
            return 0;
        }
        let cgroups = Cgroups::below(&self.mount.join(below(self.top)));
        let ended = |namespace: &Namespace| match namespace.inside(|| self.sweep(&cgroups)) {
            Ok(ended) => ended,
            Err(error) => {
                tracing::warn!(%error, pid = namespace.pid, "cannot end connections in a network namespace");
                0
            }
        };
        cgroups.namespaces.values().map(ended).sum()
    }

    /// In the network namespace of the calling thread.
    fn sweep(&self, cgroups: &Cgroups) -> io::Result<usize> {
        let diag = SockDiag::open()?;
        let connected = [state::ESTABLISHED, state::SYN_SENT, state::CLOSE_WAIT];
        let mut sockets = diag.sockets(Kind::Tcp, &connected)?;
        let served = diag.sockets(Kind::Tcp, &[state::LISTEN])?;
        let served: HashSet<u16> = served.iter().map(|socket| socket.source.port()).collect();
        sockets.retain(|socket| socket.state == state::SYN_SENT || !served.contains(&socket.source.port()));
        sockets.extend(diag.sockets(Kind::Udp, &[state::ESTABLISHED])?);
        let refused = sockets.iter().filter_map(|socket| Some((socket, self.refusal(cgroups, socket)?)));
        Ok(refused.filter(|(socket, rule)| end(&diag, socket, rule)).count())
    }

    /// The rule by which a socket's connection would be refused, in words; `None` if it would not, or is to be kept.
    fn refusal(&self, cgroups: &Cgroups, socket: &Socket) -> Option<String> {
        let Seat::Scope(index) = self.seat(cgroups, socket.cgroup?)? else { return None };
        let scope = &self.layout.scopes[index];
        let scope = scope.users.get(&socket.uid).map_or(scope, |&index| &self.layout.scopes[index]);
        if !scope.terminates {
            return None;
        }
        let protocol = match socket.kind {
            Kind::Tcp => Protocol::TCP,
            Kind::Udp => Protocol::UDP,
        };
        let (address, port) = (socket.destination.ip().into(), socket.destination.port());
        let flow = Flow { place: Ruleset::PLACE, protocol, address, port };
        let decision = scope.ruleset.decide(&flow);
        // What it was opened by may be forgotten, and what a name opened stays.
        if decision.reason == Reason::NoRule && scope.ruleset.may_allow_by_name(&flow) {
            return None;
        }
        let rule = || scope.ruleset.rule(&decision).map_or_else(|| "default".to_owned(), ToString::to_string);
        (decision.verdict == Verdict::Deny).then(rule)
    }

    /// Where a cgroup belongs: by itself, or by the nearest one above it that is placed.
    fn seat(&self, cgroups: &Cgroups, id: u64) -> Option<Seat> {
        if let Some(placement) = self.layout.placements.get(&id) {
            return Some(placement.own);
        }
        let mut placements = cgroups.above(id).filter_map(|above| self.layout.placements.get(&above));
        placements.next().map(|placement| placement.below)
    }
}

fn end(diag: &SockDiag, socket: &Socket, rule: &str) -> bool {
    let Socket { source, destination, kind, .. } = socket;
    match diag.destroy(socket) {
        Ok(()) => {
            tracing::info!(?kind, %source, %destination, cgroup = socket.cgroup, rule, "connection terminated");
            true
        }
        // It ended by itself.
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Err(error) => {
            tracing::warn!(%error, ?kind, %source, %destination, "cannot terminate a connection that is refused");
            false
        }
    }
}

/// The cgroups below a directory, and that itself.
struct Cgroups {
    /// By id, that of the cgroup above; of the directory itself, its own.
    parents: HashMap<u64, u64>,
    /// By their number, the network namespaces that processes are in.
    namespaces: BTreeMap<u64, Namespace>,
}

impl Cgroups {
    fn below(top: &Path) -> Self {
        let (mut parents, mut namespaces) = (HashMap::new(), BTreeMap::new());
        for Found { directory, id, parent } in found_below(top) {
            parents.insert(id, parent.unwrap_or(id));
            namespaces.extend(tasks(&directory).into_iter().filter_map(|pid| Namespace::of(pid).ok()));
        }
        Self { parents, namespaces }
    }

    /// The ids of the cgroups above one, the nearest first.
    fn above(&self, id: u64) -> impl Iterator<Item = u64> {
        let parent = |&id: &u64| self.parents.get(&id).copied().filter(|&parent| parent != id);
        std::iter::successors(Some(id), parent).skip(1)
    }
}
