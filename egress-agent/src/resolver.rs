//! Resolves the exact host names that policies use, and keeps their addresses current.
//!
//! The hosts file comes first, then DNS, A and AAAA at the same time. A name is asked for again before its records end.
//! What is known is never given up because nobody answers. Who serves a name may choose among public addresses only:
//! those of this host and link are refused.
//!
//! Time is that of tokio, and whoever answers is behind a trait, so that all of this is tested without waiting.

use std::{
    collections::{BTreeSet, HashMap},
    future::pending,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use hickory_resolver::net::NetError;
use thiserror::Error;
use tokio::{
    task::{Id, JoinError, JoinSet},
    time::{Instant, sleep_until, timeout},
};

use crate::{compile::Names, resolv, run::chain};
use ask::{Answers, Ask};
use dns::Dns;
use hosts::Hosts;
pub use report::{NameReport, Source};
use table::Table;
use timing::Timing;

mod ask;
mod dns;
mod entry;
mod hosts;
mod report;
mod table;
#[cfg(test)]
mod tests;
mod timing;

/// Names that are asked for at the same time, each with two queries.
const MOST_ASKING: usize = 32;

/// Where and how names are resolved.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Who is asked; nobody named stands for the servers in `resolv_conf`.
    pub servers: Vec<SocketAddr>,
    /// No name is asked for again sooner.
    pub floor: Duration,
    /// How long an address stays that left the answer.
    pub grace: Duration,
    /// How long one query may take.
    pub timeout: Duration,
    /// The file of names that nobody is asked for.
    pub hosts: PathBuf,
    /// Where the system's servers are named.
    pub resolv_conf: PathBuf,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            floor: Duration::from_secs(5),
            grace: Duration::from_mins(5),
            timeout: Duration::from_secs(2),
            hosts: "/etc/hosts".into(),
            resolv_conf: resolv::RESOLV_CONF.into(),
        }
    }
}

/// Why names cannot be resolved at all.
#[derive(Debug, Error)]
pub enum ResolverError {
    /// The system's servers are not known.
    #[error("cannot read {}", path.display())]
    System {
        /// The file that names them.
        path: PathBuf,
        /// Why.
        #[source]
        cause: io::Error,
    },
    /// A server cannot be asked.
    #[error("cannot ask the DNS server {server}")]
    Server {
        /// Which.
        server: SocketAddr,
        /// Why.
        #[source]
        cause: NetError,
    },
}

/// Resolves names. Works while it is waited for; questions that are under way go on meanwhile.
pub struct Resolver {
    settings: Settings,
    servers: Vec<SocketAddr>,
    dns: Box<dyn Ask + Send>,
    hosts: Hosts,
    /// When the hosts file is looked at again. Its names have no end of their own, so one look at the file, as often as
    /// the floor allows, serves them all; and a name that gets into the file need not wait for its records to end.
    hosts_due: Instant,
    table: Table,
    asking: JoinSet<Answers>,
    names: HashMap<Id, Arc<str>>,
}

impl Resolver {
    /// Reads the system's configuration and the hosts file; asks nothing yet.
    pub fn new(settings: Settings) -> Result<Self, ResolverError> {
        let servers = servers(&settings)?;
        let dns = Dns::new(&servers, settings.timeout)?;
        Ok(Self::with(settings, servers, Box::new(dns)))
    }

    /// A resolver of these names, and what is known of them after each was answered or failed once, or after `limit`.
    pub async fn start(
        settings: Settings,
        names: BTreeSet<String>,
        limit: Duration,
    ) -> Result<(Self, Names), ResolverError> {
        let mut resolver = Self::new(settings)?;
        resolver.want(names);
        resolver.first_answers(limit).await;
        let names = resolver.names();
        Ok((resolver, names))
    }

    fn with(settings: Settings, servers: Vec<SocketAddr>, dns: Box<dyn Ask + Send>) -> Self {
        let timing = Timing::new(settings.floor, settings.grace);
        Self {
            servers,
            dns,
            hosts: Hosts::read(settings.hosts.clone()),
            hosts_due: Instant::now() + timing.floor(),
            table: Table::new(timing),
            asking: JoinSet::new(),
            names: HashMap::new(),
            settings,
        }
    }

