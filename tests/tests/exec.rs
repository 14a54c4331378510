//! `exec`: what the command may reach, as whom it runs, what its end looks like, and what is left behind.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{fs::chown, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};

use egress_agent::{control::hexadecimal, pins::PinDirectory};
use egress_tests::{
    agent::{Agent, Place, binary},
    asker::question,
    cgroup::Cgroup,
    eventually,
    netns::Netns,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

const DIAL: &str = env!("CARGO_BIN_EXE_dial");
const ASKER: &str = env!("CARGO_BIN_EXE_asker");
/// What `dial` answers: nobody listens, so what is allowed is refused by the other side.
const ALLOWED: &str = "111";
const REFUSED: &str = "1";

/// What the commands of a test share: nothing with those of others.
struct Host {
    place: Place,
    namespace: Netns,
    cgroup: Cgroup,
    files: TempDir,
}

impl Host {
    fn new() -> Self {
        let (place, namespace) = (Place::new().unwrap(), Netns::with_every_address_local().unwrap());
        Self { place, namespace, cgroup: Cgroup::new().unwrap(), files: tempfile::tempdir().unwrap() }
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.files.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// `exec` from a cgroup.
    fn exec_from(&self, cgroup: &Cgroup, args: &[&str]) -> Command {
        let mut command = self.namespace.command(binary().unwrap(), Some(cgroup)).unwrap();
        self.place.tell(&mut command);
        command.arg("exec").args(args).env_remove("SUDO_UID").env_remove("SUDO_GID");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let by_default = || {
            // SAFETY: the call takes two numbers, and the second stands for no function.
            unsafe { libc::signal(libc::SIGHUP, libc::SIG_DFL) };
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes one system call. Whoever runs the tests may ignore the signal (`nohup`).
        unsafe { command.pre_exec(by_default) };
        command
    }

    fn exec(&self, args: &[&str]) -> Command {
        self.exec_from(&self.cgroup, args)
    }

    /// Runs it to its end.
    fn run(&self, args: &[&str]) -> Ended {
        ended(&self.exec(args).output().unwrap())
    }

    /// The answers of `dial` to calls, and how that ended.
    fn dial(&self, args: &[&str], calls: &[&str]) -> (Vec<String>, Ended) {
        self.answers(args, DIAL, calls)
    }

    /// The answers of a program to lines, and how that ended.
    fn answers(&self, args: &[&str], program: &str, calls: &[&str]) -> (Vec<String>, Ended) {
        let mut child = self.exec(&[args, &["--", program]].concat()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        for call in calls {
            writeln!(stdin, "{call}").unwrap();
        }
        drop(stdin);
        let ended = ended(&child.wait_with_output().unwrap());
        (ended.stdout.lines().map(str::to_owned).collect(), ended)
    }

    /// The pins of commands.
    fn pins(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.place.exec_pins()).into_iter().flatten();
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// The cgroups of commands.
    fn cgroups(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.cgroup.path()).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect()
    }

    #[track_caller]
    fn is_clean(&self) {
        assert_eq!((self.pins(), self.cgroups()), (Vec::new(), Vec::new()));
    }
}

#[derive(Debug)]
struct Ended {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

fn ended(output: &Output) -> Ended {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ended { code: output.status.code(), stdout: text(&output.stdout), stderr: text(&output.stderr) }
}

/// A command that goes on until it is told to end.
struct Dialling {
    exec: Child,
    /// Open also when `exec` is gone.
    calls: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Dialling {
    fn start(mut exec: Command) -> Self {
        let mut exec = exec.spawn().unwrap();
        let (calls, answers) = (exec.stdin.take().unwrap(), BufReader::new(exec.stdout.take().unwrap()));
        Self { exec, calls, answers }
    }

    fn call(&mut self, call: &str) -> String {
        writeln!(self.calls, "{call}").unwrap();
        self.line()
    }

    fn line(&mut self) -> String {
        let mut answer = String::new();
        self.answers.read_line(&mut answer).unwrap();
        answer.trim().to_owned()
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(i32::try_from(self.exec.id()).unwrap()).unwrap(), signal).unwrap();
    }

    /// Ends the command, by ending its stdin.
    fn end(mut self) -> Ended {
        drop(self.calls);
        let mut stderr = String::new();
        self.exec.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        let code = self.exec.wait().unwrap().code();
        Ended { code, stdout: String::new(), stderr }
    }
}

fn entry(name: &str, address: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{ name: {name} }}\nspec: {{ hosts: \
         [{name}.example.com], addresses: [{address}], ports: [{{ number: 80, name: http }}] }}\n"
    )
}

const A: &str = "tcp plain 192.0.2.1:80";
const B: &str = "tcp plain 192.0.2.2:80";
const C: &str = "tcp plain 192.0.2.3:80";
const D: &str = "tcp plain 192.0.2.4:80";

#[test]
fn the_command_reaches_what_a_policy_names_and_nothing_else() {
    let host = Host::new();
    let policies = host.file("a.yaml", &entry("a", "192.0.2.1"));
    let (answers, ended) = host.dial(&["--policies", &policies], &[A, B, "tcp plain 127.0.0.1:9"]);
    assert_eq!((answers, ended.code), ([ALLOWED, REFUSED, ALLOWED].map(str::to_owned).to_vec(), Some(0)));
    // Without documents, the default is what is left.
    let (answers, _) = host.dial(&["--no-loopback"], &[A, "tcp plain 127.0.0.1:9"]);
    assert_eq!(answers, [REFUSED, REFUSED]);
    let (answers, _) = host.dial(&["--default", "Allow"], &[A]);
    assert_eq!(answers, [ALLOWED]);
    host.is_clean();
}

#[test]
fn the_exit_status_is_that_of_the_command_or_tells_why_there_is_none() {
    let host = Host::new();
    let wrong = host.file("wrong.yaml", &entry("a", "192.0.2.1").replace("80", "0"));
    for (args, code, words) in [
        (&["--", "true"][..], 0, ""),
        (&["--", "sh", "-c", "exit 7"], 7, ""),
        (&["--", "sh", "-c", "exit 125"], 125, ""),
        (&["--", "sh", "-c", "kill -KILL $$"], 137, ""),
        (&["--", "sh", "-c", "kill -TERM $$"], 143, ""),
        (&["--", "no-such-command"], 127, "no-such-command: command not found"),
        (&["--", "/nonexistent/command"], 127, "command not found"),
        (&["--", "/etc/passwd"], 126, "cannot run /etc/passwd"),
        (&["--", "/etc"], 126, "cannot run /etc"),
        (&["--policies", &wrong, "--", "true"], 125, "spec.ports[0].number"),
        (&["--policies", "/nonexistent", "--", "true"], 125, "/nonexistent"),
        (&["--user", "no-such-user", "--", "true"], 125, "no-such-user"),
        (&["--pin-dir", "/tmp/egress-exec", "--", "true"], 125, "bpf file system"),
        (&["--no-such-flag", "--", "true"], 125, "--no-such-flag"),
        (&["true"], 125, "--"),
        (&["--help"], 0, ""),
    ] {
        let ended = host.run(args);
        assert_eq!(ended.code, Some(code), "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(words), "{args:?}: {ended:?}");
        assert!(!words.is_empty() || ended.stderr.is_empty(), "{args:?}: {ended:?}");
    }
    host.is_clean();
}

/// The capabilities that a command has, by a line of its `/proc/self/status`.
fn capabilities(ended: &Ended, line: &str) -> u64 {
    let found = ended.stdout.lines().find_map(|status| status.strip_prefix(line));
    u64::from_str_radix(found.unwrap_or_else(|| panic!("{}", ended.stderr)).trim(), 16).unwrap()
}

#[test]
fn a_command_of_root_is_without_the_capabilities_that_go_around_the_rules() {
    let host = Host::new();
    // CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_MODULE, CAP_SYS_RAWIO, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF.
    let dangerous = [12, 13, 16, 17, 19, 21, 38, 39].map(|bit: u32| 1_u64 << bit).iter().sum::<u64>();
    let status = |args: &[&str]| host.run(&[args, &["--", "cat", "/proc/self/status"]].concat());
    let ended = status(&[]);
    for line in ["CapBnd:", "CapPrm:", "CapEff:", "CapInh:", "CapAmb:"] {
        assert_eq!(capabilities(&ended, line) & dangerous, 0, "{line} {}", ended.stdout);
    }
    // The others are as they were: CAP_CHOWN.
    assert_eq!(capabilities(&ended, "CapEff:") & 1, 1);

    let ended = status(&["--keep-capabilities", "CAP_NET_RAW,bpf"]);
    assert_eq!(capabilities(&ended, "CapEff:") & dangerous, 1 << 13 | 1 << 39);
    let wrong = host.run(&["--keep-capabilities", "CAP_CHOWN", "--", "true"]);
    assert!(wrong.code == Some(125) && wrong.stderr.contains("commands keep every capability but"), "{}", wrong.stderr);
}

#[test]
fn without_root_the_agent_says_so() {
    let host = Host::new();
    // The binary may stand where others cannot reach it.
    let reachable = tempfile::Builder::new().permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755)).tempdir();
    let copy = reachable.as_ref().unwrap().path().join("egress-agent");
    fs::copy(binary().unwrap(), &copy).unwrap();
    let mut command = Command::new(copy);
    host.place.tell(&mut command);
    command.args(["exec", "--", "true"]).uid(65_534).gid(65_534);
    // A process that another test forks meanwhile holds the copy open for writing until it executes something.
    let is_busy = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ExecutableFileBusy;
    let output =
        eventually("the copy", || Some(command.output()).filter(|output| !output.as_ref().is_err_and(is_busy)));
    let ended = ended(&output.unwrap().unwrap());
    assert_eq!(ended.code, Some(125));
    assert!(ended.stderr.contains("run as root, or with CAP_BPF"), "{ended:?}");
}

#[test]
fn signals_are_the_commands() {
    let host = Host::new();
    let script = "for signal in HUP USR1 USR2 WINCH; do trap \"echo $signal\" $signal; done; trap 'exit 9' TERM; echo ready; \
                  for i in $(seq 1000); do sleep 0.02; done";
    let mut running = Dialling::start(host.exec(&["--", "sh", "-c", script]));
    assert_eq!(running.line(), "ready");
    // The terminal sends these to both; the command decides.
    running.signal(Signal::INT);
    running.signal(Signal::QUIT);
    for (signal, name) in
        [(Signal::HUP, "HUP"), (Signal::USR1, "USR1"), (Signal::USR2, "USR2"), (Signal::WINCH, "WINCH")]
    {
        running.signal(signal);
        assert_eq!(running.line(), name);
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, Some(9));
    host.is_clean();
}

#[test]
fn signals_are_passed_to_a_command_of_another_user() {
    let host = Host::new();
    let mut running = Dialling::start(host.exec(&["--user", "nobody", "--", "sh", "-c", "echo ready; exec sleep 20"]));
    assert_eq!(running.line(), "ready");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, Some(143));
    host.is_clean();
}

