//! The resolver against scripted answers, on a clock that jumps to whatever happens next.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::Write,
    net::IpAddr,
    sync::{Mutex, MutexGuard, Once},
};

use tempfile::TempDir;
use tokio::time::{advance, sleep, timeout_at};

use super::{
    ask::{Answers, Ask, Asking, Found},
    *,
};

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_mins(1);
const FLOOR: Duration = Duration::from_secs(5);
const GRACE: Duration = Duration::from_mins(5);

/// What is answered, and what was asked.
#[derive(Default)]
struct State {
    answers: HashMap<String, Answers>,
    takes: Duration,
    asked: Vec<(Instant, Arc<str>)>,
    under_way: usize,
    most_under_way: usize,
}

#[derive(Clone, Default)]
struct Script(Arc<Mutex<State>>);

impl Script {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    fn says(&self, name: &str, answers: Answers) {
        self.state().answers.insert(name.to_owned(), answers);
    }

    /// The times at which a name was asked for, since the last call.
    fn asked(&self, name: &str) -> Vec<Instant> {
        let asked = std::mem::take(&mut self.state().asked);
        asked.into_iter().filter(|(_, asked)| **asked == *name).map(|(at, _)| at).collect()
    }
}

impl Ask for Script {
    fn ask(&self, name: Arc<str>) -> Asking {
        let script = self.clone();
        Box::pin(async move {
            let takes = {
                let mut state = script.state();
                state.asked.push((Instant::now(), name.clone()));
                state.under_way += 1;
                state.most_under_way = state.most_under_way.max(state.under_way);
                state.takes
            };
            sleep(takes).await;
            let mut state = script.state();
            state.under_way -= 1;
            let answers = state.answers.get(&*name).cloned();
            drop(state);
            answers.unwrap_or_else(|| panic!("nothing is scripted for {name}"))
        })
    }
}

fn found(addresses: &[&str], ttl: Duration) -> Found {
    Found { addresses: set(addresses), ttl }
}

/// Both families, told apart by how they are written.
fn answers(addresses: &[&str], ttl: Duration) -> Answers {
    let (v6, v4): (Vec<_>, Vec<_>) = addresses.iter().partition(|text| text.contains(':'));
    Answers { v4: Ok(found(&v4, ttl)), v6: Ok(found(&v6, ttl)) }
}

fn set(addresses: &[&str]) -> BTreeSet<IpAddr> {
    addresses.iter().map(|text| text.parse().unwrap()).collect()
}

struct World {
    script: Script,
    resolver: Resolver,
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        Log::install();
        let directory = tempfile::tempdir().unwrap();
        let hosts = directory.path().join("hosts");
        let settings = Settings { floor: FLOOR, grace: GRACE, hosts, ..Settings::default() };
        let script = Script::default();
        let resolver = Resolver::with(settings, Vec::new(), Box::new(script.clone()));
        Self { script, resolver, directory }
    }

    /// A world in which `a` has these addresses, and they are known.
    async fn with(known: Answers) -> Self {
        let mut world = Self::new();
        world.script.says("a", known);
        world.want(&["a"]);
        world.resolver.first_answers(MINUTE).await;
        world.resolver.names();
        world
    }

    fn want(&mut self, names: &[&str]) {
        self.resolver.want(names.iter().map(ToString::to_string).collect());
    }

    fn hosts(&self, text: &str) {
        fs::write(self.directory.path().join("hosts"), text).unwrap();
    }

    /// Waits for a change; how long it took.
    async fn change(&mut self) -> Duration {
        let start = Instant::now();
        timeout(Duration::from_hours(100), self.resolver.changed()).await.expect("a change");
        start.elapsed()
    }

    /// Lets time pass, in which nothing may change.
    async fn nothing_for(&mut self, time: Duration) {
        assert!(timeout(time, self.resolver.changed()).await.is_err(), "{:?}", self.resolver.names());
    }

    /// Lets time pass, whatever happens in it.
    async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while timeout_at(end, self.resolver.changed()).await.is_ok() {
            self.resolver.names();
        }
    }

    #[track_caller]
    fn has(&mut self, name: &str, addresses: &[&str]) {
        assert_eq!(self.resolver.names().0.remove(name).unwrap_or_default(), set(addresses));
    }

    fn report(&self, name: &str) -> NameReport {
        self.resolver.report().into_iter().find(|report| report.name == name).unwrap()
    }
}

