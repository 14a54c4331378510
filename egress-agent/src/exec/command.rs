//! The command as a process: in its cgroup, as its user, with nothing of this process but stdin, stdout and stderr.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    os::{fd::RawFd, unix::process::CommandExt},
    path::Path,
    process::{self, Child},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, sockopt::socket_domain},
    process::{Gid, Uid},
    thread::{
        CapabilitySet, CapabilitySets, capabilities, remove_capability_from_bounding_set, set_capabilities,
        set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
    },
};

use super::{ExecError, Limits, user::RunAs};

/// What to run, and as whom.
pub(super) struct Command<'a> {
    /// The program and its arguments.
    pub(super) words: &'a [OsString],
    /// `None` is this process's own user.
    pub(super) user: Option<&'a RunAs>,
    /// Capabilities that it is not given.
    pub(super) dropped: CapabilitySet,
    /// What this process may have raised for itself.
    pub(super) limits: &'a Limits,
}

/// What is done between fork and exec. Its failures are told from those of exec by the number of the step, which stands
/// above the bits of the error number: that number is all that a child can tell.
#[derive(Debug, Clone, Copy)]
enum Step {
    Join = 1,
    Limit,
    Groups,
    Group,
    User,
    NoNewPrivileges,
    Capabilities,
}

/// No error number reaches it (`MAX_ERRNO` of `linux/err.h` is 4095).
const STEP: i32 = 1 << 12;

impl Step {
    const ALL: [Self; 7] =
        [Self::Join, Self::Limit, Self::Groups, Self::Group, Self::User, Self::NoNewPrivileges, Self::Capabilities];

    const fn text(self) -> &'static str {
        match self {
            Self::Join => "join the cgroup",
            Self::Limit => "set the limits of the command",
            Self::Groups => "set the groups of the user",
            Self::Group => "become the group of the user",
            Self::User => "become the user",
            Self::NoNewPrivileges => "forbid new privileges",
            Self::Capabilities => "give up capabilities",
        }
    }

    fn failed(self, errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(self as i32 * STEP + errno.raw_os_error())
    }

    /// The step that failed and its error; `None` if it was none of them.
    fn told(number: i32) -> Option<(Self, io::Error)> {
        let step = Self::ALL.into_iter().find(|step| *step as i32 == number / STEP)?;
        Some((step, io::Error::from_raw_os_error(number % STEP)))
    }
}

impl Command<'_> {
    /// Whom it runs as.
    pub(super) fn uid(&self) -> u32 {
        self.user.map_or(0, |user| user.uid)
    }

    /// Starts it in a cgroup that is filtered already.
    pub(super) fn spawn(&self, cgroup: &Path) -> Result<Child, ExecError> {
        let (program, arguments) = self.words.split_first().expect("the command line has at least one word");
        let prepare = |what| move |cause| ExecError::Prepare { what, cause };
        let procs =
            File::options().write(true).open(cgroup.join("cgroup.procs")).map_err(prepare("open the cgroup"))?;
        warn_of_sockets();
        keep_descriptors().map_err(prepare("close the descriptors of others"))?;
        let mut command = process::Command::new(program);
        command.args(arguments);
        if let Some(user) = self.user {
            command.envs(user.environment());
        }
        let (user, dropped, limits) = (self.user.map(Identity::new), self.dropped, self.limits.clone());
        let enter = move || {
            // While it is still root, which the cgroup takes. It is this very process that goes on as the command.
            rustix::io::write(&procs, b"0").map_err(|errno| Step::Join.failed(errno))?;
            limits.set().map_err(|errno| Step::Limit.failed(errno))?;
            give_up(dropped)?;
            user.as_ref().map_or(Ok(()), Identity::assume)
        };
        // SAFETY: between fork and exec the closure makes system calls, with what was opened and allocated before the
        // fork; it neither allocates nor locks.
        unsafe { command.pre_exec(enter) };
        command.spawn().map_err(|cause| match cause.raw_os_error().and_then(Step::told) {
            Some((step, cause)) => ExecError::Prepare { what: step.text(), cause },
            None if cause.kind() == io::ErrorKind::NotFound => ExecError::NotFound(program.clone()),
            None => ExecError::CannotRun { command: program.clone(), cause },
        })
    }
}