    /// The names wanted from now on, in lower case and without trailing dot. New ones are asked for at once, those no
    /// longer wanted are forgotten.
    #[expect(clippy::needless_pass_by_value, reason = "who wants other names has no use for the set")]
    pub fn want(&mut self, names: BTreeSet<String>) {
        self.table.want(&names, &self.hosts, Instant::now());
    }

    /// Waits until every wanted name was answered or failed once, at most `limit`.
    pub async fn first_answers(&mut self, limit: Duration) {
        let answered = async {
            loop {
                self.turn(Instant::now());
                if self.table.is_answered() {
                    return;
                }
                self.wait().await;
            }
        };
        if timeout(limit, answered).await.is_err() {
            let unanswered = self.table.entries().filter(|entry| !entry.is_answered()).count();
            tracing::warn!(unanswered, limit = ?limit, "names are still being resolved");
        }
    }

    /// Waits until the addresses of some wanted name are other than they were at the last call of [`Self::names`].
    /// Nothing is lost when it is dropped before that.
    pub async fn changed(&mut self) {
        loop {
            self.turn(Instant::now());
            if self.table.is_changed() {
                return;
            }
            self.wait().await;
        }
    }

    /// What is known now.
    pub fn names(&mut self) -> Names {
        self.table.names()
    }

    /// What is known now, for people.
    pub fn report(&self) -> Vec<NameReport> {
        let (now, clock) = (Instant::now(), SystemTime::now());
        self.table.entries().map(|entry| NameReport::new(entry, now, clock)).collect()
    }

    /// Reads the system's configuration again. If it names other servers, every name is asked for again; if it cannot be
    /// read, those that were stay.
    pub fn reread_system(&mut self) {
        if let Err(error) = self.take_system() {
            tracing::error!(error = %chain(&error), "the DNS servers stay as they were");
        }
    }

    fn take_system(&mut self) -> Result<(), ResolverError> {
        let servers = servers(&self.settings)?;
        if servers != self.servers {
            let dns = Dns::new(&servers, self.settings.timeout)?;
            self.ask_others(servers, Box::new(dns));
        }
        Ok(())
    }

    fn ask_others(&mut self, servers: Vec<SocketAddr>, dns: Box<dyn Ask + Send>) {
        self.dns = dns;
        tracing::info!(servers = ?servers, "names are resolved by other servers");
        self.servers = servers;
        self.asking = JoinSet::new();
        self.names.clear();
        self.table.ask_again(Instant::now());
    }

    /// Waits for the next thing to happen. May be dropped while it does.
    async fn wait(&mut self) {
        let wake = self.wake();
        tokio::select! {
            Some(done) = self.asking.join_next_with_id() => self.finish(done),
            () = at(wake) => {}
        }
    }

    /// Does what is due.
    fn turn(&mut self, now: Instant) {
        if self.hosts_due <= now {
            self.hosts_due = now + self.table.floor();
            if self.hosts.refresh() {
                self.table.take_hosts(&self.hosts, now);
            }
        }
        self.table.turn(now);
        while self.asking.len() < MOST_ASKING
            && let Some(name) = self.table.next()
        {
            let task = self.asking.spawn(self.dns.ask(name.clone()));
            self.names.insert(task.id(), name);
        }
    }

    fn wake(&self) -> Option<Instant> {
        let look_at_hosts = (!self.table.is_empty()).then_some(self.hosts_due);
        self.table.wake().into_iter().chain(look_at_hosts).min()
    }

    fn finish(&mut self, done: Result<(Id, Answers), JoinError>) {
        let (id, answers) = match done {
            Ok(done) => done,
            Err(error) => (error.id(), Answers::failed(&format!("the question was given up: {error}"))),
        };
        if let Some(name) = self.names.remove(&id) {
            self.table.answer(&name, &answers, Instant::now());
        }
    }
}

fn servers(settings: &Settings) -> Result<Vec<SocketAddr>, ResolverError> {
    if !settings.servers.is_empty() {
        return Ok(settings.servers.clone());
    }
    let path: &Path = &settings.resolv_conf;
    let servers = resolv::resolvers(path).map_err(|cause| ResolverError::System { path: path.into(), cause })?;
    Ok(servers.into_iter().map(|server| (server, 53).into()).collect())
}

async fn at(wake: Option<Instant>) {
    match wake {
        Some(wake) => sleep_until(wake).await,
        None => pending().await,
    }
}
