//! Containers, run by runc as an engine has it run them: with namespaces, a cgroup, mounts and capabilities of their own.
//!
//! Not an engine: there is no store of images, and the network is one of the tests' namespaces or none.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{cgroup::Cgroup, companion, eventually, netns::Netns, unique_name};

/// What a container is made of.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    /// What the root file system is a copy of; without it, there is nothing but mounts.
    pub root: Option<PathBuf>,
    /// The command.
    pub args: Vec<String>,
    /// Its environment.
    pub variables: BTreeMap<String, String>,
    /// All it has.
    pub capabilities: Vec<&'static str>,
    /// By where they are, so in an order that nests.
    pub mounts: BTreeMap<PathBuf, Mount>,
    /// Whose processes it sees.
    pub pids: Pids,
    /// The file of a network namespace; without it, one is made that reaches nothing.
    pub network: Option<PathBuf>,
    /// Which system calls it may make; without it, all.
    pub seccomp: Option<Value>,
}

/// `deploy/container/seccomp.json`: the system calls that containerd allows by default (`RuntimeDefault` of Kubernetes) to a
/// container that has `CAP_BPF`, `CAP_PERFMON` and `CAP_SYS_PTRACE`.
pub fn runtime_default() -> Result<Value> {
    Ok(serde_json::from_str(include_str!("../../deploy/container/seccomp.json"))?)
}

/// What is mounted in a container.
#[derive(Debug, Clone)]
pub enum Mount {
    /// A directory of the host, for reading.
    ReadOnly(PathBuf),
    /// A directory of the host.
    Writable(PathBuf),
    /// An empty directory in memory.
    Memory,
}

/// Whose processes a container sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pids {
    /// Its own.
    #[default]
    Own,
    /// All of the host.
    Host,
}

impl Spec {
    /// A program of this host, with the directories that programs need, at their places, and another.
    pub fn of_this_host(command: &Command, more: &Path, network: &Netns) -> Result<Self> {
        let words = [command.get_program()].into_iter().chain(command.get_args());
        let args =
            words.map(|word| word.to_str().map(str::to_owned)).collect::<Option<_>>().context("words are UTF-8")?;
        let directories = ["/bin", "/lib", "/lib64", "/usr"].map(Path::new);
        let directories = directories.into_iter().filter(|directory| directory.exists()).chain([more]);
        let mounts = directories.map(|directory| (directory.to_owned(), Mount::ReadOnly(directory.to_owned())));
        Ok(Self {
            args,
            variables: BTreeMap::from([("PATH".to_owned(), "/usr/bin:/bin".to_owned())]),
            mounts: mounts.collect(),
            network: Some(network.path()),
            ..Self::default()
        })
    }

    /// `config.json` of the OCI's runtime specification.
    fn config(&self, cgroup: &str) -> Value {
        let variables: Vec<String> = self.variables.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut namespaces = vec![
            json!({ "type": "mount" }),
            json!({ "type": "ipc" }),
            json!({ "type": "uts" }),
            json!({ "type": "cgroup" }),
            json!({ "type": "network", "path": self.network.clone().unwrap_or_default() }),
        ];
        if self.pids == Pids::Own {
            namespaces.push(json!({ "type": "pid" }));
        }
        let of_kernel = [
            json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
            json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"] }),
            json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"] }),
        ];
        let mounts = self.mounts.iter().map(|(at, mount)| mount.config(at));
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 0, "gid": 0 },
                "args": self.args,
                "env": variables,
                "cwd": "/",
                "capabilities": {
                    "bounding": self.capabilities, "effective": self.capabilities, "permitted": self.capabilities,
                },
                "noNewPrivileges": true,
            },
            "root": { "path": "root", "readonly": true },
            "mounts": of_kernel.into_iter().chain(mounts).collect::<Vec<_>>(),
            "linux": {
                "namespaces": namespaces,
                "cgroupsPath": cgroup,
                "seccomp": self.seccomp,
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }
}

