//! A filtered process, with a policy directory and a place for pins that outlive the agents that use them.

use std::{fs, net::SocketAddr, path::PathBuf, process::Command};

use anyhow::Result;
use tempfile::TempDir;

use crate::{
    agent::{Agent, Place, run_command},
    cgroup::Cgroup,
    dial::{Call, Dialer, Method},
    netns::Netns,
    program,
};

/// What stays when agents come and go. Each destination answers at once, at whatever port.
#[derive(Debug)]
pub struct World {
    /// In the cgroup.
    pub dialer: Dialer,
    /// Dropped after the processes, so that nothing is in force any more.
    pub place: Place,
    /// Every address is local.
    pub namespace: Netns,
    /// What agents filter.
    pub cgroup: Cgroup,
    /// What agents read.
    pub policies: TempDir,
}

impl World {
    /// With a policy that opens only these addresses.
    pub fn opening(addresses: &[&str]) -> Result<Self> {
        let (cgroup, namespace) = (Cgroup::new()?, Netns::with_every_address_local()?);
        let dialer = Dialer::start(program("dial")?, &cgroup, &namespace)?;
        let policies = tempfile::tempdir()?;
        let world = Self { dialer, place: Place::new()?, namespace, cgroup, policies };
        world.open_only(addresses)?;
        Ok(world)
    }

    /// Writes a policy that opens only these addresses, at every port.
    pub fn open_only(&self, addresses: &[&str]) -> Result<()> {
        self.write(&opening(addresses))
    }

    /// Writes the policy file. Nobody sees half of it.
    pub fn write(&self, text: &str) -> Result<()> {
        fs::write(self.policies.path().join(".next"), text)?;
        Ok(fs::rename(self.policies.path().join(".next"), self.policies.path().join("policy.yaml"))?)
    }

    /// `run` as [`World::start`] does it.
    pub fn command(&self, more: &[&str]) -> Result<Command> {
        run_command(self.policies.path(), self.cgroup.path(), more)
    }

    /// Starts an agent and waits until its policy is in force.
    pub fn start(&self, more: &[&str]) -> Result<Agent> {
        Agent::start_in(&self.place, self.policies.path(), &self.cgroup, more)
    }

    /// Starts an agent and does not wait.
    pub fn spawn(&self, more: &[&str]) -> Result<Agent> {
        Agent::spawn_in(Some(&self.place), self.command(more)?)
    }

    /// The exit status and the log of an agent that ends by itself.
    pub fn outcome(&self, more: &[&str]) -> Result<(Option<i32>, String)> {
        let mut agent = self.spawn(more)?;
        let status = agent.exit_status()?;
        Ok((status.code(), agent.rest()?.1.join("\n")))
    }

    /// The exit status and the words of `detach`.
    pub fn detach(&self) -> Result<(Option<i32>, String)> {
        let output = self.place.output(&["detach"])?;
        Ok((output.status.code(), String::from_utf8(output.stderr)?))
    }

    /// Whether a process in the cgroup reaches an address.
    pub fn is_open(&mut self, address: &str) -> Result<bool> {
        Ok(!self.dialer.is_refused(&tcp(address, 80))?)
    }

    /// The directory of a set of pins, or another thing in the pin directory.
    pub fn pin(&self, name: &str) -> PathBuf {
        self.place.pins().join(name)
    }
}

/// A policy that opens only these addresses, at every port.
pub fn opening(addresses: &[&str]) -> String {
    let to: Vec<String> = addresses.iter().map(|address| format!("{{ cidr: {address} }}")).collect();
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec:\n  dns: {{ servers: None }}\n  \
         allow:\n  - to: [{}]\n",
        to.join(", ")
    )
}

/// A connection to an address.
pub fn tcp(address: &str, port: u16) -> Call {
    let address = address.parse().expect("tests name addresses");
    Call { method: Method::TcpConnect, mapped: false, to: SocketAddr::new(address, port) }
}
