//! What the agent meets that is not as it should be: pins of others, file systems and cgroups that go, a kernel that
//! refuses half-way or has no memory, a ring buffer that nobody empties. What was in force stays in force.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use egress_agent::{
    cgroup,
    compile::{Context, NodeAction, NodeDefault},
    dataplane::{Change, Dataplane, KernelLog, NameSettings, PacketGuard, pinned},
    pins::PinDirectory,
    policy::load::load_text,
    run::chain,
    scopes::{Layout, Node, Selector, UnknownWorkloads},
};
use egress_tests::{
    agent::Agent,
    bpffs::Bpffs,
    dial::{Call, Dialer, Method, Timed},
    eventually,
    foreign::{self, Hook, How, Program},
    program, unique_name,
    world::{World, opening},
};
use rustix::{
    mount::{UnmountFlags, unmount},
    process::Signal,
};

const ONE: &str = "192.0.2.1";
const TWO: &str = "192.0.2.2";

/// One address is open, another is not.
#[track_caller]
fn expect(world: &mut World, open: &str, refused: &str) {
    assert!(world.is_open(open).unwrap(), "{open} is refused");
    assert!(!world.is_open(refused).unwrap(), "{refused} is open");
}

/// A call to each hook.
fn every_hook() -> [Call; 4] {
    let call = |method, to: &str| Call { method, mapped: false, to: to.parse().unwrap() };
    [
        call(Method::TcpConnect, "192.0.2.2:80"),
        call(Method::TcpConnect, "[2001:db8::2]:80"),
        call(Method::UdpSend, "192.0.2.2:80"),
        call(Method::UdpSend, "[2001:db8::2]:80"),
    ]
}

fn is_refused(world: &mut World) -> [bool; 4] {
    every_hook().map(|call| world.dialer.is_refused(&call).unwrap())
}

/// The start of an agent fails, with the one ERROR that has all of `words`.
#[track_caller]
fn fails(world: &World, command: Command, code: i32, words: &[&str]) {
    let mut agent = Agent::spawn_in(Some(&world.place), command).unwrap();
    let status = agent.exit_status().unwrap().code();
    let log = agent.rest().unwrap().1.join("\n");
    assert_eq!(status, Some(code), "{log}");
    let says = |line: &str| line.contains("ERROR") && words.iter().all(|word| line.contains(word));
    assert!(log.lines().any(says), "{words:?} in\n{log}");
    assert!(!log.contains("policy applied"), "{log}");
}

fn plain(world: &World) -> Command {
    world.command(&[]).unwrap()
}

/// The agent behind another command.
fn behind(world: &World, program: &str, args: &[&str]) -> Command {
    let agent = plain(world);
    let mut command = Command::new(program);
    command.args(args).arg(agent.get_program()).args(agent.get_args());
    command
}

#[test]
fn what_others_keep_in_the_pin_directory_is_left_alone() {
    let world = World::opening(&[ONE]).unwrap();
    let elsewhere = world.place.pins().with_file_name("elsewhere");
    world.start(&[]).unwrap().kill().unwrap();
    fs::create_dir(&elsewhere).unwrap();
    foreign::pin_array(&elsewhere.join("META"), 4, 1).unwrap();
    for name in ["notes", "set-", "set-x", "set-2-old", "new-"] {
        fs::create_dir(world.pin(name)).unwrap();
        foreign::pin_array(&world.pin(name).join("connect4"), 4, 1).unwrap();
    }
    // These have our names, and are no directories.
    for name in ["META", "set-2", "set-7", "new-3"] {
        foreign::pin_array(&world.pin(name), 4, 1).unwrap();
    }
    symlink(&elsewhere, world.pin("set-6")).unwrap();
    let theirs = ["META", "new-", "new-3", "notes", "set-", "set-2", "set-2-old", "set-6", "set-7", "set-x"];
    let without_ours = || {
        let ours = ["set-1", "set-8", "set-9"];
        world.place.pinned().into_iter().filter(|name| !ours.contains(&name.as_str())).collect::<Vec<_>>()
    };
    for _ in 0..2 {
        let agent = world.start(&[]).unwrap();
        assert_eq!(without_ours(), theirs);
        assert_eq!(world.place.status().unwrap().0, Some(0));
        agent.kill().unwrap();
    }
    assert_eq!(world.detach().unwrap().0, Some(0));
    assert_eq!(world.place.pinned(), theirs);
    assert!(elsewhere.join("META").exists() && world.pin("notes/connect4").exists());
}

