//! A soak: floods, churn of cgroups and policies, kills, readers that stall and hostile processes side by side, against
//! invariants that hold at every moment.
//!
//! An agent lives for some seconds, then it is killed or asked to stop, and the next one takes over; the load goes on all the
//! time. Within each life, its readers stall for a while, and the load pauses once, so that every refusal can be accounted for.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow, ensure};
use rustix::process::Signal;

mod load;
mod stage;
mod supervisor;
mod table;

use load::{Site, Workers};
use stage::Stage;
use supervisor::{Outlet, Supervisor};
pub use table::Table;

use crate::{
    alternation::{SPECS, expected, policies, text},
    hammer::Hammer,
};

/// How long, and on what machine.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How long the load lasts.
    pub time: Duration,
    /// How many times longer than on ordinary hardware anything may take, as under emulation.
    pub slowness: u32,
}

/// How long one agent lives, about.
const LIFE: Duration = Duration::from_secs(24);
/// How long a reader stalls.
const STALL: Duration = Duration::from_secs(3);
/// How long one policy is in force, about.
const TURN: Duration = Duration::from_millis(500);
/// How long an agent may take to end after SIGTERM.
const MAX_STOP: Duration = Duration::from_secs(1);
/// Resident memory of an agent at its peak, in kB.
const MAX_MEMORY: u64 = 64 * 1024;
/// Open descriptors of an agent.
const MAX_DESCRIPTORS: u64 = 256;

/// Runs it. The table says what was seen of each invariant, and which did not hold.
pub fn soak(options: Options) -> Result<Table> {
    let site = Site::new()?;
    site.world.write(&text(SPECS[0]))?;
    let (stage, table) = (Stage::default(), Table::new(options.slowness));
    let supervisor = Supervisor::start(&site.world)?;
    let hammer = Hammer::start(&site.hammer, &site.world.namespace, 2, &expected(&policies()?))?;
    let end = Instant::now() + options.time;
    let lives = thread::scope(|scope| {
        let workers = Workers { site: &site, stage: &stage, table: &table, supervisor: &supervisor };
        let started = workers.start(scope);
        let hammer = &hammer;
        let turns = scope.spawn(move || take_turns(workers, hammer));
        let lives = started.as_ref().map_err(|error| anyhow!("{error:#}")).and_then(|_| live(workers, end));
        stage.stop();
        let running = started.unwrap_or_default().into_iter().chain([turns]);
        let joined = running.map(|worker| worker.join().map_err(|_| anyhow!("a worker panicked"))?);
        joined.collect::<Result<()>>().and(lives)
    })?;
    let tally = hammer.finish()?;
    table.count("verdicts", tally.calls);
    table.expect_none("verdicts of neither policy", tally.wrong, &tally.first);
    table.count("agents that lived", lives);
    drop(supervisor);
    let (code, said) = site.world.detach()?;
    ensure!(code == Some(0), "detach fails: {said}");
    Ok(table)
}

/// One agent after another, until the time is up.
fn live(workers: Workers<'_>, end: Instant) -> Result<u64> {
    let mut lives = 0;
    loop {
        lives += 1;
        let is_last = Instant::now() + LIFE >= end;
        for outlet in [Outlet::Stdout, Outlet::Stderr] {
            thread::sleep(LIFE / 4);
            workers.supervisor.stall(outlet, STALL);
        }
        thread::sleep(LIFE / 4);
        account(workers)?;
        if is_last || !workers.stage.goes_on() {
            return Ok(lives);
        }
        let signal = if lives % 2 == 0 { Signal::KILL } else { Signal::TERM };
        let took = workers.supervisor.replace(&workers.site.world, signal)?;
        if signal == Signal::TERM {
            workers.table.at_most("time to stop", took, MAX_STOP);
        }
    }
}

/// While the load pauses: each refusal is a line that was read, or a report that is counted as lost.
fn account(workers: Workers<'_>) -> Result<()> {
    let Workers { site, stage, table, supervisor } = workers;
    let _resting = stage.rest();
    let account = supervisor.settle(&site.world.place, table.slow(Duration::from_secs(20)))?;
    table.expect_none("refusals without a report that no count tells of", account.missing, &format!("{account:?}"));
    table.count("refusals", account.refused);
    table.count("reports lost, and counted", account.lost);
    table.number_at_most("resident memory at the peak, kB", supervisor.peak_memory()?, MAX_MEMORY);
    table.number_at_most("open descriptors", supervisor.descriptors()?, MAX_DESCRIPTORS);
    Ok(())
}

/// Policies take turns, and the hammer knows when.
fn take_turns(workers: Workers<'_>, hammer: &Hammer) -> Result<()> {
    let Workers { site, stage, table, supervisor } = workers;
    let mut number = 0;
    while stage.goes_on() {
        number += 1;
        hammer.begin(number);
        site.world.write(&text(SPECS[usize::try_from(number)? % SPECS.len()]))?;
        let output = supervisor.while_alive(|| site.world.place.output(&["reload", "--wait"]))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        table.expect_none("reloads that failed", u64::from(!output.status.success()), &said);
        hammer.done(number);
        thread::sleep(TURN);
    }
    table.count("changes of policy", number);
    Ok(())
}
