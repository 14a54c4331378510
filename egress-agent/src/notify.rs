//! What the service manager is told (`sd_notify(3)`), without ever waiting for it.
//!
//! A manager that does not read keeps nothing from being done: the newest state is kept and offered again, older ones and
//! signs of life are dropped and counted.

use std::{
    collections::VecDeque,
    ffi::{OsStr, OsString},
    fmt::Write as _,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{ffi::OsStrExt, net::SocketAddr, net::UnixDatagram},
    },
    time::{Duration, Instant},
};

use sd_notify::NotifyState;

/// How long a manager may take before it counts as stuck.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tells the service manager.
#[derive(Debug)]
pub struct Notifier {
    socket: Option<OsString>,
    /// States that found no room, the oldest first.
    pending: VecDeque<String>,
    /// Since when, and why, nothing gets through.
    stuck: Option<(Instant, String)>,
    dropped: u64,
}

impl Notifier {
    /// Of the manager that `NOTIFY_SOCKET` names, if there is one.
    pub const fn new(socket: Option<OsString>) -> Self {
        Self { socket, pending: VecDeque::new(), stuck: None, dropped: 0 }
    }

    /// That a change begins. What was to be told before is out of date.
    pub(crate) fn reloading(&mut self) {
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            self.supersede(0);
            self.push(&[NotifyState::Reloading, now]);
        }
    }

    /// That a change has ended, or the start. The manager waits for the pair, so that a change began is not superseded.
    pub(crate) fn ready(&mut self, status: &str) {
        let begins = |message: &String| message.starts_with("RELOADING=1");
        self.supersede(self.pending.iter().rev().take_while(|message| begins(message)).count());
        self.push(&[NotifyState::Ready, NotifyState::Status(status)]);
    }

    /// That the start takes longer.
    pub(crate) fn extend(&mut self, status: &str) {
        self.supersede(0);
        self.push(&[NotifyState::Status(status), NotifyState::ExtendTimeoutUsec(30_000_000)]);
    }

    /// That the agent is alive. Out of date at once, so never kept.
    pub(crate) fn alive(&mut self) {
        self.retry();
        if !self.pending.is_empty() || !self.send(&text(&[NotifyState::Watchdog])) {
            self.dropped += 1;
        }
    }

    /// Offers again what found no room.
    pub(crate) fn retry(&mut self) {
        while let Some(message) = self.pending.pop_front() {
            if !self.send(&message) {
                return self.pending.push_front(message);
            }
        }
    }

    /// What is wrong, if something is.
    pub(crate) fn degraded(&self) -> Option<String> {
        let (since, why) = self.stuck.as_ref().filter(|(since, _)| since.elapsed() >= PATIENCE)?;
        let (seconds, dropped) = (since.elapsed().as_secs(), self.dropped);
        Some(format!("the service manager has not read its notifications for {seconds} s ({why}): {dropped} dropped"))
    }

    /// Drops all but the newest `kept`.
    fn supersede(&mut self, kept: usize) {
        let older = self.pending.len().saturating_sub(kept);
        self.dropped += self.pending.drain(..older).count() as u64;
    }

    fn push(&mut self, states: &[NotifyState<'_>]) {
        self.pending.push_back(text(states));
        self.retry();
    }

    /// Whether it got through.
    fn send(&mut self, message: &str) -> bool {
        let Some(socket) = &self.socket else { return true };
        match offer(socket, message) {
            Ok(()) => {
                if self.stuck.take().is_some() {
                    tracing::info!(dropped = self.dropped, "the service manager reads its notifications again");
                }
                true
            }
            Err(error) => {
                if self.stuck.is_none() {
                    tracing::warn!(%error, "cannot notify the service manager; tried again every second");
                    self.stuck = Some((Instant::now(), error.to_string()));
                }
                false
            }
        }
    }
}

/// One datagram, or an error where it would have to wait.
fn offer(path: &OsStr, message: &str) -> io::Result<()> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match path.as_bytes().split_first() {
        Some((b'@', name)) => socket.connect_addr(&SocketAddr::from_abstract_name(name)?)?,
        _ => socket.connect(path)?,
    }
    let sent = socket.send(message.as_bytes())?;
    if sent == message.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

fn text(states: &[NotifyState<'_>]) -> String {
    states.iter().fold(String::new(), |mut text, state| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{state}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manager that does not read, with as much unread as it takes.
    fn full() -> (tempfile::TempDir, UnixDatagram, Notifier) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        while offer(path.as_os_str(), "X=1\n").is_ok() {}
        (directory, manager, Notifier::new(Some(path.into())))
    }

    fn unread(manager: &UnixDatagram) -> Vec<String> {
        let mut buffer = [0; 4096];
        let texts = std::iter::from_fn(|| manager.recv(&mut buffer).ok().map(|length| buffer[..length].to_vec()));
        let texts = texts.map(|text| String::from_utf8(text).unwrap());
        texts.filter(|text| text != "X=1\n").collect()
    }

    #[test]
    fn a_manager_that_does_not_read_is_told_the_newest_once_it_does() {
        let (_directory, manager, mut notifier) = full();
        for generation in 0..10 {
            notifier.reloading();
            notifier.alive();
            notifier.ready(&format!("generation {generation}"));
        }
        assert!(notifier.pending.len() == 2 && notifier.stuck.is_some(), "{notifier:?}");
        assert_eq!(unread(&manager), Vec::<String>::new());
        notifier.retry();
        let told = unread(&manager);
        assert!(told[0].starts_with("RELOADING=1\nMONOTONIC_USEC="), "{told:?}");
        assert_eq!(told[1..], ["READY=1\nSTATUS=generation 9\n"]);
        assert_eq!((notifier.dropped, notifier.degraded()), (28, None));
    }

    #[test]
    fn the_first_state_is_not_lost() {
        let (_directory, manager, mut notifier) = full();
        notifier.ready("generation 1");
        unread(&manager);
        notifier.alive();
        assert_eq!(unread(&manager), ["READY=1\nSTATUS=generation 1\n", "WATCHDOG=1\n"]);
    }

    #[test]
    fn a_manager_in_the_abstract_namespace_is_told() {
        let name = format!("egress-notify-{}", std::process::id());
        let manager = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
        manager.set_nonblocking(true).unwrap();
        Notifier::new(Some(format!("@{name}").into())).ready("x");
        assert_eq!(unread(&manager), ["READY=1\nSTATUS=x\n"]);
    }
}
