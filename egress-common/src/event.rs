//! The record that the kernel programs write for each refusal.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::{Address, Decision, Flow, Hook, NameKey, Protocol, Reason, RuleId, SocketKind, UnknownCode, Verdict};

/// Length of a task's name, `TASK_COMM_LEN` of `linux/sched.h`, with its final zero.
pub const COMM_LEN: usize = 16;

/// The task that acted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Process {
    /// Id of its cgroup in the cgroup2 hierarchy.
    pub cgroup_id: u64,
    /// Process id (the kernel's tgid), in the initial pid namespace.
    pub pid: u32,
    /// Thread id, in the initial pid namespace.
    pub tid: u32,
    /// User id, in the initial user namespace.
    pub uid: u32,
    /// Group id, in the initial user namespace.
    pub gid: u32,
    /// Name of the thread, padded with zeros.
    pub comm: [u8; COMM_LEN],
}

/// What is known of a socket whose questions to servers of DNS are judged: an element of the `QUESTIONED` storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Questioner {
    process: Process,
    is_judged: u32,
    is_lost: u32,
}

impl Questioner {
    /// A task that connects it to a server, or sends to one; `is_judged` if from then on nothing leaves without being judged.
    #[inline(always)]
    pub const fn new(process: Process, is_judged: bool) -> Self {
        Self { process, is_judged: is_judged as u32, is_lost: 0 }
    }

    /// The task.
    #[inline(always)]
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// Whether everything that it sent since was judged.
    #[inline(always)]
    pub const fn is_judged(&self) -> bool {
        self.is_judged != 0
    }

    /// Whether it is no longer known where in its stream a message begins.
    #[inline(always)]
    pub const fn is_lost(&self) -> bool {
        self.is_lost != 0
    }

    /// It is no longer known.
    #[inline(always)]
    pub const fn lose(&mut self) {
        self.is_lost = 1;
    }
}

/// The levels below the one at which the programs are attached at which workloads stand for themselves.
///
/// A service of systemd stands one or two levels below, a pod up to three; what a workload makes below its own cgroup is part
/// of it.
pub const LEVELS: usize = 3;

/// The ancestors of a cgroup one, two and three levels below the one at which the programs are attached; the cgroup itself in
/// place of those that it does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Lineage([u64; LEVELS]);

impl Lineage {
    /// Of a cgroup, whose ancestors at the levels are told by `ancestor`: 0 where it has none.
    #[inline(always)]
    pub fn of(cgroup: u64, ancestor: impl Fn(u8) -> u64) -> Self {
        let at = |level| match ancestor(level) {
            0 => cgroup,
            id => id,
        };
        Self([at(1), at(2), at(3)])
    }

    /// The ids, that of the highest first.
    #[inline(always)]
    pub const fn ids(self) -> [u64; LEVELS] {
        self.0
    }

    /// The id that stands for the workload: the deepest.
    #[inline(always)]
    pub const fn workload(self) -> u64 {
        self.0[LEVELS - 1]
    }
}

/// An element of the `SHARES` map, by cgroup: its part of the ring buffer, while that fills.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Share {
    /// The second since boot of which `written` speaks.
    second: u32,
    /// Records of that second.
    written: u32,
    /// Records that were not written, ever.
    lost: u64,
}

impl Share {
    /// Of a workload that has lost so many records and not written any this second.
    #[inline(always)]
    pub const fn new(second: u32, written: u32, lost: u64) -> Self {
        Self { second, written, lost }
    }

    /// With one more record, if the share of a second has room for it.
    #[inline(always)]
    pub const fn take(self, second: u32, most: u32) -> Option<Self> {
        let written = if self.second == second { self.written } else { 0 };
        if written < most { Some(Self { second, written: written + 1, lost: self.lost }) } else { None }
    }

    /// Records that were not written, ever.
    #[inline(always)]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// With one more that was not written.
    #[inline(always)]
    #[must_use]
    pub const fn with_loss(self) -> Self {
        Self { lost: self.lost.wrapping_add(1), ..self }
    }
}

