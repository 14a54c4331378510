//! While policies change, each answer is that of the old one or that of the new one.
//!
//! Threads dial without a pause and know when which policy can be in force; see [`egress_tests::hammer`]. Among the
//! policies that take turns are those whose change would show anything in between: prefixes inside each other that come and
//! go together, sets of ports, audit views, rules of users.

#![allow(clippy::unwrap_used, reason = "a test ends where it cannot go on")]

use std::{
    fs,
    path::Path,
    process::Command,
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use egress_agent::{
    cgroup,
    dataplane::{Change, Dataplane, KernelLog, NameSettings, PacketGuard},
    pins::PinDirectory,
    policy::PolicySet,
    scopes::{Layout, Node, Selector, UnknownWorkloads},
};
use egress_tests::{
    agent::Agent,
    alternation::{SPECS, context, expected, policies, text},
    bpffs::Bpffs,
    cgroup::Cgroup,
    hammer::{Expected, Hammer, THREADS, Tally},
    netns::Netns,
    world::World,
};
use rustix::process::Signal;

/// The object that the agent was built with.
const OBJECT: &str = match option_env!("EGRESS_EBPF_OBJECT") {
    Some(object) => object,
    None => concat!(env!("CARGO_MANIFEST_DIR"), "/../target/bpf/egress-ebpf.o"),
};

#[test]
fn the_destinations_tell_the_policies_apart() {
    let expected = expected(&policies().unwrap());
    let with = |wanted: &dyn Fn(&Expected) -> bool| expected.iter().filter(|expected| wanted(expected)).count();
    let always = with(&|expected| expected.is_open.iter().all(|&is_open| is_open));
    let never = with(&|expected| !expected.is_open.iter().any(|&is_open| is_open));
    assert!(always >= 3 && never >= 5, "{always} always open, {never} never");
    for index in 0..SPECS.len() {
        let next = (index + 1) % SPECS.len();
        let comes = with(&|expected| !expected.is_open[index] && expected.is_open[next]);
        let goes = with(&|expected| expected.is_open[index] && !expected.is_open[next]);
        assert!(comes > 0 && goes > 0, "from policy {index} to {next}: {comes} come, {goes} go");
    }
}

/// They need all of the machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// How long policies change.
const TIME: Duration = Duration::from_secs(5);

fn check(what: &str, changes: u64, tally: &Tally) {
    println!("{what}: {changes} changes, {} calls, {} of them under one policy alone", tally.calls, tally.certain);
    assert_eq!(tally.wrong, 0, "{}", tally.first);
    assert!(tally.certain > 50 && tally.certain < tally.calls, "{tally:?}");
}

/// A cgroup with a filter of its own, without an agent around it.
struct Filter {
    dataplane: Dataplane,
    layouts: Vec<Layout>,
    cgroup: Cgroup,
}

impl Filter {
    /// With the first policy in force.
    fn new(pins: &Path) -> Self {
        let (cgroup, mount) = (Cgroup::new().unwrap(), cgroup::mount_point().unwrap());
        let opened = cgroup::Cgroup::open(cgroup.path(), &mount).unwrap();
        let nodes = [Node { id: opened.id, path: cgroup.name().trim_start_matches('/').into() }];
        let layout = |policies: PolicySet| {
            let mut selector = Selector::new(policies.into(), context(), UnknownWorkloads::Deny, Vec::new());
            selector.layout(&nodes, None).unwrap()
        };
        let layouts: Vec<Layout> = policies().unwrap().into_iter().map(layout).collect();
        let set = PinDirectory::claim(pins).unwrap().begin().unwrap();
        let mut dataplane = Dataplane::prepare(
            &fs::read(OBJECT).unwrap(),
            KernelLog::Off,
            PacketGuard::On,
            NameSettings::default(),
            set,
            1 << 30,
        )
        .unwrap();
        dataplane.apply(&layouts[0], Change::Policy).unwrap();
        dataplane.attach(&opened).unwrap();
        Self { dataplane, layouts, cgroup }
    }

    /// Puts one policy after the other in force until the time is up; how many.
    fn change_until(&mut self, end: Instant, hammer: &Hammer) -> u64 {
        (1..)
            .take_while(|_| Instant::now() < end)
            .inspect(|&number| {
                hammer.begin(number);
                let layout = &self.layouts[usize::try_from(number).unwrap() % self.layouts.len()];
                assert!(self.dataplane.apply(layout, Change::Policy).unwrap().is_changed);
                hammer.done(number);
                // Now and then, one policy alone is in force for a while.
                if number % 8 == 0 {
                    thread::sleep(Duration::from_millis(20));
                }
            })
            .last()
            .unwrap_or(0)
    }
}

/// Several filters side by side: changes wait for the kernel, and those that wait at the same time wait once.
#[test]
fn each_answer_is_that_of_the_old_or_the_new_policy() {
    const FILTERS: usize = 16;
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (bpffs, namespace) = (Bpffs::new().unwrap(), Netns::with_every_address_local().unwrap());
    let expected = expected(&policies().unwrap());
    let mut filters: Vec<Filter> =
        (0..FILTERS).map(|index| Filter::new(&bpffs.path().join(format!("pins-{index}")))).collect();
    let end = Instant::now() + TIME;
    let results: Vec<(u64, Tally)> = thread::scope(|scope| {
        let (expected, namespace) = (&expected, &namespace);
        let running: Vec<_> = filters
            .iter_mut()
            .map(|filter| {
                scope.spawn(move || {
                    // Eight threads in all.
                    let hammer = Hammer::start(&filter.cgroup, namespace, THREADS.div_ceil(FILTERS), expected).unwrap();
                    (filter.change_until(end, &hammer), hammer.finish().unwrap())
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut changes = 0;
    let mut total = Tally::default();
    for (count, tally) in results {
        changes += count;
        total.add(tally);
    }
    check("in the kernel", changes, &total);
    assert!(changes >= 200, "only {changes} changes");
}

/// `run`, whose denials nobody reads.
fn command(world: &World) -> Command {
    let agent = world.command(&[]).unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" > /dev/null", "sh"]).arg(agent.get_program()).args(agent.get_args());
    command
}

fn start(world: &World) -> Agent {
    let mut agent = Agent::spawn_in(Some(&world.place), command(world)).unwrap();
    agent.wait_for("policy applied generation=1 ").unwrap();
    agent
}

/// Writes the next policy, and has it put in force.
fn change(world: &World, hammer: &Hammer, number: u64, mut put_in_force: impl FnMut()) {
    hammer.begin(number);
    world.write(&text(SPECS[usize::try_from(number).unwrap() % SPECS.len()])).unwrap();
    put_in_force();
    hammer.done(number);
    // One policy alone is in force for a while.
    thread::sleep(Duration::from_millis(20));
}

fn world() -> (World, Vec<Expected>) {
    let world = World::opening(&[]).unwrap();
    world.write(&text(SPECS[0])).unwrap();
    (world, expected(&policies().unwrap()))
}

#[test]
fn an_agent_that_reloads_gives_the_answers_of_the_old_or_the_new_policy() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (world, expected) = world();
    let agent = start(&world);
    let hammer = Hammer::start(&world.cgroup, &world.namespace, THREADS, &expected).unwrap();
    let end = Instant::now() + TIME;
    let mut changes = 0;
    while Instant::now() < end {
        changes += 1;
        change(&world, &hammer, changes, || {
            let output = world.place.output(&["reload", "--wait"]).unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        });
    }
    check("reloads", changes, &hammer.finish().unwrap());
    assert!(changes >= 10, "only {changes} changes");
    drop(agent);
}

#[test]
fn agents_that_come_and_go_give_the_answers_of_the_old_or_the_new_policy() {
    let _alone = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let (world, expected) = world();
    let mut agent = start(&world);
    let hammer = Hammer::start(&world.cgroup, &world.namespace, THREADS / 4, &expected).unwrap();
    let end = Instant::now() + TIME;
    let mut changes = 0;
    while Instant::now() < end {
        let signal = if changes % 2 == 0 { Signal::KILL } else { Signal::TERM };
        changes += 1;
        change(&world, &hammer, changes, || {
            agent.signal(signal).unwrap();
            agent.exit_status().unwrap();
            agent = start(&world);
        });
    }
    check("restarts", changes, &hammer.finish().unwrap());
    assert!(changes >= 2, "only {changes} changes");
    assert_eq!(world.place.pinned().len(), 1);
}
