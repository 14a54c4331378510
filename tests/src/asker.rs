//! A filtered process that asks servers of DNS and connects to what they answer, and a server whose answers are in the names:
//! the `asker` program.
//!
//! A name says what it has: `198-18-0-1.example.com` that address, `many-200.example.com` as many, `many-200-1000.example.com` as many
//! others, `alias-198-18-0-1` by an alias, `ttl-60-198-18-0-1` for so many seconds. Names are resolved by hand, not by the C library, so that a test decides by which socket.

use std::{
    io::{self, BufRead, BufReader, Read, Seek, Write},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail, ensure};
use socket2::{Domain, Socket, Type};

use crate::{
    cgroup::Cgroup,
    dial::{Call, Method},
    escape::{Outcome, sys},
    netns::{self, Netns},
    program,
};

/// How a question is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A connected UDP socket.
    Udp,
    /// A UDP socket that is not connected.
    Sendto,
    /// The same, an IPv6 socket that speaks IPv4.
    Mapped,
    /// TCP, question by question, the answer in one piece.
    Tcp,
}

impl Transport {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Udp, Self::Sendto, Self::Mapped, Self::Tcp];
}

impl FromStr for Transport {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|transport| format!("{transport:?}") == text).context("a transport")
    }
}

const PATIENCE: Duration = Duration::from_secs(5);
const PORT: u16 = 53;
const A: u16 = 1;
const AAAA: u16 = 28;
const CNAME: u16 = 5;

/// An `asker` process, killed when dropped.
#[derive(Debug)]
pub struct Asker {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Asker {
    /// Starts one in a cgroup and a network namespace.
    pub fn start(namespace: &Netns, cgroup: &Cgroup) -> Result<Self> {
        Self::spawn(namespace.command(program("asker")?, Some(cgroup))?)
    }

    /// Starts a command that runs it.
    pub fn spawn(mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot run asker")?;
        let orders = child.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(child.stdout.take().context("stdout is piped")?);
        Ok(Self { child, orders, answers })
    }

    /// Gives an order of the program; what it answers.
    pub fn order(&mut self, line: &str) -> Result<String> {
        writeln!(self.orders, "{line}")?;
        let mut answer = String::new();
        ensure!(self.answers.read_line(&mut answer)? > 0, "asker ended early");
        Ok(answer.trim().to_owned())
    }

    /// Asks a server for the addresses of a name, both families.
    pub fn ask(&mut self, transport: Transport, server: IpAddr, name: &str) -> Result<Vec<IpAddr>> {
        let answer = self.order(&format!("ask {transport:?} {server} {name}"))?;
        match answer.strip_prefix("error ") {
            Some(error) => bail!("{error}"),
            None => answer.split_ascii_whitespace().map(|address| Ok(address.parse()?)).collect(),
        }
    }

    /// Whether the filter refuses a connection.
    pub fn is_refused(&mut self, to: SocketAddr) -> Result<bool> {
        Ok(self.order(&format!("dial {to}"))? == libc::EPERM.to_string())
    }

    /// Does something over and over with a server; the nanoseconds that one takes.
    pub fn time(&mut self, what: &str, count: u32, server: IpAddr, name: &str) -> Result<f64> {
        let answer = self.order(&format!("time {what} {count} {server} {name}"))?;
        answer.parse().with_context(|| answer)
    }