#[test]
fn what_was_ignored_stays_ignored() {
    let host = Host::new();
    let agent = host.exec(&["--", "sh", "-c", "kill -HUP $$; kill -INT $$; echo alive"]);
    let mut command = host.namespace.command("sh", Some(&host.cgroup)).unwrap();
    host.place.tell(&mut command);
    command.args(["-c", "trap '' HUP INT; exec \"$@\"", "sh"]).arg(agent.get_program()).args(agent.get_args());
    assert_eq!(ended(&command.output().unwrap()).stdout, "alive\n");
    // Otherwise the command has what every command has.
    assert_eq!(host.run(&["--", "sh", "-c", "kill -HUP $$; echo alive"]).code, Some(129));
    assert_eq!(host.run(&["--", "sh", "-c", "kill -PIPE $$; echo alive"]).code, Some(141));
}

/// A user with more groups than one, where there is one.
fn user() -> String {
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let names = passwd.lines().filter_map(|line| line.split(':').next()).filter(|name| *name != "root");
    let mut with_groups = names.filter(|name| says("id", &["-G", name]).contains(' '));
    with_groups.next().unwrap_or("nobody").to_owned()
}

fn says(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

const WHO: [&str; 4] = ["--", "sh", "-c", "id -u; id -g; id -G; echo $HOME $USER; grep NoNewPrivs /proc/self/status"];

#[test]
fn the_command_runs_as_the_user_that_is_asked_for() {
    let (host, user) = (Host::new(), user());
    let passwd = fs::read_to_string("/etc/passwd").unwrap();
    let account = passwd.lines().find(|line| line.starts_with(&format!("{user}:"))).unwrap();
    let home = account.split(':').nth(5).unwrap();
    let ids = ["-u", "-g", "-G"].map(|which| says("id", &[which, &user])).join("\n");
    let expected = format!("{ids}\n{home} {user}\nNoNewPrivs:\t1\n");
    let by_name = host.run(&[&["--user", &user], &WHO[..]].concat());
    assert_eq!(by_name.stdout, expected, "{by_name:?}");
    let uid = says("id", &["-u", &user]);
    assert!(by_name.stderr.contains(&format!("running as {user} (uid {uid})")), "{by_name:?}");
    assert_eq!(host.run(&[&["--user", &uid], &WHO[..]].concat()).stdout, expected);
    host.is_clean();
}

#[test]
fn the_command_runs_as_whoever_called_sudo() {
    let (host, user) = (Host::new(), user());
    let [uid, gid, groups] = ["-u", "-g", "-G"].map(|which| says("id", &[which, &user]));
    let through_sudo = |args: &[&str]| {
        ended(&host.exec(args).env("SUDO_UID", &uid).env("SUDO_GID", &gid).env("USER", "root").output().unwrap())
    };
    let ended = through_sudo(&WHO);
    assert!(ended.stdout.starts_with(&format!("{uid}\n{gid}\n{groups}\n")), "{ended:?}");
    assert!(ended.stdout.contains(&format!(" {user}\nNoNewPrivs:\t1")), "{ended:?}");
    assert!(ended.stderr.contains(&format!("running as {user} (uid {uid})")), "{ended:?}");
    // Who asks for root gets root, whose programs keep their privileges.
    let ended = through_sudo(&[&["--user", "root"], &WHO[..]].concat());
    assert!(ended.stdout.starts_with("0\n") && ended.stdout.contains("NoNewPrivs:\t0"), "{ended:?}");
    let ended = host.run(&WHO);
    assert!(ended.stdout.starts_with("0\n") && ended.stdout.contains("NoNewPrivs:\t0"), "{ended:?}");
    assert!(ended.stderr.is_empty(), "{ended:?}");
    host.is_clean();
}

/// What the summary says to save.
fn documents(stderr: &str) -> &str {
    stderr.split_once("--policies:\n\n").unwrap_or_else(|| panic!("no documents in\n{stderr}")).1
}

const CALLS: [&str; 4] = [A, A, "send plain [2001:db8::1]:53", "udp mapped 192.0.2.2:123"];

#[test]
fn what_was_refused_is_told_with_the_policy_that_allows_it() {
    let host = Host::new();
    let (answers, ended) = host.dial(&[], &CALLS);
    assert_eq!((answers, ended.code), (vec![REFUSED.to_owned(); 4], Some(0)));
    let lines = |text: &str| ended.stderr.lines().filter(|line| line.contains(text)).count();
    assert_eq!(lines(" DENY TCP 192.0.2.1:80 reason=no_rule comm=\"dial\""), 2, "{ended:?}");
    assert_eq!(lines(" DENY "), 4, "{ended:?}");
    for line in [
        "refused: 3 destinations",
        "2 × deny TCP 192.0.2.1:80",
        "1 × deny UDP [2001:db8::1]:53",
        "1 × deny UDP 192.0.2.2:123",
    ] {
        assert_eq!(lines(line), 1, "{line} in {ended:?}");
    }

    let policies = host.file("allow.yaml", documents(&ended.stderr));
    let (answers, ended) = host.dial(&["--policies", &policies], &CALLS);
    assert_eq!(answers, [ALLOWED, ALLOWED, "0", "0"]);
    assert!(ended.stderr.is_empty(), "{ended:?}");
    host.is_clean();
}

#[test]
fn an_egress_policy_is_answered_by_one_beside_it() {
    let host = Host::new();
    let closed = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: closed }\nspec: { services: [], \
                  deny: [{ to: [{ cidr: 192.0.2.2/32 }] }] }\n";
    let policies = host.file("closed.yaml", closed);
    let (_, ended) = host.dial(&["--policies", &policies], &[A, B]);
    assert!(ended.stderr.contains("1 × deny TCP 192.0.2.2:80 by EgressPolicy/default/closed"), "{ended:?}");
    let beside = host.file("beside.yaml", documents(&ended.stderr));
    let (answers, _) = host.dial(&["--policies", &policies, "--policies", &beside], &[A, B]);
    // What a deny refuses, no document opens.
    assert_eq!(answers, [ALLOWED, REFUSED]);
}

