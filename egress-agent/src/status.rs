//! What is in force: read from the pins, and completed by the agent where one runs.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use egress_common::{ABI_VERSION, Counter, Hook, SHARED, Verdict, map};
use serde::{Deserialize, Serialize};

use crate::{
    cgroup::{self, CgroupPaths},
    control::{self, Request},
    dataplane::{
        WHERE_IT_MATTERS,
        others::{self, Other},
        pinned::{self, MapUse},
    },
    kubernetes,
    pins::{self, PinError},
    report::{Loss, Reports, Stage, sort},
    resolver::NameReport,
    run::chain,
    text::{self, printable, printable_bytes},
};

/// What a probe asks for. Neither is mended by waiting for what only an author of policies can mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Probe {
    /// An agent runs and answers.
    Live,
    /// One does, and rules are in force.
    Ready,
}

/// The answer of `status`.
#[derive(Debug, Clone, Serialize)]
pub struct Status {
    /// Programs are attached and pinned.
    pub enforcing: bool,
    /// What is wrong; empty if nothing is.
    pub degraded: Vec<String>,
    /// The agent.
    pub agent: Agent,
    /// Where programs are attached.
    pub attached: Vec<Attached>,
    /// Other filters of ours that judge the same cgroups, too.
    pub others: Vec<Other>,
    /// What is in force.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
    /// Distinct sets of policies; known by the agent alone.
    pub scopes: Arc<[Scope]>,
    /// What the maps take.
    pub maps: Vec<MapUse>,
    /// What was answered since the programs were loaded.
    pub counters: Counters,
    /// What became of the reports; of what happened after the ring buffer, the agent alone knows.
    pub reports: Reports,
    /// Lines of the agent's log that nobody read.
    pub log_lost: u64,
    /// Names of the policies; known by the agent alone.
    pub names: Names,
    /// The Kubernetes API, where it is a source; known by the agent alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubernetes: Option<kubernetes::Report>,
    /// The agent answers, and follows nothing.
    #[serde(skip)]
    is_stuck: bool,
}

/// The agent.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Agent {
    /// Whether it runs.
    pub running: bool,
    /// The one that runs, or the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// Its version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// The version of the layouts of its maps.
    pub abi: u32,
    /// When it started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub since: Option<String>,
}

/// Programs on a cgroup.
#[derive(Debug, Clone, Serialize)]
pub struct Attached {
    /// Its path from the root of the hierarchy, or its id where that is not known.
    pub cgroup: String,
    /// The hooks.
    pub hooks: Vec<&'static str>,
}

/// What is in force.
#[derive(Debug, Clone, Serialize)]
pub struct Policy {
    /// Counts the policies that the agent put in force.
    pub generation: u64,
    /// SHA-256 of what the rules mean.
    pub hash: String,
    /// When it was put in force.
    pub loaded: String,
    /// Documents; known by the agent alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub documents: Option<usize>,
    /// Rules; known by the agent alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rules: Option<usize>,
    /// Why the policy that was read last is not in force.
    pub last_error: Option<String>,
    /// Since when a change is being put in force, if one is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub changing_since: Option<String>,
    /// What of the policy on disk is not in force; known by the agent alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pending: Option<Pending>,
}

/// What of the policy on disk is not in force.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Pending {
    /// Since when.
    pub since: String,
    /// Why.
    pub reason: String,
    /// The file, if it is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
}

/// One distinct set of policies.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Scope {
    /// Its number in the kernel.
    pub id: u32,
    /// The policies; none where the node default stands in.
    pub policies: Vec<String>,
    /// How many cgroups and users have it.
    pub workloads: usize,
    /// The cgroups that are placed in it; what lies below them follows them.
    pub cgroups: Vec<String>,
    /// The users that have it wherever they are in another scope.
    pub users: Vec<u32>,
    /// Prefixes of its tries.
    pub prefixes: usize,
}

/// Answers by verdict.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Counters {
    /// Let through.
    pub allow: u64,
    /// Refused.
    pub deny: u64,
    /// Let through, and an Audit policy would have refused them.
    pub would_deny: u64,
    /// Reports that were lost, wherever: see [`Reports::lost`].
    pub events_lost: u64,
}

