//! Policies, read for the daemon: files, watched before they are read and reported on as they are, and the objects of the
//! Kubernetes API beside them.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};

use crate::{
    compile::{Context, Names, NodeDefault, PodContext, combine::dialled_names},
    kubernetes::{Cluster, Revisions, Selection, Snapshot},
    pods::Pods,
    policy::{
        EgressPolicy, Endpoint, EndpointAddress, HostPattern, ObjectName, PolicySet, Selector as WorkloadSelector,
        ServiceEntry, User,
        code::Code,
        diagnostic::{Finding, Severity},
        load::{Before, Fingerprint, LoadError, LoadOptions, Loaded, Unfinished, is_unfinished, load_after, watched},
        yaml::Span,
    },
    resolv,
    run::{RunError, system},
    scopes::{Selector, UnknownWorkloads},
    text::printable_bytes,
    users::{PASSWD, Users},
    watch::Watch,
    workload::{UserIdentity, selected_users},
};

/// Where policies come from, and how they are read.
#[derive(Debug, Clone)]
pub(crate) struct SourceOptions {
    /// Files and directories.
    pub(crate) paths: Vec<PathBuf>,
    /// How they are read.
    pub(crate) load: LoadOptions,
    /// `builtin/default`.
    pub(crate) node_default: NodeDefault,
    /// What becomes of cgroups that are not placed yet.
    pub(crate) unknown: UnknownWorkloads,
    /// What holds of pods alone.
    pub(crate) pods: PodContext,
    /// Who resolves names for the whole host.
    pub(crate) shared_resolvers: Vec<WorkloadSelector>,
}

/// Where policies come from.
pub(crate) struct Source {
    options: SourceOptions,
    /// Where changes are noticed.
    pub(crate) watch: Watch,
    /// The Kubernetes API.
    pub(crate) cluster: Option<Cluster>,
    /// What the files said when they could be read last.
    files: Files,
    /// What was on disk when they were read last.
    seen: Arc<Fingerprint>,
    /// Files that were being written then.
    unfinished: Vec<Unfinished>,
    /// Those that were told of.
    unfinished_told: BTreeSet<Unfinished>,
    /// Since when new files that are being written hold back what the others say.
    held: Option<Instant>,
    /// What was warned of already.
    told: BTreeSet<(String, String)>,
}

/// What the files said.
#[derive(Debug, Clone, Default)]
struct Files {
    set: Arc<PolicySet>,
    documents: usize,
    /// How many documents each file has.
    known: Arc<BTreeMap<Arc<Path>, usize>>,
    system_resolvers: Vec<IpAddr>,
}

/// Policies that were read and are valid.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    pub(crate) set: Arc<PolicySet>,
    pub(crate) documents: usize,
    system_resolvers: Vec<IpAddr>,
    users: Vec<UserIdentity>,
    /// Names whose addresses rules depend on.
    pub(crate) names: BTreeSet<String>,
    /// Patterns that cannot be resolved, with the documents that have them.
    pub(crate) wildcards: Vec<(String, String)>,
    pods: Pods,
    /// How far the Kubernetes API was followed.
    pub(crate) revisions: Revisions,
    /// Objects of the API that are not in force beside a file of the same name.
    pub(crate) hidden: Vec<ObjectName>,
}

impl Source {
    /// Nothing is read yet.
    pub(crate) fn new(options: SourceOptions) -> Self {
        let (watch, files, seen, told) = (Watch::default(), Files::default(), Arc::default(), BTreeSet::new());
        let (unfinished, unfinished_told) = (Vec::new(), BTreeSet::new());
        Self { options, watch, cluster: None, files, seen, unfinished, unfinished_told, held: None, told }
    }

    /// Reads the files, and tells of every finding. What the Kubernetes API says is as it was told last.
    pub(crate) fn read(&mut self) -> Result<Policy, RunError> {
        let loaded = if self.options.paths.is_empty() { Loaded::default() } else { self.load()? };
        self.accept(loaded)
    }

    /// The same at a start, which waits for files that are being written: not longer than they hold back a change.
    pub(crate) async fn read_first(&mut self) -> Result<Policy, RunError> {
        loop {
            match self.read() {
                Err(RunError::Load(error @ LoadError::BeingWritten { .. })) => {
                    tracing::info!("{error}");
                    sleep(GATHER).await;
                    // Either way it is looked at again.
                    let _ = timeout(LOOK, self.watch.changed()).await;
                }
                read => return read,
            }
        }
    }