/// A user, ready to be assumed.
struct Identity {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl Identity {
    fn new(user: &RunAs) -> Self {
        let groups = user.groups.iter().map(|&gid| Gid::from_raw(gid)).collect();
        Self { uid: Uid::from_raw(user.uid), gid: Gid::from_raw(user.gid), groups }
    }

    /// For the calling thread, which must be the only one. The user comes last, since the rest takes root.
    fn assume(&self) -> io::Result<()> {
        set_thread_groups(&self.groups).map_err(|errno| Step::Groups.failed(errno))?;
        let (gid, uid) = (Some(self.gid), Some(self.uid));
        set_thread_res_gid(gid, gid, gid).map_err(|errno| Step::Group.failed(errno))?;
        set_thread_res_uid(uid, uid, uid).map_err(|errno| Step::User.failed(errno))?;
        if self.uid.is_root() {
            return Ok(());
        }
        // Root could leave the cgroup, so this user must not become root by a program with the set-user-ID bit.
        set_no_new_privs(true).map_err(|errno| Step::NoNewPrivileges.failed(errno))
    }
}

/// For the calling thread and all that it executes. Without `CAP_SETPCAP` the bounding set, from which a program of root is
/// given its capabilities, stays as it is; then nothing that is executed may gain any.
fn give_up(dropped: CapabilitySet) -> io::Result<()> {
    let failed = |errno| Step::Capabilities.failed(errno);
    for capability in dropped.iter() {
        match remove_capability_from_bounding_set(capability) {
            // `EINVAL`: this kernel does not know it.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(Errno::PERM) => set_no_new_privs(true).map_err(failed)?,
            Err(errno) => return Err(failed(errno)),
        }
    }
    let held = capabilities(None).map_err(failed)?;
    let left = CapabilitySets {
        effective: held.effective - dropped,
        permitted: held.permitted - dropped,
        inheritable: held.inheritable - dropped,
    };
    set_capabilities(None, left).map_err(failed)
}

/// Descriptors that this process inherited are not passed on. Its own are not anyway.
fn keep_descriptors() -> io::Result<()> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        let Some(descriptor) = name.to_str().and_then(|name| name.parse::<RawFd>().ok()) else { continue };
        // SAFETY: the call takes numbers only, and changes nothing but what becomes of the descriptor when this process
        // executes another program, which it does not.
        let done = unsafe { descriptor < 3 || libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) == 0 };
        let error = io::Error::last_os_error();
        // That of the listing itself may be closed meanwhile.
        if !done && error.raw_os_error() != Some(libc::EBADF) {
            return Err(error);
        }
    }
    Ok(())
}

/// Stdin, stdout and stderr are passed on whatever they are.
fn warn_of_sockets() {
    let is_network = |domain| [AddressFamily::INET, AddressFamily::INET6].contains(&domain);
    let domains = [socket_domain(io::stdin()), socket_domain(io::stdout()), socket_domain(io::stderr())];
    for (name, domain) in ["stdin", "stdout", "stderr"].into_iter().zip(domains) {
        if domain.is_ok_and(is_network) {
            tracing::warn!("{name} is a network socket made outside: what the command does with it is not filtered");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_step_that_failed_is_told_from_a_command_that_failed() {
        for step in Step::ALL {
            let number = step.failed(Errno::PERM).raw_os_error().unwrap();
            let (told, cause) = Step::told(number).unwrap();
            assert_eq!((told as i32, cause.raw_os_error()), (step as i32, Some(libc::EPERM)));
        }
        assert!(Step::told(libc::ENOENT).is_none());
    }
}