    /// Asks for fresh names below a suffix and connects to what each has, over and over; how many were refused.
    pub fn race(&mut self, rounds: u32, transport: Transport, server: IpAddr, suffix: &str, port: u16) -> Result<u32> {
        let answer = self.order(&format!("race {rounds} {transport:?} {server} {suffix} {port}"))?;
        answer.parse().with_context(|| answer)
    }
}

impl Drop for Asker {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program: carries out the orders it reads, one a line, and answers each.
pub fn main() -> Result<()> {
    let (mut out, mut state) = (io::stdout().lock(), State::default());
    for line in io::stdin().lock().lines() {
        let answer = state.obey(&line?).unwrap_or_else(|error| format!("error {error:#}"));
        writeln!(out, "{}", answer.replace('\n', " "))?;
        out.flush()?;
    }
    Ok(())
}

#[derive(Default)]
struct State {
    /// The socket of `open`.
    open: Option<UdpSocket>,
    /// A process in a network namespace of its own.
    other: Option<Asker>,
    /// The stream of `keep`.
    kept: Option<TcpStream>,
}

impl State {
    fn exchange(&mut self, message: &[u8]) -> Result<String> {
        let stream = self.kept.as_mut().context("nothing is kept")?;
        stream.set_read_timeout(Some(NEVER))?;
        stream.write_all(message)?;
        let received = stream.read(&mut [0; 4096]).unwrap_or(0);
        Ok(u32::from(received > 0).to_string())
    }