    /// Files that are being written, and so are not in force as they are.
    pub(crate) fn unfinished(&self) -> &[Unfinished] {
        &self.unfinished
    }

    /// Whoever is to look whether there is something to be read.
    pub(crate) fn looker(&self) -> Looker {
        let (paths, beside) = (self.options.paths.clone(), beside());
        Looker { paths, beside, seen: Arc::clone(&self.seen), unfinished: self.unfinished.clone() }
    }

    /// Takes documents if they are valid, and tells of every finding.
    pub(crate) fn accept(&mut self, loaded: Loaded) -> Result<Policy, RunError> {
        let knows_pods = self.cluster.is_some();
        let policies = loaded.policies.egress_policies.iter().filter(|_| !knows_pods);
        let unknown: Vec<Finding> = policies.filter_map(selects_unknown_pods).collect();
        let findings = || loaded.findings.iter().chain(&unknown);
        findings().for_each(report);
        let errors = findings().filter(|finding| finding.severity == Severity::Error).count();
        if errors > 0 {
            return Err(RunError::Invalid { errors });
        }
        let resolv_conf = Path::new(resolv::RESOLV_CONF);
        let system_resolvers = resolv::resolvers(resolv_conf).map_err(system("cannot read /etc/resolv.conf"))?;
        let (set, known) = (Arc::new(loaded.policies), Arc::new(loaded.known));
        self.files = Files { documents: loaded.documents, set, known, system_resolvers };
        Ok(self.merged())
    }

    /// What the files said when they were read last, and what the Kubernetes API says now.
    pub(crate) fn merged(&mut self) -> Policy {
        let Files { set, documents, system_resolvers, .. } = self.files.clone();
        let snapshot = self.cluster.as_ref().map(Cluster::snapshot);
        let (set, hidden) = match &snapshot {
            Some(snapshot) => {
                let (merged, hidden) = merge(&set, snapshot);
                if let Some(cluster) = &self.cluster {
                    cluster.select(selections(&merged).collect());
                }
                (Arc::new(merged), hidden)
            }
            None => (set, Vec::new()),
        };
        let Snapshot { revisions, pods, service_entries, egress_policies, .. } = snapshot.unwrap_or_default();
        let mut told = Told { before: &self.told, now: BTreeSet::new() };
        let (names, wildcards) = names(&set);
        let users = users(&set, &mut told);
        for object in &hidden {
            if told.is_new("hidden", object.to_string()) {
                tracing::warn!(%object, "a policy file has a document of this name: that of the Kubernetes API has no effect");
            }
        }
        self.told = told.now;
        Policy {
            documents: documents + service_entries.len() + egress_policies.len(),
            set,
            system_resolvers,
            users,
            names,
            wildcards,
            pods,
            revisions,
            hidden,
        }
    }

    /// What rules depend on besides the documents.
    pub(crate) fn context(&self, policy: &Policy, names: Names) -> Context {
        let (node_default, system_resolvers) = (self.options.node_default, policy.system_resolvers.clone());
        let (pods, shared_resolvers) = (self.options.pods.clone(), self.options.shared_resolvers.clone());
        Context { node_default, system_resolvers, names, pods, shared_resolvers }
    }

    /// Places workloads by these policies and what is known of their names.
    pub(crate) fn selector(&self, policy: &Policy, names: Names) -> Selector {
        let context = self.context(policy, names);
        let mut selector = Selector::new(policy.set.clone(), context, self.options.unknown, policy.users.clone());
        selector.set_pods(policy.pods.clone());
        selector
    }

    /// What is read is watched first, so that no change is missed. A directory that appeared meanwhile was read, perhaps,
    /// and not watched: then all is read again.
    fn load(&mut self) -> Result<Loaded, LoadError> {
        let paths: Vec<PathBuf> = self.options.paths.iter().cloned().chain(beside()).collect();
        let mut rounds = 0;
        loop {
            rounds += 1;
            let seen = watched(&paths);
            if self.options.load.follow
                && let Err(error) = self.watch.set(seen.clone())
            {
                tracing::error!(%error, "cannot watch policy files: changes are noticed within seconds, not at once");
            }
            self.seen = Arc::new(Fingerprint::new(&self.options.paths, &beside()));
            let loaded = self.load_once();
            // Directories that keep coming are looked for later.
            if watched(&paths) == seen || rounds == MAX_ROUNDS {
                return loaded;
            }
        }
    }

