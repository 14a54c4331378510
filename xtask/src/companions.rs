//! Programs that the tests and the demo run beside the agent: a MariaDB server and its client, two DNS servers and a client, the C library
//! musl, and what the system may lack of iproute2, curl and Python; runc; and pip, for the check of the chart.
//!
//! Each is unpacked below `target/companions` and called through a script that knows where its libraries are. Starting and stopping them is
//! up to the tests.

use std::{
    env,
    ffi::OsString,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};

use crate::{
    debian::{self, Debian},
    process,
    root::Environment,
    step,
    workspace::Workspace,
};

/// The private server never reads the system's option files, and runs as whoever starts it.
const MARIADB: Companion = Companion {
    name: "mariadb",
    recipe: "mariadb 1",
    packages: &["mariadb-server-core", "mariadb-client-core"],
    scripts: &[
        (
            "bin/mariadbd",
            "exec \"$root/usr/sbin/mariadbd\" --no-defaults --basedir=\"$root/usr\" \
             --lc-messages-dir=\"$root/usr/share/mysql\" --user=\"$(id -un)\" \"$@\"",
        ),
        (
            "bin/mariadb-install-db",
            "exec \"$root/usr/bin/mariadb-install-db\" --no-defaults --basedir=\"$root/usr\" --user=\"$(id -un)\" \"$@\"",
        ),
        ("bin/mariadb", "exec \"$root/usr/bin/mariadb\" --no-defaults \"$@\""),
    ],
};

/// Reads no configuration but what its command line names.
const DNSMASQ: Companion = Companion {
    name: "dnsmasq",
    recipe: "dnsmasq 1",
    packages: &["dnsmasq-base"],
    scripts: &[("bin/dnsmasq", "exec \"$root/usr/sbin/dnsmasq\" --conf-file=/dev/null --user=\"$(id -un)\" \"$@\"")],
};

/// Reads no configuration but what its command line names.
const UNBOUND: Companion = Companion {
    name: "unbound",
    recipe: "unbound 1",
    packages: &["unbound"],
    scripts: &[("scripts/unbound", "exec \"$root/usr/sbin/unbound\" \"$@\"")],
};

const DIG: Companion = Companion {
    name: "dig",
    recipe: "dig 1",
    packages: &["bind9-dnsutils"],
    scripts: &[("scripts/dig", "exec \"$root/usr/bin/dig\" -r \"$@\"")],
};

/// Another C library, to build a client with.
const MUSL: Companion = Companion { name: "musl", recipe: "musl 1", packages: &["musl-dev"], scripts: &[] };

/// Clients that people use: they show what a refused call looks like from the application.
const CURL: Companion = Companion {
    name: "curl",
    recipe: "curl 1",
    packages: &["curl"],
    scripts: &[("scripts/curl", "exec \"$root/usr/bin/curl\" --disable \"$@\"")],
};

const PYTHON: Companion = Companion {
    name: "python3",
    recipe: "python3 2",
    packages: &["python3"],
    scripts: &[("scripts/python3", "PYTHONHOME=\"$root/usr\" exec \"$root/usr/bin/python3\" \"$@\"")],
};

const IPROUTE2: Companion = Companion {
    name: "iproute2",
    recipe: "iproute2 1",
    packages: &["iproute2"],
    scripts: &[(
        "scripts/ip",
        "[ -x \"$root/bin/ip\" ] && exec \"$root/bin/ip\" \"$@\"\nexec \"$root/usr/bin/ip\" \"$@\"",
    )],
};

/// Runs the containers in which the image is tested. Its library is one of apt's own.
const RUNC: Companion = Companion { name: "runc", recipe: "runc 1", packages: &["runc"], scripts: &[] };

/// Pip as one file, which is all that is needed to run it.
const PIP: Companion = Companion { name: "pip", recipe: "pip 1", packages: &["python3-pip-whl"], scripts: &[] };

struct Companion {
    name: &'static str,
    recipe: &'static str,
    packages: &'static [&'static str],
    /// Where each script lies below the companion, in a directory that no package has, and how it ends.
    scripts: &'static [(&'static str, &'static str)],
}

/// Fetches what is missing; returns the variables that lead a test to the agent and its companions.
pub fn ensure(workspace: &Workspace) -> Result<Environment> {
    let _lock = step::lock(workspace)?;
    let directory = workspace.target("companions");
    for companion in [MARIADB, DNSMASQ, UNBOUND, DIG, MUSL] {
        companion.ensure(workspace, &directory)?;
    }
    let mut environment =
        vec![("EGRESS_AGENT", workspace.agent().into()), ("EGRESS_COMPANIONS", directory.clone().into())];
    let mut added = Vec::new();
    for (program, companion) in [("ip", IPROUTE2), ("curl", CURL), ("python3", PYTHON)] {
        if process::find(program).is_none() {
            companion.ensure(workspace, &directory)?;
            added.push(directory.join(companion.name).join("scripts"));
        }
    }
    if !added.is_empty() {
        environment.push(("PATH", path_with(added)?));
    }
    Ok(environment)
}

/// The same, and what runs containers.
pub fn ensure_with_runc(workspace: &Workspace) -> Result<Environment> {
    let environment = ensure(workspace)?;
    let _lock = step::lock(workspace)?;
    RUNC.ensure(workspace, &workspace.target("companions"))?;
    Ok(environment)
}

/// Python, for where there is none. The caller holds the lock.
pub fn python(workspace: &Workspace) -> Result<PathBuf> {
    let directory = workspace.target("companions");
    PYTHON.ensure(workspace, &directory)?;
    Ok(directory.join("python3/scripts/python3"))
}

/// The file that is pip, for a Python without it. The caller holds the lock.
pub fn pip(workspace: &Workspace) -> Result<PathBuf> {
    let directory = workspace.target("companions");
    PIP.ensure(workspace, &directory)?;
    let wheels = directory.join("pip/usr/share/python-wheels");
    let files = fs::read_dir(&wheels).with_context(|| format!("cannot read {}", wheels.display()))?;
    let mut files = files.filter_map(|file| Some(file.ok()?.path()));
    let is_pip = |file: &PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("pip-"));
    files.find(is_pip).with_context(|| format!("{} has no pip", wheels.display()))
}

impl Companion {
    fn ensure(&self, workspace: &Workspace, parent: &Path) -> Result<()> {
        step::once(&parent.join(self.name), self.recipe, |directory| self.unpack(workspace, directory))
            .with_context(|| format!("cannot fetch {}, which the tests and the demo run", self.name))
    }

    fn unpack(&self, workspace: &Workspace, directory: &Path) -> Result<()> {
        let debian = Debian::open(workspace)?;
        let archives = debian.plan(self.packages, self.packages)?;
        debian.unpack(&archives, directory)?;
        self.scripts
            .iter()
            .try_for_each(|(script, line)| debian::write_wrapper(&directory.join(script), directory, line))
    }
}

fn path_with(directories: Vec<PathBuf>) -> Result<OsString> {
    let path = env::var_os("PATH").unwrap_or_default();
    let all = directories.into_iter().chain(env::split_paths(&path));
    env::join_paths(all).context("a directory on PATH has a colon in its name")
}
