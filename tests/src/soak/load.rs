//! What makes load, each on a thread of its own.

use std::{
    ffi::OsStr,
    fs,
    net::SocketAddr,
    os::unix::ffi::OsStrExt,
    thread::{self, ScopedJoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use super::{stage::Stage, supervisor::Supervisor, table::Table};
use crate::{
    actor::Actor,
    cgroup::Cgroup,
    dial::{Call, Dialer, Method, Timed},
    flood::{Flood, Kind},
    program,
    world::World,
};

/// No policy of those that take turns opens it.
const NEVER: &str = "203.0.113.9";
/// Refusals of the neighbour in one round.
const ROUND: u16 = 400;
/// How soon each of them is to be reported.
const MAX_DELAY: Duration = Duration::from_secs(1);
/// How soon `status` is to answer, its process included.
const MAX_STATUS: Duration = Duration::from_millis(500);
/// How deep the chain of cgroups is in which one of the floods lives.
const DEEP: usize = 200;
/// How long a process lives that makes each report of it dear.
const HOSTILE: Duration = Duration::from_secs(3);

/// The cgroups of the load, below the one that is filtered.
pub struct Site {
    pub world: World,
    pub hammer: Cgroup,
    floods: [Cgroup; 2],
    deep: Vec<Cgroup>,
    hostile: Cgroup,
    neighbour: Cgroup,
    churn: Cgroup,
    udp: Cgroup,
}

impl Site {
    /// With nothing running in it.
    pub fn new() -> Result<Self> {
        let world = World::opening(&[])?;
        let child = |name| world.cgroup.child(name);
        let top = child("deep")?;
        let below = top.nested(DEEP)?;
        Ok(Self {
            hammer: child("hammer")?,
            floods: [child("flood-1")?, child("flood-2")?],
            deep: [top].into_iter().chain(below).collect(),
            hostile: child("hostile")?,
            neighbour: child("neighbour")?,
            churn: child("churn")?,
            udp: child("udp")?,
            world,
        })
    }
}

/// What all workers share.
#[derive(Clone, Copy)]
pub struct Workers<'a> {
    pub site: &'a Site,
    pub stage: &'a Stage,
    pub table: &'a Table,
    pub supervisor: &'a Supervisor,
}

type Running<'scope> = ScopedJoinHandle<'scope, Result<()>>;

impl<'a> Workers<'a> {
    /// Starts all of them.
    pub fn start<'scope>(&self, scope: &'scope thread::Scope<'scope, '_>) -> Result<Vec<Running<'scope>>>
    where
        'a: 'scope,
    {
        let workers = *self;
        // A worker that fails ends all of it.
        let watched = move |result: Result<()>| result.inspect_err(|_| workers.stage.stop());
        let deepest = self.site.deep.last().unwrap_or(&self.site.churn);
        let mut running = Vec::new();
        for cgroup in self.site.floods.iter().chain([deepest]) {
            let dialer = self.dialer(cgroup)?;
            running.push(scope.spawn(move || watched(workers.flood(dialer))));
        }
        let (dialer, heard) = (self.dialer(&self.site.neighbour)?, self.supervisor.listen(self.site.neighbour.name()));
        running.push(scope.spawn(move || watched(workers.be_neighbour(dialer, &heard))));
        running.push(scope.spawn(move || watched(workers.be_hostile())));
        running.push(scope.spawn(move || watched(workers.churn_cgroups())));
        running.push(scope.spawn(move || watched(workers.churn_policies())));
        running.push(scope.spawn(move || watched(workers.answer_peers())));
        running.push(scope.spawn(move || watched(workers.ask_status())));
        Ok(running)
    }

    fn dialer(&self, cgroup: &Cgroup) -> Result<Dialer> {
        Dialer::start(program("dial")?, cgroup, &self.site.world.namespace)
    }

    /// Is refused as often as it can.
    fn flood(self, mut dialer: Dialer) -> Result<()> {
        let worker = self.stage.worker();
        let call = call(Method::UdpConnect, 80)?;
        while worker.goes_on() {
            dialer.time(Timed::Connect, &call, 20_000)?;
        }
        Ok(())
    }

    /// One after another, processes whose arguments make each report dear.
    fn be_hostile(self) -> Result<()> {
        let worker = self.stage.worker();
        let mut lived = 0_u64;
        let kinds = [Kind::DeclaredArguments, Kind::Arguments, Kind::Names].into_iter().cycle();
        for kind in kinds.take_while(|_| worker.goes_on()) {
            let _flood = Flood::start(kind, &self.site.hostile, &self.site.world.namespace)?;
            thread::sleep(HOSTILE);
            lived += 1;
        }
        self.table.count("hostile processes", lived);
        Ok(())
    }

    /// Is refused some hundred times beside the floods, and expects that each is reported in time.
    fn be_neighbour(
        self,
        mut dialer: Dialer,
        heard: &std::sync::mpsc::Receiver<super::supervisor::Heard>,
    ) -> Result<()> {
        let worker = self.stage.worker();
        while worker.goes_on() {
            self.supervisor.undisturbed(|| self.one_round(&mut dialer, heard))?;
            thread::sleep(Duration::from_secs(1));
        }
        Ok(())
    }

    fn one_round(self, dialer: &mut Dialer, heard: &std::sync::mpsc::Receiver<super::supervisor::Heard>) -> Result<()> {
        heard.try_iter().for_each(drop);
        for port in 0..ROUND {
            ensure!(dialer.is_refused(&call(Method::UdpConnect, 4000 + port)?)?, "a refused destination is open");
        }
        let end = Instant::now();
        let deadline = end + self.table.slow(Duration::from_secs(10));
        let (mut missing, mut last) = (ROUND, end);
        while missing > 0
            && let Ok((at, _)) = heard.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            (missing, last) = (missing - 1, at);
        }
        self.table.expect_none("reports of the neighbour that are missing", missing.into(), "after ten seconds");
        self.table.at_most("delay of the neighbour's reports", last.saturating_duration_since(end), MAX_DELAY);
        Ok(())
    }

    /// Cgroups come with a short process that is refused, and go; some have names that are no text.
    fn churn_cgroups(self) -> Result<()> {
        let worker = self.stage.worker();
        let mut number = 0_u64;
        while worker.goes_on() {
            number += 1;
            let mut name = format!("job-{}", number % 50).into_bytes();
            if number.is_multiple_of(3) {
                name.extend(b"\xff\x1b[31m");
            }
            let cgroup = self.site.churn.child(OsStr::from_bytes(&name))?;
            let mut dialer = self.dialer(&cgroup)?;
            ensure!(dialer.is_refused(&call(Method::TcpConnect, 80)?)?, "a refused destination is open");
        }
        self.table.count("cgroups that came and went", number);
        Ok(())
    }

    /// Policies for some of those cgroups come and go. None of them opens what is never open.
    fn churn_policies(self) -> Result<()> {
        let worker = self.stage.worker();
        let file = |number: u64| self.site.world.policies.path().join(format!("churn-{}.yaml", number % 20));
        let mut number = 0_u64;
        while worker.goes_on() {
            number += 1;
            if number.is_multiple_of(3) {
                // The first ones are not there yet.
                let _ = fs::remove_file(file(number / 3));
            } else {
                fs::write(file(number), policy(number))?;
            }
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// A UDP server answers everybody whom it heard, whatever happens to the agent meanwhile.
    fn answer_peers(self) -> Result<()> {
        let worker = self.stage.worker();
        let namespace = &self.site.world.namespace;
        let at: SocketAddr = "192.0.2.200:5060".parse()?;
        let mut server = Actor::start(namespace, &self.site.udp, None)?;
        server.serve_udp(at)?;
        let (mut answers, mut refused) = (0_u64, 0_u64);
        while worker.goes_on() {
            let peer = SocketAddr::new([198, 51, 100, u8::try_from(answers % 250)? + 1].into(), 1024);
            let client = namespace.run(|| std::net::UdpSocket::bind(peer))??;
            client.send_to(b"?", at)?;
            let from = server.receive()?;
            refused += u64::from(server.send_with_made_socket(from)?.is_err());
            answers += 1;
            thread::sleep(Duration::from_millis(10));
        }
        self.table.count("answers to UDP peers", answers);
        self.table.expect_none("answers to UDP peers that were refused", refused, "");
        Ok(())
    }

    /// `status` answers at once, and never that nothing is in force.
    fn ask_status(self) -> Result<()> {
        let worker = self.stage.worker();
        while worker.goes_on() {
            self.supervisor.while_alive(|| {
                let begun = Instant::now();
                let (code, status) = self.site.world.place.status()?;
                self.table.at_most("time of status", begun.elapsed(), MAX_STATUS);
                let is_enforcing = matches!(code, Some(0 | 1));
                self.table.expect_none("status without enforcement", u64::from(!is_enforcing), &status.to_string());
                anyhow::Ok(())
            })?;
            thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }
}

fn call(method: Method, port: u16) -> Result<Call> {
    Ok(Call { method, mapped: false, to: SocketAddr::new(NEVER.parse()?, port) })
}

fn policy(number: u64) -> String {
    let mode = if number.is_multiple_of(2) { "Audit" } else { "Enforce" };
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: churn-{} }}\n\
         spec: {{ workloads: [{{ cgroup: '**/job-{}' }}], mode: {mode}, deny: [{{ to: [{{ cidr: 203.0.113.{} }}] }}] }}\n",
        number % 20,
        number % 50,
        number % 200
    )
}