/// Names of the policies.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Names {
    /// Wildcards, which nobody can resolve: the kernel learns what they cover when a workload asks for it.
    pub wildcards: Vec<Wildcard>,
    /// Names that are resolved.
    pub resolved: Vec<NameReport>,
    /// What the kernel learnt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learnt: Option<Learnt>,
}

/// What the kernel learnt of names.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Learnt {
    /// Addresses that may still be dialled for a name, of all workloads together, and some that may not any longer.
    pub addresses: u64,
    /// How many each workload may have.
    pub quota: u32,
    /// How many each has.
    pub workloads: Vec<Learner>,
    /// What became of the answers of DNS: see [`egress_common::Lesson`].
    pub answers: BTreeMap<String, u64>,
}

/// A workload that learnt names.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Learner {
    /// Its cgroup; `shared` for those that resolve names for the whole host.
    pub cgroup: String,
    /// How many addresses it has.
    pub addresses: u32,
}

/// A pattern that cannot be resolved.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Wildcard {
    /// As it is written.
    pub host: String,
    /// The document that has it.
    pub document: String,
}

/// What the agent adds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FromAgent {
    /// When it started.
    pub since: String,
    /// Documents of the policy in force.
    pub documents: usize,
    /// Rules of it.
    pub rules: usize,
    /// Why the policy that was read last is not in force.
    pub last_error: Option<String>,
    /// What else is not as it should be.
    #[serde(default)]
    pub degraded: Vec<String>,
    /// Whether the programs are on the cgroup.
    pub attached: bool,
    /// Whether what is in force outlives the agent.
    pub pinned: bool,
    /// Distinct sets of policies.
    pub scopes: Arc<[Scope]>,
    /// Names of the policies.
    pub names: Names,
    /// The Kubernetes API, where it is a source.
    #[serde(default)]
    pub kubernetes: Option<kubernetes::Report>,
    /// What became of the reports that it read.
    #[serde(default)]
    pub reports: Reports,
    /// Lines of its log that nobody read.
    #[serde(default)]
    pub log_lost: u64,
    /// Since when a change is being put in force, if one is.
    #[serde(default)]
    pub changing_since: Option<String>,
    /// For how many seconds it has followed nothing, if that is too long.
    #[serde(default)]
    pub silent: Option<u64>,
    /// What of the policy on disk is not in force.
    #[serde(default)]
    pub pending: Option<Pending>,
}

impl Status {
    /// Of the agent of a pin directory.
    pub fn read(pin_directory: &Path, run_directory: &Path) -> Result<Self, PinError> {
        let is_there = pins::is_on_bpffs(pin_directory)? && pin_directory.is_dir();
        let sets = if is_there { pins::sets(pin_directory)? } else { Vec::new() };
        let ask = || control::ask::<FromAgent>(&control::socket(run_directory, pin_directory), Request::Status);
        // An agent whose pins are gone has no claim on anything, and still enforces.
        let asked = if is_there { pins::is_claimed(pin_directory).then(ask) } else { ask().ok().map(Ok) };
        let mut status = Self::of_set(sets.last(), asked.is_some());
        if let Some(asked) = asked {
            status.complete(asked);
        } else if status.enforcing {
            status.degraded.push("no agent runs: the rules stay as they are, and nothing is reported".to_owned());
        }
        status.others = others(pin_directory);
        status.degraded.extend(status.others.iter().map(ToString::to_string));
        if sets.len() > 1 {
            status
                .degraded
                .push(format!("{} sets are in force at once: a connection must pass all of them", sets.len()));
        }
        Ok(status)
    }

    fn of_set(set: Option<&PathBuf>, running: bool) -> Self {
        let mut status = Self {
            enforcing: false,
            degraded: Vec::new(),
            agent: Agent { running, abi: ABI_VERSION, ..Agent::default() },
            attached: Vec::new(),
            others: Vec::new(),
            policy: None,
            scopes: Arc::default(),
            maps: Vec::new(),
            counters: Counters::default(),
            reports: Reports::default(),
            log_lost: 0,
            names: Names::default(),
            kubernetes: None,
            is_stuck: false,
        };
        let Some(set) = set else { return status };
        status.read_attached(set);
        if let Err(error) = status.read_maps(set) {
            status.degraded.push(chain(&error));
        }
        status
    }

