//! A process that makes one attempt: this side of it, which starts it and moves it, and its own, which is the `escape`
//! program.

use std::{
    fs::File,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{AsFd, AsRawFd},
        unix::process::CommandExt,
    },
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use rustix::{
    process::{
        DumpableBehavior, Gid, Pid, Signal, Uid, kill_process_group, set_dumpable_behavior,
        set_parent_process_death_signal,
    },
    thread::{LinkNameSpaceType, move_into_link_name_space, set_thread_groups, set_thread_res_gid, set_thread_res_uid},
};

use super::{
    Act, NOBODY, Outcome, Step, Vector, Who,
    target::{Permission, Target},
    vectors,
    yard::Namespace,
};
use crate::{cgroup::Cgroup, program};

/// After so many seconds an attempt has failed.
const SECONDS: u32 = 5;

/// One attempt.
#[derive(Debug, Clone, Copy)]
pub struct Attempt {
    /// How.
    pub vector: &'static Vector,
    /// By whom.
    pub who: Who,
    /// Where to.
    pub target: Target,
}

/// A process that makes one attempt, killed with its children when dropped.
#[derive(Debug)]
pub struct Prisoner {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Prisoner {
    /// Starts one in a network namespace and in a cgroup, and waits until it has prepared. `other` is a namespace that it
    /// may enter, if it can.
    pub fn start(attempt: &Attempt, namespace: &Namespace, other: &Namespace, cgroup: &Cgroup) -> Result<Self> {
        let mut command = Command::new(program("escapee")?);
        command.args(["attempt", attempt.vector.name, &attempt.who.to_string()]);
        command.args([attempt.target.number().to_string(), attempt.target.permission().to_string()]);
        command.arg(format!("/proc/{}/fd/{}", std::process::id(), other.fd().as_raw_fd()));
        enter(&mut command, namespace, cgroup)?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).process_group(0).spawn()?;
        let orders = child.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, orders, answers })
    }

    /// Waits until it has prepared; what went wrong, if it could not.
    pub fn prepared(&mut self) -> Result<Result<(), String>> {
        let answer = self.answer()?;
        Ok(if answer == "ready" { Ok(()) } else { Err(answer) })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Has it act; what went wrong, if something did.
    pub fn act(&mut self) -> Result<Result<(), String>> {
        // It may have ended, which the answer tells.
        let _ = writeln!(self.orders, "go");
        let answer = self.answer()?;
        Ok(if answer == "done" { Ok(()) } else { Err(answer) })
    }

    fn answer(&mut self) -> Result<String> {
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        Ok(if answer.is_empty() { "no answer in time".to_owned() } else { answer.trim().to_owned() })
    }
}

impl Drop for Prisoner {
    fn drop(&mut self) {
        // These fail only if it has ended already.
        if let Some(pid) = Pid::from_raw(self.child.id().cast_signed()) {
            let _ = kill_process_group(pid, Signal::KILL);
        }
        let _ = self.child.wait();
    }
}

fn enter(command: &mut Command, namespace: &Namespace, cgroup: &Cgroup) -> Result<()> {
    let procs = File::options().write(true).open(cgroup.procs())?;
    let namespace = namespace.fd().try_clone()?;
    let enter = move || {
        rustix::io::write(&procs, b"0")?;
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes two system calls on descriptors that were opened before the fork; it
    // neither allocates nor locks.
    unsafe { command.pre_exec(enter) };
    Ok(())
}

/// The prisoner's own side: prepares, waits to be told, and acts. The arguments are those of [`Prisoner::start`].
pub fn attempt(arguments: &[String]) -> Result<()> {
    let [name, who, number, permission, namespace] = arguments else { anyhow::bail!("five arguments") };
    let vector = vectors::all().find(|vector| vector.name == name).context("no such vector")?;
    let target = Target::new(number.parse()?, permission.parse::<Permission>()?);
    if vector.place == super::Place::Elsewhere {
        move_into_link_name_space(File::open(namespace)?.as_fd(), Some(LinkNameSpaceType::Network))?;
    }
    bind_to_this_process(who.parse()?)?;
    match vector.act {
        Act::Once(act) => {
            await_order("ready")?;
            tell(act(target))
        }
        Act::Twice(prepare) => match prepare(target) {
            Ok(rest) => {
                await_order("ready")?;
                tell(rest())
            }
            Err(step) => tell(Err(step)),
        },
    }
}

/// Ends with its parent, or when it takes too long, and is whoever it shall be.
fn bind_to_this_process(who: Who) -> Result<()> {
    if who == Who::User {
        set_thread_groups(&[])?;
        let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        set_thread_res_gid(gid, gid, gid)?;
        set_thread_res_uid(uid, uid, uid)?;
        // Else its own files in /proc are root's, since it has changed its user.
        set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    }
    set_parent_process_death_signal(Some(Signal::KILL))?;
    // SAFETY: no pointer is passed.
    unsafe { libc::alarm(SECONDS) };
    Ok(())
}

fn await_order(word: &str) -> Result<()> {
    println!("{word}");
    let mut order = String::new();
    // It waits for the filter, which may take longer than an attempt.
    // SAFETY: no pointer is passed.
    unsafe { libc::alarm(0) };
    std::io::stdin().read_line(&mut order)?;
    // SAFETY: no pointer is passed.
    unsafe { libc::alarm(SECONDS) };
    ensure!(order.trim() == "go", "nobody waits for this attempt");
    Ok(())
}

fn tell(outcome: Outcome) -> Result<()> {
    match outcome {
        Ok(()) => println!("done"),
        Err(Step { call, errno }) => println!("{call}: {}", name_of(errno)),
    }
    // What it keeps open stays so until what it sent was looked at.
    let mut rest = String::new();
    std::io::stdin().read_line(&mut rest)?;
    Ok(())
}

/// The name of an error number, or the number.
fn name_of(errno: i32) -> String {
    let names = [
        (libc::EPERM, "EPERM"),
        (libc::ENOENT, "ENOENT"),
        (libc::EBADF, "EBADF"),
        (libc::EAGAIN, "EAGAIN"),
        (libc::EBUSY, "EBUSY"),
        (libc::EEXIST, "EEXIST"),
        (libc::EACCES, "EACCES"),
        (libc::EINVAL, "EINVAL"),
        (libc::ENOSYS, "ENOSYS"),
        (libc::ENODEV, "ENODEV"),
        (libc::EDESTADDRREQ, "EDESTADDRREQ"),
        (libc::ENOPROTOOPT, "ENOPROTOOPT"),
        (libc::EPROTONOSUPPORT, "EPROTONOSUPPORT"),
        (libc::ESOCKTNOSUPPORT, "ESOCKTNOSUPPORT"),
        (libc::EOPNOTSUPP, "EOPNOTSUPP"),
        (libc::EAFNOSUPPORT, "EAFNOSUPPORT"),
        (libc::EADDRNOTAVAIL, "EADDRNOTAVAIL"),
        (libc::ENETUNREACH, "ENETUNREACH"),
        (libc::EHOSTUNREACH, "EHOSTUNREACH"),
        (libc::ECONNREFUSED, "ECONNREFUSED"),
        (libc::ENOTCONN, "ENOTCONN"),
        (libc::EISCONN, "EISCONN"),
        (libc::ETIMEDOUT, "ETIMEDOUT"),
        (libc::EPROTOTYPE, "EPROTOTYPE"),
    ];
    names.iter().find(|(number, _)| *number == errno).map_or_else(|| errno.to_string(), |(_, name)| (*name).to_owned())
}
