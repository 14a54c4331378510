//! The agent that runs at the moment: started, followed, stalled, killed and replaced.

use std::{
    fs,
    io::Read,
    process::{Child, Stdio},
    sync::{
        Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{PATIENCE, agent::Place, world::World};

/// A stream of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outlet {
    /// Reports.
    Stdout,
    /// The log.
    Stderr,
}

/// A report of the cgroup that is listened for, and when it was read.
pub type Heard = (Instant, String);

/// Holds the agent.
pub struct Supervisor {
    running: RwLock<Running>,
    /// Held for writing while a reader stalls.
    readers: RwLock<()>,
    shared: Arc<Shared>,
}

/// What stays when agents come and go.
#[derive(Default)]
struct Shared {
    /// Lines of reports that the present agent wrote.
    reports: AtomicU64,
    listener: Mutex<Option<(String, Sender<Heard>)>>,
    stdout: Gate,
    stderr: Gate,
}

struct Running {
    child: Child,
    readers: Vec<thread::JoinHandle<()>>,
}

/// How the refusals of one agent's life became reports.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Account {
    /// Refusals that the kernel counted.
    pub refused: u64,
    /// Lines that were read.
    pub read: u64,
    /// Reports that the agent and the kernel count as lost.
    pub lost: u64,
    /// Refusals that are neither.
    pub missing: u64,
}

impl Supervisor {
    /// Starts the first agent, and waits until its policy is in force.
    pub fn start(world: &World) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let running = Running::start(world, &shared)?;
        Ok(Self { running: RwLock::new(running), readers: RwLock::new(()), shared })
    }

    /// Lines that contain `text` are heard of.
    pub fn listen(&self, text: String) -> Receiver<Heard> {
        let (sender, receiver) = channel();
        *self.shared.listener.lock().unwrap_or_else(PoisonError::into_inner) = Some((text, sender));
        receiver
    }

    /// Does something while the agent lives.
    pub fn while_alive<T>(&self, work: impl FnOnce() -> T) -> T {
        let _running = self.read();
        work()
    }

    /// Does something while the agent lives and its readers read.
    pub fn undisturbed<T>(&self, work: impl FnOnce() -> T) -> T {
        let _reading = self.readers.read().unwrap_or_else(PoisonError::into_inner);
        self.while_alive(work)
    }

    fn read(&self) -> RwLockReadGuard<'_, Running> {
        self.running.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nobody reads a stream for a while.
    pub fn stall(&self, outlet: Outlet, time: Duration) {
        let _stalled = self.readers.write().unwrap_or_else(PoisonError::into_inner);
        let gate = match outlet {
            Outlet::Stdout => &self.shared.stdout,
            Outlet::Stderr => &self.shared.stderr,
        };
        gate.close();
        thread::sleep(time);
        gate.open();
    }

    /// Ends the agent by a signal and starts the next one; how long the end took.
    pub fn replace(&self, world: &World, signal: Signal) -> Result<Duration> {
        let mut running = self.running.write().unwrap_or_else(PoisonError::into_inner);
        let took = running.end(signal)?;
        self.shared.reports.store(0, Ordering::SeqCst);
        *running = Running::start(world, &self.shared)?;
        Ok(took)
    }

    /// Waits until every refusal of the present agent is accounted for, or the time is up. To be called while nothing is refused.
    pub fn settle(&self, place: &Place, patience: Duration) -> Result<Account> {
        let _running = self.read();
        let deadline = Instant::now() + patience;
        loop {
            let account = self.account(place)?;
            if account.missing == 0 || Instant::now() > deadline {
                return Ok(account);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }

    fn account(&self, place: &Place) -> Result<Account> {
        let (_, status) = place.status()?;
        let number = |pointer: &str| {
            status
                .pointer(pointer)
                .and_then(serde_json::Value::as_u64)
                .with_context(|| format!("no {pointer} in status"))
        };
        let refused = number("/counters/deny")? + number("/counters/would_deny")?;
        let lost = number("/counters/events_lost")?;
        // Reports that the agent before left unread are lines of this one, and were refusals of that one.
        let inherited = number("/reports/inherited")?;
        let read = self.shared.reports.load(Ordering::SeqCst).saturating_sub(inherited);
        Ok(Account { refused, read, lost, missing: refused.saturating_sub(read + lost) })
    }

    /// Resident memory at its peak, in kB.
    pub fn peak_memory(&self) -> Result<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.read().child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        Ok(line.trim().trim_end_matches(" kB").parse()?)
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> Result<u64> {
        Ok(fs::read_dir(format!("/proc/{}/fd", self.read().child.id()))?.count() as u64)
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.shared.stdout.open();
        self.shared.stderr.open();
        let running = self.running.get_mut().unwrap_or_else(PoisonError::into_inner);
        // Both fail only if it has ended already.
        let _ = running.child.kill();
        let _ = running.child.wait();
    }
}

impl Running {
    fn start(world: &World, shared: &Arc<Shared>) -> Result<Self> {
        let mut command = world.command(&[])?;
        world.place.tell(&mut command);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run the agent")?;
        let (stdout, stderr) = (child.stdout.take().context("piped")?, child.stderr.take().context("piped")?);
        let (started, is_started) = channel();
        let (for_reports, for_log) = (shared.clone(), shared.clone());
        let readers = vec![
            thread::spawn(move || each_line(stdout, &for_reports.stdout, |line| for_reports.report(line))),
            thread::spawn(move || {
                each_line(stderr, &for_log.stderr, |line| {
                    if contains(line, b"policy applied generation=1 ") || contains(line, b"ERROR") {
                        // Nobody waits any more once it has started.
                        let _ = started.send(String::from_utf8_lossy(line).into_owned());
                    }
                });
            }),
        ];
        let line = is_started.recv_timeout(PATIENCE).context("the agent does not start")?;
        ensure!(line.contains("policy applied"), "the agent does not start: {line}");
        Ok(Self { child, readers })
    }

    fn end(&mut self, signal: Signal) -> Result<Duration> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        let begun = Instant::now();
        kill_process(pid, signal)?;
        while self.child.try_wait()?.is_none() {
            if begun.elapsed() > PATIENCE {
                bail!("the agent does not end");
            }
            thread::sleep(Duration::from_millis(2));
        }
        let took = begun.elapsed();
        self.readers.drain(..).for_each(|reader| drop(reader.join()));
        Ok(took)
    }
}

