//! Servers of DNS that tests write, and a filtered process that asks them.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    net::{IpAddr, SocketAddr},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::{
    agent::{Agent, Place, run_command},
    asker::{self, Asker, Heard, Transport},
    cgroup::Cgroup,
    netns::{Netns, connect},
};

/// A server of this host.
pub const NEAR: &str = "127.0.0.9";
/// One that is not.
pub const FAR: &str = "192.0.2.53";
/// One of this host that speaks IPv6.
pub const SIX: &str = "2001:db8::53";

/// A filtered process in a namespace in which every address answers, and an agent that believes three servers.
#[derive(Debug)]
pub struct World {
    /// The process.
    pub asker: Asker,
    /// The agent.
    pub agent: Option<Agent>,
    /// Its place.
    pub place: Place,
    /// Where [`FAR`] is.
    pub far: Netns,
    /// Where all others are.
    pub near: Netns,
    /// The filtered cgroup.
    pub cgroup: Cgroup,
    /// The directory of the policy.
    pub policies: TempDir,
    heard: Heard,
}

/// A policy that believes the servers, and says the rest.
pub fn policy(rest: &str) -> String {
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\n\
         spec:\n  loopback: None\n  dns: {{ servers: [{NEAR}, {FAR}, '{SIX}'] }}\n{rest}"
    )
}

/// A wildcard at one port.
pub const WILDCARD: &str = "  allow: [ { to: [ { host: '*.example.com' } ], ports: [ { port: 443 } ] } ]\n";

impl World {
    /// With a policy.
    pub fn new(rest: &str) -> Self {
        Self::with(rest, &[])
    }

    /// With a policy and more arguments of the agent.
    pub fn with(rest: &str, more: &[&str]) -> Self {
        let (near, far) = (Netns::new().unwrap(), Netns::new().unwrap());
        connect((&near, "near", "192.0.2.1/24"), (&far, "far", "192.0.2.53/24")).unwrap();
        for route in ["198.18.0.0/15", "100.64.0.0/10", "169.254.0.0/16", "2001:db8::/32", "100::/64"] {
            near.ip(&["route", "add", "local", route, "dev", "lo"]).unwrap();
        }
        near.ip(&["address", "add", &format!("{SIX}/128"), "dev", "lo", "nodad"]).unwrap();
        let heard = Heard::default();
        for server in [NEAR, SIX] {
            near.run(|| asker::serve(server.parse().unwrap(), &heard)).unwrap().unwrap();
        }
        far.run(|| asker::serve(FAR.parse().unwrap(), &heard)).unwrap().unwrap();
        let (cgroup, policies) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap());
        fs::write(policies.path().join("policy.yaml"), policy(rest)).unwrap();
        let place = Place::new().unwrap();
        let asker = Asker::start(&near, &cgroup).unwrap();
        let mut world = Self { asker, agent: None, place, far, near, cgroup, policies, heard };
        world.start(more);
        world
    }

    /// Starts the agent.
    pub fn start(&mut self, more: &[&str]) {
        let run = run_command(self.policies.path(), self.cgroup.path(), more).unwrap();
        let mut command = self.near.command(run.get_program(), None).unwrap();
        command.args(run.get_args());
        let mut agent = Agent::spawn_in(Some(&self.place), command).unwrap();
        agent.wait_for("policy applied generation=1 ").unwrap();
        self.agent = Some(agent);
    }

    /// The agent, which runs.
    pub fn agent(&mut self) -> &mut Agent {
        self.agent.as_mut().unwrap()
    }

    /// Replaces the policy and waits until it is in force.
    pub fn write(&mut self, rest: &str) {
        let next = self.policies.path().join(".next");
        fs::write(&next, policy(rest)).unwrap();
        fs::rename(next, self.policies.path().join("policy.yaml")).unwrap();
        self.place.reload().unwrap();
    }

    /// Asks a server for the addresses of a name.
    pub fn ask(&mut self, transport: Transport, server: &str, name: &str) -> Vec<IpAddr> {
        self.asker.ask(transport, server.parse().unwrap(), name).unwrap()
    }

    /// Whether the filter lets a connection through.
    pub fn is_open(&mut self, address: &str, port: u16) -> bool {
        !self.asker.is_refused(SocketAddr::new(address.parse().unwrap(), port)).unwrap()
    }

    /// An order of the process.
    pub fn order(&mut self, order: &str) -> String {
        self.asker.order(order).unwrap()
    }

    /// What `status` says.
    pub fn status(&self) -> Value {
        self.place.status().unwrap().1
    }

    /// What became of answers, by a name of that.
    pub fn learnt(&self, lesson: &str) -> u64 {
        self.status()["names"]["learnt"]["answers"][lesson].as_u64().unwrap()
    }

    /// Whether any server has received some bytes.
    pub fn has_heard(&self, bytes: &[u8]) -> bool {
        self.heard.has(bytes)
    }
}
