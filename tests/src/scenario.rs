//! The reason the project exists: a ratings service and a MySQL server outside the cluster.
//!
//! Two network namespaces joined by a pair of interfaces: the workload's, and the outside with a real MariaDB server.
//! The client runs in a filtered cgroup. Used by the test and by the demo.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    agent::Agent,
    cgroup::Cgroup,
    mariadb::{Answer, Server, query},
    netns::{Netns, connect},
};

/// Where the server is; `policies/mysql-external.yaml` names it.
pub const SERVER: &str = "203.0.113.10";

/// The policy that opens it.
pub fn mysql_external() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../policies/mysql-external.yaml")
}

/// Everything the scenario needs. Fields are dropped in order: whoever uses a cgroup or namespace comes before it.
#[derive(Debug)]
pub struct Scenario {
    /// The agent, filtering the client's cgroup.
    pub agent: Agent,
    _server: Server,
    policies: TempDir,
    /// The client's cgroup.
    pub cgroup: Cgroup,
    /// The client's network.
    pub workload: Netns,
    _outside: Netns,
}

impl Scenario {
    /// Sets all of it up, with an empty policy directory.
    pub fn start() -> Result<Self> {
        Self::start_with(|policies, cgroup| Agent::start(policies, cgroup, &[]))
    }

    /// The same, with an agent that is started otherwise, for a policy directory and a cgroup.
    pub fn start_with(start: impl FnOnce(&Path, &Cgroup) -> Result<Agent>) -> Result<Self> {
        let (workload, outside) = (Netns::new()?, Netns::new()?);
        connect((&workload, "workload", "203.0.113.1/24"), (&outside, "outside", "203.0.113.10/24"))?;
        let server = Server::start(&outside, SERVER)?;
        let cgroup = Cgroup::new()?;
        let policies = tempfile::Builder::new().prefix("egress-policies-").tempdir()?;
        let agent = start(policies.path(), &cgroup)?;
        Ok(Self { agent, _server: server, policies, cgroup, workload, _outside: outside })
    }

    /// The client asks for the ratings.
    pub fn ask(&self) -> Result<Answer> {
        query(&self.cgroup, &self.workload, SERVER)
    }

    /// The client asks and must be refused; what it said, and the denial.
    pub fn ask_in_vain(&mut self) -> Result<(String, Value)> {
        self.refused(self.ask()?)
    }

    /// The same of a client that has asked already.
    pub fn refused(&mut self, answer: Answer) -> Result<(String, Value)> {
        match answer {
            Answer::Error(said) => Ok((said, self.agent.denial().context("refused, but not by the filter")?)),
            Answer::Ratings(ratings) => bail!("the client was let through and got {ratings}"),
        }
    }

    /// Drops the policy in; returns once it is in force.
    pub fn add_policy(&mut self, generation: u64) -> Result<()> {
        // Written elsewhere and renamed, as careful tools do.
        let draft = self.policies.path().join(".draft");
        fs::copy(mysql_external(), &draft)?;
        fs::rename(draft, self.policy())?;
        self.applied(generation)
    }

    /// Removes the policy; returns once it is no longer in force.
    pub fn remove_policy(&mut self, generation: u64) -> Result<()> {
        fs::remove_file(self.policy())?;
        self.applied(generation)
    }

    fn policy(&self) -> PathBuf {
        self.policies.path().join("mysql-external.yaml")
    }

    fn applied(&mut self, generation: u64) -> Result<()> {
        self.agent.wait_for(&format!("policy applied generation={generation} ")).map(drop)
    }
}