    fn obey(&mut self, line: &str) -> Result<String> {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match *words {
            ["ask", transport, server, name] => {
                let found = ask(transport.parse()?, server.parse()?, name)?;
                Ok(found.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "))
            }
            ["dial", to] => Ok(dial(to.parse()?).to_string()),
            ["race", rounds, transport, server, suffix, port] => {
                race(rounds.parse()?, transport.parse()?, server.parse()?, suffix, port.parse()?)
            }
            // A socket that has yet to ask; its port.
            ["open", address] => {
                let socket = UdpSocket::bind(SocketAddr::new(address.parse()?, 0))?;
                socket.set_read_timeout(Some(PATIENCE))?;
                let port = socket.local_addr()?.port();
                self.open = Some(socket);
                Ok(port.to_string())
            }
            // Asks on it, and does not wait.
            ["query", server, name] => {
                let socket = self.open.as_ref().context("nothing is open")?;
                socket.send_to(&question(name, A), SocketAddr::new(server.parse()?, PORT))?;
                Ok(String::new())
            }
            // Sends bytes in one of several ways; the error's number, or 0.
            ["send", way, to, bytes] => {
                let outcome = send(way, to.parse()?, &bytes_of(bytes)?)?;
                Ok(outcome.err().map_or(0, |step| step.errno).to_string())
            }
            // Writes the pieces of a stream, one by one, and counts the answers: as many as are expected, or what came in time.
            ["stream", way, server, expected, ref pieces @ ..] => {
                let pieces = pieces.iter().map(|piece| bytes_of(piece)).collect::<Result<Vec<_>>>()?;
                Ok(stream(way, server.parse()?, expected.parse()?, &pieces)?.to_string())
            }
            // Writes to a stream that is kept, or again to that; how many answers came.
            ["keep", server, message] => {
                self.kept = Some(TcpStream::connect((server.parse::<IpAddr>()?, PORT))?);
                self.exchange(&bytes_of(message)?)
            }
            ["again", _, message] => self.exchange(&bytes_of(message)?),
            // Asks on the open socket, then says something to somebody else; the error's number of that, or 0.
            ["besides", to, bytes] => {
                let socket = self.open.as_ref().context("nothing is open")?;
                let sent = socket.send_to(&bytes_of(bytes)?, to.parse::<SocketAddr>()?);
                Ok(sent.err().and_then(|error| error.raw_os_error()).unwrap_or(0).to_string())
            }
            ["receive"] => {
                let socket = self.open.as_ref().context("nothing is open")?;
                Ok(socket.recv_from(&mut [0; 4096])?.1.to_string())
            }
            ["bind", kind, to] => {
                let to: SocketAddr = to.parse()?;
                let socket =
                    Socket::new(Domain::for_address(to), if kind == "tcp" { Type::STREAM } else { Type::DGRAM }, None)?;
                Ok(socket.bind(&to.into()).err().and_then(|error| error.raw_os_error()).unwrap_or(0).to_string())
            }
            ["time", what, count, server, name] => Ok(time(what, count.parse()?, server.parse()?, name)?.to_string()),
            ["serve", at] => serve(at.parse()?, &Heard::default()).map(|()| String::new()),
            ["uid", uid] => {
                rustix::thread::set_thread_res_uid(id(uid)?, id(uid)?, id(uid)?)?;
                Ok(String::new())
            }
            // Root of a user namespace of its own, with a network namespace of its own.
            ["unshare"] => {
                let uid = rustix::process::getuid().as_raw();
                let (user, network) = (rustix::thread::UnshareFlags::NEWUSER, rustix::thread::UnshareFlags::NEWNET);
                // SAFETY: this process has one thread, and opened nothing that it shares with others.
                unsafe { rustix::thread::unshare_unsafe(user | network) }?;
                std::fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
                ip("link set lo up")?;
                Ok(String::new())
            }
            ["ip", ref arguments @ ..] => ip(&arguments.join(" ")).map(|()| String::new()),
            // Another process of the same user namespace in another network namespace, by a pair of interfaces.
            ["beside"] => {
                let mut other = Asker::spawn(Command::new(std::env::current_exe()?))?;
                other.order("separate")?;
                ip("link add v0 type veth peer name v1")?;
                ip(&format!("link set v1 netns {}", other.child.id()))?;
                self.other = Some(other);
                Ok(String::new())
            }
            ["separate"] => {
                // SAFETY: as above.
                unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }?;
                Ok(String::new())
            }
            ["other", ref order @ ..] => self.other.as_mut().context("nobody is beside")?.order(&order.join(" ")),
            _ => bail!("no such order: {line}"),
        }
    }
}

fn id(text: &str) -> Result<rustix::process::Uid> {
    Ok(rustix::process::Uid::from_raw(text.parse()?))
}

fn ip(arguments: &str) -> Result<()> {
    netns::ip(&arguments.split(' ').collect::<Vec<_>>())
}

fn bytes_of(text: &str) -> Result<Vec<u8>> {
    let byte = |at| u8::from_str_radix(text.get(at..at + 2).context("pairs of digits")?, 16).context("a byte");
    (0..text.len()).step_by(2).map(byte).collect()
}

/// Sends a datagram, or what becomes several.
fn send(way: &str, to: SocketAddr, bytes: &[u8]) -> Result<Outcome> {
    let failed = |step| anyhow!("{step:?}");
    let socket = sys::datagram(to).map_err(failed)?;
    if let Some(most) = way.strip_prefix("stuffed:") {
        // Ancillary data of a level that does not exist, almost as much as a socket may hold: there is room for nothing else.
        let contents = vec![0; most.parse::<usize>()? - 144];
        return Ok(sys::send_with_controls(&socket, bytes, Some(&to.into()), &[(0x7777, 0, &contents)]));
    }
    sys::connect(&socket, to).map_err(failed)?;
    Ok(match way {
        "plain" => sys::send(&socket, bytes, 0),
        // Two writes, one datagram.
        "corked" => {
            let (first, rest) = bytes.split_at(bytes.len() / 2);
            sys::send(&socket, first, libc::MSG_MORE).and_then(|()| sys::send(&socket, rest, 0))
        }
        "zerocopy" => {
            sys::number_option(&socket, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1).map_err(failed)?;
            // They are there until they are sent, which may be later.
            sys::send(&socket, Vec::leak(bytes.to_vec()), libc::MSG_ZEROCOPY)
        }
        // Cut in the middle, after everybody has looked at it.
        "cut" => {
            let half = i32::try_from(bytes.len() / 2)?;
            sys::number_option(&socket, libc::SOL_UDP, libc::UDP_SEGMENT, half).map_err(failed)?;
            sys::send(&socket, bytes, 0)
        }
        "file" => {
            let mut file = tempfile::tempfile()?;
            file.write_all(bytes)?;
            file.rewind()?;
            sys::send_file(&socket, &file, bytes.len())
        }
        other => bail!("cannot send {other}"),
    })
}

/// How long an answer is waited for that may never come.
const NEVER: Duration = Duration::from_millis(700);

fn stream(way: &str, server: IpAddr, expected: usize, pieces: &[Vec<u8>]) -> Result<usize> {
    let to = SocketAddr::new(server, PORT);
    let mut pieces = pieces.iter();
    let mut stream: TcpStream = if way == "fast-open" {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.send_to_with_flags(pieces.next().context("a piece")?, &to.into(), libc::MSG_FASTOPEN)?;
        socket.into()
    } else {
        TcpStream::connect(to)?
    };
    stream.set_nodelay(way != "delayed")?;
    stream.set_read_timeout(Some(if expected == 0 { NEVER } else { PATIENCE }))?;
    for piece in pieces {
        match way {
            "urgent" => {
                Socket::from(stream.try_clone()?).send_out_of_band(piece)?;
            }
            _ => stream.write_all(piece)?,
        }
    }
    let (mut count, mut received, mut buffer) = (0, Vec::new(), [0; 4096]);
    while count < expected.max(1) {
        match stream.read(&mut buffer) {
            Ok(0) => break,
            // It is waited for what is not to come.
            Err(_) if expected == 0 => break,
            Err(error) => return Err(error.into()),
            Ok(length) => received.extend(&buffer[..length]),
        }
        while let Some((_, rest)) = first_message(&received) {
            received = rest.to_vec();
            count += 1;
        }
    }
    Ok(count)
}

fn dial(to: SocketAddr) -> i32 {
    Call { method: Method::TcpConnect, mapped: false, to }.make()
}

/// What is done over and over with a server, to see how long it takes: nanoseconds for one.
fn time(what: &str, count: u32, server: IpAddr, name: &str) -> Result<f64> {
    let mut buffer = vec![0; BULK];
    let mut each: Box<dyn FnMut() -> io::Result<()>> = match what {
        // A question and its answer.
        "answers" => {
            let (socket, question) = (UdpSocket::bind("0.0.0.0:0")?, question(name, A));
            socket.connect((server, PORT))?;
            Box::new(move || socket.send(&question).and_then(|_| socket.recv(&mut buffer)).map(drop))
        }
        // A datagram and its echo.
        "datagrams" => {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.connect((server, ECHO_PORT))?;
            Box::new(move || socket.send(b"?").and_then(|_| socket.recv(&mut buffer)).map(drop))
        }
        // A byte and its echo, and as many bytes as are sent at once.
        "bytes" | "bulk" => {
            let mut stream = TcpStream::connect((server, ECHO_PORT))?;
            stream.set_nodelay(true)?;
            buffer.truncate(if what == "bulk" { BULK } else { 1 });
            Box::new(move || stream.write_all(&buffer).and_then(|()| stream.read_exact(&mut buffer)))
        }
        other => bail!("cannot time {other}"),
    };
    let start = Instant::now();
    for _ in 0..count {
        each()?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e9 / f64::from(count))
}

/// Bytes that are sent at once where many are.
const BULK: usize = 1 << 18;
const ECHO_PORT: u16 = 7;

/// Sends back what it gets, on threads that end with the process.
pub fn echo(at: IpAddr) -> Result<()> {
    let (datagrams, streams) = (UdpSocket::bind((at, ECHO_PORT))?, TcpListener::bind((at, ECHO_PORT))?);
    thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = datagrams.recv_from(&mut buffer) {
            // Whoever sent it may be gone.
            let _ = datagrams.send_to(&buffer[..length], from);
        }
    });
    thread::spawn(move || {
        for stream in streams.incoming().flatten() {
            thread::spawn(move || {
                stream.set_nodelay(true)?;
                io::copy(&mut stream.try_clone()?, &mut &stream)
            });
        }
    });
    Ok(())
}

