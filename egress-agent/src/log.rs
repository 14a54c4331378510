//! The log: lines of text for stderr, which hold nobody up.
//!
//! Whoever logs puts a line into a bounded queue; a thread writes it, as fast as it is read. Where nobody reads, lines are
//! dropped and counted, and when somebody reads again, the log tells how many. What others have written into a line is shown by
//! [`text`].

use std::{
    collections::VecDeque,
    fmt::{self, Write as _},
    io::{self, Write},
    os::fd::AsFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing_subscriber::{
    field::{MakeExt as _, RecordFields},
    fmt::{FormatFields, MakeWriter, format},
};

use crate::{
    outlet::{Outlet, Stop},
    privileges::{self, CapabilitySet},
    text,
};

/// Most bytes that wait, and most of a line.
const MAX_BYTES: usize = 1 << 20;
const MAX_LINE: usize = 64 << 10;
/// How long the end of the process waits for whoever reads.
const PATIENCE: Duration = Duration::from_millis(300);

/// The log of this process, if [`start`] was called.
static LOG: OnceLock<Log> = OnceLock::new();

/// Where lines wait. All copies are one.
#[derive(Debug, Clone, Default)]
pub struct Log(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// Lines that are being written.
    in_hand: usize,
    written: u64,
    /// Lines that were dropped, and those of them that nobody was told of.
    lost: u64,
    untold: u64,
    /// The last line could not be written.
    is_failing: bool,
    /// A thread writes what waits.
    is_behind: bool,
}

/// The log of this process, on stderr, which is written at once until [`write_behind`].
pub fn start() -> Log {
    LOG.get_or_init(Log::default).clone()
}

/// From now on a thread writes the log of this process, which nobody waits for. It keeps no capability.
pub fn write_behind() {
    if let Some(log) = LOG.get()
        && let Err(error) = log.write_to(io::stderr())
    {
        tracing::error!(%error, "cannot start a thread for the log: stderr must be read");
    }
}

/// Writes to the log as it is; where [`start`] was not called, to stderr.
pub fn say(text: &str) {
    match LOG.get() {
        Some(log) => log.push(text.as_bytes().to_vec()),
        // There is nobody to tell if that fails.
        None => drop(io::stderr().write_all(text.as_bytes())),
    }
}

/// Before the end of the process: waits for what is left to be written, a moment.
pub fn flush() {
    if let Some(log) = LOG.get() {
        log.wait(|begun, _| begun.elapsed() < PATIENCE);
    }
}

/// The same for as long as somebody reads.
pub fn flush_while_read() {
    if let Some(log) = LOG.get() {
        log.wait(|_, progress| progress.elapsed() < PATIENCE);
    }
}

/// Lines that were dropped since the start.
pub fn lost() -> u64 {
    LOG.get().map_or(0, |log| log.lock().lost)
}

/// What is not as it should be.
pub fn degraded() -> Option<String> {
    let untold = LOG.get()?.lock().untold;
    (untold > 0).then(|| format!("nobody reads stderr: {untold} lines of the log are lost"))
}

impl Log {
    fn write_to(&self, file: impl AsFd) -> io::Result<()> {
        let (writer, outlet) = (self.clone(), Outlet::new(file, Stop::new()?)?);
        thread::Builder::new().name("log".to_owned()).spawn(move || {
            privileges::keep_only(CapabilitySet::empty());
            writer.run(outlet);
        })?;
        self.lock().is_behind = true;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.0.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: Vec<u8>) {
        let mut waiting = self.lock();
        if !waiting.is_behind {
            // There is nobody to tell if that fails.
            let _ = io::stderr().write_all(&line);
            return;
        }
        if waiting.bytes + line.len() > MAX_BYTES {
            waiting.lost += 1;
            waiting.untold += 1;
            return;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line);
        self.0.changed.notify_all();
    }

    fn run(&self, mut outlet: Outlet) {
        loop {
            let (lines, untold) = self.next();
            if untold > 0 {
                tracing::warn!(lost = untold, "lines of the log were lost: stderr was not read");
                continue;
            }
            let is_written = outlet.write(&lines.concat()).1.is_ok();
            let mut waiting = self.lock();
            waiting.in_hand = 0;
            waiting.is_failing = !is_written;
            waiting.written += 1;
            if !is_written {
                let count = lines.len() as u64;
                waiting.lost += count;
                waiting.untold += count;
            }
            self.0.changed.notify_all();
        }
    }

    /// What is to be written next; when there is nothing, how many lines were lost that nobody was told of.
    fn next(&self) -> (Vec<Vec<u8>>, u64) {
        let mut waiting = self.lock();
        loop {
            if !waiting.lines.is_empty() {
                let lines: Vec<Vec<u8>> = std::iter::from_fn(|| waiting.lines.pop_front()).take(16).collect();
                waiting.bytes -= lines.iter().map(Vec::len).sum::<usize>();
                waiting.in_hand = lines.len();
                return (lines, 0);
            }
            // Where nothing can be written, that cannot be either.
            if waiting.untold > 0 && !waiting.is_failing {
                return (Vec::new(), std::mem::take(&mut waiting.untold));
            }
            waiting = self.0.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until nothing is left, or `goes_on` says no more, which is told when that began and when something was written last.
    fn wait(&self, goes_on: impl Fn(Instant, Instant) -> bool) {
        let begun = Instant::now();
        let mut waiting = self.lock();
        let (mut progress, mut written) = (begun, waiting.written);
        while !(waiting.lines.is_empty() && waiting.in_hand == 0) && goes_on(begun, progress) {
            let result = self.0.changed.wait_timeout(waiting, Duration::from_millis(10));
            waiting = result.unwrap_or_else(PoisonError::into_inner).0;
            if waiting.written != written {
                (progress, written) = (Instant::now(), waiting.written);
            }
        }
    }
}

/// A line that is being put together; it is queued when dropped.
#[derive(Debug)]
pub struct Line(Log, Vec<u8>);

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.1.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut line = std::mem::take(&mut self.1);
        if line.len() > MAX_LINE {
            line.truncate(MAX_LINE);
            line.extend_from_slice("…\n".as_bytes());
        }
        if !line.is_empty() {
            self.0.push(line);
        }
    }
}

impl<'a> MakeWriter<'a> for Log {
    type Writer = Line;

    fn make_writer(&'a self) -> Line {
        Line(self.clone(), Vec::new())
    }
}

/// How the fields of a line are written: what others have put into a value ends neither the line nor a colour.
pub fn fields() -> impl for<'w> FormatFields<'w> + Clone + 'static {
    Fields
}

