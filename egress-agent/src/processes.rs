//! What `/proc` tells of the processes in reports, within bounds, whatever the processes do.
//!
//! A process can make it slow to be looked at: who reads its arguments waits for the lock of its memory, which it can keep from
//! others for as long as a file system of its own does not answer. So a thread of its own reads, and nobody waits for it for
//! long; a workload whose process holds it up is told of by what the kernel recorded, and so are its other processes, until
//! that thread is back.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::Read,
    os::unix::ffi::OsStrExt as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use crate::events::boot_clock;

/// Most bytes of arguments that are read.
pub const MAX_CMDLINE: usize = 4096;
/// Most bytes of the other files of `/proc/PID` that are read: a line of numbers, and one for each hierarchy of cgroups.
const MAX_STAT: usize = 1024;
const MAX_CGROUP: usize = 16 << 10;
/// How much of a second the processes of a workload may take that are slow to be looked at, alone or together. One that takes
/// more is not looked at for as long again.
const PATIENCE: Duration = Duration::from_millis(100);
const PENALTY: Duration = Duration::from_secs(1);
/// What takes longer is slow.
const SLOW: Duration = Duration::from_millis(1);
/// Most threads that wait for a process at a time.
const MAX_HELD: usize = 16;
/// Most processes that are remembered.
const MAX_SEEN: usize = 512;

/// What was read of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// Its parent.
    pub ppid: u32,
    /// When it started, in clock ticks since boot.
    start: u64,
    /// Its program.
    pub exe: Option<Vec<u8>>,
    /// The first bytes of its arguments, each with a zero at its end; one more than [`MAX_CMDLINE`] where there are more.
    pub cmdline: Vec<u8>,
    /// Its `cgroup` file.
    pub cgroup: Vec<u8>,
    /// When it was read, in nanoseconds since boot.
    read: u64,
}

impl Seen {
    #[cfg(test)]
    pub(crate) fn new(exe: &[u8], cmdline: &[u8]) -> Self {
        Self { exe: Some(exe.to_owned()), cmdline: cmdline.to_owned(), ..Self::default() }
    }

    /// Whether it was there at a time, and what was read is of then or later.
    fn is_of(&self, time: u64) -> bool {
        self.started_by(time) && time <= self.read
    }

    fn started_by(&self, time: u64) -> bool {
        let ticks = rustix::param::clock_ticks_per_second().max(1);
        self.start.saturating_mul(1_000_000_000 / ticks) <= time
    }
}

/// Why nothing is known of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unseen {
    /// It is gone, or was not there to be asked.
    Gone,
    /// It would have taken too long to look at it.
    Slow,
}

/// Looks at processes.
pub struct Processes {
    read: fn(u32) -> Option<Seen>,
    seen: HashMap<u32, Seen>,
    reader: Option<Reader>,
    /// Workloads whose processes were slow to be looked at.
    slow: HashMap<u64, Slow>,
}

impl std::fmt::Debug for Processes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Processes").field("seen", &self.seen.len()).field("slow", &self.slow).finish_non_exhaustive()
    }
}

/// A workload whose processes are slow to be looked at.
#[derive(Debug)]
struct Slow {
    since: Instant,
    took: Duration,
    /// Whether no thread is waiting for one of its processes.
    is_back: Arc<AtomicBool>,
}

impl Slow {
    fn is_held(&self) -> bool {
        !self.is_back.load(Ordering::Acquire)
    }
}

/// A thread that reads.
struct Reader {
    wanted: Sender<u32>,
    answers: Receiver<Option<Seen>>,
    /// Whether it is not waiting for a process.
    is_back: Arc<AtomicBool>,
}

impl Default for Processes {
    fn default() -> Self {
        Self::reading(read)
    }
}

impl Processes {
    fn reading(read: fn(u32) -> Option<Seen>) -> Self {
        Self { read, seen: HashMap::new(), reader: None, slow: HashMap::new() }
    }

    /// The process of an id that was there at a time, in nanoseconds since boot. What was read after that time still tells of
    /// it: many reports of one process cost one look.
    pub fn look(&mut self, pid: u32, time: u64, workload: u64) -> Result<&Seen, Unseen> {
        if !self.seen.get(&pid).is_some_and(|seen| seen.is_of(time)) {
            let seen = self.ask(pid, workload)?;
            if self.seen.len() >= MAX_SEEN {
                self.seen.clear();
            }
            // Unless it is gone and its id belongs to one that started after.
            let seen = seen.filter(|seen| seen.started_by(time)).ok_or(Unseen::Gone)?;
            self.seen.insert(pid, seen);
        }
        self.seen.get(&pid).ok_or(Unseen::Gone)
    }

    fn ask(&mut self, pid: u32, workload: u64) -> Result<Option<Seen>, Unseen> {
        self.slow.retain(|_, slow| slow.since.elapsed() < PENALTY || slow.is_held());
        let is_slow = self.slow.get(&workload).is_some_and(|slow| slow.took >= PATIENCE || slow.is_held());
        if is_slow || self.slow.values().filter(|slow| slow.is_held()).count() >= MAX_HELD {
            return Err(Unseen::Slow);
        }
        let reader = match self.reader.take() {
            Some(reader) => reader,
            None => Reader::start(self.read).ok_or(Unseen::Slow)?,
        };
        reader.is_back.store(false, Ordering::Release);
        let begun = Instant::now();
        let asked = reader.wanted.send(pid).ok();
        let answer = asked.and_then(|()| reader.answers.recv_timeout(PATIENCE).ok());
        let took = begun.elapsed();
        if answer.is_none() || took > SLOW {
            let new = || Slow { since: begun, took: Duration::ZERO, is_back: Arc::new(AtomicBool::new(true)) };
            let slow = self.slow.entry(workload).or_insert_with(new);
            slow.took += took;
            if answer.is_none() {
                slow.is_back = Arc::clone(&reader.is_back);
            }
        }
        if answer.is_some() {
            self.reader = Some(reader);
        }
        answer.ok_or(Unseen::Slow)
    }
}

