//! Network namespaces for tests.

use std::{
    fs::File,
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{cgroup::Cgroup, unique_name};

/// A network namespace, removed when dropped.
#[derive(Debug)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// Makes one with only its loopback interface up.
    pub fn new() -> Result<Self> {
        let namespace = Self { name: unique_name() };
        ip(&["netns", "add", &namespace.name])?;
        namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Makes every address of both families local, so that each destination answers at once and no packet leaves.
    pub fn with_every_address_local() -> Result<Self> {
        let namespace = Self::new()?;
        namespace.ip(&["route", "add", "local", "0.0.0.0/0", "dev", "lo"])?;
        namespace.ip(&["-6", "route", "add", "local", "::/0", "dev", "lo"])?;
        Ok(namespace)
    }

    /// Its name, for `ip netns`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` in it.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        let args: Vec<&str> = ["-n", &self.name].iter().chain(args).copied().collect();
        ip(&args)
    }

    /// Runs `work` on a thread in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let namespace = File::open(self.path()).context("the network namespace is gone")?;
        let inside = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(work())
        };
        match std::thread::scope(|scope| scope.spawn(inside).join()) {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// The file that stands for it.
    pub fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// A command that will run in this namespace and in a cgroup.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>, cgroup: Option<&Cgroup>) -> Result<Command> {
        let namespace = File::open(self.path()).context("the network namespace is gone")?;
        let procs = cgroup.map(|cgroup| File::options().write(true).open(cgroup.procs())).transpose()?;
        let mut command = Command::new(program);
        let enter = move || {
            if let Some(procs) = &procs {
                rustix::io::write(procs, b"0")?;
            }
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes two system calls on descriptors that were opened before the
        // fork; it neither allocates nor locks.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        if let Err(error) = ip(&["netns", "del", &self.name]) {
            eprintln!("cannot remove network namespace {}: {error}", self.name);
        }
    }
}

/// Connects two namespaces by a pair of interfaces, named after the namespaces' roles.
pub fn connect(a: (&Netns, &str, &str), b: (&Netns, &str, &str)) -> Result<()> {
    ip(&["link", "add", a.1, "netns", &a.0.name, "type", "veth", "peer", "name", b.1, "netns", &b.0.name])?;
    for (namespace, interface, address) in [a, b] {
        namespace.ip(&["address", "add", address, "dev", interface])?;
        namespace.ip(&["link", "set", interface, "up"])?;
    }
    Ok(())
}

pub(crate) fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("cannot run `ip`: install iproute2")?;
    if !output.status.success() {
        bail!("ip {} failed: {}", args.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Has a command see a file in the place of another, in a mount namespace of its own.
pub fn with_file_over(command: &mut Command, file: &Path, over: &'static str) {
    let file = file.to_owned();
    let enter = move || {
        use rustix::{
            mount::{MountPropagationFlags, mount_bind, mount_change},
            thread::{UnshareFlags, unshare_unsafe},
        };
        // SAFETY: the child has one thread and shares nothing with others yet.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::REC | MountPropagationFlags::PRIVATE)?;
        Ok(mount_bind(&file, over)?)
    };
    // SAFETY: between fork and exec the closure makes three system calls; paths of this length are not allocated for.
    unsafe { command.pre_exec(enter) };
}
