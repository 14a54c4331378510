//! Under systemd: whom a policy selects by unit, the agent beside filters that systemd attaches, and the agent as a service.
//!
//! The first process must be systemd, so these run in a machine of `cargo xtask vm` and nowhere else. The agent runs as
//! `deploy/systemd/egress-agent.service` says. It filters a slice of the test's own; services in it dial, in a network
//! namespace where every address is local.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    env,
    fs::{self, File},
    io::Write,
    net::SocketAddr,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        RwLock,
        atomic::{AtomicBool, Ordering},
        mpsc::Receiver,
    },
    thread,
};

use egress_agent::cgroup::mount_point;
use egress_tests::{
    PATIENCE,
    agent::{binary, lines},
    bpf_is_a_security_module,
    dial::{Call, Method},
    eventually, kernel_is_before,
    netns::Netns,
    program, unique_name,
};
use rustix::{
    fs::{CWD, FileType, Mode, mknodat},
    io::Errno,
};
use serde_json::Value;
use tempfile::TempDir;

const OPENED: &str = "192.0.2.1:80";
/// What no policy of these tests names.
const NEVER: &str = "198.51.100.1:80";
/// As a call ends that is refused by the agent, and by systemd's address filter.
const REFUSED: Errno = Errno::PERM;

/// Where unit files are read that nobody installed.
const UNITS: &str = "/run/systemd/system";

/// Held for writing while systemd is not there to be asked.
static SYSTEMD: RwLock<()> = RwLock::new(());

/// Has systemd execute itself anew, as its upgrade does.
fn reexec() {
    let _gone = SYSTEMD.write();
    let systemctl = |verb| Command::new("systemctl").arg(verb).output().unwrap().status.success();
    assert!(systemctl("daemon-reexec"));
    eventually("systemd", || systemctl("list-jobs").then_some(())).unwrap();
}

/// Runs `systemctl`, which must succeed; what it prints.
fn systemctl(args: &[&str]) -> String {
    let output = try_systemctl(args);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "systemctl {} failed: {said}", args.join(" "));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn try_systemctl(args: &[&str]) -> Output {
    let _there = SYSTEMD.read();
    Command::new("systemctl").args(args).output().unwrap()
}

/// Whether systemd can carry out settings by programs that it loads through libbpf.
fn has_bpf_framework() -> bool {
    systemctl(&["--version"]).contains("+BPF_FRAMEWORK")
}

/// A unit that systemd knows by a file, stopped and forgotten when dropped.
struct Unit {
    name: String,
}

impl Unit {
    /// Of a name that systemd has not heard of yet, or it would have to be told.
    fn new(name: String, text: &str) -> Self {
        let unit = Self { name };
        fs::create_dir_all(UNITS).unwrap();
        fs::write(unit.file(), text).unwrap();
        unit
    }

    /// An instance has the file of its template.
    fn file(&self) -> PathBuf {
        let template = self.name.split_once('@').map(|(template, _)| format!("{template}@.service"));
        Path::new(UNITS).join(template.as_ref().unwrap_or(&self.name))
    }

    /// Adds settings to those it has.
    fn add(&self, settings: &str) {
        let directory = Path::new(UNITS).join(format!("{}.d", self.name));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("more.conf"), settings).unwrap();
        systemctl(&["daemon-reload"]);
    }

    fn start(&self) {
        systemctl(&["start", &self.name]);
    }

    fn stop(&self) {
        systemctl(&["stop", &self.name]);
    }

    fn restart(&self) {
        systemctl(&["restart", &self.name]);
    }

    /// A property of it, as `systemctl show` tells it.
    fn show(&self, property: &str) -> String {
        systemctl(&["show", "--value", "--property", property, &self.name])
    }

    fn becomes(&self, property: &str, expected: &str) {
        let told = eventually(expected, || (self.show(property) == expected).then_some(()));
        told.unwrap_or_else(|error| panic!("{property} of {} is {}: {error}", self.name, self.show(property)));
    }

    /// Its cgroup's directory.
    fn cgroup(&self) -> PathBuf {
        mount_point().unwrap().join(self.show("ControlGroup").trim_start_matches('/'))
    }

    fn cgroup_id(&self) -> u64 {
        fs::metadata(self.cgroup()).unwrap().ino()
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        // What is left goes with the machine.
        let _ = try_systemctl(&["kill", "--signal", "KILL", &self.name]);
        let _ = try_systemctl(&["stop", &self.name]);
        let _ = fs::remove_file(self.file());
    }
}