#[test]
fn a_set_that_holds_something_else_is_said_and_retired() {
    let mut world = World::opening(&[ONE]).unwrap();
    world.start(&[]).unwrap().stop().unwrap();
    // Nothing at all; maps of another layout; a map in the place of a link; a link in the place of a map.
    for name in ["set-2", "set-3", "set-4", "set-5"] {
        fs::create_dir(world.pin(name)).unwrap();
    }
    for map in ["META", "EVENTS", "STATS", "POLICY", "WORKLOADS"] {
        foreign::pin_array(&world.pin("set-3").join(map), 4096, 4).unwrap();
    }
    foreign::pin_array(&world.pin("set-4/connect4"), 4, 1).unwrap();
    let pass = Program::pass(Hook::Connect4).unwrap().attach(&world.cgroup, How::Link).unwrap();
    pass.pin(&world.pin("set-5/EVENTS")).unwrap();
    for set in ["set-5", "set-4", "set-3", "set-2"] {
        let (code, status) = world.place.status().unwrap();
        assert_eq!(code, Some(3), "{set}: {status:#}");
        assert!(status["degraded"].to_string().contains("META"), "{set}: {status:#}");
        let aside = world.place.pins().with_file_name(set);
        fs::rename(world.pin(set), aside).unwrap();
    }
    for set in ["set-5", "set-4", "set-3", "set-2"] {
        fs::rename(world.place.pins().with_file_name(set), world.pin(set)).unwrap();
    }
    let mut agent = world.start(&[]).unwrap();
    assert_eq!(world.place.pinned(), ["set-6"]);
    let log = agent.log().join("\n");
    assert_eq!(log.matches("denials of the agent before are lost").count(), 4, "{log}");
    assert!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
    expect(&mut world, ONE, TWO);
}

#[test]
fn a_pin_directory_of_somebody_else_is_refused() {
    let world = World::opening(&[ONE]).unwrap();
    let pins = world.place.pins();
    fs::create_dir(&pins).unwrap();
    let words = ["chown root:root", "chmod 700", pins.to_str().unwrap()];
    for (owner, mode) in [(65_534, 0o700), (65_534, 0o755), (0, 0o710), (0, 0o701)] {
        chown(&pins, Some(owner), None).unwrap();
        fs::set_permissions(&pins, fs::Permissions::from_mode(mode)).unwrap();
        fails(&world, plain(&world), 4, &words);
    }
    fs::set_permissions(&pins, fs::Permissions::from_mode(0o700)).unwrap();
    world.start(&[]).unwrap();
}

#[test]
fn a_file_in_the_place_of_the_pin_directory_is_refused() {
    let world = World::opening(&[ONE]).unwrap();
    foreign::pin_array(&world.place.pins(), 4, 1).unwrap();
    fails(&world, plain(&world), 4, &[world.place.pins().to_str().unwrap()]);
}

#[test]
fn on_a_bpf_file_system_for_reading_only_the_rules_before_stay() {
    let mut world = World::opening(&[ONE]).unwrap();
    let bpffs = world.place.pins().parent().unwrap().display().to_string();
    let read_only = format!("mount --bind {bpffs} {bpffs}; mount -o remount,bind,ro {bpffs}; exec \"$@\"");
    let command = |world: &World| behind(world, "unshare", &["--mount", "sh", "-ec", &read_only, "sh"]);
    fails(&world, command(&world), 4, &["cannot make", "Read-only file system", &bpffs]);
    assert_eq!(is_refused(&mut world), [false; 4]);

    world.start(&[]).unwrap().kill().unwrap();
    world.open_only(&[TWO]).unwrap();
    fails(&world, command(&world), 4, &["cannot make", "Read-only file system", &bpffs]);
    expect(&mut world, ONE, TWO);
    assert_eq!(world.place.pinned(), ["set-1"]);
}

#[test]
fn without_a_capability_the_rules_before_stay() {
    let mut world = World::opening(&[ONE]).unwrap();
    world.start(&[]).unwrap().kill().unwrap();
    world.open_only(&[TWO]).unwrap();
    for capability in ["bpf", "net_admin", "perfmon"] {
        let bounding = format!("--bounding-set=-{capability},-sys_admin");
        fails(&world, behind(&world, "setpriv", &[&bounding]), 4, &["CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"]);
        expect(&mut world, ONE, TWO);
        assert_eq!(world.place.pinned(), ["set-1"]);
    }
}

