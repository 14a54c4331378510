//! Policy files, read and compiled for the daemon: watched before they are read, and reported on as they are.

use std::path::{Path, PathBuf};

use crate::{
    cli::RunArgs,
    compile::{Context, Names, NodeDefault, combine::service_statements, compile},
    policy::{
        PolicySet,
        diagnostic::{Finding, Severity},
        egress_policy::unbuilt::unsupported,
        load::{LoadError, LoadOptions, Loaded, load, watched},
    },
    resolv,
    ruleset::Ruleset,
    run::{RunError, system},
    watch::Watch,
    workload::Workload,
};

/// Where policies come from.
pub(crate) struct Source {
    paths: Vec<PathBuf>,
    options: LoadOptions,
    node_default: NodeDefault,
    /// Where changes are noticed.
    pub(crate) watch: Watch,
}

impl Source {
    /// As the command line says; nothing is read yet.
    pub(crate) fn new(args: &RunArgs) -> Result<Self, RunError> {
        Ok(Self {
            paths: args.policies.clone(),
            options: LoadOptions { require_root_owned: !args.allow_writable_policies, follow: true },
            node_default: NodeDefault { action: args.default, loopback: !args.no_loopback, dns: !args.no_dns },
            watch: Watch::new().map_err(system("cannot watch policy files"))?,
        })
    }

    /// Reads and compiles.
    pub(crate) fn read(&mut self) -> Result<(Loaded, Ruleset), RunError> {
        let loaded = self.load()?;
        let unbuilt: Vec<Finding> = loaded.policies.egress_policies.iter().flat_map(unsupported).collect();
        let findings = || loaded.findings.iter().chain(&unbuilt);
        findings().for_each(report);
        let errors = findings().filter(|finding| finding.severity == Severity::Error).count();
        if errors > 0 {
            return Err(RunError::Invalid { errors });
        }
        warn_of_names(&loaded.policies);
        let resolv_conf = Path::new(resolv::RESOLV_CONF);
        let system_resolvers = resolv::resolvers(resolv_conf).map_err(system("cannot read /etc/resolv.conf"))?;
        let context = Context { node_default: self.node_default, system_resolvers, names: Names::default() };
        let ruleset = compile(&loaded.policies, &Workload::default(), &context)?;
        Ok((loaded, ruleset))
    }

    /// What is read is watched first, so that no change is missed. A directory that appeared meanwhile was read, perhaps,
    /// and not watched: then all is read again.
    fn load(&mut self) -> Result<Loaded, LoadError> {
        let paths: Vec<PathBuf> = self.paths.iter().cloned().chain([resolv::RESOLV_CONF.into()]).collect();
        loop {
            let seen = watched(&paths);
            if let Err(error) = self.watch.set(seen.clone()) {
                tracing::error!(%error, "cannot watch policy files; see fs.inotify.max_user_watches. Changes need SIGHUP");
            }
            let loaded = load(&self.paths, &self.options);
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

/// Names are not resolved: an entry that has nothing else opens nothing.
fn warn_of_names(policies: &PolicySet) {
    for entry in &policies.service_entries {
        if service_statements(entry, &Names::default()).all(|statement| statement.parts.is_empty()) {
            let hosts: Vec<String> = entry.hosts.iter().map(ToString::to_string).collect();
            tracing::warn!(
                entry = %entry.object, at = %entry.at, hosts = hosts.join(","),
                "names are not resolved: this entry has no addresses and opens nothing"
            );
        }
    }
}