#[test]
fn audit_refuses_nothing_and_tells_what_deny_would() {
    let host = Host::new();
    let (answers, ended) = host.dial(&["--default", "Audit"], &[A]);
    assert_eq!(answers, [ALLOWED]);
    assert!(ended.stderr.contains(" WOULD_DENY TCP 192.0.2.1:80"), "{ended:?}");
    let policies = host.file("allow.yaml", documents(&ended.stderr));
    let (answers, ended) = host.dial(&["--policies", &policies], &[A]);
    assert_eq!(answers, [ALLOWED]);
    assert!(ended.stderr.is_empty(), "{ended:?}");
}

#[test]
fn programs_read_denials_as_json_on_stderr() {
    let host = Host::new();
    let (_, ended) = host.dial(&["--output", "json"], &CALLS);
    let lines: Vec<Value> = ended.stderr.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let types: Vec<&str> = lines.iter().map(|line| line["type"].as_str().unwrap()).collect();
    assert_eq!(types, ["connection", "connection", "connection", "connection", "summary"]);
    let destinations = lines[4]["destinations"].as_array().unwrap();
    assert_eq!(destinations.len(), 3);
    assert_eq!((&destinations[0]["address"], &destinations[0]["count"]), (&"192.0.2.1".into(), &2.into()));
    assert_eq!(lines[4]["to_allow"].as_str().unwrap().matches("kind: ServiceEntry").count(), 3);
}

