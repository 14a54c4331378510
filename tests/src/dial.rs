//! Real calls from a filtered process: the `dial` program makes them, one for each line it reads.

use std::{
    ffi::OsStr,
    fmt,
    io::{self, BufRead, BufReader, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    str::FromStr,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::{cgroup::Cgroup, netns::Netns};

/// How a destination is dialled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// TCP `connect`.
    TcpConnect,
    /// UDP `connect`.
    UdpConnect,
    /// UDP `sendto` on a socket that is not connected.
    UdpSend,
}

/// A destination and how to dial it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Call {
    /// How.
    pub method: Method,
    /// An IPv4 address is dialled from an IPv6 socket, in its mapped form.
    pub mapped: bool,
    /// Where to.
    pub to: SocketAddr,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match self.method {
            Method::TcpConnect => "tcp",
            Method::UdpConnect => "udp",
            Method::UdpSend => "send",
        };
        write!(f, "{method} {} {}", if self.mapped { "mapped" } else { "plain" }, self.to)
    }
}

impl FromStr for Call {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let mut words = text.split_ascii_whitespace();
        let mut word = || words.next().context("a call is METHOD FORM ADDRESS");
        let method = match word()? {
            "tcp" => Method::TcpConnect,
            "udp" => Method::UdpConnect,
            "send" => Method::UdpSend,
            other => bail!("unknown method {other}"),
        };
        Ok(Self { method, mapped: word()? == "mapped", to: word()?.parse()? })
    }
}

/// What is done over and over, to see how long it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timed {
    /// `connect` of one UDP socket, refused or not.
    Connect,
    /// A datagram on a connected socket.
    Datagram,
    /// A datagram to a server of this process, and its answer.
    Exchange,
    /// A UDP socket, made and closed.
    Socket,
    /// `setsockopt` of an option that nothing is wrong with.
    Option,
}

impl Timed {
    const ALL: [(&str, Self); 5] = [
        ("connects", Self::Connect),
        ("datagrams", Self::Datagram),
        ("exchanges", Self::Exchange),
        ("sockets", Self::Socket),
        ("options", Self::Option),
    ];

    /// By the word that `dial` is told.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|(known, _)| *known == name).map(|(_, timed)| timed)
    }

    fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, timed)| *timed == self).map_or("", |(name, _)| name)
    }
}

impl Call {
    /// Makes the call; 0, or the error number it ended with.
    pub fn make(&self) -> i32 {
        self.attempt().err().and_then(|error| error.raw_os_error()).unwrap_or(0)
    }

    /// Does something `count` times to or with its destination; the nanoseconds that one takes.
    pub fn time(&self, timed: Timed, count: u32) -> io::Result<f64> {
        let to = self.destination().into();
        let socket = || Socket::new(Domain::for_address(self.destination()), Type::DGRAM, None);
        let made = socket()?;
        match timed {
            // Refused or not: either takes its time.
            Timed::Connect => per_call(count, || made.connect(&to).or(Ok(()))),
            Timed::Datagram => {
                made.connect(&to)?;
                // Nobody listens, which a later datagram is told of.
                per_call(count, || made.send(b"x").map(drop).or(Ok(())))
            }
            Timed::Exchange => {
                let server = UdpSocket::bind(self.destination())?;
                made.connect(&to)?;
                let client = UdpSocket::from(made);
                per_call(count, || {
                    client.send(b"?")?;
                    let (_, from) = server.recv_from(&mut [0; 1])?;
                    server.send_to(b"!", from)?;
                    client.recv(&mut [0; 1]).map(drop)
                })
            }
            Timed::Socket => per_call(count, || socket().map(drop)),
            Timed::Option => per_call(count, || made.set_broadcast(true)),
        }
    }

    fn destination(&self) -> SocketAddr {
        match self.to.ip() {
            IpAddr::V4(v4) if self.mapped => SocketAddr::new(v4.to_ipv6_mapped().into(), self.to.port()),
            _ => self.to,
        }
    }

    fn attempt(&self) -> io::Result<()> {
        let (domain, kind) = self.socket_kind();
        self.attempt_on(&Socket::new(domain, kind, None)?)
    }

    /// What kind of socket the call is made on.
    pub fn socket_kind(&self) -> (Domain, Type) {
        let kind = if self.method == Method::TcpConnect { Type::STREAM } else { Type::DGRAM };
        (Domain::for_address(self.destination()), kind)
    }

    /// Makes the call on a socket that is there already.
    pub fn attempt_on(&self, socket: &Socket) -> io::Result<()> {
        let to = self.destination();
        // Bounds a blocking `connect`, too. One that does not block would leave the socket unfit for another.
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        match self.method {
            Method::TcpConnect | Method::UdpConnect => socket.connect(&to.into()),
            Method::UdpSend => socket.send_to(b"x", &to.into()).map(drop),
        }
    }
}

fn per_call(count: u32, mut call: impl FnMut() -> io::Result<()>) -> io::Result<f64> {
    let start = Instant::now();
    for _ in 0..count {
        call()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(count))
}

/// A `dial` process in a cgroup and a network namespace.
#[derive(Debug)]
pub struct Dialer {
    child: Child,
    calls: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Dialer {
    /// Starts one. `program` is the `dial` binary.
    pub fn start(program: impl AsRef<OsStr>, cgroup: &Cgroup, namespace: &Netns) -> Result<Self> {
        Self::spawn(namespace.command(program, Some(cgroup))?)
    }

    /// Starts a command that runs `dial`.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run dial")?;
        let calls = child.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, calls, answers })
    }

    /// The dialler's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes one call; 0 or the error number.
    pub fn call(&mut self, call: &Call) -> Result<i32> {
        Ok(self.ask(&call.to_string())?.parse()?)
    }

    /// [`Call::time`] there.
    pub fn time(&mut self, timed: Timed, call: &Call, count: u32) -> Result<f64> {
        Ok(self.ask(&format!("{} {count} {call}", timed.name()))?.parse()?)
    }

    fn ask(&mut self, line: &str) -> Result<String> {
        writeln!(self.calls, "{line}")?;
        let mut answer = String::new();
        ensure!(self.answers.read_line(&mut answer)? > 0, "dial ended early");
        Ok(answer.trim().to_owned())
    }

    /// Whether the filter refuses a call: it fails with `EPERM`, as nothing else here does.
    pub fn is_refused(&mut self, call: &Call) -> Result<bool> {
        Ok(self.call(call)? == Errno::PERM.raw_os_error())
    }
}

impl Drop for Dialer {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Whether the kernel can be asked about an address at all: multicast and the like fail before any hook.
pub fn is_dialable(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_multicast() && !v4.is_broadcast(),
        IpAddr::V6(v6) => !v6.is_multicast() && v6 != Ipv6Addr::UNSPECIFIED,
    }
}