/// Each name is new, and so is its address.
fn race(rounds: u32, transport: Transport, server: IpAddr, suffix: &str, port: u16) -> Result<String> {
    let mut refused = 0;
    for round in 0..rounds {
        let address = Ipv4Addr::from_bits(Ipv4Addr::new(100, 64, 0, 0).to_bits() + round);
        let name = format!("{}.{suffix}", address.to_string().replace('.', "-"));
        let found = ask_for(transport, server, &name, A)?;
        ensure!(found == [IpAddr::from(address)], "{name} has {found:?}");
        refused += u32::from(dial(SocketAddr::new(address.into(), port)) == libc::EPERM);
    }
    Ok(refused.to_string())
}

fn ask(transport: Transport, server: IpAddr, name: &str) -> Result<Vec<IpAddr>> {
    let mut found = ask_for(transport, server, name, A)?;
    found.extend(ask_for(transport, server, name, AAAA)?);
    Ok(found)
}

fn ask_for(transport: Transport, server: IpAddr, name: &str, kind: u16) -> Result<Vec<IpAddr>> {
    let (question, server) = (question(name, kind), SocketAddr::new(server, PORT));
    let mut answer = vec![0; 65_535];
    let length = match transport {
        Transport::Tcp => {
            let mut stream = TcpStream::connect(server)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(&framed(&question))?;
            let mut length = [0; 2];
            stream.read_exact(&mut length)?;
            let length = usize::from(u16::from_be_bytes(length));
            stream.read_exact(&mut answer[..length])?;
            length
        }
        Transport::Udp | Transport::Sendto | Transport::Mapped => {
            let to = match (transport, server.ip()) {
                (Transport::Mapped, IpAddr::V4(v4)) => SocketAddr::new(v4.to_ipv6_mapped().into(), PORT),
                _ => server,
            };
            let any: IpAddr = if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(PATIENCE))?;
            if transport == Transport::Udp {
                socket.connect(to)?;
                socket.send(&question)?;
            } else {
                socket.send_to(&question, to)?;
            }
            socket.recv(&mut answer)?
        }
    };
    addresses(&answer[..length]).context("an answer")
}