    fn read_attached(&mut self, set: &Path) {
        let mut paths = cgroup::mount_point().ok().map(CgroupPaths::new);
        let mut path_of = |id| paths.as_mut().map(|paths| paths.path(id).map(printable_bytes));
        // A cgroup that was removed keeps its programs until the last socket made in it is closed.
        let attached: Vec<(Hook, String)> = pinned::attached(set)
            .into_iter()
            .filter_map(|(hook, id)| Some((hook, path_of(id).unwrap_or_else(|| Some(id.to_string()))?)))
            .collect();
        let meta = pinned::meta(set).ok();
        let is_wanted =
            |hook: &&Hook| !WHERE_IT_MATTERS.contains(hook) && meta.is_none_or(|meta| meta.has_hook(**hook));
        let missing: Vec<&str> = Hook::ALL
            .iter()
            .filter(is_wanted)
            .filter(|hook| attached.iter().all(|(found, _)| found != *hook))
            .map(|hook| hook.as_str())
            .collect();
        self.enforcing = missing.is_empty();
        for hook in Hook::ALL.iter().filter(|&&hook| meta.is_some_and(|meta| meta.lacks_hook(hook))) {
            self.degraded.push(format!("this kernel refuses the program {}: see docs/kernels.md", hook.as_str()));
        }
        if !missing.is_empty() {
            self.degraded.push(format!("not attached: {}; its cgroup is gone, perhaps", missing.join(", ")));
        }
        for (hook, cgroup) in attached {
            match self.attached.iter_mut().find(|attached| attached.cgroup == cgroup) {
                Some(attached) => attached.hooks.push(hook.as_str()),
                None => self.attached.push(Attached { cgroup, hooks: vec![hook.as_str()] }),
            }
        }
    }

    fn read_maps(&mut self, set: &Path) -> Result<(), crate::dataplane::DataplaneError> {
        let meta = pinned::meta(set)?;
        self.agent.pid = Some(meta.pid());
        self.agent.version = Some(meta.agent_version().to_owned());
        self.agent.abi = meta.abi();
        self.policy = Some(Policy {
            generation: meta.generation(),
            hash: control::hexadecimal(meta.policy_hash()),
            loaded: time(SystemTime::UNIX_EPOCH + Duration::from_secs(meta.applied())),
            documents: None,
            rules: None,
            last_error: None,
            changing_since: None,
            pending: None,
        });
        self.maps = pinned::map_uses(set)?;
        let mut answers = BTreeMap::new();
        for (counter, count) in pinned::counters(set)? {
            match counter {
                Counter::Answered(lesson) => drop(answers.insert(lesson.as_str().to_owned(), count)),
                _ => self.counters.add(counter, count),
            }
        }
        let mut paths = cgroup::mount_point().ok().map(CgroupPaths::new);
        let mut path = |id| paths.as_mut().and_then(|paths| paths.path(id)).map(printable_bytes);
        let mut unknown = self.counters.events_lost;
        for (id, count) in pinned::lost_by_cgroup(set)? {
            unknown = unknown.saturating_sub(count);
            self.reports.lost.push(Loss {
                cgroup: path(id).or_else(|| Some(id.to_string())),
                stage: Stage::Ring,
                count,
            });
        }
        if unknown > 0 {
            self.reports.lost.push(Loss { cgroup: None, stage: Stage::Ring, count: unknown });
        }
        let workloads = pinned::learners(set)?.into_iter();
        let workloads = workloads.map(|(id, addresses)| {
            let cgroup = if id == SHARED { "shared".to_owned() } else { path(id).unwrap_or(id.to_string()) };
            Learner { cgroup, addresses }
        });
        let addresses = self.maps.iter().find(|map| map.name == map::NAMES).map_or(0, |map| map.entries);
        self.names.learnt = Some(Learnt { addresses, quota: meta.quota(), workloads: workloads.collect(), answers });
        Ok(())
    }

