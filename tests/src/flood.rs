//! Workloads that refuse to be quiet: processes that are refused at full speed, or that make each report dear, and the neighbour
//! whose reports must come all the same.
//!
//! [`Flood::start`] starts one, which ends when it is dropped; [`Neighbour::refuse`] is refused so often; [`Reports`] reads what
//! an agent writes and keeps counts of it only, however much it is. The other side of a flood is the `flood` program.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{BufRead, BufReader, Read},
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    cgroup::Cgroup,
    dial::{Call, Dialer, Method, Timed},
    eventually,
    netns::Netns,
    program,
};

/// What a workload does to whoever reports of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It is refused at full speed.
    Plain,
    /// It declares 64 MiB of its memory to be its arguments, which needs no privilege.
    DeclaredArguments,
    /// It has 1.9 MB of arguments.
    Arguments,
    /// Its cgroup is a thousand levels deep.
    Deep,
    /// Ten thousand cgroups, and jobs in them that are gone before anybody looks.
    Jobs,
    /// Names and arguments that take the most room when they are shown.
    Names,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Plain, Self::DeclaredArguments, Self::Arguments, Self::Deep, Self::Jobs, Self::Names];

    /// The word that the program is told.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::DeclaredArguments => "declared",
            Self::Arguments => "arguments",
            Self::Deep => "deep",
            Self::Jobs => "jobs",
            Self::Names => "names",
        }
    }

    /// Refusals in a second; 0 for as many as can be.
    const fn rate(self) -> u32 {
        match self {
            Self::Plain | Self::Jobs => 0,
            Self::DeclaredArguments | Self::Arguments | Self::Deep | Self::Names => 200,
        }
    }
}

/// Levels of [`Kind::Deep`], and cgroups of [`Kind::Jobs`].
const LEVELS: usize = 1_000;
const CGROUPS: usize = 10_000;
/// Where floods want to go, and their neighbours: nobody opens these.
const OF_FLOODS: &str = "203.0.113.66:6666";
const OF_NEIGHBOURS: &str = "203.0.113.77:7777";

/// A running flood; it ends, and its cgroups go, when dropped.
#[derive(Debug)]
pub struct Flood {
    child: Child,
    /// Dropped after the process has ended.
    _below: Below,
}