/// A message as it stands in a stream.
pub fn framed(message: &[u8]) -> Vec<u8> {
    [&u16::try_from(message.len()).unwrap_or(u16::MAX).to_be_bytes()[..], message].concat()
}

/// A name as it stands in a message.
pub fn wire(name: &str) -> Vec<u8> {
    let labels =
        name.split('.').flat_map(|label| [&[u8::try_from(label.len()).unwrap_or(63)], label.as_bytes()].concat());
    labels.chain([0]).collect()
}

/// A question for the addresses of a name, which takes answers of 4096 bytes.
pub fn question(name: &str, kind: u16) -> Vec<u8> {
    let edns = [0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0, 0];
    [&[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1][..], &wire(name), &kind.to_be_bytes(), &[0, 1], &edns].concat()
}

/// The answer to a question.
pub fn response(question: &[u8]) -> Option<Vec<u8>> {
    let end = 12 + question.get(12..)?.iter().position(|&byte| byte == 0)? + 5;
    let asked = question.get(12..end)?;
    let kind = u16::from_be_bytes([asked[asked.len() - 4], asked[asked.len() - 3]]);
    let first = String::from_utf8(asked.get(1..1 + usize::from(*asked.first()?))?.to_vec()).ok()?.to_lowercase();
    let timed = first.strip_prefix("ttl-").and_then(|rest| rest.split_once('-'));
    let (ttl, first) = timed.map_or(Some((1_u32, &*first)), |(ttl, rest)| Some((ttl.parse().ok()?, rest)))?;
    let record = |kind: u16, data: &[u8]| {
        let (length, ttl) = (u16::try_from(data.len()).unwrap_or(0), ttl.to_be_bytes());
        [&[0xc0, 12][..], &kind.to_be_bytes(), &[0, 1], &ttl, &length.to_be_bytes(), data].concat()
    };
    let (is_alias, first) = first.strip_prefix("alias-").map_or((false, first), |rest| (true, rest));
    let mut records = Vec::new();
    if is_alias {
        records.push(record(CNAME, &wire("elsewhere.example.net")));
    }
    for address in told(first) {
        match address {
            IpAddr::V4(v4) if kind == A => records.push(record(A, &v4.octets())),
            IpAddr::V6(v6) if kind == AAAA => records.push(record(AAAA, &v6.octets())),
            _ => {}
        }
    }
    let count = u16::try_from(records.len()).ok()?.to_be_bytes();
    let header = [question[0], question[1], 0x81, 0x80, 0, 1, count[0], count[1], 0, 0, 0, 0];
    Some([&header[..], asked, &records.concat()].concat())
}

