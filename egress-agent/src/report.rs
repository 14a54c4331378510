//! Writes events to stdout or stderr, on threads of its own: a reader that stalls must never keep the agent from changing the
//! policy, and a workload that floods must not keep the reports of others back.
//!
//! One thread empties the ring buffer into a [`queue`] where workloads take turns; another completes what waits there, and
//! writes it, as fast as it is read. What finds no room, or cannot be written, is counted: see [`counts`]. So each denial is
//! written, or counted as lost, with whose it was and where.

use std::{
    collections::HashMap,
    io::{self},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use aya::maps::{MapData, RingBuf};
use egress_common::{Event, LEVELS, NameKey};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

use crate::{
    cli::Output,
    events::{Connection, Enricher, boot_clock},
    outlet::{Outlet, Stop},
    text,
};

mod counts;
mod queue;

pub use counts::{Counts, Loss, Reports, Stage, sort};
use queue::{Queue, Waiting};

/// The programs' own log.
type KernelLog = aya_log::EbpfLogger<&'static dyn log::Log>;

/// What the kernel reported: see [`Event::read`].
pub type Reported = (Event, Option<NameKey>);

/// A running reporter.
pub struct Reporter {
    drain: JoinHandle<()>,
    writer: JoinHandle<()>,
    stop: Stop,
    counts: Counts,
    shared: Arc<Shared>,
}

/// How long [`Reporter::finish`] takes at most.
const PATIENCE: Duration = Duration::from_millis(500);
/// Of which the last is for counting what is not written.
const LAST: Duration = Duration::from_millis(100);

/// Events that are read before they are queued, and those that are written before it is seen what else waits.
const BATCH: usize = 256;
/// How long the ring buffer is left alone after more came than there is room for: the kernel drops at less cost.
const REST: Duration = Duration::from_millis(10);
/// Most events that are taken from the ring buffer beyond what can be written, once it is time to stop: the others wait for the
/// next agent.
const AHEAD: usize = 1024;
/// How often losses are told.
const TELL: Duration = Duration::from_secs(1);

/// Where denials go.
pub struct Sink {
    file: OwnedFd,
    name: &'static str,
    listener: Option<Listener>,
}

/// Hears of every denial before it is written, also of those that cannot be.
pub type Listener = Box<dyn FnMut(&Connection) + Send>;

impl Sink {
    /// Data goes to stdout.
    pub fn stdout() -> io::Result<Self> {
        Ok(Self { file: io::stdout().as_fd().try_clone_to_owned()?, name: "stdout", listener: None })
    }

    /// Where stdout belongs to somebody else.
    pub fn stderr(listener: Listener) -> io::Result<Self> {
        Ok(Self { file: io::stderr().as_fd().try_clone_to_owned()?, name: "stderr", listener: Some(listener) })
    }
}

impl Reporter {
    /// Starts to report, with what was left unread before.
    pub fn start(
        events: RingBuf<MapData>,
        log: Option<KernelLog>,
        enricher: Enricher,
        output: Output,
        sink: Sink,
        backlog: Vec<Reported>,
    ) -> io::Result<Self> {
        let (stop, counts) = (Stop::new()?, Counts::default());
        counts.add_inherited(backlog.len());
        let shared = Arc::new(Shared::default());
        let Sink { file, name, listener } = sink;
        let outlet = Outlet::new(file, stop.clone())?;
        let writer = Writer {
            outlet,
            name,
            listener,
            enricher,
            output,
            counts: counts.clone(),
            stop: stop.clone(),
            folded: None,
            chunk: Chunk::default(),
            told: None,
        };
        let mut drain = Drain {
            events,
            log,
            shared: Arc::clone(&shared),
            counts: counts.clone(),
            stop: stop.clone(),
            told: (Instant::now(), 0),
        };
        let spawn = |name: &str| thread::Builder::new().name(name.to_owned());
        let waiting = Arc::clone(&shared);
        let writer = spawn("report").spawn(move || writer.run(&waiting))?;
        let drain = spawn("drain").spawn(move || {
            drain.queue(backlog.into_iter().map(Item::new));
            drain.run();
        })?;
        Ok(Self { drain, writer, stop, counts, shared })
    }

    /// What becomes of the reports.
    pub fn counts(&self) -> Counts {
        self.counts.clone()
    }

    /// Reports what is left, then stops. Gives up on a reader that does not read, and counts what it did not.
    pub fn finish(self) {
        let (now, shorter) = (Instant::now(), PATIENCE.saturating_sub(LAST));
        let deadline = now + PATIENCE;
        let before = self.counts.lost(Stage::Output);
        self.stop.tell(now + shorter);
        let is_finished = || self.drain.is_finished() && self.writer.is_finished();
        while !is_finished() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        let mut waits = self.shared.lock();
        while let Some(item) = waits.queue.pop() {
            self.counts.add_lost(item.workload(), Stage::Output, 1);
        }
        drop(waits);
        let lost = self.counts.lost(Stage::Output) - before;
        if lost > 0 {
            tracing::warn!(lost, "the last denials are not reported: they are read too slowly");
        } else if !is_finished() {
            tracing::warn!("the last denials are not reported: nobody reads them");
        }
    }
}

/// A record that waits to be told.
struct Item {
    event: Event,
    /// Few have one, and it is large.
    name: Option<Box<NameKey>>,
}

impl Item {
    fn new((event, name): Reported) -> Self {
        Self { event, name: name.map(Box::new) }
    }

    const fn workload(&self) -> u64 {
        self.event.lineage().workload()
    }
}

impl Waiting for Item {
    fn lineage(&self) -> [u64; LEVELS] {
        self.event.lineage().ids()
    }

    fn size(&self) -> usize {
        size_of::<Self>() + self.name.as_ref().map_or(0, |_| size_of::<NameKey>())
    }
}

/// Between the two threads.
#[derive(Default)]
struct Shared {
    waiting: Mutex<Waits>,
    changed: Condvar,
}

#[derive(Default)]
struct Waits {
    queue: Queue<Item>,
    /// Nothing comes any more.
    is_closed: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Waits> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Empties the ring buffer.
struct Drain {
    events: RingBuf<MapData>,
    log: Option<KernelLog>,
    shared: Arc<Shared>,
    counts: Counts,
    stop: Stop,
    /// When losses were told, and how many of them.
    told: (Instant, u64),
}

impl Drain {
    fn run(&mut self) {
        let mut is_stopped = false;
        while !is_stopped {
            is_stopped = self.wait();
            if let Some(log) = &mut self.log {
                log.flush();
            }
            if is_stopped {
                self.drain_last();
            } else {
                self.drain();
            }
            self.tell();
        }
        self.shared.lock().is_closed = true;
        self.shared.changed.notify_all();
    }

    /// Waits for events; whether it was told to stop.
    fn wait(&self) -> bool {
        let mut fds = vec![PollFd::new(&self.stop, PollFlags::IN), PollFd::new(&self.events, PollFlags::IN)];
        fds.extend(self.log.as_ref().map(|log| PollFd::from_borrowed_fd(log.as_fd(), PollFlags::IN)));
        let again: Timespec = TELL.try_into().unwrap_or_default();
        loop {
            // What is not told yet is told when it is time.
            let is_told = self.told.1 == self.counts.lost(Stage::Queue);
            match poll(&mut fds, (!is_told).then_some(&again)) {
                Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(error = %errno, "cannot wait for denials; enforcement goes on without reports");
                    return true;
                }
                Ok(_) => return !fds[0].revents().is_empty(),
            }
        }
    }

    /// Queues what is there.
    fn drain(&mut self) {
        let mut is_lossy = false;
        loop {
            let batch = self.next_batch(|_| false);
            let is_last = batch.len() < BATCH;
            is_lossy |= self.queue(batch.into_iter());
            if is_last {
                break;
            }
            if is_lossy || self.stop.deadline().is_some() {
                break;
            }
        }
        if is_lossy && self.stop.deadline().is_none() {
            thread::sleep(REST);
        }
    }

    /// Queues what is there when it is time to stop, as far as it can be written. What is made later waits for the next agent, or
    /// for nobody: there may be no end of it.
    fn drain_last(&mut self) {
        let now = u64::try_from(boot_clock().as_nanos()).unwrap_or(u64::MAX);
        let mut is_last = false;
        while !is_last && !self.stop.is_over() {
            if self.shared.lock().queue.len() > AHEAD {
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            let batch = self.next_batch(|event| event.time() > now);
            is_last = batch.len() < BATCH || batch.last().is_some_and(|item| item.event.time() > now);
            self.queue(batch.into_iter());
        }
    }

    fn next_batch(&mut self, is_last: impl Fn(&Event) -> bool) -> Vec<Item> {
        let mut batch = Vec::new();
        while batch.len() < BATCH
            && let Some(record) = self.events.next()
        {
            let Some(reported) = Event::read(&record) else {
                tracing::error!("the kernel programs reported an event of another version");
                continue;
            };
            let is_last = is_last(&reported.0);
            batch.push(Item::new(reported));
            if is_last {
                break;
            }
        }
        batch
    }

    /// Whether some had to give way.
    fn queue(&mut self, items: impl Iterator<Item = Item>) -> bool {
        let mut lost: HashMap<u64, u64> = HashMap::new();
        let mut waits = self.shared.lock();
        for item in items {
            for given in waits.queue.push(item) {
                *lost.entry(given.workload()).or_default() += 1;
            }
        }
        drop(waits);
        self.shared.changed.notify_one();
        for (&workload, &count) in &lost {
            self.counts.add_lost(workload, Stage::Queue, count);
        }
        !lost.is_empty()
    }

    /// Tells what was lost since the last time.
    fn tell(&mut self) {
        let (at, before) = self.told;
        let total = self.counts.lost(Stage::Queue);
        if total > before && (at.elapsed() >= TELL || self.stop.deadline().is_some()) {
            let workloads = self.counts.losers_at(Stage::Queue);
            tracing::warn!(lost = total - before, total, %workloads, "denials were not reported: they came faster than they are read");
            self.told = (Instant::now(), total);
        }
    }
}

/// Completes what waits, and writes it.
struct Writer {
    outlet: Outlet,
    /// Where that is.
    name: &'static str,
    listener: Option<Listener>,
    enricher: Enricher,
    output: Output,
    counts: Counts,
    stop: Stop,
    /// What is to be written, unless more of the same comes; and whose it is.
    folded: Option<(u64, Connection)>,
    chunk: Chunk,
    /// When it was told that lines could not be written, and how many denials that were.
    told: Option<(Option<Instant>, u64)>,
}

/// Lines that are written at once.
#[derive(Default)]
struct Chunk {
    bytes: Vec<u8>,
    /// Where each ends, whose it is, and for how many denials it stands.
    lines: Vec<(usize, u64, u64)>,
    /// The last that was written ended within a line.
    is_torn: bool,
}

/// Lines are gathered up to this: so much is written at once.
const CHUNK: usize = 4096;

impl Writer {
    fn run(mut self, shared: &Shared) {
        while let Some(items) = next_items(shared, self.stop.deadline().is_some(), self.told.map(|_| TELL)) {
            let is_idle = items.len() < BATCH;
            for item in items {
                self.report(&item);
            }
            if is_idle {
                self.unfold();
                self.flush();
            }
            self.complain();
        }
        self.unfold();
        self.flush();
    }

    fn report(&mut self, item: &Item) {
        if self.stop.is_over() && self.listener.is_none() {
            // It is too late for more than counting, and there may be very many.
            self.unfold();
            return self.counts.add_lost(item.workload(), Stage::Output, 1);
        }
        let Some(connection) = self.enricher.connection(&item.event, item.name.as_deref()) else {
            self.counts.add_lost(item.workload(), Stage::Output, 1);
            return tracing::error!("the kernel programs reported an event of another version");
        };
        let workload = item.workload();
        self.counts.name(workload, || self.enricher.workload(&item.event));
        match &mut self.folded {
            Some((_, folded)) if folded.is_like(&connection) => folded.count += 1,
            _ => {
                self.unfold();
                if connection.note.is_some() {
                    self.folded = Some((workload, connection));
                } else {
                    self.tell(workload, &connection);
                }
            }
        }
    }

    fn unfold(&mut self) {
        if let Some((workload, folded)) = self.folded.take() {
            self.tell(workload, &folded);
        }
    }

    fn tell(&mut self, workload: u64, connection: &Connection) {
        if let Some(listener) = &mut self.listener {
            listener(connection);
        }
        // It is too late for more than counting.
        if self.stop.is_over() {
            self.flush();
            return self.counts.add_lost(workload, Stage::Output, connection.count);
        }
        let line = match self.output {
            Output::Text => connection.to_string().into_bytes(),
            Output::Json => {
                let mut line = Vec::new();
                // A report is JSON, and there is room for it.
                let _ = text::to_json(&mut line, connection);
                line
            }
        };
        if self.chunk.bytes.len() + line.len() >= CHUNK {
            self.flush();
        }
        self.chunk.add(&line, workload, connection.count);
    }

    /// Writes what was gathered. What cannot be written is lost; the next is tried.
    fn flush(&mut self) {
        if self.chunk.lines.is_empty() {
            return;
        }
        let (written, result) = self.outlet.write(&self.chunk.bytes);
        let mut lost = 0;
        for (end, workload, count) in self.chunk.written(written) {
            if end <= written {
                self.counts.add_written(count);
            } else {
                lost += count;
                self.counts.add_lost(workload, Stage::Output, count);
            }
        }
        match result {
            Ok(()) => {
                if self.counts.set_error(None) {
                    tracing::info!("denials are written to {} again", self.name);
                }
            }
            // The last of all, which are told at the end.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => {}
            Err(error) => {
                let is_gone = error.kind() == io::ErrorKind::BrokenPipe;
                let is_new = self.counts.set_error(Some(format!("{}: {error}", self.name)));
                if is_gone && is_new {
                    tracing::error!(
                        lost,
                        "nobody reads {} any more: denials are counted as lost until somebody does",
                        self.name
                    );
                } else if !is_gone {
                    // Told by and by: there may be very many.
                    self.told = self.told.or(Some((None, 0)));
                    self.complain();
                }
            }
        }
    }

    /// Tells how many denials could not be written, if that is new and it is time. A full disk and the like may pass.
    fn complain(&mut self) {
        let Some((at, before)) = self.told else { return };
        let lost = self.counts.lost(Stage::Output);
        if at.is_none_or(|at| at.elapsed() >= TELL) && lost > before {
            tracing::error!(lost, "denials could not be written to {}", self.name);
            self.told = Some((Some(Instant::now()), lost));
        }
    }
}

impl Chunk {
    fn add(&mut self, line: &[u8], workload: u64, count: u64) {
        if self.bytes.is_empty() && self.is_torn {
            self.bytes.push(b'\n');
        }
        self.bytes.extend_from_slice(line);
        self.bytes.push(b'\n');
        self.lines.push((self.bytes.len(), workload, count));
    }

    /// So much of it was written: the lines that were in it.
    fn written(&mut self, written: usize) -> Vec<(usize, u64, u64)> {
        if written > 0 {
            self.is_torn = self.bytes[written - 1] != b'\n';
        }
        self.bytes.clear();
        std::mem::take(&mut self.lines)
    }
}

/// What is to be told next; none if nothing comes for a time. `None` when nothing comes any more.
fn next_items(shared: &Shared, is_stopping: bool, patience: Option<Duration>) -> Option<Vec<Item>> {
    let mut waits = shared.lock();
    while waits.queue.is_empty() {
        if waits.is_closed {
            return None;
        }
        // Whoever stops it closes the queue.
        waits = match patience {
            None => shared.changed.wait(waits).unwrap_or_else(PoisonError::into_inner),
            Some(patience) => {
                let waited = shared.changed.wait_timeout(waits, patience);
                let (waits, waited) = waited.unwrap_or_else(PoisonError::into_inner);
                if waited.timed_out() && waits.queue.is_empty() {
                    return Some(Vec::new());
                }
                waits
            }
        };
    }
    let most = if is_stopping { 16 } else { BATCH };
    Some(std::iter::from_fn(|| waits.queue.pop()).take(most).collect())
}