/// What the current thread logs. There is one subscriber for all tests: `tracing` may pass over a thread's own while those
/// of other threads come and go.
struct Log;

thread_local! {
    static LOG: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Log {
    /// Forgets what was logged so far.
    fn clear() {
        LOG.with_borrow_mut(Vec::clear);
    }

    fn install() {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| tracing_subscriber::fmt().with_writer(|| Self).with_ansi(false).init());
    }

    fn count(words: &[&str]) -> usize {
        let text = LOG.with_borrow(|log| String::from_utf8(log.clone()).unwrap());
        text.lines().filter(|line| words.iter().all(|word| line.contains(word))).count()
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        LOG.with_borrow_mut(|log| log.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn a_new_name_is_asked_for_at_once_and_one_that_is_not_wanted_is_forgotten() {
    let mut world = World::with(answers(&["192.0.2.1", "2001:db8::1"], MINUTE)).await;
    world.has("a", &["192.0.2.1", "2001:db8::1"]);
    world.script.says("b", answers(&["192.0.2.2"], MINUTE));
    world.want(&["b"]);
    assert_eq!(world.change().await, Duration::ZERO);
    world.has("b", &["192.0.2.2"]);
    world.has("a", &[]);
    world.script.asked("");
    world.nothing_for(5 * MINUTE).await;
    assert!(world.script.asked("a").is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_wanted_twice_is_asked_for_once() {
    let mut world = World::new();
    world.script.says("a", answers(&["192.0.2.1"], MINUTE));
    world.script.state().takes = SECOND;
    for names in [&["a"][..], &[], &["a"]] {
        world.want(names);
    }
    world.change().await;
    assert_eq!(world.script.asked("a").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_name_is_asked_for_again_before_its_records_end() {
    let mut world = World::with(answers(&["192.0.2.1"], MINUTE)).await;
    world.nothing_for(60 * MINUTE).await;
    let asked = world.script.asked("a");
    assert!(asked.len() > 60, "{}", asked.len());
    for (before, after) in asked.iter().zip(&asked[1..]) {
        assert!((48 * SECOND..MINUTE).contains(&(*after - *before)), "{:?}", *after - *before);
    }
}

#[tokio::test(start_paused = true)]
async fn a_ttl_of_zero_is_the_floor() {
    let mut world = World::with(answers(&["192.0.2.1"], Duration::ZERO)).await;
    world.nothing_for(10 * MINUTE).await;
    let asked = world.script.asked("a");
    assert!(asked.len() >= 100, "{}", asked.len());
    assert!(asked.iter().zip(&asked[1..]).all(|(before, after)| *after - *before >= FLOOR));
}

#[tokio::test(start_paused = true)]
async fn an_address_that_leaves_the_answer_stays_for_the_grace() {
    let mut world = World::with(answers(&["192.0.2.1"], FLOOR)).await;
    world.script.says("a", answers(&["192.0.2.2"], FLOOR));
    assert!(world.change().await <= 2 * FLOOR);
    world.has("a", &["192.0.2.1", "192.0.2.2"]);
    assert_eq!(world.change().await, GRACE);
    world.has("a", &["192.0.2.2"]);
}

#[tokio::test(start_paused = true)]
async fn addresses_that_rotate_stay_together_and_nothing_changes() {
    let mut world = World::with(answers(&["192.0.2.1"], Duration::ZERO)).await;
    world.script.says("a", answers(&["192.0.2.2"], Duration::ZERO));
    world.change().await;
    for _ in 0..20 {
        for address in ["192.0.2.1", "192.0.2.2"] {
            world.script.says("a", answers(&[address], Duration::ZERO));
            world.resolver.names();
            world.nothing_for(MINUTE).await;
        }
    }
    world.has("a", &["192.0.2.1", "192.0.2.2"]);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_ceases_to_exist_loses_its_addresses_and_gets_them_back() {
    let mut world = World::with(answers(&["192.0.2.1"], FLOOR)).await;
    world.script.says("a", answers(&[], FLOOR));
    let took = world.change().await;
    assert!(took >= GRACE && took <= GRACE + 2 * FLOOR, "{took:?}");
    world.has("a", &[]);
    assert!(!world.report("a").stale);
    world.script.says("a", answers(&["192.0.2.1"], FLOOR));
    assert!(world.change().await <= 2 * FLOOR);
    world.has("a", &["192.0.2.1"]);
}

#[tokio::test(start_paused = true)]
async fn while_nobody_answers_everything_stays_and_is_asked_for_less_and_less() {
    let mut world = World::with(answers(&["192.0.2.1", "2001:db8::1"], FLOOR)).await;
    Log::clear();
    world.script.says("a", Answers::failed("no answer"));
    world.nothing_for(24 * 60 * MINUTE).await;
    let asked = world.script.asked("a");
    let gaps: Vec<Duration> = asked.iter().zip(&asked[1..]).map(|(before, after)| *after - *before).collect();
    for (gap, expected) in gaps[1..].iter().zip([5, 10, 20, 40, 80, 160, 300, 300, 300]) {
        let expected = Duration::from_secs(expected);
        assert!(*gap >= (expected * 9 / 10).max(FLOOR) && *gap <= expected * 6 / 5, "{gap:?} for {expected:?}");
    }
    world.resolver.ask_others(Vec::new(), Box::new(world.script.clone()));
    world.nothing_for(MINUTE).await;
    assert!(gaps.last().is_some_and(|gap| *gap <= 330 * SECOND));
    let report = world.report("a");
    assert!(report.stale && report.error.as_deref() == Some("no answer"), "{report:?}");
    assert_eq!(Log::count(&["WARN", "cannot be resolved"]), 1);
    world.has("a", &["192.0.2.1", "2001:db8::1"]);
    world.script.says("a", answers(&["192.0.2.1", "2001:db8::1"], FLOOR));
    world.nothing_for(6 * MINUTE).await;
    assert_eq!(Log::count(&["INFO", "can be resolved again"]), 1);
    assert!(world.report("a").error.is_none());
}

#[tokio::test(start_paused = true)]
async fn where_one_family_fails_its_old_addresses_stay_beside_the_fresh_ones() {
    let mut world = World::with(answers(&["192.0.2.1", "2001:db8::1"], FLOOR)).await;
    world.script.says("a", Answers { v4: Ok(found(&["192.0.2.2"], FLOOR)), v6: Err("no answer".to_owned()) });
    world.change().await;
    world.has("a", &["192.0.2.1", "192.0.2.2", "2001:db8::1"]);
    assert_eq!(world.change().await, GRACE);
    world.has("a", &["192.0.2.2", "2001:db8::1"]);
    assert!(world.report("a").stale);
    world.nothing_for(60 * MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn an_outage_stops_the_clock_of_the_grace() {
    let mut world = World::with(answers(&["192.0.2.1"], FLOOR)).await;
    world.script.says("a", answers(&["192.0.2.2"], FLOOR));
    world.change().await;
    world.resolver.names();
    world.script.says("a", Answers::failed("no answer"));
    world.nothing_for(60 * MINUTE).await;
    world.has("a", &["192.0.2.1", "192.0.2.2"]);
    world.script.says("a", answers(&["192.0.2.2"], FLOOR));
    let took = world.change().await;
    assert!(took >= GRACE && took <= GRACE + 6 * MINUTE, "{took:?}");
    world.has("a", &["192.0.2.2"]);
}

#[tokio::test(start_paused = true)]
async fn thousands_of_names_are_neither_asked_at_once_nor_in_step() {
    let mut world = World::new();
    let names: Vec<String> = (0..3000).map(|number| format!("n{number}")).collect();
    for name in &names {
        world.script.says(name, answers(&["192.0.2.1"], MINUTE));
    }
    world.script.state().takes = Duration::from_millis(50);
    world.resolver.want(names.iter().cloned().collect());
    world.resolver.first_answers(MINUTE).await;
    assert_eq!(world.resolver.names().0.len(), 3000);
    assert_eq!(world.script.state().most_under_way, MOST_ASKING);
    world.script.asked("");
    world.nothing_for(10 * MINUTE).await;
    let asked = std::mem::take(&mut world.script.state().asked);
    let start = asked[0].0;
    let mut each_second = BTreeMap::<u64, usize>::new();
    for (at, _) in asked.iter().filter(|(at, _)| *at - start > 5 * MINUTE) {
        *each_second.entry((*at - start).as_secs()).or_default() += 1;
    }
    // Evenly spread they would be about 55 a second.
    let most = each_second.values().max().copied().unwrap();
    assert!(most < 250, "{most} in one second");
}

#[tokio::test(start_paused = true)]
async fn the_start_does_not_wait_longer_than_it_may() {
    let mut world = World::new();
    world.script.says("a", answers(&["192.0.2.1"], MINUTE));
    world.script.state().takes = MINUTE;
    world.want(&["a"]);
    let start = Instant::now();
    world.resolver.first_answers(5 * SECOND).await;
    assert_eq!(start.elapsed(), 5 * SECOND);
    world.has("a", &[]);
    assert_eq!(world.change().await, 55 * SECOND);
    world.has("a", &["192.0.2.1"]);
}

#[tokio::test(start_paused = true)]
async fn a_start_with_failures_goes_on() {
    let mut world = World::new();
    world.script.says("a", Answers::failed("no answer"));
    world.want(&["a"]);
    let start = Instant::now();
    world.resolver.first_answers(MINUTE).await;
    assert_eq!(start.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn waiting_that_is_given_up_again_and_again_loses_nothing() {
    let mut world = World::new();
    world.script.says("a", answers(&["192.0.2.1"], MINUTE));
    world.script.state().takes = SECOND;
    world.want(&["a"]);
    for _ in 0..99 {
        world.nothing_for(Duration::from_millis(10)).await;
    }
    advance(SECOND).await;
    assert_eq!(world.change().await, Duration::ZERO);
    world.has("a", &["192.0.2.1"]);
    assert_eq!(world.script.asked("a").len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_question_that_panics_is_one_that_failed() {
    let mut world = World::with(answers(&["192.0.2.1"], FLOOR)).await;
    world.script.state().answers.clear();
    world.nothing_for(MINUTE).await;
    world.has("a", &["192.0.2.1"]);
    assert!(world.report("a").error.unwrap().contains("panic"));
    world.script.says("a", answers(&["192.0.2.2"], FLOOR));
    world.change().await;
}

#[tokio::test(start_paused = true)]
async fn a_name_in_the_hosts_file_is_not_asked_for_and_may_be_of_this_host() {
    let mut world = World::new();
    world.hosts("127.0.0.1 a\n");
    world.resolver.hosts.refresh();
    world.want(&["a"]);
    world.resolver.first_answers(MINUTE).await;
    world.has("a", &["127.0.0.1"]);
    world.nothing_for(60 * MINUTE).await;
    assert!(world.script.asked("a").is_empty());
    assert_eq!(world.report("a").source, Source::Hosts);
}

#[tokio::test(start_paused = true)]
async fn a_name_gets_into_the_hosts_file_and_out_of_it() {
    let mut world = World::with(answers(&["192.0.2.1"], 60 * MINUTE)).await;
    world.hosts("127.0.0.1 a\n10.0.0.1 a\n");
    assert!(world.change().await <= FLOOR);
    world.has("a", &["10.0.0.1", "127.0.0.1", "192.0.2.1"]);
    assert_eq!(world.change().await, GRACE);
    world.has("a", &["10.0.0.1", "127.0.0.1"]);
    fs::remove_file(world.directory.path().join("hosts")).unwrap();
    assert!(world.change().await <= FLOOR);
    world.has("a", &["10.0.0.1"]);
    world.change().await;
    world.has("a", &["10.0.0.1", "192.0.2.1"]);
    assert_eq!(world.change().await, GRACE);
    world.has("a", &["192.0.2.1"]);
}

#[tokio::test(start_paused = true)]
async fn the_hosts_file_ends_an_outage() {
    let mut world = World::with(answers(&["192.0.2.1"], FLOOR)).await;
    world.script.says("a", Answers::failed("no answer"));
    world.nothing_for(MINUTE).await;
    world.hosts("10.0.0.1 a\n");
    assert!(world.change().await <= FLOOR);
    let report = world.report("a");
    assert!(!report.stale && report.error.is_none(), "{report:?}");
    world.has("a", &["10.0.0.1", "192.0.2.1"]);
    assert_eq!(world.change().await, GRACE);
    world.has("a", &["10.0.0.1"]);
}

#[tokio::test(start_paused = true)]
async fn an_answer_on_its_way_does_not_overrule_the_hosts_file() {
    let mut world = World::new();
    world.script.says("a", answers(&["192.0.2.1"], MINUTE));
    world.script.state().takes = 8 * SECOND;
    world.want(&["a"]);
    world.nothing_for(SECOND).await;
    world.hosts("10.0.0.1 a\n");
    world.change().await;
    world.has("a", &["10.0.0.1"]);
    world.nothing_for(MINUTE).await;
}

#[tokio::test(start_paused = true)]
async fn addresses_of_this_host_are_refused_and_told_of_once() {
    Log::clear();
    let hostile = ["192.0.2.1", "127.0.0.1", "169.254.169.254", "::1", "fe80::1", "64:ff9b::7f00:1"];
    let mut world = World::with(answers(&hostile, FLOOR)).await;
    world.has("a", &["192.0.2.1"]);
    world.nothing_for(60 * MINUTE).await;
    assert_eq!(Log::count(&["WARN", "refused"]), 5);
    assert_eq!(Log::count(&["WARN", "169.254.169.254", "link-local", "name=a"]), 1);
}

#[tokio::test(start_paused = true)]
async fn a_change_is_told_of_with_what_came_and_went() {
    let mut world = World::with(answers(&["192.0.2.1"], FLOOR)).await;
    Log::clear();
    world.script.says("a", answers(&["192.0.2.2", "192.0.2.3"], FLOOR));
    world.change().await;
    world.resolver.names();
    world.change().await;
    assert_eq!(Log::count(&["INFO", "name=a", "added=\"192.0.2.2,192.0.2.3\"", "removed=\"\""]), 1);
    assert_eq!(Log::count(&["INFO", "name=a", "added=\"\"", "removed=\"192.0.2.1\""]), 1);
    assert_eq!(Log::count(&["WARN"]), 0);
}

#[tokio::test(start_paused = true)]
async fn other_servers_are_asked_at_once_and_old_questions_are_dropped() {
    let mut world = World::with(answers(&["192.0.2.1"], 60 * MINUTE)).await;
    world.script.state().takes = 60 * MINUTE;
    let names: Vec<String> = (0..2 * MOST_ASKING).map(|number| format!("b{number}")).chain(["a".to_owned()]).collect();
    world.resolver.want(names.iter().cloned().collect());
    world.nothing_for(MINUTE).await;
    let other = Script::default();
    for name in &names {
        other.says(name, answers(&["192.0.2.2"], MINUTE));
    }
    world.resolver.ask_others(Vec::new(), Box::new(other));
    world.pass(SECOND).await;
    assert!(
        names[..2 * MOST_ASKING]
            .iter()
            .all(|name| world.report(name).addresses == ["192.0.2.2".parse::<IpAddr>().unwrap()])
    );
    world.has("a", &["192.0.2.1", "192.0.2.2"]);
}

#[tokio::test(start_paused = true)]
async fn other_servers_do_not_lower_the_floor() {
    let mut world = World::with(answers(&["192.0.2.1"], 60 * MINUTE)).await;
    let other = Script::default();
    other.says("a", answers(&["192.0.2.2"], MINUTE));
    world.resolver.ask_others(Vec::new(), Box::new(other));
    assert_eq!(world.change().await, FLOOR);
}

#[tokio::test(start_paused = true)]
async fn the_system_configuration_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    let resolv_conf = directory.path().join("resolv.conf");
    fs::write(&resolv_conf, "nameserver 192.0.2.53\n").unwrap();
    let settings = Settings { resolv_conf: resolv_conf.clone(), ..Settings::default() };
    let mut resolver = Resolver::new(settings).unwrap();
    assert_eq!(resolver.servers, ["192.0.2.53:53".parse().unwrap()]);
    fs::write(&resolv_conf, "nameserver 192.0.2.54\n").unwrap();
    resolver.reread_system();
    assert_eq!(resolver.servers, ["192.0.2.54:53".parse().unwrap()]);
    fs::remove_file(&resolv_conf).unwrap();
    fs::create_dir(&resolv_conf).unwrap();
    resolver.reread_system();
    assert_eq!(resolver.servers, ["192.0.2.54:53".parse().unwrap()]);
}

#[tokio::test(start_paused = true)]
async fn a_report_says_what_is_known_of_each_name() {
    let world = World::with(answers(&["192.0.2.1"], MINUTE)).await;
    let report = serde_json::to_value(world.resolver.report()).unwrap();
    let next = report[0]["next"].as_str().unwrap();
    assert!(humantime::parse_rfc3339(next).unwrap() > SystemTime::now(), "{next}");
    let expected = serde_json::json!([
        { "name": "a", "addresses": ["192.0.2.1"], "source": "dns", "next": next, "stale": false }
    ]);
    assert_eq!(report, expected);
}