impl Reader {
    /// Ends when nobody asks it any more.
    fn start(read: fn(u32) -> Option<Seen>) -> Option<Self> {
        let ((wanted, asked), (answer, answers)) = (channel(), channel());
        let is_back = Arc::new(AtomicBool::new(true));
        let back = Arc::clone(&is_back);
        let spawned = thread::Builder::new().name("processes".to_owned()).spawn(move || {
            for pid in asked {
                let seen = read(pid);
                back.store(true, Ordering::Release);
                if answer.send(seen).is_err() {
                    return;
                }
            }
        });
        spawned.is_ok().then_some(Self { wanted, answers, is_back })
    }
}

/// Reads all of it; `None` if there is no such process.
fn read(pid: u32) -> Option<Seen> {
    let file = |name: &str, most| read_most(&format!("/proc/{pid}/{name}"), most);
    let (ppid, start) = stat(&file("stat", MAX_STAT)?)?;
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok().map(|path| path.as_os_str().as_bytes().to_vec());
    let cmdline = file("cmdline", MAX_CMDLINE + 1).unwrap_or_default();
    let cgroup = file("cgroup", MAX_CGROUP).unwrap_or_default();
    let read = u64::try_from(boot_clock().as_nanos()).unwrap_or(0);
    Some(Seen { ppid, start, exe, cmdline, cgroup, read })
}

/// The first bytes of a file.
fn read_most(path: &str, most: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::with_capacity(most.min(1024));
    File::open(path).ok()?.take(most as u64).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Parent and start of `/proc/PID/stat`, by `proc_pid_stat(5)`.
///
/// The name stands in parentheses and may hold anything, parentheses too, so the fields after the last are counted: the state is
/// field 3, the parent 4, the start 22.
fn stat(stat: &[u8]) -> Option<(u32, u64)> {
    let after_name = stat.iter().rposition(|&byte| byte == b')')? + 1;
    let mut fields = std::str::from_utf8(&stat[after_name..]).ok()?.split_ascii_whitespace();
    let ppid = fields.nth(1)?.parse().ok()?;
    let start = fields.nth(17)?.parse().ok()?;
    Some((ppid, start))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn a_process_name_with_parentheses_does_not_confuse_the_fields() {
        let fields = "S 7 1 1 0 -1 4194560 100 0 0 0 0 0 0 0 20 0 1 0 4242 0 0";
        let text = format!("42 (a) b (c) {fields}");
        assert_eq!(stat(text.as_bytes()), Some((7, 4242)));
        for end in 0..text.len() - 8 {
            assert_eq!(stat(&text.as_bytes()[..end]), None, "{end}");
        }
    }

    fn now() -> u64 {
        u64::try_from(boot_clock().as_nanos()).unwrap()
    }

    #[test]
    fn a_process_that_started_after_the_event_is_another_one() {
        let (mut processes, own) = (Processes::default(), std::process::id());
        assert_eq!(processes.look(own, 0, 1), Err(Unseen::Gone));
        let seen = processes.look(own, now(), 1).unwrap().clone();
        assert_eq!(seen.exe, Some(std::env::current_exe().unwrap().as_os_str().as_bytes().to_vec()));
        assert_eq!(processes.look(u32::MAX >> 1, now(), 1), Err(Unseen::Gone));
    }

    #[test]
    fn what_was_read_after_an_event_tells_of_it() {
        static READS: Mutex<u32> = Mutex::new(0);
        let read = |_| {
            *READS.lock().unwrap() += 1;
            Some(Seen { read: 1_000_000_000, ..Seen::default() })
        };
        let mut processes = Processes::reading(read);
        for time in [999, 5, 1_000_000_000] {
            processes.look(1, time, 1).unwrap();
        }
        assert_eq!(*READS.lock().unwrap(), 1);
        processes.look(1, 1_000_000_001, 1).unwrap();
        assert_eq!(*READS.lock().unwrap(), 2);
    }

    #[test]
    fn a_process_that_holds_up_its_reader_holds_up_nobody_else() {
        static HELD: Mutex<()> = Mutex::new(());
        let read = |pid| {
            if pid == 7 {
                drop(HELD.lock());
            }
            Some(Seen { read: u64::MAX, ..Seen::default() })
        };
        let held = HELD.lock().unwrap();
        let mut processes = Processes::reading(read);
        assert_eq!(processes.look(7, 1, 70), Err(Unseen::Slow));
        let begun = Instant::now();
        assert_eq!(processes.look(8, 1, 70), Err(Unseen::Slow));
        assert!(begun.elapsed() < PATIENCE, "the workload is not looked at again");
        assert!(processes.look(9, 1, 90).is_ok());
        // As long as the thread waits, also after the penalty.
        thread::sleep(PENALTY);
        assert_eq!(processes.look(8, 1, 70), Err(Unseen::Slow));
        drop(held);
        while processes.look(8, 1, 70).is_err() {
            thread::yield_now();
        }
    }

    #[test]
    fn no_more_than_the_first_bytes_of_arguments_are_read() {
        assert_eq!(read_most("/dev/zero", 4097).map(|bytes| bytes.len()), Some(4097));
        assert_eq!(read_most("/no/such/file", 1), None);
    }
}