    fn complete(&mut self, asked: std::io::Result<FromAgent>) {
        let from_agent = match asked {
            Ok(from_agent) => from_agent,
            Err(error) => return self.degraded.push(format!("the agent does not answer: {error}")),
        };
        self.log_lost = from_agent.log_lost;
        self.add_reports(from_agent.reports);
        let FromAgent { since, documents, rules, last_error, degraded, attached, pinned, scopes, names, .. } =
            from_agent;
        let FromAgent { kubernetes, changing_since, silent, pending, .. } = from_agent;
        self.is_stuck = silent.is_some();
        self.degraded.extend(
            silent.map(|seconds| format!("the agent has followed nothing for {seconds} s: it hangs, or is busy")),
        );
        self.degraded.extend(degraded);
        self.degraded.extend(kubernetes.iter().flat_map(kubernetes::Report::degraded));
        self.agent.since = Some(since);
        if let Some(policy) = &mut self.policy {
            (policy.documents, policy.rules) = (Some(documents), Some(rules));
            policy.last_error.clone_from(&last_error);
            (policy.changing_since, policy.pending) = (changing_since, pending);
        }
        self.degraded.extend(last_error.map(|error| format!("the last good policy stays in force: {error}")));
        if !attached {
            // The links to a cgroup that is gone take a moment to go.
            self.enforcing = false;
            self.degraded.push("the cgroup is gone; it is filtered again when it is back".to_owned());
        }
        if !pinned {
            // Where it is attached, only the agent can tell.
            self.enforcing = attached;
            self.degraded.push("the pins are gone: what is in force ends with the agent".to_owned());
        }
        let learnt = self.names.learnt.take();
        (self.scopes, self.names, self.kubernetes) = (scopes, Names { learnt, ..names }, kubernetes);
    }

    /// What the agent knows beside what the kernel counted.
    fn add_reports(&mut self, told: Reports) {
        self.counters.events_lost += told.lost.iter().map(|loss| loss.count).sum::<u64>();
        let Reports { written, inherited, mut lost, error } = told;
        lost.append(&mut self.reports.lost);
        sort(&mut lost);
        self.reports = Reports { written, inherited, lost, error };
    }

    /// Whether the agent is as a probe asks.
    pub const fn is(&self, probe: Probe) -> bool {
        // Only the agent itself tells since when it runs.
        let is_live = self.agent.since.is_some() && !self.is_stuck;
        is_live && (self.enforcing || matches!(probe, Probe::Live))
    }

    /// The exit status that the command line promises.
    pub fn exit_code(&self) -> u8 {
        match (self.enforcing, self.degraded.is_empty()) {
            (true, true) => 0,
            (true, false) => 1,
            (false, _) => 3,
        }
    }
}

/// Other filters of ours that judge what the sets of a pin directory judge. What cannot be asked is not known: none.
pub fn others(pin_directory: &Path) -> Vec<Other> {
    let Ok(mount) = cgroup::mount_point() else { return Vec::new() };
    let (own, mut paths) = (pins::programs(pin_directory), CgroupPaths::new(mount.clone()));
    let sets = pins::sets(pin_directory).unwrap_or_default();
    let attached = sets.iter().flat_map(|set| pinned::attached(set)).filter(|(hook, _)| *hook == Hook::Connect4);
    let cgroups: BTreeSet<u64> = attached.map(|(_, id)| id).collect();
    let paths = cgroups.into_iter().filter_map(|id| paths.path(id).map(Path::to_owned));
    let mut found: Vec<Other> = Vec::new();
    for other in paths.flat_map(|path| others::find(&mount, &path, &own).unwrap_or_default()) {
        if !found.contains(&other) {
            found.push(other);
        }
    }
    found
}

/// RFC 3339, in UTC.
pub(crate) fn time(time: SystemTime) -> String {
    humantime::format_rfc3339_nanos(time).to_string()
}

impl Counters {
    fn add(&mut self, counter: Counter, count: u64) {
        let sum = match counter {
            Counter::Answers(Verdict::Allow, ..) => &mut self.allow,
            Counter::Answers(Verdict::Deny, ..) => &mut self.deny,
            Counter::Answers(Verdict::WouldDeny, ..) => &mut self.would_deny,
            Counter::EventsLost => &mut self.events_lost,
            Counter::Answered(_) => return,
        };
        *sum += count;
    }
}

