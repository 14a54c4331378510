//! Names, sizes and the version of what the kernel holds.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Hook, Lesson, Lifetime, Reason, Verdict};

/// Changes whenever a layout of this crate does. Programs and maps of another version are never adopted, but for [`map::PEERS`],
/// whose name has a version of its own.
pub const ABI_VERSION: u32 = 7;

/// Most scopes at a time, those of a change that is being made included.
pub const MAX_SCOPES: u32 = 4096;

/// Most pairs of a scope and a user with rules of its own.
pub const MAX_USERS: u32 = 1 << 16;

/// Most addresses that were learnt for names, of all workloads together.
pub const MAX_FACTS: u32 = 1 << 18;
/// Most addresses whose names are remembered for whoever reads denials.
pub const MAX_HOSTS: u32 = 1 << 12;
/// Most workloads that learn names.
pub const MAX_LEARNERS: u32 = 1 << 14;
/// Most pairs of a scope and a resolver that it believes.
pub const MAX_RESOLVERS: u32 = 1 << 13;
/// Most cgroups whose part of the ring buffer is counted.
pub const MAX_SHARES: u32 = 1 << 12;
/// Most network namespaces in which resolvers are believed.
pub const MAX_NETNS: u32 = 1 << 12;

/// Names of the maps; the kernel cuts names after 15 bytes.
pub mod map {
    /// Array of one hash: cgroup id → [`crate::Placement`].
    pub const WORKLOADS: &str = "WORKLOADS";
    /// Hash: [`crate::UserKey`] → number of a [`crate::Scope`].
    pub const USERS: &str = "USERS";
    /// Array of tries: view → {prefix → [`crate::Entry`]}.
    pub const POLICY: &str = "POLICY";
    /// Array of arrays: slot → {index → [`crate::Segment`]}.
    pub const SEGMENTS: &str = "SEGMENTS";
    /// Array: view → [`crate::Settings`].
    pub const VIEWS: &str = "VIEWS";
    /// Storage of sockets: [`crate::Peers`]. The name has the version of that layout, whatever [`super::ABI_VERSION`] is: the
    /// map is handed on from one agent to the next, also to one of another version.
    pub const PEERS: &str = "PEERS_2";
    /// Array of one trie: [`crate::NameKey`] → number of a [`crate::NameId`].
    pub const NAME_IDS: &str = "NAME_IDS";
    /// The trie that [`NAME_IDS`] holds, pinned by itself, so that who may not ask for maps by number can read it.
    pub const NAME_TRIE: &str = "NAME_TRIE";
    /// Hash: [`crate::FactKey`] → [`crate::Claims`].
    pub const NAMES: &str = "NAMES";
    /// Hash of those used last: [`crate::FactKey`] → [`crate::NameKey`] of the name that the workload asked for last.
    pub const HOSTS: &str = "HOSTS";
    /// Hash: workload → [`crate::Account`].
    pub const QUOTAS: &str = "QUOTAS";
    /// Hash: workload → how much of what it learnt is gone again.
    pub const FORGOTTEN: &str = "FORGOTTEN";
    /// Hash: [`crate::ResolverKey`] → 1.
    pub const RESOLVERS: &str = "RESOLVERS";
    /// Hash: cookie of a network namespace in which resolvers are believed → 1.
    pub const NETNS: &str = "NETNS";
    /// Storage of sockets: [`crate::Asked`].
    pub const ASKED: &str = "ASKED";
    /// Storage of sockets: [`crate::Stream`].
    pub const STREAMS: &str = "STREAMS";
    /// Storage of sockets: [`crate::Questioner`].
    pub const QUESTIONED: &str = "QUESTIONED";
    /// Per-CPU array: where messages of DNS are read.
    pub const SCRATCH: &str = "SCRATCH";
    /// Hash of those used last: cgroup → [`crate::Share`].
    pub const SHARES: &str = "SHARES";
    /// Ring buffer of [`crate::Event`] and [`crate::QueryEvent`].
    pub const EVENTS: &str = "EVENTS";
    /// Per-CPU array of counters, by [`crate::Counter`].
    pub const STATS: &str = "STATS";
    /// One [`crate::Meta`].
    pub const META: &str = "META";

    /// Every map.
    pub const ALL: [&str; 21] = [
        WORKLOADS, USERS, POLICY, SEGMENTS, VIEWS, PEERS, NAME_IDS, NAMES, HOSTS, QUOTAS, FORGOTTEN, RESOLVERS, NETNS,
        ASKED, STREAMS, QUESTIONED, SCRATCH, SHARES, EVENTS, STATS, META,
    ];
}