impl Shared {
    fn report(&self, line: &[u8]) {
        self.reports.fetch_add(1, Ordering::SeqCst);
        let listener = self.listener.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((text, sender)) = &*listener
            && contains(line, text.as_bytes())
        {
            // The listener may be gone at the end.
            let _ = sender.send((Instant::now(), String::from_utf8_lossy(line).into_owned()));
        }
    }
}

fn contains(line: &[u8], text: &[u8]) -> bool {
    line.windows(text.len()).any(|window| window == text)
}

/// Reads while the gate is open. Keeps no more than a line.
fn each_line(mut pipe: impl Read, gate: &Gate, mut hear: impl FnMut(&[u8])) {
    let (mut buffer, mut rest) = (vec![0; 64 * 1024], Vec::new());
    loop {
        gate.pass();
        let read = match pipe.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        for line in buffer[..read].split_inclusive(|&byte| byte == b'\n') {
            rest.extend_from_slice(line);
            if rest.last() == Some(&b'\n') {
                hear(&rest);
                rest.clear();
            }
        }
    }
}

/// Whether a reader reads.
#[derive(Default)]
struct Gate {
    is_closed: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn close(&self) {
        *self.is_closed.lock().unwrap_or_else(PoisonError::into_inner) = true;
    }

    fn open(&self) {
        *self.is_closed.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut is_closed = self.is_closed.lock().unwrap_or_else(PoisonError::into_inner);
        while *is_closed {
            is_closed = self.changed.wait(is_closed).unwrap_or_else(PoisonError::into_inner);
        }
    }
}