/// The addresses that the first label of a name says.
fn told(label: &str) -> Vec<IpAddr> {
    if let Some(many) = label.strip_prefix("many-") {
        let (count, skipped) = many.split_once('-').unwrap_or((many, "0"));
        let [count, skipped] = [count, skipped].map(|number| number.parse::<u32>().unwrap_or(0));
        let first = Ipv4Addr::new(198, 19, 0, 0).to_bits() + skipped;
        return (0..count).map(|index| Ipv4Addr::from_bits(first + index).into()).collect();
    }
    let v4 = label.replace('-', ".").parse::<IpAddr>().ok();
    v4.or_else(|| label.replace('-', ":").parse().ok()).into_iter().collect()
}

fn addresses(answer: &[u8]) -> Option<Vec<IpAddr>> {
    let count = u16::from_be_bytes([*answer.get(6)?, *answer.get(7)?]);
    let mut at = 12 + answer.get(12..)?.iter().position(|&byte| byte == 0)? + 5;
    let mut found = Vec::new();
    for _ in 0..count {
        // Names are pointers, from this server; others are skipped label by label.
        while answer.get(at)? & 0xc0 == 0 && answer[at] != 0 {
            at += 1 + usize::from(answer[at]);
        }
        at += if answer[at] == 0 { 1 } else { 2 };
        let [kind_high, kind, _, _, _, _, _, _, high, low] = *answer.get(at..)?.first_chunk()?;
        let length = usize::from(u16::from_be_bytes([high, low]));
        let data = answer.get(at + 10..at + 10 + length)?;
        match u16::from_be_bytes([kind_high, kind]) {
            A => found.push(IpAddr::from(<[u8; 4]>::try_from(data).ok()?)),
            AAAA => found.push(IpAddr::from(<[u8; 16]>::try_from(data).ok()?)),
            _ => {}
        }
        at += 10 + length;
    }
    Some(found)
}

/// What servers received, in the order in which it came. All copies are one.
#[derive(Debug, Clone, Default)]
pub struct Heard(Arc<Mutex<Vec<u8>>>);

impl Heard {
    fn add(&self, bytes: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend(bytes);
    }

    /// Whether some bytes are there, one after the other.
    pub fn has(&self, bytes: &[u8]) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).windows(bytes.len()).any(|heard| heard == bytes)
    }
}

/// Serves on port 53 of an address, UDP and TCP, on threads that end with the process.
pub fn serve(at: IpAddr, heard: &Heard) -> Result<()> {
    let datagrams = UdpSocket::bind((at, PORT)).context("cannot serve UDP")?;
    let streams = TcpListener::bind((at, PORT)).context("cannot serve TCP")?;
    let (of_datagrams, of_streams) = (heard.clone(), heard.clone());
    thread::spawn(move || {
        let mut question = [0; 4096];
        while let Ok((length, from)) = datagrams.recv_from(&mut question) {
            of_datagrams.add(&question[..length]);
            if let Some(answer) = response(&question[..length]) {
                // Whoever asked may be gone.
                let _ = datagrams.send_to(&answer, from);
            }
        }
    });
    thread::spawn(move || {
        for stream in streams.incoming().flatten() {
            let heard = of_streams.clone();
            thread::spawn(move || answer_stream(stream, &heard));
        }
    });
    Ok(())
}

/// In pieces that no message begins or ends with.
fn answer_stream(mut stream: TcpStream, heard: &Heard) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut received, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        while let Some((question, rest)) = first_message(&received) {
            let Some(answer) = response(question) else { return Ok(()) };
            for piece in framed(&answer).chunks(701) {
                stream.write_all(piece)?;
            }
            received = rest.to_vec();
        }
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => {
                heard.add(&buffer[..length]);
                received.extend(&buffer[..length]);
            }
        }
    }
}

/// The first message of a stream, and what comes after it.
fn first_message(stream: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = stream.split_first_chunk()?;
    rest.split_at_checked(u16::from_be_bytes(*length).into())
}