#[test]
fn names_that_a_command_may_not_ask_for_are_told() {
    let host = Host::new();
    let policy = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: p }\nspec: { dns: { queries: Named, \
                  servers: [192.0.2.53] }, allow: [ { to: [ { host: '*.example.com' } ] } ] }\n";
    let policies = host.file("named.yaml", policy);
    let ask = |name: &str| format!("send plain 192.0.2.53:53 {}", hexadecimal(&question(name, 1)));
    let orders = ["evil.net", "a.example.com", "evil.net", "worse.net"].map(ask);
    let orders: Vec<&str> = orders.iter().map(String::as_str).collect();
    let (answers, ended) = host.answers(&["--policies", &policies], ASKER, &orders);
    assert_eq!(answers, ["1", "0", "1", "1"], "{ended:?}");
    for line in [
        "DENY UDP 192.0.2.53:53 reason=dns_query host=worse.net comm=\"asker\"",
        "2 × deny UDP 192.0.2.53:53, asked for evil.net",
        "1 × deny UDP 192.0.2.53:53, asked for worse.net",
    ] {
        assert!(ended.stderr.contains(line), "{line} in {ended:?}");
    }
    assert!(!ended.stderr.contains("to allow it"), "{ended:?}");
}

#[test]
fn beside_a_daemon_both_must_allow() {
    let host = Host::new();
    let [daemons, commands] = ["daemon", "command"].map(|name| {
        let path = host.files.path().join(name);
        fs::create_dir(&path).unwrap();
        path
    });
    fs::write(daemons.join("p.yaml"), format!("{}---\n{}", entry("a", "192.0.2.1"), entry("b", "192.0.2.2"))).unwrap();
    fs::write(commands.join("p.yaml"), format!("{}---\n{}", entry("a", "192.0.2.1"), entry("c", "192.0.2.3"))).unwrap();
    let mut daemon = Agent::start(&daemons, &host.cgroup, &[]).unwrap();
    let (answers, ended) = host.dial(&["--policies", commands.to_str().unwrap()], &[A, B, C, D]);
    assert_eq!(answers, [ALLOWED, REFUSED, REFUSED, REFUSED], "{ended:?}");
    assert!(ended.stderr.contains("DENY TCP 192.0.2.2:80"), "{ended:?}");
    // What the command's own rules refuse, the daemon may not be asked any more; what they allow, it is.
    let mut told = String::new();
    while !told.contains("192.0.2.3") {
        let denial = daemon.denial().unwrap();
        told.push_str(denial["destination"]["address"].as_str().unwrap());
        assert!(
            denial["cgroup"]["path"].as_str().unwrap().starts_with(&format!("{}/egress-exec-", host.cgroup.name()))
        );
    }
    daemon.stop().unwrap();
    host.is_clean();
}

