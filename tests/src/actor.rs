//! A process that does what a test tells it, one thing after another, while the test moves it between cgroups: the
//! `actor` program.
//!
//! It can keep sockets that it made before it was moved, and have a second thread in a cgroup of its own. The kernel
//! chooses the programs by the cgroup in which a *socket* was made; what they learn of the caller is that of the *thread*.

use std::{
    collections::VecDeque,
    fmt, fs,
    io::{BufRead, BufReader, Write},
    net::{SocketAddr, UdpSocket},
    process::{Child, ChildStdin, ChildStdout, Stdio},
    str::FromStr,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use rustix::{
    io::Errno,
    process::{DumpableBehavior, Uid, set_dumpable_behavior},
    thread::{UnshareFlags, gettid, set_thread_res_uid},
};
use socket2::{Domain, Socket, Type};

use crate::{
    cgroup::Cgroup,
    dial::{Call, Method},
    netns::Netns,
    program,
};

/// How a call ended.
pub type Outcome = Result<(), Errno>;

/// Who makes a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The first thread.
    Main,
    /// The thread that [`Actor::thread_in`] started.
    Thread,
}

/// The socket a call is made on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum On {
    /// One that is made for the call and closed after it.
    New,
    /// The one of its kind that [`Actor::make_socket`] made.
    Made,
}

/// As whom an actor acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// Whoever starts it.
    Same,
    /// A user, in every respect.
    User(u32),
    /// A user by its real id, and another by its effective and saved ones.
    Effective(u32, u32),
    /// A user who is root of a user namespace of its own.
    RootOfUserNamespace(u32),
    /// Whoever starts it, in a cgroup namespace whose root is the cgroup it starts in.
    InCgroupNamespace,
}

/// An `actor` process, killed when dropped.
#[derive(Debug)]
pub struct Actor {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// The second thread's id.
    thread: Option<u32>,
}

impl Actor {
    /// Starts one in a network namespace and a cgroup, as root or as another user.
    pub fn start(namespace: &Netns, cgroup: &Cgroup, uid: Option<u32>) -> Result<Self> {
        Self::start_as(namespace, cgroup, uid.map_or(Identity::Same, Identity::User))
    }

