//! SIGTERM and SIGINT end `run` within a second, whatever it is doing: by handlers of the kernel's own, below those by
//! which the event loop hears of the same signals and ends in good order.
//!
//! While the agent starts there is nothing to undo but what the next start sweeps, so it ends at once; also as process 1 of
//! a container, for which signals have no default. Afterwards the loop has [`PATIENCE`].

use std::{
    io,
    sync::atomic::{AtomicBool, AtomicI32, Ordering},
};

/// How long an end in good order may take, in microseconds.
const PATIENCE: libc::suseconds_t = 950_000;

/// Whether nothing is in force yet that this process would have to undo.
static IS_STARTING: AtomicBool = AtomicBool::new(true);
/// Whether the time runs already: another signal does not start it again.
static IS_ASKED: AtomicBool = AtomicBool::new(false);
/// The exit status where the end in good order took too long.
static LATE: AtomicI32 = AtomicI32::new(0);

/// Ends the process at these signals from now on. What listens to them later is called as well.
pub fn expect() -> io::Result<()> {
    for (signal, handler) in
        [(libc::SIGTERM, asked as extern "C" fn(libc::c_int)), (libc::SIGINT, asked), (libc::SIGALRM, late)]
    {
        // SAFETY: a zeroed `sigaction` is one without flags and with an empty mask; both handlers have the type that it
        // takes without `SA_SIGINFO`, and do only what `signal-safety(7)` allows.
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as libc::sighandler_t;
            action.sa_flags = libc::SA_RESTART;
            libc::sigaction(signal, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// From now on an end in good order comes first; `status` is that of the process where it takes too long.
pub(crate) fn in_good_order(status: u8) {
    LATE.store(i32::from(status), Ordering::SeqCst);
    IS_STARTING.store(false, Ordering::SeqCst);
}

extern "C" fn asked(_signal: libc::c_int) {
    let zero = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let once = libc::itimerval { it_interval: zero, it_value: libc::timeval { tv_sec: 0, tv_usec: PATIENCE } };
    // SAFETY: both are system calls without any state in user space; the first does not return.
    unsafe {
        if IS_STARTING.load(Ordering::SeqCst) {
            libc::_exit(0);
        }
        if !IS_ASKED.swap(true, Ordering::SeqCst) {
            libc::setitimer(libc::ITIMER_REAL, &raw const once, std::ptr::null_mut());
        }
    }
}

extern "C" fn late(_signal: libc::c_int) {
    // SAFETY: a system call that does not return.
    unsafe { libc::_exit(LATE.load(Ordering::SeqCst)) }
}