/// The fourth of four hooks cannot be attached.
#[test]
fn where_the_kernel_refuses_half_way_nothing_stays_attached() {
    let mut world = World::opening(&[ONE]).unwrap();
    let alone = Program::pass(Hook::Sendmsg6).unwrap().attach(&world.cgroup, How::Exclusive).unwrap();
    fails(&world, plain(&world), 4, &["cannot attach sendmsg6", &world.cgroup.name(), "not permitted"]);
    assert_eq!(is_refused(&mut world), [false; 4]);
    assert!(world.place.pinned().is_empty());
    drop(alone);
    world.start(&[]).unwrap();
    assert_eq!(is_refused(&mut world), [true; 4]);
}

/// A world whose cgroup is inside that of another: whoever comes to the outer one later may want to be alone.
fn inside(outer: &World) -> (World, impl Sized) {
    let mut inner = World::opening(&[ONE]).unwrap();
    let cgroup = outer.cgroup.child("inner").unwrap();
    inner.dialer = Dialer::start(program("dial").unwrap(), &cgroup, &inner.namespace).unwrap();
    let outside = std::mem::replace(&mut inner.cgroup, cgroup);
    (inner, outside)
}

#[test]
fn where_the_next_start_is_refused_half_way_the_rules_before_stay() {
    let outer = World::opening(&[]).unwrap();
    let (mut world, _outside) = inside(&outer);
    world.start(&[]).unwrap().kill().unwrap();
    let alone = Program::pass(Hook::Sendmsg6).unwrap().attach(&outer.cgroup, How::Exclusive).unwrap();
    world.open_only(&[TWO]).unwrap();
    fails(&world, plain(&world), 4, &["cannot attach sendmsg6"]);
    expect(&mut world, ONE, TWO);
    assert_eq!(world.place.pinned(), ["set-1"]);
    drop(alone);
    world.start(&[]).unwrap();
    expect(&mut world, TWO, ONE);
}

/// Nobody may be in a cgroup that is made anew.
fn leave(world: &World) {
    let root = cgroup::mount_point().unwrap();
    fs::write(root.join("cgroup.procs"), world.dialer.pid().to_string()).unwrap();
}

#[test]
fn what_cannot_be_attached_to_a_cgroup_made_anew_is_tried_again() {
    let outer = World::opening(&[]).unwrap();
    let (mut world, outside) = inside(&outer);
    let mut agent = world.start(&[]).unwrap();
    let alone = Program::pass(Hook::Connect6).unwrap().attach(&outer.cgroup, How::Exclusive).unwrap();
    leave(&world);
    world.cgroup.make_anew().unwrap();
    let line = agent.wait_for("cannot attach again").unwrap();
    assert!(line.contains("ERROR") && line.contains("connect6"), "{line}");
    world.cgroup.take_process(world.dialer.pid()).unwrap();
    // It is tried again each second, and undone each time.
    eventually("nothing to be attached", || (is_refused(&mut world) == [false; 4]).then_some(())).unwrap();
    eventually("a status between two attempts", || {
        let (code, status) = world.place.status().unwrap();
        (code == Some(3) && status["degraded"].to_string().contains("not attached")).then_some(())
    })
    .unwrap();
    drop(alone);
    agent.wait_for("attached again").unwrap();
    assert_eq!(is_refused(&mut world), [true; 4]);
    assert_eq!(world.place.status().unwrap().0, Some(0));
    drop((agent, outside));
}

#[test]
fn without_a_run_directory_the_agent_warns_and_enforces() {
    let mut world = World::opening(&[ONE]).unwrap();
    let nowhere = world.policies.path().join("policy.yaml/run");
    let mut agent = world.start(&["--run-dir", nowhere.to_str().unwrap()]).unwrap();
    expect(&mut world, ONE, TWO);
    world.open_only(&[TWO]).unwrap();
    agent.wait_for("policy applied generation=2 ").unwrap();
    expect(&mut world, TWO, ONE);
    let warnings: Vec<&String> = agent.log().iter().filter(|line| !line.contains("INFO")).collect();
    let says = |line: &str| line.contains("WARN") && line.contains("no control socket");
    assert!(matches!(warnings[..], [warning] if says(warning)), "{warnings:#?}");
}

/// The numbers after `lost=` in lines of a log.
fn lost(log: &[String]) -> u64 {
    let number = |line: &String| line.split("lost=").nth(1)?.split_whitespace().next()?.parse::<u64>().ok();
    log.iter().filter(|line| line.contains("WARN")).filter_map(number).sum()
}

const FLOOD: u32 = 20_000;

fn flood(world: &mut World) {
    let call = Call { method: Method::UdpConnect, mapped: false, to: "192.0.2.2:80".parse().unwrap() };
    world.dialer.time(Timed::Connect, &call, FLOOD).unwrap();
}

