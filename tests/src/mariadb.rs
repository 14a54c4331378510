//! A real MariaDB server and its real client.

use std::{
    fs,
    path::Path,
    process::{Child, Command, Output, Stdio},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::{cgroup::Cgroup, companion, eventually, netns::Netns};

/// The account that tests use.
const USER: &str = "ratings";
/// Its password.
const PASSWORD: &str = "stars";

/// A server on a private data directory, ended when dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    directory: TempDir,
}

impl Server {
    /// Initialises a data directory with a `ratings` database and starts a server in a namespace, on port 3306 of an
    /// address. Returns once it answers.
    pub fn start(namespace: &Netns, address: &str) -> Result<Self> {
        let directory = tempfile::Builder::new().prefix("egress-mariadb-").tempdir()?;
        let data = directory.path().join("data");
        initialise(&data, directory.path())?;
        let setup = directory.path().join("setup.sql");
        fs::write(&setup, setup_statements())?;
        let log = fs::File::create(directory.path().join("log"))?;
        let mut command = namespace.command(companion("mariadb/bin/mariadbd")?, None)?;
        command.arg(format!("--bind-address={address}")).arg("--port=3306").env("TMPDIR", directory.path());
        for (option, path) in [
            ("datadir", &data),
            ("init-file", &setup),
            ("socket", &directory.path().join("socket")),
            ("pid-file", &directory.path().join("pid")),
        ] {
            command.arg(format!("--{option}={}", path.display()));
        }
        let child = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let mut server = Self { child, directory };
        eventually("the database server", || server.is_ready().transpose())??;
        Ok(server)
    }

    /// Whether it takes connections; an error if it ended.
    fn is_ready(&mut self) -> Result<Option<()>> {
        let log = fs::read_to_string(self.directory.path().join("log"))?;
        if let Some(status) = self.child.try_wait()? {
            bail!("the database server ended with {status}:\n{log}");
        }
        Ok(log.contains("ready for connections").then_some(()))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Fails only if it has ended already.
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let _ = self.child.wait();
    }
}

/// A server that starts removes the temporary tables of every other one that has the same directory for them.
fn initialise(data: &Path, temporary: &Path) -> Result<()> {
    let mut install = Command::new(companion("mariadb/bin/mariadb-install-db")?);
    install.args(["--auth-root-authentication-method=normal", "--skip-test-db"]);
    install.arg(format!("--datadir={}", data.display())).env("TMPDIR", temporary);
    let output = install.output().context("cannot run mariadb-install-db")?;
    if !output.status.success() {
        bail!("mariadb-install-db failed: {}", text(&output));
    }
    Ok(())
}

fn setup_statements() -> String {
    format!(
        "CREATE DATABASE test;\n\
         CREATE TABLE test.ratings (id INT PRIMARY KEY, rating INT);\n\
         INSERT INTO test.ratings VALUES (1, 5), (2, 4);\n\
         CREATE USER '{USER}'@'%' IDENTIFIED BY '{PASSWORD}';\n\
         GRANT SELECT ON test.* TO '{USER}'@'%';\n"
    )
}

/// What a client got.
#[derive(Debug)]
pub enum Answer {
    /// The ratings, one a line.
    Ratings(String),
    /// What it said.
    Error(String),
}

/// Asks a server for the ratings, from a cgroup and a namespace.
pub fn query(cgroup: &Cgroup, namespace: &Netns, address: &str) -> Result<Answer> {
    Ok(answer(&client(namespace.command(companion("mariadb/bin/mariadb")?, Some(cgroup))?, address).output()?))
}

/// What a client that has ended got.
pub fn answer(output: &Output) -> Answer {
    if output.status.success() {
        Answer::Ratings(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        Answer::Error(text(output))
    }
}

/// Has a client, given by its program, ask a server for the ratings.
pub fn client(mut command: Command, address: &str) -> Command {
    command.args(["--batch", "--skip-column-names", "--protocol=tcp", "--connect-timeout=10"]);
    command.args(["--host", address, "--port", "3306", "--user", USER]).arg(format!("--password={PASSWORD}"));
    command.args(["--execute", "SELECT rating FROM test.ratings ORDER BY id"]);
    command.stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).trim().to_owned()
}