/// A service whose process makes the calls that it is told. They can be told before it starts: then it makes them at once.
struct Service {
    unit: Unit,
    calls: File,
    answers: Receiver<String>,
}

impl Service {
    fn tell(&mut self, calls: &[Call]) {
        for call in calls {
            writeln!(self.calls, "{call}").unwrap();
        }
    }

    /// How the next call that was told ended.
    fn answer(&self) -> Result<(), Errno> {
        let line = self.answers.recv_timeout(PATIENCE);
        let line = line.unwrap_or_else(|error| panic!("{} answers nothing: {error}", self.unit.name));
        match line.parse().unwrap() {
            0 => Ok(()),
            errno => Err(Errno::from_raw_os_error(errno)),
        }
    }

    fn call(&mut self, call: Call) -> Result<(), Errno> {
        self.tell(&[call]);
        self.answer()
    }

    fn send(&mut self, to: &str) -> Result<(), Errno> {
        self.call(send(to))
    }

    fn connect(&mut self, to: &str) -> Result<(), Errno> {
        match self.call(connect(to)) {
            // Nobody listens: the filter let it pass.
            Err(Errno::CONNREFUSED) => Ok(()),
            other => other,
        }
    }

    /// Waits until it is no longer unknown.
    fn reaches(&mut self, to: &str) {
        eventually(to, || self.send(to).is_ok().then_some(())).unwrap();
    }

    /// Whether it is filtered as [`policy`] says.
    fn is_filtered(&mut self) -> bool {
        let outcomes = [self.send(OPENED), self.connect(OPENED), self.send(NEVER), self.connect(NEVER)];
        match outcomes {
            [Ok(()), Ok(()), Err(REFUSED), Err(REFUSED)] => true,
            [Ok(()), Ok(()), Ok(()), Ok(())] => false,
            other => panic!("{}: {other:?}", self.unit.name),
        }
    }
}

fn send(to: &str) -> Call {
    call(Method::UdpSend, to)
}

fn connect(to: &str) -> Call {
    call(Method::TcpConnect, to)
}

fn call(method: Method, to: &str) -> Call {
    Call { method, mapped: false, to: to.parse::<SocketAddr>().unwrap() }
}

/// A policy that opens [`OPENED`] for those whom `workloads` selects.
fn policy(workloads: &str) -> String {
    format!(
        "apiVersion: egress.filter/v1alpha1\nkind: EgressPolicy\nmetadata: {{ name: p }}\nspec: {{ workloads: [{workloads}], \
         services: [], allow: [{{ to: [{{ cidr: 192.0.2.1/32 }}] }}] }}\n"
    )
}

/// A slice, and an agent that filters it.
struct World {
    agent: Unit,
    slice: Unit,
    namespace: Netns,
    directory: TempDir,
    id: String,
}

impl World {
    /// With an agent that runs. `policy` is made of the name of a unit as [`Self::unit`] makes it.
    fn new(policy: impl FnOnce(&Self) -> String) -> Self {
        let world = Self::without_agent();
        world.write(&policy(&world));
        world.agent.start();
        world
    }

    fn without_agent() -> Self {
        let is_in_machine = env::var_os("EGRESS_MACHINE").is_some();
        assert!(is_in_machine, "these tests reach into every unit of the system: cargo xtask vm --test systemd");
        assert_eq!(fs::read_to_string("/proc/1/comm").unwrap().trim(), "systemd");
        // A dash in a slice's name puts it into another.
        let id = unique_name().replace('-', "_");
        let slice = Unit::new(format!("{id}.slice"), "[Slice]\n");
        slice.start();
        // The agent has a /tmp of its own.
        let directory = tempfile::tempdir_in("/run").unwrap();
        fs::create_dir(directory.path().join("policies")).unwrap();
        let shipped = include_str!("../../deploy/systemd/egress-agent.service");
        let shipped = shipped.replace("/usr/bin/egress-agent", binary().unwrap().to_str().unwrap());
        let agent = Unit::new(format!("{id}_agent.service"), &shipped);
        let world = Self { agent, slice, namespace: Netns::with_every_address_local().unwrap(), directory, id };
        world.tell_agent(&world.slice.cgroup(), "");
        world
    }

