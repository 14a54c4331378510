//! What `run` says, and the status it ends with, where it cannot start; and what it tells those who wait for it.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt, net::UnixDatagram, process::CommandExt},
    path::Path,
    process::Command,
};

use egress_tests::{
    PATIENCE,
    agent::{self, Agent, binary},
    bpffs::Bpffs,
    cgroup::Cgroup,
};
use tempfile::TempDir;

/// A policy directory with one file.
fn policies(text: &str) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("policy.yaml"), text).unwrap();
    directory
}

fn run_command(policies: &Path, cgroup: &Path) -> Command {
    agent::run_command(policies, cgroup, &[]).unwrap()
}

/// The exit status and the log of a command that ends by itself.
fn outcome(command: Command) -> (Option<i32>, String) {
    let mut agent = Agent::spawn(command).unwrap();
    let status = agent.exit_status().unwrap();
    let (_, log) = agent.rest().unwrap();
    (status.code(), log.join("\n"))
}

/// A command that ends with `code` after a log that has exactly one ERROR line, which holds all of `words`.
fn ends(command: Command, code: i32, words: &[&str]) {
    let (status, log) = outcome(command);
    assert_eq!(status, Some(code), "{log}");
    let errors: Vec<&str> = log.lines().filter(|line| line.contains("ERROR")).collect();
    let last = errors.last().unwrap_or(&"");
    assert!(words.iter().all(|word| errors.iter().any(|line| line.contains(word))), "{words:?} in\n{log}");
    assert!(!last.contains("panicked"), "{log}");
}

/// An invalid policy, with what must be said of it.
fn is_invalid(text: &str, words: &[&str]) {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(text));
    ends(run_command(policies.path(), cgroup.path()), 1, &[words, &["policy.yaml"]].concat());
}

const ENTRY: &str = "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: { name: a }
spec:
  hosts: [a.example.com]
  addresses: [192.0.2.1]
  ports: [{ number: 80, name: http }]
";

#[test]
fn invalid_yaml_names_file_and_line() {
    is_invalid("kind: [\n", &["line="]);
}

#[test]
fn a_version_that_does_not_exist_is_an_error() {
    is_invalid(&ENTRY.replace("io/v1", "io/v7"), &["v7", "line=1"]);
}

#[test]
fn a_kind_that_does_not_exist_is_an_error() {
    is_invalid(&ENTRY.replace("ServiceEntry", "ServiceEntri"), &["ServiceEntri", "line=2"]);
}

#[test]
fn a_field_that_does_not_exist_is_an_error() {
    is_invalid(&ENTRY.replace("addresses", "adresses"), &["adresses", "line=6", "spec"]);
}

#[test]
fn port_0_is_an_error() {
    is_invalid(&ENTRY.replace("80", "0"), &["spec.ports[0].number", "line=7"]);
}

#[test]
fn two_documents_of_one_name_are_an_error() {
    is_invalid(&format!("{ENTRY}---\n{ENTRY}"), &["default/a"]);
}

#[test]
fn a_field_that_is_not_built_yet_is_refused() {
    let policy = "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: { name: p }\n\
                  spec: { workloads: [{ pod: { matchLabels: { app: web } } }] }\n";
    is_invalid(policy, &["spec.workloads", "pod"]);
}

#[test]
fn documents_of_other_kinds_are_skipped_with_a_note() {
    let (cgroup, policies) =
        (Cgroup::new().unwrap(), policies("apiVersion: v1\nkind: Service\nmetadata: { name: s }\n"));
    let mut agent = Agent::start(policies.path(), &cgroup, &[]).unwrap();
    assert!(agent.log().iter().any(|line| line.contains("INFO") && line.contains("Service")), "{:#?}", agent.log());
}

#[test]
fn a_policy_path_that_is_not_there_is_an_error() {
    let cgroup = Cgroup::new().unwrap();
    ends(run_command(Path::new("/nonexistent/policies"), cgroup.path()), 1, &["/nonexistent/policies"]);
}

#[test]
fn a_policy_file_that_others_may_write_is_refused_unless_allowed() {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    let file = policies.path().join("policy.yaml");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    ends(run_command(policies.path(), cgroup.path()), 1, &["others than root", "policy.yaml"]);
    Agent::start(policies.path(), &cgroup, &["--allow-writable-policies"]).unwrap();
}

#[test]
fn something_that_is_not_a_file_does_not_block_the_start() {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    let pipe = policies.path().join("pipe.yaml");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    ends(run_command(policies.path(), cgroup.path()), 1, &["pipe.yaml"]);
}

#[test]
fn a_pipe_does_not_block_the_start_even_if_it_is_named() {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    let pipe = policies.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    ends(run_command(&pipe, cgroup.path()), 1, &["pipe"]);
}

