//! Many threads of a filtered process that dial without a pause while policies change: each answer must be that of a policy
//! that was in force during the call. The `hammer` program.
//!
//! Policies are numbered in the order in which they come. Before the change to policy `n` begins, the test notes `begun = n`;
//! when it is in force, `done = n`. A caller reads `done` before a call and `begun` after it: the answer must be one that a
//! policy from the one number to the other gives.

use std::{
    fmt,
    fs::File,
    io::{BufRead, BufReader, Write},
    os::fd::AsRawFd,
    process::{Child, ChildStdin, ChildStdout, Stdio},
    ptr::NonNull,
    str::FromStr,
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use tempfile::NamedTempFile;

use crate::{cgroup::Cgroup, dial::Call, netns::Netns, program};

/// Threads of one process.
pub const THREADS: usize = 8;

/// A call, and for each policy of those that take turns whether it opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// The call.
    pub call: Call,
    /// By policy: that of number `n` is `n` modulo the length.
    pub is_open: Vec<bool>,
}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let is_open: String = self.is_open.iter().map(|&is_open| if is_open { '1' } else { '0' }).collect();
        write!(f, "{is_open} {}", self.call)
    }
}

impl FromStr for Expected {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (is_open, call) = text.split_once(' ').context("POLICIES CALL")?;
        Ok(Self { call: call.parse()?, is_open: is_open.chars().map(|digit| digit == '1').collect() })
    }
}

/// What both sides see: a page of memory.
struct Shared(NonNull<[AtomicU64; 2]>);

// SAFETY: what it points to is atomic, and mapped until this is dropped.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    /// Maps the beginning of a file.
    fn map(file: &File) -> Result<Self> {
        ensure!(file.metadata()?.len() >= size_of::<[AtomicU64; 2]>() as u64, "the file is too short");
        let (size, access) = (size_of::<[AtomicU64; 2]>(), libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: a new mapping, at an address that the kernel chooses, touches no memory of ours.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), size, access, libc::MAP_SHARED, file.as_raw_fd(), 0) };
        ensure!(address != libc::MAP_FAILED, "cannot map: {}", std::io::Error::last_os_error());
        Ok(Self(NonNull::new(address.cast()).context("nothing is mapped at 0")?))
    }

    fn cells(&self) -> &[AtomicU64; 2] {
        // SAFETY: the mapping lives as long as `self`, is aligned to a page and readable and writable; every bit pattern is a
        // number, and whoever else writes it does so atomically.
        unsafe { self.0.as_ref() }
    }

    fn begun(&self) -> &AtomicU64 {
        &self.cells()[0]
    }

    fn done(&self) -> &AtomicU64 {
        &self.cells()[1]
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: what `map` mapped; nobody has a reference to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<[AtomicU64; 2]>()) };
    }
}

/// What became of all calls.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// All.
    pub calls: u64,
    /// Those during which one policy alone was in force.
    pub certain: u64,
    /// Answers that no policy of their time gives.
    pub wrong: u64,
    /// The first of them.
    pub first: String,
}

/// A `hammer` process, killed when dropped.
pub struct Hammer {
    shared: Shared,
    child: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    _file: NamedTempFile,
}

impl Hammer {
    /// Starts one while policy 0 is in force.
    pub fn start(cgroup: &Cgroup, namespace: &Netns, threads: usize, expected: &[Expected]) -> Result<Self> {
        let file = NamedTempFile::with_prefix("egress-hammer-")?;
        file.as_file().set_len(4096)?;
        let mut command = namespace.command(program("hammer")?, Some(cgroup))?;
        command.arg(file.path()).arg(threads.to_string()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().context("cannot run hammer")?;
        let mut orders = child.stdin.take().context("stdin is piped")?;
        expected.iter().try_for_each(|expected| writeln!(orders, "{expected}"))?;
        writeln!(orders)?;
        let mut answers = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let mut ready = String::new();
        ensure!(answers.read_line(&mut ready)? > 0, "hammer ended early");
        Ok(Self { shared: Shared::map(file.as_file())?, child, orders: Some(orders), answers, _file: file })
    }

    /// A change to the policy of a number begins.
    pub fn begin(&self, number: u64) {
        self.shared.begun().store(number, Ordering::SeqCst);
    }

    /// That policy is in force.
    pub fn done(&self, number: u64) {
        self.shared.done().store(number, Ordering::SeqCst);
    }

    /// Stops all threads.
    pub fn finish(mut self) -> Result<Tally> {
        drop(self.orders.take());
        let mut line = String::new();
        ensure!(self.answers.read_line(&mut line)? > 0, "hammer ended early");
        let mut words = line.trim_end().splitn(4, ' ');
        let mut number = || words.next().unwrap_or_default().parse();
        let (calls, certain, wrong) = (number()?, number()?, number()?);
        Ok(Tally { calls, certain, wrong, first: words.next().unwrap_or_default().to_owned() })
    }
}

impl Drop for Hammer {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program's own side: calls until there is nothing more to read.
pub fn hammer(file: &File, threads: usize, orders: impl BufRead, mut answers: impl Write) -> Result<()> {
    let shared = Shared::map(file)?;
    let mut lines = orders.lines();
    let mut expected: Vec<Expected> = Vec::new();
    for line in lines.by_ref() {
        match line? {
            line if line.is_empty() => break,
            line => expected.push(line.parse()?),
        }
    }
    let (stop, total) = (AtomicBool::new(false), Mutex::new(Tally::default()));
    thread::scope(|scope| {
        for index in 0..threads {
            let (expected, shared, stop, total) = (&expected, &shared, &stop, &total);
            scope.spawn(move || {
                let tally = call_until(stop, shared, expected, index * expected.len() / threads);
                total.lock().expect("no thread panics with it").add(tally);
            });
        }
        // Whoever waits is told that the threads run, and tells by the end of the input that they may end.
        let ready = writeln!(answers, "ready").and_then(|()| answers.flush());
        lines.by_ref().for_each(drop);
        stop.store(true, Ordering::SeqCst);
        ready
    })?;
    let Tally { calls, certain, wrong, first } = total.into_inner().expect("no thread panics with it");
    Ok(writeln!(answers, "{calls} {certain} {wrong} {first}")?)
}

impl Tally {
    /// Adds those of another process.
    pub fn add(&mut self, other: Self) {
        self.calls += other.calls;
        self.certain += other.certain;
        self.wrong += other.wrong;
        if self.first.is_empty() {
            self.first = other.first;
        }
    }
}

fn call_until(stop: &AtomicBool, shared: &Shared, expected: &[Expected], from: usize) -> Tally {
    let mut tally = Tally::default();
    for expected in expected.iter().cycle().skip(from) {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let done = shared.done().load(Ordering::SeqCst);
        let is_open = expected.call.make() != Errno::PERM.raw_os_error();
        let begun = shared.begun().load(Ordering::SeqCst);
        let policies = expected.is_open.len() as u64;
        let mut in_force = (done..=begun).take(expected.is_open.len());
        let is_right =
            in_force.any(|number| expected.is_open[usize::try_from(number % policies).unwrap_or(0)] == is_open);
        tally.calls += 1;
        tally.certain += u64::from(done == begun);
        if !is_right {
            tally.wrong += 1;
            if tally.first.is_empty() {
                tally.first = format!("{expected} was open: {is_open}, policies {done} to {begun}");
            }
        }
    }
    tally
}