impl Flood {
    /// Starts one in a cgroup, which is its workload, and waits until it was refused for the first time.
    pub fn start(kind: Kind, cgroup: &Cgroup, namespace: &Netns) -> Result<Self> {
        let below = Below::make(kind, cgroup)?;
        let mut command = namespace.command(program("flood")?, None)?;
        command.arg(kind.name()).arg(kind.rate().to_string()).arg(OF_FLOODS).arg(&below.leaf);
        match kind {
            Kind::Arguments => drop(command.args(std::iter::repeat_n("a".repeat(100_000), 19))),
            Kind::Names => drop(command.args(std::iter::repeat_n("", 3_000)).arg("\u{1b}[31m\"\\\n".repeat(1_000))),
            Kind::Plain | Kind::DeclaredArguments | Kind::Deep | Kind::Jobs => {}
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run flood")?;
        let answers = child.stdout.take().context("stdout is piped")?;
        let flood = Self { child, _below: below };
        let mut ready = [0; 1];
        let mut answers = BufReader::new(answers);
        answers.read_exact(&mut ready).context("the flood ended before it began")?;
        Ok(flood)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The cgroups below that of a flood.
#[derive(Debug)]
struct Below {
    /// Where its process goes, or the parent of where its jobs do.
    leaf: PathBuf,
    /// In the order in which they were made.
    made: Vec<PathBuf>,
}

impl Below {
    fn make(kind: Kind, cgroup: &Cgroup) -> Result<Self> {
        let mut below = Self { leaf: cgroup.path().to_owned(), made: Vec::new() };
        match kind {
            Kind::Plain | Kind::DeclaredArguments | Kind::Arguments | Kind::Names => {}
            Kind::Deep => {
                for _ in 0..LEVELS {
                    below.leaf.push("n");
                    below.add(below.leaf.clone())?;
                }
            }
            Kind::Jobs => {
                for number in 0..CGROUPS {
                    below.add(cgroup.path().join(format!("j{number}")))?;
                }
            }
        }
        Ok(below)
    }

    fn add(&mut self, path: PathBuf) -> Result<()> {
        fs::create_dir(&path).with_context(|| format!("cannot create cgroup {}", path.display()))?;
        self.made.push(path);
        Ok(())
    }
}

impl Drop for Below {
    fn drop(&mut self) {
        // The job that ran when its parent was killed; it ends by itself.
        let entries = fs::read_dir(&self.leaf).into_iter().flatten().flatten();
        self.made.extend(
            entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("job")).map(|entry| entry.path()),
        );
        for path in self.made.iter().rev() {
            // A process that just ended still holds its cgroup for a moment.
            let removed = eventually("an empty cgroup", || fs::remove_dir(path).ok());
            if let Err(error) = removed {
                return eprintln!("cannot remove cgroup {}: {error}", path.display());
            }
        }
    }
}

/// The program's own side: is refused until it is killed. `rest` are the arguments that it has for those who read them.
pub fn flood(kind: &str, rate: u32, to: SocketAddr, leaf: &Path) -> Result<()> {
    if kind == Kind::Jobs.name() {
        return jobs(to, leaf);
    }
    fs::write(leaf.join("cgroup.procs"), "0").context("cannot enter the cgroup")?;
    if kind == Kind::DeclaredArguments.name() {
        declare_arguments(64 << 20)?;
    }
    if kind == Kind::Names.name() {
        rustix::thread::set_name(c"\x1b[2J\" uid=0 \x7f")?;
    }
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    ensure!(socket.connect(to).is_err(), "{to} is not refused");
    println!("ready");
    let pause = Duration::from_secs(1).checked_div(rate);
    loop {
        // Refused, always.
        let _ = socket.connect(to);
        pause.into_iter().for_each(thread::sleep);
    }
}

/// Processes that are refused once, each in a cgroup of its own, which is gone when it is.
fn jobs(to: SocketAddr, parent: &Path) -> Result<()> {
    let mut is_first = true;
    for number in 0_u64.. {
        let cgroup = parent.join(format!("job{number}"));
        fs::create_dir(&cgroup)?;
        match clone_into(&File::open(&cgroup)?) {
            -1 => bail!("cannot start a job: {}", std::io::Error::last_os_error()),
            0 => {
                let refused = UdpSocket::bind("0.0.0.0:0").and_then(|socket| socket.connect(to)).is_err();
                // SAFETY: it ends the child at once.
                unsafe { libc::_exit(i32::from(!refused)) }
            }
            child => {
                let child = i32::try_from(child)?;
                // SAFETY: a child of this process, and no place for its status.
                ensure!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) } == child, "no child");
            }
        }
        while fs::remove_dir(&cgroup).is_err() {
            thread::yield_now();
        }
        if is_first {
            println!("ready");
            is_first = false;
        }
    }
    Ok(())
}

/// `fork` into a cgroup, which takes less time than to move there: `struct clone_args` of `linux/sched.h`.
fn clone_into(cgroup: &File) -> i64 {
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    let mut args = [0_u64; 11];
    (args[0], args[4]) = (CLONE_INTO_CGROUP, u64::from(libc::SIGCHLD.unsigned_abs()));
    args[10] = u64::from(cgroup.as_raw_fd().unsigned_abs());
    // SAFETY: there is one thread; the child shares nothing, makes a few system calls and ends.
    unsafe { libc::syscall(libc::SYS_clone3, args.as_ptr(), size_of_val(&args)) }
}

/// `struct prctl_mm_map` of `linux/prctl.h`.
#[repr(C)]
struct MemoryMap {
    /// From `start_code` to `env_end`.
    addresses: [u64; 11],
    auxv: *const u64,
    auxv_size: u32,
    exe_fd: u32,
}

/// Declares fresh memory to be the arguments of this process.
fn declare_arguments(size: usize) -> Result<()> {
    let memory = vec![b'a'; size].leak();
    // Without it, the kernel takes them for a title of the process and shows a page (`get_mm_cmdline` of `fs/proc/base.c`).
    memory[size - 1] = 0;
    let start = memory.as_ptr() as u64;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit_once(')').context("a name")?.1;
    // The first is field 3.
    let fields: Vec<u64> = after_name.split_ascii_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
    let field = |number: usize| fields[number - 3];
    // SAFETY: asks where the heap ends.
    let heap_end = unsafe { libc::sbrk(0) } as u64;
    let addresses = [
        field(26),
        field(27),
        field(45),
        field(46),
        field(47),
        heap_end,
        field(28),
        start,
        start + size as u64,
        field(50),
        field(51),
    ];
    let map = MemoryMap { addresses, auxv: std::ptr::null(), auxv_size: 0, exe_fd: u32::MAX };
    // SAFETY: the kernel checks what is in the structure, which is as it says.
    let result =
        unsafe { libc::prctl(libc::PR_SET_MM, libc::PR_SET_MM_MAP, &raw const map, size_of::<MemoryMap>(), 0) };
    ensure!(result == 0, "cannot declare arguments: {}", std::io::Error::last_os_error());
    Ok(())
}