/// One record of the `EVENTS` ring buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Event {
    /// Nanoseconds since boot, suspended time included (`CLOCK_BOOTTIME`).
    time: u64,
    process: Process,
    address: Address,
    rule: u32,
    /// In network byte order.
    port: u16,
    protocol: u8,
    hook: u8,
    verdict: u8,
    reason: u8,
    refusal: u8,
    socket: u8,
    family: u8,
    reserved: [u8; 3],
    lineage: Lineage,
}

/// The record of [`Hook::Query`] where the name that was asked for can be read; an [`Event`] where it cannot.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct QueryEvent {
    event: Event,
    name: NameKey,
    reserved: u32,
}

impl QueryEvent {
    /// Writes it to where it is to stand: it is too large for the stack of a kernel program.
    ///
    /// # Safety
    ///
    /// `place` is valid for writes.
    #[inline(always)]
    pub unsafe fn write(place: *mut Self, event: Event, name: &NameKey) {
        // SAFETY: the caller's.
        unsafe {
            (&raw mut (*place).event).write(event);
            (&raw mut (*place).name).copy_from_nonoverlapping(name, 1);
            (&raw mut (*place).reserved).write(0);
        }
    }
}

impl Event {
    /// A record of the `EVENTS` ring buffer, with the name that was asked for; `None` if it is of another version.
    pub fn read(record: &[u8]) -> Option<(Self, Option<NameKey>)> {
        match QueryEvent::read_from_bytes(record) {
            Ok(QueryEvent { event, name, .. }) => Some((event, Some(name))),
            Err(_) => Some((Self::read_from_bytes(record).ok()?, None)),
        }
    }

    /// What a hook saw and what was decided.
    #[inline(always)]
    pub fn new(time: u64, process: Process, lineage: Lineage, hook: Hook, flow: &Flow, decision: &Decision) -> Self {
        Self {
            time,
            process,
            lineage,
            address: flow.address,
            rule: decision.rule.map_or(0, |rule| rule.0.get()),
            port: flow.port.to_be(),
            protocol: flow.protocol.number(),
            hook: hook.code(),
            verdict: decision.verdict.code(),
            reason: decision.reason.code(),
            refusal: decision.refusal.code(),
            socket: SocketKind::of(flow.protocol).code(),
            family: 0,
            reserved: [0; 3],
        }
    }

    /// The same of a socket that is of this kind and family, whose number is cut to 8 bits.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "AF_MAX is less than 50")]
    pub fn of_socket(self, kind: SocketKind, family: u32) -> Self {
        Self { socket: kind.code(), family: family as u8, ..self }
    }

    /// The same without its rule, whose number means something only to the agent that gave it.
    #[must_use]
    pub const fn without_rule(self) -> Self {
        Self { rule: 0, ..self }
    }

    /// Nanoseconds since boot, suspended time included (`CLOCK_BOOTTIME`).
    pub const fn time(&self) -> u64 {
        self.time
    }

    /// The task that acted.
    pub const fn process(&self) -> &Process {
        &self.process
    }

    /// Whose fair share of the reports it takes.
    pub const fn lineage(&self) -> Lineage {
        self.lineage
    }

    /// Where it wanted to go.
    pub const fn address(&self) -> Address {
        self.address
    }

    /// The port it wanted to reach, in host byte order.
    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }

    /// What its socket speaks.
    pub const fn protocol(&self) -> Protocol {
        Protocol::from_kernel(self.protocol as u32)
    }

    /// The kind of its socket.
    pub fn socket(&self) -> Result<SocketKind, UnknownCode> {
        self.socket.try_into()
    }

    /// The family of its socket, where that is what was asked for; otherwise 0.
    pub const fn family(&self) -> u8 {
        self.family
    }

    /// The hook that saw it.
    pub fn hook(&self) -> Result<Hook, UnknownCode> {
        self.hook.try_into()
    }

    /// What was decided, and why.
    pub fn decision(&self) -> Result<Decision, UnknownCode> {
        let (verdict, reason) = (Verdict::try_from(self.verdict)?, Reason::try_from(self.reason)?);
        Ok(Decision { verdict, reason, rule: RuleId::from_field(self.rule), refusal: self.refusal.try_into()? })
    }
}