    fn load_once(&mut self) -> Result<Loaded, LoadError> {
        let leaves_out = self.held.is_some_and(|held| held.elapsed() >= HOLD);
        let before = Before { policies: &self.files.set, known: &self.files.known, leaves_out };
        let loaded = load_after(&self.options.paths, &self.options.load, before);
        let unfinished = match &loaded {
            Ok(loaded) => loaded.unfinished.clone(),
            Err(LoadError::BeingWritten { path }) => {
                vec![Unfinished { path: Arc::from(path.as_path()), is_kept: false }]
            }
            Err(_) => Vec::new(),
        };
        let is_new = |file: &&Unfinished| loaded.is_ok() && !self.unfinished_told.contains(*file);
        for file in unfinished.iter().filter(is_new) {
            if file.is_kept {
                tracing::info!("{file}");
            } else {
                tracing::warn!("{file}");
            }
        }
        self.held = unfinished.iter().any(|file| !file.is_kept).then(|| self.held.unwrap_or_else(Instant::now));
        self.unfinished_told = if loaded.is_ok() { unfinished.iter().cloned().collect() } else { BTreeSet::new() };
        self.unfinished = unfinished;
        loaded
    }
}

/// For how long a new file that is being written holds back what the others say.
pub(crate) const HOLD: Duration = Duration::from_secs(5);
/// How often it is looked whether there is something to be read that nobody told of.
pub(crate) const LOOK: Duration = Duration::from_secs(2);
/// How long changes are gathered at a start.
const GATHER: Duration = Duration::from_millis(100);
/// How often everything is read again at once because directories came meanwhile.
const MAX_ROUNDS: usize = 4;

/// Files that policies depend on.
fn beside() -> Vec<PathBuf> {
    [resolv::RESOLV_CONF, PASSWD].map(PathBuf::from).into()
}

/// Looks whether there is something to be read: also what `inotify` does not tell, such as a file system that is mounted over
/// a directory, or files of a network.
pub(crate) struct Looker {
    paths: Vec<PathBuf>,
    beside: Vec<PathBuf>,
    seen: Arc<Fingerprint>,
    unfinished: Vec<Unfinished>,
}

impl Looker {
    /// What is to be read, if something is. May take as long as the file system likes.
    pub(crate) fn look(&self) -> Option<PathBuf> {
        if self.paths.is_empty() {
            return None;
        }
        let finished = self.unfinished.iter().find(|file| !is_unfinished(&file.path));
        finished
            .map(|file| file.path.to_path_buf())
            .or_else(|| Fingerprint::new(&self.paths, &self.beside).difference(&self.seen, &self.unfinished))
    }
}

fn report(finding: &Finding) {
    let (code, file, line, column) =
        (finding.code.as_str(), printable_bytes(&*finding.file), finding.line, finding.column);
    let (path, help) = (&finding.path, finding.help.as_deref().unwrap_or_default());
    match finding.severity {
        Severity::Error => tracing::error!(%code, %file, line, column, %path, help, "{}", finding.message),
        Severity::Warning => tracing::warn!(%code, %file, line, column, %path, help, "{}", finding.message),
        Severity::Note => tracing::info!(%code, %file, line, column, %path, help, "{}", finding.message),
    }
}

/// What is warned of is warned of once, as long as it stays so.
struct Told<'a> {
    before: &'a BTreeSet<(String, String)>,
    now: BTreeSet<(String, String)>,
}

impl Told<'_> {
    fn is_new(&mut self, what: &str, of: String) -> bool {
        let told = (what.to_owned(), of);
        let is_new = !self.before.contains(&told);
        self.now.insert(told) && is_new
    }
}

/// The documents of the files and the objects of the API; and those objects that have the name of a document.
fn merge(files: &PolicySet, snapshot: &Snapshot) -> (PolicySet, Vec<ObjectName>) {
    let mut merged = files.clone();
    let mut hidden = Vec::new();
    let names: BTreeSet<&ObjectName> = files
        .service_entries
        .iter()
        .map(|entry| &entry.object)
        .chain(files.egress_policies.iter().map(|policy| &policy.object))
        .collect();
    add(&mut merged.service_entries, &snapshot.service_entries, |entry| &entry.object, &names, &mut hidden);
    add(&mut merged.egress_policies, &snapshot.egress_policies, |policy| &policy.object, &names, &mut hidden);
    merged.service_entries.sort_by(|a, b| a.object.cmp(&b.object));
    merged.egress_policies.sort_by(|a, b| a.object.cmp(&b.object));
    for entry in &mut merged.service_entries {
        let addresses = selection(entry).and_then(|selection| snapshot.endpoints.get(&selection));
        let of_pod = |&address| Endpoint {
            address: EndpointAddress::Ip(address),
            ports: BTreeMap::new(),
            labels: BTreeMap::new(),
            at: entry.at.clone(),
        };
        let of_pods: Vec<Endpoint> = addresses.into_iter().flatten().map(of_pod).collect();
        entry.endpoints.extend(of_pods);
    }
    (merged, hidden)
}

