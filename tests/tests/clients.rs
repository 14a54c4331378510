//! What applications make of a refusal: they fail at once, whatever the errno, and go on to the next address of a name.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use egress_tests::{agent::Agent, cgroup::Cgroup, companion, mariadb, netns::Netns};
use tempfile::TempDir;

/// The server, and an address that no policy opens and nobody has: without a filter, a connection to it would hang.
const OPEN: &str = "192.0.2.1";
const REFUSED: &str = "192.0.2.9";
/// Far less than any client waits for an answer, and enough for a busy machine.
const AT_ONCE: Duration = Duration::from_secs(5);

/// A host with a MariaDB and a web server, and a filtered cgroup beside it.
struct Scene {
    agent: Agent,
    policies: TempDir,
    cgroup: Cgroup,
    _database: mariadb::Server,
    namespace: Netns,
}

impl Scene {
    fn new() -> Self {
        let namespace = Netns::new().unwrap();
        namespace.ip(&["address", "add", "192.0.2.1/32", "dev", "lo"]).unwrap();
        let database = mariadb::Server::start(&namespace, OPEN).unwrap();
        let listener = namespace.run(|| TcpListener::bind((OPEN, 8080)).unwrap()).unwrap();
        thread::spawn(move || serve(&listener));
        let (cgroup, policies) = (Cgroup::new().unwrap(), tempfile::tempdir().unwrap());
        fs::write(policies.path().join("policy.yaml"), policy("EPERM")).unwrap();
        let agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
        Self { agent, policies, cgroup, _database: database, namespace }
    }

    fn refuse_with(&mut self, errno: &str, generation: u32) {
        fs::write(self.policies.path().join("policy.yaml"), policy(errno)).unwrap();
        self.agent.wait_for(&format!("policy applied generation={generation} ")).unwrap();
    }

    fn command(&self, program: &str) -> Command {
        self.namespace.command(program, Some(&self.cgroup)).unwrap()
    }

    /// curl fetches a page from a host with these addresses.
    fn curl(&self, addresses: &[&str]) -> Output {
        let resolve = format!("host.test:8080:{}", addresses.join(","));
        let mut curl = self.command("curl");
        at_once(curl.args(["--disable", "--silent", "--show-error", "--resolve", &resolve, "http://host.test:8080/"]))
    }

    /// Python opens a connection to a host with these addresses, as every client of its library does.
    fn python(&self, addresses: &[&str]) -> Output {
        const SCRIPT: &str = "import socket, sys\n\
            found = [(socket.AF_INET, socket.SOCK_STREAM, 6, '', (at, 8080)) for at in sys.argv[1:]]\n\
            socket.getaddrinfo = lambda *_: found\n\
            try: connection = socket.create_connection(('host.test', 8080))\n\
            except OSError as error: sys.exit(error.strerror)\n\
            connection.sendall(b'GET / HTTP/1.0\\r\\n\\r\\n')\n\
            print(connection.makefile().read())";
        at_once(self.command("python3").args(["-c", SCRIPT]).args(addresses))
    }

    /// The MariaDB client asks a host with these addresses.
    fn mariadb(&self, addresses: &[&str]) -> Output {
        let hosts: Vec<String> = addresses.iter().map(|address| format!("{address} host.test\n")).collect();
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("hosts");
        fs::write(&file, hosts.concat()).unwrap();
        // A mount namespace of its own, in which these are all hosts there are.
        let mut command = self.command("unshare");
        command.args(["--mount", "sh", "-c", "mount --bind \"$0\" /etc/hosts && exec \"$@\""]);
        command.arg(&file).arg(companion("mariadb/bin/mariadb").unwrap());
        at_once(&mut mariadb::client(command, "host.test"))
    }
}

fn policy(errno: &str) -> String {
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\n\
         spec: {{ allow: [{{ to: [{{ cidr: {OPEN}/32 }}] }}], refuseWith: {errno} }}\n"
    )
}

/// A web server with one page.
fn serve(listener: &TcpListener) {
    for connection in listener.incoming() {
        let mut connection = connection.unwrap();
        let mut request = [0; 1024];
        // Whoever goes away without asking needs no answer.
        if connection.read(&mut request).is_ok_and(|length| length > 0) {
            connection.write_all(b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nstars").unwrap();
        }
    }
}

#[track_caller]
fn at_once(command: &mut Command) -> Output {
    let start = Instant::now();
    let output = command.output().unwrap();
    assert!(start.elapsed() < AT_ONCE, "{command:?} took {:?}", start.elapsed());
    output
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes)).concat()
}

#[test]
fn clients_fail_at_once_with_each_errno_and_go_on_to_the_next_address() {
    let mut scene = Scene::new();
    for (generation, errno, words) in [
        (1, "EPERM", "Operation not permitted"),
        (2, "ECONNREFUSED", "Connection refused"),
        (3, "EHOSTUNREACH", "No route to host"),
    ] {
        if generation > 1 {
            scene.refuse_with(errno, generation);
        }
        let (curl, python, mariadb) = (scene.curl(&[REFUSED]), scene.python(&[REFUSED]), scene.mariadb(&[REFUSED]));
        // curl: "failed to connect to host"; it does not say why.
        assert_eq!(curl.status.code(), Some(7), "{errno}: {}", said(&curl));
        assert!(!python.status.success() && said(&python).contains(words), "{errno}: {}", said(&python));
        // The client names the number.
        let number = match errno {
            "EPERM" => "(1)",
            "ECONNREFUSED" => "(111)",
            _ => "(113)",
        };
        assert!(!mariadb.status.success() && said(&mariadb).contains(number), "{errno}: {}", said(&mariadb));

        let both = &[REFUSED, OPEN];
        assert!(said(&scene.curl(both)).contains("stars"), "{errno}: {}", said(&scene.curl(both)));
        assert!(said(&scene.python(both)).contains("stars"), "{errno}: {}", said(&scene.python(both)));
        assert_eq!(said(&scene.mariadb(both)), "5\n4\n", "{errno}");
    }
}