#[test]
fn the_rules_outlive_an_exec_that_is_killed_and_go_with_the_command() {
    let host = Host::new();
    let mut killed = Dialling::start(host.exec(&["--", DIAL]));
    assert_eq!(killed.call(A), REFUSED);
    let (pins, cgroups) = (host.pins(), host.cgroups());
    assert_eq!((pins.len(), cgroups.len()), (1, 1));
    killed.signal(Signal::KILL);
    killed.exec.wait().unwrap();
    assert_eq!(killed.call(A), REFUSED);

    // The next start leaves in force what is in use.
    let ended = host.run(&["--", "true"]);
    assert!(ended.stderr.contains("go on") && ended.code == Some(0), "{ended:?}");
    assert_eq!((host.pins(), host.cgroups()), (pins, cgroups.clone()));
    assert_eq!(killed.call(A), REFUSED);

    drop(killed.calls);
    is_empty(&cgroups[0]);
    let ended = host.run(&["--", "true"]);
    assert!(ended.stderr.contains("removed what an ended command left behind"), "{ended:?}");
    host.is_clean();
}

fn is_empty(cgroup: &Path) {
    let events = || fs::read_to_string(cgroup.join("cgroup.events")).unwrap();
    eventually("an empty cgroup", || events().contains("populated 0").then_some(())).unwrap();
}