/// A workload that is refused now and then.
#[derive(Debug)]
pub struct Neighbour {
    dialer: Dialer,
    cgroup: String,
}

impl Neighbour {
    /// Starts one in a cgroup.
    pub fn start(cgroup: &Cgroup, namespace: &Netns) -> Result<Self> {
        Ok(Self { dialer: Dialer::start(program("dial")?, cgroup, namespace)?, cgroup: cgroup.name() })
    }

    /// The path of its cgroup, as reports name it.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// Is refused so many times.
    pub fn refuse(&mut self, times: u32) -> Result<()> {
        let call = Call { method: Method::UdpConnect, mapped: false, to: OF_NEIGHBOURS.parse()? };
        ensure!(self.dialer.is_refused(&call)?, "{call} is not refused");
        self.dialer.time(Timed::Connect, &call, times - 1)?;
        Ok(())
    }
}

/// What an agent writes to stdout, of which counts are kept.
#[derive(Debug, Clone)]
pub struct Reports(Arc<(Mutex<Seen>, Condvar)>);

/// Counts of reports.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Lines.
    pub lines: u64,
    /// Denials that they stand for.
    pub denials: u64,
    /// Bytes of the longest line, with its end.
    pub longest: usize,
    /// Lines that hold a control character, or are not JSON.
    pub harmful: u64,
    /// Denials by the path of their cgroup, of those that are watched.
    pub watched: BTreeMap<String, u64>,
}

impl Reports {
    /// Reads to the end of a pipe, on a thread of its own, and counts for these cgroups.
    pub fn read(pipe: ChildStdout, watched: &[&str]) -> Self {
        let watched: BTreeMap<String, u64> = watched.iter().map(|&cgroup| (cgroup.to_owned(), 0)).collect();
        let reports = Self(Arc::new((Mutex::new(Seen { watched, ..Seen::default() }), Condvar::new())));
        let reading = reports.clone();
        thread::spawn(move || {
            let mut lines = BufReader::with_capacity(1 << 16, pipe);
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).is_ok_and(|length| length > 0) {
                reading.add(&line);
                line.clear();
            }
        });
        reports
    }

    fn add(&self, line: &[u8]) {
        let text = String::from_utf8_lossy(line);
        let after = |name: &str| text.split_once(name).map(|(_, after)| after);
        let count = after("\"count\":").and_then(|after| after.split([',', '}']).next()?.parse().ok()).unwrap_or(1);
        let path = after("\"cgroup\":{\"id\":").and_then(|after| after.split_once("\"path\":\"")?.1.split('"').next());
        let is_harmful = text.trim_end_matches('\n').chars().any(char::is_control) || !text.ends_with("}\n");
        let mut seen = self.lock();
        seen.lines += 1;
        seen.denials += count;
        seen.longest = seen.longest.max(line.len());
        seen.harmful += u64::from(is_harmful);
        if let Some(of) = path.and_then(|path| seen.watched.get_mut(path)) {
            *of += count;
        }
        drop(seen);
        self.0.1.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.0.lock().expect("no thread panics with it")
    }

    /// What was read so far.
    pub fn seen(&self) -> Seen {
        self.lock().clone()
    }

    /// Denials of a watched cgroup so far.
    pub fn of(&self, cgroup: &str) -> u64 {
        self.lock().watched.get(cgroup).copied().unwrap_or(0)
    }

    /// Waits until there are so many denials of a watched cgroup; how long that took.
    pub fn wait_for(&self, cgroup: &str, count: u64, patience: Duration) -> Result<Duration> {
        let begun = Instant::now();
        let mut seen = self.lock();
        loop {
            let there = seen.watched.get(cgroup).copied().unwrap_or(0);
            if there >= count {
                return Ok(begun.elapsed());
            }
            let left = patience.saturating_sub(begun.elapsed());
            ensure!(!left.is_zero(), "{there} of {count} denials of {cgroup} after {patience:?}: {seen:#?}");
            seen = self.0.1.wait_timeout(seen, left).expect("no thread panics with it").0;
        }
    }
}

/// The most memory that a process has ever had, in bytes.
pub fn peak_memory(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no peak of memory")?;
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kilobytes << 10)
}

/// A command whose stdout and stderr are pipes.
pub fn piped(mut command: Command) -> Result<Child> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().with_context(|| format!("cannot run {}", command.get_program().display()))
}
