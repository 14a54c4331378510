//! Writes events to stdout, on a thread of its own: a reader of stdout that stalls must never keep the agent from
//! changing the policy. When it stalls for long, the ring buffer fills and the kernel counts what is lost.

use std::{
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    thread::{self, JoinHandle},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use egress_common::Event;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};
use zerocopy::FromBytes;

use crate::{
    cli::Output,
    events::{Connection, Enricher},
};

/// The programs' own log.
type KernelLog = aya_log::EbpfLogger<&'static dyn log::Log>;

/// A running reporter.
#[derive(Debug)]
pub struct Reporter {
    thread: JoinHandle<()>,
    /// Closed to tell the thread to finish.
    stop: OwnedFd,
}

/// How long [`Reporter::finish`] waits for a reader of stdout that does not read.
const PATIENCE: Duration = Duration::from_secs(2);

impl Reporter {
    /// Starts to report.
    pub fn start(
        events: RingBuf<MapData>,
        log: Option<KernelLog>,
        enricher: Enricher,
        output: Output,
    ) -> io::Result<Self> {
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut source = Source { events, log, enricher, output };
        let thread = thread::Builder::new().name("report".to_owned()).spawn(move || source.run(&stopped))?;
        Ok(Self { thread, stop })
    }

    /// Reports what is left, then stops. Gives up on a stdout that nobody reads.
    pub fn finish(self) {
        drop(self.stop);
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.thread.is_finished() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        if !self.thread.is_finished() {
            tracing::warn!("nobody reads stdout: the last denials are not reported");
        }
    }
}

struct Source {
    events: RingBuf<MapData>,
    log: Option<KernelLog>,
    enricher: Enricher,
    output: Output,
}

impl Source {
    fn run(&mut self, stopped: &OwnedFd) {
        let mut out = io::stdout();
        loop {
            let stop = self.wait(stopped);
            if let Err(error) = self.drain(&mut out) {
                tracing::error!(%error, "cannot write denials to stdout; enforcement goes on without reports");
                return;
            }
            if stop {
                return;
            }
        }
    }

    /// Waits for events; whether it was told to stop.
    fn wait(&self, stopped: &OwnedFd) -> bool {
        let mut fds = vec![PollFd::new(stopped, PollFlags::IN), PollFd::new(&self.events, PollFlags::IN)];
        fds.extend(self.log.as_ref().map(|log| PollFd::from_borrowed_fd(log.as_fd(), PollFlags::IN)));
        loop {
            match poll(&mut fds, None::<&Timespec>) {
                Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(error = %errno, "cannot wait for denials; enforcement goes on without reports");
                    return true;
                }
                Ok(_) => return !fds[0].revents().is_empty(),
            }
        }
    }

    fn drain(&mut self, out: &mut impl Write) -> io::Result<()> {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        let mut written = false;
        while let Some(record) = self.events.next() {
            let Some(connection) = read(&record, &mut self.enricher) else {
                tracing::error!("the kernel programs reported an event of another version");
                continue;
            };
            drop(record);
            write(out, &connection, self.output)?;
            written = true;
        }
        if written { out.flush() } else { Ok(()) }
    }
}

fn read(record: &[u8], enricher: &mut Enricher) -> Option<Connection> {
    enricher.connection(&Event::read_from_bytes(record).ok()?)
}

fn write(out: &mut impl Write, connection: &Connection, output: Output) -> io::Result<()> {
    match output {
        Output::Text => writeln!(out, "{connection}"),
        Output::Json => {
            let mut line = serde_json::to_vec(connection)?;
            line.push(b'\n');
            out.write_all(&line)
        }
    }
}