#[test]
fn a_policy_that_would_not_fit_memory_is_refused_with_numbers() {
    use std::fmt::Write;
    let mut text = String::new();
    // Many ports open everywhere, and as many addresses that have one more each: every address needs all of the ranges.
    for index in 0..3_000_u32 {
        let low = format!("10.1.{}.{}", index >> 8, index & 255);
        for (name, address, port) in [("all", "10.0.0.0/8", index * 2 + 1), ("one", &low, 60_000)] {
            let _ = write!(
                text,
                "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}{index}}}\nspec: \
                 {{hosts: [{name}{index}.example.com], addresses: [{address}], ports: [{{number: {port}, name: p}}]}}\n"
            );
        }
    }
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(&text));
    let (status, log) = outcome(run_command(policies.path(), cgroup.path()));
    assert_eq!(status, Some(1));
    assert!(log.contains("overlap") && log.contains("merge"), "{log}");
}

#[test]
fn a_cgroup_that_is_not_there_is_a_usage_error() {
    let policies = policies(ENTRY);
    ends(run_command(policies.path(), Path::new("/no/such/cgroup")), 2, &["/no/such/cgroup"]);
    ends(run_command(policies.path(), policies.path()), 2, &["not a cgroup"]);
    let (status, _) = outcome({
        let mut command = Command::new(binary().unwrap());
        command.args(["run", "--policies", "x"]);
        command
    });
    assert_eq!(status, Some(2));
}

#[test]
fn a_kernel_that_is_too_old_is_refused_by_its_release() {
    /// Of `linux/personality.h`: `uname` tells of Linux 2.6.
    const UNAME26: libc::c_ulong = 0x0002_0000;
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    let mut command = run_command(policies.path(), cgroup.path());
    // SAFETY: between fork and exec the closure makes one system call; it neither allocates nor locks.
    unsafe {
        command.pre_exec(|| if libc::personality(UNAME26) < 0 { Err(io::Error::last_os_error()) } else { Ok(()) });
    }
    ends(command, 4, &["kernel 2.6.", "too old", "need Linux 5.10"]);
}

#[test]
fn without_privilege_the_start_says_what_is_needed() {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    // The binary may stand where others cannot reach it.
    let reachable = tempfile::tempdir().unwrap();
    fs::set_permissions(reachable.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(policies.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = reachable.path().join("egress-agent");
    fs::copy(binary().unwrap(), &copy).unwrap();
    let mut command = Command::new(copy);
    command.arg("run").arg("--policies").arg(policies.path()).arg("--cgroup").arg(cgroup.path());
    command.uid(65_534).gid(65_534);
    ends(command, 4, &["root", "CAP_BPF"]);
}

/// Runs the agent in a mount namespace of its own, after a preparation there.
fn after(preparation: &str, policies: &Path, cgroup: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-ec"]).arg(format!("{preparation}; exec \"$@\"")).arg("sh");
    let agent = run_command(policies, cgroup);
    command.arg(agent.get_program()).args(agent.get_args());
    command
}

#[test]
fn without_cgroup2_the_start_says_how_to_mount_it() {
    let policies = policies(ENTRY);
    let mount = egress_agent::cgroup::mount_point().unwrap();
    let command = after(&format!("umount -l {}", mount.display()), policies.path(), Path::new("any"));
    ends(command, 4, &["cgroup2", "mount -t cgroup2"]);
}

#[test]
fn type_information_of_the_kernel_is_not_needed() {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    let command = after("mount -t tmpfs none /sys/kernel/btf", policies.path(), cgroup.path());
    let mut agent = Agent::spawn(command).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    agent.stop().unwrap();
}

#[test]
fn the_service_manager_hears_ready_reloading_and_the_generation() {
    let (cgroup, policies) = (Cgroup::new().unwrap(), policies(ENTRY));
    let address = policies.path().join("notify");
    let socket = UnixDatagram::bind(&address).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut command = run_command(policies.path(), cgroup.path());
    command.env("NOTIFY_SOCKET", &address).env("WATCHDOG_USEC", "50000");
    let mut agent = Agent::spawn(command).unwrap();
    let heard = || {
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let first = heard();
    assert!(first.contains("READY=1") && first.contains("STATUS=generation 1"), "{first}");
    while heard() != "WATCHDOG=1\n" {}
    agent.wait_for("policy applied generation=1 ").unwrap();
    fs::write(policies.path().join("policy.yaml"), ENTRY.replace("80", "81")).unwrap();
    while !heard().contains("RELOADING=1\nMONOTONIC_USEC=") {}
    let mut last = heard();
    while last == "WATCHDOG=1\n" {
        last = heard();
    }
    assert!(last.contains("READY=1") && last.contains("STATUS=generation 2"), "{last}");
    agent.stop().unwrap();
}

#[test]
fn a_pin_directory_is_private_and_on_a_bpf_file_system() {
    let (cgroup, policies, bpffs) = (Cgroup::new().unwrap(), policies(ENTRY), Bpffs::new().unwrap());
    let pins = bpffs.path().join("egress");
    let option = pins.to_str().unwrap();
    fs::create_dir(&pins).unwrap();

    // Whoever could open the directory could lock it, and keep the agent from starting.
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o755)).unwrap();
    let mut open = run_command(policies.path(), cgroup.path());
    open.args(["--pin-dir", option]);
    ends(open, 4, &["chmod 700", option]);

    let mut elsewhere = run_command(policies.path(), cgroup.path());
    elsewhere.arg("--pin-dir").arg(policies.path());
    ends(elsewhere, 4, &["bpf file system"]);
}