/// Codes of verdicts, reasons and hooks are below these.
const VERDICTS: u32 = 3;
const REASONS: u32 = 9;
const HOOKS: u32 = 14;
const LESSONS: u32 = 11;

/// An element of the `STATS` map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Flows with this answer.
    Answers(Verdict, Reason, Hook),
    /// Events that found no room in the ring buffer.
    EventsLost,
    /// Answers of DNS of which this became.
    Answered(Lesson),
}

impl Counter {
    /// Elements of the `STATS` map.
    pub const COUNT: u32 = Self::EVENTS_LOST + 1 + LESSONS;
    const EVENTS_LOST: u32 = HOOKS * REASONS * VERDICTS;

    /// Index into the `STATS` map, below [`Counter::COUNT`].
    #[inline(always)]
    pub const fn index(self) -> u32 {
        match self {
            Self::Answers(verdict, reason, hook) => {
                (hook.code() as u32 * REASONS + reason.code() as u32) * VERDICTS + verdict.code() as u32
            }
            Self::EventsLost => Self::EVENTS_LOST,
            Self::Answered(lesson) => Self::EVENTS_LOST + 1 + lesson.code() as u32,
        }
    }

    /// Every counter, in the order of the indices.
    pub fn all() -> impl Iterator<Item = Self> {
        let answers = Hook::ALL.iter().flat_map(|&hook| {
            Reason::ALL
                .iter()
                .flat_map(move |&reason| Verdict::ALL.iter().map(move |&verdict| Self::Answers(verdict, reason, hook)))
        });
        let lessons = Lesson::ALL.iter().map(|&lesson| Self::Answered(lesson));
        answers.chain([Self::EventsLost]).chain(lessons)
    }
}

/// Length of [`Meta`]'s version field.
const VERSION_LEN: usize = 32;

/// The element of the `META` map: who filled the maps, and with what; and what the programs need to know of that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Meta {
    abi: u32,
    pid: u32,
    generation: u64,
    /// Seconds since the epoch.
    applied: u64,
    policy_hash: [u8; 32],
    agent_version: [u8; VERSION_LEN],
    /// One byte, so that no reader sees half of it.
    deepest: u8,
    /// The level of the cgroup that the programs are attached to.
    level: u8,
    reserved: [u8; 2],
    /// One bit for each hook, by its code.
    hooks: u16,
    refused: u16,
    lifetime: Lifetime,
    /// How many addresses each workload may have learnt.
    quota: u32,
    /// Whether port 53 is kept for those who may serve it.
    guards_dns: u8,
    reserved_too: [u8; 3],
    /// How many addresses each workload always finds room for.
    guaranteed: u32,
    reserved_last: u32,
}

impl Meta {
    /// Of the agent `pid` of `agent_version` (cut to 32 bytes), with no policy.
    pub fn new(pid: u32, agent_version: &str) -> Self {
        let mut version = [0; VERSION_LEN];
        for (to, from) in version.iter_mut().zip(agent_version.bytes()) {
            *to = from;
        }
        Self {
            abi: ABI_VERSION,
            pid,
            generation: 0,
            applied: 0,
            policy_hash: [0; 32],
            agent_version: version,
            deepest: 0,
            level: 0,
            reserved: [0; 2],
            hooks: 0,
            refused: 0,
            lifetime: Lifetime { floor: 0, grace: 0 },
            quota: 0,
            guards_dns: 0,
            reserved_too: [0; 3],
            guaranteed: 0,
            reserved_last: 0,
        }
    }

    /// With a policy, put in force `applied` seconds after the epoch.
    #[must_use]
    pub const fn with_policy(self, generation: u64, policy_hash: [u8; 32], applied: u64) -> Self {
        Self { generation, applied, policy_hash, ..self }
    }

    /// With the hooks of the programs that are to be attached, and of those that the kernel refused.
    #[must_use]
    pub fn with_hooks(self, hooks: &[Hook], refused: &[Hook]) -> Self {
        let bits = |hooks: &[Hook]| hooks.iter().fold(0, |bits, hook| bits | 1 << hook.code());
        Self { hooks: bits(hooks), refused: bits(refused), ..self }
    }

    /// Whether a program is to be attached.
    pub const fn has_hook(&self, hook: Hook) -> bool {
        self.hooks & (1 << hook.code()) != 0
    }