#[derive(Debug, Clone, Copy)]
struct Fields;

impl<'w> FormatFields<'w> for Fields {
    fn format_fields<R: RecordFields>(&self, writer: format::Writer<'w>, fields: R) -> fmt::Result {
        let one = |writer: &mut format::Writer<'_>, field: &tracing::field::Field, value: &dyn fmt::Debug| {
            let mut raw = String::new();
            write!(raw, "{value:?}")?;
            let value = text::printable(&raw);
            match (field.name(), writer.has_ansi_escapes()) {
                ("message", _) => writer.write_str(&value),
                // Metadata of a line of the `log` crate.
                (name, _) if name.starts_with("log.") => Ok(()),
                (name, true) => write!(writer, "\u{1b}[3m{name}\u{1b}[0m\u{1b}[2m=\u{1b}[0m{value}"),
                (name, false) => write!(writer, "{name}={value}"),
            }
        };
        format::debug_fn(one).delimited(" ").format_fields(writer, fields)
    }
}

#[cfg(test)]
mod tests {
    use std::{fs::File, io::Read as _};

    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn a_log_that_nobody_reads_holds_nobody_up_and_tells_how_much_it_lost() {
        let (reader, writer) = pipe().unwrap();
        let log = Log::default();
        log.write_to(&writer).unwrap();
        let line = [&[b'x'; 1023][..], b"\n"].concat();
        for _ in 0..3_000 {
            log.push(line.clone());
        }
        let lost = log.lock().lost;
        assert!(lost > 1_500 && lost < 3_000, "{lost}");
        let begun = Instant::now();
        log.wait(|begun, _| begun.elapsed() < PATIENCE);
        assert!(begun.elapsed() < Duration::from_secs(10));
        let mut read = vec![0; (3_000 - usize::try_from(lost).unwrap()) * 1024];
        File::from(reader).read_exact(&mut read).unwrap();
        log.wait(|_, progress| progress.elapsed() < Duration::from_secs(10));
        assert!(log.lock().lines.is_empty() && read.split(|&byte| byte == b'\n').count() == read.len() / 1024 + 1);
    }

    #[test]
    fn what_others_put_into_a_field_ends_no_line() {
        let (reader, writer) = pipe().unwrap();
        let log = Log::default();
        log.write_to(&writer).unwrap();
        drop(writer);
        let subscriber =
            tracing_subscriber::fmt().with_writer(log.clone()).fmt_fields(fields()).with_ansi(false).finish();
        let hostile = "a\n\u{1b}]0;x\u{7}\u{202e}\u{9b}b\u{7f}";
        tracing::subscriber::with_default(subscriber, || {
            tracing::warn!(file = %hostile, path = hostile, "no {hostile}");
        });
        log.wait(|_, progress| progress.elapsed() < Duration::from_secs(10));
        let mut read = [0; 4096];
        let length = File::from(reader).read(&mut read).unwrap();
        let line = std::str::from_utf8(&read[..length]).unwrap();
        let (line, end) = line.split_at(line.len() - 1);
        assert!(end == "\n" && !line.chars().any(text::is_treacherous), "{line:?}");
        assert!(line.contains(" no a\\u{a}\\u{1b}]0;x\\u{7}\\u{202e}\\u{9b}b\\u{7f}"), "{line}");
    }
}