impl Mount {
    fn config(&self, at: &Path) -> Value {
        match self {
            Self::ReadOnly(from) => {
                json!({ "destination": at, "type": "bind", "source": from, "options": ["rbind", "ro"] })
            }
            Self::Writable(from) => {
                json!({ "destination": at, "type": "bind", "source": from, "options": ["rbind", "rw"] })
            }
            Self::Memory => {
                json!({ "destination": at, "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "nodev", "noexec"] })
            }
        }
    }
}

/// A container that can be run once. What it is made of goes with it, and what still runs in it is killed.
#[derive(Debug)]
pub struct Container {
    /// What engines name containers: 64 hexadecimal digits.
    id: String,
    cgroup: String,
    /// Its root, its configuration, and what runc keeps of it.
    directory: TempDir,
}

impl Container {
    /// Makes one, in a cgroup of its own below another. Nothing runs in it yet.
    pub fn new(spec: &Spec, parent: &Cgroup) -> Result<Self> {
        let id = format!("{:0>64}", unique_name().replace(|letter: char| !letter.is_ascii_digit(), "e"));
        let directory = tempfile::Builder::new().prefix("egress-container-").tempdir()?;
        let cgroup = format!("{}/{id}", parent.name());
        let container = Self { id, cgroup, directory };
        let root = container.directory.path().join("root");
        fs::create_dir(&root)?;
        if let Some(from) = &spec.root {
            let copied = Command::new("cp").arg("--archive").arg(from.join(".")).arg(&root).status()?;
            ensure!(copied.success(), "cannot copy {}", from.display());
        }
        let config = serde_json::to_vec(&spec.config(&container.cgroup))?;
        fs::write(container.directory.path().join("config.json"), config)?;
        Ok(container)
    }

    /// What runs it, with the input, the output and the exit status of what runs in it, to which it passes signals on.
    pub fn command(&self) -> Result<Command> {
        let mut command = self.runc("run")?;
        command.arg("--bundle").arg(self.directory.path()).arg(&self.id);
        Ok(command)
    }

    /// Runs another command in it while it runs.
    pub fn exec(&self, args: &[&str]) -> Result<Output> {
        Ok(self.runc("exec")?.arg(&self.id).args(args).output()?)
    }

    /// Its identifier.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The path of its cgroup.
    pub fn cgroup(&self) -> &str {
        &self.cgroup
    }

    /// The process id of what runs in it, as the host sees it.
    pub fn pid(&self) -> Result<u32> {
        let output = self.runc("state")?.arg(&self.id).output()?;
        let state: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("no state: {}", String::from_utf8_lossy(&output.stderr)))?;
        let pid = state["pid"].as_u64().filter(|&pid| pid > 0).context("nothing runs in the container")?;
        Ok(pid.try_into()?)
    }

    /// Kills what runs in it, as the kernel does when memory is short: neither it nor runc can prepare for that.
    pub fn kill(&self) -> Result<()> {
        let pid = Pid::from_raw(self.pid()?.try_into()?).context("a process id")?;
        Ok(kill_process(pid, Signal::KILL)?)
    }

    fn runc(&self, work: &str) -> Result<Command> {
        let mut command = Command::new(companion("runc/usr/sbin/runc")?);
        command.arg("--root").arg(self.directory.path().join("state")).arg(work);
        Ok(command)
    }

    fn delete(&self) -> Result<()> {
        let output = self.runc("delete")?.arg("--force").arg(&self.id).output()?;
        if !output.status.success() {
            bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
        }
        eventually("empty cgroups", || self.remove_cgroups().ok()).map(drop)
    }

    /// Where hierarchies of version 1 are mounted, runc makes the cgroup in them too, and leaves its parent there.
    fn remove_cgroups(&self) -> Result<()> {
        for hierarchy in version_1(&fs::read_to_string("/proc/self/mountinfo")?) {
            let cgroup = hierarchy.join(self.cgroup.trim_start_matches('/'));
            if cgroup.exists() {
                fs::remove_dir(&cgroup)?;
            }
            // Fails while another container is below it, or if it is gone.
            let _ = cgroup.parent().map(fs::remove_dir);
        }
        Ok(())
    }
}

/// Fields of a line, by `proc_pid_mountinfo(5)`: 5 is the mount point; the type of the file system follows a lone `-`.
fn version_1(mounts: &str) -> impl Iterator<Item = &Path> {
    let of_line = |line: &'_ str| line.split_once(" - cgroup ").is_some();
    mounts.lines().filter(move |line| of_line(line)).filter_map(|line| line.split(' ').nth(4)).map(Path::new)
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = self.delete() {
            eprintln!("cannot remove container {}: {error:#}", self.id);
        }
    }
}
