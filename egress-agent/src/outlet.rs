//! A file that others read, written by a thread that nobody waits for, and that can be told to end by a time.

use std::{
    fs::File,
    io::{self, Write as _},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    pipe::{PipeFlags, pipe_with},
};

/// A pipe that tells that there is room takes this much without blocking (`PIPE_BUF`, and `pipe_poll` of `fs/pipe.c`).
const AT_ONCE: usize = 4096;

/// Tells a thread to end by a time. All copies are one.
#[derive(Debug, Clone)]
pub struct Stop {
    /// Readable when it is time to look at the deadline.
    told: Arc<OwnedFd>,
    tell: Arc<OwnedFd>,
    deadline: Arc<OnceLock<Instant>>,
}

impl Stop {
    /// Not told yet.
    pub fn new() -> io::Result<Self> {
        let (told, tell) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        Ok(Self { told: told.into(), tell: tell.into(), deadline: Arc::default() })
    }

    /// From now on, what is not done by `deadline` is not done.
    pub fn tell(&self, deadline: Instant) {
        if self.deadline.set(deadline).is_ok() {
            // There is room for a byte in a new pipe.
            let _ = rustix::io::write(&self.tell, b"x");
        }
    }

    /// By when to end, if that was told.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline.get().copied()
    }

    /// Whether it is too late.
    pub fn is_over(&self) -> bool {
        self.deadline().is_some_and(|deadline| Instant::now() >= deadline)
    }
}

/// Readable once it was told.
impl AsFd for Stop {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.told.as_fd()
    }
}

/// A file that is written.
#[derive(Debug)]
pub struct Outlet {
    /// Not std's handle, whose buffer would keep what could not be written.
    out: File,
    stop: Stop,
}

impl Outlet {
    /// Writes to a file, which stays as it is for others who have it.
    pub fn new(file: impl AsFd, stop: Stop) -> io::Result<Self> {
        Ok(Self { out: File::from(file.as_fd().try_clone_to_owned()?), stop })
    }

    /// Writes what it can, waiting for whoever reads; how much that was. It is all unless there is an error: `TimedOut` if it
    /// is too late.
    pub fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let mut written = 0;
        while written < bytes.len() {
            let end = bytes.len().min(written + AT_ONCE);
            match self.wait().and_then(|()| self.out.write(&bytes[written..end])) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(count) => written += count,
                Err(error) if matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, Ok(()))
    }

    /// Waits until there is room.
    fn wait(&self) -> io::Result<()> {
        loop {
            let deadline = self.stop.deadline();
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            let mut fds = vec![PollFd::new(&self.out, PollFlags::OUT)];
            if deadline.is_none() {
                fds.push(PollFd::new(&self.stop, PollFlags::IN));
            }
            match poll(&mut fds, left.map(timespec).as_ref()) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) if fds[0].revents().is_empty() => {}
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

fn timespec(duration: Duration) -> Timespec {
    duration.try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, thread};

    use rustix::pipe::pipe;

    use super::*;

    #[test]
    fn what_is_not_read_in_time_is_not_written() {
        let (reader, writer) = pipe().unwrap();
        let stop = Stop::new().unwrap();
        let mut outlet = Outlet::new(&writer, stop.clone()).unwrap();
        let writing = thread::spawn(move || outlet.write(&vec![b'x'; 1 << 20]));
        stop.tell(Instant::now() + Duration::from_millis(50));
        let (written, result) = writing.join().unwrap();
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(writer);
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).unwrap();
        assert_eq!(read.len(), written);
    }

    #[test]
    fn who_reads_late_gets_all_of_it() {
        let (reader, writer) = pipe().unwrap();
        let stop = Stop::new().unwrap();
        let mut outlet = Outlet::new(&writer, stop).unwrap();
        drop(writer);
        let writing = thread::spawn(move || outlet.write(&vec![b'x'; 1 << 20]));
        let mut read = Vec::new();
        File::from(reader).read_to_end(&mut read).unwrap();
        let (written, result) = writing.join().unwrap();
        assert!(result.is_ok() && written == 1 << 20 && read.len() == written);
    }

    #[test]
    fn a_file_that_nobody_reads_is_told() {
        let (reader, writer) = pipe().unwrap();
        drop(reader);
        let (written, result) = Outlet::new(writer, Stop::new().unwrap()).unwrap().write(b"x");
        assert_eq!((written, result.unwrap_err().kind()), (0, io::ErrorKind::BrokenPipe));
    }
}