#[test]
fn a_full_ring_buffer_loses_reports_and_no_verdict() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    agent.signal(Signal::STOP).unwrap();
    flood(&mut world);
    assert_eq!(is_refused(&mut world), [true; 4]);
    assert!(world.is_open(ONE).unwrap());
    agent.signal(Signal::CONT).unwrap();
    agent.wait_for("the ring buffer was full").unwrap();
    let (_, status) = world.place.status().unwrap();
    let (_, denials, log) = agent.stop().unwrap();
    let all = u64::from(FLOOD) + 4;
    assert!(denials.len() > 5_000 && lost(&log) > 5_000, "{} reported, {} lost", denials.len(), lost(&log));
    assert_eq!(denials.len() as u64 + lost(&log), all, "{log:#?}");
    let counters = &status["counters"];
    assert_eq!((&counters["deny"], &counters["events_lost"]), (&all.into(), &lost(&log).into()), "{counters}");
}

#[test]
fn reports_lost_while_no_agent_ran_are_counted_by_the_next_one() {
    let mut world = World::opening(&[ONE]).unwrap();
    world.start(&[]).unwrap().kill().unwrap();
    flood(&mut world);
    let (_, denials, log) = world.start(&[]).unwrap().stop().unwrap();
    assert_eq!(denials.len() as u64 + lost(&log), u64::from(FLOOD), "{log:#?}");
}

/// Denials that come faster than they are written keep nobody waiting.
#[test]
fn an_agent_in_a_flood_of_denials_stops_when_it_is_asked() {
    let mut world = World::opening(&[ONE]).unwrap();
    let mut agent = world.start(&[]).unwrap();
    let stop = AtomicBool::new(false);
    let (status, time) = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                flood(&mut world);
            }
        });
        // By the time of the second, there are more than it can write.
        agent.denial().unwrap();
        agent.wait_for("the ring buffer was full").unwrap();
        agent.signal(Signal::TERM).unwrap();
        let asked = Instant::now();
        let status = agent.exit_status();
        stop.store(true, Ordering::Relaxed);
        (status, asked.elapsed())
    });
    assert_eq!(status.unwrap().code(), Some(0));
    assert!(time < Duration::from_secs(4), "{time:?}");
}

/// Without its pins, what is in force hangs on the agent alone.
#[test]
fn a_bpf_file_system_that_goes_takes_nothing_out_of_force_while_the_agent_runs() {
    let mut world = World::opening(&[ONE]).unwrap();
    let bpffs = Bpffs::new().unwrap();
    let pins = bpffs.path().join("egress");
    let mut agent = world.start(&["--pin-dir", pins.to_str().unwrap()]).unwrap();
    unmount(bpffs.path(), UnmountFlags::DETACH).unwrap();
    let line = agent.wait_for("the pins are gone").unwrap();
    assert!(line.contains("ERROR"), "{line}");
    expect(&mut world, ONE, TWO);
    world.open_only(&[TWO]).unwrap();
    agent.wait_for("policy applied generation=2 ").unwrap();
    expect(&mut world, TWO, ONE);

    let status = |world: &World| {
        world.place.output(&["status", "--output", "json", "--pin-dir", pins.to_str().unwrap()]).unwrap()
    };
    let told = status(&world);
    let text = String::from_utf8_lossy(&told.stdout).into_owned();
    assert!(told.status.code() == Some(1) && text.contains("the pins are gone"), "{text}");
    // Also one that is made anew is filtered while the agent runs.
    leave(&world);
    world.cgroup.make_anew().unwrap();
    agent.wait_for("attached again").unwrap();
    world.cgroup.take_process(world.dialer.pid()).unwrap();
    expect(&mut world, TWO, ONE);
    agent.kill().unwrap();
    assert_eq!(status(&world).status.code(), Some(3));
    // Whoever drops it unmounts it.
    rustix::mount::mount("bpf", bpffs.path(), "bpf", rustix::mount::MountFlags::empty(), None).unwrap();
    let open = eventually("the end of the rules", || world.is_open(ONE).unwrap().then_some(()));
    open.unwrap();
}

/// A cgroup of version 1 that limits memory.
struct Memory(PathBuf);

/// Its name, for the process that enters it.
const MEMORY: &str = "EGRESS_TEST_MEMORY";
const LIMIT: u64 = 8 << 20;

impl Memory {
    /// `None` where the kernel has no such controller.
    fn new() -> Option<Self> {
        let path = Path::new("/sys/fs/cgroup/memory").join(unique_name());
        fs::create_dir(&path).ok()?;
        let memory = Self(path);
        memory.limit(LIMIT);
        // Whoever needs more waits for it, and is not killed.
        fs::write(memory.0.join("memory.oom_control"), "1").unwrap();
        Some(memory)
    }

