//! Policy files, read for the daemon: watched before they are read, and reported on as they are.

use std::{
    collections::BTreeSet,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    compile::{Context, Names, NodeDefault, combine::dialled_names},
    policy::{
        HostPattern, PolicySet, User,
        diagnostic::{Finding, Severity},
        egress_policy::unbuilt::unsupported,
        load::{LoadError, LoadOptions, Loaded, load, watched},
    },
    resolv,
    run::{RunError, system},
    scopes::{Selector, UnknownWorkloads},
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
}

/// Where policies come from.
pub(crate) struct Source {
    options: SourceOptions,
    /// Where changes are noticed.
    pub(crate) watch: Watch,
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
}

impl Source {
    /// Nothing is read yet. Must be called in a tokio runtime.
    pub(crate) fn new(options: SourceOptions) -> Result<Self, RunError> {
        Ok(Self { options, watch: Watch::new().map_err(system("cannot watch policy files"))? })
    }

    /// Reads, and tells of every finding.
    pub(crate) fn read(&mut self) -> Result<Policy, RunError> {
        Self::accept(self.load()?)
    }

    /// Takes documents if they are valid, and tells of every finding.
    pub(crate) fn accept(loaded: Loaded) -> Result<Policy, RunError> {
        let unbuilt: Vec<Finding> = loaded.policies.egress_policies.iter().flat_map(unsupported).collect();
        let findings = || loaded.findings.iter().chain(&unbuilt);
        findings().for_each(report);
        let errors = findings().filter(|finding| finding.severity == Severity::Error).count();
        if errors > 0 {
            return Err(RunError::Invalid { errors });
        }
        let resolv_conf = Path::new(resolv::RESOLV_CONF);
        let system_resolvers = resolv::resolvers(resolv_conf).map_err(system("cannot read /etc/resolv.conf"))?;
        let (names, wildcards) = names(&loaded.policies);
        let users = users(&loaded.policies);
        Ok(Policy {
            documents: loaded.documents,
            set: Arc::new(loaded.policies),
            system_resolvers,
            users,
            names,
            wildcards,
        })
    }

    /// What rules depend on besides the documents.
    pub(crate) fn context(&self, policy: &Policy, names: Names) -> Context {
        let (node_default, system_resolvers) = (self.options.node_default, policy.system_resolvers.clone());
        Context { node_default, system_resolvers, names }
    }

    /// Places workloads by these policies and what is known of their names.
    pub(crate) fn selector(&self, policy: &Policy, names: Names) -> Selector {
        let context = self.context(policy, names);
        Selector::new(policy.set.clone(), context, self.options.unknown, policy.users.clone())
    }

    /// What is read is watched first, so that no change is missed. A directory that appeared meanwhile was read, perhaps,
    /// and not watched: then all is read again.
    fn load(&mut self) -> Result<Loaded, LoadError> {
        let beside = [resolv::RESOLV_CONF, PASSWD].map(PathBuf::from);
        let paths: Vec<PathBuf> = self.options.paths.iter().cloned().chain(beside).collect();
        loop {
            let seen = watched(&paths);
            if let Err(error) = self.watch.set(seen.clone()) {
                tracing::error!(%error, "cannot watch policy files; see fs.inotify.max_user_watches. Changes need SIGHUP");
            }
            let loaded = load(&self.options.paths, &self.options.load);
            if watched(&paths) == seen {
                return loaded;
            }
        }
    }
}

fn report(finding: &Finding) {
    let (code, file, line, column) = (finding.code.as_str(), finding.file.display(), finding.line, finding.column);
    let (path, help) = (&finding.path, finding.help.as_deref().unwrap_or_default());
    match finding.severity {
        Severity::Error => tracing::error!(%code, %file, line, column, %path, help, "{}", finding.message),
        Severity::Warning => tracing::warn!(%code, %file, line, column, %path, help, "{}", finding.message),
        Severity::Note => tracing::info!(%code, %file, line, column, %path, help, "{}", finding.message),
    }
}

/// The names that can be resolved, and the patterns that cannot; a warning for each of these.
fn names(policies: &PolicySet) -> (BTreeSet<String>, Vec<(String, String)>) {
    let (mut names, mut wildcards) = (BTreeSet::new(), Vec::new());
    for (object, pattern) in dialled_names(policies) {
        match pattern {
            HostPattern::Exact(name) => drop(names.insert(name)),
            HostPattern::Below(_) | HostPattern::Ending(_) => {
                tracing::warn!(document = %object, host = %pattern, "a wildcard cannot be resolved: it opens nothing");
                wildcards.push((pattern.to_string(), object.to_string()));
            }
        }
    }
    (names, wildcards)
}

/// The users that policies select by, in both forms; a warning for those that are not known here.
fn users(policies: &PolicySet) -> Vec<UserIdentity> {
    let known = Users::read(Path::new(PASSWD));
    let identity = |user: &User| match user {
        User::Uid(uid) => known.identity(&uid.to_string()),
        User::Name(name) => known.identity(name),
    };
    let mut users: Vec<UserIdentity> = selected_users(policies).map(identity).collect();
    users.retain(|user| {
        if user.uid.is_none() {
            let name = user.name.as_deref().unwrap_or_default();
            tracing::warn!(user = name, "no such user in {PASSWD}: what selects it selects nobody");
        }
        user.uid.is_some()
    });
    users.sort_by_key(|user| user.uid);
    users.dedup();
    users
}