    /// Has the agent filter a cgroup, with more settings of the service.
    fn tell_agent(&self, cgroup: &Path, more: &str) {
        let mut variables = self.variables();
        variables.push(("EGRESS_POLICIES", self.directory.path().join("policies").display().to_string()));
        variables.push(("EGRESS_CGROUP", cgroup.display().to_string()));
        variables.push(("EGRESS_DEFAULT", "Allow".to_owned()));
        let lines: Vec<String> =
            variables.into_iter().map(|(name, value)| format!("Environment={name}={value}\n")).collect();
        let variables = lines.concat();
        let directory = self.directory.path().display();
        self.agent.add(&format!(
            "[Service]\n{variables}StandardOutput=append:{directory}/denials\nStandardError=append:{directory}/log\n\
             RuntimeDirectory={}\n{more}",
            self.id
        ));
    }

    /// What leads every command of the agent to this one.
    fn variables(&self) -> Vec<(&'static str, String)> {
        vec![
            ("EGRESS_PIN_DIR", format!("/sys/fs/bpf/{}", self.id)),
            ("EGRESS_RUN_DIR", format!("/run/{}", self.id)),
            ("EGRESS_RESOLVER", "127.0.0.1:1".to_owned()),
        ]
    }

    /// Runs a command of the agent.
    fn egress_agent(&self, args: &[&str]) -> Output {
        Command::new(binary().unwrap()).args(args).envs(self.variables()).output().unwrap()
    }

    fn write(&self, policy: &str) {
        let new = self.directory.path().join("new");
        fs::write(&new, policy).unwrap();
        fs::rename(new, self.directory.path().join("policies/policy.yaml")).unwrap();
    }

    /// The name of a service of this world.
    fn unit(&self, name: &str) -> String {
        format!("{}_{name}.service", self.id)
    }

    /// A service in the slice, not started yet.
    fn service(&self, name: &str, settings: &str) -> Service {
        self.service_in(&self.unit(name), &format!("Slice={}\n{settings}", self.slice.name))
    }

    /// A service by its whole name.
    fn service_in(&self, name: &str, settings: &str) -> Service {
        let fifo = |what: &str| {
            let path = self.directory.path().join(format!("{name}.{what}"));
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
            // Open both ways, it has always a reader and a writer, whoever starts and stops.
            File::options().read(true).write(true).open(&path).unwrap()
        };
        let (calls, answers) = (fifo("calls"), fifo("answers"));
        // Instances of a template share this text.
        let text = format!(
            "[Unit]\nStartLimitIntervalSec=0\n[Service]\nType=exec\nNetworkNamespacePath=/run/netns/{}\nExecStart={}\n\
             StandardInput=file:{directory}/%n.calls\nStandardOutput=file:{directory}/%n.answers\n{settings}\n",
            self.namespace.name(),
            program("dial").unwrap().display(),
            directory = self.directory.path().display(),
        );
        Service { unit: Unit::new(name.to_owned(), &text), calls, answers: lines(answers) }
    }

    /// A service in the slice that runs.
    fn started(&self, name: &str, settings: &str) -> Service {
        let service = self.service(name, settings);
        service.unit.start();
        service
    }

    /// Whether a service with these settings binds a socket.
    fn can_bind(&self, settings: &str) -> bool {
        let orders = self.directory.path().join("orders");
        fs::write(&orders, "main serve 127.0.0.1:8080\n").unwrap();
        let text = format!(
            "[Service]\nType=oneshot\nSlice={}\nExecStart={} same\nStandardInput=file:{}\n{settings}\n",
            self.slice.name,
            program("actor").unwrap().display(),
            orders.display()
        );
        let unit = Unit::new(format!("{}.service", unique_name()), &text);
        try_systemctl(&["start", &unit.name]).status.success()
    }

    /// The denials so far.
    fn denials(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.directory.path().join("denials")).unwrap_or_default();
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits for a denial that fits.
    fn denial(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let found = eventually(what, || self.denials().into_iter().find(&fits));
        found.unwrap_or_else(|error| panic!("{error}: {:#?}\n{}", self.denials(), self.log()))
    }

    fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if thread::panicking() {
            let status = try_systemctl(&["status", "--full", "--lines", "20", &self.agent.name]);
            eprintln!("{}\n{}", self.log(), String::from_utf8_lossy(&status.stdout));
        }
        // What is left goes with the machine.
        let _ = try_systemctl(&["stop", &self.agent.name]);
        drop(self.egress_agent(&["detach"]));
    }
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn a_policy_rules_the_service_that_it_selects_and_no_other() {
    let world = World::new(|world| policy(&format!("{{ unit: {} }}", world.unit("web"))));
    let mut web = world.started("web", "");
    let mut other = world.started("other", "");
    web.reaches(OPENED);
    other.reaches(OPENED);
    assert!(web.is_filtered());
    assert!(!other.is_filtered());
    let denial = world.denial("a denial", |denial| denial["reason"] == "no_rule");
    assert_eq!(denial["unit"], web.unit.name.as_str(), "{denial}");
    assert_eq!(denial["cgroup"]["path"], web.unit.show("ControlGroup"), "{denial}");
    assert_eq!(denial["process"]["pid"].to_string(), web.unit.show("MainPID"), "{denial}");
}

/// Calls that a service finds when it starts.
const AT_ONCE: usize = 50;

/// Starts a service anew, which dials at once, and tells how many of its calls to [`OPENED`] were refused before one was
/// not; those to [`NEVER`] all are.
fn refused_at_first(service: &mut Service) -> usize {
    let before = service.unit.cgroup_id();
    service.unit.stop();
    service.tell(&[send(NEVER), connect(NEVER), send(OPENED)].repeat(AT_ONCE));
    service.unit.start();
    assert_ne!(service.unit.cgroup_id(), before, "systemd made no new cgroup");
    let opened: Vec<bool> = (0..AT_ONCE)
        .map(|round| {
            assert_eq!([service.answer(), service.answer()], [Err(REFUSED); 2], "in round {round}");
            service.answer().is_ok()
        })
        .collect();
    let refused = opened.iter().take_while(|&&is_open| !is_open).count();
    assert!(opened[refused..].iter().all(|&is_open| is_open), "{opened:?}");
    refused
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn a_service_that_starts_again_is_filtered_from_its_first_call() {
    let world = World::new(|world| policy(&format!("{{ unit: {} }}", world.unit("web"))));
    let mut web = world.started("web", "");
    web.reaches(OPENED);
    let refused: Vec<usize> = (0..5).map(|_| refused_at_first(&mut web)).collect();
    println!("calls refused before the unit was placed: {refused:?} of {AT_ONCE}");
    web.reaches(OPENED);
    // With nobody there to place it, it stays unknown.
    world.agent.stop();
    assert_eq!(refused_at_first(&mut web), AT_ONCE);
    world.agent.start();
    assert!(web.is_filtered());
    world.denial("an unknown workload", |denial| {
        denial["reason"] == "unknown_workload" && denial["unit"] == web.unit.name
    });
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn in_a_slice_that_a_policy_selects_no_service_is_ever_unknown() {
    let world = World::new(|world| policy(&format!("{{ unit: {} }}", world.slice.name)));
    let mut web = world.started("web", "");
    assert!(web.is_filtered());
    for _ in 0..3 {
        assert_eq!(refused_at_first(&mut web), 0);
    }
    world.agent.stop();
    assert_eq!(refused_at_first(&mut web), 0);
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn instances_of_a_template_are_selected_one_by_one_by_pattern_or_by_their_slice() {
    let world = World::without_agent();
    let web = |instance: &str| format!("{}_web@{instance}.service", world.id);
    // Where systemd puts instances if nobody says otherwise.
    let slice = format!("system-{}_web.slice", world.id);
    world.tell_agent(&mount_point().unwrap().join("system.slice"), "");
    world.write(&policy(&format!("{{ unit: '{}' }}", web("1"))));
    world.agent.start();
    let [mut one, mut two] = ["1", "2"].map(|instance| world.service_in(&web(instance), ""));
    for service in [&mut one, &mut two] {
        service.unit.start();
        service.reaches(OPENED);
        assert!(service.unit.show("ControlGroup").starts_with(&format!("/system.slice/{slice}/")));
    }
    assert_eq!([one.is_filtered(), two.is_filtered()], [true, false]);
    for selector in [web("*"), slice] {
        world.write(&policy("{ unit: no-such.service }"));
        systemctl(&["reload", &world.agent.name]);
        assert_eq!([one.is_filtered(), two.is_filtered()], [false, false]);
        world.write(&policy(&format!("{{ unit: '{selector}' }}")));
        systemctl(&["reload", &world.agent.name]);
        assert_eq!([one.is_filtered(), two.is_filtered()], [true, true], "{selector}");
    }
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn a_users_slice_is_selected_with_its_sessions() {
    let world = World::without_agent();
    systemctl(&["start", "user.slice"]);
    world.tell_agent(&mount_point().unwrap().join("user.slice"), "");
    world.write(&policy("{ unit: user-4700.slice }"));
    world.agent.start();
    let mut other = world.service_in(&world.unit("other"), "Slice=user-4701.slice");
    other.unit.start();
    other.reaches(OPENED);
    assert!(!other.is_filtered());
    let mut user = world.service_in(&world.unit("user"), "Slice=user-4700.slice");
    user.unit.start();
    user.reaches(OPENED);
    assert!(user.is_filtered());
    // A session, as a login makes it.
    let mut session = world.namespace.command("systemd-run", None).unwrap();
    session.args(["--quiet", "--scope", "--slice=user-4700.slice", "--unit", &format!("{}_session.scope", world.id)]);
    session.arg(program("dial").unwrap()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let _there = SYSTEMD.read();
    let mut session = session.spawn().unwrap();
    session.stdin.take().unwrap().write_all(format!("{}\n{}\n", send(NEVER), send(OPENED)).as_bytes()).unwrap();
    let output = session.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "1\n0\n");
}

/// What systemd's own filter opens beside [`OPENED`]: the agent refuses it, as it does [`NEVER`].
const OPENED_BY_SYSTEMD: &str = "192.0.2.2:80";
/// What the policy opens, and systemd's filter does not.
const OPENED_BY_AGENT: &str = "192.0.2.3:80";
const ADDRESS_FILTER: [&str; 2] = ["IPAddressDeny=any", "IPAddressAllow=192.0.2.1 192.0.2.2"];

fn both_must_allow(world: &World, service: &mut Service) {
    let before = world.denials().len();
    assert_eq!([service.send(OPENED), service.connect(OPENED)], [Ok(()); 2], "both allow");
    assert_eq!(service.send(OPENED_BY_AGENT), Err(REFUSED), "systemd refuses");
    assert_eq!([service.send(OPENED_BY_SYSTEMD), service.connect(OPENED_BY_SYSTEMD)], [Err(REFUSED); 2]);
    // The agent reports what it refuses itself, and nothing else.
    eventually("two denials", || (world.denials().len() >= before + 2).then_some(())).unwrap();
    for denial in &world.denials()[before..] {
        assert_eq!(denial["destination"]["address"], "192.0.2.2", "{denial}");
    }
}

fn two_policies(workloads: &str) -> String {
    policy(workloads).replace("192.0.2.1/32 }", "192.0.2.1/32 }, { cidr: 192.0.2.3/32 }")
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn beside_systemds_address_filter_both_must_allow_whoever_came_first() {
    let world = World::without_agent();
    world.write(&two_policies(&format!("{{ unit: {} }}", world.slice.name)));
    let mut web = world.started("web", &ADDRESS_FILTER.join("\n"));
    assert_eq!([web.send(OPENED), web.send(OPENED_BY_SYSTEMD)], [Ok(()); 2]);
    assert_eq!(web.send(OPENED_BY_AGENT), Err(REFUSED));
    // After systemd's filter.
    world.agent.start();
    both_must_allow(&world, &mut web);
    // Before it.
    web.unit.restart();
    both_must_allow(&world, &mut web);
    systemctl(&["daemon-reload"]);
    both_must_allow(&world, &mut web);
    reexec();
    both_must_allow(&world, &mut web);
    world.agent.restart();
    both_must_allow(&world, &mut web);

    world.agent.stop();
    let detached = world.egress_agent(&["detach"]);
    assert!(detached.status.success(), "{detached:?}");
    assert_eq!([web.send(OPENED), web.send(OPENED_BY_SYSTEMD)], [Ok(()); 2]);
    assert_eq!(web.send(OPENED_BY_AGENT), Err(REFUSED), "systemd's filter is there");
}

/// systemd attaches a slice's filter as one of several.
#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn a_slice_may_have_systemds_address_filter_and_the_agent() {
    let world = World::without_agent();
    world.slice.add(&format!("[Slice]\n{}\n", ADDRESS_FILTER.join("\n")));
    world.write(&two_policies(&format!("{{ unit: {} }}", world.slice.name)));
    let mut web = world.started("web", "");
    assert_eq!(web.send(OPENED_BY_AGENT), Err(REFUSED));
    world.agent.start();
    both_must_allow(&world, &mut web);
    systemctl(&["daemon-reload"]);
    web.unit.restart();
    both_must_allow(&world, &mut web);
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn the_agent_may_filter_the_very_cgroup_of_a_service_that_has_systemds_address_filter() {
    let world = World::without_agent();
    world.write(&two_policies(&format!("{{ unit: {} }}", world.unit("web"))));
    let mut web = world.started("web", "");
    world.tell_agent(&web.unit.cgroup(), "");
    world.agent.start();
    systemctl(&[&["set-property", "--runtime", &web.unit.name][..], &ADDRESS_FILTER].concat());
    both_must_allow(&world, &mut web);
    // Both come anew to the new cgroup, systemd first.
    web.unit.restart();
    eventually("the agent", || world.log().contains("attached again").then_some(())).unwrap();
    both_must_allow(&world, &mut web);
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn beside_systemds_other_network_settings_both_must_allow() {
    let world = World::new(|world| policy(&format!("{{ unit: {} }}", world.slice.name)));
    let mut no_ipv6 = world.started("no_ipv6", "RestrictAddressFamilies=AF_INET");
    assert!(no_ipv6.is_filtered());
    assert_eq!(no_ipv6.send("[2001:db8::1]:80"), Err(Errno::AFNOSUPPORT));

    // Carried out by programs of systemd's own, on the cgroup of the service.
    let refused = if has_bpf_framework() { Err(REFUSED) } else { Ok(()) };
    let mut no_interface = world.service("no_interface", "RestrictNetworkInterfaces=~lo");
    no_interface.unit.start();
    for _ in 0..2 {
        assert_eq!(no_interface.send(OPENED), refused, "systemd, if it can");
        assert_eq!([no_interface.send(NEVER), no_interface.connect(NEVER)], [Err(REFUSED); 2]);
        no_interface.unit.restart();
    }
    let mut no_bind = world.started("no_bind", "SocketBindDeny=any");
    assert!(no_bind.is_filtered());
    assert_eq!(world.can_bind("SocketBindDeny=any"), !has_bpf_framework());
    assert!(world.can_bind(""));
    world.agent.restart();
    assert!(no_bind.is_filtered() && no_ipv6.is_filtered());
    assert_eq!(no_interface.send(OPENED), refused);
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn the_service_is_started_when_the_policy_is_in_force() {
    let world = World::without_agent();
    world.write(&policy(&format!("{{ unit: {} }}", world.slice.name)));
    let mut web = world.started("web", "");
    assert!(!web.is_filtered());
    world.agent.start();
    assert!(web.is_filtered());
    assert_eq!(world.agent.show("StatusText"), "generation 1");
    let status = world.egress_agent(&["status"]);
    let is_degraded = kernel_is_before(6, 1);
    assert_eq!(status.status.code(), Some(i32::from(is_degraded)), "{status:?}");
    // Of a program that few kernels take, nothing is said where it is not taken.
    let has_lsm = String::from_utf8_lossy(&status.stdout).contains("socket_create");
    assert_eq!(has_lsm, bpf_is_a_security_module(), "{status:?}");
    // The unit leaves it what it needs. Older kernels refuse a program, which is warned of.
    let log = world.log();
    assert!(!log.contains("ERROR") && (is_degraded || !log.contains("WARN")), "{log}");
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn as_a_package_installs_it_the_service_refuses_nothing_and_reports_what_it_would() {
    let world = World::without_agent();
    let settings = include_str!("../../deploy/debian/agent.yaml");
    let policies = world.directory.path().join("policies");
    let settings = settings.replace("/etc/egress/policies", policies.to_str().unwrap());
    let file = world.directory.path().join("agent.yaml");
    fs::write(&file, settings).unwrap();
    fs::write(policies.join("README"), include_str!("../../deploy/debian/policies/README")).unwrap();
    // Stronger than the file, they would hide what it says.
    let unset = "UnsetEnvironment=EGRESS_POLICIES EGRESS_CGROUP EGRESS_DEFAULT";
    world.tell_agent(Path::new("/"), &format!("{unset}\nEnvironment=EGRESS_CONFIG={}\n", file.display()));
    world.agent.start();
    let mut web = world.started("web", "");
    assert!(!web.is_filtered());
    let denial = world.denial("a report", |denial| denial["unit"] == web.unit.name.as_str());
    assert_eq!((&denial["verdict"], &denial["reason"]), (&"would_deny".into(), &"no_rule".into()));
    let mode = fs::metadata(format!("/sys/fs/bpf/{}", world.id)).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "{mode:o}");
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn systemctl_reload_returns_when_the_new_policy_is_in_force_and_fails_if_it_is_invalid() {
    let world = World::new(|world| policy(&format!("{{ unit: {} }}", world.slice.name)));
    let mut web = world.started("web", "");
    assert!(web.is_filtered());
    for (generation, opened) in [(2, "192.0.2.2"), (3, "192.0.2.1")] {
        world.write(&policy(&format!("{{ unit: {} }}", world.slice.name)).replace("192.0.2.1", opened));
        systemctl(&["reload", &world.agent.name]);
        assert_eq!(web.send(OPENED).is_ok(), opened == "192.0.2.1");
        world.agent.becomes("StatusText", &format!("generation {generation}"));
        world.agent.becomes("ActiveState", "active");
    }
    world.write("kind: EgressPolicy\n");
    assert!(!try_systemctl(&["reload", &world.agent.name]).status.success());
    assert!(web.is_filtered());
    let told = eventually("the error", || Some(world.agent.show("StatusText")).filter(|text| text.contains("invalid")));
    assert!(told.unwrap().starts_with("generation 3"));
    world.agent.becomes("ActiveState", "active");
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn a_unit_may_reload_by_sighup() {
    let world = World::without_agent();
    world.write(&policy(&format!("{{ unit: {} }}", world.slice.name)));
    world.tell_agent(&world.slice.cgroup(), "ExecReload=\nExecReload=/bin/kill -HUP $MAINPID");
    world.agent.start();
    systemctl(&["reload", &world.agent.name]);
    eventually("another look", || world.log().contains("policy unchanged generation=1").then_some(())).unwrap();
    world.agent.becomes("ActiveState", "active");
    assert_eq!((world.agent.show("NRestarts"), world.agent.show("StatusText")), ("0".into(), "generation 1".into()));
}

/// Dials while something happens, and shows that all calls to [`OPENED`] go through and all to [`NEVER`] are refused.
fn without_a_gap(service: &mut Service, something: impl FnOnce()) {
    let is_over = AtomicBool::new(false);
    let rounds = thread::scope(|threads| {
        let dialling = threads.spawn(|| {
            let mut rounds = 0_u32;
            while !is_over.load(Ordering::Relaxed) {
                assert!(service.is_filtered(), "after {rounds} rounds");
                rounds += 1;
            }
            rounds
        });
        let end = Raised(&is_over);
        something();
        drop(end);
        dialling.join().unwrap()
    });
    println!("{rounds} rounds");
    assert!(rounds > 10, "{rounds}");
}

/// A flag that is raised when this is dropped, also by a test that fails: who waits for it must not wait for ever.
struct Raised<'a>(&'a AtomicBool);

impl Drop for Raised<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn the_service_starts_again_stops_and_is_killed_without_a_gap() {
    let world = World::new(|world| policy(&format!("{{ unit: {} }}", world.unit("web"))));
    let mut web = world.started("web", "");
    web.reaches(OPENED);
    without_a_gap(&mut web, || {
        world.agent.restart();
        world.agent.stop();
        world.agent.start();
        systemctl(&["kill", "--signal", "KILL", &world.agent.name]);
        world.agent.becomes("NRestarts", "1");
        world.agent.becomes("StatusText", "generation 1");
        reexec();
    });
}

/// Runs `dpkg`, which must succeed. What it says is shown if the test fails.
fn dpkg(args: &[&str]) {
    let output = Command::new("dpkg").args(args).env("DEBIAN_FRONTEND", "noninteractive").output().unwrap();
    println!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "dpkg {}", args.join(" "));
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn the_package_is_installed_upgraded_without_a_gap_removed_and_purged() {
    const SERVICE: &str = "egress-agent.service";
    const SETTINGS: &str = "/etc/egress/agent.yaml";
    let world = World::without_agent();
    let mut web = world.started("web", "");
    let is = |verb: &str| try_systemctl(&[verb, "--quiet", SERVICE]).status.success();
    let show = |property: &str| systemctl(&["show", "--value", "--property", property, SERVICE]);
    let installed = || {
        let output = Command::new("dpkg-query").args(["--show", "--showformat=${Version}", "egress-agent"]).output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };

    dpkg(&["--install", "/packages/older.deb"]);
    assert!(is("is-active") && is("is-enabled"));
    assert!(!web.is_filtered(), "as installed it refuses nothing");
    let status = Command::new("/usr/bin/egress-agent").arg("status").output().unwrap();
    assert!(matches!(status.status.code(), Some(0 | 1)), "{status:?}");

    // As an administrator does who takes it into use; elsewhere than by default, so that whoever looks for it must read that.
    systemctl(&["stop", SERVICE]);
    assert!(Command::new("/usr/bin/egress-agent").arg("detach").status().unwrap().success());
    let pins = format!("/sys/fs/bpf/{}", world.id);
    let settings = format!(
        "policies: /etc/egress/policies\ncgroup: {}\ndefault: Allow\npin-dir: {pins}\nresolver: \"127.0.0.1:1\"\n",
        world.slice.cgroup().display()
    );
    fs::write(SETTINGS, &settings).unwrap();
    fs::write("/etc/egress/policies/web.yaml", policy(&format!("{{ unit: {} }}", world.slice.name))).unwrap();
    systemctl(&["start", SERVICE]);
    assert!(web.is_filtered());
    systemctl(&["reload", SERVICE]);

    let (pid, version) = (show("MainPID"), installed());
    without_a_gap(&mut web, || dpkg(&["--install", "/packages/egress-agent.deb"]));
    assert!(is("is-active") && is("is-enabled"));
    assert!(show("MainPID") != pid && installed() != version);
    assert_eq!(fs::read_to_string(SETTINGS).unwrap(), settings);
    without_a_gap(&mut web, || drop(systemctl(&["restart", SERVICE])));

    dpkg(&["--remove", "egress-agent"]);
    assert!(!is("is-active") && !web.is_filtered() && !Path::new(&pins).exists());
    assert_eq!(fs::read_to_string(SETTINGS).unwrap(), settings);
    dpkg(&["--purge", "egress-agent"]);
    assert!(!Path::new("/etc/egress").exists() && !is("is-enabled"));
}

#[test]
#[ignore = "needs systemd as the first process: cargo xtask vm --test systemd"]
fn the_watchdog_restarts_an_agent_that_hangs_without_a_gap() {
    let world = World::without_agent();
    world.write(&policy(&format!("{{ unit: {} }}", world.slice.name)));
    world.tell_agent(&world.slice.cgroup(), "WatchdogSec=4");
    world.agent.start();
    let mut web = world.started("web", "");
    // It is alive, and says so.
    let mut last = String::new();
    for _ in 0..4 {
        let sign = || Some(world.agent.show("WatchdogTimestampMonotonic")).filter(|sign| *sign != last);
        last = eventually("a sign of life", sign).unwrap();
    }
    assert_eq!(world.agent.show("NRestarts"), "0");
    let pid = world.agent.show("MainPID");
    without_a_gap(&mut web, || {
        systemctl(&["kill", "--signal", "STOP", &world.agent.name]);
        world.agent.becomes("NRestarts", "1");
        world.agent.becomes("StatusText", "generation 1");
    });
    assert_ne!(world.agent.show("MainPID"), pid);
}