    fn limit(&self, bytes: u64) {
        fs::write(self.0.join("memory.limit_in_bytes"), bytes.to_string()).unwrap();
    }

    /// Gives a process what it needs itself, a little each time it waits: what the kernel needs for it does not wait.
    fn feed(&self, child: &mut Child) -> ExitStatus {
        let mut limit = LIMIT;
        eventually("the end of a process without memory", || {
            if fs::read_to_string(self.0.join("memory.oom_control")).unwrap().contains("under_oom 1") {
                limit += 64 << 10;
                self.limit(limit);
            }
            child.try_wait().unwrap()
        })
        .unwrap()
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        eventually("an empty memory cgroup", || fs::remove_dir(&self.0).ok()).unwrap();
    }
}

/// The object that the agent was built with.
const OBJECT: &str = match option_env!("EGRESS_EBPF_OBJECT") {
    Some(object) => object,
    None => concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/egress-ebpf.o"),
};

/// What a policy is to the kernel.
fn layout(world: &World, text: &str) -> Layout {
    let node_default = NodeDefault { action: NodeAction::Deny, loopback: true, dns: false };
    let context = Context::new(node_default);
    let policies = load_text("policy.yaml", text).policies;
    let mut selector = Selector::new(policies.into(), context, UnknownWorkloads::Deny, Vec::new());
    let path = world.cgroup.name().trim_start_matches('/').into();
    selector.layout(&[Node { id: world.cgroup.id().unwrap(), path }], None).unwrap()
}

/// As many addresses as the kernel needs 13 MB for.
fn large() -> String {
    let addresses: Vec<String> =
        (0..100_000).map(|index| format!("10.{}.{}.{}", index >> 15, (index >> 7) & 255, (index & 127) * 2)).collect();
    opening(&addresses.iter().map(String::as_str).collect::<Vec<_>>())
}

/// In a process of its own, since all of it is limited.
#[test]
#[ignore = "run by the test below"]
fn without_memory_in_a_process_of_its_own() {
    let Some(memory) = env::var_os(MEMORY).map(PathBuf::from) else { return };
    let enter = |cgroup: &Path| fs::write(cgroup.join("cgroup.procs"), "0").unwrap();
    let mut world = World::opening(&[]).unwrap();
    let [small, large, other] = [opening(&[ONE]), large(), opening(&[TWO])].map(|text| layout(&world, &text));
    let pins = PinDirectory::claim(&world.place.pins()).unwrap();
    let mut dataplane = Dataplane::prepare(
        &fs::read(OBJECT).unwrap(),
        KernelLog::Off,
        PacketGuard::On,
        NameSettings::default(),
        pins.begin().unwrap(),
        u64::MAX,
    )
    .unwrap();
    let mount = cgroup::mount_point().unwrap();
    dataplane.apply(&small, Change::Policy).unwrap();
    dataplane.attach(&cgroup::Cgroup::open(world.cgroup.path(), &mount).unwrap()).unwrap();
    dataplane.commit().unwrap();
    for _ in 0..3 {
        enter(&memory);
        let refused = dataplane.apply(&large, Change::Policy);
        enter(memory.parent().unwrap());
        let error = chain(&refused.unwrap_err());
        assert!(error.contains("cannot fill map POLICY") && error.contains("os error 12"), "{error}");
        assert_eq!(dataplane.meta().generation(), 1);
        expect(&mut world, ONE, TWO);
        // Nothing of it is left but what was there before.
        let of_policy = |uses: Vec<pinned::MapUse>| uses.into_iter().find(|map| map.name == "POLICY").unwrap().entries;
        assert_eq!(of_policy(pinned::map_uses(dataplane.pins().path()).unwrap()), 1);
    }
    assert_eq!(dataplane.apply(&large, Change::Policy).unwrap().generation, 2);
    assert!(world.is_open("10.0.0.2").unwrap());
    dataplane.apply(&other, Change::Policy).unwrap();
    expect(&mut world, TWO, ONE);
}

#[test]
fn without_memory_the_old_policy_stays_in_force() {
    let Some(memory) = Memory::new() else {
        return println!("no memory controller of version 1: nothing to see");
    };
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", "without_memory_in_a_process_of_its_own", "--ignored", "--nocapture"]);
    let mut child = command.env(MEMORY, &memory.0).spawn().unwrap();
    assert!(memory.feed(&mut child).success());
}