const _: () = assert!(size_of::<Questioner>() == 48);
const _: () = assert!(size_of::<Process>() == 40 && align_of::<Process>() == 8);
const _: () = assert!(size_of::<Event>() == 104 && align_of::<Event>() == 8);
const _: () = assert!(size_of::<Share>() == 16);
const _: () = assert!(size_of::<QueryEvent>() == 368 && align_of::<QueryEvent>() == 8);

#[cfg(test)]
mod tests {
    use core::{net::IpAddr, num::NonZeroU32};

    use zerocopy::FromZeros as _;

    use super::*;
    use crate::{NameEnd, Place, Refusal};

    fn event() -> Event {
        let process = Process { cgroup_id: 1, pid: 2, tid: 3, uid: 4, gid: 5, comm: *b"ratings\0\0\0\0\0\0\0\0\0" };
        let address = "2001:db8::5".parse::<IpAddr>().unwrap().into();
        let flow = Flow { place: Place::Unknown, protocol: Protocol::UDP, address, port: 3306 };
        let rule = Some(RuleId(NonZeroU32::new(9).unwrap()));
        let decision =
            Decision { verdict: Verdict::WouldDeny, reason: Reason::Rule, rule, refusal: Refusal::Ehostunreach };
        let lineage = Lineage::of(1, |level| [0, 7, 8, 0][usize::from(level)]);
        Event::new(11, process, lineage, Hook::Sendmsg6, &flow, &decision)
    }

    #[test]
    fn a_workload_that_has_no_ancestor_at_a_level_stands_for_itself() {
        assert_eq!((event().lineage().ids(), event().lineage().workload()), ([7, 8, 1], 1));
    }

    #[test]
    fn a_share_is_full_once_a_second() {
        let mut share = Share::default();
        for _ in 0..3 {
            share = share.take(5, 3).unwrap();
        }
        assert_eq!(share.take(5, 3), None);
        let share = share.with_loss().take(6, 3).unwrap();
        assert_eq!((share, share.lost()), (Share::new(6, 1, 1), 1));
    }

    #[test]
    fn an_event_survives_the_ring_buffer() {
        let event = Event::read_from_bytes(event().as_bytes()).unwrap();
        assert_eq!(event.time(), 11);
        assert_eq!(event.address().to_ip(), "2001:db8::5".parse::<IpAddr>().unwrap());
        assert_eq!((event.port(), event.protocol(), event.hook()), (3306, Protocol::UDP, Ok(Hook::Sendmsg6)));
        let decision = event.decision().unwrap();
        assert_eq!((decision.verdict, decision.reason), (Verdict::WouldDeny, Reason::Rule));
        assert_eq!(decision.rule.map(|rule| rule.0.get()), Some(9));
        assert_eq!((decision.refusal, event.socket()), (Refusal::Ehostunreach, Ok(SocketKind::Udp)));
        let event = event.of_socket(SocketKind::Raw, 2);
        assert_eq!((event.socket(), event.family()), (Ok(SocketKind::Raw), 2));
    }

    #[test]
    fn a_question_is_reported_with_its_name() {
        let (event, name) = (event(), NameKey::of("www.example.com", NameEnd::Exact).unwrap());
        let mut record = QueryEvent::new_zeroed();
        // SAFETY: it is there.
        unsafe { QueryEvent::write(&raw mut record, event, &name) };
        let (read, asked) = Event::read(record.as_bytes()).unwrap();
        assert!(read == event && asked == Some(name));
        assert!(Event::read(event.as_bytes()).unwrap() == (event, None));
    }

    #[test]
    fn a_truncated_event_is_not_read() {
        let event = event();
        for length in 0..size_of::<Event>() {
            assert!(Event::read(&event.as_bytes()[..length]).is_none(), "{length} bytes");
        }
    }
}