    /// Starts one in a network namespace and a cgroup, as anybody.
    pub fn start_as(namespace: &Netns, cgroup: &Cgroup, identity: Identity) -> Result<Self> {
        let mut command = namespace.command(program("actor")?, Some(cgroup))?;
        // It takes the identity by itself, since joining the namespace and the cgroup needs root.
        command.arg(identity.to_string());
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run actor")?;
        let orders = child.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, orders, answers, thread: None })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The second thread's id, if there is one.
    pub fn tid(&self) -> Option<u32> {
        self.thread
    }

    /// Moves it to another cgroup, both of its threads.
    pub fn move_to(&self, cgroup: &Cgroup) -> Result<()> {
        cgroup.take_process(self.pid())
    }

    /// Opens a TCP connection from a new socket and closes it.
    pub fn dial_tcp(&mut self, to: SocketAddr) -> Result<Outcome> {
        self.call(Who::Main, On::New, &plain(Method::TcpConnect, to))
    }

    /// Sends a UDP datagram from a new socket that is not connected.
    pub fn send_udp(&mut self, to: SocketAddr) -> Result<Outcome> {
        self.call(Who::Main, On::New, &plain(Method::UdpSend, to))
    }

    /// Makes sockets of each kind, TCP and UDP of both families, in the cgroup it is in, and keeps them; earlier ones are
    /// closed.
    pub fn make_socket(&mut self) -> Result<()> {
        self.make_socket_by(Who::Main)
    }

    /// The same by either thread.
    pub fn make_socket_by(&mut self, who: Who) -> Result<()> {
        self.order(&Order { who, task: Task::Make }).map(drop)
    }

    /// Makes a UDP socket that is bound to an address, and keeps it; earlier ones are closed.
    pub fn serve_udp(&mut self, at: SocketAddr) -> Result<()> {
        self.order(&Order { who: Who::Main, task: Task::Serve(at) }).map(drop)
    }

    /// Waits for a datagram on the UDP socket that it serves, and tells who sent it.
    pub fn receive(&mut self) -> Result<SocketAddr> {
        Ok(self.order(&Order { who: Who::Main, task: Task::Receive })?.parse()?)
    }

    /// Receives datagrams on the UDP socket that it serves, and answers each when so many more were received; how many answers
    /// were refused.
    pub fn answer_behind(&mut self, count: u32, behind: u32) -> Result<u32> {
        Ok(self.order(&Order { who: Who::Main, task: Task::Answer(count, behind) })?.parse()?)
    }

    /// Makes a socket of any kind, as `socket(2)` takes it, and closes it.
    pub fn open(&mut self, domain: i32, kind: i32, protocol: i32) -> Result<Outcome> {
        self.outcome(&Order { who: Who::Main, task: Task::Open(domain, kind, protocol) })
    }

    /// Connects the TCP socket it made. One that was refused, or found nobody, can be connected again.
    pub fn dial_with_made_socket(&mut self, to: SocketAddr) -> Result<Outcome> {
        self.call(Who::Main, On::Made, &plain(Method::TcpConnect, to))
    }

    /// Sends a UDP datagram from the socket it made.
    pub fn send_with_made_socket(&mut self, to: SocketAddr) -> Result<Outcome> {
        self.call(Who::Main, On::Made, &plain(Method::UdpSend, to))
    }

    /// Puts its second thread into a cgroup, which must be threaded and share its domain with the process's, and starts
    /// the thread if there is none.
    pub fn thread_in(&mut self, cgroup: &Cgroup) -> Result<()> {
        let tid = match self.thread {
            Some(tid) => tid,
            None => self.order(&Order { who: Who::Main, task: Task::Spawn })?.parse()?,
        };
        self.thread = Some(tid);
        cgroup.take_thread(tid)
    }

    /// Opens a TCP connection from a new socket of the second thread.
    pub fn dial_from_thread(&mut self, to: SocketAddr) -> Result<Outcome> {
        self.call(Who::Thread, On::New, &plain(Method::TcpConnect, to))
    }

    /// Sends a UDP datagram from a new socket of the second thread.
    pub fn send_from_thread(&mut self, to: SocketAddr) -> Result<Outcome> {
        self.call(Who::Thread, On::New, &plain(Method::UdpSend, to))
    }

    /// Makes any call.
    pub fn call(&mut self, who: Who, on: On, call: &Call) -> Result<Outcome> {
        ensure!(who == Who::Main || self.thread.is_some(), "the actor has no second thread yet");
        self.outcome(&Order { who, task: Task::Call(on, *call) })
    }

    fn outcome(&mut self, order: &Order) -> Result<Outcome> {
        match self.order(order)?.parse()? {
            0 => Ok(Ok(())),
            errno => Ok(Err(Errno::from_raw_os_error(errno))),
        }
    }

    fn order(&mut self, order: &Order) -> Result<String> {
        writeln!(self.orders, "{order}")?;
        let mut answer = String::new();
        ensure!(self.answers.read_line(&mut answer)? > 0, "the actor ended early, at {order}");
        Ok(answer.trim().to_owned())
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn plain(method: Method, to: SocketAddr) -> Call {
    Call { method, mapped: false, to }
}

/// What the actor reads: a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Order {
    who: Who,
    task: Task,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Task {
    /// Starts the second thread; the answer is its id.
    Spawn,
    /// Makes sockets to keep; the answer is empty.
    Make,
    /// Makes a bound UDP socket to keep; the answer is empty.
    Serve(SocketAddr),
    /// The answer is the sender's address.
    Receive,
    /// Receives so many datagrams, and answers each when so many more were received; the answer is how many were refused.
    Answer(u32, u32),
    /// Makes a socket; the answer is 0 or the error number.
    Open(i32, i32, i32),
    /// The answer is 0 or the error number.
    Call(On, Call),
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let who = match self.who {
            Who::Main => "main",
            Who::Thread => "thread",
        };
        match self.task {
            Task::Spawn => write!(f, "{who} spawn"),
            Task::Make => write!(f, "{who} make"),
            Task::Serve(at) => write!(f, "{who} serve {at}"),
            Task::Receive => write!(f, "{who} receive"),
            Task::Answer(count, behind) => write!(f, "{who} answer {count} {behind}"),
            Task::Open(domain, kind, protocol) => write!(f, "{who} open {domain} {kind} {protocol}"),
            Task::Call(On::New, call) => write!(f, "{who} new {call}"),
            Task::Call(On::Made, call) => write!(f, "{who} made {call}"),
        }
    }
}