/// With the conventional bpf file system, in a mount namespace of its own.
#[test]
fn a_daemon_that_starts_sweeps_too() {
    let host = Host::new();
    let policies = host.file("a.yaml", &entry("a", "192.0.2.1"));
    let script = format!(
        "mount -t bpf bpf /sys/fs/bpf; unset EGRESS_EXEC_PIN_DIR
         \"$AGENT\" exec -- sh -c 'kill -KILL $PPID; sleep 0.1' || true
         while grep -q 'populated 1' {cgroup}/egress-exec-*/cgroup.events; do sleep 0.01; done
         ls /sys/fs/bpf/egress-exec | wc -l
         \"$AGENT\" run --policies {policies} --cgroup {cgroup}/other --detach-on-exit >&2 &
         while [ -n \"$(ls /sys/fs/bpf/egress-exec)\" ]; do sleep 0.01; done
         kill $!; wait $! || true; echo swept",
        cgroup = host.cgroup.path().display()
    );
    let _other = host.cgroup.child("other").unwrap();
    let mut command = host.namespace.command("unshare", Some(&host.cgroup)).unwrap();
    host.place.tell(&mut command);
    command.args(["--mount", "--kill-child", "--fork", "timeout", "20", "sh", "-ec", &script]);
    command.env("AGENT", binary().unwrap());
    let ended = ended(&command.output().unwrap());
    assert_eq!(ended.stdout, "1\nswept\n", "{ended:?}");
}

#[test]
fn processes_that_go_on_stay_behind_the_rules() {
    let host = Host::new();
    let ended = host.run(&["--", "sh", "-c", "sleep 1000 </dev/null >/dev/null 2>&1 & echo $!; exit 3"]);
    assert_eq!(ended.code, Some(3));
    assert!(ended.stderr.contains("1 process(es) of the command go on"), "{ended:?}");
    let (pins, cgroups) = (host.pins(), host.cgroups());
    assert_eq!((pins.len(), cgroups.len()), (1, 1));
    assert!(pins[0].join("set-1/connect4").exists());
    assert!(ended.stderr.contains(cgroups[0].to_str().unwrap()), "{ended:?}");
    let pid: i32 = ended.stdout.trim().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
    is_empty(&cgroups[0]);
    assert_eq!(host.run(&["--", "true"]).code, Some(0));
    host.is_clean();
}

#[test]
fn what_ends_with_the_command_is_not_taken_for_left_behind() {
    let host = Host::new();
    for _ in 0..10 {
        let ended = host.run(&["--", "sh", "-c", "sleep 0.01 & sleep 0.01 & exit 0"]);
        assert!(ended.stderr.is_empty(), "{ended:?}");
        host.is_clean();
    }
}

#[test]
fn a_socket_made_outside_is_not_inherited() {
    let host = Host::new();
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    let inherited = rustix::io::fcntl_dupfd_cloexec(&socket, 90).unwrap();
    rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
    let script = format!("test -e /proc/self/fd/{}", inherited.as_raw_fd());
    // The test itself would pass it on.
    let mut direct = host.namespace.command("sh", None).unwrap();
    assert!(direct.args(["-c", &script]).status().unwrap().success());
    assert_eq!(host.run(&["--", "sh", "-c", &script]).code, Some(1));

    // Only as stdin, stdout or stderr it can be, and that is told.
    let ended = ended(&host.exec(&["--", "true"]).stdin(inherited).output().unwrap());
    assert!(ended.stderr.contains("stdin is a network socket"), "{ended:?}");
}

#[test]
fn two_commands_at_once_have_rules_of_their_own() {
    let host = Host::new();
    let policies = [host.file("a.yaml", &entry("a", "192.0.2.1")), host.file("b.yaml", &entry("b", "192.0.2.2"))];
    let [mut first, mut second] =
        [&policies[0], &policies[1]].map(|policies| Dialling::start(host.exec(&["--policies", policies, "--", DIAL])));
    assert_eq!([first.call(A), first.call(B)], [ALLOWED, REFUSED]);
    assert_eq!([second.call(A), second.call(B)], [REFUSED, ALLOWED]);
    assert_eq!(first.end().code, Some(0));
    assert_eq!([second.call(A), second.call(B)], [REFUSED, ALLOWED]);
    assert_eq!(second.end().code, Some(0));
    host.is_clean();
}

#[test]
fn many_commands_that_start_at_once_do_not_sweep_each_other() {
    let host = Host::new();
    let all: Vec<Child> = (0..12).map(|_| host.exec(&["--", "true"]).spawn().unwrap()).collect();
    for child in all {
        let ended = ended(&child.wait_with_output().unwrap());
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    }
    host.is_clean();
}

#[test]
fn a_start_waits_while_another_makes_or_sweeps() {
    let host = Host::new();
    let turn = PinDirectory::claim(&host.place.exec_pins()).unwrap();
    let mut waiting = host.exec(&["--", "true"]).spawn().unwrap();
    sleep(Duration::from_millis(500));
    assert!(waiting.try_wait().unwrap().is_none());
    host.is_clean();
    drop(turn);
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
    host.is_clean();
}

/// A service manager hands cgroups over to users, who may then move their processes about below it.
#[test]
fn a_user_who_owns_the_cgroup_around_cannot_leave() {
    let host = Host::new();
    let theirs = host.cgroup.child("theirs").unwrap();
    for file in [theirs.path().to_owned(), theirs.procs()] {
        chown(file, Some(65_534), Some(65_534)).unwrap();
    }
    let script = format!("echo $$ > {}; cat /proc/self/cgroup", theirs.procs().display());
    let leave = ["--", "sh", "-c", &script];
    let ended = ended(&host.exec_from(&theirs, &[&["--user", "65534"], &leave[..]].concat()).output().unwrap());
    assert!(ended.stdout.contains(&format!("0::{}/egress-exec-", host.cgroup.name())), "{ended:?}");
    assert!(ended.stderr.contains("may move processes there"), "{ended:?}");
    drop(theirs);
    host.is_clean();
}

#[test]
fn where_no_cgroup_can_be_made_the_next_one_above_is_taken_and_that_is_told() {
    let host = Host::new();
    let domain = host.cgroup.child("domain").unwrap();
    let threads = domain.child("threads").unwrap();
    threads.make_threaded().unwrap();
    let ended = ended(&host.exec_from(&domain, &["--", "cat", "/proc/self/cgroup"]).output().unwrap());
    assert!(ended.stdout.contains(&format!("0::{}/egress-exec-", host.cgroup.name())), "{ended:?}");
    assert!(ended.stderr.contains("what filters here does not judge it"), "{ended:?}");
    drop(domain);
    host.is_clean();
}
