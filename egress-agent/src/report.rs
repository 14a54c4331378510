//! Writes events to stdout or stderr, on a thread of its own: a reader that stalls must never keep the agent from
//! changing the policy. When it stalls for long, the ring buffer fills and the kernel counts what is lost.

use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, OwnedFd},
    thread::{self, JoinHandle},
    time::Duration,
};

use aya::maps::{MapData, RingBuf};
use egress_common::{Event, NameKey};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};

use crate::{
    cli::Output,
    events::{Connection, Enricher, boot_clock},
};

/// The programs' own log.
type KernelLog = aya_log::EbpfLogger<&'static dyn log::Log>;

/// What the kernel reported: see [`Event::read`].
pub type Reported = (Event, Option<NameKey>);

/// A running reporter.
#[derive(Debug)]
pub struct Reporter {
    thread: JoinHandle<()>,
    /// Closed to tell the thread to finish.
    stop: OwnedFd,
    /// Where it writes.
    name: &'static str,
}

/// Events between two looks at whether to stop.
const BATCH: u32 = 1024;

/// How long [`Reporter::finish`] waits for a reader that does not read.
const PATIENCE: Duration = Duration::from_secs(2);

/// Where denials go.
pub struct Sink {
    /// Not std's handle, whose buffer would keep what could not be written.
    out: File,
    name: &'static str,
    listener: Option<Listener>,
}

/// Hears of every denial before it is written, also of those that cannot be.
pub type Listener = Box<dyn FnMut(&Connection) + Send>;

impl Sink {
    /// Data goes to stdout.
    pub fn stdout() -> io::Result<Self> {
        let out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Self { out, name: "stdout", listener: None })
    }

    /// Where stdout belongs to somebody else.
    pub fn stderr(listener: Listener) -> io::Result<Self> {
        let out = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        Ok(Self { out, name: "stderr", listener: Some(listener) })
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
        let (stopped, stop) = pipe_with(PipeFlags::CLOEXEC)?;
        let name = sink.name;
        let mut source = Source { sink, events, log, enricher, output, folded: None, closed: false, lost: 0 };
        let thread = thread::Builder::new().name("report".to_owned()).spawn(move || {
            for event in backlog {
                source.report(Some(&event));
            }
            source.unfold();
            source.run(&stopped);
        })?;
        Ok(Self { thread, stop, name })
    }

    /// Reports what is left, then stops. Gives up on a reader that does not read.
    pub fn finish(self) {
        drop(self.stop);
        let deadline = std::time::Instant::now() + PATIENCE;
        while !self.thread.is_finished() && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        if !self.thread.is_finished() {
            tracing::warn!("{} is read too slowly: the last denials are not reported", self.name);
        }
    }
}

struct Source {
    sink: Sink,
    events: RingBuf<MapData>,
    log: Option<KernelLog>,
    enricher: Enricher,
    output: Output,
    /// What is to be written, unless more of the same comes.
    folded: Option<Connection>,
    /// Nobody reads any more.
    closed: bool,
    /// Denials that could not be written.
    lost: u64,
}

impl Source {
    fn run(&mut self, stopped: &OwnedFd) {
        loop {
            let stop = self.wait(stopped);
            if stop {
                // What is made later waits for the next agent, or for nobody: there may be no end of it.
                let now = u64::try_from(boot_clock().as_nanos()).unwrap_or(u64::MAX);
                self.drain(|time| time > now);
            } else {
                let mut count = 0;
                self.drain(|_| {
                    count += 1;
                    count == BATCH
                });
            }
            if stop || self.closed {
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

    /// Reports what is there, up to an event of whose time `is_last` says so.
    fn drain(&mut self, mut is_last: impl FnMut(u64) -> bool) {
        if let Some(log) = &mut self.log {
            log.flush();
        }
        let before = self.lost;
        while let Some(event) = self.events.next().map(|record| Event::read(&record)) {
            self.report(event.as_ref());
            if event.is_some_and(|(event, _)| is_last(event.time())) {
                break;
            }
        }
        self.unfold();
        if self.lost > before {
            tracing::error!(lost = self.lost, "denials could not be written to {}", self.sink.name);
        }
    }

    fn report(&mut self, event: Option<&Reported>) {
        let Some(connection) = event.and_then(|(event, name)| self.enricher.connection(event, name.as_ref())) else {
            return tracing::error!("the kernel programs reported an event of another version");
        };
        match &mut self.folded {
            Some(folded) if folded.is_like(&connection) => folded.count += 1,
            _ => {
                self.unfold();
                if connection.note.is_some() {
                    self.folded = Some(connection);
                } else {
                    self.tell(&connection);
                }
            }
        }
    }

    fn unfold(&mut self) {
        if let Some(folded) = self.folded.take() {
            self.tell(&folded);
        }
    }

    fn tell(&mut self, connection: &Connection) {
        if let Some(listener) = &mut self.sink.listener {
            listener(connection);
        }
        if self.closed {
            return;
        }
        match write(&mut self.sink.out, connection, self.output) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                tracing::error!("nobody reads {} any more; enforcement goes on without reports", self.sink.name);
                self.closed = true;
            }
            // A full disk and the like may pass: this line is lost, the next may not be.
            Err(error) => {
                self.lost += 1;
                tracing::debug!(%error, "a denial is lost");
            }
        }
    }
}

fn write(out: &mut File, connection: &Connection, output: Output) -> io::Result<()> {
    let mut line = match output {
        Output::Text => connection.to_string().into_bytes(),
        Output::Json => serde_json::to_vec(connection)?,
    };
    line.push(b'\n');
    write_all(out, &line)
}

/// Waits where the file does not block and is full.
fn write_all(out: &mut File, mut line: &[u8]) -> io::Result<()> {
    while !line.is_empty() {
        match out.write(line) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => line = &line[written..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(&*out, PollFlags::OUT)], None::<&Timespec>)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