impl FromStr for Order {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (who, task) = text.split_once(' ').context("an order is WHO TASK")?;
        let who = match who {
            "main" => Who::Main,
            "thread" => Who::Thread,
            other => bail!("nobody is called {other}"),
        };
        let task = match task.split_once(' ').unwrap_or((task, "")) {
            ("spawn", _) => Task::Spawn,
            ("make", _) => Task::Make,
            ("serve", at) => Task::Serve(at.parse()?),
            ("receive", _) => Task::Receive,
            ("answer", numbers) => {
                let (count, behind) = numbers.split_once(' ').context("an answer is COUNT BEHIND")?;
                Task::Answer(count.parse()?, behind.parse()?)
            }
            ("open", socket) => {
                let numbers: Vec<i32> = socket.split(' ').map(str::parse).collect::<Result<_, _>>()?;
                let [domain, kind, protocol] = numbers[..] else { bail!("a socket is DOMAIN TYPE PROTOCOL") };
                Task::Open(domain, kind, protocol)
            }
            ("new", call) => Task::Call(On::New, call.parse()?),
            ("made", call) => Task::Call(On::Made, call.parse()?),
            (other, _) => bail!("unknown task {other}"),
        };
        Ok(Self { who, task })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Same => f.write_str("same"),
            Self::User(uid) => write!(f, "user {uid}"),
            Self::Effective(real, effective) => write!(f, "effective {real} {effective}"),
            Self::RootOfUserNamespace(uid) => write!(f, "userns {uid}"),
            Self::InCgroupNamespace => f.write_str("cgroupns"),
        }
    }
}

impl FromStr for Identity {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let words: Vec<&str> = text.split(' ').collect();
        Ok(match words[..] {
            ["same"] => Self::Same,
            ["user", uid] => Self::User(uid.parse()?),
            ["effective", real, effective] => Self::Effective(real.parse()?, effective.parse()?),
            ["userns", uid] => Self::RootOfUserNamespace(uid.parse()?),
            ["cgroupns"] => Self::InCgroupNamespace,
            _ => bail!("nobody is {text}"),
        })
    }
}

impl Identity {
    /// Makes it the caller's, who must have one thread yet: what is of a thread is then of the whole process.
    fn take(self) -> Result<()> {
        match self {
            Self::Same => Ok(()),
            Self::User(uid) => become_user(uid, uid),
            Self::Effective(real, effective) => become_user(real, effective),
            Self::RootOfUserNamespace(uid) => {
                become_user(uid, uid)?;
                unshare(UnshareFlags::NEWUSER).context("no user namespace; see user.max_user_namespaces")?;
                // Else the file is root's, since the process has changed its user.
                set_dumpable_behavior(DumpableBehavior::Dumpable)?;
                fs::write("/proc/self/uid_map", format!("0 {uid} 1")).context("cannot become root of a user namespace")
            }
            Self::InCgroupNamespace => unshare(UnshareFlags::NEWCGROUP).context("no cgroup namespace"),
        }
    }
}

/// Root loses every capability by this, unless it stays root in some respect.
fn become_user(real: u32, effective: u32) -> Result<()> {
    let (real, effective) = (Uid::from_raw(real), Uid::from_raw(effective));
    set_thread_res_uid(real, effective, effective).context("cannot become another user")
}

