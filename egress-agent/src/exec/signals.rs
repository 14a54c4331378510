//! Signals that are the command's business.

use std::{future::poll_fn, mem::MaybeUninit, process::Child, task::Poll};

use rustix::process::{Pid, Signal, kill_process};
use tokio::signal::unix::{self, SignalKind, signal};

use crate::run::{RunError, system};

/// Passed on.
const PASSED: [Signal; 5] = [Signal::TERM, Signal::HUP, Signal::USR1, Signal::USR2, Signal::WINCH];
/// The terminal sends these to the command as well, and what it does about them is what counts.
const SHARED: [Signal; 2] = [Signal::INT, Signal::QUIT];

/// Signals to pass on.
pub(super) struct Forwarded(Vec<(Signal, unix::Signal)>);

impl Forwarded {
    /// From here on, none of them ends this process. What is ignored already, as by `nohup`, stays so: the command
    /// inherits that, which it would not if the signal were listened for.
    pub(super) fn listen() -> Result<Self, RunError> {
        let listen =
            |kind: Signal| signal(SignalKind::from_raw(kind.as_raw())).map_err(system("cannot listen for signals"));
        for kind in SHARED.into_iter().filter(|kind| !is_ignored(*kind)) {
            // Whoever listened once is not ended by it any more.
            drop(listen(kind)?);
        }
        let passed = PASSED.into_iter().filter(|kind| !is_ignored(*kind));
        Ok(Self(passed.map(|kind| Ok((kind, listen(kind)?))).collect::<Result<_, RunError>>()?))
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Signal {
        poll_fn(|context| {
            let came =
                self.0.iter_mut().find_map(|(kind, signal)| signal.poll_recv(context).is_ready().then_some(*kind));
            came.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}

/// Passes a signal to the command, which was not waited for yet: its number is no other process's.
pub(super) fn send(child: &Child, signal: Signal) {
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    if let Some(Err(error)) = pid.map(|pid| kill_process(pid, signal)) {
        tracing::warn!(%error, ?signal, "cannot pass a signal to the command");
    }
}

fn is_ignored(signal: Signal) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: with a null pointer for the new action the call only writes the present one, to memory that is large enough.
    // All-zero bytes are a valid `sigaction`, so it may be read even if nothing was written.
    let action = unsafe {
        libc::sigaction(signal.as_raw(), std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    };
    action.sa_sigaction == libc::SIG_IGN
}