/// For a person.
impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "enforcing: {}", if self.enforcing { "yes" } else { "no" })?;
        for reason in &self.degraded {
            writeln!(f, "degraded:  {}", printable(reason))?;
        }
        let agent = &self.agent;
        let version = agent.version.as_deref().unwrap_or("?");
        match (agent.running, agent.pid) {
            (true, Some(pid)) => writeln!(f, "agent:     running, pid {pid}, version {version}, ABI {}", agent.abi)?,
            (true, None) => writeln!(f, "agent:     running")?,
            (false, Some(pid)) => writeln!(f, "agent:     not running; the last was pid {pid}, version {version}")?,
            (false, None) => writeln!(f, "agent:     not running")?,
        }
        for attached in &self.attached {
            writeln!(f, "attached:  {} ({})", attached.cgroup, attached.hooks.join(", "))?;
        }
        if let Some(policy) = &self.policy {
            write!(f, "policy:    generation {}, loaded {}", policy.generation, policy.loaded)?;
            if let (Some(documents), Some(rules)) = (policy.documents, policy.rules) {
                write!(f, ", {documents} documents, {rules} rules")?;
            }
            writeln!(f, "\n           hash {}", policy.hash)?;
            if let Some(since) = &policy.changing_since {
                writeln!(f, "           a change is being put in force since {since}")?;
            }
            if let Some(Pending { since, reason, .. }) = &policy.pending {
                writeln!(f, "           on disk is another since {since}: {reason}")?;
            }
        }
        for scope in self.scopes.iter() {
            let policies =
                if scope.policies.is_empty() { "node default".to_owned() } else { scope.policies.join(", ") };
            writeln!(
                f,
                "scope {}:   {policies}; {} workloads, {} prefixes",
                scope.id, scope.workloads, scope.prefixes
            )?;
        }
        for map in &self.maps {
            writeln!(
                f,
                "map:       {:<9} {} of {} elements, {} bytes",
                map.name, map.entries, map.capacity, map.bytes
            )?;
        }
        let Counters { allow, deny, would_deny, events_lost } = self.counters;
        writeln!(
            f,
            "answers:   {allow} allowed, {deny} denied, {would_deny} would be denied; {events_lost} reports lost"
        )?;
        for Loss { cgroup, stage, count } in &self.reports.lost {
            let cgroup = cgroup.as_deref().map_or("other cgroups".into(), text::value);
            writeln!(f, "           {count} reports lost of {cgroup} ({})", stage.as_str())?;
        }
        if self.log_lost > 0 {
            writeln!(f, "log:       {} lines lost", self.log_lost)?;
        }
        if let Some(kubernetes::Report { server, node, pods, resources, .. }) = &self.kubernetes {
            writeln!(f, "cluster:   {server}, node {node}, {pods} pods")?;
            for resource in resources {
                let state = match (resource.installed, resource.synced) {
                    (false, _) => "not installed".to_owned(),
                    (true, false) => "not listed yet".to_owned(),
                    (true, true) => format!("{} objects", resource.objects),
                };
                writeln!(f, "           {}: {state}", resource.resource)?;
            }
        }
        for Wildcard { host, document } in &self.names.wildcards {
            writeln!(f, "wildcard:  {host} of {document}, learnt when a workload asks")?;
        }
        if let Some(learnt) = &self.names.learnt
            && (!self.names.wildcards.is_empty() || learnt.addresses > 0)
        {
            let answers = learnt.answers.iter().filter(|(_, count)| **count > 0);
            let answers: Vec<String> = answers.map(|(what, count)| format!("{count} {what}")).collect();
            let Learnt { addresses, quota, workloads, .. } = learnt;
            writeln!(
                f,
                "names:     {addresses} addresses learnt, at most {quota} a workload; answers: {}",
                answers.join(", ")
            )?;
            for Learner { cgroup, addresses } in workloads {
                writeln!(f, "           {cgroup}: {addresses} addresses")?;
            }
        }
        Ok(())
    }
}