    /// Whether the kernel refused a program.
    pub const fn lacks_hook(&self, hook: Hook) -> bool {
        self.refused & (1 << hook.code()) != 0
    }

    /// With another deepest level: see [`crate::Workloads::deepest`].
    #[must_use]
    pub const fn with_deepest(self, deepest: u8) -> Self {
        Self { deepest, ..self }
    }

    /// With the level of the cgroup that the programs are attached to.
    #[must_use]
    pub const fn with_level(self, level: u8) -> Self {
        Self { level, ..self }
    }

    /// The level of the cgroup that the programs are attached to; that of the root is 0.
    #[inline(always)]
    pub const fn level(&self) -> u8 {
        self.level
    }

    /// With what holds for what is learnt of names: for how long it holds, and how many addresses a workload may have learnt.
    #[must_use]
    pub const fn with_names(self, lifetime: Lifetime, quota: u32) -> Self {
        Self { lifetime, quota, ..self }
    }

    /// For how long answers of DNS hold.
    #[inline(always)]
    pub const fn lifetime(&self) -> Lifetime {
        self.lifetime
    }

    /// How many addresses each workload may have learnt.
    #[inline(always)]
    pub const fn quota(&self) -> u32 {
        self.quota
    }

    /// With another number of addresses that each workload always finds room for.
    #[must_use]
    pub const fn with_guaranteed(self, guaranteed: u32) -> Self {
        Self { guaranteed, ..self }
    }

    /// How many addresses each workload always finds room for.
    #[inline(always)]
    pub const fn guaranteed(&self) -> u32 {
        self.guaranteed
    }

    /// With port 53 kept for those who may serve it, or not.
    #[must_use]
    pub const fn with_dns_guarded(self, guards: bool) -> Self {
        Self { guards_dns: guards as u8, ..self }
    }

    /// Whether port 53 is kept for those who may serve it: somewhere a resolver of this host is believed.
    #[inline(always)]
    pub const fn guards_dns(&self) -> bool {
        self.guards_dns != 0
    }

    /// The deepest level at which a cgroup is placed.
    #[inline(always)]
    pub const fn deepest(&self) -> u8 {
        self.deepest
    }

    /// When the policy was put in force, in seconds since the epoch.
    pub const fn applied(&self) -> u64 {
        self.applied
    }

    /// The [`ABI_VERSION`] of the writer.
    pub const fn abi(&self) -> u32 {
        self.abi
    }

    /// The writer's process id.
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    /// Counts the policies that the writer put in force, from 1.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// SHA-256 of the policy's meaning.
    pub const fn policy_hash(&self) -> &[u8; 32] {
        &self.policy_hash
    }

    /// The writer's version.
    pub fn agent_version(&self) -> &str {
        let end = self.agent_version.iter().position(|&byte| byte == 0).unwrap_or(VERSION_LEN);
        core::str::from_utf8(&self.agent_version[..end]).unwrap_or("")
    }
}

const _: () = assert!(size_of::<Meta>() == 120 && align_of::<Meta>() == 8);

#[cfg(test)]
mod tests {
    extern crate std;

    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn no_two_counters_share_an_element() {
        let indices: BTreeSet<u32> = Counter::all().map(Counter::index).collect();
        assert_eq!(indices.len(), Counter::all().count());
        assert!(indices.iter().all(|&index| index < Counter::COUNT));
    }

    #[test]
    fn map_names_survive_the_kernel() {
        for name in map::ALL {
            assert!(name.len() <= 15, "{name}");
        }
    }

    #[test]
    fn meta_tells_who_wrote_it() {
        let meta = Meta::new(42, "1.2.3").with_policy(7, [9; 32], 11).with_deepest(3).with_level(2);
        assert_eq!((meta.abi(), meta.pid(), meta.generation()), (ABI_VERSION, 42, 7));
        assert_eq!((meta.agent_version(), meta.policy_hash()), ("1.2.3", &[9; 32]));
        assert_eq!((meta.applied(), meta.deepest(), meta.level()), (11, 3, 2));
        let meta = meta.with_hooks(&[Hook::Connect4, Hook::Egress], &[Hook::Setsockopt]);
        assert!(meta.has_hook(Hook::Connect4) && meta.has_hook(Hook::Egress) && !meta.has_hook(Hook::Setsockopt));
        assert!(meta.lacks_hook(Hook::Setsockopt) && !meta.lacks_hook(Hook::Egress));
        assert_eq!(Meta::new(1, &"é".repeat(40)).agent_version().len(), 32);
    }
}