fn unshare(namespaces: UnshareFlags) -> Result<()> {
    // SAFETY: there is one thread, and no file descriptor table is unshared.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// The actor's own side: follows the orders it reads until there are no more.
pub fn act(orders: impl BufRead, mut answers: impl Write, identity: Identity) -> Result<()> {
    identity.take()?;
    let mut cast = Cast { made: Vec::new(), thread: None };
    for line in orders.lines() {
        let answer = cast.follow(line?.parse()?)?;
        writeln!(answers, "{answer}")?;
        answers.flush()?;
    }
    Ok(())
}

/// A thing to do, and where to tell what came of it.
type Job = Box<dyn FnOnce() + Send>;

struct Cast {
    made: Vec<Socket>,
    thread: Option<Sender<Job>>,
}

impl Cast {
    fn follow(&mut self, order: Order) -> Result<String> {
        match order.task {
            Task::Spawn => {
                let (jobs, queue): (Sender<Job>, Receiver<Job>) = channel();
                thread::spawn(move || queue.into_iter().for_each(|job| job()));
                self.thread = Some(jobs);
                Ok(self.by(Who::Thread, gettid)?.as_raw_nonzero().to_string())
            }
            Task::Make => {
                self.made = self.by(order.who, make_sockets)??;
                Ok(String::new())
            }
            Task::Serve(at) => {
                let socket = Socket::new(Domain::for_address(at), Type::DGRAM, None)?;
                socket.set_read_timeout(Some(Duration::from_secs(10)))?;
                socket.bind(&at.into())?;
                self.made = vec![socket];
                Ok(String::new())
            }
            Task::Receive => {
                let socket = self.made.first().context("no socket was made")?;
                let (_, sender) = UdpSocket::from(socket.try_clone()?).recv_from(&mut [0; 64])?;
                Ok(sender.to_string())
            }
            Task::Answer(count, behind) => {
                let socket = UdpSocket::from(self.made.first().context("no socket was made")?.try_clone()?);
                Ok(answer_behind(&socket, count, behind)?.to_string())
            }
            Task::Open(domain, kind, protocol) => {
                let opened = Socket::new(domain.into(), kind.into(), Some(protocol.into()));
                Ok(opened.err().and_then(|error| error.raw_os_error()).unwrap_or(0).to_string())
            }
            Task::Call(On::New, call) => Ok(self.by(order.who, move || call.make())?.to_string()),
            Task::Call(On::Made, call) => {
                let socket = self.made_for(&call)?;
                let result = self.by(order.who, move || call.attempt_on(&socket))?;
                Ok(result.err().and_then(|error| error.raw_os_error()).unwrap_or(0).to_string())
            }
        }
    }

    /// Has something done by one of the threads, and waits for it.
    fn by<T: Send + 'static>(&self, who: Who, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        if who == Who::Main {
            return Ok(job());
        }
        let (tell, told) = channel();
        let tell = move || tell.send(job()).expect("this thread waits for it");
        let jobs = self.thread.as_ref().context("there is no second thread")?;
        jobs.send(Box::new(tell)).ok().context("the second thread has ended")?;
        told.recv().context("the second thread has ended")
    }

    fn made_for(&self, call: &Call) -> Result<Socket> {
        let kind = call.socket_kind();
        for socket in &self.made {
            if (socket.domain()?, socket.r#type()?) == kind {
                return Ok(socket.try_clone()?);
            }
        }
        bail!("no socket was made");
    }
}

fn answer_behind(socket: &UdpSocket, count: u32, behind: u32) -> Result<u32> {
    let (mut waiting, mut refused) = (VecDeque::new(), 0);
    for _ in 0..count {
        waiting.push_back(socket.recv_from(&mut [0; 64])?.1);
        if waiting.len() > behind as usize {
            let to = waiting.pop_front().context("there is more than one")?;
            refused +=
                u32::from(socket.send_to(b"!", to).is_err_and(|error| error.raw_os_error() == Some(libc::EPERM)));
        }
    }
    Ok(refused)
}

fn make_sockets() -> std::io::Result<Vec<Socket>> {
    let kinds = [Domain::IPV4, Domain::IPV6].map(|domain| [Type::STREAM, Type::DGRAM].map(|kind| (domain, kind)));
    kinds.concat().into_iter().map(|(domain, kind)| Socket::new(domain, kind, None)).collect()
}