/// Adds objects that have a name of their own.
fn add<T: Clone>(
    documents: &mut Vec<T>,
    objects: &[Arc<T>],
    name_of: fn(&T) -> &ObjectName,
    names: &BTreeSet<&ObjectName>,
    hidden: &mut Vec<ObjectName>,
) {
    for object in objects {
        if names.contains(name_of(object)) {
            hidden.push(name_of(object).clone());
        } else {
            documents.push(T::clone(object));
        }
    }
}

/// The pods that are the endpoints of an entry: those of its namespace with these labels.
fn selection(entry: &ServiceEntry) -> Option<Selection> {
    let labels = entry.workload_selector.clone()?;
    Some((entry.object.namespace.to_string(), labels))
}

fn selections(policies: &PolicySet) -> impl Iterator<Item = Selection> {
    policies.service_entries.iter().filter_map(selection)
}

/// The names that can be resolved, and the patterns that cannot, for which the kernel has to learn.
fn names(policies: &PolicySet) -> (BTreeSet<String>, Vec<(String, String)>) {
    let (mut names, mut wildcards) = (BTreeSet::new(), Vec::new());
    for (object, pattern) in dialled_names(policies) {
        match pattern {
            HostPattern::Exact(name) => drop(names.insert(name)),
            HostPattern::Below(_) | HostPattern::Ending(_) => {
                wildcards.push((pattern.to_string(), object.to_string()));
            }
        }
    }
    (names, wildcards)
}

/// The users that policies select by, in both forms; a warning for those that are not known here.
fn users(policies: &PolicySet, told: &mut Told<'_>) -> Vec<UserIdentity> {
    let mut selected = selected_users(policies).peekable();
    if selected.peek().is_none() {
        return Vec::new();
    }
    let known = Users::read(Path::new(PASSWD));
    let identity = |user: &User| match user {
        User::Uid(uid) => known.identity(&uid.to_string()),
        User::Name(name) => known.identity(name),
    };
    let mut users: Vec<UserIdentity> = selected.map(identity).collect();
    users.retain(|user| {
        if user.uid.is_none() {
            let name = user.name.as_deref().unwrap_or_default();
            if told.is_new("user", name.to_owned()) {
                tracing::warn!(user = name, "no such user in {PASSWD}: what selects it selects nobody");
            }
        }
        user.uid.is_some()
    });
    users.sort_by_key(|user| user.uid);
    users.dedup();
    users
}

/// That a policy selects pods: an error where nobody tells who they are, since a policy that is carried out by half is worse
/// than none.
fn selects_unknown_pods(policy: &EgressPolicy) -> Option<Finding> {
    let selects_pods = policy.workloads.iter().flatten().any(|selector| matches!(selector, WorkloadSelector::Pod(_)));
    let at = Span { line: policy.at.line, column: policy.at.column, length: 0 };
    selects_pods.then(|| {
        let says = format!("{} selects pods, and nobody tells who they are", policy.object);
        Finding::at(Code::UnknownPods, &policy.at.file, at, says)
            .with_path("spec.workloads")
            .with_help("run the agent with `--kubernetes`, or select by `cgroup`, `unit` or `user`")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::load::load_text;

    #[test]
    fn a_policy_that_selects_pods_needs_somebody_who_knows_them() {
        let found = |workloads: &str| {
            let head = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: p }\n";
            let text = format!("{head}spec: {{ workloads: [ {workloads} ] }}\n");
            selects_unknown_pods(&load_text("p.yaml", &text).policies.egress_policies[0]).map(|found| found.code)
        };
        assert_eq!(found("{ unit: a.service }, { user: 0 }, { pod: {} }, { cgroup: a }"), Some(Code::UnknownPods));
        assert_eq!(found("{ unit: a.service }, { user: 0 }, { cgroup: a }"), None);
    }
}
