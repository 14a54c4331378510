//! Real calls from a filtered process: the `dial` program makes them, one for each line it reads.

use std::{
    ffi::OsStr,
    fmt,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    process::{Child, ChildStdin, ChildStdout, Stdio},
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

impl Call {
    /// Makes the call; 0, or the error number it ended with.
    pub fn make(&self) -> i32 {
        self.attempt().err().and_then(|error| error.raw_os_error()).unwrap_or(0)
    }

    /// How long one UDP `connect` takes, in nanoseconds: the mean of many on one socket, which may be refused.
    pub fn time(&self, count: u32) -> std::io::Result<f64> {
        let to = self.destination().into();
        let socket = Socket::new(Domain::for_address(self.destination()), Type::DGRAM, None)?;
        let start = Instant::now();
        for _ in 0..count {
            // Refused or not: either takes its time.
            let _ = socket.connect(&to);
        }
        Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(count))
    }

    /// How long it takes to make a UDP socket and close it, in nanoseconds.
    pub fn time_sockets(&self, count: u32) -> std::io::Result<f64> {
        let start = Instant::now();
        for _ in 0..count {
            Socket::new(Domain::for_address(self.destination()), Type::DGRAM, None)?;
        }
        Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(count))
    }

    /// How long one datagram of a connected socket takes, in nanoseconds.
    pub fn time_packets(&self, count: u32) -> std::io::Result<f64> {
        let to = self.destination().into();
        let socket = Socket::new(Domain::for_address(self.destination()), Type::DGRAM, None)?;
        socket.connect(&to)?;
        let start = Instant::now();
        for _ in 0..count {
            // Nobody listens, which a later datagram is told of.
            let _ = socket.send(b"x");
        }
        Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(count))
    }

    fn destination(&self) -> SocketAddr {
        match self.to.ip() {
            IpAddr::V4(v4) if self.mapped => SocketAddr::new(v4.to_ipv6_mapped().into(), self.to.port()),
            _ => self.to,
        }
    }

    fn attempt(&self) -> std::io::Result<()> {
        let (domain, kind) = self.socket_kind();
        self.attempt_on(&Socket::new(domain, kind, None)?)
    }

    /// What kind of socket the call is made on.
    pub fn socket_kind(&self) -> (Domain, Type) {
        let kind = if self.method == Method::TcpConnect { Type::STREAM } else { Type::DGRAM };
        (Domain::for_address(self.destination()), kind)
    }

    /// Makes the call on a socket that is there already.
    pub fn attempt_on(&self, socket: &Socket) -> std::io::Result<()> {
        let to = self.destination();
        // Bounds a blocking `connect`, too. One that does not block would leave the socket unfit for another.
        socket.set_write_timeout(Some(Duration::from_secs(5)))?;
        match self.method {
            Method::TcpConnect | Method::UdpConnect => socket.connect(&to.into()),
            Method::UdpSend => socket.send_to(b"x", &to.into()).map(drop),
        }
    }
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
        let mut command = namespace.command(program, Some(cgroup))?;
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

    /// [`Call::time`].
    pub fn time(&mut self, call: &Call, count: u32) -> Result<f64> {
        Ok(self.ask(&format!("time {count} {call}"))?.parse()?)
    }

    /// [`Call::time_packets`].
    pub fn time_packets(&mut self, call: &Call, count: u32) -> Result<f64> {
        Ok(self.ask(&format!("packets {count} {call}"))?.parse()?)
    }

    /// [`Call::time_sockets`].
    pub fn time_sockets(&mut self, call: &Call, count: u32) -> Result<f64> {
        Ok(self.ask(&format!("sockets {count} {call}"))?.parse()?)
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
